"""The command line. Heavy imports wait until a command needs them, so that `--help` is quick."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pilotage import (
    __version__,
    cli_bundles,
    cli_calibrate,
    cli_explain,
    cli_leaderboard,
    cli_plan,
    cli_profile,
    cli_steer,
    cli_versions,
)
from pilotage.console import AsJson, fail, print_json
from pilotage.world.spec import SpecError

if TYPE_CHECKING:
    from pilotage.live.mlflow_runs import MlflowRun

app = typer.Typer(
    help="Learns, proves and ships deployment policies for fleets of machine-learning models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_versions.app)
app.add_typer(cli_bundles.app)
app.add_typer(cli_explain.app)
app.add_typer(cli_steer.app)
app.add_typer(cli_calibrate.app)
app.add_typer(cli_plan.app)
app.add_typer(cli_profile.app)
app.add_typer(cli_leaderboard.app)
_screen = Console(stderr=True)
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

Env = Annotated[str, typer.Argument(help="a shipped environment (see `pilotage envs`) or a scenario file")]
Data = Annotated[Path | None, typer.Option("--data", help="folder of traces (default: PILOTAGE_DATA)")]
Hours = Annotated[float | None, typer.Option("--hours", help="length of the run instead of the scenario's")]
PlacementRule = Annotated[
    str | None,
    typer.Option(
        "--placement",
        help="rule, or placement.json of a training, instead of the scenario's: learned-placement, ...",
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="where runs are made: local[:N] processes, tcp://… (Dask), ray, ray://… (default: here)",
    ),
]
Mlflow = Annotated[
    str | None, typer.Option("--mlflow", help="URL of an MLflow server that keeps the run (default: none)")
]
Policies = Annotated[
    list[str],
    typer.Option(
        "--policy", help="name, name:field=value,…, .toml file, or folder of a training; repeatable"
    ),
]


def main() -> NoReturn:
    """Entry point: errors in what the user gave end with one line and exit code 2 (3: a bundle that is not sound),
    Ctrl-C with 130."""
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        raise SystemExit(code if isinstance(code, int) else 0)
    except SpecError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted; what was finished is kept, and the same command resumes it", _INTERRUPTED)
    except typer.Exit as exit_:
        raise SystemExit(exit_.exit_code) from None
    except OSError as error:
        fail(f"{error.filename or 'output'}: {error.strerror or error}", 2)
    except ModuleNotFoundError as error:
        extra = {
            "gymnasium": "sim",
            "numba": "sim",
            "pandas": "sim",
            "platformdirs": "sim",
            "cmaes": "learn",
            "distributed": "cluster",
            "joblib": "sim",
            "ray": "cluster",
            "psycopg": "cluster",
            "optuna": "learn",
            "stable_baselines3": "learn",
            "torch": "learn",
            "matplotlib": "report",
            "jinja2": "report",
            "mlflow": "live",
            "onnxruntime": "live",
            "fairlearn": "explain",
            "shap": "explain",
            "sklearn": "explain",
        }
        name = (error.name or "").split(".")[0]
        fail(f"{name} is not installed; pip install 'pilotage[{extra.get(name, 'all')}]'", 2)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):  # wrong usage
            context = getattr(error, "ctx", None)
            where = f" (try '{context.command_path} --help')" if context else ""
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            fail(message + where, 2)
        raise


def _scenario(env: str, data: Path | None, hours: float | None, placement: str | None = None) -> Any:
    from pilotage.scenario import load

    scenario = load(env, data)
    if placement is not None:
        from pilotage.engine.cluster import placement_from

        scenario = scenario.replace(placement=placement_from(placement))
    if hours is not None:
        if not (math.isfinite(hours) and hours > 0):
            raise SpecError(f"--hours {hours}: must be a positive number")
        scenario = scenario.replace(horizon_h=hours)
    return scenario


def _writable(folder: Path) -> Path:
    """Makes sure, before hours of work, that results can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".pilotage-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SpecError(
            f"--out {folder}: cannot be written: {error.strerror}; give a writable folder"
        ) from None
    return folder


def _table(result: dict[str, Any]) -> Table:
    group = result.get("group", result["env"])
    title = f"{group}: {result['hours']:g} h x {len(result['seeds'])} runs, dollars per run"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    decays = any(row["usd"]["errors"] + row["usd"]["retraining"] for row in result["policies"])
    models = ("errors", "retraining") if decays else ()
    for name in ("policy", "total", "95 %", "missed", *models, "in time", "p95 ms", "x bound"):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in result["policies"]:
        total, over = row["total_usd"], row["over_bound"]
        known = not math.isnan(total["low"])
        table.add_row(
            row["policy"],
            f"{total['mean']:,.2f}",
            f"{total['low']:,.1f}–{total['high']:,.1f}" if known else "–",
            f"{row['usd']['late'] + row['usd']['dropped']:,.2f}",
            *(f"{row['usd'][name]:,.2f}" for name in models),
            f"{100 * row['slo_attainment']:.2f} %",
            f"{row['latency_ms']['p95']:,.0f}",
            f"{over['mean']:.2f}" if over else "–",
        )
    if result["bound_usd"]:
        table.caption = (
            f"clairvoyant: lower bound {result['bound_usd']['lower']:,.2f}, "
            f"schedule {result['bound_usd']['schedule']:,.2f}"
        )
    return table


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def envs(
    as_json: AsJson = False,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of scenario files")] = False,
) -> None:
    """List the shipped environments."""
    from pilotage.scenario import json_schema, load, shipped

    if schema:
        print_json(json_schema())
        return
    titles = {stem: load(stem).title for stem in shipped()}
    if as_json:
        print_json([{"env": stem, "title": title} for stem, title in titles.items()])
        return
    width = max(map(len, titles))
    for stem, title in titles.items():
        print(f"{stem:<{width}}  {title}")


@app.command()
def simulate(
    env: Env,
    policy: Annotated[str, typer.Option("--policy", help="name, name:field=value,…, .toml file, or folder")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    hours: Hours = None,
    placement: PlacementRule = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder for timeline.csv and a figure")] = None,
    as_json: AsJson = False,
) -> None:
    """Run one policy once: itemised cost, latency percentiles, timeline."""
    from pilotage.control.guard import Guard
    from pilotage.control.lifecycle import fleet_from
    from pilotage.engine.cluster import World
    from pilotage.engine.run import simulate as run_policies
    from pilotage.evaluate import compare, summary

    chosen, retraining = fleet_from(policy)
    scenario = _scenario(env, data, hours, placement)
    folder = _writable(out) if out else None
    runs = run_policies(
        scenario, [chosen], [World(seed)], retraining=retraining, guard=Guard(), label=policy,
        keep_timeline=folder is not None,
    )  # fmt: skip
    if folder:
        from pilotage.report import draw_timeline
        from pilotage.results import as_csv, timeline_rows, write_whole

        write_whole(folder / "timeline.csv", as_csv(timeline_rows(policy, scenario, runs[0])))
        draw_timeline(folder)
    if as_json:
        print_json({"env": scenario.name, "seed": seed, **summary(policy, runs)})
        return
    Console().print(_table(compare(scenario, [(policy, runs)])))
    if folder:
        print(f"timeline: {folder / 'timeline.csv'}, figure: {folder / 'figures' / 'timeline.svg'}")


@app.command()
def evaluate(
    env: Env,
    policy: Policies,
    seeds: Annotated[int, typer.Option(min=1, help="paired runs per policy")] = 10,
    bound: Annotated[bool, typer.Option("--bound", help="compare with the clairvoyant bound")] = False,
    hours: Hours = None,
    placement: PlacementRule = None,
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder for evaluation.json and table.csv")
    ] = None,
    cluster: Cluster = None,
    as_json: AsJson = False,
) -> None:
    """Compare policies on the same traffic, in dollars, with 95 % intervals."""
    from pilotage.control.guard import Guard
    from pilotage.control.lifecycle import fleet_from
    from pilotage.engine.cluster import World
    from pilotage.evaluate import compare
    from pilotage.workers import Workers

    chosen = [(name, *fleet_from(name)) for name in policy]
    for name in policy:
        if policy.count(name) > 1:
            raise SpecError(f"--policy {name!r} is given {policy.count(name)} times; give each policy once")
    scenario = _scenario(env, data, hours, placement)
    folder = _writable(out) if out else None
    worlds = [World(seed) for seed in range(seeds)]
    results = []
    with _progress(as_json) as step, Workers(cluster) as workers:
        for name, one, retraining in chosen:
            step(name)
            runs = workers.simulate(
                scenario, [one] * seeds, worlds, retraining=retraining, guard=Guard(), label=name
            )
            results.append((name, runs))
        lower = schedule = None
        if bound:
            import numpy as np

            from pilotage.agents.bound import bound as bracket

            step("bounds")
            known = [one for _, one, _ in chosen]
            brackets = workers.map(
                partial(bracket, guard=Guard()), [(scenario, world, known) for world in worlds]
            )
            lower = np.array([b.lower_usd for b in brackets])
            schedule = [b.schedule for b in brackets]
    result = compare(scenario, results, lower, schedule)
    if folder:
        from pilotage.results import write_evaluation

        write_evaluation(folder, [result])
    if as_json:
        print_json(result)
    else:
        Console().print(_table(result))


class _progress:  # noqa: N801  (used as a function)
    """A spinner on stderr that says what is being done; silent with --json."""

    def __init__(self, silent: bool) -> None:
        self._status = None if silent else _screen.status("")

    def __enter__(self) -> Callable[[str], None]:
        if self._status is None:
            return lambda _: None
        self._status.start()
        return self._status.update

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()


def _kept(record: MlflowRun) -> None:
    """Says on stderr where MLflow has the run, and what it has not."""
    if record.lost:
        _screen.print(f"warning: MLflow does not have all of run {record.id}: {record.lost}", soft_wrap=True)
    elif record.id:
        _screen.print(f"MLflow: run {record.id}", soft_wrap=True)


@app.command()
def tune(
    env: Env,
    policy: Annotated[
        str, typer.Option("--policy", help="the policy whose declared parameters are searched")
    ],
    trials: Annotated[int, typer.Option(min=1)] = 40,
    seeds: Annotated[int, typer.Option(min=1, help="runs per trial")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="seed of the search")] = 0,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Optuna storage: a database's URL, journal:FILE, grpc://HOST:PORT; an existing study is joined"
        ),
    ] = None,
    objective: Annotated[
        list[str] | None, typer.Option(help="usd, attainment; repeatable: best compromises")
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe or gp")] = "tpe",
    start: Annotated[
        list[str] | None,
        typer.Option(help="parameters to try first, as a policy of the same kind; repeatable"),
    ] = None,
    hours: Hours = None,
    data: Data = None,
    cluster: Cluster = None,
    mlflow: Mlflow = None,
    as_json: AsJson = False,
) -> None:
    """Bayesian optimisation of a policy's declared parameters."""
    from pilotage.agents.tune import candidate_of
    from pilotage.agents.tune import tune as search
    from pilotage.control.learned import policy_from
    from pilotage.control.scaling import describe
    from pilotage.engine.cluster import World
    from pilotage.live.mlflow_runs import MlflowRun
    from pilotage.workers import Workers

    base = policy_from(policy)
    scenario = _scenario(env, data, hours)
    windows = [[World(1_000_000 + k) for k in range(seeds)]]  # apart from the seeds that `evaluate` uses
    names = objective or ["usd"]
    about = {
        "policy": describe(base), "trials": trials, "seeds": seeds, "seed": seed, "sampler": sampler,
        "objectives": names, "hours": scenario.horizon_h, "scenario_sha256": scenario.digest(),
    }  # fmt: skip
    with (
        MlflowRun(mlflow, f"pilotage/{scenario.name}", f"tune {policy}", about) as record,
        _progress(as_json) as step,
        Workers(cluster) as workers,
    ):

        def tried(n: int, best: float) -> None:
            step(f"trial {n}/{trials}, best {best:,.2f} $")
            if not math.isnan(best):  # of two objectives there is no best
                record.metric(f"best_{names[0]}", best, n)

        study = search(
            base,
            scenario,
            windows,
            trials=trials,
            seed=seed,
            objectives=names,
            sampler=sampler,
            starts=[policy_from(one) for one in start or ()],
            storage=storage,
            progress=tried,
            workers=workers,
        )
        for trial in study.trials:
            if trial.values:
                record.part(
                    f"trial {trial.number}", trial.params, dict(zip(names, trial.values, strict=True))
                )
    _kept(record)
    rows = [
        {
            "policy": describe(candidate_of(base, t.params)),
            **dict(zip(names, t.values, strict=True)),
        }
        for t in study.best_trials
    ]
    if as_json:
        print_json({"env": scenario.name, "trials": len(study.trials), "best": rows})
        return
    for row in rows:
        name = row.pop("policy")
        print(", ".join(f"{key} {value:.4g}" for key, value in row.items()) + f"  --policy '{name}'")


@app.command()
def train(
    env: Env,
    algo: Annotated[str, typer.Option(help="ppo, sac, tqc, recurrent-ppo, qr-dqn or maskable-ppo")] = "ppo",
    steps: Annotated[int, typer.Option(min=1)] = 400_000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    base: Annotated[
        str, typer.Option(help="the policy that is corrected: predictive, anticipate, learned")
    ] = "predictive",
    worlds: Annotated[int, typer.Option(min=1)] = 64,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder of the training (default: runs/ENV-ALGO)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the folder's checkpoint")] = False,
    hours: Hours = None,
    data: Data = None,
    mlflow: Mlflow = None,
    as_json: AsJson = False,
) -> None:
    """Learn a policy with stable-baselines3."""
    import msgspec

    from pilotage.agents.algorithms import Settings
    from pilotage.agents.train import train as learn
    from pilotage.control.learned import Base, policy_from
    from pilotage.engine.cluster import World
    from pilotage.live.mlflow_runs import MlflowRun

    rule = policy_from(base)
    if not isinstance(rule, Base):
        raise SpecError(
            f"--base {base!r}: cannot be corrected; valid: predictive, anticipate, learned, or what hindsight taught"
        )
    scenario = _scenario(env, data, hours)
    folder = _writable(out or Path("runs") / f"{scenario.name}-{algo}")
    settings = Settings(algo=algo, steps=steps, seed=seed, worlds=worlds)
    about = msgspec.to_builtins(settings) | {
        "base": base, "hours": scenario.horizon_h, "scenario_sha256": scenario.digest(), "resume": resume
    }  # fmt: skip
    with (
        MlflowRun(mlflow, f"pilotage/{scenario.name}", f"train {algo}", about) as record,
        _progress(as_json) as step,
    ):

        def judged(n: int, usd: float) -> None:
            step(f"{n:,}/{steps:,} steps, validation {usd:,.2f} $")
            record.metric("validation_usd", usd, n)

        learn(
            scenario,
            rule,
            [World(0)],
            [[World(2_000_000 + k) for k in range(4)]],
            settings,
            folder,
            progress=judged,
            resume=resume,
        )
        record.files(folder, [folder / "policy.json", folder / "learning_curve.csv"])
    _kept(record)
    if as_json:
        print_json({"env": scenario.name, "policy": str(folder)})
    else:
        print(f"policy: --policy {folder}")


@app.command()
def study(
    experiment: Annotated[Path, typer.Argument(help="an experiment file, as experiments/quickstart.toml")],
    out: Annotated[
        Path | None, typer.Option("--out", help="results folder (default: results/EXPERIMENT)")
    ] = None,
    data: Data = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="a much reduced form, to try things out")] = False,
    cluster: Cluster = None,
    mlflow: Mlflow = None,
    as_json: AsJson = False,
) -> None:
    """Tune, train, compare and report, as one experiment file says; resumes what was interrupted."""
    import msgspec

    from pilotage.live.mlflow_runs import MlflowRun
    from pilotage.results import numbers
    from pilotage.study import Experiment
    from pilotage.study import study as run_study
    from pilotage.workers import Workers

    plan = Experiment.load(experiment, quick=quick)
    folder = _writable(out or Path("results") / experiment.stem)
    about = msgspec.to_builtins(plan) | {"seed": seed, "quick": quick}
    with (
        MlflowRun(mlflow, "pilotage/studies", experiment.stem, about) as record,
        _progress(as_json) as step,
        Workers(cluster) as workers,
    ):
        results = run_study(
            plan, experiment, folder,
            data=data, seed=seed, step=step, command=sys.argv[1:], workers=workers,
        )  # fmt: skip
        for name, value, at in numbers(folder):
            record.metric(name, value, at)
        record.files(
            folder, [p for p in sorted(folder.rglob("*")) if p.is_file() and folder / "work" not in p.parents]
        )
    _kept(record)
    if as_json:
        print_json(results)
        return
    for result in results:
        Console().print(_table(result))
    print(f"report: {folder / 'report.html'}")


@app.command()
def report(results: Annotated[Path, typer.Argument(help="a results folder")]) -> None:
    """Write one self-contained HTML page from a results folder."""
    from pilotage.report import write_report

    print(f"report: {write_report(results)}")
