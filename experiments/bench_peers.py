"""Peers of the benchmark, each run by a Python of its own: `bench_peers.py simpy|ciw INPUT.json`.

The input holds arrival times and what every request needs; the output (one JSON object on stdout) is the CPU time of
the simulation in seconds and the latencies. Written the way their documentation suggests, without tricks.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from pathlib import Path


def simpy_batches(model: dict) -> tuple[float, list[float]]:
    """A central queue with late-binding batches: a free server takes what waits when enough or for long enough."""
    import simpy

    env = simpy.Environment()
    queue: deque = deque()
    idle: deque = deque()
    latencies: list[float] = []
    woken = {k: env.event() for k in range(model["replicas"])}
    demand, noise, most, wait_s = model["demand"], model["noise"], model["max_batch"], model["batch_wait_s"]

    def due(now):
        return queue and (len(queue) >= most or queue[0][0] + wait_s <= now + 1e-12)

    def wake():
        if idle and due(env.now):
            woken[idle.popleft()].succeed()

    def timer(at):
        yield env.timeout(max(0.0, at - env.now))
        wake()

    def source():
        for number, at in enumerate(model["arrival_s"]):
            yield env.timeout(at - env.now)
            queue.append((at, number))
            wake()
            if idle and len(queue) == 1:
                env.process(timer(at + wait_s))

    def server(k):
        while True:
            if not due(env.now):
                idle.append(k)
                if queue:
                    env.process(timer(queue[0][0] + wait_s))
                yield woken[k]
                woken[k] = env.event()
            batch = [queue.popleft() for _ in range(min(most, len(queue)))]
            if not batch:
                continue
            x = sum(demand[number] for _, number in batch)
            yield env.timeout((model["base_s"] + model["per_item_s"] * x) * noise[batch[0][1]])
            latencies.extend(env.now - at for at, _ in batch)

    for k in range(model["replicas"]):
        env.process(server(k))
    env.process(source())
    began = time.process_time()
    env.run()
    return time.process_time() - began, latencies


def ciw_queue(model: dict) -> tuple[float, list[float]]:
    """A queue with several servers that take one request each."""
    import ciw

    arrivals, services = model["arrival_s"], model["service_s"]
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals, strict=False)]
    network = ciw.create_network(
        arrival_distributions=[ciw.dists.Sequential([*gaps, 1e9])],
        service_distributions=[ciw.dists.Sequential(services)],
        number_of_servers=[model["replicas"]],
    )
    simulation = ciw.Simulation(network)
    began = time.process_time()
    simulation.simulate_until_max_customers(len(arrivals), method="Finish")
    seconds = time.process_time() - began
    return seconds, [r.exit_date - r.arrival_date for r in simulation.get_all_records()]


if __name__ == "__main__":
    seconds, latencies = {"simpy": simpy_batches, "ciw": ciw_queue}[sys.argv[1]](
        json.loads(Path(sys.argv[2]).read_text())
    )
    print(json.dumps({"seconds": seconds, "latency_s": latencies}))
