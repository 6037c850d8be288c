"""Serving and lifecycle together on `fleet-lifecycle`: joint against separate policies, and what detection is worth.

`run.py --out DIR`: the same number of trials for everybody, on training seeds. Apart: every scaling policy is tuned
while nothing is retrained, every retraining policy under `predictive` as it is; the best of either are then put
together. Jointly: scaling, retraining and the hours of its jobs (`off-peak`) are tuned at once, starting from the
best of either. Static: the retraining policy is a tuned threshold on the error rate. Judged on paired test seeds, in
dollars.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from pilotage.agents.tune import candidate_of, space
from pilotage.control.guard import Guard
from pilotage.control.learned import policy_from
from pilotage.control.lifecycle import OffPeak, Triggered, retraining_from
from pilotage.control.policy import Policy
from pilotage.control.retraining import ErrorThreshold, FreshSki, Never, Paired, Periodic, Retraining
from pilotage.control.scaling import Predictive, describe, tunable
from pilotage.engine.cluster import World
from pilotage.engine.run import Run, simulate
from pilotage.evaluate import ratio_interval
from pilotage.metrics import ITEMS
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Scenario, load

SCALERS = ("predictive", "learned")
STATIC = "error-threshold"
RETRAINERS: dict[str, Retraining] = {
    "paired": Paired(),
    "fresh-ski": FreshSki(),
    "triggered": Triggered(),
    "periodic": Periodic(),
    STATIC: ErrorThreshold(),
}
OFF_PEAK = OffPeak(policy="never")
TRIALS, TUNING_H = 8, 72.0


def run(
    scenario: Scenario, worlds: Sequence[World], scaler: Policy, retraining: Retraining, label: str = ""
) -> list[Run]:
    return simulate(
        scenario, [scaler] * len(worlds), worlds, retraining=retraining, guard=Guard(), label=label,
        threads=os.cpu_count() or 1,
    )  # fmt: skip


def search(
    spaces: dict[str, Any],
    first: dict[str, float],
    cost_usd: Callable[[dict[str, float]], float],
    trials: int,
    seed: int,
) -> tuple[float, dict[str, float]]:
    """The least cost of so many trials, the first of which is the default, and what it was found with."""
    if not spaces:
        return cost_usd({}), {}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
    study.enqueue_trial(first)
    for _ in range(trials):
        trial = study.ask(spaces)
        study.tell(trial, cost_usd(trial.params))
    return study.best_value, study.best_params


def declared(policy: Policy | Retraining) -> dict[str, Any]:
    """What can be tuned of a policy; empty if nothing can."""
    return space(policy) if tunable(type(policy)) else {}


def defaults(policy: Policy | Retraining) -> dict[str, float]:
    return {name: getattr(policy, name) for name in declared(policy) if getattr(policy, name) is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--out", type=Path, default=Path("results/fleet_lifecycle"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=8, help="paired test runs")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    started, began = datetime.now(UTC), time.perf_counter()
    scenario = load("fleet-lifecycle")
    trials = 2 if options.quick else TRIALS
    shorter = scenario.replace(horizon_h=24.0 if options.quick else TUNING_H)
    train = [World(400_000 + 10 * options.seed + k) for k in range(2)]

    def usd(scaler: Policy, retraining: Retraining) -> float:
        return float(np.mean([r.total_usd for r in run(shorter, train, scaler, retraining)]))

    scaling, retraining = {}, {"learned-retraining": retraining_from("learned-retraining")}
    found_usd = {"learned-retraining": usd(Predictive(), retraining["learned-retraining"])}
    for name in SCALERS:
        base = policy_from(name)
        cost, best = search(
            declared(base), defaults(base), lambda p, b=base: usd(candidate_of(b, p), Never()), trials, options.seed
        )  # fmt: skip
        scaling[name], found_usd[name] = candidate_of(base, best), cost
        print(f"{name}: {cost:.1f}, {time.perf_counter() - began:.0f} s", flush=True)
    for name, rule in RETRAINERS.items():
        cost, best = search(
            declared(rule), defaults(rule), lambda p, r=rule: usd(Predictive(), r.replace(**p)), trials, options.seed
        )  # fmt: skip
        retraining[name], found_usd[name] = rule.replace(**best), cost
        print(f"{name}: {cost:.1f}, {time.perf_counter() - began:.0f} s", flush=True)
    scaler = scaling[min(SCALERS, key=found_usd.__getitem__)]
    chosen = min((n for n in retraining if n != STATIC), key=found_usd.__getitem__)
    inner = retraining[chosen]

    def together(params: dict[str, float]) -> tuple[Policy, Retraining]:
        def of(prefix: str) -> dict[str, float]:
            return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}

        within = chosen if chosen == "learned-retraining" else describe(inner.replace(**of("retraining.")))
        return candidate_of(scaler, of("scaling.")), OFF_PEAK.replace(policy=within, **of("jobs."))

    parts = {"scaling.": scaler, "retraining.": inner, "jobs.": OFF_PEAK}
    spaces = {p + k: v for p, policy in parts.items() for k, v in declared(policy).items()}
    first = {p + k: v for p, policy in parts.items() for k, v in defaults(policy).items()}
    _, best = search(spaces, first, lambda p: usd(*together(p)), 2 * trials, options.seed)
    print(f"jointly: {time.perf_counter() - began:.0f} s", flush=True)
    contenders = {
        "predictive, never retrained": (Predictive(), Never()),
        "best scaling, never retrained": (scaler, Never()),
        "best scaling, retrained by a static threshold": (scaler, retraining[STATIC]),
        "best scaling and best retraining, chosen apart": (scaler, inner),
        "the same, with jobs off peak and room made for them": together(first),
        "scaling, retraining and its hours, chosen jointly": together(best),
    }
    if options.quick:
        scenario = shorter
    worlds = [World(960_000 + 1000 * options.seed + k) for k in range(2 if options.quick else options.seeds)]
    total, rows = {}, []
    for name, (policy, rule) in contenders.items():
        runs = run(scenario, worlds, policy, rule, name)
        total[name] = np.array([r.total_usd for r in runs])
        items = np.mean([r.usd.sum(axis=0) for r in runs], axis=0)
        rows.append({
            "policy": name, "scaling": describe(policy), "retraining": describe(rule),
            "usd": f"{total[name].mean():.5g}",
            **{f"{item}_usd": f"{value:.5g}" for item, value in zip(ITEMS, items, strict=True)},
            "retrainings": f"{np.mean([sum(map(len, r.retrained_s)) for r in runs]):.3g}",
        })  # fmt: skip
        print(rows[-1], flush=True)
    *_, static, apart, _, jointly = contenders
    lines = []
    for line, mine, other in (
        ("saving of the joint policy over the best chosen apart", jointly, apart),
        ("saving of detection over a static threshold, apart", apart, static),
        ("saving of the joint policy over a static threshold", jointly, static),
    ):
        ratio = ratio_interval(total[mine], total[other])
        lines.append({
            "line": line, "asked": "> 0", "measured": f"{1 - ratio['mean']:.5g}", "low": f"{1 - ratio['high']:.5g}",
            "high": f"{1 - ratio['low']:.5g}", "met": bool(1 - ratio["high"] > 0),
        })  # fmt: skip
        print(lines[-1])
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(lines))
    facts = provenance(
        "fleet_lifecycle", sys.argv, started, {"fleet_lifecycle": round(time.perf_counter() - began, 1)}
    )
    facts |= {
        "seed": options.seed,
        "seeds": len(worlds),
    }
    write_whole(options.out / "run.json", json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
