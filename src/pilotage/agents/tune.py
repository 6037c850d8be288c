"""Bayesian optimisation of any policy's declared parameters, with Optuna.

Many processes, on many machines, can search one study: each opens the same storage with a seed of its own. One that
dies costs the trial it was at.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import optuna
import sqlalchemy

from pilotage.control.guard import Guard
from pilotage.control.policy import Policy
from pilotage.control.scaling import describe, tunable
from pilotage.engine.cluster import World
from pilotage.engine.run import Run
from pilotage.metrics import attainment
from pilotage.scenario import Scenario
from pilotage.workers import Workers
from pilotage.world.spec import Spec, SpecError

OBJECTIVES: Final = {"usd": "minimize", "attainment": "maximize"}
SAMPLERS: Final[dict[str, Callable[[int, int], optuna.samplers.BaseSampler]]] = {
    "tpe": lambda seed, start: optuna.samplers.TPESampler(
        seed=seed, multivariate=True, n_startup_trials=start
    ),
    "gp": lambda seed, start: optuna.samplers.GPSampler(seed=seed, n_startup_trials=start),
}
FINALISTS: Final = 5
_TABLES_S: Final = 1.0  # within which somebody else has made the tables of a database


def space(policy: Spec) -> dict[str, optuna.distributions.BaseDistribution]:
    """The search space that the bounds on a policy's fields declare."""
    out: dict[str, optuna.distributions.BaseDistribution] = {}
    for name, bounds in tunable(type(policy)).items():
        if bounds.integer:
            out[name] = optuna.distributions.IntDistribution(
                int(bounds.low), int(bounds.high), log=bounds.log
            )
        else:
            out[name] = optuna.distributions.FloatDistribution(bounds.low, bounds.high, log=bounds.log)
    if not out:
        raise SpecError(
            f"policy {describe(policy)!r} declares no bounded parameters; there is nothing to tune"
        )
    return out


def storage_of(url: str | None) -> optuna.storages.BaseStorage | None:
    """The Optuna storage that a URL names.

    `journal:PATH` is a file that many processes of one file system append to, `grpc://HOST:PORT` a proxy as
    `optuna.storages.run_grpc_proxy_server` serves it; everything else is a database's, as SQLAlchemy writes it.
    """
    if url is None:
        return None
    kind, _, rest = url.partition(":")
    if kind == "journal":
        path = Path(rest.removeprefix("//"))
        if not path.parent.is_dir():
            raise SpecError(f"storage {url!r}: the folder {str(path.parent)!r} does not exist")
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    if kind == "grpc":
        host, colon, port = rest.removeprefix("//").rpartition(":")
        if not (host and colon and port.isdecimal()):
            raise SpecError(f"storage {url!r}: no host and port; valid: grpc://HOST:PORT")
        return optuna.storages.GrpcStorageProxy(host=host, port=int(port))
    try:
        return optuna.storages.RDBStorage(url)
    except sqlalchemy.exc.DatabaseError:
        # searches that begin at once on an empty database all make its tables
        time.sleep(_TABLES_S)
        return optuna.storages.RDBStorage(url)


def run_groups(
    scenario: Scenario,
    groups: Sequence[Sequence[World]],
    policy: Policy,
    workers: Workers | None = None,
) -> list[list[Run]]:
    """One policy over all windows of all groups, behind the guard; the runs come back by group."""
    worlds = [world for group in groups for world in group]
    policies = [policy] * len(worlds)
    runs = iter(
        (workers or Workers()).simulate(scenario, policies, worlds, guard=Guard(), label=describe(policy))
    )
    return [[next(runs) for _ in group] for group in groups]


def typical_usd(groups: Sequence[Sequence[Run]]) -> float:
    """Geometric mean over groups of the mean dollars per window: no group drowns another."""
    means = [np.mean([run.total_usd for run in group]) for group in groups]
    return float(np.exp(np.mean(np.log(np.maximum(means, 1e-12)))))


def tune(
    policy: Policy,
    scenario: Scenario,
    groups: Sequence[Sequence[World]],
    *,
    trials: int,
    seed: int = 0,
    objectives: Sequence[str] = ("usd",),
    sampler: str = "tpe",
    starts: Sequence[Policy | optuna.Study] = (),
    storage: str | None = None,
    study_name: str | None = None,
    progress: Callable[[int, float], None] | None = None,
    workers: Workers | None = None,
) -> optuna.Study:
    """Searches the policy's space until the study holds `trials` finished trials.

    The `sampler` is a tree-structured Parzen estimator (`tpe`: Bergstra et al. 2011) or a Gaussian process (`gp`);
    with two objectives both look for the Pareto front, which is the study's `best_trials`. The first trial is the
    policy as given; then come `starts`: policies of the same kind, and the best trials of earlier studies of it,
    whatever they were tuned on. `groups` are windows of traffic by kind; the objective `usd` is
    `typical_usd` over them, `attainment` is pooled. With a `storage` (see `storage_of`) the study is resumed or joined
    if it exists; its trials are those of all who search it. The windows of a trial are run by the `workers`.
    Returns the Optuna study. Raises SpecError where the storage cannot be opened.
    """
    unknown = [name for name in objectives if name not in OBJECTIVES]
    if unknown:
        raise SpecError(f"objective {unknown[0]!r} does not exist; valid: {', '.join(OBJECTIVES)}")
    if sampler not in SAMPLERS:
        raise SpecError(f"sampler {sampler!r} does not exist; valid: {', '.join(SAMPLERS)}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = space(policy)
    try:
        study = optuna.create_study(
            directions=[OBJECTIVES[name] for name in objectives],
            storage=storage_of(storage),
            study_name=study_name or f"{scenario.name}/{describe(policy)}",
            load_if_exists=True,
        )
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise SpecError(f"storage {_without_password(storage)!r}: cannot be opened: {first}") from None
    # one who resumes a study does not draw again what was drawn at its beginning
    drawn = (
        seed
        if not study.trials
        else int(np.random.SeedSequence([seed, len(study.trials)]).generate_state(1)[0])
    )
    study.sampler = SAMPLERS[sampler](drawn, min(10, trials // 3 + 1))
    if not study.trials:
        for parameters in [_parameters(policy), *(p for start in starts for p in _started(policy, start))]:
            study.enqueue_trial({k: v for k, v in parameters.items() if v is not None}, skip_if_exists=True)
    while (done := sum(t.state.is_finished() for t in study.get_trials(deepcopy=False))) < trials:
        trial = study.ask(distributions)
        runs = run_groups(scenario, groups, candidate_of(policy, trial.params), workers)
        study.tell(trial, [_value(name, runs) for name in objectives])
        if progress is not None:
            progress(done + 1, study.best_value if len(objectives) == 1 else float("nan"))
    return study


def _without_password(url: str | None) -> str:
    return re.sub(r"(?<=://)([^:/@]*):[^@/]*(?=@)", r"\1:***", url or "")


def _parameters(policy: Policy) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in space(policy)}


def _started(policy: Policy, start: Policy | optuna.Study) -> list[dict[str, Any]]:
    """The parameters with which a search of a policy's space may begin."""
    if isinstance(start, Policy):
        if type(start) is not type(policy):
            raise SpecError(
                f"start {describe(start)!r} is no {policy.__struct_config__.tag}; a search starts from its own kind"
            )
        return [_parameters(start)]
    found = [dict(trial.params) for trial in start.best_trials]
    for name in (name for parameters in found for name in parameters if name not in space(policy)):
        raise SpecError(
            f"study {start.study_name!r} has tuned {name!r}, which {describe(policy)!r} does not have; "
            f"valid: {', '.join(space(policy))}"
        )
    return found


def candidate_of(policy: Policy, parameters: dict[str, Any]) -> Policy:
    """The policy with a trial's parameters, rounded to four digits so that its name says it exactly."""
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in parameters.items()}
    candidate: Policy = policy.replace(**rounded)
    return candidate


def _value(objective: str, runs: Sequence[Sequence[Run]]) -> float:
    if objective == "usd":
        return typical_usd(runs)
    totals = [run.totals for group in runs for run in group]

    def count(*names: str) -> float:
        return float(sum(total[name].sum() for total in totals for name in names))

    finished = count("served", "rejected", "timed_out", "abandoned", "lost", "overdue")
    return attainment(count("served") - count("late"), finished)


def choose(
    policy: Policy,
    study: optuna.Study,
    scenario: Scenario,
    groups: Sequence[Sequence[World]],
    workers: Workers | None = None,
) -> Policy:
    """The one of the study's best trials (and the policy as given) that does best on other windows."""
    finished = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    best = sorted(finished, key=lambda t: t.values[0], reverse=study.directions[0].name == "MAXIMIZE")
    candidates: list[Policy] = [policy]
    for trial in best:
        candidate = candidate_of(policy, trial.params)
        if candidate not in candidates:
            candidates.append(candidate)
        if len(candidates) > FINALISTS:
            break
    return min(
        candidates, key=lambda candidate: typical_usd(run_groups(scenario, groups, candidate, workers))
    )
