"""Result files: what a run, a comparison or an experiment leaves on disk, and where it came from."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from pilotage.engine.run import Run, bill
from pilotage.scenario import Scenario


def write_evaluation(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """evaluation.json, and the same flat as table.csv."""
    kept = [{"group": result["env"]} | result for result in results]
    write_whole(folder / "evaluation.json", json.dumps(kept, indent=1) + "\n")
    rows = []
    for result in kept:
        for row in result["policies"]:
            over = row["over_bound"] or {"mean": None, "low": None, "high": None}
            rows.append(
                {
                    "group": result["group"],
                    "policy": row["policy"],
                    **{f"total_usd_{k}": v for k, v in row["total_usd"].items()},
                    **{f"{k}_usd": v for k, v in row["usd"].items()},
                    "slo_attainment": row["slo_attainment"],
                    **{f"latency_{k}_ms": v for k, v in row["latency_ms"].items()},
                    **{k: row[k] for k in ("requests", "dropped", "replica_hours", "node_hours", "accuracy")},
                    **{f"over_bound_{k}": v for k, v in over.items()},
                }
            )
    write_whole(folder / "table.csv", as_csv(rows))


def numbers(folder: Path) -> Iterator[tuple[str, float, int]]:
    """What a folder of results measured, as (name, value, step): of every policy, and as it was tuned and learned."""
    for result in json.loads((folder / "evaluation.json").read_text()):
        for row in result["policies"]:
            yield f"{result['group']}/{row['policy']}/total_usd", row["total_usd"]["mean"], 0
            yield f"{result['group']}/{row['policy']}/slo_attainment", row["slo_attainment"], 0
    for file, name, at in (("learning_curve", "validation_usd", "steps"), ("trials", "usd", "trial")):
        path = folder / f"{file}.csv"
        if path.is_file():
            with path.open(newline="") as lines:
                for line in csv.DictReader(lines):
                    yield "/".join(filter(None, (line.get("policy"), name))), float(line[name]), int(line[at])


def provenance(
    experiment: str, command: Sequence[str], started: datetime, durations_s: dict[str, float]
) -> dict[str, Any]:
    """Where a result comes from: command (of absolute paths, the last part), commit, versions, machine, durations."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(  # noqa: S603  (fixed arguments)
                ["git", *arguments],  # noqa: S607  (whichever git the user has)
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ("pilotage", "numpy", "numba", "gymnasium", "optuna", "stable-baselines3", "torch")
    return {
        "experiment": experiment,
        "command": " ".join(
            ["python" if command and command[0].endswith(".py") else "pilotage"]
            + [Path(word).name if Path(word).is_absolute() else word for word in command]
        ),
        "commit": git("rev-parse", "HEAD"),
        # whether what ran is that commit; results, which it may have begun to write, are none of it
        "dirty": bool(
            git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results")
        ),
        "versions": {name: _version(name) for name in packages},
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory, 1),
            "python": platform.python_version(),
            "os": f"{platform.system()} {platform.release()}",
        },
        "durations_s": durations_s,
        "started_at": started.isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or sys.platform


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def timeline_rows(policy: str, scenario: Scenario, run: Run) -> list[dict[str, Any]]:
    """A run's timeline, one row per tick of the scenario: counts summed over services, latency of the slowest.

    Of a run with ticks of its own, a row holds what happened within it (a tick that reaches into several rows is
    shared out evenly), the highest latency, what was there at its end, and all decisions in words.
    """
    assert run.timeline is not None
    ticks, own_s = run.timeline, run.tick_s
    ends_s = scenario.tick_s * np.arange(1, scenario.ticks + 1)
    last = np.minimum(np.ceil(ends_s / own_s - 1e-9).astype(int), len(ticks)) - 1
    first = np.floor((ends_s - scenario.tick_s) / own_s + 1e-9).astype(int)
    known_s = own_s * np.arange(len(ticks) + 1)

    def within(values: np.ndarray, whole: bool = False) -> np.ndarray:
        so_far = np.interp(ends_s, known_s, np.r_[0.0, np.cumsum(values)])
        return np.diff(np.floor(so_far + 1e-6) if whole else so_far, prepend=0.0)

    usd = within(bill(ticks, scenario).sum(axis=(1, 2)))
    arrival = within(ticks["arrived"].sum(axis=1)) / scenario.tick_s
    late = within(ticks["late"].sum(axis=1), whole=True)
    lost = sum(ticks[name].sum(axis=1) for name in ("rejected", "timed_out", "abandoned", "lost"))
    dropped = within(lost, whole=True)
    with np.errstate(invalid="ignore"):
        p95 = np.max(np.nan_to_num(ticks["latency_p95_s"], nan=0.0), axis=1)
    return [
        {
            "policy": policy,
            "hour": round(float(ends_s[k]) / 3600, 5),
            "arrival_rate": round(float(arrival[k]), 3),
            "replicas_ready": int(ticks[end]["ready"].sum()),
            "replicas_starting": int(ticks[end]["starting"].sum()),
            "latency_p95_s": round(float(p95[first[k] : end + 1].max()), 4),
            "queue_length": int(ticks[end]["waiting"].sum()),
            "late": int(late[k]),
            "dropped": int(dropped[k]),
            "usd": round(float(usd[k]), 6),
            "slo_s": min(service.slo_s for service in scenario.services),
            "decision": "; ".join(filter(None, run.decisions[first[k] : end + 1])),
        }
        for k, end in enumerate(last.tolist())
    ]
