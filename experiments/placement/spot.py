"""Where the dollars of `spot-fleet` go, service by service, and what any placement could save at most.

`spot.py --out DIR` runs the environment on paired seeds under each scaling policy: with Kubernetes' scores, with the
learned placement, each with replicas that drain at a notice and with ones that are replaced first, with one service
after another on demand only, and with Kubernetes' scores on markets that never take a node back, that always meet an
order, or both. The last is what placement could save at most by what it does about interruptions and failed orders: a
clairvoyant scheduler that always found a node that comes and stays, at the price of the first market. The seeds are
none that `run.py` judges on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pilotage.control.guard import Guard
from pilotage.control.scaling import parse
from pilotage.engine.cluster import World, placement_from, recorded
from pilotage.engine.run import simulate
from pilotage.evaluate import ratio_interval
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Placement, Scenario, load

ENV, SEED = "spot-fleet", 500_000


def changed(scenario: Scenario, learned: Placement) -> dict[str, Scenario]:
    """The environment as it is compared."""

    def placed(placement: Placement, at_notice: str) -> Scenario:
        one: Scenario = scenario.replace(placement=placement.replace(at_notice=at_notice))
        return one

    scores = Placement(rule="kubernetes")
    kubernetes = placed(scores, "drain")
    found = {
        "kubernetes": kubernetes,
        "kubernetes, replace-first": placed(scores, "replace-first"),
        "learned-placement, drain": placed(learned, "drain"),
        "learned-placement, replace-first": placed(learned, "replace-first"),
    }
    for one in scenario.services:
        there = tuple(
            s.replace(pools=tuple(p for p in s.pools if not scenario.pool_by_name[p].spot)) if s is one else s
            for s in scenario.services
        )
        found[f"{one.name} on demand"] = kubernetes.replace(services=there)

    def markets(stay: bool, come: bool) -> Scenario:
        pools = tuple(
            p.replace(
                spot=p.spot.replace(market=p.spot.market.replace(per_hour=0.0))
                if p.spot and stay
                else p.spot,
                provisioning_failure=0.0 if come else p.provisioning_failure,
            )
            for p in scenario.pools
        )
        return kubernetes.replace(pools=pools)

    return found | {
        "no interruptions": markets(True, False),
        "no failed orders": markets(False, True),
        "neither": markets(True, True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--out", type=Path, default=Path("results/placement"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=6, help="paired runs")
    parser.add_argument("--placement", default="learned-placement", help="a rule, or a placement.json")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started, began, lasted = datetime.now(UTC), time.perf_counter(), {}
    scenario = load(ENV)
    if options.quick:
        scenario = scenario.replace(horizon_h=1.0)
    runs_each = 2 if options.quick else options.seeds
    worlds = recorded(scenario, [World(SEED + 1000 * options.seed + k) for k in range(runs_each)])
    rows = []
    for scaler in ("hpa", "predictive"):
        base = np.zeros(0)
        for name, one in changed(scenario, placement_from(options.placement)).items():
            policies = [parse(scaler)] * runs_each
            runs = simulate(one, policies, worlds, guard=Guard(), label=name, threads=os.cpu_count() or 1)
            usd = np.array([run.usd for run in runs])  # (runs, services, items)
            total = usd.sum(axis=(1, 2))
            base = base if len(base) else total
            share = ratio_interval(total, base)
            saved = {"saves": 1 - share["mean"], "low": 1 - share["high"], "high": 1 - share["low"]}
            figures = {key: f"{value:.4f}" for key, value in saved.items()}
            for s, service in enumerate(scenario.services):
                node, late, dropped = usd[:, s, :3].mean(axis=0)
                rows.append(
                    {"scaler": scaler, "case": name, "service": service.name, "runs": runs_each,
                     "node_usd": f"{node:.4g}", "late_usd": f"{late:.4g}", "dropped_usd": f"{dropped:.4g}",
                     "replica_hours": f"{np.mean([run.totals['replica_s'][s] for run in runs]) / 3600:.4g}",
                     "failures": f"{np.mean([run.totals['failed'][s] for run in runs]):.4g}",
                     "fleet_usd": f"{total.mean():.5g}"} | figures
                )  # fmt: skip
            print(
                scaler,
                name,
                f"{total.mean():.5g}",
                figures,
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
        lasted[scaler] = round(time.perf_counter() - began - sum(lasted.values()), 1)
        write_whole(options.out / "spot.csv", as_csv(rows))
    record = provenance("placement/spot", sys.argv, started, lasted) | {
        "seed": options.seed,
        "seeds": runs_each,
    }
    write_whole(options.out / "spot_run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
