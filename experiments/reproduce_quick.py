"""Runs the quick forms of all experiments into a scratch folder and sets what comes out beside the committed results.

Every interval of `acceptance.csv` and `table.csv` that both have agrees if both overlap (a value alone: if it lies
within the other's); a line without one, if it is still met. Where the quick form trains or tunes less, or measures the
speed of this machine, its figures are not those of the whole: there it must run to its end, and nothing is compared.
What needs traces is left out without `--data`, what needs a Prometheus without one. Ends with 1 if an experiment fails,
or if more intervals and lines disagree than one in twenty, which is how often 95 % intervals may miss.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments import prometheus
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
    "llm_scaling": LESS,
    "cleanrl_ppo": LESS,
    "ledger": SPEED,
    "steer": SPEED,
    "bench": SPEED,
    "llm_serving": SPEED,
    "leaderboard": SHORT,
    "rehearse": SHORT,
}
LEFT_OUT: Final = {
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
PROMETHEUS: Final = {"calibrate", "rehearse"}  # what asks a real one
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


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def intervals(rows: list[dict[str, str]], words: list[str]) -> dict[str, tuple[float, float]]:
    """The intervals of a table, by the words of a row and the column; of one value if a line of acceptance has none."""
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        name = ", ".join(row.get(word, "") for word in words)
        for column in row:
            if column.endswith("low") and column[:-3] + "high" in row:
                ends = number(row[column]), number(row[column[:-3] + "high"])
                value = number(row.get("measured", ""))
                if any(map(math.isnan, ends)):
                    ends = value, value
                # in a table, an interval of no width is one of too little data, and says nothing
                if all(map(math.isfinite, ends)) and ("measured" in row or ends[0] < ends[1]):
                    found[" ".join(filter(None, (name, column[:-3].strip("_"))))] = ends
    return found


def bare(row: dict[str, str]) -> bool:
    """Whether a line of acceptance has no interval."""
    return not (row["low"] and row["high"]) or row["low"] == row["high"]


def compared(committed: Path, fresh: Path) -> tuple[int, list[str]]:
    """How many intervals of two folders can be compared, and those that disagree, in words.

    Where a line of acceptance has no interval in either, it disagrees if it was met and is not any more.
    """
    count, apart = 0, []
    for file in ("acceptance.csv", "table.csv"):
        rows = read(committed / file)
        words = (
            [c for c in rows[0] if any(row[c] and math.isnan(number(row[c])) for row in rows)] if rows else []
        )
        words = ["line"] if "line" in words else words
        before, now = (intervals(read(folder / file), words) for folder in (committed, fresh))
        for name in before.keys() & now.keys():
            (low, high), (under, over) = before[name], now[name]
            if low < high or under < over:
                count += 1
                if high < under or over < low:
                    apart.append(f"{name}: [{under:.4g}, {over:.4g}] beside [{low:.4g}, {high:.4g}]")
        alone = {row["line"] for row in rows if row.get("met") == "True" and bare(row)}
        for row in read(fresh / file):
            if row.get("line") in alone and bare(row):
                count += 1
                if row["met"] != "True":
                    apart.append(f"{row['line']}: {row['measured']} is not met any more")
    return count, sorted(apart)


def ran(name: str, program: Path, data: Path | None, folder: Path, seed: int) -> dict[str, Any]:
    """Runs one quick form; a row of summary.csv."""
    row: dict[str, Any] = {
        "experiment": name, "state": "", "wall_s": "", "cpu_s": "", "compared": 0, "disagree": 0, "why": "",
    }  # fmt: skip
    if name in TRACES and not data:
        return row | {"state": "left out: no traces"}
    if name in PROMETHEUS and prometheus.missing():
        return row | {"state": "left out: no Prometheus"}
    out = (folder / name).resolve()
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with (out / "output.txt").open("w") as file:
        process = subprocess.Popen(command(program, data, out, seed), cwd=ROOT, stdout=file, stderr=file)
        late = threading.Timer(LIMIT_S, process.kill)
        late.start()
        _, status, used = os.wait4(process.pid, 0)
        late.cancel()
    process.returncode = code = os.waitstatus_to_exitcode(status)
    row["wall_s"] = round(time.perf_counter() - began, 1)
    row["cpu_s"] = round(used.ru_utime + used.ru_stime, 1)
    row["state"] = "done" if code == 0 else f"failed with {code}"
    if code:
        row["why"] = (out / "output.txt").read_text().strip().rpartition("\n")[2][:300]
    elif name in ALONE:
        row["why"] = f"not compared: {ALONE[name]}"
    else:
        row["compared"], apart = compared(ROOT / "results" / name, out)
        row["disagree"], row["why"] = len(apart), "; ".join(apart)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PILOTAGE_DATA"), help="folder of traces")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "reproduce")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="these experiments; repeatable")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="so many at once")
    options = parser.parse_args()
    data = Path(options.data).resolve() if options.data else None
    wanted = {k: v for k, v in programs().items() if k in (options.only or programs()) and k not in LEFT_OUT}
    options.out.mkdir(parents=True, exist_ok=True)
    rows, began = [], time.perf_counter()
    pool = ThreadPoolExecutor(options.jobs)
    try:
        running = [
            pool.submit(ran, k, program, data, options.out, options.seed) for k, program in wanted.items()
        ]
        for done in as_completed(running):
            rows.append(row := done.result())
            said = " ".join(f"{key}={value}" for key, value in row.items() if value not in ("", 0))
            minutes = (time.perf_counter() - began) / 60
            print(f"{len(rows)}/{len(wanted)} after {minutes:.1f} min: {said}", flush=True)
            write_whole(options.out / "summary.csv", as_csv(rows))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C ends what runs, and begins no more
    asked, apart = (sum(row[key] for row in rows) for key in ("compared", "disagree"))
    failed = [row["experiment"] for row in rows if row["state"].startswith("failed")]
    print(f"{asked - apart} of {asked} intervals and lines agree; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed) or apart > max(1, asked / 20))


if __name__ == "__main__":
    sys.exit(main())
