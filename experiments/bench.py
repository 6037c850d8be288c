"""Speed, side by side with peers in one run: writes results/bench and prints what was asked beside what was measured.

Peers (SimPy, ciw) run in an environment of their own, `.peers`, and must agree with the engine in their latency
percentiles; where they cannot be installed, their lines are left out with a word. Times are CPU time of one core unless
they say otherwise; medians of repetitions, taken in turn.
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
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pilotage.control.guard import Guard
from pilotage.control.learned import policy_from
from pilotage.engine.cluster import Cluster, World, recorded
from pilotage.engine.randomness import from_table, uniform
from pilotage.engine.relaxation import demands_of
from pilotage.engine.run import simulate
from pilotage.metrics import quantiles_s
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Scenario, load
from pilotage.world.arrivals import Poisson
from pilotage.world.servers import Affine, Constant, log_normal_table

# ru_maxrss counts the parent, too, from which a process was forked
PEAK_MIB = """
def peak_mib():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
"""
PERCENTILES = (0.5, 0.9, 0.95, 0.99)
Row = dict[str, object]
Line = tuple[str, str, float, bool]


def row(benchmark: str, metric: str, ours: float, peer: str = "", theirs: float | None = None) -> Row:
    return {
        "benchmark": benchmark,
        "metric": metric,
        "ours": f"{ours:.6g}",
        "peer": peer,
        "theirs": "" if theirs is None else f"{theirs:.6g}",
        "ratio": "" if theirs is None else f"{ours / theirs:.4g}",
    }


def scenario_of(
    rate_rps: float, replicas: int, base_ms: float, per_item_ms: float, *, services: int = 1, **server
) -> Scenario:
    """The quickstart service, with its daily rhythm, unequal requests, noise, limits and impatient clients, at
    another rate and on other hardware, with as many replicas as it needs from the start."""
    shape = load("quickstart")
    one, pool = shape.services[0], shape.pools[0]
    variant = one.variants[0]
    law = variant.latency[pool.name].replace(base_ms=base_ms, per_item_ms=per_item_ms)
    one = one.replace(
        traffic=one.traffic.replace(rate_rps=rate_rps),
        server=one.server.replace(**server),
        variants=(variant.replace(latency={pool.name: law}),),
        initial_replicas=replicas,
        max_replicas=max(replicas, 2),
    )
    return shape.replace(
        pools=(pool.replace(max_nodes=services * max(replicas, 2)),),
        services=tuple(one.replace(name=f"service-{k}") for k in range(services)),
        history_h=0.0,
    )


def run_all(
    scenario: Scenario, worlds: Sequence[World] = (World(1),), threads: int = 1
) -> tuple[float, float, Cluster]:
    """Simulates all ticks without changes: CPU seconds, wall seconds (drawing of traffic included), the cluster."""
    cluster = Cluster(scenario, worlds, threads=threads)
    orders = cluster.no_orders()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(scenario.ticks):
        cluster.advance(orders)
    return time.process_time() - cpu, time.perf_counter() - wall, cluster


def rate_of(scenario: Scenario, rounds: int, worlds: Sequence[World] = (World(1),)) -> float:
    """Requests per CPU second, the median of `rounds`."""
    run_all(scenario.replace(horizon_h=scenario.tick_s / 3600), worlds)  # compiled and warm
    rates = []
    for _ in range(rounds):
        seconds, _, cluster = run_all(scenario, worlds)
        rates.append(float(cluster.totals["arrived"].sum()) / seconds)
    return statistics.median(rates)


# --- the engine, and peers -----------------------------------------------------------------------------------
def peer_python() -> Path | None:
    """The Python of the peers' environment, made if it is not there; None where that cannot be."""
    python = Path(".peers/bin/python")
    if not python.exists():
        print("installing the peers (SimPy, ciw) into .peers ...", flush=True)
        made = subprocess.run([sys.executable, "-m", "venv", ".peers"], capture_output=True)
        if made.returncode:
            return None
    wanted = [str(python), "-m", "pip", "install", "--quiet", "simpy==4.1.2", "ciw==3.2.7"]
    return python if subprocess.run(wanted, capture_output=True).returncode == 0 else None


def ask_peer(python: Path, name: str, model: dict) -> tuple[float, np.ndarray]:
    """Requests per CPU second of a peer, and its latencies in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.json")
        path.write_text(json.dumps(model))
        script = Path(__file__).with_name("bench_peers.py")
        done = subprocess.run([str(python), str(script), name, str(path)], check=True, capture_output=True)
    answer = json.loads(done.stdout)
    return len(model["arrival_s"]) / answer["seconds"], np.array(answer["latency_s"])


def model_of(cluster: Cluster) -> dict:
    """What a peer needs to know of a one-service world to serve the same requests."""
    service = cluster.scenario.services[0]
    law = service.variants[0].latency[service.pools[0]]
    arrival_s = cluster.arrivals(0, 0)
    seeds = {name: np.uint64(value) for name, value in cluster.seeds(0, 0).items()}
    demand = demands_of(service.demand.table(), seeds["seed_demand"], len(arrival_s))
    table = log_normal_table(law.noise_cv)
    noise = np.array([from_table(table, uniform(seeds["seed_noise"], k)) for k in range(len(arrival_s))])
    return {
        "replicas": service.initial_replicas,
        "arrival_s": arrival_s.tolist(),
        "demand": demand.tolist(),
        "noise": noise.tolist(),
        "service_s": ((law.base_ms + law.per_item_ms * demand) / 1e3 * noise).tolist(),
        "base_s": law.base_ms / 1e3,
        "per_item_s": law.per_item_ms / 1e3,
        "max_batch": service.server.max_batch,
        "batch_wait_s": service.server.batch_wait_ms / 1e3,
    }


def against(
    python: Path, peer: str, name: str, scenario: Scenario, asked: float, rounds: int
) -> tuple[list[Row], list[Line]]:
    """The engine beside a peer on the same requests, some 150,000 of them.

    Nobody leaves, because the peer's model has no impatience, and ticks are long, because nobody decides at them.
    Both are given arrivals drawn beforehand; the peer is given demands and noise, too, which the engine draws.
    """
    one = scenario.services[0]
    plain = one.server.replace(queue_limit=None, request_timeout_s=None, patience_s=None)
    scenario = scenario.replace(services=(one.replace(server=plain),))
    tick_s = 50.0
    ticks = round(150_000 / one.traffic.rate_rps / tick_s)
    scenario = scenario.replace(horizon_h=ticks * tick_s / 3600, tick_s=tick_s)
    ours, theirs, ratios = [], [], []
    worlds = recorded(scenario, [World(1)])
    cluster = run_all(scenario, worlds)[2]
    model = model_of(cluster)
    for _ in range(rounds):  # the engine before and after the peer: the machine is not always as fast
        before = rate_of(scenario, 5, worlds)
        rate, latencies = ask_peer(python, peer, model)
        ours.append((before + rate_of(scenario, 5, worlds)) / 2)
        theirs.append(rate)
        ratios.append(ours[-1] / rate)
    ratio = statistics.median(ratios)
    rows, worst = [row(name, "requests/s", statistics.median(ours), peer, statistics.median(theirs))], 0.0
    for p, quantile in zip(PERCENTILES, quantiles_s(cluster.histograms[0, 0], PERCENTILES), strict=True):
        other = float(np.percentile(latencies, 100 * p, method="inverted_cdf"))
        worst = max(worst, abs(float(quantile) / other - 1))
        rows.append(row(name, f"latency p{100 * p:g} (ms)", 1e3 * float(quantile), peer, 1e3 * other))
    return rows, [
        (f"{name}: {peer} on the same model, ratio", f">= {asked:g} x", ratio, ratio >= asked),
        (f"{name}: latency percentiles beside {peer}", "<= 0.02", worst, worst <= 0.02),
    ]


# --- scale ---------------------------------------------------------------------------------------------------
def fleet_run(days: float, rounds: int) -> tuple[list[Row], list[Line]]:
    """100 services at 1,000 requests/s together, on two threads, with the laws checked at every tick."""
    scenario = scenario_of(
        10.0, 1, 20.0, 5.0, services=100, request_timeout_s=None, patience_s=None, queue_limit=None
    )
    calm = scenario.services[0].traffic.replace(crowds=None, weekend_factor=1.0, day_amplitude=0.4)
    services = tuple(s.replace(traffic=calm) for s in scenario.services)
    scenario = scenario.replace(services=services, start_h=0.0, horizon_h=24 * days)
    code = (
        PEAK_MIB
        + """
import json, sys, time
import msgspec, numpy as np
from pilotage.engine.cluster import Cluster, World
from pilotage.scenario import Scenario
scenario = msgspec.json.decode(sys.stdin.buffer.read(), type=Scenario)
began = time.perf_counter()
cluster = Cluster(scenario, [World(1)], threads=2)
orders, price = cluster.no_orders(), scenario.pools[0].price_usd_per_hour / 3600
inside, broken = np.zeros(100, np.int64), 0
for _ in range(scenario.ticks):
    t = cluster.advance(orders)[0]
    gone = t["served"] + t["rejected"] + t["timed_out"] + t["abandoned"] + t["lost"]
    now = t["waiting"] + t["executing"]
    broken += int((inside + t["arrived"] != gone + now).any())  # conservation
    broken += int((t["busy_s"] > t["ready_s"] + 1e-6).any())  # capacity
    broken += int(not np.isclose(t["node_usd"].sum(), t["node_s"].sum() * price))  # money
    inside = now
wall = time.perf_counter() - began
print(json.dumps(dict(requests=int(cluster.totals["arrived"].sum()), wall=wall, broken=broken,
    little=float(np.abs(cluster.totals["inside_s"].sum() / cluster.totals["latency_s"].sum() - 1)),
    mib=peak_mib())))
"""
    )
    import msgspec

    runs = []
    for _ in range(rounds):
        done = subprocess.run(
            [sys.executable, "-c", code], input=msgspec.json.encode(scenario), capture_output=True, check=True
        )
        runs.append(json.loads(done.stdout))
    found = {**runs[0], "wall": statistics.median(run["wall"] for run in runs)}
    found["broken"] = sum(run["broken"] for run in runs)
    name = f"100 services x {days:g} days at 1,000 requests/s, 2 threads"
    rows = [
        row(name, "requests", found["requests"]),
        row(name, "wall time (s)", found["wall"]),
        row(name, "requests/s", found["requests"] / found["wall"]),
        row(name, "peak memory (MiB)", found["mib"]),
        row(name, "ticks at which a law was broken", found["broken"]),
        row(name, "Little's law, relative error", found["little"]),
    ]
    limit_s = 45.0 * days / 7
    return rows, [
        (f"{name}: wall time", f"<= {limit_s:.3g} s", found["wall"], found["wall"] <= limit_s),
        (f"{name}: memory", "<= 2048 MiB", found["mib"], found["mib"] <= 2048),
        (f"{name}: laws broken", "0", found["broken"], found["broken"] == 0),
    ]


def flatness(rounds: int) -> tuple[list[Row], list[Line]]:
    """CPU time per request from 1 to 1,000 services and replicas. Worlds fill up, so that every run has 1,000 replicas
    and the same traffic: what differs is only how they are organised."""

    def cost(services: int, replicas: int, routing: str, max_batch: int) -> float:
        scenario = scenario_of(
            10.0 * replicas,
            replicas,
            60.0,
            0.0,
            services=services,
            routing=routing,
            max_batch=max_batch,
            batch_wait_ms=0.0,
        )
        traffic = Poisson(rate_rps=10.0 * replicas)
        scenario = scenario.replace(
            services=tuple(s.replace(traffic=traffic) for s in scenario.services), horizon_h=0.1, start_h=0.0
        )
        worlds = [World(1 + k) for k in range(1000 // (services * replicas))]
        return 1e9 / rate_of(scenario, rounds, worlds)

    rows, lines = [], []
    for what, routing in (("services", "central"), ("replicas", "central"), ("replicas", "power-of-two")):
        name = f"1 to 1,000 {what}, {routing} routing"
        costs = []
        for n in (1, 10, 100, 1000):
            costs.append(cost(n, 1, routing, 1) if what == "services" else cost(1, n, routing, 1))
            rows.append(row(name, f"ns per request at {n}", costs[-1]))
        spread = max(costs) / costs[0] - 1
        lines.append((f"{name}: dearest over cheapest size of 1", "<= 0.2", spread, spread <= 0.2))
    return rows, lines


# --- environments, training, start-up ----------------------------------------------------------------------------
def env_steps(steps: int) -> float:
    """Control steps per CPU second of the vectorised environment, 256 worlds, at most 50 requests a step."""
    from pilotage.env import ServingVecEnv

    scenario = scenario_of(2.2, 1, 60.0, 30.0)
    env = ServingVecEnv(scenario.replace(history_h=1.0), 256)
    env.reset(seed=0)
    actions = np.zeros((256, env.single_action_space.shape[0]), np.float32)
    env.step(actions)
    began = time.process_time()
    for _ in range(steps):
        env.step(actions)
    return 256 * steps / (time.process_time() - began)


def training(steps: int) -> float:
    """PPO environment steps per wall second with 64 worlds, learning included, evaluation excluded."""
    from pilotage.agents.algorithms import Settings
    from pilotage.agents.train import train
    from pilotage.control.scaling import Predictive

    times: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(steps=steps, worlds=64, evaluations=1)
        train(
            load("quickstart"), Predictive(), [World(0)], [[World(1)]], settings, Path(folder),
            progress=lambda n, _: times.append((n, time.perf_counter())),
        )  # fmt: skip
    (first, began), (last, ended) = times[0], times[-1]
    return (last - first) / (ended - began)


def in_process(code: str, **environment: str) -> float:
    """The number that a fresh Python process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ | environment
    )
    return float(done.stdout)


BIG_RUN = (
    PEAK_MIB
    + """
from pilotage.engine.cluster import Cluster, World
from pilotage.scenario import load
s = load("quickstart").replace(horizon_h=1000.0)
c = Cluster(s, [World(1)]); o = c.no_orders()
while c.totals["arrived"].sum() < {requests}: c.advance(o)
print(peak_mib())
"""
)
START = """
import time; began = time.perf_counter()
import numba, numpy, msgspec, scipy
imported = time.perf_counter()
from pilotage.engine.cluster import Cluster, World
from pilotage.scenario import load
s = load("quickstart"); c = Cluster(s, [World(1)]); c.advance(c.no_orders())
print(time.perf_counter() - imported)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    parser.add_argument("--data", type=Path, help="not used: the benchmark needs no traces")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a minute: fewer rounds, shorter runs")
    options = parser.parse_args()
    started, began = datetime.now(UTC), time.perf_counter()
    rounds = 1 if options.quick else 5
    rows: list[Row] = []
    lines: list[Line] = []

    def take(found: tuple[list[Row], list[Line]]) -> None:
        rows.extend(found[0])
        lines.extend(found[1])
        for r in found[0]:
            beside = f"{r['peer']:5} {r['theirs']:>12}  {r['ratio']:>8}"
            print(f"{r['benchmark']:58} {r['metric']:32} {r['ours']:>12}  {beside}")
        sys.stdout.flush()

    accelerator = scenario_of(1000.0, 6, 20.0, 1.0, max_batch=32, batch_wait_ms=5.0).replace(horizon_h=1.0)
    processor = scenario_of(40.0, 5, 60.0, 30.0).replace(horizon_h=2.0)
    fast, small = rate_of(accelerator, rounds), rate_of(processor, rounds)
    many = rate_of(processor.replace(horizon_h=0.5), rounds, worlds=[World(1 + k) for k in range(64)])
    take((
        [
            row("accelerator service, 1,000 requests/s, batches of 6", "requests/s", fast),
            row("quickstart service, 40 requests/s, batches of 1.4", "requests/s", small),
            row("quickstart service, 64 worlds", "requests/s", many),
        ],
        [("engine, all features on, one core, moderate load", ">= 2.5e7 requests/s", fast, fast >= 2.5e7)],
    ))  # fmt: skip
    python = peer_python()
    if python is None:
        print("SimPy and ciw cannot be installed here: their lines are left out")
    else:
        single = accelerator.services[0].replace(
            demand=Constant(), server=accelerator.services[0].server.replace(max_batch=1, batch_wait_ms=0.0)
        )
        law = Affine(base_ms=4.0, per_item_ms=0.0, noise_cv=1.0)
        single = single.replace(variants=(single.variants[0].replace(latency={"cpu": law}),))
        queue = accelerator.replace(services=(single,))
        take(against(python, "simpy", "accelerator service", accelerator, 200.0, rounds))
        take(against(python, "simpy", "quickstart service", processor, 200.0, rounds))
        take(against(python, "ciw", "queue of six servers", queue, 500.0, rounds))
    take(fleet_run(0.5, 1) if options.quick else fleet_run(7.0, 3))
    take(flatness(1 if options.quick else 3))
    policy = policy_from("hpa")
    runs = [simulate(load("quickstart"), [policy], [World(k)], guard=Guard())[0] for k in range(3)]
    loop = statistics.median(float(r.totals["arrived"].sum()) / r.seconds for r in runs)
    steps = statistics.median(env_steps(100 if options.quick else 400) for _ in range(rounds))
    learned = training(40_000 if options.quick else 120_000)
    requests = 1e6 if options.quick else 1e7
    memory = in_process(BIG_RUN.replace("{requests}", f"{requests:.0f}"))
    start_s = statistics.median(in_process(START) for _ in range(3))
    take((
        [
            row("engine with hpa and guard in the loop", "requests/s", loop),
            row("environment, 256 worlds, 36 requests a step", "control steps/s", steps),
            row("PPO training, 64 worlds", "env steps/s", learned),
            row(f"run of {requests:.0e} requests", "peak memory (MiB)", memory),
            row("second start of a process, beyond importing numba and SciPy", "seconds", start_s),
        ],
        [
            ("environment, at most 50 requests a step, one core", ">= 100000 steps/s", steps, steps >= 1e5),
            ("PPO training, 64 worlds", ">= 5000 env steps/s", learned, learned >= 5000),
            (f"peak memory of {requests:.0e} requests", "<= 1024 MiB", memory, memory <= 1024),
            ("second start of a process", "<= 1 s", start_s, start_s <= 1.0),
        ],
    ))  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(
        options.out / "acceptance.csv",
        as_csv(
            [
                {
                    "line": line,
                    "asked": asked,
                    "measured": f"{value:.6g}",
                    "low": "",
                    "high": "",
                    "met": bool(met),
                }
                for line, asked, value, met in lines
            ]
        ),
    )
    facts = provenance("bench", sys.argv, started, {"bench": round(time.perf_counter() - began, 1)})
    facts |= {"command": "make bench", "seeds": [options.seed]}
    write_whole(options.out / "run.json", json.dumps(facts, indent=2) + "\n")
    for line, asked, value, met in lines:
        print(f"{'met    ' if met else 'NOT MET'} {line}: {value:.4g} (asked {asked})")


if __name__ == "__main__":
    main()
