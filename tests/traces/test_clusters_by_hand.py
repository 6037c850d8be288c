"""Nodes, faults and rollouts, worked out by hand; the first is the life of a small Kubernetes-like cluster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pilotage.engine.cluster import Cluster, World
from pilotage.engine.layout import GONE
from pilotage.scenario import Placement
from pilotage.world.faults import Outage, Spot
from pilotage.world.pools import Pool, Resources
from pilotage.world.servers import Affine, BatchServer, Variant
from tests.strategies import MARKET, Times, scenario, service


def run(the_scenario, times, orders: dict[int, dict]) -> tuple[Cluster, list[np.ndarray]]:
    """All ticks, with the orders {tick: {service: {field: value}}}; counters per tick, of shape (services,)."""
    cluster = Cluster(the_scenario, [World(0, traffic=tuple(Times(t) for t in times))])
    seen = []
    for tick in range(the_scenario.ticks):
        now = cluster.no_orders()
        for s, fields in orders.get(tick, {}).items():
            for name, value in fields.items():
                now[name][0, s] = value
        seen.append(cluster.advance(now)[0].copy())
        seen[-1].setflags(write=False)
    return cluster, seen


def states(ticks, s=0) -> list[tuple[int, int, int]]:
    return [(int(t["ready"][s]), int(t["starting"][s]), int(t["pending"][s])) for t in ticks]


def build(name="v", resources=None, **fields) -> Variant:
    law = Affine(base_ms=100.0, per_item_ms=0.0)
    return Variant(name=name, latency={"cpu": law}, resources=resources, **fields)


def test_the_life_of_a_kubernetes_like_cluster() -> None:
    """Two pods to a node; a node boots for 60 s, an image is pulled for 20 s, weights load for 10 s, from the cache
    for 5 s; at most two nodes; an empty node goes after 120 s.

    t = 0: one pod on node 0. t = 15: three more. One fits on node 0, which has the image: ready at 20. Two need
    node 1: it is up at 75, and they are ready at 105. t = 30: a fifth; no node may be opened, it stays pending.
    t = 120: three are released: the pending one, and the youngest two. So node 1 is empty, and goes at 240.
    """
    pool = Pool(
        name="cpu",
        price_usd_per_hour=3600.0,
        boot_s=60.0,
        max_nodes=2,
        idle_removal_s=120.0,
        node=Resources(cpu=4.0),
    )
    variant = build(resources=Resources(cpu=2.0), image_pull_s=20.0, load_s=10.0, warm_load_share=0.5)
    one = service(initial_replicas=1).replace(variants=(variant,))
    orders = {1: {0: {"order": 3}}, 2: {0: {"order": 1}}, 8: {0: {"release": 3}}}
    cluster, ticks = run(scenario([one], [pool], tick_s=15.0, ticks=20), [[]], orders)
    expected = [(1, 0, 0), (2, 2, 0), *[(2, 2, 1)] * 5, (4, 0, 1), *[(2, 0, 0)] * 12]
    assert states(ticks) == expected
    per_tick = [15.0, *[30.0] * 15, *[15.0] * 4]  # node 1 from 15 to 240
    np.testing.assert_allclose([t["node_s"][0] for t in ticks], per_tick)
    np.testing.assert_allclose(cluster.totals["node_usd"][0, 0], 300.0 + 225.0)
    np.testing.assert_allclose(ticks[1]["ready_s"][0], 15.0 + 10.0)
    np.testing.assert_allclose(ticks[7]["ready_s"][0], 4 * 15.0)


def outage(on_failure: str) -> tuple[Cluster, list[np.ndarray]]:
    """The only zone is down from 2.05 to 3.05 s; a request arrives at 2.0 and takes 0.1 s."""
    one = service(initial_replicas=1, on_failure=on_failure).replace(variants=(build(),))
    pool = Pool(name="cpu", price_usd_per_hour=3600.0)
    the_scenario = scenario([one], [pool], ticks=6).replace(
        outages=(Outage(zone="local", start_h=2.05 / 3600, duration_h=1.0 / 3600),)
    )
    return run(the_scenario, [[0.5, 2.0, 2.5]], {})


def test_requests_of_a_node_that_dies_are_served_again() -> None:
    """The replica is ordered anew at once; at 3 s the zone is still down, at 4 s there is a node. What executed at
    2.05 s is served from 4.0 to 4.1, before what came at 2.5 s."""
    cluster, ticks = outage("retry")
    assert states(ticks) == [(1, 0, 0), (1, 0, 0), (0, 0, 1), (0, 0, 1), (1, 0, 0), (1, 0, 0)]
    assert [int(t["served"][0]) for t in ticks] == [1, 0, 0, 0, 2, 0]
    assert [int(t["failed"][0]) for t in ticks] == [0, 0, 1, 0, 0, 0]
    np.testing.assert_allclose(ticks[4]["latency_s"][0], (4.1 - 2.0) + (4.2 - 2.5))
    np.testing.assert_allclose(ticks[2]["busy_s"][0], 0.05)
    np.testing.assert_allclose([t["node_usd"][0] for t in ticks], [1.0, 1.0, 0.05, 0.0, 1.0, 1.0], atol=1e-9)
    assert cluster.totals["lost"][0, 0] == 0


def test_requests_of_a_node_that_dies_are_lost() -> None:
    """Only what was on the replica is: what comes while there is none waits at the door."""
    cluster, ticks = outage("lost")
    assert [int(t["lost"][0]) for t in ticks] == [0, 0, 1, 0, 0, 0]
    assert [int(t["served"][0]) for t in ticks] == [1, 0, 0, 0, 1, 0]
    assert cluster.totals["arrived"][0, 0] == 3


@pytest.mark.parametrize(
    ("at_notice", "grace_s", "boot_s", "draining", "latency_s"),
    [
        ("drain", 0.5, 0.75, [0, 0, 0, 0, 0], [0.0, 0.0, 1.0, 0.1, 0.1]),
        ("replace-first", 0.5, 0.75, [0, 1, 1, 0, 0], [0.0, 0.1, 0.1, 0.1, 0.1]),
        ("replace-first", 1.5, 0.75, [0, 1, 0, 0, 0], [0.0, 0.1, 0.25, 0.1, 0.1]),
        ("replace-first", 0.5, 1.75, [0, 1, 1, 1, 0], [0.0, 0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_a_spot_node_is_told_to_go(at_notice, grace_s, boot_s, draining, latency_s) -> None:
    """Ticks of 0.5 s. The spot node is taken at 2.5 s and told so at 0.5; another is ordered then, ready at 1.25 or
    2.25. Requests at 0.7, 1.1, 1.6 and 2.3 take 0.1 s each. Drained at 0.5, the first two wait until 1.25: latencies of
    0.65 and 0.35. Replaced first, nobody waits: the old replica goes at 1.5, the first tick with the new one ready. It
    goes at 1.0 where it must have 1.5 s to finish in, for the next tick would be too late, and the second waits 0.15 s;
    and at 2.0 where the new one takes until 2.25, before the request at 2.3."""
    market = Spot(market=MARKET, notice_s=2.0, grace_s=grace_s)
    pools = [
        Pool(name="spot", price_usd_per_hour=1.0, spot=market),
        Pool(name="cpu", price_usd_per_hour=3600.0, boot_s=boot_s),
    ]
    one = scenario([service(pools=("spot", "cpu"), initial_replicas=1)], pools, tick_s=0.5, ticks=5)
    one = one.replace(
        data=str(Path(__file__).parent), placement=Placement(rule="first-fit", at_notice=at_notice)
    )
    cluster, ticks = run(one, [[0.7, 1.1, 1.6, 2.3]], {})
    assert [int(t["draining"][0]) for t in ticks] == draining
    np.testing.assert_allclose([t["latency_s"][0] for t in ticks], latency_s, atol=1e-12)
    assert [int(t["failed"][0]) for t in ticks] == [0, 1, 0, 0, 0]
    assert cluster.totals["served"][0, 0] == 4


def test_services_share_a_node_and_its_bill() -> None:
    """One core and three cores of four: a quarter and three quarters of the dollar per second. When the larger one
    goes, the other pays for all."""
    pool = Pool(name="cpu", price_usd_per_hour=3600.0, max_nodes=1, node=Resources(cpu=4.0))
    services = [
        service(name, initial_replicas=1).replace(variants=(build(resources=Resources(cpu=cpu)),))
        for name, cpu in (("a", 1.0), ("b", 3.0))
    ]
    cluster, ticks = run(scenario(services, [pool], ticks=4), [[], []], {2: {1: {"release": 1}}})
    np.testing.assert_allclose([t["node_usd"] for t in ticks], [[0.25, 0.75]] * 2 + [[1.0, 0.0]] * 2)
    assert (cluster.nodes["state"] != GONE).sum() == 1


def test_a_variant_is_rolled_out_one_by_one() -> None:
    """Two replicas; the new build loads for 0.5 s. It is ordered beside the old at 1 s and ready at 1.5 s; at 2 s one
    old replica goes and the second replacement is ordered, at 3 s the last old one goes. Monitors see two all along."""
    variants = (build("v", accuracy=1.0), build("w", accuracy=0.9, load_s=0.5))
    one = service(initial_replicas=2).replace(variants=variants)
    pool = Pool(name="cpu", price_usd_per_hour=3600.0)
    the_scenario = scenario([one], [pool], ticks=5)
    cluster, ticks = run(the_scenario, [[0.2, 4.2]], {1: {0: {"variant": 1}}})
    assert states(ticks) == [(2, 0, 0)] * 5
    np.testing.assert_allclose([t["node_usd"][0] for t in ticks], [2.0, 3.0, 3.0, 2.0, 2.0])
    np.testing.assert_allclose(cluster.totals["wrong"][0, 0], 0.1)
    alive = cluster.replicas[cluster.replicas["state"] != GONE]
    assert alive["variant"].tolist() == [1, 1]


def test_a_crashed_process_starts_again_from_the_cache() -> None:
    """It is not ordered anew, keeps its node, and takes a tenth of the load time."""
    one = service(initial_replicas=1, crashes_per_hour=3600.0).replace(
        variants=(build(load_s=4.0, warm_load_share=0.1),)
    )
    pool = Pool(name="cpu", price_usd_per_hour=3600.0, boot_s=50.0)
    cluster, ticks = run(scenario([one], [pool], ticks=40), [[]], {})
    crashes = int(cluster.totals["failed"][0, 0])
    assert crashes > 5
    down_s = 40.0 - float(cluster.totals["ready_s"][0, 0])
    assert 0.4 * (crashes - 1) - 1e-9 <= down_s <= 0.4 * crashes + 1e-9
    assert cluster.totals["node_s"][0, 0] == 40.0
    assert all(pending == 0 for _, _, pending in states(ticks))


def test_no_node_is_opened_on_which_a_replica_does_not_fit() -> None:
    """The small nodes, which the service prefers, take the first build, not the second."""
    law = Affine(base_ms=100.0, per_item_ms=0.0)
    first = Variant(name="v", latency={"small": law, "large": law}, resources=Resources(cpu=1.0))
    second = first.replace(name="w", resources=Resources(cpu=4.0))
    pools = [
        Pool(name=name, price_usd_per_hour=3600.0, node=Resources(cpu=cpu), max_nodes=2)
        for name, cpu in (("small", 2.0), ("large", 8.0))
    ]
    one = service(pools=("small", "large"), law=law, initial_replicas=1).replace(variants=(first, second))
    cluster, _ = run(scenario([one], pools, ticks=3), [[]], {1: {0: {"variant": 1}}})
    alive = cluster.replicas[cluster.replicas["state"] != GONE]
    assert alive[["variant", "pool"]].tolist() == [(1, 1)]


def test_draining_replicas_do_not_take_the_places_of_others() -> None:
    """One replica per node, on the only node, which has room for four. The first executes from 0.5 to 5.5 s, is
    released at 1 s, and drains; the other two orders are for one that fits, and one that does not."""
    law = Affine(base_ms=5000.0, per_item_ms=0.0)
    variant = Variant(name="v", latency={"cpu": law}, resources=Resources(cpu=1.0))
    pool = Pool(name="cpu", price_usd_per_hour=3600.0, node=Resources(cpu=4.0), max_nodes=1)
    one = service(initial_replicas=1, max_per_node=1).replace(variants=(variant,))
    orders = {1: {0: {"release": 1, "order": 2}}}
    _, ticks = run(scenario([one], [pool], ticks=7), [[0.5]], orders)
    assert states(ticks) == [(1, 0, 0), *[(1, 0, 1)] * 6]
    assert [int(t["draining"][0]) for t in ticks] == [0, 1, 1, 1, 1, 0, 0]


def test_initial_replicas_without_a_node_are_pending() -> None:
    pool = Pool(name="cpu", price_usd_per_hour=3600.0, max_nodes=2)
    _, ticks = run(scenario([service(initial_replicas=3)], [pool], ticks=2), [[]], {1: {0: {"release": 1}}})
    assert states(ticks) == [(2, 0, 1), (2, 0, 0)]


def test_a_node_that_would_not_come_goes_with_its_zone_if_that_is_sooner() -> None:
    """It would turn out at 5 s that the node does not come; its zone goes down at 2.05 s, until 3.05 s. The replica
    is ordered anew both times, on nodes that do not come either: the next, of 4 s, is found out at 9 s."""
    pool = Pool(name="cpu", price_usd_per_hour=3600.0, boot_s=5.0, provisioning_failure=1 - 1e-9)
    one = service(initial_replicas=0).replace(variants=(build(),))
    the_scenario = scenario([one], [pool], ticks=10).replace(
        outages=(Outage(zone="local", start_h=2.05 / 3600, duration_h=1.0 / 3600),)
    )
    cluster, ticks = run(the_scenario, [[]], {0: {0: {"order": 1}}})
    assert states(ticks) == [(0, 1, 0)] * 2 + [(0, 0, 1)] * 2 + [(0, 1, 0)] * 5 + [(0, 0, 1)]
    assert [k for k, t in enumerate(ticks) if t["failed"][0]] == [2, 9]
    assert cluster.totals["node_usd"][0, 0] == 0.0


def test_no_request_goes_to_a_replica_that_dies_at_the_same_time() -> None:
    """Both replicas are on the node that goes at 2.05 s; each executes a request, and one waits for it, which is all
    that may. None of the four is refused because replica 1 seems to be there: they wait at the door."""
    pool = Pool(name="cpu", price_usd_per_hour=3600.0, node=Resources(cpu=2.0))
    server = BatchServer(routing="round-robin", queue_limit=1)
    one = service(initial_replicas=2, server=server).replace(variants=(build(resources=Resources(cpu=1.0)),))
    the_scenario = scenario([one], [pool], ticks=4).replace(
        outages=(Outage(zone="local", start_h=2.05 / 3600, duration_h=1.0 / 3600),)
    )
    _, ticks = run(the_scenario, [[2.0, 2.01, 2.02, 2.03]], {})
    assert [int(t["waiting"][0]) for t in ticks] == [0, 0, 4, 4]
    assert [int(t["rejected"][0]) for t in ticks] == [0, 0, 0, 0]
