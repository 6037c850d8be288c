"""What the engine's property tests draw: small scenarios that still have everything, traffic, and orders."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from pilotage.engine.cluster import Cluster, World
from pilotage.engine.layout import ORDER, SAME_WAIT
from pilotage.engine.placement import WEIGHTS
from pilotage.scenario import Interference, Placement, Scenario
from pilotage.world.arrivals import Poisson
from pilotage.world.faults import Availability, Hazard, Outage, RandomOutages, Spot
from pilotage.world.pools import RESOURCES, Pool, Resources
from pilotage.world.servers import (
    Affine,
    BatchServer,
    Constant,
    Exponential,
    Idling,
    LogNormal,
    Router,
    Stalls,
    Table,
    Variant,
)
from pilotage.world.services import Economics, Service

NODES = (
    Resources(cpu=4.0, memory_gib=8.0),
    Resources(cpu=2.0, gpus=1.0),
    Resources(cpu=8.0, memory_gib=8.0, gpus=2.0, gpu_memory_gib=48.0),
)
MARKET = Availability(
    path="market.csv", campaign="test", series={zone: zone for zone in ("local", "east", "west")}
)
OFTEN = RandomOutages(per_zone_per_week=7 * 86400 / 6.0, mean_duration_h=1.0 / 3600)
POOLS = ("cpu", "gpu", "spot")


class Times:
    """Traffic that is a list of times, for `World.traffic`: what a test says, and nothing drawn."""

    def __init__(self, times) -> None:
        self.times, self.given = np.asarray(times, dtype=np.float64), 0

    def begin(self, streams, begin_s, end_s, data) -> Times:
        return Times(self.times)

    def until(self, end_s) -> np.ndarray:
        first, self.given = self.given, int(np.searchsorted(self.times, end_s))
        return self.times[first : self.given]


class Case(NamedTuple):
    """A scenario, its request times [world][service], its orders [tick, world, service], and seeds of worlds."""

    scenario: Scenario
    times: list[list[list[float]]]
    orders: np.ndarray
    seeds: list[int]

    def cluster(self, **options) -> Cluster:
        worlds = [
            World(seed, traffic=tuple(map(Times, times)))
            for seed, times in zip(self.seeds, self.times, strict=True)
        ]
        return Cluster(self.scenario, worlds, **options)


def scenario(services, pools, tick_s=1.0, ticks=8) -> Scenario:
    """A scenario that lasts a number of ticks."""
    return Scenario(
        title="test",
        tick_s=tick_s,
        horizon_h=ticks * tick_s / 3600,
        pools=tuple(pools),
        services=tuple(services),
    )


def service(
    name="a", pools=("cpu",), law=None, laws=None, accuracy=1.0, load_s=0.0, load_cv=0.0, **fields
) -> Service:
    """A service with one variant, whose latency law is `law` on all pools, or `laws` pool by pool."""
    law = law or Affine(base_ms=0.0, per_item_ms=100.0)
    latency = laws or dict.fromkeys(pools, law)
    variant = Variant(name="v", latency=latency, accuracy=accuracy, load_s=load_s, load_cv=load_cv)
    fields = {"slo_ms": 500.0, "traffic": Poisson(rate_rps=1.0)} | fields
    return Service(name=name, pools=tuple(pools), variants=(variant,), **fields)


def one_of(*values):
    return st.sampled_from(values)


@st.composite
def laws(draw, max_batch):
    """A latency law; round numbers among them, so that events coincide."""
    varied = {
        "noise_cv": draw(one_of(0.0, 0.0, 0.5)),
        "stalls": draw(one_of(None, None, Stalls(per_s=0.25, mean_ms=500.0))),
        "idle": draw(one_of(None, None, Idling(extra_ms=250.0, cooling_ms=500.0, warming_ms=1000.0))),
    }
    if draw(st.booleans()):
        base_ms = draw(one_of(0.0, 125.0, 300.0))
        return Affine(base_ms=base_ms, per_item_ms=draw(one_of(62.5, 110.0, 250.0, 900.0)), **varied)
    times = draw(st.lists(one_of(125.0, 250.0, 333.0, 500.0, 2000.0), min_size=max_batch, max_size=max_batch))
    return Table(batch_ms=tuple(times), **varied)


@st.composite
def pools(draw, clusters):
    return [
        Pool(
            name=name,
            price_usd_per_hour=draw(one_of(0.0, 1.2, 3.6)),
            boot_s=draw(one_of(0.0, 0.5, 1.7)),
            boot_cv=draw(one_of(0.0, 0.4)),
            max_nodes=draw(st.integers(1, 8)),
            min_lifetime_s=draw(one_of(0.0, 0.0, 1.0, 3.0)),
            billing_granularity_s=draw(one_of(0.0, 1.0, 2.5)),
            billing_minimum_s=draw(one_of(0.0, 0.0, 3.0)),
            network_ms=draw(one_of(0.0, 20.0, 125.0)),
            **(draw(node_kinds()) if clusters else {}),
        )
        for name in POOLS[: draw(st.integers(1, 3))]
    ]


@st.composite
def node_kinds(draw):
    """Shared nodes, zones, and everything that can happen to a node, often within seconds."""
    return {
        "node": draw(one_of(None, *NODES)),
        "zones": draw(one_of(("local",), ("east", "west"), ("west", "local"))),
        "idle_removal_s": draw(one_of(0.0, 0.0, 0.8, 3.0)),
        "provisioning_failure": draw(one_of(0.0, 0.0, 0.0, 0.4)),
        "crashes_per_hour": draw(one_of(0.0, 0.0, 0.0, 300.0, 2000.0)),
        "slow_share": draw(one_of(0.0, 0.5)),
        "slow_factor": draw(one_of(1.0, 2.5)),
        "spot": draw(
            one_of(
                None,
                None,
                None,
                Spot(market=Hazard(per_hour=800.0), notice_s=0.9, grace_s=0.2),
                Spot(market=Hazard(per_hour=2000.0), notice_s=0.0),
                Spot(market=MARKET, notice_s=0.6, grace_s=0.0),
            )
        ),
    }


@st.composite
def routers(draw):
    return Router(
        max_ongoing_requests=draw(st.integers(1, 6)),
        tasks_per_replica=draw(one_of(1, 2, 3)),
        max_tasks=draw(one_of(2, 5, 50)),
        tries_at_once=draw(one_of(0, 2)),
        backoff_ms=draw(one_of(5.0, 25.0, 400.0)),
        max_backoff_ms=draw(one_of(100.0, 500.0)),
        send_ms=draw(one_of(0.0, 1.0, 40.0)),
        answer_ms=draw(one_of(0.0, 0.5, 25.0)),
        reject_ms=draw(one_of(0.0, 1.5, 30.0)),
        hop_ms=draw(one_of(0.0, 1.5, 60.0)),
        hop_spread=draw(one_of(0.0, 1.0)),
    )


@st.composite
def ways(draw):
    """How requests reach replicas, with what is known of Ray Serve's router and of time outside the server."""
    routing = draw(one_of("central", "round-robin", "least-outstanding", "power-of-two", "ray-serve"))
    return {
        "routing": routing,
        "router": draw(routers()) if routing == "ray-serve" else None,
        "overhead_ms": draw(one_of(0.0, 0.0, 40.0)),
        "overhead_cv": draw(one_of(0.0, 1.0)),
    }


def plain_ways():
    routings = one_of("central", "round-robin", "least-outstanding", "power-of-two")
    return st.fixed_dictionaries({"routing": routings})


@st.composite
def servers(draw, routed):
    max_batch = draw(one_of(1, 2, 3, 5))
    return BatchServer(
        max_batch=max_batch,
        batch_wait_ms=draw(one_of(0.0, 125.0, 250.0, 400.0)),
        former=draw(one_of("late-binding", "closed")),
        batches_in_flight=draw(st.integers(1, 3)),
        queue_limit=draw(one_of(None, None, 1, 2, 4)),
        request_timeout_s=draw(one_of(None, None, 0.25, 0.6, 2.0)),
        patience_s=draw(one_of(None, None, 0.3, 1.5)),
        **draw(ways() if routed else plain_ways()),
    )


@st.composite
def services(draw, name, the_pools, clusters, routed):
    server = draw(servers(routed))
    names = [pool.name for pool in the_pools]
    mine = draw(st.permutations(names))[: draw(st.integers(1, len(names)))]
    one = service(
        name,
        mine,
        laws={pool: draw(laws(server.max_batch)) for pool in mine},
        accuracy=draw(one_of(1.0, 0.9)),
        load_s=draw(one_of(0.0, 0.25, 1.0)),
        load_cv=draw(one_of(0.0, 0.4)),
        slo_ms=draw(one_of(187.5, 250.0, 1000.0)),
        server=server,
        economics=Economics(late_usd=0.01, dropped_usd=0.02, error_usd=0.03),
        demand=draw(one_of(Constant(), LogNormal(cv=1.0), Exponential())),
        **(draw(risks()) if clusters else {"initial_replicas": draw(st.integers(0, 4))}),
    )
    if not clusters:
        return one
    mine = [pool for pool in the_pools if pool.name in mine]
    zones = {draw(st.sampled_from(pool.zones)) for pool in mine}
    variants = [one.variants[0].replace(**draw(needs(mine)))]
    if draw(one_of(False, True, True)):  # the second runs and fits perhaps on some of the pools only
        some = draw(st.permutations(mine))[: draw(st.integers(1, len(mine)))]
        second = {pool.name: draw(laws(server.max_batch)) for pool in some}
        more = {"name": "w", "latency": second, "accuracy": 0.95, **draw(needs(some[:1]))}
        if draw(st.booleans()):
            more |= {"load_s": 0.0, "load_cv": 0.0, "load_quantiles_s": (0.1, 0.3, 0.9)}
        variants.append(variants[0].replace(**more))
    return one.replace(variants=tuple(variants), zones=draw(one_of(None, None, tuple(sorted(zones)))))


@st.composite
def risks(draw):
    most = draw(one_of(100, 100, 4, 1))
    return {
        "max_replicas": most,
        "initial_replicas": draw(st.integers(0, min(most, 6))),
        "max_per_node": draw(one_of(None, None, 1, 2)),
        "on_failure": draw(one_of("retry", "lost")),
        "crashes_per_hour": draw(one_of(0.0, 0.0, 0.0, 600.0, 3000.0)),
    }


@st.composite
def needs(draw, the_pools):
    """What a variant needs, as far as a node of each of the pools has it; and how it starts."""
    nodes = [pool.node for pool in the_pools if pool.node is not None]
    share = draw(one_of(0.25, 0.5, 0.3, 0.125, 1.0))
    least = {name: share * min((getattr(node, name) for node in nodes), default=0.0) for name in RESOURCES}
    return {
        "resources": Resources(**least) if least["cpu"] and draw(one_of(True, True, False)) else None,
        "image_pull_s": draw(one_of(0.0, 0.0, 0.6)),
        "image_pull_cv": draw(one_of(0.0, 0.4)),
        "warm_load_share": draw(one_of(1.0, 0.3)),
    }


@st.composite
def scenarios(draw, max_ticks=12, max_services=3, clusters=True, routed=True) -> Scenario:
    """Any scenario of up to three pools and services and `max_ticks` ticks.

    Not `clusters`: one replica per node, one variant, no faults. Not `routed`: without Ray Serve's router and
    time outside servers.
    """
    the_pools = draw(pools(clusters))
    count = draw(st.integers(1, max_services))
    one = scenario(
        [draw(services(name, the_pools, clusters, routed)) for name in ("a", "b", "c")[:count]],
        the_pools,
        tick_s=draw(one_of(0.1, 0.25, 0.5, 1.0, 1.1)),
        ticks=draw(st.integers(2, max_ticks)),
    )
    if not clusters:
        return one
    zones = sorted({zone for pool in the_pools for zone in pool.zones})
    pairs = [(s.name, t.name) for s in one.services for t in one.services]
    return one.replace(
        data=str(Path(__file__).parent / "traces"),
        placement=draw(placements()),
        interference=tuple(
            Interference(service=a, neighbour=b, slowdown=draw(one_of(1.2, 3.0)))
            for a, b in pairs
            if draw(one_of(False, True))
        ),
        outages=tuple(
            Outage(
                zone=draw(st.sampled_from(zones)),
                start_h=draw(one_of(0.3, 1.0, 2.4)) / 3600,
                duration_h=1.5 / 3600,
            )
            for _ in range(draw(one_of(0, 0, 1)))
        ),
        random_outages=draw(one_of(None, None, None, OFTEN)),
    )


@st.composite
def placements(draw):
    rule = draw(one_of(*WEIGHTS, "linear", "linear", "learned-placement", "learned-placement"))
    count = draw(st.sampled_from(WEIGHTS[rule]))
    weights = tuple(draw(one_of(0.0, 1.0, 2.0, -0.3)) for _ in range(count))
    return Placement(rule=rule, weights=weights, at_notice=draw(one_of(None, "drain", "replace-first")))


@st.composite
def times(draw, horizon_s, ties=True) -> list[float]:
    """Request times in [0, horizon_s), ascending: anywhere, in bursts, or on a grid where events coincide."""
    grid = draw(one_of(0.0, 0.0, 0.0625, 0.125)) if ties else 0.0
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(0, draw(one_of(8, 40, 40, 160))))
    spread = draw(one_of(1.0, 1.0, 0.2))
    at = np.sort(rng.uniform(0, spread, count)) * horizon_s
    return (np.floor(at / grid) * grid if grid else at).tolist()


@st.composite
def orders(draw, the_scenario: Scenario, worlds=1) -> np.ndarray:
    """Orders [tick, world, service]: mostly nothing; sometimes any of order, release, batch limit and wait, pool."""
    shape = (the_scenario.ticks, worlds, len(the_scenario.services))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    busy = draw(one_of(0.0, 0.2, 0.6))
    out = np.zeros(shape, ORDER)
    for field, low, high, nothing in (
        ("order", 1, 4, 0),
        ("release", 1, 3, 0),
        ("max_batch", 1, 7, 0),
        ("pool", 0, 3, -1),
        ("variant", 0, 2, -1),
    ):
        acts = rng.random(shape) < (busy if field == "release" else busy / 2)
        out[field] = np.where(acts, rng.integers(low, high, shape), nothing)
    waits = rng.random(shape) < busy / 2
    out["batch_wait_s"] = np.where(waits, rng.choice([0.0, 0.125, 0.25, 0.4], shape), SAME_WAIT)
    names = [pool.name for pool in the_scenario.pools]
    for s, one in enumerate(the_scenario.services):  # a decision names a pool in which the service may run
        mine = np.array([names.index(pool) for pool in one.pools])
        named = out["pool"][..., s]
        out["pool"][..., s] = np.where(named >= 0, mine[named % len(mine)], -1)
    return out


@st.composite
def cases(draw, worlds=2, ties=True, **limits) -> Case:
    """A scenario with traffic and orders for some worlds."""
    the_scenario = draw(scenarios(**limits))
    horizon_s = the_scenario.ticks * the_scenario.tick_s
    return Case(
        the_scenario,
        [[draw(times(horizon_s, ties)) for _ in the_scenario.services] for _ in range(worlds)],
        draw(orders(the_scenario, worlds)),
        [draw(st.integers(0, 2**31)) for _ in range(worlds)],
    )
