"""Runs the quick forms of all experiments into a scratch folder and sets what comes out beside the committed results.

Each line of `acceptance.csv` that both have, with an interval in one of them, agrees if the intervals (or the value and
the interval) overlap. Where the quick form trains or tunes less, or measures the speed of this machine, its figures are
not those of the whole: there it must run to its end, and nothing is compared. What needs traces is left out without
`--data`, what needs programs that are not there says so itself. Ends with 1 if an experiment fails, or if more lines
disagree than one in twenty, which is how often 95 % intervals may miss.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from pilotage.results import as_csv, write_whole

ROOT: Final = Path(__file__).parents[1]
LIMIT_S: Final = 1800.0  # of one experiment, on a crowded machine


LESS, SPEED, SHORT = "trains less", "measures this machine", "shorter runs"
# whose figures are not compared, and why
ALONE: Final = {
    "quickstart": LESS,
    "real_traffic": LESS,
    "placement": LESS,
    "retraining": LESS,
    "fleet_lifecycle": LESS,
    "export": LESS,
    "cleanrl_ppo": LESS,
    "ledger": SPEED,
    "steer": SPEED,
    "bench": SPEED,
    "llm_serving": SPEED,
    "leaderboard": SHORT,
}
LEFT_OUT: Final = {
    "calibrate": "needs a Prometheus server",
    "explain": "three quarters of an hour",
    "live_loop": "needs Ray Serve and Prometheus; make demo-live",
    "profile": "times a served model, which needs a quiet machine",
    "scaling": "hours of training and tuning",
    "workers": "starts Dask and Ray",
}
TRACES: Final = {  # what cannot run without them
    "real_traffic",
    "retraining",
    "anomaly",
    "bias_gate",
    "traffic_fit",
    "llm_serving",
    "fidelity/ray_serve",
    "fidelity/vidur",
    "fidelity/vllm",
    "fidelity/silicon",
}
HELPERS: Final = {"bench_peers", "prometheus", "reproduce_quick"}  # no claim of their own


def programs() -> dict[str, Path]:
    """Every experiment by the name of its results' folder: a file, or a folder with `run.py` or `bench.py`."""
    here = ROOT / "experiments"
    found = {path.stem: path for path in sorted([*here.glob("*.toml"), *here.glob("*.py")])}
    for name in ("bench.py", "run.py"):
        found |= {str(path.parent.relative_to(here)): path for path in sorted(here.glob(f"*/**/{name}"))}
    found.setdefault("scaling", here / "scaling" / "judge.py")
    return {name: path for name, path in found.items() if name not in HELPERS}


def command(program: Path, data: Path | None, out: Path, seed: int) -> list[str]:
    study = ["-m", "pilotage", "study"] if program.suffix == ".toml" else []
    given = ["--data", str(data)] if data else []
    named = str(program.relative_to(ROOT))
    return [sys.executable, *study, named, *given, "--seed", str(seed), "--quick", "--out", str(out)]


def lines(path: Path) -> dict[str, tuple[float, float]]:
    """What was measured, as an interval, by line; of one value if there is none."""
    if not path.is_file():
        return {}
    found = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                value = float(row["measured"])
            except ValueError:
                continue
            ends = [float(row[key] or "nan") for key in ("low", "high")]
            if math.isfinite(value):
                found[row["line"]] = (value, value) if any(map(math.isnan, ends)) else (ends[0], ends[1])
    return found


def compared(committed: Path, fresh: Path) -> tuple[int, list[str]]:
    """How many lines can be compared, and those that disagree, in words."""
    before, now = lines(committed), lines(fresh)
    both = [
        line
        for line in before
        if line in now and (before[line][0] < before[line][1] or now[line][0] < now[line][1])
    ]
    apart = [line for line in both if before[line][1] < now[line][0] or now[line][1] < before[line][0]]
    return len(both), [f"{line}: {now[line]} beside {before[line]}" for line in apart]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PILOTAGE_DATA"), help="folder of traces")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "reproduce")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="these experiments; repeatable")
    options = parser.parse_args()
    data = Path(options.data).resolve() if options.data else None
    rows, agreed, asked = [], 0, 0
    for name, program in programs().items():
        if name not in (options.only or programs()) or name in LEFT_OUT:
            continue
        out = (options.out / name).resolve()
        out.mkdir(parents=True, exist_ok=True)
        row = {"experiment": name, "state": "left out: no traces", "wall_s": "", "cpu_s": "", "compared": 0,
               "disagree": 0, "why": ""}  # fmt: skip
        if data or name not in TRACES:
            began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            with (out / "output.txt").open("w") as file:
                try:
                    done = subprocess.run(
                        command(program, data, out, options.seed),
                        cwd=ROOT,
                        stdout=file,
                        stderr=file,
                        timeout=LIMIT_S,
                    )
                    row["state"] = "done" if done.returncode == 0 else f"failed with {done.returncode}"
                except subprocess.TimeoutExpired:
                    row["state"] = f"stopped after {LIMIT_S:.0f} s"
            now = resource.getrusage(resource.RUSAGE_CHILDREN)
            row["wall_s"] = round(time.perf_counter() - began, 1)
            row["cpu_s"] = round(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, 1)
            if name in ALONE:
                row["why"] = f"not compared: {ALONE[name]}"
            elif row["state"] == "done":
                row["compared"], apart = compared(
                    ROOT / "results" / name / "acceptance.csv", out / "acceptance.csv"
                )
                row["disagree"], row["why"] = len(apart), "; ".join(apart)
                asked, agreed = asked + row["compared"], agreed + row["compared"] - row["disagree"]
            if row["state"] != "done":
                row["why"] = (out / "output.txt").read_text().strip().rpartition("\n")[2][:300]
        rows.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items() if value not in ("", 0)), flush=True)
        write_whole(options.out / "summary.csv", as_csv(rows))
    failed = [row["experiment"] for row in rows if row["state"] not in ("done", "left out: no traces")]
    print(f"{agreed} of {asked} lines agree; failed: {', '.join(map(str, failed)) or 'none'}")
    return int(bool(failed) or asked - agreed > max(1, asked / 20))


if __name__ == "__main__":
    sys.exit(main())
