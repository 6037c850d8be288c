"""What bundles promise, measured: parity with stable-baselines3, latency, memory, and a loader that only refuses.

`run.py --out DIR` trains PPO, SAC and TQC shortly (so that the networks are far from where they began; how well they
do is not the point) and compares each with its bundle on observations that it visits and on random ones. It times
decisions of the trained 64x64 network and of the shipped policy, from measurements to orders, alone and for a thousand
services; looks at what a fresh process that only opens and runs bundles loads and occupies; and mutates bundles, most
of them as they are, some with their hashes made right again, while Python's audit hook watches for code that runs and
files that are written. `--mutations` says how many.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in docs/deploy, and before NumPy asks for it

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.export.fuzz import KEY, Fuzz
from experiments.export.parity import compared, trained
from pilotage.agents.export import export, watch
from pilotage.control.bundle import Bundle, open_bundle
from pilotage.control.guard import Guard
from pilotage.control.learned import policy_from
from pilotage.control.policy import Observation
from pilotage.control.scaling import Hpa
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Scenario, load

ALGORITHMS = ("ppo", "sac", "tqc")
SERVICES = 1000
# what is mutated: bundle, hashes made right again, key configured, share of all mutations
KINDS = (
    ("rule", False, False, 0.55), ("network", False, False, 0.25), ("rule", False, True, 0.05),
    ("network", True, True, 0.10), ("rule", True, False, 0.04), ("network", True, False, 0.01),
)  # fmt: skip
SMALL = """
import json, sys
from pathlib import Path
import msgspec
from pilotage.control.bundle import SELFTEST, open_bundle
from pilotage.control.selftest import SelfTest
for path in sys.argv[1:]:
    bundle = open_bundle(path)
    selftest = msgspec.json.decode((bundle.path / SELFTEST).read_bytes(), type=SelfTest)
    case = selftest.cases[0]
    fleet = bundle.policy.begin_together([case.situation] * 20)
    for seen in case.observations(selftest.features):
        fleet.decide([seen] * 20)
heavy = {"torch", "numba", "gymnasium", "stable_baselines3", "pandas", "scipy", "mlflow"}
(peak,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
print(json.dumps([int(peak.split()[1]) / 1024, sorted(heavy & {name.partition(".")[0] for name in sys.modules})]))
"""


def median_us(what: Callable[[], object], times: int) -> dict[str, float]:
    """Median CPU time of a call in microseconds (the machine is shared, and everything here runs on one thread), less
    that of looking at the clock, and the lowest and highest median of ten stretches."""
    taken, idle = np.zeros(times), np.zeros(times)
    for k in range(times):
        before = time.process_time_ns()
        what()
        taken[k] = time.process_time_ns() - before
        before = time.process_time_ns()
        idle[k] = time.process_time_ns() - before
    stretches = np.array([np.median(part) for part in np.array_split(taken, 10)]) - np.median(idle)
    middle = np.median(taken) - np.median(idle)
    return {
        "mean": float(middle) / 1e3,
        "low": float(stretches.min()) / 1e3,
        "high": float(stretches.max()) / 1e3,
    }


def speeds(name: str, bundle: Bundle, scenario: Scenario, times: int) -> list[dict[str, Any]]:
    """Of a network: its outputs for one row and for many, by both runtimes. Of the policy: whole decisions."""
    policy = bundle.policy
    forward = policy.policy.network.forward()  # type: ignore[attr-defined]
    watched = watch(policy, scenario, Guard(), 4)
    rng = np.random.default_rng(0)
    rows = []

    def add(what: str, services: int, call: Callable[[], object], count: int) -> None:
        found = median_us(call, count)
        rows.append(
            {"bundle": name, "what": what, "services": services}
            | {f"us_{k}": f"{v:.4g}" for k, v in found.items()}
        )
        print(rows[-1], flush=True)

    for services, count in ((1, 10 * times), (SERVICES, times)):
        inputs = rng.normal(size=(services, len(bundle.manifest.networks["policy.onnx"].inputs)))
        add("network by NumPy", services, lambda x=inputs: forward.by_numpy(x), count)
        add(
            "network by ONNX Runtime", services,
            lambda x=inputs: forward.session.run(None, {"observation": x}), count,
        )  # fmt: skip
        add("network as chosen", services, lambda x=inputs: forward(x), count)
        situations = [watched.situations[k % len(watched.situations)] for k in range(services)]
        fleet = policy.begin_together(situations)
        ticks = [[row[k % len(row)] for k in range(services)] for row in watched.seen[:40]]
        at = iter(range(10**9))

        def decide(fleet: Any = fleet, ticks: list[list[Observation]] = ticks, at: Any = at) -> object:
            return fleet.decide(ticks[next(at) % len(ticks)])

        add("whole decision, from measurements to orders", services, decide, max(40, count // 10))
        del fleet
    return rows


def mutated(bundles: dict[str, Path], count: int, seed: int) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Outcomes of mutations by kind, and how often each reason was given."""
    rows, reasons = [], Counter[str]()
    shared = Path("/dev/shm")
    for name, forged, keyed, share in KINDS:
        source, key = bundles[f"{name}-signed" if keyed else name], KEY if keyed else None
        open_bundle(source, key)  # what is imported late is imported now
        outcomes: Counter[str] = Counter()
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as home:
            fuzz = Fuzz(source, Path(home), seed)
            for _ in range(round(share * count)):
                how, outcome, why = fuzz.once(forged, key)
                outcomes[outcome] += 1
                reasons[f"{outcome}: {why[:60]}"] += outcome != "same"
                if outcome == "crashed":
                    print("CRASHED", name, forged, keyed, how, why, flush=True)
        rows.append({
            "bundle": name, "hashes_made_right": forged, "key": keyed, "mutations": sum(outcomes.values()),
            **{k: outcomes[k] for k in ("refused", "same", "loaded", "crashed")},
            "seconds": f"{time.perf_counter() - began:.1f}",
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows, reasons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--out", type=Path, default=Path("results/export"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8192, help="of each short training")
    parser.add_argument("--observations", type=int, default=10_000)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="a much reduced form, to try things out")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.observations, options.mutations = 4096, 1000, 1000
    options.out.mkdir(parents=True, exist_ok=True)
    started, lasted, began = datetime.now(UTC), {}, time.perf_counter()
    acceptance: list[dict[str, Any]] = []

    def line(what: str, asked: str, measured: Any, met: bool, low: Any = "", high: Any = "") -> None:
        acceptance.append(
            {"line": what, "asked": asked, "measured": measured, "low": low, "high": high, "met": bool(met)}
        )
        print(acceptance[-1], flush=True)

    def lap(what: str) -> None:
        lasted[what] = round(time.perf_counter() - began - sum(lasted.values()), 1)

    scenario = load("quickstart").replace(horizon_h=0.5)
    short = scenario.replace(
        horizon_h=0.05, history_h=0.25
    )  # a short self-test, which is opened 100,000 times
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        parity, learned = [], {}
        for algo in ALGORITHMS:
            learned[algo] = trained(scenario, algo, options.steps, options.seed, home / algo)
            for row in compared(learned[algo], options.observations, options.seed):
                parity.append({"policy": algo} | row)
                print(parity[-1], flush=True)
        largest = max(row["largest_difference"] for row in parity)
        same = min(row["same_choice"] for row in parity)
        line(
            "largest difference of outputs between SB3 and bundle", "< 1e-5", f"{largest:.3g}", largest < 1e-5
        )
        line(
            "same choice, worst of policies and kinds of observations",
            ">= 0.9999",
            f"{same:.6f}",
            same >= 0.9999,
        )
        lap("parity")
        for name, policy in (("rule", Hpa()), ("network", policy_from("learned"))):
            export(policy, home / name, [short], name=name, runs=1)
            export(policy, home / f"{name}-signed", [short], name=name, runs=1, key=KEY)
        times = 20 if options.quick else 1000
        speed = speeds("64x64, PPO on predictive", learned["ppo"].bundle, scenario, times)
        speed += speeds("learned, 128x128", open_bundle(home / "network"), scenario, times)
        for row in speed:
            one = row["services"] == 1
            if row["what"] in ("network as chosen", "whole decision, from measurements to orders"):
                limit = 10.0 if one else 2000.0
                line(
                    f"median CPU time, {row['services']} service{'' if one else 's'}, {row['what']}, {row['bundle']}",
                    "<= 10 us" if one else "<= 2000 us", row["us_mean"], float(row["us_mean"]) <= limit,
                    row["us_low"], row["us_high"],
                )  # fmt: skip
        lap("latency")
        done = subprocess.run(
            [sys.executable, "-c", SMALL, home / "rule", home / "network"],
            capture_output=True,
            text=True,
            check=True,
        )
        mb, loaded = json.loads(done.stdout)
        line("peak memory of a process that only runs bundles, MB", "< 150", f"{mb:.1f}", mb < 150)
        line("torch, numba, gymnasium and the like in it", "none", ", ".join(loaded) or "none", not loaded)
        lap("memory")
        fuzzed, reasons = mutated(
            {n: home / n for n in ("rule", "network", "rule-signed", "network-signed")},
            options.mutations,
            options.seed,
        )
        lap("mutations")
    total = sum(row["mutations"] for row in fuzzed)
    crashed = sum(row["crashed"] for row in fuzzed)
    line("mutated bundles", "100000", total, total >= 100_000)
    line("of them: crash, code run, file written outside", "0", crashed, crashed == 0)
    closed = [row for row in fuzzed if row["key"] or not row["hashes_made_right"]]
    opened = sum(row["loaded"] for row in closed)
    count = sum(row["mutations"] for row in closed)
    line(f"opened although changed, of {count} that nobody who may sign has made", "0", opened, opened == 0)
    tables: list[dict[str, Any]] = [
        *({"part": "parity", **row} for row in parity),
        *({"part": "latency", **row} for row in speed),
        *({"part": "mutations", **row} for row in fuzzed),
    ]
    columns = list(dict.fromkeys(key for row in tables for key in row))
    write_whole(options.out / "table.csv", as_csv([dict.fromkeys(columns, "") | row for row in tables]))
    write_whole(
        options.out / "reasons.csv",
        as_csv([{"reason": why, "times": n} for why, n in reasons.most_common(60)]),
    )
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    record = provenance("export", sys.argv, started, lasted)
    record |= {name: getattr(options, name) for name in ("seed", "steps", "observations", "mutations")}
    record["scenarios"] = {scenario.name: scenario.digest()}
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
