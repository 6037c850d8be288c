"""Runs small enough to be worked out by hand: the comment is the calculation, the assertion is its result.

Times are multiples of 1/16 s, which is also the tick (unless a test is about ticks), so that a counter that
moves during the tick from t moved exactly at t.
"""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.engine.cluster import Cluster, World
from pilotage.engine.layout import ANY_POOL, ORDER, SAME_WAIT
from pilotage.world.pools import Pool
from pilotage.world.servers import Affine, BatchServer
from tests.strategies import Case, Times, scenario, service

TICK_S = 1 / 16
CPU = Pool(name="cpu", price_usd_per_hour=3600.0)  # one dollar a second
EVENTS = ("arrived", "batches", "batched", "served", "late", "rejected", "timed_out", "abandoned")


class Run:
    """One world, ticked to its end. `orders` maps (time, service) to fields of an order."""

    def __init__(self, services, times, seconds, pools=(CPU,), orders=None, tick_s=TICK_S) -> None:
        ticks = round(seconds / tick_s)
        self.tick_s = tick_s
        self.orders = np.zeros((ticks, 1, len(services)), ORDER)
        self.orders["pool"], self.orders["batch_wait_s"] = ANY_POOL, SAME_WAIT
        for (at, s), fields in (orders or {}).items():
            for field, value in fields.items():
                self.orders[field][round(at / tick_s), 0, s] = value
        case = Case(scenario(services, pools, tick_s, ticks), [times], self.orders, [1])
        self.cluster = case.cluster()
        self.ticks = np.stack([self.cluster.advance(orders)[0].copy() for orders in self.orders])
        self.cluster.finish()
        self.totals = self.cluster.totals[0]

    def log(self, s: int = 0, *names: str) -> dict[str, dict[float, int]]:
        """When each counter moved, and by how much."""
        moved = {name: np.flatnonzero(self.ticks[name][:, s]) for name in names or EVENTS}
        return {
            name: {k * self.tick_s: int(self.ticks[name][k, s]) for k in at}
            for name, at in moved.items()
            if len(at)
        }

    def course(self, name: str, s: int = 0) -> dict[float, int]:
        """A state over time: its value at the end of the ticks at which it changed."""
        values = self.ticks[name][:, s].tolist()
        return {k * self.tick_s: value for k, value in enumerate(values) if k == 0 or value != values[k - 1]}


def batches(base_ms, per_item_ms, **server):
    """A service with a batching server and a noiseless affine law."""
    law = Affine(base_ms=base_ms, per_item_ms=per_item_ms)
    fields = {
        k: server.pop(k)
        for k in list(server)
        if k in ("name", "pools", "initial_replicas", "slo_ms", "load_s")
    }
    return service(law=law, server=BatchServer(**server), **fields)


def test_late_binding_waits_for_the_oldest_or_a_full_batch() -> None:
    # Batch time is 125 ms + 62.5 ms per request; due at 3 requests or after 250 ms.
    # 0 and 1/8 wait until 0 + 1/4 = 1/4, run 1/4 s together, end at 1/2: latencies 1/2 and 3/8.
    # 1, 1 1/16, 1 1/8 are three at 1 1/8, run 5/16 s, end at 1 7/16: latencies 7/16, 6/16, 5/16.
    # Objective 3/8 s: late are the 1/2 and the 7/16, not the two that need exactly 3/8.
    one = batches(125.0, 62.5, max_batch=3, batch_wait_ms=250.0, slo_ms=375.0)
    run = Run([one], [[0, 1 / 8, 1, 17 / 16, 9 / 8]], 2)
    assert run.log() == {
        "arrived": {0: 1, 1 / 8: 1, 1: 1, 17 / 16: 1, 9 / 8: 1},
        "batches": {1 / 4: 1, 9 / 8: 1},
        "batched": {1 / 4: 2, 9 / 8: 3},
        "served": {1 / 2: 2, 23 / 16: 3},
        "late": {1 / 2: 1, 23 / 16: 1},
    }
    assert run.totals["latency_s"][0] == 7 / 8 + 18 / 16
    assert run.totals["inside_s"][0] == 7 / 8 + 18 / 16
    assert run.totals["busy_s"][0] == 1 / 4 + 5 / 16
    assert run.totals["ready_s"][0] == 2


@pytest.mark.parametrize("former", ["closed", "late-binding"])
def test_closed_batches_are_never_topped_up(former: str) -> None:
    # Any batch takes 500 ms; it closes 125 ms after its first request or at 4 of them.
    # Closed: {0} closes at 1/8, runs to 5/8. {1/4, 5/16} closes at 3/8 and waits. {1/2} closes at 5/8.
    #   At 5/8 the replica is free: {1/4, 5/16} runs to 9/8, then {1/2} to 13/8.
    # Late binding: {0} starts at 1/8, ends at 5/8, and then the three that wait go together to 9/8.
    run = Run(
        [batches(500.0, 0.0, former=former, max_batch=4, batch_wait_ms=125.0)], [[0, 1 / 4, 5 / 16, 1 / 2]], 2
    )
    if former == "closed":
        assert run.log(0, "batched", "served") == {
            "batched": {1 / 8: 1, 5 / 8: 2, 9 / 8: 1},
            "served": {5 / 8: 1, 9 / 8: 2, 13 / 8: 1},
        }
    else:
        assert run.log(0, "batched", "served") == {
            "batched": {1 / 8: 1, 5 / 8: 3},
            "served": {5 / 8: 1, 9 / 8: 3},
        }


@pytest.mark.parametrize("former", ["closed", "late-binding"])
@pytest.mark.parametrize("tick_s", [1 / 16, 3 / 8])
def test_what_arrives_as_a_wait_ends_is_taken_along(former: str, tick_s: float) -> None:
    # Two slots; any batch takes 500 ms; due at 3 requests or after 250 ms. At 1/4 the wait of 0 is over; of the two
    # that arrive then, the first goes with it, the second waits until 1/2. Whether a tick begins at 1/4 does
    # not matter.
    one = batches(500.0, 0.0, former=former, max_batch=3, batch_wait_ms=250.0, batches_in_flight=2)
    run = Run([one], [[0, 1 / 4, 1 / 4]], 9 / 8, tick_s=tick_s)
    in_ticks = {1 / 16: {1 / 4: 2, 1 / 2: 1}, 3 / 8: {0: 2, 3 / 8: 1}}
    assert run.log(0, "batched") == {"batched": in_ticks[tick_s]}
    assert run.totals["latency_s"][0] == 3 / 4 + 1 / 2 + 3 / 4


def test_a_start_that_a_completion_allows_leaves_waits_that_end_then_alone() -> None:
    # Closed former, one slot, any batch takes 500 ms, closes at 3 requests or after 250 ms. Three at 0 run until 1/2;
    # three at 1/8 close and wait in line; one at 1/4 opens a batch, whose wait is over at 1/2. Then the
    # completion comes first, and the second batch starts; then the first arrival, which joins the open batch; then
    # that closes, so that the second arrival opens another.
    one = batches(500.0, 0.0, former="closed", max_batch=3, batch_wait_ms=250.0)
    run = Run([one], [[0, 0, 0, 1 / 8, 1 / 8, 1 / 8, 1 / 4, 1 / 2, 1 / 2]], 9 / 4, tick_s=3 / 4)
    assert run.log(0, "batched") == {"batched": {0: 3 + 3, 3 / 4: 2, 3 / 2: 1}}


def test_a_new_batch_limit_closes_what_is_due() -> None:
    # Closed former, limit 4, wait 1 s. 0 and 1/16 are in the open batch when the limit becomes 2 at 1/4: it
    # closes and runs 1/2 s. 3/8 and 7/16 make a batch of 2 at 7/16, which runs from 3/4 to 5/4.
    one = batches(500.0, 0.0, former="closed", max_batch=4, batch_wait_ms=1000.0)
    run = Run([one], [[0, 1 / 16, 3 / 8, 7 / 16]], 2, orders={(1 / 4, 0): {"max_batch": 2}})
    assert run.log(0, "batched", "served") == {
        "batched": {1 / 4: 2, 3 / 4: 2},
        "served": {3 / 4: 2, 5 / 4: 2},
    }
    assert run.course("max_batch") == {0: 4, 1 / 4: 2}


@pytest.mark.parametrize("former", ["closed", "late-binding"])
def test_a_new_batch_wait_holds_for_what_waits_already(former: str) -> None:
    # Limit 4, wait 1 s, a batch takes 1/2 s. 0 and 1/16 wait when the wait becomes 1/8 s at 1/4: it is over, they run
    # to 3/4. 1 comes, and would run at 9/8; but the wait becomes 1/2 s at 17/16, and so 9/8 goes with it, at 3/2.
    one = batches(500.0, 0.0, former=former, max_batch=4, batch_wait_ms=1000.0)
    orders = {(1 / 4, 0): {"batch_wait_s": 1 / 8}, (17 / 16, 0): {"batch_wait_s": 1 / 2}}
    run = Run([one], [[0, 1 / 16, 1, 9 / 8]], 9 / 4, orders=orders)
    assert run.log(0, "batched", "served") == {
        "batched": {1 / 4: 2, 3 / 2: 2},
        "served": {3 / 4: 2, 2: 2},
    }


def test_a_released_replica_drains() -> None:
    # Two replicas, round robin, 250 ms per request. Numbers 0..3 arrive at 0, 1/16, 1/8, 3/16: replica 0 gets
    # 0 and 2, replica 1 gets 1 and 3. One release at 1/4 takes the youngest, replica 1: it finishes 1 at 5/16 and 3 at
    # 9/16, and is gone at 9/16. Number 4 comes at 5/16, would have been replica 1's turn after number 5's,
    # but only replica 0 is left: it runs 0 to 1/4, 2 to 1/2, 4 to 3/4.
    one = batches(0.0, 250.0, routing="round-robin", initial_replicas=2)
    run = Run([one], [[0, 1 / 16, 1 / 8, 3 / 16, 5 / 16]], 1, orders={(1 / 4, 0): {"release": 1}})
    assert run.log(0, "served") == {"served": {1 / 4: 1, 5 / 16: 1, 1 / 2: 1, 9 / 16: 1, 3 / 4: 1}}
    assert run.course("ready") == {0: 2, 1 / 4: 1}
    assert run.course("draining") == {0: 0, 1 / 4: 1, 9 / 16: 0}
    assert run.totals["replica_s"][0] == 1 + 9 / 16
    assert run.totals["node_usd"][0] == pytest.approx(1 + 9 / 16, rel=1e-12)
    assert run.totals["ready_s"][0] == 1 + 9 / 16
    assert run.totals["busy_s"][0] == 5 / 4


def test_requests_wait_at_the_door_while_no_replica_is_ready() -> None:
    # Nothing is ready; a replica is ordered at 0, boots 1/4 s, loads 1/4 s. The door takes 2: 0 and 1/8 wait,
    # 1/4 is turned away. The timeout is 7/16 s: at 7/16 request 0 may still start, at 1/2 it is dead, which
    # the tick at 1/2 sees. Request 1 starts at 1/2, ends at 3/4, and takes 1/16 more to the client: 11/16.
    pool = CPU.replace(boot_s=0.25, network_ms=62.5)
    one = batches(
        0.0,
        250.0,
        routing="power-of-two",
        initial_replicas=0,
        queue_limit=2,
        request_timeout_s=7 / 16,
        load_s=0.25,
    )
    run = Run([one], [[0, 1 / 8, 1 / 4]], 1, [pool], orders={(0, 0): {"order": 1}})
    assert run.log() == {
        "arrived": {0: 1, 1 / 8: 1, 1 / 4: 1},
        "rejected": {1 / 4: 1},
        "timed_out": {1 / 2: 1},
        "batches": {1 / 2: 1},
        "batched": {1 / 2: 1},
        "served": {3 / 4: 1},
        "late": {3 / 4: 1},
    }
    assert run.course("waiting") == {0: 1, 1 / 8: 2, 1 / 2: 0}
    assert run.course("starting") == {0: 1, 1 / 2: 0}
    assert run.course("ready") == {0: 0, 1 / 2: 1}
    assert run.totals["latency_s"][0] == 11 / 16
    assert run.totals["inside_s"][0] == 1 / 2 + 5 / 8
    assert run.totals["ready_s"][0] == 1 / 2
    assert run.totals["node_s"][0] == 1  # paid for from the order


def test_the_dead_keep_their_place_until_they_are_noticed() -> None:
    # Ticks of 1 s; one request at a time, 3/2 s each; one may wait; timeout 1/2 s; objective 7/5 s.
    # 0 (at 0) runs 0 to 3/2. 1 (1/4) is dead at 3/4, but nobody looks: 2 (7/8) is rejected. The tick at 1 sweeps 1.
    # 3 (17/16) waits, starts at 3/2, ends at 3. 4 (13/4) runs to 19/4. 5 (29/8) is dead at 33/8; the tick at 4
    # was too early to see it, the batch former reaches it at 19/4.
    # 6 (11/2) runs to 7, when the run is over: in flight and overdue. 7 (97/16) is dead at 105/16, which only
    # the end of the run notices.
    one = batches(0.0, 1500.0, queue_limit=1, request_timeout_s=0.5, slo_ms=1400.0)
    run = Run([one], [[0, 1 / 4, 7 / 8, 17 / 16, 13 / 4, 29 / 8, 11 / 2, 97 / 16]], 7, tick_s=1)
    assert run.log() == {
        "arrived": {0: 3, 1: 1, 3: 2, 5: 1, 6: 1},
        "rejected": {0: 1},
        "timed_out": {1: 1, 4: 1},
        "batches": {0: 1, 1: 1, 3: 1, 5: 1},
        "batched": {0: 1, 1: 1, 3: 1, 5: 1},
        "served": {1: 1, 3: 1, 4: 1},
        "late": {1: 1, 3: 1, 4: 1},
    }
    assert run.course("waiting") == {0: 1, 1: 0, 3: 1, 4: 0, 6: 1}
    assert run.totals["timed_out"][0] == 3
    assert run.totals["overdue"][0] == 1
    assert run.totals["inside_s"][0] == 3 / 2 + 3 / 4 + 31 / 16 + 3 / 2 + 9 / 8 + 3 / 2 + 15 / 16
    assert run.ticks["peak_second"][0, 0] == 3


def test_nodes_are_billed_in_granules_above_a_minimum() -> None:
    # One dollar a second, at least 3 s, in steps of 5/2 s; ticks of 1 s; nothing younger than 2 s is released.
    # Replicas 0 (ready at the start) and 1 (ordered at 1).
    # At 2 a release would take 1, but it is 1 s old: 0 goes, 2 s old: billed 3 s at least, so 5 s, all of which
    # were on the bill in the first tick. At 5 a release takes 1, 4 s old: billed 5 s.
    # Replica 2, ordered at 5, is 3 s old at the end: 5 s. At 8 it would enter its fourth second: still 5 s.
    pool = CPU.replace(billing_minimum_s=3.0, billing_granularity_s=2.5, min_lifetime_s=2.0)
    orders = {
        (1, 0): {"order": 1},
        (2, 0): {"release": 1},
        (5, 0): {"order": 1, "release": 1},
    }
    run = Run([batches(0.0, 100.0)], [[]], 8, [pool], orders, tick_s=1)
    np.testing.assert_allclose(run.ticks["node_usd"][:, 0], [5, 5, 0, 0, 0, 5, 0, 0], atol=1e-9)
    np.testing.assert_allclose(run.ticks["node_s"][:, 0], [5, 5, 0, 0, 0, 5, 0, 0], atol=1e-9)
    assert run.ticks["replica_s"][:, 0].tolist() == [1, 2, 1, 1, 1, 1, 1, 1]
    assert run.course("ready") == {0: 1, 1: 2, 2: 1}
    assert np.isnan(run.ticks["latency_p95_s"]).all()


def test_services_share_pools_in_rounds() -> None:
    # Pool cpu has 2 nodes, gpu 1; a may use cpu then gpu, b only cpu; both order 2 at 0.
    # Round 1: a cpu, b cpu. Round 2: a gpu, b finds none and waits.
    # At 1/4 a releases 1: its youngest is the one on gpu, of no use to b.
    # At 1/2 a releases 1 more, on cpu: b's pending replica gets that node at once. At 3/4 a orders 2 and
    # names gpu: one is placed, one waits. At 7/8 a releases 1: the pending one goes first, then at 1 the placed one.
    gpu = Pool(name="gpu", price_usd_per_hour=7200.0, max_nodes=1)
    a = batches(0.0, 100.0, name="a", pools=("cpu", "gpu"), initial_replicas=0)
    b = batches(0.0, 100.0, name="b", initial_replicas=0)
    orders = {
        (0, 0): {"order": 2},
        (0, 1): {"order": 2},
        (1 / 4, 0): {"release": 1},
        (1 / 2, 0): {"release": 1},
        (3 / 4, 0): {"order": 2, "pool": 1},
        (7 / 8, 0): {"release": 1},
        (1, 0): {"release": 1},
    }
    run = Run([a, b], [[], []], 1.25, [CPU.replace(max_nodes=2), gpu], orders)
    assert run.course("ready", 0) == {0: 2, 1 / 4: 1, 1 / 2: 0, 3 / 4: 1, 1: 0}
    assert run.course("pending", 0) == {0: 0, 3 / 4: 1, 7 / 8: 0}
    assert run.course("ready", 1) == {0: 1, 1 / 2: 2}
    assert run.course("pending", 1) == {0: 1, 1 / 2: 0}
    assert run.totals["node_usd"][0] == pytest.approx(1 / 2 * 1 + (1 / 4 + 1 / 4) * 2, rel=1e-12)
    assert run.totals["node_usd"][1] == pytest.approx(5 / 4 + 3 / 4, rel=1e-12)


def test_a_queue_goes_to_the_slot_that_is_idle_for_longest() -> None:
    # Two replicas of one slot: 0 on a fast pool (1/8 s), 1 on a slow one (1/2 s). Request 0 (at 0) goes to replica
    # 0, until 1/8. Request 1 (1/4) goes to replica 1, idle since the start, until 3/4. Request 2 (5/16) goes to
    # replica 0, until 7/16, and 3 (1/2) again, until 5/8. At 1 replica 0 is idle since 5/8, replica 1 since 3/4.
    fast, slow = CPU.replace(max_nodes=1), Pool(name="gpu", price_usd_per_hour=0.0)
    laws = {"cpu": Affine(base_ms=125.0, per_item_ms=0.0), "gpu": Affine(base_ms=500.0, per_item_ms=0.0)}
    one = service(pools=("cpu", "gpu"), laws=laws, initial_replicas=2)
    run = Run([one], [[0, 1 / 4, 5 / 16, 1 / 2, 1]], 1.25, [fast, slow])
    assert run.log(0, "served") == {"served": {1 / 8: 1, 7 / 16: 1, 5 / 8: 1, 3 / 4: 1, 9 / 8: 1}}


def test_least_outstanding_counts_what_waits_and_what_runs() -> None:
    # Three replicas with one slot, 1/4 s per request. 0, 1, 2 go to replicas 0, 1, 2 (ties: longest ready). 3 (3/16)
    # goes to 0, which has 1 like the others; ends 1/2. At 5/16 replica 0 runs 3, 1 has finished (5/16 is its
    # end, which comes before the arrival), 2 runs until 3/8: 4 goes to replica 1, ends 9/16.
    one = batches(0.0, 250.0, routing="least-outstanding", initial_replicas=3)
    run = Run([one], [[0, 1 / 16, 1 / 8, 3 / 16, 5 / 16]], 1)
    assert run.log(0, "served") == {"served": {1 / 4: 1, 5 / 16: 1, 3 / 8: 1, 1 / 2: 1, 9 / 16: 1}}


def test_a_pool_that_the_service_may_not_use_is_ignored() -> None:
    the_scenario = scenario(
        [service(initial_replicas=0)], [Pool(name=n, price_usd_per_hour=1.0) for n in ("cpu", "gpu")], ticks=4
    )
    cluster = Cluster(the_scenario, [World(0, traffic=(Times([0.1, 0.2, 0.3]),))])
    orders = cluster.no_orders()
    orders["order"], orders["pool"] = 1, 1  # gpu, for which there is no latency law
    cluster.advance(orders)
    assert [n["pool"] for n in cluster.nodes[0] if n["state"] != 0] == [0]
    assert cluster.totals["latency_s"][0, 0] > 0


def test_ticks_that_are_not_exact_in_binary_are_not_billed_for_it() -> None:
    pool = Pool(name="cpu", price_usd_per_hour=3600.0, billing_granularity_s=1.0, min_lifetime_s=0.8)
    the_scenario = scenario([service(initial_replicas=1)], [pool], tick_s=0.1, ticks=40)
    for release_at, billed_s in ((20, 2.0), (8, 1.0)):
        cluster = Cluster(the_scenario, [World(0, traffic=(Times([]),))])
        for tick in range(40):
            orders = cluster.no_orders()
            orders["release"] = tick == release_at
            cluster.advance(orders)
        assert cluster.totals["node_s"][0, 0] == billed_s
