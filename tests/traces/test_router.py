"""Ray Serve's router in the engine against the plain-Python one, event by event, and its collapse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.engine.cluster import Cluster, World
from pilotage.world.pools import Pool
from pilotage.world.servers import Affine, BatchServer, Router
from pilotage.world.spec import SpecError
from tests.strategies import Times, one_of, routers, scenario, service
from tests.traces.reference_router import Simulation


def routed(arrivals_s, law, server, replicas=(1,), ticks=8, **options) -> tuple[Cluster, np.ndarray]:
    """A cluster with one routed service, and the orders that start `replicas[t]` replicas at tick t."""
    deployed = service(law=law, server=server, initial_replicas=replicas[0], max_replicas=sum(replicas))
    pool = Pool(name="cpu", price_usd_per_hour=1.0, boot_s=0.0, max_nodes=sum(replicas))
    world = World(1, traffic=(Times(arrivals_s),))
    cluster = Cluster(scenario([deployed], [pool], ticks=ticks), [world], **options)
    orders = np.repeat(cluster.no_orders()[None], ticks, axis=0)
    orders["order"][1 : len(replicas), 0, 0] = replicas[1:]
    return cluster, orders


def numbers(cluster: Cluster, which: int) -> list[int]:
    """The requests in a line of messages."""
    line, row = cluster.routers[0]["lines"][which], cluster.rows[0]
    i, found = line["head"], []
    for _ in range(line["count"]):
        found.append(int(row["first_number"] + i))
        i = cluster.messages[row["storage_lo"] + i]["next"]
    return found


@settings(max_examples=300, deadline=None)
@given(
    router=routers(),
    gaps_ms=st.lists(st.integers(1, 120_000).map(lambda n: n / 1e3 + 1e-7), max_size=120),
    replicas=st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(lambda n: sum(n) > 0),
    per_item_ms=one_of(20.0, 110.0, 300.0),
    max_batch=st.integers(1, 4),
    wait_ms=one_of(0.0, 30.0, 700.0),
    read_ahead_s=one_of(0.0, 600.0),
)
def test_router_equals_reference(
    router, gaps_ms, replicas, per_item_ms, max_batch, wait_ms, read_ahead_s
) -> None:
    times = np.cumsum(gaps_ms) / 1e3
    law = Affine(base_ms=50.0, per_item_ms=per_item_ms)
    server = BatchServer(
        former="closed", routing="ray-serve", router=router, max_batch=max_batch, batch_wait_ms=wait_ms
    )
    cluster, orders = routed(times, law, server, replicas, read_ahead_s=read_ahead_s)
    simulation = Simulation(
        router,
        times.tolist(),
        [float(t) for t, n in enumerate(replicas) for _ in range(n)],
        max_batch,
        wait_ms / 1e3,
        lambda n: 0.05 + n * (per_item_ms / 1e3),
        cluster.seeds(0, 0)["seed_route"],
    )
    for t, order in enumerate(orders):
        tick = cluster.advance(order)[0, 0]
        end_s = t + 1.0
        simulation.run_until(end_s)
        assert numbers(cluster, 0) == [i for _, i, _ in simulation.sends]
        assert numbers(cluster, 1) == [i for _, i, _ in simulation.hits]
        assert cluster.routers[0]["draws"] == simulation.draws
        assert cluster.routers[0]["tasks"] == len(simulation.tasks)
        done = [(times[i], at) for i, at in simulation.done_s.items() if end_s - 1 <= at < end_s]
        batches = [b for r in simulation.replicas for b in r.batches]
        executing = sum(n for start, end, n in batches if start < end_s <= end)
        arrived = int((times < end_s).sum())
        served = sum(at < end_s for at in simulation.done_s.values())
        assert tick["served"] == len(done)
        assert tick["executing"] == executing
        assert tick["waiting"] == arrived - served - executing
        assert tick["batched"] == sum(n for start, _, n in batches if end_s - 1 <= start < end_s)
        assert tick["latency_s"] == pytest.approx(sum(at - came for came, at in done), abs=1e-9)
        assert cluster.replicas["cached"][: len(simulation.replicas)].tolist() == [
            r.cached for r in simulation.replicas
        ]


def served_per_s(router: Router, rate_rps: float, routing: str = "ray-serve") -> np.ndarray:
    """One replica that takes 100 ms a request, for five minutes; requests served in each second of the last four."""
    rng = np.random.default_rng(5)
    times = np.cumsum(rng.exponential(1 / rate_rps, int(rate_rps * 330)))
    server = BatchServer(former="closed", routing=routing, router=router if routing == "ray-serve" else None)
    cluster, orders = routed(times, Affine(base_ms=0.0, per_item_ms=100.0), server, ticks=300)
    return np.array([cluster.advance(order)["served"][0, 0] for order in orders])[60:]


def test_overloaded_router_collapses() -> None:
    """Two tasks, each of which serves one request per half second: 4 requests/s, where a replica could do 10."""
    router = Router(max_ongoing_requests=8)
    assert np.median(served_per_s(router, 20.0)) == 4
    assert served_per_s(router, 20.0, "power-of-two").mean() == pytest.approx(10.0, abs=0.1)
    assert np.median(served_per_s(Router(max_ongoing_requests=8, max_backoff_ms=100.0), 20.0)) > 8


def test_room_for_all_is_power_of_two() -> None:
    """While no replica is full, the router is power of two choices, to the last digit."""
    times = np.cumsum(np.random.default_rng(3).exponential(0.02, 400))
    law, counters = Affine(base_ms=10.0, per_item_ms=50.0), []
    for routing, router in (("ray-serve", Router(max_ongoing_requests=1000)), ("power-of-two", None)):
        server = BatchServer(former="closed", routing=routing, router=router, max_batch=4, batch_wait_ms=30.0)
        cluster, orders = routed(times, law, server, (4,))
        counters.append(np.concatenate([cluster.advance(order).copy() for order in orders]))
    np.testing.assert_array_equal(*counters)


def test_router_belongs_to_ray_serve() -> None:
    with pytest.raises(SpecError, match="router is given, but routing is 'central'"):
        BatchServer(router=Router())


def test_overhead_is_added_to_the_latency() -> None:
    """Measured quantiles 10, 30, 40 ms: their mean, on top of the service time, and nothing queues for longer."""
    law = Affine(base_ms=0.0, per_item_ms=20.0)
    times = np.arange(700) / 100 + 0.001
    cluster, orders = routed(times, law, BatchServer(overhead_quantiles_ms=(10.0, 30.0, 40.0)), (4,))
    for order in orders:
        cluster.advance(order)
    total = cluster.totals[0, 0]
    assert total["served"] == 700
    # uniform on 10 to 30 and on 30 to 40 with the same weight: standard deviation 8.5 ms; 4 standard errors
    assert total["latency_s"] / 700 == pytest.approx(0.020 + 0.0275, abs=4 * 0.0085 / 700**0.5)
    assert total["busy_s"] == pytest.approx(700 * 0.020)
