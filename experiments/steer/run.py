"""What steering costs and survives: the time and memory of a tick, a soak with random faults, shadow against act.

`run.py --out DIR` measures ticks of 1,000 services (policy, guard, ledger, dry-run target) in a process of their own,
runs 20,000 ticks of a virtual fleet with faults of every kind (`soak.py`), and lets shadow and act decide on the same
recording. Wall-clock time is of the machine as it is; CPU time is that of the one thread that works.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from soak import Fleet, Soak, audit, setup_of

from pilotage.control.policy import Decision
from pilotage.control.steer import steer
from pilotage.live.clock import Clock
from pilotage.live.recordings import Recording
from pilotage.live.status import Log
from pilotage.live.steering import Steering
from pilotage.results import as_csv, provenance, write_whole

POLICIES = ("hpa", "predictive", "learned")
CASES = (("shadow", "follows"), ("act", "follows"), ("act", "stuck"))  # mode and fleet; see `tick.py`


class Deciding(Steering):
    """Steering that keeps what it decides."""

    said: list[list[tuple]]

    def apply(self, decisions: Sequence[Decision]) -> None:
        self.said.append([(d.order, d.release, d.max_batch, d.pool, d.variant, d.reason) for d in decisions])
        super().apply(decisions)


def ticks_of(folder: Path, services: int, ticks: int) -> list[dict]:
    found = []
    for policy, (mode, fleet) in itertools.product(POLICIES, CASES):
        there = str(folder / f"{policy}-{mode}-{fleet}")
        command = [sys.executable, str(Path(__file__).with_name("tick.py")), there, str(services)]
        done = subprocess.run(
            [*command, policy, mode, fleet, str(ticks)], capture_output=True, text=True, check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # as in docs/deploy
        )  # fmt: skip
        found.append(json.loads(done.stdout))
        print(found[-1], flush=True)
    return found


def shadow_against_act(folder: Path, ticks: int, seed: int) -> tuple[int, int, int, int]:
    """(decisions, of them different, writes in shadow, writes in act) on one recording of a fleet with faults."""
    setup, fleet = setup_of(folder, 4), Fleet([f"s{k}" for k in range(4)], seed)
    recorded = setup.config.replace(record="seen.jsonl", mode="shadow")
    with (folder / "recorded.jsonl").open("w") as out:
        watching = Soak(
            replace(setup, config=recorded, ledger=folder / "recorded"), log=Log(out), monitor=fleet, target=fleet,
            clock=Clock(lambda: fleet.monotonic_s),
        )  # fmt: skip
        watching.fleet, watching.rss_mib = fleet, []
        steer(watching, watching, ticks)
    recording = Recording(path=str(folder / "seen.jsonl"))
    said, writes = [], []
    for mode in ("shadow", "act"):
        here = replace(setup, ledger=folder / mode, config=setup.config.replace(mode=mode, monitor=recording))
        target = Fleet(setup.names, seed, faults=False)
        with (folder / f"{mode}.jsonl").open("w") as out:
            steering = Deciding(here, log=Log(out), target=target)
            steering.said = []
            steer(steering, steering, None, going=steering.going)
        said.append(steering.said)
        writes.append(target.writes)
        assert audit(here.ledger, len(said[-1]), 4)["missing"] == 0
    differ = sum(a != b for one, two in zip(*said, strict=True) for a, b in zip(one, two, strict=True))
    return len(said[0]) * 4, differ, writes[0], writes[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--out", type=Path, default=Path("results/steer"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ticks", type=int, default=20_000, help="of the soak")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    soaked, services, timed = (600, 200, 20) if options.quick else (options.ticks, 1000, 60)
    started, began, lasted = datetime.now(UTC), time.perf_counter(), {}

    def lap(name: str) -> None:
        lasted[name] = round(time.perf_counter() - began - sum(lasted.values()), 1)

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = ticks_of(folder, services, timed)
        lap("ticks")
        # the soak needs time and not quiet, so that it runs beside the rest
        command = [
            sys.executable,
            str(Path(__file__).with_name("soak.py")),
            str(folder / "soak"),
            str(soaked),
        ]
        soaking = subprocess.Popen([*command, str(options.seed)], stdout=subprocess.PIPE, text=True)
        decisions, differ, idle_writes, writes = shadow_against_act(
            folder / "modes", 200 if options.quick else 1000, options.seed
        )
        lap("shadow against act")
        printed, _ = soaking.communicate()
        if soaking.returncode:
            raise SystemExit(f"the soak ended with code {soaking.returncode}")
        found = json.loads(printed)
        lap("soak")
    print(found, flush=True)
    rows = [
        {
            "policy": case["policy"], "mode": case["mode"], "fleet": case["fleet"],
            "services": case["services"], "ticks": case["ticks"], "share_changed": f"{case['changed']:.3f}",
            **{f"wall_ms_{q}": f"{v:.1f}" for q, v in zip(("min", "q25", "p50", "p95"), case["wall_ms"], strict=True)},
            **{f"cpu_ms_{q}": f"{v:.1f}" for q, v in zip(("min", "q25", "p50", "p95"), case["cpu_ms"], strict=True)},
            "rss_mib": f"{case['rss_mib']:.1f}", "heavy_modules": " ".join(case["heavy"]),
        }
        for case in cases
    ]  # fmt: skip
    lines: list[dict] = []

    def line(
        what: str, asked: str, measured: float, ok: bool, low: float | str = "", high: float | str = ""
    ) -> None:
        lines.append(
            {"line": what, "asked": asked, "measured": f"{measured:.5g}", "low": low, "high": high, "met": ok}
        )
        print(lines[-1], flush=True)

    for case in cases:
        stuck = ", all change" if case["fleet"] == "stuck" else ""
        what = f"{case['services']} services, {case['policy']}, {case['mode']}{stuck}"
        for clock in ("wall", "cpu"):
            times = case[f"{clock}_ms"]
            line(
                f"tick of {what}: {clock} time, ms (median; quartile and p95)", "<= 50", times[2], times[2] <= 50,
                f"{times[1]:.4g}", f"{times[3]:.4g}",
            )  # fmt: skip
        line(f"memory, {what}, MiB", "< 200", case["rss_mib"], case["rss_mib"] < 200)
    heavy = sum(len(case["heavy"]) for case in cases)
    line("modules of simulator or trainers that are loaded", "0", heavy, heavy == 0)
    line(
        "decisions that differ, shadow against act on a recording", "0", differ, differ == 0 and decisions > 0
    )
    line(
        "writes to the target in shadow (in act: more than 0)",
        "0",
        idle_writes,
        idle_writes == 0 and writes > 0,
    )
    missing = found["missing"] + found["double"] + found["waiting"] + found["lost"] + found["unsettled"]
    line(
        f"ledger entries missing, double or unsettled after {soaked} ticks with faults", "0", missing,
        missing == 0 and not found["broken"],
    )  # fmt: skip
    past = len(found["past_limits"])
    line("orders beyond the guard's limits in the soak", "0", past, past == 0)
    line("faults in the soak", "> 0", found["faults"], found["faults"] > 0)
    line("growth of memory after warm-up", "< 0.1", found["growth"], found["growth"] < 0.1)
    record = provenance("steer", sys.argv, started, lasted)
    record |= {"seed": options.seed, "soak": found, "load_average": os.getloadavg()}
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(lines))
    record["shadow_against_act"] = {"decisions": decisions, "writes_in_act": writes}
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
