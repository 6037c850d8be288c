"""Tunes the rules that the learned policy must beat: every one with the same windows, trials and seeds.

`tune.py --data DIR --out DIR`: training windows of the judged service, the best of each search chosen on validation
windows; writes `tuned.json` and `trials.csv`. The rule on the learned policy's own features (`anticipate`) is searched
on what hindsight tells of the same windows, as the learned policy was trained.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import protocol

from pilotage.agents.hindsight import look_back, search
from pilotage.agents.tune import choose, run_groups, tune, typical_usd
from pilotage.control.scaling import Anticipate, describe, parse
from pilotage.engine.cluster import World, recorded
from pilotage.results import as_csv, write_whole

RULES = ("anticipate", "predictive", "staffing", "hpa", "kpa", "ray-serve")
SEEDS, TRIALS = 5, 30
SHARES = {
    "train": {"twitter": 4, "functions": 6, "diurnal": 2, "flash": 2, "on-off": 3, "timers": 3},
    "validate": {"twitter": 4, "functions": 6, "diurnal": 2, "flash": 2, "on-off": 3, "timers": 3},
}


def groups(data: Path, split: str, seed: int) -> list[list[World]]:
    """Windows of the judged service by family."""
    scenario = protocol.service(data)
    found = protocol.windows(scenario, split, np.random.default_rng([seed, len(split)]), SHARES[split])
    drawn = list(zip((f for f, _ in found), recorded(scenario, [w for _, w in found]), strict=True))
    return [[w for f, w in drawn if f == family] for family in dict.fromkeys(f for f, _ in drawn)]


def searched(options: argparse.Namespace, trials: int, search_of: tuple[str, int]) -> dict[str, Any]:
    """What one search found, and what it costs on validation windows; kept in `work/`."""
    name, seed = search_of
    kept: Path = options.out / "work" / f"tuned-{name}-{trials}-{options.seed}-{seed}.json"
    if not kept.is_file():
        began, policy, scenario = time.perf_counter(), parse(name), protocol.service(options.data)
        train, validate = (groups(options.data, split, options.seed) for split in SHARES)
        if isinstance(policy, Anticipate):
            table = look_back(scenario, [world for group in train for world in group])
            best, values = search(policy, table, trials=trials, seed=seed)
        else:
            study = tune(policy, scenario, train, trials=trials, seed=seed)
            best = choose(policy, study, scenario, validate)
            values = [t.values[0] for t in study.trials]
        usd = typical_usd(run_groups(scenario, validate, best))
        write_whole(kept, json.dumps({"policy": describe(best), "usd": usd, "values": values}))
        print(f"{name} seed {seed}: {usd:.3f} $, {time.perf_counter() - began:.0f} s", flush=True)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/scaling"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=RULES, help="one rule; what --out says of the others is kept")
    options = parser.parse_args()
    seeds, trials = (1, 2) if options.quick else (SEEDS, TRIALS)
    rules = RULES if options.only is None else (options.only,)
    (options.out / "work").mkdir(parents=True, exist_ok=True)
    tuned: dict[str, str] = {}
    trials_of: dict[str, list[dict[str, Any]]] = {}
    if options.only is not None and (options.out / "tuned.json").is_file():
        tuned = json.loads((options.out / "tuned.json").read_text())
        known = pd.read_csv(options.out / "trials.csv", dtype=str)
        for row in known.to_dict("records"):
            trials_of.setdefault(row["policy"], []).append({str(name): value for name, value in row.items()})
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        searches = [(name, seed) for name in rules for seed in range(seeds)]
        found = list(pool.map(partial(searched, options, trials), searches))
    for name in rules:
        mine = [one for one, (other, _) in zip(found, searches, strict=True) if other == name]
        trials_of[name] = [
            {"policy": name, "seed": seed, "trial": k, "value": f"{value:.6g}"}
            for seed, one in enumerate(mine)
            for k, value in enumerate(one["values"])
        ]
        tuned[name] = min(mine, key=lambda one: one["usd"])["policy"]
    rows = [row for name in RULES for row in trials_of.get(name, [])]
    write_whole(options.out / "trials.csv", as_csv(rows))
    in_order = {name: tuned[name] for name in RULES if name in tuned}
    write_whole(
        options.out / "tuned.json", msgspec.json.format(msgspec.json.encode(in_order)).decode() + "\n"
    )


if __name__ == "__main__":
    main()
