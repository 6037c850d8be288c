"""Is every tampering with a ledger found, and how fast is a long one verified and asked? Writes results/ledger.

Tampering: each kind of change to random lines or bytes of a ledger of 200 entries, with the head left as it was. Speed:
a ledger with entries as a control loop writes them, verified line by line; questions by time are asked of it by a
newly opened ledger each. What was asked is measured in CPU time of one core, as in `bench`; wall clock, which depends
on who else uses the machine, stands beside it in the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pilotage.live.compare import wilson
from pilotage.live.entries import Actor, Record
from pilotage.live.ledger import Ledger
from pilotage.results import as_csv, provenance, write_whole

BATCH = 10_000
KINDS = ("edit a byte", "insert a byte", "erase a byte", "delete a line", "swap lines", "double a line", "move a line",
         "cut lines", "cut bytes", "cut lines and head")  # fmt: skip


def record(k: int) -> Record:
    return Record(
        kind="scale", outcome="applied", service=f"service-{k % 20}", reason="utilisation above target",
        actor=Actor(kind="policy", name="learned", version="3", digest="5f" * 32),
        decision={"order": k % 7, "release": 0, "chosen": "up", "alternatives": {"up": 1.25, "stay": 1.75}},
        evidence={"requests": k, "p95_ms": 12.5, "ready": k % 50, "queue": 3, "observation": "c0" * 32},
    )  # fmt: skip


def tampered(kind: str, data: bytes, rng: np.random.Generator) -> bytes:
    at, lines = int(rng.integers(len(data))), data.splitlines(keepends=True)
    one, two = (int(k) for k in rng.choice(len(lines), 2, replace=False))
    if kind == "edit a byte":
        return data[:at] + bytes([data[at] ^ int(rng.integers(1, 256))]) + data[at + 1 :]
    if kind == "insert a byte":
        return data[:at] + bytes([int(rng.integers(256))]) + data[at:]
    if kind == "erase a byte":
        return data[:at] + data[at + 1 :]
    if kind == "cut bytes":
        return data[:at]
    if kind == "delete a line":
        del lines[one]
    elif kind == "swap lines":
        lines[one], lines[two] = lines[two], lines[one]
    elif kind == "double a line":
        lines.insert(two, lines[one])
    elif kind == "move a line":
        lines.insert(two, lines.pop(one))
    else:
        lines = lines[:one]
    return b"".join(lines)


def found(kind: str, tries: int, rng: np.random.Generator) -> int:
    """How many of so many tamperings are found. With "and head", the head is forged to fit the cut, and one entry's
    hash had been kept elsewhere, as registries keep them: the last one."""
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Ledger(Path(folder) / "whole")
        whole.append(*[record(k) for k in range(200)])
        data = (whole.folder / "ledger.jsonl").read_bytes()
        anchor = whole.entries(last=1)[0].id
        for _ in range(tries):
            copy = Ledger(Path(folder) / "copy")
            shutil.rmtree(copy.folder, ignore_errors=True)
            shutil.copytree(whole.folder, copy.folder)
            (copy.folder / "ledger.jsonl").write_bytes(tampered(kind, data, rng))
            if kind.endswith("head"):
                lines = (copy.folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
                last = json.loads(lines[-1]) if lines else {"hash": "0" * 64, "record": {"time": ""}}
                head = {"entries": len(lines), "size": sum(map(len, lines)), "hash": last["hash"],
                        "time": last["record"]["time"]}  # fmt: skip
                (copy.folder / "head.json").write_text(json.dumps(head))
            count += copy.verify([anchor] if kind.endswith("head") else []).problem is not None
        assert whole.verify([anchor]).problem is None
    return count


def speed(entries: int, questions: int, rng: np.random.Generator) -> dict[str, float]:
    """Seconds and bytes for a ledger of so many entries."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(folder)
        began = time.perf_counter()
        for start in range(0, entries, BATCH):
            ledger.append(*[record(start + k) for k in range(min(BATCH, entries - start))])
        batch_s = (time.perf_counter() - began) / entries
        singles = []
        for k in range(100):
            began = time.perf_counter()
            ledger.append(record(k))
            singles.append(time.perf_counter() - began)
        began, spent = time.perf_counter(), time.process_time()
        verification = ledger.verify()
        verify_s, verify_cpu_s = time.perf_counter() - began, time.process_time() - spent
        assert (verification.problem, verification.entries) == (None, entries + 100)
        asked, asked_wall = [], []
        for _ in range(questions):
            at = ledger.entry(int(rng.integers(entries))).time
            began, spent = time.perf_counter(), time.process_time()
            answer = Ledger(folder).entries(f"service-{rng.integers(20)}", until=at, last=1)
            asked.append(time.process_time() - spent)
            asked_wall.append(time.perf_counter() - began)
            assert not answer or answer[0].time <= at
        (Path(folder) / "index.db").unlink()
        began = time.perf_counter()
        ledger.entries(last=1)
        return {
            "verify_cpu_s": verify_cpu_s, "verify_wall_s": verify_s, "query_max_cpu_s": max(asked),
            "query_p50_wall_s": float(np.median(asked_wall)), "query_max_wall_s": max(asked_wall),
            "append_one_p50_s": float(np.median(singles)), "append_batch_s": batch_s,
            "index_rebuilt_s": time.perf_counter() - began, "bytes_per_entry": ledger.head().size / entries,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="not needed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/ledger"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    started, began = datetime.now(UTC), time.perf_counter()
    rng = np.random.default_rng(options.seed)
    tries, entries = (20, 20_000) if options.quick else (200, 1_000_000)
    rows, all_found = [], 0
    for kind in KINDS:
        count = found(kind, tries, rng)
        all_found += count
        rows.append({"measure": f"found: {kind}", "value": count, "of": tries})
    fast = speed(entries, 50 if options.quick else 500, rng)
    rows += [{"measure": name, "value": f"{value:.6g}", "of": entries} for name, value in fast.items()]
    share = all_found / (tries * len(KINDS))
    low, high = wilson(share, tries * len(KINDS))
    lines = [
        ("tampered, truncated or reordered ledgers found", "1", share, low, high, share == 1),
        (f"{entries} entries verified, seconds", "< 20", fast["verify_cpu_s"], "", "", fast["verify_cpu_s"] < 20),
        (
            f"{entries} entries, longest query by time, seconds",
            "< 0.1", fast["query_max_cpu_s"], "", "", fast["query_max_cpu_s"] < 0.1,
        ),
    ]  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "table.csv", as_csv(rows))
    names = ("line", "asked", "measured", "low", "high", "met")
    shown = [
        [f"{v:.6g}" if isinstance(v, float) else v for v in line[:-1]] + [bool(line[-1])] for line in lines
    ]
    write_whole(
        options.out / "acceptance.csv", as_csv([dict(zip(names, line, strict=True)) for line in shown])
    )
    facts = provenance("ledger", sys.argv, started, {"ledger": round(time.perf_counter() - began, 1)})
    facts |= {
        "seeds": [options.seed],
    }
    write_whole(options.out / "run.json", json.dumps(facts, indent=2) + "\n")
    for line in lines:
        print(f"{'met    ' if line[-1] else 'NOT MET'} {line[0]}: {line[2]:.4g} (asked {line[1]})")


if __name__ == "__main__":
    main()
