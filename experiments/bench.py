"""Speed, side by side with peers in one run: writes results/bench/table.csv and a table to the terminal.

The engine and a plain SimPy model simulate the same arrivals of the quickstart service with the same rules and
must agree in p50, p95 and p99 within 2 %. Medians over repetitions, taken in turn.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pilotage.control.guard import Guard
from pilotage.control.learned import policy_from
from pilotage.engine.cluster import Cluster, World
from pilotage.engine.run import simulate
from pilotage.metrics import quantiles_s
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import load


def engine_run(scenario, seed=1):
    """Requests per second of process time, with the initial replicas, and the latency histogram."""
    cluster = Cluster(scenario, [World(seed)])
    orders = cluster.no_orders()
    began = time.process_time()
    for _ in range(scenario.ticks):
        cluster.advance(orders)
    seconds = time.process_time() - began
    return float(cluster.totals["arrived"].sum()) / seconds, cluster.histograms[0, 0].copy()


def simpy_run(arrivals, demand, replicas, base_s, per_item_s, noise, max_batch, wait_s):
    """The same service in plain SimPy: a central queue, late-binding batches; returns rate and latencies."""
    import simpy

    env = simpy.Environment()
    queue: deque = deque()
    idle: deque = deque()
    latencies = []
    woken = {k: env.event() for k in range(replicas)}

    def due(now):
        return queue and (len(queue) >= max_batch or queue[0][0] + wait_s <= now + 1e-12)

    def wake():
        if idle and due(env.now):
            woken[idle.popleft()].succeed()

    def timer(at):
        yield env.timeout(max(0.0, at - env.now))
        wake()

    def source():
        for number, at in enumerate(arrivals):
            yield env.timeout(at - env.now)
            queue.append((at, number))
            wake()
            if idle and not due(env.now):
                env.process(timer(at + wait_s))

    def server(k):
        while True:
            if not due(env.now):
                idle.append(k)
                if queue:
                    env.process(timer(queue[0][0] + wait_s))
                yield woken[k]
                woken[k] = env.event()
            batch = [queue.popleft() for _ in range(min(max_batch, len(queue)))]
            if not batch:
                continue
            x = sum(demand[number] for _, number in batch)
            yield env.timeout((base_s + per_item_s * x) * noise[batch[0][1]])
            latencies.extend(env.now - at for at, _ in batch)

    for k in range(replicas):
        env.process(server(k))
    env.process(source())
    began = time.process_time()
    env.run()
    return len(arrivals) / (time.process_time() - began), np.array(latencies)


def against_simpy(scenario, rounds):
    """Rows for the engine beside SimPy, on the same arrivals, demands and noise."""
    from pilotage.engine.kernel import from_table, uniform
    from pilotage.engine.relaxation import demands_of
    from pilotage.world.servers import log_normal_table

    service = scenario.services[0]
    server, law = service.server, service.variants[0].latency[service.pools[0]]
    plain = scenario.replace(
        services=(
            service.replace(
                server=server.replace(queue_limit=None, request_timeout_s=None, patience_s=None),
                initial_replicas=8,
            ),
        )
    )
    cluster = Cluster(plain, [World(1)])
    arrivals = cluster.arrivals(0, 0)
    seeds = {name: np.uint64(value) for name, value in cluster.seeds(0, 0).items()}
    demand = demands_of(service.demand.table(), seeds["seed_demand"], len(arrivals)).tolist()
    table = log_normal_table(law.noise_cv)
    noise = [from_table(table, uniform(seeds["seed_noise"], k)) for k in range(len(arrivals))]
    engine_run(plain)  # compile
    ours, theirs = [], []
    for _ in range(rounds):
        rate, histogram = engine_run(plain)
        ours.append(rate)
        rate, latencies = simpy_run(
            arrivals.tolist(), demand, 8, law.base_ms / 1e3, law.per_item_ms / 1e3, noise, server.max_batch,
            server.batch_wait_ms / 1e3,
        )  # fmt: skip
        theirs.append(rate)
    rows = [
        row(
            "engine on the quickstart service",
            "requests/s",
            statistics.median(ours),
            "SimPy",
            statistics.median(theirs),
        )
    ]
    mine = quantiles_s(histogram, (0.5, 0.95, 0.99))
    for name, a, p in zip(("p50", "p95", "p99"), mine, (50, 95, 99), strict=True):
        peer = float(np.percentile(latencies, p, method="inverted_cdf"))
        rows.append(
            row(
                "engine on the quickstart service",
                f"latency {name} (ms)",
                1e3 * float(a),
                "SimPy",
                1e3 * peer,
            )
        )
    return rows


def row(benchmark, metric, ours, peer="", theirs=None):
    return {
        "benchmark": benchmark,
        "metric": metric,
        "ours": f"{ours:.6g}",
        "peer": peer,
        "theirs": "" if theirs is None else f"{theirs:.6g}",
        "ratio": "" if theirs is None else f"{ours / theirs:.4g}",
    }


def training(steps):
    """PPO environment steps per second with 64 worlds, learning included, evaluation excluded."""
    from pilotage.agents.train import Settings, train
    from pilotage.control.scaling import Predictive

    times = []
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(steps=steps, worlds=64, evaluations=1)
        train(
            load("quickstart"), Predictive(), [World(0)], [[World(1)]], settings, Path(folder),
            progress=lambda n, _: times.append((n, time.perf_counter())),
        )  # fmt: skip
    (first, began), (last, ended) = times[0], times[-1]
    return (last - first) / (ended - began)


def big_run(requests):
    """Peak memory (MiB) of a process that simulates `requests` requests of the quickstart service."""
    code = f"""
import resource, numpy as np
from pilotage.engine.cluster import Cluster, World
from pilotage.scenario import load
s = load("quickstart").replace(horizon_h=1000.0)
c = Cluster(s, [World(1)]); o = c.no_orders()
while c.totals["arrived"].sum() < {requests}: c.advance(o)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    return float(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--data", type=Path, help="not used: the benchmark needs no traces")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    started, began = datetime.now(UTC), time.perf_counter()
    scenario = load("quickstart")
    short = scenario.replace(horizon_h=0.5 if options.quick else 2.0)
    service = scenario.services[0]
    enough = scenario.replace(
        services=(service.replace(initial_replicas=5),)
    )  # as many as HPA runs on average

    rows = against_simpy(short, 1 if options.quick else 3)
    engine_run(enough)
    rates = [engine_run(enough, options.seed + k)[0] for k in range(5)]
    rows.append(row("engine, all features on, one core", "requests/s", statistics.median(rates)))
    policy = policy_from("hpa")
    runs = [simulate(scenario, [policy], [World(k)], guard=Guard())[0] for k in range(3)]
    loop = statistics.median(float(r.totals["arrived"].sum()) / r.seconds for r in runs)
    rows.append(row("engine with hpa and guard in the loop", "requests/s", loop))
    rows.append(row("PPO training, 64 worlds", "env steps/s", training(40_000 if options.quick else 120_000)))
    rows.append(row("run of 10 M requests", "peak memory (MiB)", big_run(1e6 if options.quick else 1e7)))

    def measured(benchmark, metric, field="ours"):
        return next(float(r[field]) for r in rows if (r["benchmark"], r["metric"]) == (benchmark, metric))

    quickstart = "engine on the quickstart service"
    errors = [abs(measured(quickstart, f"latency {p} (ms)", "ratio") - 1) for p in ("p50", "p95", "p99")]
    asked = [
        (
            "engine, all features on, one core",
            ">= 5e6 requests/s",
            statistics.median(rates),
            statistics.median(rates) >= 5e6,
        ),
        (
            "engine beside SimPy",
            ">= 50",
            measured(quickstart, "requests/s", "ratio"),
            measured(quickstart, "requests/s", "ratio") >= 50,
        ),
        ("latency percentiles beside SimPy", "<= 0.02", max(errors), max(errors) <= 0.02),
        (
            "PPO training, 64 worlds",
            ">= 5000 env steps/s",
            float(rows[-2]["ours"]),
            float(rows[-2]["ours"]) >= 5000,
        ),
        (
            "peak memory of 10 M requests",
            "<= 1024 MiB",
            float(rows[-1]["ours"]),
            float(rows[-1]["ours"]) <= 1024,
        ),
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "table.csv", as_csv(rows))
    acceptance = [
        {"line": line, "asked": wanted, "measured": f"{value:.6g}", "low": "", "high": "", "met": bool(met)}
        for line, wanted, value, met in asked
    ]
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    facts = provenance("bench", sys.argv, started, {"bench": round(time.perf_counter() - began, 1)})
    facts |= {
        "command": "make bench",
        "seeds": [options.seed],
        "peak_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    write_whole(options.out / "run.json", json.dumps(facts, indent=2) + "\n")
    for r in rows:
        print(
            f"{r['benchmark']:40} {r['metric']:20} {r['ours']:>12}  {r['peer']:6} {r['theirs']:>12}  {r['ratio']:>8}"
        )
    for r in acceptance:
        print(f"{'met    ' if r['met'] else 'NOT MET'} {r['line']}: {r['measured']} (asked {r['asked']})")


if __name__ == "__main__":
    main()
