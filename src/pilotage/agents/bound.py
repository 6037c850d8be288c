"""The clairvoyant bound: a strict lower bound on any policy's cost, and a schedule that brackets it.

**Claim.** For a run of the engine with known traffic, no sequence of decisions costs less than `lower_usd`; behind a
guard, none that the guard lets through.

*Items.* Take one service and one request whose deadline (arrival plus objective) lies within the run. Served
in time it costs e = (1 - accuracy) error_usd; otherwise it is served late, dropped, or overdue at the end,
and costs at least m = min(late_usd, dropped_usd). So it costs at least min(e, m), and at least
c = max(0, m - e) more if it is missed. Requests with a later deadline cost at least 0.

*Work.* A batch of n requests with demands x_i lasts noise (fixed[n] + variable[n] mean(x)), the sum over its
requests of noise (fixed[n] + variable[n] x_i) / n. With the law's least noise, request i therefore occupies
one execution slot for at least w_i = min over n of its term, whatever the batches are: this is what makes the
bound strict although the number served is not monotone in the backlog. All of it lies between the request's
arrival and, if served in time, its deadline.

*Work in one queue.* With one central queue, one build, and no replica that dies with its work, more is known. Batches
are taken in order of arrival, and the noise of a batch is a draw that belongs to its first request. A request may be
missing between the first and the last of a batch only if it was rejected, or was dead when the batch began; if it had
timed out, so had the first, so its patience was shorter than the timeout. Nobody is rejected who finds fewer than
`queue_limit` requests; those inside came after the last tick's sweep less the timeout, but for those of one open batch.
All requests that can for neither reason be missing *stay*. Let b(n, X) be the least time, but for noise, of a batch
in which n requests have the demand X: the minimum over m >= n of fixed[m] + variable[m] (X + (m - n) x) / m, where x is
the least demand if all stay, and 0 otherwise. It falls with neither n nor X. Put P(0) = 0, and for the i-th request,
if it stays, P(i) = min over h of P(max(h, g)) + noise(h) b(n, X), where h may be the first of a batch with i, n and X
are of those between them that stay, and g is the first request that can be in time in a batch with i at all; otherwise
P(i) = P(i - 1). P ascends. Then w_i = P(i) - P(i - 1) will do: those of a batch from h to i that are in time and stay
come from max(h, g) on, so that their sum is at most P(i) - P(max(h, g)), and the batch lasts no less. A request that
does not stay has the least noise of those that may be first, times its own part of the demand's time, which all in a
batch have beside b. So P is a shortest path through the ways of cutting the arrivals into batches. At low load it
knows, too, that few are there to share a batch.

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
n_k costs at least n_k price tick. Before the first interval in which it counts, it was paid for `boot`, at least the
least multiple of the tick that exceeds u - tick - objective (initial replicas excepted). These times are
disjoint, so sum over k of n_k price tick + c M_k(n_k) + (n_k - n_k-1)+ price boot is a lower bound for the
n_k that happened, and its minimum over all sequences, found by dynamic programming, is one for every policy.
If u < objective, a node may be ordered up to ceil(objective / tick) ticks later and count; then the largest
count in so many ticks is charged at that fraction of the price, because every node-tick is counted at most so
often. Billing minima and granules, minimum lifetimes, network time, slow nodes, interference, lost and retried work
and capacity shared between services only raise costs, and are left out or (network time) shorten the objective.

*Decisions at any time.* A policy may decide at another pace than the scenario's ticks, which then are only the
intervals of this proof. Let every replica that counts in interval k be charged for the interval before it: it is paid
for all of that, for it is not released before t_k, if u >= 2 ticks + objective, so that it was ordered by then. What is
paid before is then at least u - 2 ticks - objective, unrounded; and what is charged before the run began, a tick for
every initial replica, is taken off the bound. If u is smaller, see *Faults*.

*Known start-ups.* Where every replica has a node to itself, the j-th to be placed has a start-up time u_j that does not
depend on decisions, and pays p_j before it counts. One that is placed and never counts, or counts without being
charged for its start, pays at least s_j = min(p_j, time between decisions). So starts may be charged b each, if the
most that the sum of max(b - p_j, -s_j) comes to over the first replicas, however many are placed, is taken off once.
They are not more than a number that costs more than the bound itself.

*Least replicas.* A guard sees to it at every decision that at least `low` replicas are ordered. Where the service has
its pool to itself, they are on nodes and paid for, or all R places (nodes, or replicas the engine keeps) are taken, by
v < low of them and by R - v that drain and were paid for since the last decision. If at most R - low are charged in
any tick for those that count, what they leave, low - v, makes up for what is missing after it: those that start at the
time and count later are among the v. So `low` is paid for at any time, and m_k = max(n_k, low) takes the place of
n_k: where n_k + (those that start) is above low, it is paid for as before. Else it is to be shown that no more starts
are charged, (m_j - m_j-1)+, than there are above low. Before the first such j, m = low; so of those that start by j
low - n_k fill up what is missing at k and are not charged. But then those that are placed and never count may be among
the low, so that s_j = 0. The greater of this bound and of the one without `low` is taken. If somebody
decides less often than every tick, or start-up is short, rent for `low` is all that is charged for it.

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

from pilotage.agents.stakes import CELL, Problem, problem_of
from pilotage.control.guard import Guard
from pilotage.control.policy import Policy
from pilotage.control.scaling import Schedule
from pilotage.engine.cluster import Cluster, World
from pilotage.engine.relaxation import cheapest, missed_table
from pilotage.engine.run import Run, simulate, tick_of
from pilotage.scenario import Scenario
from pilotage.world.services import Service
from pilotage.world.spec import SpecError

_MOST_DRAWS = 1_000_000
_ROUNDING = 1e-9  # dollars add up in another order here than in the engine, and the bound may be met exactly
# (expected work multiplied by, objective multiplied by) of the schedules that are tried
_CANDIDATES = (
    *((0.95, 1), (1.05, 1), (1.15, 1), (1.3, 1), (1.5, 1), (1.75, 1), (2.3, 1)),
    *((1.05, 0.5), (1.2, 0.5)),
)


@dataclass(frozen=True, slots=True)
class Bound:
    """`lower_usd` <= cost of every policy; `schedule` is a run that knew the future, and costs no less."""

    lower_usd: float
    schedule: Run


def bound(
    scenario: Scenario, world: World, policies: Sequence[Policy] = (), *, guard: Guard | None = None
) -> Bound:
    """Brackets the least possible cost of one run. Takes seconds for a day of one service.

    The lower bound holds for all that decide at the scenario's ticks, and for `policies` at their own; it is lower
    where one of them decides between the scenario's ticks. With a guard it holds for what runs behind that guard, and
    is higher. Raises SpecError for a scenario with an LLM service, of which no bound is known.
    """
    for service in scenario.services:
        if service.llm is not None:
            raise SpecError(
                f"service {service.name!r} is an LLM service, for which there is no bound; leave it out"
            )
    cluster = Cluster(scenario, [world])
    ticks_s = [scenario.tick_s, *(tick_of(scenario, policy) for policy in policies)]
    problems = [problem_of(cluster, s, ticks_s, guard) for s in range(len(scenario.services))]
    lower = sum(_lower(scenario, problem) for problem in problems)
    schedules = []
    for work, objective in _CANDIDATES:
        plans = [
            _plan(
                _costs(scenario, harder),
                harder,
                harder.low,
                float(harder.start_ups.paid_s(harder.start_ups.expected_s)),
            )[1]
            for p in problems
            for harder in [replace(p, work_s=p.expected_s * work, objective_s=p.objective_s * objective)]
        ]
        schedules.append(
            [
                Schedule(targets=tuple(_ahead(scenario, service, plan)))
                for service, plan in zip(scenario.services, plans, strict=True)
            ]
        )
    runs = simulate(scenario, schedules, [world] * len(schedules), guard=guard, label="clairvoyant schedule")
    return Bound(
        lower_usd=float(lower - _ROUNDING * abs(lower)), schedule=min(runs, key=lambda run: run.total_usd)
    )


def _costs(scenario: Scenario, problem: Problem) -> np.ndarray:
    """What every level costs in every interval, with what is missed at least; shape (intervals, levels)."""
    work_s = problem.work_s
    edges = np.arange(scenario.ticks + 1) * scenario.tick_s
    busiest = np.histogram(problem.arrival_s, edges, weights=work_s)[0].max(initial=0.0)
    # more speed than twice the busiest tick's work, on top of its worst second, cannot pay
    seconds = np.arange(int(edges[-1]) + 2)
    worst = np.histogram(problem.arrival_s, seconds, weights=work_s)[0].max(initial=0.0)
    enough = max(2 * busiest / scenario.tick_s, worst / min(1.0, problem.objective_s))
    top = max(int(np.searchsorted(problem.levels_speed, enough)), problem.low) + 2
    top = min(top, len(problem.levels_speed))
    levels, usd = problem.levels_speed[:top], problem.levels_usd[:top]
    most = len(problem.arrival_s)
    if problem.miss_usd > 0:  # giving up more than this costs more than the highest level
        most = min(most, int(np.ceil(usd[-1] / problem.miss_usd)) + 1)
    missed = missed_table(problem.arrival_s, work_s, problem.objective_s, edges, problem.due_s, levels, most)
    cost: np.ndarray = usd + problem.miss_usd * missed
    if top < len(problem.levels_speed):
        # levels above the top are no cheaper than the top one without its missed requests
        cost[:, -1] = usd[-1]
    return cost


def _plan(costs: np.ndarray, problem: Problem, low: int, paid_s: float) -> tuple[float, np.ndarray]:
    """The least cost over all sequences of levels from `low` on, and the sequence; start-ups are paid for `paid_s`."""
    initial = max(problem.initial - low, 0)
    usd, levels = cheapest(costs[:, low:], paid_s * problem.start_ups.usd_per_s, initial)
    return usd - problem.deducted_usd * initial, levels + low


def _lower(scenario: Scenario, problem: Problem) -> float:
    """The greatest of the lower bounds on what one service costs."""
    usd = problem.by_work_usd
    if usd is None:
        costs, paid_s = _costs(scenario, problem), problem.start_ups.paid_s(problem.start_ups.least_s)
        usd = max(_plan(costs, problem, low, float(paid_s))[0] for low in {0, problem.low})
        if problem.start_ups.drawn_s is not None and problem.start_ups.usd_per_s > 0:
            usd = max(usd, _with_known_start_ups(costs, problem))
    return max(usd, problem.rent_usd) + problem.requests_usd


def _with_known_start_ups(costs: np.ndarray, problem: Problem) -> float:
    """The same, with the start-up time that each replica will have, in the order in which they are placed."""
    of = problem.start_ups
    assert of.drawn_s is not None
    ceiling_usd, path = _plan(costs, problem, problem.low, float(of.paid_s(of.expected_s)))
    placed = ceiling_usd / (of.pause_s * of.usd_per_s)  # who places more, costs more
    if not 0 <= placed <= _MOST_DRAWS:
        return -np.inf
    paid_s = of.paid_s(of.drawn_s(int(placed) + 1))
    steps = np.maximum(np.diff(path), 0).sum()
    found = -np.inf
    for low in {0, problem.low}:
        unused_s = np.minimum(paid_s, of.pause_s if low == 0 else 0.0)
        charged_s = np.linspace(paid_s.min(), paid_s.mean(), 33)
        owed_s = np.array([max(np.cumsum(np.maximum(c - paid_s, -unused_s)).max(), 0.0) for c in charged_s])
        k = np.argmax(charged_s * steps - owed_s)
        usd = _plan(costs, problem, low, charged_s[k])[0] - owed_s[k] * of.usd_per_s
        found = max(found, min(usd, ceiling_usd))
    return found


def _ahead(scenario: Scenario, service: Service, counts: np.ndarray) -> np.ndarray:
    """Targets that have the wanted replicas ready: the most wanted between now and one start-up later."""
    if len(service.pools) > 1:  # levels are fractions of a replica of the first pool
        counts = np.ceil((counts + 1) * CELL).astype(np.int64)
    pool = scenario.pool_by_name[service.pools[0]]
    lead = int(np.ceil((pool.boot_s + service.variants[0].start_up_s) / scenario.tick_s))
    padded = np.r_[counts, np.full(lead, counts[-1])]
    return np.lib.stride_tricks.sliding_window_view(padded, lead + 1).max(axis=1)
