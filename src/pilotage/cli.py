"""The command line. Heavy imports wait until a command needs them, so that `--help` is quick."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from pilotage import (
    __version__,
    cli_bundles,
    cli_calibrate,
    cli_explain,
    cli_leaderboard,
    cli_learn,
    cli_plan,
    cli_profile,
    cli_steer,
    cli_versions,
)
from pilotage.console import (
    AsJson,
    Cluster,
    Data,
    Env,
    Hours,
    fail,
    print_json,
    progress,
    scenario_of,
    table_of,
    writable,
)
from pilotage.world.spec import SpecError

app = typer.Typer(
    help="Learns, proves and ships deployment policies for fleets of machine-learning models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_learn.app)
app.add_typer(cli_versions.app)
app.add_typer(cli_bundles.app)
app.add_typer(cli_explain.app)
app.add_typer(cli_steer.app)
app.add_typer(cli_calibrate.app)
app.add_typer(cli_plan.app)
app.add_typer(cli_profile.app)
app.add_typer(cli_leaderboard.app)
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

PlacementRule = Annotated[
    str | None,
    typer.Option(
        "--placement",
        help="rule, or placement.json of a training, instead of the scenario's: learned-placement, ...",
    ),
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
    scenario = scenario_of(env, data, hours, placement)
    folder = writable(out) if out else None
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
    Console().print(table_of(compare(scenario, [(policy, runs)])))
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
    scenario = scenario_of(env, data, hours, placement)
    folder = writable(out) if out else None
    worlds = [World(seed) for seed in range(seeds)]
    results = []
    with progress(as_json) as step, Workers(cluster) as workers:
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
        Console().print(table_of(result))


@app.command()
def report(results: Annotated[Path, typer.Argument(help="a results folder")]) -> None:
    """Write one self-contained HTML page from a results folder."""
    from pilotage.report import write_report

    print(f"report: {write_report(results)}")
