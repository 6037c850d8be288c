"""Packing problems and fleets at random: what a placement is trained on that is to work where it has never been.

Ranges are those in which clusters are found: nodes of 4 to 64 cores, a third of the kinds with a GPU; replicas that
take a tenth to two thirds of a node; spot nodes at a quarter to a half of the price, taken back every two hours to
every two days; what requests cost that one replica would have served is 3 to 3000 times the rent of its part of a node.
"""

from __future__ import annotations

import numpy as np

from pilotage.agents.domain import log_uniform, traffic_at_random
from pilotage.agents.packing import Instance, Replica
from pilotage.scenario import Interference, Scenario
from pilotage.world.faults import Hazard, Spot
from pilotage.world.pools import Pool, Resources
from pilotage.world.servers import Affine, BatchServer, Variant
from pilotage.world.services import Economics, Service


def node_at_random(rng: np.random.Generator) -> tuple[Resources, float]:
    """What a node has, and its price on demand in dollars per hour."""
    cpu = float(2 ** rng.integers(2, 7))
    memory_gib = cpu * float(rng.choice([2, 4, 8]))
    gpus = float(rng.random() < 0.35) * float(rng.choice([1, 1, 2, 4]))
    price = (0.035 * cpu + 0.005 * memory_gib + 0.7 * gpus) * float(rng.uniform(0.7, 1.4))
    return Resources(cpu=cpu, memory_gib=memory_gib, gpus=gpus, gpu_memory_gib=24 * gpus), price


def needs_at_random(rng: np.random.Generator, node: Resources) -> Resources:
    """What a replica takes of a node: one resource more than the others, as they do."""
    shares = np.minimum(
        rng.uniform(0.1, 0.67) * rng.uniform(0.3, 1.0, 4) / rng.uniform(0.7, 1.0), 1.0
    ).tolist()
    gpus = max(round(4 * shares[2] * node.gpus), 1) / 4 if node.gpus else 0.0
    return Resources(
        cpu=max(round(shares[0] * node.cpu, 1), 0.1),
        memory_gib=max(round(shares[1] * node.memory_gib, 1), 0.1),
        gpus=gpus,
        gpu_memory_gib=round(shares[3] * node.gpu_memory_gib, 1),
    )


def instance_at_random(rng: np.random.Generator, dynamic: bool) -> Instance:
    """6 to 12 replicas of 2 to 5 services on 1 to 3 kinds of nodes: all at once, or coming and going within hours."""
    pools = []
    for p in range(int(rng.integers(1, 4))):
        node, price = node_at_random(rng)
        pools.append(Pool(name=f"pool-{p}", price_usd_per_hour=price, node=node))
    services = [
        needs_at_random(rng, pools[rng.integers(len(pools))].node)  # type: ignore[arg-type]
        for _ in range(rng.integers(2, 6))
    ]
    replicas = []
    for _ in range(int(rng.integers(6, 13))):
        s = int(rng.integers(len(services)))
        start_s = float(rng.uniform(0, 4 * 3600)) if dynamic else 0.0
        life_s = 60 + float(rng.exponential(3 * 3600)) if dynamic else 3600.0
        replicas.append(
            Replica(needs=services[s], service=f"service-{s}", start_s=start_s, end_s=start_s + life_s)
        )
    return Instance(pools=tuple(pools), replicas=tuple(replicas))


def _pools(rng: np.random.Generator, k: int, whole: bool) -> list[Pool]:
    """Nodes of one kind: on demand, and perhaps on one or two spot markets, which are tried first."""
    node, price = node_at_random(rng)
    boot_s, boot_cv = log_uniform(rng, 20, 200), float(rng.uniform(0, 0.3))
    zones = [f"{region}{zone}" for region in ("near-", "far-") for zone in "abc"]
    base = Pool(
        name=f"nodes-{k}",
        price_usd_per_hour=price,
        node=None if whole else node,
        boot_s=boot_s,
        boot_cv=boot_cv,
        billing_minimum_s=60.0,
        idle_removal_s=float(rng.choice([0, 60, 120, 600])),
        crashes_per_hour=float(rng.choice([0, 0, 0.01])),
        zones=tuple(zones[: int(rng.integers(1, 4))]),
    )
    found = []
    markets = int(rng.integers(1, 3)) if whole or rng.random() < 0.4 else 0  # else there is nothing to choose
    for m in range(markets):
        market = Hazard(per_hour=log_uniform(rng, 0.02, 0.6))
        found.append(
            base.replace(
                name=f"spot-{k}-{m}",
                price_usd_per_hour=price * float(rng.uniform(0.25, 0.55)),
                provisioning_failure=float(rng.choice([0, 1])) * float(rng.uniform(0.02, 0.35)),
                zones=tuple(zones[3 * m : 3 * m + int(rng.integers(1, 4))]),
                spot=Spot(notice_s=float(rng.choice([0, 30, 120])), market=market),
            )
        )
    return [*found, base]


def fleet_at_random(rng: np.random.Generator, hours: float = 4.0, tick_s: float = 15.0) -> Scenario:
    """Two to nine services on one or two kinds of nodes, whole or shared, with spot markets and interference."""
    whole = bool(rng.random() < 0.5)
    kinds = [_pools(rng, k, whole) for k in range(1 if whole else int(rng.integers(1, 3)))]
    services, wanted = [], [0.0] * len(kinds)
    for s in range(int(rng.integers(2, 5 if whole else 10))):
        k = int(rng.integers(len(kinds)))
        pools, node = kinds[k], kinds[k][-1].node
        resources = needs_at_random(rng, node) if node else None
        share = max(
            (n / h for n, h in zip(resources.vector, node.vector, strict=True) if h > 0)
            if resources and node
            else [1.0]
        )
        capacity_rps, max_batch = log_uniform(rng, 1, 20), int(rng.choice([1, 4, 8]))
        full_s = max_batch / capacity_rps
        replicas = log_uniform(rng, 0.7, 8)
        wanted[k] += 1.3 * share * replicas
        stake = log_uniform(rng, 3, 3000) * share * pools[-1].price_usd_per_hour / 3600 / capacity_rps
        law = Affine(base_ms=200 * full_s, per_item_ms=800 * full_s / max_batch, noise_cv=0.1)
        listed = [p.name for p in pools]
        if (
            len(listed) > 1 and rng.random() < 0.3
        ):  # a team that does not want the first market, or prefers on demand
            listed = listed[1:] if rng.random() < 0.5 else listed[::-1]
        services.append(
            Service(
                name=f"service-{s}",
                slo_ms=1e3 * full_s * log_uniform(rng, 1.5, 20),
                pools=tuple(listed),
                max_replicas=24,
                initial_replicas=max(1, round(0.8 * replicas)),
                economics=Economics(late_usd=stake, dropped_usd=stake * float(rng.uniform(1, 3))),
                server=BatchServer(
                    max_batch=max_batch, batch_wait_ms=5.0, queue_limit=500, request_timeout_s=8 * full_s + 2
                ),
                traffic=traffic_at_random(
                    rng,
                    str(rng.choice(["diurnal", "diurnal", "flash"])),
                    1.2 * replicas * capacity_rps,
                    hours * 3600,
                ),
                variants=(
                    Variant(
                        name="only",
                        resources=resources,
                        latency=dict.fromkeys(listed, law),
                        image_pull_s=log_uniform(rng, 5, 80),
                        load_s=log_uniform(rng, 2, 40),
                        warm_load_share=0.5,
                    ),
                ),
            )
        )
    room = log_uniform(rng, 0.7, 3)  # below 1, capacity is short at the peaks
    limited = [
        pool.replace(max_nodes=max(3, int(np.ceil(room * nodes))))
        for pools, nodes in zip(kinds, wanted, strict=True)
        for pool in pools
    ]
    used = {name for service in services for name in service.pools}
    names = [service.name for service in services]
    hurt = 0.0 if whole or rng.random() < 0.4 else float(rng.uniform(0.05, 0.3))
    return Scenario(
        title="a fleet at random",
        name="fleet",
        pools=tuple(pool for pool in limited if pool.name in used),
        services=tuple(services),
        horizon_h=hours,
        tick_s=tick_s,
        start_h=24 + float(rng.uniform(0, 24)),
        history_h=1.0,
        interference=tuple(
            Interference(service=a, neighbour=b, slowdown=float(rng.uniform(1.1, 4)))
            for a in names
            for b in names
            if rng.random() < hurt
        ),
    )
