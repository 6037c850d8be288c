"""Trains the policy that pilotage ships: services at random, traffic of training days, chosen on validation days.

`learn.py --data DIR --out DIR` does all of it; every seed gives one candidate, and the best on validation is kept as
`policy.json`. What hindsight tells of the windows is kept in `work/`, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import msgspec
import numpy as np
import protocol

from pilotage.agents.domain import service_at_random
from pilotage.agents.hindsight import Settings, Table, joined, look_back, train
from pilotage.results import as_csv, write_whole

SERVICES = {"train": 100, "validate": 24}


def tables(split: str, data: Path, work: Path, seed: int, services: int) -> Table:
    """What hindsight tells of a split's windows; every fifth service has an hour of history only."""
    kept = work / f"{split}-{services}-{seed}.npz"
    if kept.is_file():
        return Table(**np.load(kept))
    rng, parts = np.random.default_rng([seed, len(split)]), []
    judged, began = protocol.service(data), time.perf_counter()
    for k in range(services):
        scenario = judged if k % 8 == 0 else service_at_random(rng, judged)
        scenario = scenario.replace(history_h=1.0 if k % 5 == 4 else protocol.HISTORY_H)
        parts.append(look_back(scenario, [w for _, w in protocol.windows(scenario, split, rng)]))
        print(f"{split}: service {k + 1}/{services}, {time.perf_counter() - began:.0f} s", flush=True)
    table = joined(parts)
    work.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(".part.npz")
    np.savez(part, **{name: getattr(table, name) for name in Table.__slots__})
    part.replace(kept)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/scaling"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    work, services = (
        options.out / "work",
        {k: v // 10 or 1 for k, v in SERVICES.items()} if options.quick else SERVICES,
    )
    learned, judged = (tables(split, options.data, work, options.seed, services[split]) for split in SERVICES)
    rows, found = [], []
    for seed in range(options.seed, options.seed + options.seeds):
        settings = Settings(seed=seed, epochs=4 if options.quick else Settings().epochs)
        policy, curve = train(
            learned, judged, settings,
            progress=lambda epoch, ratio, seed=seed: print(f"seed {seed}: epoch {epoch}, {ratio:.3f}", flush=True),
        )  # fmt: skip
        found.append((min(curve), policy))
        rows += [
            {"seed": seed, "epoch": k, "validation_over_clairvoyant": f"{r:.5g}"} for k, r in enumerate(curve)
        ]
    write_whole(options.out / "learning.csv", as_csv(rows))
    best, policy = min(found, key=lambda pair: pair[0])
    write_whole(options.out / "policy.json", msgspec.json.encode(policy).decode())
    print(json.dumps({"validation_over_clairvoyant": best}))


if __name__ == "__main__":
    main()
