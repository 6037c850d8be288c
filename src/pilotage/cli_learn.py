"""Commands that make policies better: `tune`, `train`, and `study`, which does both and reports."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pilotage.console import (
    AsJson,
    Cluster,
    Data,
    Env,
    Hours,
    print_json,
    progress,
    scenario_of,
    screen,
    table_of,
    writable,
)
from pilotage.world.spec import SpecError

if TYPE_CHECKING:
    from pilotage.live.mlflow_runs import MlflowRun

app = typer.Typer()
Mlflow = Annotated[
    str | None, typer.Option("--mlflow", help="URL of an MLflow server that keeps the run (default: none)")
]


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
    scenario = scenario_of(env, data, hours)
    windows = [[World(1_000_000 + k) for k in range(seeds)]]  # apart from the seeds that `evaluate` uses
    names = objective or ["usd"]
    about = {
        "policy": describe(base), "trials": trials, "seeds": seeds, "seed": seed, "sampler": sampler,
        "objectives": names, "hours": scenario.horizon_h, "scenario_sha256": scenario.digest(),
    }  # fmt: skip
    with (
        MlflowRun(mlflow, f"pilotage/{scenario.name}", f"tune {policy}", about) as record,
        progress(as_json) as step,
        Workers(cluster) as workers,
    ):

        def tried(n: int, best: float) -> None:
            step(f"trial {n}/{trials}, best {best:,.2f} $")
            if not math.isnan(best):  # of two objectives there is no best
                record.metrics([(f"best_{names[0]}", best, n)])

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
    scenario = scenario_of(env, data, hours)
    folder = writable(out or Path("runs") / f"{scenario.name}-{algo}")
    settings = Settings(algo=algo, steps=steps, seed=seed, worlds=worlds)
    about = msgspec.to_builtins(settings) | {
        "base": base, "hours": scenario.horizon_h, "scenario_sha256": scenario.digest(), "resume": resume
    }  # fmt: skip
    with (
        MlflowRun(mlflow, f"pilotage/{scenario.name}", f"train {algo}", about) as record,
        progress(as_json) as step,
    ):

        def judged(n: int, usd: float) -> None:
            step(f"{n:,}/{steps:,} steps, validation {usd:,.2f} $")
            record.metrics([("validation_usd", usd, n)])

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
    folder = writable(out or Path("results") / experiment.stem)
    about = msgspec.to_builtins(plan) | {"seed": seed, "quick": quick}
    with (
        MlflowRun(mlflow, "pilotage/studies", experiment.stem, about) as record,
        progress(as_json) as step,
        Workers(cluster) as workers,
    ):
        results = run_study(
            plan, experiment, folder,
            data=data, seed=seed, step=step, command=sys.argv[1:], workers=workers,
        )  # fmt: skip
        record.metrics(numbers(folder))
        record.files(
            folder, [p for p in sorted(folder.rglob("*")) if p.is_file() and folder / "work" not in p.parents]
        )
    _kept(record)
    if as_json:
        print_json(results)
        return
    for result in results:
        Console().print(table_of(result))
    print(f"report: {folder / 'report.html'}")


def _kept(record: MlflowRun) -> None:
    """Says on stderr where MLflow has the run, and what it has not."""
    if record.lost:
        screen.print(f"warning: MLflow does not have all of run {record.id}: {record.lost}", soft_wrap=True)
    elif record.id:
        screen.print(f"MLflow: run {record.id}", soft_wrap=True)
