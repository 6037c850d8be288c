"""The clairvoyant bound: a strict lower bound on any policy's cost, and a schedule that brackets it.

**Claim.** For a run of the engine with known traffic, no sequence of decisions costs less than `lower_usd`.

*Items.* Take one service and one request whose deadline (arrival plus objective) lies within the run. Served
in time it costs e = (1 - accuracy) error_usd; otherwise it is served late, dropped, or overdue at the end,
and costs at least m = min(late_usd, dropped_usd). So it costs at least min(e, m), and at least
c = max(0, m - e) more if it is missed. Requests with a later deadline cost at least 0.

*Work.* A batch of n requests with demands x_i lasts noise (fixed[n] + variable[n] mean(x)), the sum over its
requests of noise (fixed[n] + variable[n] x_i) / n. With the law's least noise, request i therefore occupies
one execution slot for at least w_i = min over n of its term, whatever the batches are: this is what makes the
bound strict although the number served is not monotone in the backlog. All of it lies between the request's
arrival and, if served in time, its deadline.

*Intervals.* Let interval k be one tick, and let n_k be the number of replicas that could start a request which
arrives in it and is served in time. Requests arriving in k that are served in time have all their work done
in [t_k, t_k+1 + objective] by these replicas, so a single server of speed n_k slots, idle at t_k and working
on nothing else, could serve them in time as well, preemptively; since deadlines have the order of arrivals,
it can do so in order of arrival without preemption. Hence at least M_k(n_k) of them are missed, where M_k(n)
is the minimum over subsets computed exactly by `relaxation.least_missed`: f_i(j), the least completion time
of the first i requests with j given up, is min(f_i-1(j - 1), max(f_i-1(j), arrival) + w_i / speed) where the
second is allowed only up to the deadline.

*Money.* Decisions act at ticks. A replica counted in n_k is not released before t_k+1, or it would not take
requests arriving in k after t_k; and it was ordered at a tick from which its start-up, at least u, ends before
t_k+1 + objective. If u >= objective, that tick is t_k or earlier, so the node is paid for all of [t_k, t_k+1):
n_k costs at least n_k price tick. Before the first interval in which it counts, it was paid for at least the
least multiple of the tick that exceeds u - tick - objective (initial replicas excepted). These times are
disjoint, so sum over k of n_k price tick + c M_k(n_k) + (n_k - n_k-1)+ price boot is a lower bound for the
n_k that happened, and its minimum over all sequences, found by dynamic programming, is one for every policy.
If u < objective, a node may be ordered up to ceil(objective / tick) ticks later and count; then the largest
count in so many ticks is charged at that fraction of the price, because every node-tick is counted at most so
often. Billing minima and granules, minimum lifetimes, network time, slow nodes, interference, lost and retried work
and capacity shared between services only raise costs, and are left out or (network time) shorten the objective.

*Decisions at any time.* A policy may decide at another pace than the scenario's ticks, which then are only the
intervals of this proof; all of it holds but two things. A replica may be ordered within a tick: what is paid
before it counts is then at least u - tick - objective, unrounded. And it may be released within a tick, which is
then paid for in part; that is at most one tick less per replica, and is made up for as under *Faults*.

*Shared nodes.* A replica is charged its share of one fixed resource of the pool, the one that the services that
may go there need most: the shares of one resource on a node add up to at most 1, so nothing is charged twice.
Where a node can be had that is up, start-up is only the load from the cache.

*Faults.* A node that dies within a tick is paid for a part of it only; that is at most one tick less per node. If
start-up costs every node at least one tick before it counts, that tick makes up for it: the start-up charge is
reduced by one tick, and the bound by one tick for every initial replica. Otherwise capacity is not charged by the
tick but by the work: a request costs its miss, or the node time of its work.

*Several builds (variants on pools).* Speeds are taken relative to the first build by the most favourable request,
and capacity is bought at the best price per speed in fractions of a replica: level x is charged at the lower end of
its cell and served at the upper end, without start-up cost. Wrong answers are charged at the best accuracy.

**The schedule.** The same programme with more work or a tighter objective, replicas ordered ahead by the start-up
time, gives schedules that know the future; each is run in the engine, and the cheapest is reported.
It is achievable, so the true optimum lies between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pilotage.control.policy import Policy
from pilotage.control.scaling import Schedule
from pilotage.engine.cluster import Cluster, World
from pilotage.engine.numbers import room
from pilotage.engine.relaxation import demands_of, least_work, missed_table
from pilotage.engine.run import Run, simulate, tick_of
from pilotage.scenario import Scenario
from pilotage.world.pools import Pool
from pilotage.world.servers import Variant, log_normal_table
from pilotage.world.services import Service

_CELL = 0.25  # fraction of a replica, where several pools are mixed
# (work multiplied by, objective multiplied by) of the schedules that are tried
_CANDIDATES = ((1.3, 1), (1.4, 1), (1.5, 1), (1.65, 1), (1.85, 1), (2.2, 1), (3.0, 1), (1.4, 0.5), (1.5, 0.5))


@dataclass(frozen=True, slots=True)
class Bound:
    """`lower_usd` <= cost of every policy; `schedule` is a run that knew the future, and costs no less."""

    lower_usd: float
    schedule: Run


@dataclass(frozen=True, slots=True)
class _Problem:
    """One service of one world as numbers: what each request needs, and what capacity costs per tick."""

    arrival_s: np.ndarray
    work_s: np.ndarray
    objective_s: float
    levels_speed: np.ndarray
    levels_usd: np.ndarray
    boot_usd: float
    miss_usd: float
    floor_usd: float
    initial: int
    by_work_usd: float | None  # what the requests cost at least, where capacity cannot be charged by the tick
    due_s: float  # requests from here on may end the run in flight


def bound(scenario: Scenario, world: World, policies: Sequence[Policy] = ()) -> Bound:
    """Brackets the least possible cost of one run. Takes seconds for a day of one service.

    The lower bound holds for all that decide at the scenario's ticks, and for `policies` at their own; it is lower
    where one of them decides between the scenario's ticks.
    """
    cluster = Cluster(scenario, [world])
    multiples = [tick_of(scenario, policy) / scenario.tick_s for policy in policies]
    anytime = any(abs(m - round(m)) > 1e-9 or m < 1 for m in multiples)
    problems = [_problem(cluster, s, anytime) for s in range(len(scenario.services))]
    lower = sum(
        (_solve(scenario, p)[0] if p.by_work_usd is None else p.by_work_usd) + p.floor_usd for p in problems
    )
    schedules = []
    for work, objective in _CANDIDATES:
        harder = [replace(p, work_s=p.work_s * work, objective_s=p.objective_s * objective) for p in problems]
        counts = [_solve(scenario, p)[1] for p in harder]
        schedules.append(
            [
                Schedule(targets=tuple(_ahead(scenario, service, c)))
                for service, c in zip(scenario.services, counts, strict=True)
            ]
        )
    runs = simulate(scenario, schedules, [world] * len(schedules), label="clairvoyant schedule")
    return Bound(lower_usd=float(lower), schedule=min(runs, key=lambda run: run.total_usd))


def _problem(cluster: Cluster, s: int, anytime: bool) -> _Problem:
    scenario = cluster.scenario
    service = scenario.services[s]
    server, money = service.server, service.economics
    horizon_s = scenario.ticks * scenario.tick_s
    arrival_s = cluster.arrivals(0, s)
    demand = demands_of(service.demand.table(), np.uint64(cluster.seeds(0, s)["seed_demand"]), len(arrival_s))
    builds = [
        (variant, scenario.pool_by_name[name])
        for variant in service.variants
        for name in service.pools
        if name in variant.latency
    ]
    pools = [pool for _, pool in builds]
    works = []
    for variant, pool in builds:
        law = variant.latency[pool.name]
        fixed, variable = law.batch_times_s(server.max_batch)
        works.append(least_work(demand, fixed, variable, log_normal_table(law.noise_cv)[0]))
    objective_s = service.slo_s - min(pool.network_ms for pool in pools) / 1e3
    tick_usd = [_least_usd_per_s(cluster, s, *build) * scenario.tick_s for build in builds]
    slots = server.batches_in_flight
    start_up_s = min(_least_start_up_s(*build) for build in builds)
    spread = 1 if start_up_s >= objective_s else 1 + int(np.ceil(objective_s / scenario.tick_s))
    paid_s = start_up_s - scenario.tick_s - objective_s if spread == 1 else -1.0
    paid_ticks = max(paid_s / scenario.tick_s, 0.0)
    if paid_s >= 0 and not anytime:
        paid_ticks = np.floor(paid_ticks) + 1

    miss = min(money.late_usd, money.dropped_usd)
    error = (1 - max(variant.accuracy for variant in service.variants)) * money.error_usd
    extra_usd = max(0.0, miss - error)
    due_s = horizon_s - service.slo_s - 1e-9
    judged = int(np.searchsorted(arrival_s, due_s))
    floor_usd = min(error, miss) * judged
    by_work_usd = None
    dying = bool(scenario.outages or scenario.random_outages)
    if anytime or dying or any(pool.crashes_per_hour > 0 or pool.spot for pool in pools):
        if paid_ticks >= 1:
            paid_ticks -= 1
            floor_usd -= service.initial_replicas * max(tick_usd)
        else:
            cheapest = [w * usd / (slots * scenario.tick_s) for w, usd in zip(works, tick_usd, strict=True)]
            by_work_usd = float(np.minimum(np.min(cheapest, axis=0), extra_usd)[:judged].sum())
    replicas = room(scenario, service)
    boot_usd = 0.0
    if len(builds) == 1:
        speeds = np.arange(replicas + 1) * float(slots)
        usd = np.arange(replicas + 1) * tick_usd[0] / spread
        boot_usd = paid_ticks * tick_usd[0]
    else:
        relative = [float(np.max(works[0] / w)) if len(w) else 1.0 for w in works]
        per_speed = min(usd / r for usd, r in zip(tick_usd, relative, strict=True))
        cells = np.arange(int(np.ceil(replicas * max(relative) / _CELL)) + 1)
        speeds = (cells + 1) * _CELL * slots
        usd = cells * _CELL * per_speed / spread
    return _Problem(
        arrival_s=arrival_s,
        work_s=works[0],
        objective_s=objective_s,
        levels_speed=speeds,
        levels_usd=usd,
        boot_usd=float(boot_usd),
        miss_usd=extra_usd,
        floor_usd=floor_usd,
        initial=service.initial_replicas,
        by_work_usd=by_work_usd,
        due_s=due_s,
    )


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


def _solve(scenario: Scenario, problem: _Problem) -> tuple[float, np.ndarray]:
    """The least cost over all sequences of capacity levels, and the sequence (shape: ticks)."""
    work_s = problem.work_s
    edges = np.arange(scenario.ticks + 1) * scenario.tick_s
    busiest = np.histogram(problem.arrival_s, edges, weights=work_s)[0].max(initial=0.0)
    # more speed than twice the busiest tick's work, on top of its worst second, cannot pay
    seconds = np.arange(int(edges[-1]) + 2)
    worst = np.histogram(problem.arrival_s, seconds, weights=work_s)[0].max(initial=0.0)
    enough = max(2 * busiest / scenario.tick_s, worst / min(1.0, problem.objective_s))
    top = min(int(np.searchsorted(problem.levels_speed, enough)) + 2, len(problem.levels_speed))
    levels, usd = problem.levels_speed[:top], problem.levels_usd[:top]
    most = len(problem.arrival_s)
    if problem.miss_usd > 0:  # giving up more than this costs more than the highest level
        most = min(most, int(np.ceil(usd[-1] / problem.miss_usd)) + 1)
    missed = missed_table(problem.arrival_s, work_s, problem.objective_s, edges, problem.due_s, levels, most)
    cost = usd + problem.miss_usd * missed
    if top < len(problem.levels_speed):
        # levels above the top are no cheaper than the top one without its missed requests
        cost[:, -1] = usd[-1]
    n = np.arange(top)
    step = problem.boot_usd
    best = np.where(n > problem.initial, (n - problem.initial) * step, 0.0) + cost[0]
    choice = np.zeros((scenario.ticks, top), np.int64)
    for k in range(1, scenario.ticks):
        # from n' <= n: pay the step up; from n' >= n: free
        up = best - step * n
        low = np.minimum.accumulate(up)
        low_at = np.maximum.accumulate(np.where(up == low, n, -1))
        high = np.minimum.accumulate(best[::-1])[::-1]
        high_at = top - 1 - np.maximum.accumulate(np.where(best[::-1] == high[::-1], n, -1))[::-1]
        from_below = low + step * n < high
        choice[k] = np.where(from_below, low_at, high_at)
        best = np.where(from_below, low + step * n, high) + cost[k]
    path = np.zeros(scenario.ticks, np.int64)
    path[-1] = int(np.argmin(best))
    for k in range(scenario.ticks - 1, 0, -1):
        path[k - 1] = choice[k, path[k]]
    return float(best.min()), path


def _ahead(scenario: Scenario, service: Service, counts: np.ndarray) -> np.ndarray:
    """Targets that have the wanted replicas ready: the most wanted between now and one start-up later."""
    if len(service.pools) > 1:  # levels are fractions of a replica of the first pool
        counts = np.ceil((counts + 1) * _CELL).astype(np.int64)
    pool = scenario.pool_by_name[service.pools[0]]
    lead = int(np.ceil((pool.boot_s + service.variants[0].start_up_s) / scenario.tick_s))
    padded = np.r_[counts, np.full(lead, counts[-1])]
    return np.lib.stride_tricks.sliding_window_view(padded, lead + 1).max(axis=1)
