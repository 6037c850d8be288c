"""Law 9: the clairvoyant lower bound is at most the cost of every policy, and of any sequence of decisions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotage.agents.bound import bound
from pilotage.control.guard import Guard
from pilotage.control.learned import policy_from
from pilotage.engine.cluster import World
from pilotage.engine.relaxation import least_missed
from pilotage.engine.run import bill, simulate
from pilotage.scenario import load
from tests.strategies import Times, cases


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_no_sequence_of_decisions_costs_less_than_the_bound(case) -> None:
    cluster = case.cluster()
    for orders in case.orders:
        cluster.advance(orders)
    cluster.finish()
    cost = bill(cluster.totals, case.scenario).sum(axis=(1, 2))
    for w, (seed, times) in enumerate(zip(case.seeds, case.times, strict=True)):
        world = World(seed, traffic=tuple(map(Times, times)))
        bracket = bound(case.scenario, world)
        assert bracket.lower_usd <= cost[w] * (1 + 1e-9) + 1e-9
        assert bracket.lower_usd <= bracket.schedule.total_usd * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("env", ["quickstart", "flash-crowd", "steady", "sparse"])
def test_no_policy_costs_less_than_the_bound(env: str) -> None:
    scenario = load(env).replace(horizon_h=1.0)
    policies = [
        policy_from(p) for p in ("static:replicas=1", "static:replicas=3", "hpa", "staffing", "predictive")
    ]
    world = World(5)
    bracket = bound(scenario, world)
    runs = simulate(scenario, policies, [world] * len(policies), guard=Guard())
    assert bracket.lower_usd > 0
    assert bracket.lower_usd <= min(run.total_usd for run in runs)
    assert bracket.lower_usd <= bracket.schedule.total_usd


@settings(max_examples=300, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.floats(0, 3), st.floats(0.05, 1.5)), min_size=1, max_size=8),
    slo_s=st.floats(0.1, 2),
    speed=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_the_least_number_of_missed_requests_is_the_one_found_by_trying_all_subsets(
    jobs, slo_s, speed
) -> None:
    jobs = sorted(jobs)
    arrival, work = (np.array(column) for column in zip(*jobs, strict=True))

    def feasible(kept: tuple[int, ...]) -> bool:
        clock = 0.0
        for i in kept:
            clock = max(clock, arrival[i]) + work[i] / speed
            if clock > arrival[i] + slo_s + 1e-9:  # the same rounding is forgiven
                return False
        return True

    n = len(jobs)
    best = next(
        missed
        for missed in range(n + 1)
        if any(feasible(kept) for kept in itertools.combinations(range(n), n - missed))
    )
    assert least_missed(arrival, work, slo_s, speed, 0.0, n, np.empty(n + 2)) == best
    assert least_missed(arrival, work, slo_s, speed, 0.0, 1, np.empty(3)) == min(best, 2)
