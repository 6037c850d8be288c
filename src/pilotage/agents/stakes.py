"""One service of one world as the clairvoyant bound sees it: plain numbers (`agents.bound` has the proof)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pilotage.control.guard import Guard
from pilotage.engine.cluster import Cluster
from pilotage.engine.nodes import NODE_DRAWS
from pilotage.engine.numbers import room
from pilotage.engine.relaxation import demands_of, draws_at, least_work, patience_of, priced_work
from pilotage.scenario import Scenario
from pilotage.world.pools import Pool
from pilotage.world.servers import Law, Variant, log_normal_table
from pilotage.world.services import Service

CELL = 0.25  # fraction of a replica, where several pools are mixed


@dataclass(frozen=True, slots=True)
class StartUps:
    """What replicas pay before they count, in seconds; `drawn_s` gives the first start-up times, if they are known."""

    usd_per_s: float
    expected_s: float
    least_s: float
    free_s: float  # the part of a start-up that is paid for by the ticks in which the replica counts
    rounded_to_s: float  # the distance of decisions; 0 if they come at any time
    pause_s: float  # the least time from an order to a release
    drawn_s: Callable[[int], np.ndarray] | None

    def paid_s(self, start_up_s: np.ndarray | float) -> np.ndarray:
        """Seconds paid for before a replica that takes so long to start counts."""
        paid_s = np.maximum(np.asarray(start_up_s) - self.free_s, 0.0)
        if self.rounded_to_s > 0:
            whole_s = self.rounded_to_s * (np.floor(paid_s / self.rounded_to_s - 1e-9) + 1)
            return np.where(start_up_s >= self.free_s, whole_s, 0.0)
        return paid_s


@dataclass(frozen=True, slots=True)
class Problem:
    """One service of one world as numbers: what each request needs, and what capacity costs per tick."""

    arrival_s: np.ndarray
    work_s: np.ndarray
    expected_s: np.ndarray  # work with the mean noise
    objective_s: float
    levels_speed: np.ndarray
    levels_usd: np.ndarray
    miss_usd: float
    requests_usd: float  # what they cost even if they are served in time
    initial: int
    low: int  # the level that is paid for in any case
    rent_usd: float  # and what that costs in all
    by_work_usd: float | None  # what the requests cost at least, where capacity cannot be charged by the tick
    deducted_usd: float  # for every initial replica
    due_s: float  # requests from here on may end the run in flight
    start_ups: StartUps


def problem_of(cluster: Cluster, s: int, ticks_s: Sequence[float], guard: Guard | None) -> Problem:
    scenario = cluster.scenario
    service, tick_s = scenario.services[s], scenario.tick_s
    server, money = service.server, service.economics
    horizon_s = scenario.ticks * tick_s
    multiples = [t / tick_s for t in ticks_s]
    anytime = any(abs(m - round(m)) > 1e-9 or m < 1 for m in multiples)
    arrival_s = cluster.arrivals(0, s)
    demand = demands_of(service.demand.table(), np.uint64(cluster.seeds(0, s)["seed_demand"]), len(arrival_s))
    builds = [
        (variant, scenario.pool_by_name[name])
        for variant in service.variants
        for name in service.pools
        if name in variant.latency
    ]
    pools = [pool for _, pool in builds]
    objective_s = service.slo_s - min(pool.network_ms for pool in pools) / 1e3
    works, expected = [], []
    for variant, pool in builds:
        law = variant.latency[pool.name]
        fixed, variable = law.batch_times_s(server.max_batch)
        expected.append(least_work(demand, fixed, variable, 1.0))
        works.append(expected[-1] * log_normal_table(law.noise_cv)[0])
    dying = bool(scenario.outages or scenario.random_outages)
    dying = dying or any(pool.crashes_per_hour > 0 or pool.spot for pool in pools)
    calm = not dying and service.crashes_per_hour == 0
    if calm and len(builds) == 1 and server.routing == "central":
        law = builds[0][0].latency[pools[0].name]
        priced = _priced_work(cluster, s, law, arrival_s, demand, objective_s, ticks_s)
        works = [max(works[0], priced, key=np.sum)]
    tick_usd = [_least_usd_per_s(cluster, s, *build) * tick_s for build in builds]
    slots = server.batches_in_flight
    least_s = min(_least_start_up_s(*build) for build in builds)
    spread = 1 if least_s >= objective_s else 1 + int(np.ceil(objective_s / tick_s))
    free_s = tick_s + objective_s if spread == 1 else np.inf

    miss = min(money.late_usd, money.dropped_usd)
    error = (1 - max(variant.accuracy for variant in service.variants)) * money.error_usd
    due_s = horizon_s - service.slo_s - 1e-9
    judged = int(np.searchsorted(arrival_s, due_s))
    own = calm and _has_pool_to_itself(scenario, service)
    most = min(
        pools[0].max_nodes, 2 * service.max_replicas + 8
    )  # replicas in any state, draining ones included
    low = guard.limits(cluster.situation(0, s))[0] if guard and own else 0
    low = low if 2 * low <= most else 0
    rent_usd = low * tick_usd[0] * scenario.ticks
    if spread > 1 or max(multiples) > 1 + 1e-9:
        low = 0
    by_work_usd, deducted_usd = None, 0.0
    if anytime or dying:
        free_s += tick_s
        if least_s >= (free_s if anytime else free_s - tick_s):
            deducted_usd = max(tick_usd)
        else:
            cheapest_usd = [w * usd / (slots * tick_s) for w, usd in zip(works, tick_usd, strict=True)]
            extra_usd = max(0.0, miss - error)
            by_work_usd = float(np.minimum(np.min(cheapest_usd, axis=0), extra_usd)[:judged].sum())
    replicas = room(scenario, service)
    if len(builds) == 1:
        count = np.arange(replicas + 1)
        speeds = count * float(slots)
        usd = np.minimum(count, most - low if low else replicas) * tick_usd[0] / spread
    else:
        relative = [float(np.max(works[0] / w)) if len(w) else 1.0 for w in works]
        per_speed = min(usd / r for usd, r in zip(tick_usd, relative, strict=True))
        cells = np.arange(int(np.ceil(replicas * max(relative) / CELL)) + 1)
        speeds, usd = (cells + 1) * CELL * slots, cells * CELL * per_speed / spread
        free_s = np.inf
    known = own and len(scenario.services) == 1 and pools[0].idle_removal_s == 0
    return Problem(
        arrival_s=arrival_s,
        work_s=works[0],
        expected_s=expected[0],
        objective_s=objective_s,
        levels_speed=speeds,
        levels_usd=usd,
        miss_usd=max(0.0, miss - error),
        requests_usd=min(error, miss) * judged,
        initial=service.initial_replicas,
        low=low,
        rent_usd=rent_usd,
        by_work_usd=by_work_usd,
        deducted_usd=deducted_usd,
        due_s=due_s,
        start_ups=StartUps(
            usd_per_s=tick_usd[0] / tick_s,
            expected_s=pools[0].boot_s + builds[0][0].start_up_s,
            least_s=least_s,
            free_s=free_s,
            rounded_to_s=0.0 if anytime else tick_s,
            pause_s=min(ticks_s),
            drawn_s=_start_ups(cluster, min(service.initial_replicas, most)) if known else None,
        ),
    )


def _priced_work(
    cluster: Cluster,
    s: int,
    law: Law,
    arrival_s: np.ndarray,
    demand: np.ndarray,
    objective_s: float,
    ticks_s: Sequence[float],
) -> np.ndarray:
    """The work of the requests of a central queue, in which the noise of every batch is known."""
    service, seeds = cluster.scenario.services[s], cluster.seeds(0, s)
    server = service.server
    numbers = np.arange(len(arrival_s))
    noise = draws_at(log_normal_table(law.noise_cv), np.uint64(seeds["seed_noise"]), numbers)
    timeout_s = server.request_timeout_s or np.inf
    stays = np.ones(len(arrival_s), bool)
    if server.patience_s:
        stays = patience_of(np.uint64(seeds["seed_patience"]), len(arrival_s), server.patience_s) > timeout_s
    if server.queue_limit:
        for tick_s in ticks_s:  # the dead are swept at ticks
            swept_s = np.floor(arrival_s / tick_s - 1e-6) * tick_s - timeout_s - 1e-6
            inside = numbers - np.searchsorted(arrival_s, swept_s) + server.max_batch
            stays &= inside < server.queue_limit
    if 2 * np.count_nonzero(stays) <= len(stays):  # the search for the first of a batch would be long
        return np.zeros(len(arrival_s))
    fixed, variable = law.batch_times_s(server.max_batch)
    return priced_work(arrival_s, demand, noise, stays, fixed, variable, objective_s, timeout_s)


def _has_pool_to_itself(scenario: Scenario, service: Service) -> bool:
    """Whether a replica of the service is a node of one pool, in which there are no others and all come up."""
    if len(service.variants) > 1 or len(service.pools) > 1:
        return False
    pool = scenario.pool_by_name[service.pools[0]]
    shared = any(pool.name in other.pools for other in scenario.services if other is not service)
    return pool.node is None and pool.provisioning_failure == 0 and not shared


def _least_usd_per_s(cluster: Cluster, s: int, variant: Variant, pool: Pool) -> float:
    """What one replica costs at least per second: its share of the pool's scarcest resource."""
    scenario = cluster.scenario
    p = scenario.pools.index(pool)
    usd_per_s = float(cluster.numbers.pools[p]["usd_per_s"])
    if pool.node is None or variant.resources is None:
        return usd_per_s
    has = np.array(pool.node.vector)
    wanted = np.zeros(len(has))
    for service in scenario.services:
        if pool.name in service.pools:
            for other in service.variants:
                wanted += has if other.resources is None else np.array(other.resources.vector)
    shares = np.divide(wanted, has, out=np.zeros(len(has)), where=has > 0)
    scarcest = int(np.argmax(shares))
    return usd_per_s * variant.resources.vector[scarcest] / has[scarcest] if has[scarcest] > 0 else 0.0


def _least_start_up_s(variant: Variant, pool: Pool) -> float:
    """The least time from an order to readiness."""
    mean_s, load = variant.load_law()
    if pool.node is not None or pool.idle_removal_s > 0:  # a node may be up, and have run it before
        return mean_s * load[0] * variant.warm_load_share
    pull_s = variant.image_pull_s * log_normal_table(variant.image_pull_cv)[0]
    return pool.boot_s * log_normal_table(pool.boot_cv)[0] + pull_s + mean_s * load[0]


def _start_ups(cluster: Cluster, first: int) -> Callable[[int], np.ndarray]:
    """The start-up times of the replicas that are placed from number `first` on, where each has a node to itself."""
    service = cluster.scenario.services[0]
    variant, pool = service.variants[0], cluster.scenario.pool_by_name[service.pools[0]]
    load_s, load = variant.load_law()
    starts, nodes = np.uint64(cluster.seeds(0, 0)["seed_start"]), np.uint64(cluster.seed_nodes(0))

    def drawn_s(count: int) -> np.ndarray:
        number = np.arange(first, first + count)
        boot = draws_at(log_normal_table(pool.boot_cv), nodes, NODE_DRAWS * number)
        pull = draws_at(log_normal_table(variant.image_pull_cv), starts, 4 * number)
        total: np.ndarray = pool.boot_s * boot + variant.image_pull_s * pull
        return total + load_s * draws_at(load, starts, 4 * number + 1)

    return drawn_s
