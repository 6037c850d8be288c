"""Speed of the LLM engine: requests and iterations per second of one core, beside its peers.

Two workloads: 20,000 requests of 1,024 prompt and 128 output tokens from 32 clients on one replica, and the Azure
conversation trace on 8 replicas. Times are CPU time, the median of repetitions, without compilation. The peer
`aisimulate predict` is measured in the same run where its program is named (`--aisimulate`; it needs an environment of
its own: pip install --pre aisimulate); otherwise its line, like Vidur's, stands beside what was measured for this
project's reference on two cores of another machine, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pilotage.engine.serving import Served, serve
from pilotage.results import as_csv, provenance, write_whole
from pilotage.world.llm import LLMServer
from pilotage.world.servers import IterationLaw
from pilotage.world.tokens import Requests, read_requests

# Qwen3-32B-FP8 on H200, vLLM: fitted to aisimulate's estimates, which `predict` below uses, too
LAW = IterationLaw(base_s=0.014137, prefill_s=6.5767e-5, sequence_s=3.9444e-5, context_s=4.194e-8)
VIDUR_RPS, VIDUR_ITERATIONS_PER_S = 1000.0, 11_000.0
AISIMULATE_S = 1.7  # the fastest of those measured
CONFIG = """traffic:
  source: {type: synthetic, input_tokens: 1024, output_tokens: 128}
  load: {type: concurrency, concurrency: 32}
  stop: {requests: 20000}
engine:
  mode: aggregated
  model: Qwen/Qwen3-32B-FP8
  hardware: h200_sxm
  backend: vllm
  workers: {aggregated: {}}
execution:
  resources: {initialization_timeout_seconds: 600.0}
"""


def timed(run: Callable[[], Served], repetitions: int) -> tuple[float, float, Served]:
    """Median CPU and wall seconds of a run that is compiled already, and what came out."""
    found, cpu, wall = run(), [], []
    for _ in range(repetitions):
        began, began_wall = time.process_time(), time.perf_counter()
        found = run()
        cpu.append(time.process_time() - began)
        wall.append(time.perf_counter() - began_wall)
    return statistics.median(cpu), statistics.median(wall), found


def aisimulate_s(program: str) -> float | None:
    """The wall seconds that `aisimulate predict` itself reports."""
    with tempfile.TemporaryDirectory() as folder:
        config, out = Path(folder) / "p.yaml", Path(folder) / "out"
        config.write_text(CONFIG)
        try:
            subprocess.run(
                [program, "predict", "--config", str(config), "--output-dir", str(out), "--format", "json"],
                capture_output=True, text=True, timeout=900, check=True,
            )  # fmt: skip
            return float(json.loads((out / "resource-runtime.json").read_text())["wall_seconds"])
        except (OSError, subprocess.SubprocessError, KeyError, ValueError) as error:
            print(f"aisimulate: not measured ({error})", flush=True)
            return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PILOTAGE_DATA"))
    parser.add_argument("--out", type=Path, default=Path("results/llm_serving"))
    parser.add_argument("--seed", type=int, default=0, help="not needed: nothing here is drawn")
    parser.add_argument("--aisimulate", default="", help="the program `aisimulate`")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    repetitions = 3 if options.quick else 15
    started, began = datetime.now(UTC), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, lines = [], []

    def note(workload: str, seconds: float, found: Served, peer: str, theirs_rps: float, how: str) -> None:
        n = len(found.arrival_s)
        rows.append(
            {
                "workload": workload, "requests": n, "iterations": found.iterations, "seconds": f"{seconds:.5f}",
                "requests_per_s": f"{n / seconds:.0f}", "iterations_per_s": f"{found.iterations / seconds:.0f}",
                "peer": peer, "peer_requests_per_s": f"{theirs_rps:.0f}", "ratio": f"{n / seconds / theirs_rps:.0f}",
                "peer_was": how,
            }
        )  # fmt: skip
        print(rows[-1], flush=True)

    def line(what: str, asked: float, measured: float) -> None:
        lines.append(
            {"line": what, "asked": f">= {asked:g}", "measured": f"{measured:.4g}", "low": "", "high": "",
             "met": measured >= asked}
        )  # fmt: skip

    n = 20_000
    requests = Requests(np.zeros(n), np.full(n, 1024), np.full(n, 128))
    server = LLMServer(kv_blocks=40_000)
    seconds, wall_s, found = timed(lambda: serve(server, LAW, requests, concurrency=32), repetitions)
    theirs_s = aisimulate_s(options.aisimulate) if options.aisimulate else None
    how = "stated in the reference" if theirs_s is None else "measured in this run"
    theirs_s = AISIMULATE_S if theirs_s is None else theirs_s
    note("20,000 requests, 32 clients", seconds, found, "aisimulate predict", n / theirs_s, how)
    ours_s = seconds if how.startswith("stated") else wall_s
    line(f"times as fast as aisimulate predict ({theirs_s:.2f} s, {how})", 100, theirs_s / ours_s)
    if options.data is None:
        print("the Azure conversation trace is left out: give --data DIR or PILOTAGE_DATA", flush=True)
    else:
        trace = read_requests("arrivals/azure_llm_2023_conv.csv.gz", Path(options.data))
        for routing in ("round-robin", "least-outstanding", "kv-aware"):
            routed = server.replace(routing=routing)
            seconds, _, found = timed(lambda r=routed: serve(r, LAW, trace, replicas=8), repetitions)
            name = f"Azure conversation, 8 replicas, {routing}"
            note(name, seconds, found, "Vidur", VIDUR_RPS, "stated in the reference")
            line(f"{name}: requests/s over Vidur's {VIDUR_RPS:.0f}", 500, len(trace) / seconds / VIDUR_RPS)
            line(
                f"{name}: iterations/s over Vidur's {VIDUR_ITERATIONS_PER_S:.0f}", 500,
                found.iterations / seconds / VIDUR_ITERATIONS_PER_S,
            )  # fmt: skip
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(lines))
    record = provenance("llm_serving", sys.argv, started, {"all": round(time.perf_counter() - began, 1)})
    record |= {"load_average": os.getloadavg(), "repetitions": repetitions}
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
