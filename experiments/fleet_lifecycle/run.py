"""Serving and lifecycle together on `fleet-lifecycle`: joint against separate policies, and what detection is worth.

`run.py --out DIR`. Apart: every scaling policy is tuned while nothing is retrained, every retraining policy under
`predictive` as it is; the best of either are put together. Jointly: scaling, retraining and the hours of its jobs
(`off-peak`) are searched at once. Such a search begins with what is known: what was chosen apart, with its jobs off
peak and room made for them, and as it is; the other ways to retrain untuned; and `predictive`. There are three of
equal length: over policies that detect, over static thresholds (a multiple, the same for all services, of the error
rate that each is known to have when it is fresh), and over the clock. Trials are two half weeks, and the best of them
are chosen from on three further training weeks: a retraining pays over the time that is left, so that half a week
cannot tell what it is worth. Judged on paired test weeks, in dollars; no choice has seen them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from pilotage.agents.tune import candidate_of, space
from pilotage.control.guard import Guard
from pilotage.control.learned import policy_from
from pilotage.control.lifecycle import SHIPPED, OffPeak, Triggered, retraining_from
from pilotage.control.policy import Policy
from pilotage.control.retraining import FreshSki, Never, Paired, Periodic, Retraining
from pilotage.control.scaling import Predictive, describe, tunable
from pilotage.engine.cluster import World
from pilotage.engine.run import Run, simulate
from pilotage.evaluate import ratio_interval
from pilotage.metrics import ITEMS
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Scenario, load

SCALERS = {name: policy_from(name) for name in ("predictive", "learned")}
DETECTING, STATIC, CLOCK = ("paired", "fresh-ski", "triggered", SHIPPED), "static", "periodic"
RULES: dict[str, Retraining] = {"paired": Paired(), "fresh-ski": FreshSki(), CLOCK: Periodic()}
PLAIN = OffPeak(policy="never")
TRIALS, JOINT_TRIALS, TUNING_H, FINALISTS, FURTHER = 6, 12, 84.0, 3, 3

Params = dict[str, Any]


class Plan(NamedTuple):
    """A scaling policy, and a retraining policy per service."""

    scaler: Policy
    retraining: tuple[Retraining, ...]

    @property
    def rules(self) -> str:
        return " | ".join(dict.fromkeys(map(describe, self.retraining)))


class Way(NamedTuple):
    """A way to decide on retrainings: what can be tuned of it, where that begins, and its policy per service."""

    space: Mapping[str, BaseDistribution]
    first: Params
    texts: Callable[[Params], list[str]]


class Search(NamedTuple):
    """What is searched: the plan that a trial draws, and the draws of the first trials."""

    plan: Callable[[optuna.Trial], Plan]
    starts: Sequence[Params]


class Found(NamedTuple):
    """A plan, its dollars on the training runs, and the draws that led to it."""

    plan: Plan
    usd: float
    params: Params


def declared(policy: Policy | Retraining) -> dict[str, BaseDistribution]:
    """What can be tuned of a policy; empty if nothing can."""
    return space(policy) if tunable(type(policy)) else {}


def defaults(policy: Policy | Retraining) -> Params:
    return {name: getattr(policy, name) for name in declared(policy) if getattr(policy, name) is not None}


def ways_of(scenario: Scenario) -> dict[str, Way]:
    """Every way to decide on retrainings, by name."""
    lives = [service.lifecycle for service in scenario.services if service.lifecycle]

    def thresholds(params: Params) -> list[str]:
        return [
            f"error-threshold:threshold={min(params['times'] * life.decay.base_error, 1.0):.4g}"
            for life in lives
        ]

    def all_alike(text: Callable[[Params], str]) -> Callable[[Params], list[str]]:
        return lambda params: [text(params)] * len(lives)

    ways = {
        name: Way(declared(rule), defaults(rule), all_alike(lambda p, r=rule: describe(candidate_of(r, p))))
        for name, rule in RULES.items()
    }
    ways["triggered"] = Way(
        {"setting": FloatDistribution(0.01, 10.0, log=True)}, {"setting": 0.5},
        all_alike(lambda p: describe(candidate_of(Triggered(), p))),
    )  # fmt: skip
    ways[SHIPPED] = Way({}, {}, all_alike(lambda _: SHIPPED))
    ways[STATIC] = Way({"times": FloatDistribution(1.05, 4.0, log=True)}, {"times": 1.5}, thresholds)
    return ways


def drawn(trial: optuna.Trial, prefix: str, over: Mapping[str, BaseDistribution]) -> Params:
    """What a trial draws from a space, which is one of several in its study."""
    out: Params = {}
    for name, bounds in over.items():
        suggest = trial.suggest_int if isinstance(bounds, IntDistribution) else trial.suggest_float
        out[name] = suggest(f"{prefix}.{name}", bounds.low, bounds.high, log=bounds.log)
    return out


def named(prefix: str, params: Params) -> Params:
    return {f"{prefix}.{name}": value for name, value in params.items()}


def run(scenario: Scenario, plans: Sequence[Plan], worlds: Sequence[World]) -> list[list[Run]]:
    """Every plan in every world, all of them at once."""
    if not plans:
        return []
    runs = iter(simulate(
        scenario, [plan.scaler for plan in plans for _ in worlds], list(worlds) * len(plans),
        retraining=[plan.retraining for plan in plans for _ in worlds], guard=Guard(), threads=os.cpu_count() or 1,
    ))  # fmt: skip
    return [[next(runs) for _ in worlds] for _ in plans]


class Bench:
    """Where plans are tried and chosen; `say` tells how far it is."""

    def __init__(self, week: Scenario, tuning_h: float, seed: int, say: Callable[[str], None]) -> None:
        self._week, self._short, self._seed, self._say = week, week.replace(horizon_h=tuning_h), seed, say
        first = 400_000 + 10 * seed
        self._worlds = [World(first + k) for k in range(2)]
        self._further = [World(first + 5000 + k) for k in range(FURTHER)]

    def search(self, searches: Mapping[str, Search], trials: int) -> dict[str, list[Found]]:
        """The best of every search, whose trials run side by side."""
        tried: dict[str, dict[Plan, Found]] = {name: {} for name in searches}
        studies = {}
        for name, one in searches.items():
            sampler = optuna.samplers.TPESampler(
                seed=self._seed, multivariate=True, group=True, n_startup_trials=trials // 3 + 1
            )
            studies[name] = optuna.create_study(sampler=sampler)
            for start in one.starts:
                studies[name].enqueue_trial(start)
        for _ in range(trials):
            asked = {name: study.ask() for name, study in studies.items()}
            plans = {name: searches[name].plan(trial) for name, trial in asked.items()}
            new = [name for name, plan in plans.items() if plan not in tried[name]]
            for name, runs in zip(new, run(self._short, [plans[n] for n in new], self._worlds), strict=True):
                tried[name][plans[name]] = Found(plans[name], _mean_usd(runs), asked[name].params)
            for name, trial in asked.items():
                studies[name].tell(trial, tried[name][plans[name]].usd)
        best = {name: sorted(found.values(), key=lambda one: one.usd) for name, found in tried.items()}
        for name, found in best.items():
            self._say(f"{name}: {found[0].usd:.1f} $ after {len(found)} trials, {found[0].params}")
        return {name: found[:FINALISTS] for name, found in best.items()}

    def choose(self, name: str, finalists: Sequence[Found]) -> int:
        """Which of some plans does best on further weeks."""
        usd = [_mean_usd(runs) for runs in run(self._week, [one.plan for one in finalists], self._further)]
        self._say(f"{name}: {min(usd):.1f} $ of {' '.join(f'{x:.1f}' for x in usd)} on further weeks")
        return int(np.argmin(usd))


def _mean_usd(runs: Sequence[Run]) -> float:
    return float(np.mean([one.total_usd for one in runs]))


def apart(bench: Bench, ways: Mapping[str, Way], trials: int) -> tuple[Policy, str, dict[str, Params]]:
    """The best scaling while nothing is retrained; the best way to retrain under `predictive`; all ways as tuned."""
    never = (Never(),) * len(ways[SHIPPED].texts({}))
    found = bench.search({
        name: Search(
            lambda trial, n=name, p=policy: Plan(candidate_of(p, drawn(trial, n, declared(p))), never),
            [named(name, defaults(policy))],
        )
        for name, policy in SCALERS.items()
    }, trials)  # fmt: skip
    scalers = [finalists[0] for finalists in found.values()]
    scaler = scalers[bench.choose("scaling", scalers)].plan.scaler
    found = bench.search({
        name: Search(
            lambda trial, n=name, w=way: Plan(Predictive(), as_they_are(w.texts(drawn(trial, n, w.space)))),
            [named(name, way.first)],
        )
        for name, way in ways.items()
    }, trials)  # fmt: skip
    best = {name: finalists[0] for name, finalists in found.items()}
    others = [name for name in best if name != STATIC]
    chosen = others[bench.choose("retraining", [best[name] for name in others])]
    prefix = {name: len(name) + 1 for name in best}
    return scaler, chosen, {n: {k[prefix[n] :]: v for k, v in one.params.items()} for n, one in best.items()}


def as_they_are(texts: Sequence[str]) -> tuple[Retraining, ...]:
    return tuple(map(retraining_from, texts))


def jointly(
    scaler: Policy, chosen: str, tuned: Mapping[str, Params], ways: Mapping[str, Way], kinds: Sequence[str]
) -> Search:
    """Scaling, one of some ways to retrain, and the hours of its jobs."""
    scalers = {"best": scaler, "predictive": Predictive()}

    def plan(trial: optuna.Trial) -> Plan:
        scaling = trial.suggest_categorical("scaling", list(scalers))
        kind = trial.suggest_categorical("retraining", list(kinds))
        policy = candidate_of(scalers[scaling], drawn(trial, scaling, declared(scalers[scaling])))
        inner = ways[kind].texts(drawn(trial, kind, ways[kind].space))
        hours = candidate_of(PLAIN, drawn(trial, "jobs", declared(PLAIN)))
        jobs = hours.replace(make_room=trial.suggest_categorical("jobs.make_room", [True, False]))
        return Plan(policy, tuple(jobs.replace(policy=text) for text in inner))

    def start(scaling: str, kind: str, own: Params, jobs: Params) -> Params:
        scaled = named(scaling, defaults(scalers[scaling]))
        return {"scaling": scaling, "retraining": kind, **scaled, **named(kind, own), **named("jobs", jobs)}

    plain = defaults(PLAIN) | {"make_room": True}
    at_once = {"load": 2.0, "patience_batches": 1, "make_room": False}
    first = chosen if chosen in kinds else kinds[0]
    return Search(plan, [
        start("best", first, tuned[first], plain),
        start("best", first, tuned[first], at_once),
        *(start("best", kind, ways[kind].first, plain) for kind in kinds),
        start("predictive", first, tuned[first], plain),
    ])  # fmt: skip


def judged(
    week: Scenario, contenders: Mapping[str, Plan], worlds: Sequence[World]
) -> tuple[dict[str, np.ndarray], list[dict[str, object]]]:
    """Every contender's dollars by world, and the table."""
    usd, rows = {}, []
    for (name, plan), runs in zip(
        contenders.items(), run(week, list(contenders.values()), worlds), strict=True
    ):
        usd[name] = np.array([one.total_usd for one in runs])
        items = np.mean([one.usd.sum(axis=0) for one in runs], axis=0)
        rows.append({
            "policy": name, "scaling": describe(plan.scaler), "retraining": plan.rules,
            "usd": f"{usd[name].mean():.5g}",
            **{f"{item}_usd": f"{value:.5g}" for item, value in zip(ITEMS, items, strict=True)},
            "retrainings": f"{np.mean([sum(map(len, one.retrained_s)) for one in runs]):.3g}",
            "by_seed_usd": " ".join(f"{x:.5g}" for x in usd[name]),
        })  # fmt: skip
    return usd, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--out", type=Path, default=Path("results/fleet_lifecycle"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=8, help="paired test weeks")
    parser.add_argument("--quick", action="store_true", help="a few hours, a few trials, two seeds")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # `group`, old as it is
    started, began = datetime.now(UTC), time.perf_counter()

    def say(text: str) -> None:
        print(f"{text} ({time.perf_counter() - began:.0f} s)", flush=True)

    week = load("fleet-lifecycle")
    if options.quick:
        week = week.replace(horizon_h=6.0)
    bench = Bench(week, 4.0 if options.quick else TUNING_H, options.seed, say)
    ways = ways_of(week)
    scaler, chosen, tuned = apart(bench, ways, 2 if options.quick else TRIALS)
    texts = {name: ways[name].texts(params) for name, params in tuned.items()}
    kinds = {"jointly": DETECTING, "jointly, static": (STATIC,), "jointly, clock": (CLOCK,)}
    searches = {name: jointly(scaler, chosen, tuned, ways, some) for name, some in kinds.items()}
    found = bench.search(searches, 3 if options.quick else JOINT_TRIALS)
    joint, static, clock = (
        finalists[bench.choose(name, finalists)].plan for name, finalists in found.items()
    )
    never = (Never(),) * len(texts[chosen])
    off_peak = tuple(PLAIN.replace(policy=text) for text in texts[chosen])
    contenders = {
        "best scaling, never retrained": Plan(scaler, never),
        "best scaling and static thresholds, chosen apart": Plan(scaler, as_they_are(texts[STATIC])),
        "best scaling and best retraining, chosen apart": Plan(scaler, as_they_are(texts[chosen])),
        "the same, with jobs off peak and room made for them": Plan(scaler, off_peak),
        "scaling, static thresholds and hours, chosen jointly": static,
        "scaling, clock and hours, chosen jointly": clock,
        "scaling, retraining and its hours, chosen jointly": joint,
    }
    worlds = [World(960_000 + 1000 * options.seed + k) for k in range(2 if options.quick else options.seeds)]
    usd, rows = judged(week, contenders, worlds)
    _, with_static, best_apart, plain, static_jointly, by_clock, mine = contenders
    lines: list[dict[str, object]] = []
    for line, asked, better, worse in (
        ("saving of the joint policy over the best chosen apart", "> 0", mine, best_apart),
        ("saving of the joint policy over the same off peak with room made", "reported", mine, plain),
        ("saving of jobs off peak with room made, over the best chosen apart", "reported", plain, best_apart),
        ("saving of detection over static thresholds, chosen jointly", "> 0", mine, static_jointly),
        ("saving of detection over static thresholds, chosen apart", "reported", best_apart, with_static),
        ("saving of detection over the clock, chosen jointly", "reported", mine, by_clock),
    ):
        ratio = ratio_interval(usd[better], usd[worse])
        lines.append({
            "line": line, "asked": asked, "measured": f"{1 - ratio['mean']:.5g}", "low": f"{1 - ratio['high']:.5g}",
            "high": f"{1 - ratio['low']:.5g}", "met": bool(1 - ratio["high"] > 0) if asked != "reported" else "",
        })  # fmt: skip
    for row in (*rows, *lines):
        print(row)
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(lines))
    seconds = round(time.perf_counter() - began, 1)
    facts = provenance("fleet_lifecycle", sys.argv, started, {"fleet_lifecycle": seconds})
    facts |= {"seed": options.seed, "seeds": len(worlds)}
    write_whole(options.out / "run.json", json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
