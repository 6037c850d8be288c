"""The leaderboard: every scaling policy in every serving environment, on the same paired runs.

`pilotage.leaderboard` plays it; what `runs.csv` of the folder has already is not run again, and bundles that were added
(`pilotage leaderboard --add NAME=BUNDLE`) stay. Asked: that every policy runs everywhere, in ten minutes of one core.
With `--quick` runs are a quarter of an hour long, and two.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from pilotage.leaderboard import HOURS, RUNS, SEED, entrants, environments, play, shortened, write_board
from pilotage.results import as_csv, provenance, write_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="traces; without them two environments are left out")
    parser.add_argument("--out", type=Path, default=Path("results/leaderboard"))
    parser.add_argument(
        "--seed", type=int, default=0, help="of the bootstrap; the runs' seeds are the board's own"
    )
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    started, began = datetime.now(UTC), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    scenarios = environments(options.data)
    runs, hours = (2, 0.25) if options.quick else (RUNS, HOURS)
    scenarios = [shortened(one, hours) for one in scenarios]
    rows = play(
        options.out, scenarios, entrants({}), runs=runs,
        step=lambda text: print(f"{time.perf_counter() - began:.0f} s: {text}", flush=True),
    )  # fmt: skip
    record = provenance("leaderboard", sys.argv, started, {"play": round(time.perf_counter() - began, 1)})
    record |= {
        "seed": options.seed,
        "seeds": [SEED + k for k in range(runs)],
        "scenarios": {one.name: one.digest() for one in scenarios},
    }
    board = write_board(options.out, rows, record, hours=hours, seed=options.seed)
    cells = [cell for one in board for cell in one.cells.values()]
    ran = sum(not cell.note for cell in cells) / len(cells)
    cpu_s = sum(float(row["cpu_s"]) for row in rows if row["cpu_s"])
    lines = [
        ("share of policies and environments that ran", "= 1", ran, ran == 1),
        ("processor time of all runs, s", "<= 600", cpu_s, cpu_s <= 600),
    ]
    acceptance = [
        {"line": line, "asked": asked, "measured": f"{measured:.5g}", "low": "", "high": "", "met": met}
        for line, asked, measured, met in lines
    ]
    for row in acceptance:
        print(row)
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
