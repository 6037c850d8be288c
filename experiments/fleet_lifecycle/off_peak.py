"""What jobs off peak, with room made for them, are worth on `fleet-lifecycle`, on paired seeds.

`run` gave no interval for the one choice that saved anything: the best scaling and retraining as chosen apart, and the
same with `off-peak` around the retraining, nothing tuned. Here both run on the same worlds, those that `run` judged on
first, so nothing that is compared was chosen on them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from run import run

from pilotage.control.learned import policy_from
from pilotage.control.lifecycle import OffPeak, retraining_from
from pilotage.engine.cluster import World
from pilotage.evaluate import ratio_interval
from pilotage.metrics import ITEMS
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import load

SCALER = policy_from("learned").replace(
    scale=1.024, margin=0.7918
)  # as `run` chose it (results/fleet_lifecycle)
APART, OFF_PEAK = "fresh-ski", OffPeak(policy="fresh-ski")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--out", type=Path, default=Path("results/fleet_lifecycle"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=8, help="paired runs")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started, began = datetime.now(UTC), time.perf_counter()
    scenario = load("fleet-lifecycle")
    if options.quick:
        scenario = scenario.replace(horizon_h=24.0)
    worlds = [World(960_000 + 1000 * options.seed + k) for k in range(2 if options.quick else options.seeds)]
    rows, total = [], []
    for name, rule in (
        ("chosen apart", retraining_from(APART)),
        ("the same, off peak with room made", OFF_PEAK),
    ):
        runs = run(scenario, worlds, SCALER, rule, name)
        total.append(np.array([r.total_usd for r in runs]))
        items = np.mean([r.usd.sum(axis=0) for r in runs], axis=0)
        rows.append({
            "policy": name, "usd": f"{total[-1].mean():.5g}",
            **{f"{item}_usd": f"{value:.5g}" for item, value in zip(ITEMS, items, strict=True)},
            "by_seed_usd": " ".join(f"{usd:.5g}" for usd in total[-1]),
        })  # fmt: skip
        print(rows[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    ratio = ratio_interval(total[1], total[0])
    saving = {"mean": 1 - ratio["mean"], "low": 1 - ratio["high"], "high": 1 - ratio["low"]}
    for row, figures in zip(rows, ({}, saving), strict=True):
        row |= {f"saving_{k}": f"{figures[k]:.5g}" if figures else "" for k in ("mean", "low", "high")}
    print(saving)
    write_whole(options.out / "off_peak.csv", as_csv(rows))
    facts = provenance(
        "fleet_lifecycle", sys.argv, started, {"off_peak": round(time.perf_counter() - began, 1)}
    )
    facts |= {"seed": options.seed, "seeds": len(worlds)}
    write_whole(options.out / "off_peak.json", json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
