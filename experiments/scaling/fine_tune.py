"""Reinforcement learning on top of what hindsight taught: does correcting the learned levels in the engine pay?

`fine_tune.py --data DIR --out DIR` trains corrections of a base on the judged service's training windows, with queues,
noise and the guard in the loop, and judges them on its validation windows: PPO from the shipped kind of policy and from
`predictive` (which knows nothing of hindsight), SAC and TQC from the former. Writes `fine_tuning.csv`, a row per
evaluation.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import msgspec
import protocol
import tune

from pilotage.agents.algorithms import Settings
from pilotage.agents.train import train
from pilotage.control.foresight import Foresight
from pilotage.control.scaling import Predictive
from pilotage.results import as_csv, write_whole

# (algorithm, base, seeds)
TRIED = (("ppo", "foresight", 3), ("ppo", "predictive", 3), ("sac", "foresight", 1), ("tqc", "foresight", 1))


def learn(options: argparse.Namespace, tried: tuple[str, str, int]) -> list[dict[str, object]]:
    """One training: its validation after every stretch of steps."""
    algo, base, seed = tried
    kept: Path = options.out / "work" / f"fine-tuning-{algo}-{base}-{seed}-{options.steps}.csv"
    if not kept.is_file():
        _learn(options, kept, algo, base, seed)
    lines = kept.read_text().splitlines()[1:]
    return [
        {"algo": algo, "base": base, "seed": seed, "steps": n, "validation_usd": usd, "base_usd": base_usd}
        for n, usd, base_usd, _ in (line.split(",") for line in lines)
    ]


def _learn(options: argparse.Namespace, kept: Path, algo: str, base: str, seed: int) -> None:
    scenario = protocol.service(options.data)
    groups = {split: tune.groups(options.data, split, options.seed) for split in tune.SHARES}
    if base == "foresight":
        policy = msgspec.json.decode((options.out / "policy.json").read_bytes(), type=Foresight)
    else:
        policy = Predictive()
    settings = Settings(
        algo=algo,
        steps=options.steps if algo == "ppo" else options.steps // 4,
        evaluations=8,
        learning_rate=3e-4,
        discount=0.99,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(
            scenario,
            policy,
            [w for g in groups["train"] for w in g],
            groups["validate"],
            settings,
            Path(folder),
        )
        write_whole(kept, (Path(folder) / "learning_curve.csv").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/scaling"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=1_000_000, help="of PPO; SAC and TQC make a quarter of them"
    )
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.steps = 20_000
    runs = [(algo, base, seed) for algo, base, n in TRIED for seed in range(1 if options.quick else n)]
    (options.out / "work").mkdir(parents=True, exist_ok=True)
    rows = []
    for run in runs:  # one after another: the windows and their pasts take some 9 GB
        found = learn(options, run)
        rows += found
        best = min(float(str(row["validation_usd"])) for row in found)
        ratio = best / float(str(found[0]["base_usd"]))
        print(f"{run[0]} on {run[1]}, seed {run[2]}: {ratio:.3f} of its base", flush=True)
    write_whole(options.out / "fine_tuning.csv", as_csv(rows))


if __name__ == "__main__":
    main()
