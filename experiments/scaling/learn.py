"""Trains the policy that pilotage ships: services at random, traffic of training days, chosen on validation days.

`learn.py --data DIR --out DIR` does all of it; every seed gives one candidate, and the best on validation is kept as
`policy.json`. What hindsight tells of the windows is kept in `work/`, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import protocol

from pilotage.agents.domain import service_at_random
from pilotage.agents.hindsight import Settings, Table, joined, look_back, train
from pilotage.control.foresight import Foresight
from pilotage.results import as_csv, write_whole

SERVICES = {"train": 240, "validate": 40}


def table_of(data: Path, split: str, seed: int, number: int) -> Table:
    """What hindsight tells of one service's windows: every eighth is the judged one, a fifth have no long past."""
    rng = np.random.default_rng([seed, len(split), number])
    judged = protocol.service(data)
    scenario = judged if number % 8 == 0 else service_at_random(rng, judged)
    scenario = scenario.replace(history_h=1.0 if number % 5 == 4 else protocol.HISTORY_H)
    return look_back(scenario, [w for _, w in protocol.windows(scenario, split, rng, protocol.SHARES[split])])


def tables(split: str, data: Path, work: Path, seed: int, services: int) -> Table:
    """What hindsight tells of a split's windows."""
    kept = work / f"{split}-{services}-{seed}.npz"
    if kept.is_file():
        return Table(**np.load(kept))
    parts, began = [], time.perf_counter()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for part in pool.map(partial(table_of, data, split, seed), range(services)):
            parts.append(part)
            print(
                f"{split}: service {len(parts)}/{services}, {time.perf_counter() - began:.0f} s", flush=True
            )
    table = joined(parts)
    work.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(".part.npz")
    np.savez(unfinished, **{name: getattr(table, name) for name in Table.__slots__})
    unfinished.replace(kept)
    return table


def candidate(
    data: Path, work: Path, seed: int, services: dict[str, int], epochs: int | None, number: int
) -> tuple[Foresight, list[float]]:
    """What one seed learns, kept in `work`."""
    kept = work / f"candidate-{services['train']}-{seed}-{number}.json"
    if not kept.is_file():
        learned, judged = (tables(split, data, work, seed, services[split]) for split in SERVICES)
        settings = Settings(seed=number)
        policy, curve = train(
            learned,
            judged,
            settings if epochs is None else msgspec.structs.replace(settings, epochs=epochs),
            progress=lambda epoch, ratio: print(f"seed {number}: epoch {epoch}, {ratio:.3f}", flush=True),
        )
        write_whole(kept, msgspec.json.encode({"policy": policy, "curve": curve}).decode())
    raw = json.loads(kept.read_text())
    return msgspec.convert(raw["policy"], Foresight), raw["curve"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/scaling"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    work = options.out / "work"
    services = {k: v // 10 if options.quick else v for k, v in SERVICES.items()}
    for split in SERVICES:
        tables(split, options.data, work, options.seed, services[split])
    rows, found = [], []
    one = partial(candidate, options.data, work, options.seed, services, 4 if options.quick else None)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for number, (policy, curve) in enumerate(pool.map(one, range(options.seeds))):
            found.append((min(curve), policy))
            rows += [
                {"seed": number, "epoch": k, "validation_over_hindsight": f"{ratio:.5g}"}
                for k, ratio in enumerate(curve)
            ]
    write_whole(options.out / "learning.csv", as_csv(rows))
    best, policy = min(found, key=lambda pair: pair[0])
    write_whole(options.out / "policy.json", msgspec.json.encode(policy).decode())
    print(json.dumps({"validation_over_hindsight": best}))


if __name__ == "__main__":
    main()
