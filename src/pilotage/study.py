"""A study: tune, train, compare, report, as one file in `experiments/` says.

Every stage leaves its result in `<results>/work/` under a name made from all that determines it, so that an
interrupted study goes on where it stopped, and a changed experiment does not pick up stale parts. What is worth
keeping stands beside that folder, each file written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.agents.algorithms import Settings
from pilotage.agents.bound import bound
from pilotage.agents.train import train
from pilotage.agents.tune import choose, tune
from pilotage.control.guard import Guard
from pilotage.control.learned import Learned, policy_from, trained
from pilotage.control.policy import Policy
from pilotage.control.scaling import Predictive, describe
from pilotage.engine.cluster import World
from pilotage.engine.run import Run, simulate
from pilotage.evaluate import compare
from pilotage.results import as_csv, provenance, timeline_rows, write_evaluation, write_whole
from pilotage.scenario import Scenario, load
from pilotage.workers import Workers
from pilotage.world.arrivals import Traffic
from pilotage.world.spec import NonNegative, Positive, PositiveCount, Spec, SpecError, decode, read_toml

Step = Callable[[str], None]


class Windows(Spec, frozen=True, kw_only=True):
    """`count` runs whose starts are spread evenly over [from_h, to_h - horizon] of the traffic's clock."""

    count: PositiveCount
    from_h: NonNegative = 0.0
    to_h: NonNegative | None = None

    def worlds(self, scenario: Scenario, traffic: Traffic | None, seed: int) -> list[World]:
        horizon_h = scenario.ticks * scenario.tick_s / 3600
        last_h = self.from_h if self.to_h is None else self.to_h - horizon_h
        if last_h < self.from_h:
            raise SpecError(
                f"windows from_h {self.from_h} to_h {self.to_h}: shorter than the horizon of {horizon_h:g} h"
            )
        starts = np.linspace(self.from_h, last_h, self.count) * 3600
        ticks = np.round(starts / scenario.tick_s) * scenario.tick_s
        sources = None if traffic is None else (traffic,) * len(scenario.services)
        return [World(seed + k, float(start), sources) for k, start in enumerate(ticks)]


class Group(Spec, frozen=True, kw_only=True):
    """One kind of traffic: where to learn, where to choose, where to judge. No `train`: unseen until the test.

    `traffic` takes the place of the scenario's; `horizon_h` shortens the test windows of a short trace.
    """

    name: str
    test: Windows
    train: Windows | None = None
    validate: Windows | None = None
    traffic: Traffic | None = None
    horizon_h: Positive | None = None


class Tuning(Spec, frozen=True, kw_only=True):
    """Bayesian optimisation of each of `policies`, with the same budget."""

    policies: tuple[str, ...]
    trials: PositiveCount = 40


class Experiment(Spec, frozen=True, kw_only=True):
    """What is asked of a claim, and how it is answered.

    `policies` are compared as they are; tuned ones are added as "NAME tuned", the learned one as "ppo". `asked`
    lists acceptance lines: the saving of `policy` over `baseline` in `group` must have its interval's lower end
    (`interval = "low"`) or its mean at or above `at_least`.
    """

    title: str
    question: str
    env: str
    horizon_h: Positive | None = None
    history_h: NonNegative | None = None
    groups: Annotated[tuple[Group, ...], Meta(min_length=1)]
    policies: tuple[str, ...] = ("hpa",)
    tune: Tuning | None = None
    train: Settings | None = None
    bound: bool = True
    asked: tuple[Asked, ...] = ()

    @staticmethod
    def load(path: Path, *, quick: bool = False) -> Experiment:
        raw = read_toml(path, "an experiment")
        plan = decode(raw, Experiment, str(path))
        return plan.reduced() if quick else plan

    def reduced(self) -> Experiment:
        """A form that runs in about a tenth of the time, to try things out."""
        small = self
        if self.tune:
            small = small.replace(tune=self.tune.replace(trials=min(4, self.tune.trials)))
        if self.train:
            settings = msgspec.structs.replace(
                self.train, steps=min(16_384, self.train.steps), worlds=16, evaluations=2
            )
            small = small.replace(train=settings)
        groups = tuple(g.replace(test=g.test.replace(count=min(2, g.test.count))) for g in self.groups)
        return small.replace(groups=groups)


class Asked(Spec, frozen=True, kw_only=True):
    """One acceptance line on the saving of a policy over a baseline."""

    line: str
    policy: str
    baseline: str
    at_least: float
    group: str = "all"
    end: Annotated[str, Meta(pattern="^(low|mean|high)$")] = "mean"


def study(
    plan: Experiment,
    path: Path,
    folder: Path,
    *,
    data: Path | None = None,
    seed: int = 0,
    step: Step = lambda _: None,
    command: Sequence[str] = (),
    workers: Workers | None = None,
) -> list[dict[str, Any]]:
    """Runs an experiment into `folder`; returns one evaluation per group of traffic, and the last over all.

    Tuning and comparison are done by the `workers` (None: this process), learning always here.
    """
    from pilotage.report import write_report

    workers = workers or Workers()

    scenario = load(plan.env, data)
    changes = {"horizon_h": plan.horizon_h, "history_h": plan.history_h}
    scenario = scenario.replace(**{name: value for name, value in changes.items() if value is not None})
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    started, clock = datetime.now(UTC), time.perf_counter()
    durations: dict[str, float] = {}

    facts = provenance(path.stem, command, started, durations)  # of the code that runs, not of a later commit

    def lap(name: str) -> None:
        nonlocal clock
        durations[name] = round(time.perf_counter() - clock, 1)
        clock = time.perf_counter()

    base_seed = 1_000_000 * (1 + seed)
    groups = {
        use: [
            windows.worlds(_of(scenario, group), group.traffic, base_seed + 10_000 * k + offset)
            for k, group in enumerate(plan.groups)
            if (windows := getattr(group, use)) is not None
        ]
        for offset, use in ((0, "train"), (3_000, "validate"), (6_000, "test"))
    }
    contenders: list[tuple[str, Policy]] = [(name, policy_from(name)) for name in plan.policies]
    tuned = _tuning(plan, scenario, groups, work, folder, seed, step, workers)
    contenders += [(f"{name} tuned", policy) for name, policy in tuned.items()]
    lap("tune")
    if plan.train:
        base = tuned.get("predictive")
        base = base if isinstance(base, Predictive) else Predictive()
        contenders.append(("ppo", _training(plan, scenario, base, groups, work, folder, seed, step)))
        lap("train")
    results, timeline = _evaluation(plan, scenario, contenders, groups["test"], step, workers)
    lap("evaluate")

    write_evaluation(folder, results)
    if timeline is not None:
        write_whole(folder / "timeline.csv", timeline)
    write_whole(folder / "acceptance.csv", _acceptance(plan, results))
    run = facts | {
        "title": plan.title,
        "question": plan.question,
        "scenario": scenario.name,
        "scenario_sha256": scenario.digest(),
        "experiment_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "seeds": [seed],
        "policies": {
            name: describe(policy) for name, policy in contenders if not isinstance(policy, Learned)
        },
    }
    write_whole(folder / "run.json", json.dumps(run, indent=2) + "\n")
    step("report")
    write_report(folder)
    return results


def _of(scenario: Scenario, group: Group) -> Scenario:
    """The scenario as a group of traffic runs it."""
    return scenario if group.horizon_h is None else scenario.replace(horizon_h=group.horizon_h)


def _tuning(
    plan: Experiment,
    scenario: Scenario,
    groups: dict[str, list[list[World]]],
    work: Path,
    folder: Path,
    seed: int,
    step: Step,
    workers: Workers,
) -> dict[str, Policy]:
    """The tuned form of each policy that the experiment names; writes trials.csv."""
    if plan.tune is None:
        return {}
    tuned: dict[str, Policy] = {}
    rows: list[dict[str, Any]] = []
    for name in plan.tune.policies:
        policy = policy_from(name)
        trials = plan.tune.trials
        key = _key(
            "tune", scenario.digest(), describe(policy), trials, groups["train"], groups["validate"], seed
        )
        kept = work / f"{key}.json"
        if not kept.is_file():
            found = tune(
                policy,
                scenario,
                groups["train"],
                trials=trials,
                seed=seed,
                storage=f"sqlite:///{work / key}.db",
                progress=partial(_say_trial, step, name, trials),
                workers=workers,
            )
            best = choose(policy, found, scenario, groups["validate"] or groups["train"], workers)
            values = [t.values[0] for t in found.trials if t.values]
            write_whole(kept, json.dumps({"policy": msgspec.to_builtins(best), "values": values}))
        saved = json.loads(kept.read_text())
        tuned[name] = decode(saved["policy"], type(policy), str(kept))
        lowest = np.minimum.accumulate(saved["values"])
        rows += [
            {"policy": f"{name} tuned", "trial": k, "usd": usd, "best_usd": best}
            for k, (usd, best) in enumerate(zip(saved["values"], lowest.tolist(), strict=True))
        ]
    write_whole(folder / "trials.csv", as_csv(rows))
    return tuned


def _say_trial(step: Step, name: str, trials: int, number: int, best_usd: float) -> None:
    step(f"tuning {name}: trial {number}/{trials}, best {best_usd:,.2f} $")


def _training(
    plan: Experiment,
    scenario: Scenario,
    base: Predictive,
    groups: dict[str, list[list[World]]],
    work: Path,
    folder: Path,
    seed: int,
    step: Step,
) -> Learned:
    """The policy learned on the training windows, the best on validation; writes learning_curve.csv."""
    assert plan.train is not None
    settings = msgspec.structs.replace(plan.train, seed=plan.train.seed + seed)
    windows = [world for group in groups["train"] for world in group]
    key = _key("train", scenario.digest(), describe(base), settings, windows, groups["validate"])
    training, complete = work / key, work / f"{key}.complete"
    if complete.is_file():
        learned = trained(training)
        assert isinstance(learned, Learned)
    else:
        learned = train(
            scenario,
            base,
            windows,
            groups["validate"],
            settings,
            training,
            progress=lambda n, usd: step(
                f"learning: {n:,}/{settings.steps:,} steps, validation {usd:,.2f} $"
            ),
            resume=True,
        )
        complete.touch()
    write_whole(folder / "learning_curve.csv", (training / "learning_curve.csv").read_text())
    learned.save(folder)
    return learned


def _evaluation(
    plan: Experiment,
    scenario: Scenario,
    contenders: Sequence[tuple[str, Policy]],
    tests: Sequence[Sequence[World]],
    step: Step,
    workers: Workers,
) -> tuple[list[dict[str, Any]], str | None]:
    """Every contender in every test window; per group, and over all groups if there are several."""
    results: list[dict[str, Any]] = []
    runs: dict[str, list[Run]] = {name: [] for name, _ in contenders}
    lowers: list[float] = []
    schedules: list[Run] = []
    for group, worlds in zip(plan.groups, tests, strict=True):
        here = _of(scenario, group)
        mine: list[tuple[str, list[Run]]] = []
        for name, policy in contenders:
            step(f"{group.name}: {name}")
            policies = [policy] * len(worlds)
            mine.append((name, workers.simulate(here, policies, worlds, guard=Guard(), label=name)))
            runs[name] += mine[-1][1]
        lower, schedule = None, None
        if plan.bound:
            step(f"{group.name}: clairvoyant bounds")
            known = [policy for _, policy in contenders]
            brackets = workers.map(partial(bound, guard=Guard()), [(here, world, known) for world in worlds])
            lower, schedule = np.array([b.lower_usd for b in brackets]), [b.schedule for b in brackets]
            lowers += lower.tolist()
            schedules += schedule
            mine.append(("clairvoyant schedule", schedule))
        results.append({"group": group.name} | compare(here, mine, lower, schedule))
    if len(plan.groups) > 1:
        together = [*runs.items(), *([("clairvoyant schedule", schedules)] if plan.bound else [])]
        lower = np.array(lowers) if plan.bound else None
        results.append(
            {"group": "all"} | compare(scenario, together, lower, schedules if plan.bound else None)
        )
    return results, _timeline(_of(scenario, plan.groups[0]), contenders, tests[0][0])


def _timeline(scenario: Scenario, contenders: Sequence[tuple[str, Policy]], world: World) -> str:
    """One window in full, as CSV with one row per policy and tick, summed over services."""
    runs = simulate(
        scenario,
        [policy for _, policy in contenders],
        [world] * len(contenders),
        guard=Guard(),
        keep_timeline=True,
    )
    rows: list[dict[str, Any]] = []
    for (name, _), run in zip(contenders, runs, strict=True):
        rows += timeline_rows(name, scenario, run)
    return as_csv(rows)


def _acceptance(plan: Experiment, results: Sequence[dict[str, Any]]) -> str:
    """The acceptance lines with what was measured; a line whose pair does not exist is not met."""
    rows = []
    for asked in plan.asked:
        found = None
        for result in results:
            if result["group"] == asked.group or len(results) == 1:
                for pair in result["versus"]:
                    if (pair["policy"], pair["baseline"]) == (asked.policy, asked.baseline):
                        found = pair["saving"]
        measured = found or {"mean": float("nan"), "low": float("nan"), "high": float("nan")}
        rows.append(
            {
                "line": asked.line,
                "asked": f"{asked.end} >= {asked.at_least:g}",
                "measured": measured["mean"],
                "low": measured["low"],
                "high": measured["high"],
                "met": bool(measured[asked.end] >= asked.at_least),
            }
        )
    return as_csv(rows) if rows else "line,asked,measured,low,high,met\n"


def _key(stage: str, *parts: Any) -> str:
    """A short name for a stage's result, made from everything that determines it."""
    encoded = msgspec.json.encode([msgspec.to_builtins(part) for part in parts], order="sorted")
    return f"{stage}-{hashlib.sha256(encoded).hexdigest()[:12]}"
