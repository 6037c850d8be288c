"""Scaling and placement chosen together on `multi-tenant`, against the best of each chosen apart.

`joint.py --out DIR`: the same number of trials for everybody, on the same training seeds. Apart: each scaling policy is
tuned under Kubernetes' scores and the best one kept; the learned placement is tuned under default HPA; the two are then
put together. Jointly: scaling and placement are tuned at once, from the default of both. Judged on paired test seeds,
in dollars and in fairness among the services (Jain index of their attainments).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import optuna

from pilotage.agents.tune import candidate_of, space
from pilotage.control.guard import Guard
from pilotage.control.learned import policy_from
from pilotage.control.placing import shipped
from pilotage.control.policy import Policy
from pilotage.control.scaling import Hpa, describe
from pilotage.engine.cluster import World, recorded
from pilotage.engine.placement import TERMS
from pilotage.engine.run import Run, simulate
from pilotage.evaluate import interval, ratio_interval
from pilotage.metrics import attainment, jain_index
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Placement, Scenario, load

ENV, KUBERNETES = "multi-tenant", Placement(rule="kubernetes")
SCALERS = ("hpa", "predictive", "learned")
# what is tuned of a learned placement: how much requests at stake, new nodes and imbalance weigh beside the rest
GROUPS = {"stake": "stake", "opening": "rent_new", "imbalance": "rent_imbalance"}
SPACE = {name: optuna.distributions.FloatDistribution(0.25, 4.0, log=True) for name in GROUPS}
TRIALS, TUNING_H = 20, 6.0


def placement_of(factors: dict[str, float]) -> Placement:
    """The shipped placement with groups of weights multiplied."""
    weights = np.array(shipped().weights_of(TERMS))
    for name, factor in factors.items():
        weights *= [factor if term.startswith(GROUPS[name]) else 1.0 for term in TERMS]
    return Placement(rule="learned-placement", weights=tuple(weights.tolist()))


def run(scenario: Scenario, worlds: Sequence[World], scaler: Policy, placement: Placement) -> list[Run]:
    placed = scenario.replace(placement=placement)
    return simulate(
        placed,
        [scaler] * len(worlds),
        worlds,
        guard=Guard(),
        label=describe(scaler),
        threads=os.cpu_count() or 1,
    )


class Search:
    """Searches on training seeds, all with the same number of trials; the first trial is the default."""

    def __init__(self, scenario: Scenario, worlds: Sequence[World], trials: int, seed: int) -> None:
        self.scenario, self.worlds, self.trials, self.seed = scenario, worlds, trials, seed

    def __call__(
        self, scaler: Policy, placement: Placement | None, *, scaling: bool
    ) -> tuple[float, Policy, Placement]:
        """Tunes the scaler, if so told, and the learned placement, unless one is given; dollars and both."""
        of_scaler = space(scaler) if scaling else {}
        of_placement = SPACE if placement is None else {}
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=self.seed, multivariate=True))
        first = {name: getattr(scaler, name) for name in of_scaler} | dict.fromkeys(of_placement, 1.0)
        study.enqueue_trial({name: value for name, value in first.items() if value is not None})

        def chosen(found: dict[str, float]) -> tuple[Policy, Placement]:
            one = candidate_of(scaler, {k: v for k, v in found.items() if k in of_scaler})
            return one, placement or placement_of({k: v for k, v in found.items() if k in of_placement})

        for _ in range(self.trials):
            trial = study.ask(of_scaler | of_placement)
            runs = run(self.scenario, self.worlds, *chosen(trial.params))
            study.tell(trial, float(np.mean([r.total_usd for r in runs])))
        return study.best_value, *chosen(study.best_params)


def attained(one: Run) -> np.ndarray:
    """Attainment of every service of a run; shape (services,)."""
    t = one.totals
    lost = sum(t[name] for name in ("rejected", "timed_out", "abandoned", "lost", "overdue"))
    served = t["served"].astype(float)
    return np.array(
        [attainment(s - late, s + gone) for s, late, gone in zip(served, t["late"], lost, strict=True)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--out", type=Path, default=Path("results/placement"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=8, help="paired test runs")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    started, began = datetime.now(UTC), time.perf_counter()
    scenario = load(ENV)
    shorter = scenario.replace(horizon_h=1.0 if options.quick else TUNING_H)
    train = recorded(shorter, [World(300_000 + 10 * options.seed + k) for k in range(2)])
    search = Search(shorter, train, 2 if options.quick else TRIALS, options.seed)

    apart = {name: search(policy_from(name), KUBERNETES, scaling=True) for name in SCALERS}
    best = min(apart, key=lambda name: apart[name][0])
    scaler, placement = apart[best][1], search(Hpa(), None, scaling=False)[2]
    together = {name: search(policy_from(name), None, scaling=True) for name in SCALERS}
    joint = min(together, key=lambda name: together[name][0])
    print(f"apart {best}, jointly {joint}, {time.perf_counter() - began:.0f} s", flush=True)
    contenders = {
        "hpa, Kubernetes' scores": (Hpa(), KUBERNETES),
        "best scaling, Kubernetes' scores": (scaler, KUBERNETES),
        "hpa, best placement": (Hpa(), placement),
        "best scaling and best placement, chosen apart": (scaler, placement),
        "scaling and placement, chosen jointly": together[joint][1:],
    }
    if options.quick:
        scenario = scenario.replace(horizon_h=1.0)
    worlds = recorded(
        scenario,
        [World(950_000 + 1000 * options.seed + k) for k in range(2 if options.quick else options.seeds)],
    )
    usd, fair, rows = {}, {}, []
    for name, (policy, placed) in contenders.items():
        runs = run(scenario, worlds, policy, placed)
        usd[name] = np.array([r.total_usd for r in runs])
        by_service = np.array([attained(r) for r in runs])
        fair[name] = jain_index(by_service)
        rows.append({
            "policy": name, "scaling": describe(policy) if not hasattr(policy, "network") else
            f"learned, scale {policy.scale:g}, margin {policy.margin:g}", "usd": f"{usd[name].mean():.5g}",
            "attainment": f"{by_service.mean():.5f}", "worst_service": f"{by_service.mean(axis=0).min():.4f}",
            "jain_index": f"{fair[name].mean():.5f}",
        })  # fmt: skip
        print(rows[-1], flush=True)
    *_, separate, jointly = contenders
    better = min(list(contenders)[:-1], key=lambda name: usd[name].mean())
    lines = []
    for name in dict.fromkeys((separate, better)):
        ratio, more = ratio_interval(usd[jointly], usd[name]), interval(fair[jointly] - fair[name])
        saved = {"measured": 1 - ratio["mean"], "low": 1 - ratio["high"], "high": 1 - ratio["low"]}
        fairer = {"measured": more["mean"], "low": more["low"], "high": more["high"]}
        for line, asked, found, ok in (
            (f"joint choice: saving over {name}", "> 0", saved, saved["low"] > 0),
            (f"joint choice: Jain index less that of {name}", ">= 0", fairer, fairer["high"] >= 0),
        ):
            lines.append(
                {"line": line, "asked": asked} | {k: f"{v:.5g}" for k, v in found.items()} | {"met": bool(ok)}
            )
            print(lines[-1])
    write_whole(options.out / "joint.csv", as_csv(rows))
    write_whole(options.out / "joint_acceptance.csv", as_csv(lines))
    record = provenance("placement", sys.argv, started, {"joint": round(time.perf_counter() - began, 1)})
    record |= {"seed": options.seed, "seeds": len(worlds)}
    write_whole(options.out / "joint_run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
