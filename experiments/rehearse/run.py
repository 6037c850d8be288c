"""How long does `pilotage rehearse` take on a week of 50 services?

A fleet is drawn at random and its week is simulated as a Prometheus would have seen it every minute; promtool writes
that into a real one. The recording is kept in `work/`, and taken from there if it is of the same fleet (`run.json` says
when and from which commit it was made). Then the command itself is run on it, from its start to its answer: it reads
the history, fits, replays what was recorded, and runs two policies on five draws of the fit. Judged are its seconds by
the clock, and, since other work on the machine stretches those, its processor seconds on all cores (of the command and
its workers, not of Prometheus, whose own stand in `table.csv`). How long it takes depends on the requests there were,
so that the load is part of the line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.prometheus import blocks_of, missing, serving
from pilotage.control.hpa import Hpa
from pilotage.engine.cluster import World
from pilotage.recording import open_metrics
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Scenario
from pilotage.world.arrivals import Diurnal
from pilotage.world.pools import Pool
from pilotage.world.servers import Affine, BatchServer, Variant
from pilotage.world.services import Service

STEP_S = 60.0
POOL = Pool(name="cpu", price_usd_per_hour=0.34, max_nodes=30)
EDGES_S = tuple(float(f"{0.005 * 1.5**k:.4g}") for k in range(20))  # 5 ms to 11 s
POLICIES = ("hpa", "predictive")
BEGAN_S = (
    1000 * 486 * 3600.0
)  # 11 June 2025; promtool's blocks of 486 h begin there, so that a week is in one
TOGETHER = 8  # services that are simulated at once


def drawn(k: int, seed: int, lowest_rps: float, highest_rps: float) -> Service:
    """A service at random: a rate between two bounds (log-uniform) with a daily rhythm, and a model so slow that one to
    three replicas are needed for it."""
    rng = np.random.default_rng([seed, k])
    law = Affine(
        base_ms=float(rng.uniform(200, 800)),
        per_item_ms=float(rng.uniform(100, 400)),
        noise_cv=float(rng.uniform(0.05, 0.3)),
    )
    rate = float(np.exp(rng.uniform(np.log(lowest_rps), np.log(highest_rps))))
    return Service(
        name=f"service-{k}",
        slo_ms=3000.0,
        pools=("cpu",),
        traffic=Diurnal(rate_rps=rate, day_amplitude=0.6, peak_hour=14.0, noise_cv=0.2),
        server=BatchServer(
            max_batch=int(rng.choice([4, 8, 16])), batch_wait_ms=float(rng.choice([0.0, 5.0]))
        ),
        variants=(Variant(name="v", load_s=float(rng.uniform(20, 90)), load_cv=0.1, latency={"cpu": law}),),
        initial_replicas=2,
        max_replicas=20,
    )


def simulated(services: list[Service], seed: int, hours: float, written: Path) -> None:
    """Writes what a Prometheus would have seen of some services, without the end mark."""
    pool = POOL.replace(max_nodes=POOL.max_nodes * len(services))
    scenario = Scenario(title="real", pools=(pool,), services=tuple(services), tick_s=STEP_S, horizon_h=hours)
    policies = [Hpa(target_utilization=0.6)] * len(services)
    text = open_metrics(scenario, policies, World(seed), began_s=BEGAN_S, edges_s=EDGES_S)
    written.write_text(text.removesuffix("# EOF\n"))


def record(services: list[Service], seed: int, hours: float, jobs: int, home: Path) -> None:
    """Writes the simulated history of all services into one block of a Prometheus, below `home`.

    Blocks of single services would overlap, and Prometheus would begin to merge them while it is asked.
    """
    began = time.perf_counter()
    lots = [services[k : k + TOGETHER] for k in range(0, len(services), TOGETHER)]
    with tempfile.TemporaryDirectory(dir=home) as folder, ProcessPoolExecutor(jobs) as pool:
        parts = [Path(folder) / f"{k}.om" for k in range(len(lots))]
        seeds = [1000 * seed + k for k in range(len(lots))]
        for k, _ in enumerate(pool.map(simulated, lots, seeds, [hours] * len(lots), parts)):
            print(
                f"{k + 1} of {len(lots)} parts simulated after {time.perf_counter() - began:.0f} s",
                flush=True,
            )
        whole = Path(folder) / "whole.om"
        with whole.open("wb") as out:
            for part in parts:
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, out, 1 << 20)
                part.unlink()
            out.write(b"# EOF\n")
        blocks_of(whole, home, "--max-block-duration=512h")
    print(f"in a Prometheus's block after {time.perf_counter() - began:.0f} s", flush=True)


def cpu_s(url: str) -> float:
    """Processor seconds of a Prometheus so far, as it counts them itself."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as said:
        lines = said.read().decode().splitlines()
    return next(float(one.split()[1]) for one in lines if one.startswith("process_cpu_seconds_total "))


def fleet_file(services: list[Service], url: str, began_s: float, hours: float) -> str:
    start, end = (np.datetime64(int(t), "s").astype(str) for t in (began_s, began_s + 3600 * hours))
    lines = [
        f"policies = {json.dumps(POLICIES)}",
        f"[prometheus]\nurl = '{url}'\nstart = '{start}'\nend = '{end}'\nstep_s = {STEP_S}",
        f"[[pools]]\nname = 'cpu'\nprice_usd_per_hour = {POOL.price_usd_per_hour}\n"
        f"max_nodes = {POOL.max_nodes * len(services)}",
    ]
    for one in services:
        lines.append(
            f"[[services]]\nname = '{one.name}'\nslo_ms = {one.slo_ms}\npool = 'cpu'\n"
            f"max_replicas = {one.max_replicas}\n"
            f"server = {{max_batch = {one.server.max_batch}, batch_wait_ms = {one.server.batch_wait_ms}}}\n"
            "economics = {late_usd = 0.001, dropped_usd = 0.001}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--out", type=Path, default=Path("results/rehearse"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--services", type=int, default=50)
    parser.add_argument("--hours", type=float, default=168.0)
    parser.add_argument("--rates", type=float, nargs=2, default=(0.05, 2.0), help="requests/s of a service")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that make the recordings")
    parser.add_argument("--quick", action="store_true", help="four hours of five services")
    parser.add_argument(
        "--record", action="store_true", help="make the recording, and leave the rehearsal to another run"
    )
    options = parser.parse_args()
    count, hours = (5, 4.0) if options.quick else (options.services, options.hours)
    if why := missing():
        raise SystemExit(f"error: {why}")
    started, lasted = datetime.now(UTC), {}
    services = [drawn(k, options.seed, *options.rates) for k in range(count)]
    low, high = options.rates
    fleet = {"services": count, "hours": hours, "low_rps": low, "high_rps": high, "seed": options.seed}
    kept = options.out / "work" / "-".join(str(part) for part in fleet.values())
    if not (kept / "recorded.json").is_file():  # written last
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        began = time.perf_counter()
        record(services, options.seed, hours, options.jobs, kept)
        lasted["simulate recordings"] = round(time.perf_counter() - began, 1)
        made = fleet | provenance("rehearse", sys.argv, started, dict(lasted))
        write_whole(kept / "recorded.json", json.dumps(made, indent=1) + "\n")
    recorded = json.loads((kept / "recorded.json").read_text())
    print(f"recording of {recorded['started_at']}, commit {recorded['commit']}, in {kept}", flush=True)
    if options.record:
        return
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with serving(kept) as url:
            (home / "fleet.toml").write_text(fleet_file(services, url, BEGAN_S, hours))
            command = [
                sys.executable, "-m", "pilotage", "rehearse", str(home / "fleet.toml"), "--anyway", "--json",
                "--out", str(home / "out"),
            ]  # fmt: skip
            server_before_s = cpu_s(url)
            before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            took_s = time.perf_counter() - began
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            server_cpu_s = cpu_s(url) - server_before_s
    lasted["rehearse"] = round(took_s, 1)
    took_cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    answer = json.loads(done.stdout)
    policies, fits = answer["policies"], answer["services"]
    week = {
        "services": count, "hours": hours, "requests": int(policies[0]["requests"] / 5),
        "good_fits": sum(one["good"] for one in fits), "seconds": f"{took_s:.1f}", "cpu_seconds": f"{took_cpu_s:.1f}",
        "prometheus_cpu_seconds": f"{server_cpu_s:.1f}", "load_average": f"{os.getloadavg()[0]:.1f}",
    }  # fmt: skip
    rows = [
        week | {"policy": row["policy"], **{f"usd_{k}": f"{v:.6g}" for k, v in row["total_usd"].items()}}
        for row in policies
    ]
    what = (
        f"a rehearsal of {hours:g} h of {count} services, {week['requests'] / 1e6:.3g} million requests in all, two "
        f"policies and the history's reading included, on {os.cpu_count()} cores"
    )
    whole = count >= 50 and hours >= 168
    acceptance = [
        {"line": f"{kind} of {what}", "asked": f"{asked} for a week of 50 services", "measured": f"{took:.4g}",
         "low": "", "high": "", "met": bool(whole and took <= most)}
        for kind, asked, took, most in (
            ("seconds", "<= 120", took_s, 120), ("processor seconds", "<= 240 (120 s on 2 cores)", took_cpu_s, 240),
        )
    ]  # fmt: skip
    for row in acceptance:
        print(row)
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    record_ = provenance("rehearse", sys.argv, started, lasted)
    record_ |= {
        "recording": recorded,
        "seed": options.seed,
        "quick": options.quick,
        "load_average": os.getloadavg(),
    }
    write_whole(options.out / "run.json", json.dumps(record_, indent=1) + "\n")


if __name__ == "__main__":
    main()
