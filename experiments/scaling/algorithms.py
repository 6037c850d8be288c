"""Every algorithm of stable-baselines3 that is offered, after the same small budget, on `quickstart`.

`algorithms.py --out DIR` trains a correction of `predictive` by each of `pilotage.agents.algorithms`, with the same
steps, the same training runs and its own defaults, and judges what validation kept on fresh seeds, paired. The budget
is small: it says who learns something quickly, not who is best in the end. Intervals are 95 %, by bootstrap over test
runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from pilotage.agents.algorithms import ALGORITHMS, Settings
from pilotage.agents.train import train
from pilotage.control.guard import Guard
from pilotage.control.policy import Policy
from pilotage.control.scaling import Predictive
from pilotage.engine.cluster import World
from pilotage.engine.run import simulate
from pilotage.evaluate import ratio_interval
from pilotage.metrics import attainment
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import load

STEPS, HOURS, TESTS = 8_192, 1.0, 12
TRAIN_SEED, VALIDATION_SEED, TEST_SEED = 700_000, 710_000, 720_000
BASE = Predictive()


def judged(policy: Policy, seed: int, tests: int) -> tuple[np.ndarray, float]:
    """Dollars of the test runs, and the share of requests in time."""
    scenario = load("quickstart").replace(horizon_h=HOURS)
    windows = [World(TEST_SEED + 1000 * seed + k) for k in range(tests)]
    runs = simulate(scenario, [policy] * tests, windows, guard=Guard())

    def count(*names: str) -> float:
        return sum(float(run.totals[name].sum()) for run in runs for name in names)

    finished = count("served", "rejected", "timed_out", "abandoned", "lost", "overdue")
    return np.array([run.total_usd for run in runs]), attainment(count("served") - count("late"), finished)


def learned(
    algo: str, steps: int, seed: int, tests: int, work: Path
) -> tuple[np.ndarray, float, float, float]:
    """The same of what an algorithm learns, and the seconds that learning took: of CPU, and by the clock."""
    began, wall = time.process_time(), time.perf_counter()
    settings = Settings(
        algo=algo, steps=steps, worlds=16, rollout_ticks=64, minibatches=4, gradient_steps=2, evaluations=3,
        seed=seed,
    )  # fmt: skip
    policy = train(
        load("quickstart").replace(horizon_h=HOURS),
        BASE,
        [World(TRAIN_SEED + 1000 * seed)],
        [[World(VALIDATION_SEED + 1000 * seed + k) for k in range(4)]],
        settings,
        work / f"algorithm-{algo}",
    )
    took = time.process_time() - began, time.perf_counter() - wall
    return *judged(policy, seed, tests), *took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--out", type=Path, default=Path("results/scaling"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    steps, tests = (2_048, 2) if options.quick else (STEPS, TESTS)
    options.out.mkdir(parents=True, exist_ok=True)
    started, lasted = datetime.now(UTC), {}
    before, met = judged(BASE, options.seed, tests)
    rows: list[dict[str, object]] = [
        {"algorithm": "none: predictive", "steps": 0, "cpu_s": "", "usd": f"{before.mean():.5g}",
         "saving": 0, "low": 0, "high": 0, "attainment": f"{met:.5f}"}
    ]  # fmt: skip
    one = partial(learned, steps=steps, seed=options.seed, tests=tests, work=options.out / "work")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for algo, (usd, met, cpu_s, wall_s) in zip(ALGORITHMS, pool.map(one, ALGORITHMS), strict=True):
            ratio = ratio_interval(usd, before)
            rows.append(
                {"algorithm": algo, "steps": steps, "cpu_s": f"{cpu_s:.0f}",
                 "usd": f"{usd.mean():.5g}", "saving": f"{1 - ratio['mean']:.4f}",
                 "low": f"{1 - ratio['high']:.4f}", "high": f"{1 - ratio['low']:.4f}", "attainment": f"{met:.5f}"}
            )  # fmt: skip
            lasted[algo] = round(wall_s, 1)
            print(rows[-1], flush=True)
    write_whole(options.out / "algorithms.csv", as_csv(rows))
    record = provenance("scaling/algorithms", sys.argv, started, lasted) | {
        "seed": options.seed,
        "tests": tests,
    }
    write_whole(options.out / "algorithms_run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
