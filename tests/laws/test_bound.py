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
from pilotage.control.policy import Policy
from pilotage.control.scaling import Schedule
from pilotage.engine.cluster import World
from pilotage.engine.relaxation import least_missed
from pilotage.engine.run import at_tick, bill, simulate
from pilotage.scenario import Scenario, load
from pilotage.world.services import Economics
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


class Paced(Policy, frozen=True, kw_only=True, tag="paced"):
    """Stands for all that decide every so often."""

    period: float

    def period_s(self) -> float:
        return self.period


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), ticks=st.integers(1, 6))
def test_nor_does_one_that_decides_between_the_ticks_of_the_bound(case, ticks) -> None:
    cluster = case.cluster()
    for orders in case.orders:
        cluster.advance(orders)
    cluster.finish()
    cost = bill(cluster.totals, case.scenario).sum(axis=(1, 2))
    horizon_s = case.scenario.ticks * case.scenario.tick_s
    coarser = at_tick(case.scenario, horizon_s / min(ticks, case.scenario.ticks))
    for w, (seed, times) in enumerate(zip(case.seeds, case.times, strict=True)):
        world = World(seed, traffic=tuple(map(Times, times)))
        bracket = bound(coarser, world, [Paced(period=case.scenario.tick_s)])
        assert bracket.lower_usd <= cost[w] * (1 + 1e-9) + 1e-9


START_UP_S = 40


def just_in_time(tick_s: float, requests_s: list[float]) -> tuple[Scenario, World, Schedule]:
    """A replica for every request, ready a moment before it comes and gone a moment after, and what each is worth."""
    one = load("quickstart")
    pool = one.pools[0].replace(boot_s=float(START_UP_S), boot_cv=0.0)
    variant = one.services[0].variants[0].replace(load_s=0.0, load_cv=0.0)
    service = one.services[0].replace(
        variants=(variant,),
        min_replicas=0,
        initial_replicas=0,
        economics=Economics(late_usd=1, dropped_usd=1),
    )
    scenario = one.replace(start_h=0.0, horizon_h=0.1, history_h=0.0, pools=(pool,), services=(service,))
    targets = np.zeros(round(360 / tick_s), int)
    for at_s in requests_s:
        begin = max(0, int((at_s - START_UP_S - 0.01) / tick_s))
        targets[begin : int((at_s + 0.5) / tick_s) + 1] += 1
    return scenario, World(0, traffic=(Times(requests_s),)), Schedule(targets=tuple(targets.tolist()))


@settings(max_examples=60, deadline=None)
@given(
    requests_s=st.lists(st.floats(45, 355), min_size=1, max_size=4).map(sorted),
    tick_s=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
)
def test_nor_does_one_that_releases_as_soon_as_it_can(requests_s, tick_s) -> None:
    scenario, world, schedule = just_in_time(tick_s, requests_s)
    lower = bound(scenario, world, [Paced(period=tick_s)]).lower_usd
    run = simulate(at_tick(scenario, tick_s), [schedule], [world])[0]
    assert 0 < lower <= run.total_usd


def test_without_knowing_of_it_the_bound_would_be_too_high() -> None:
    scenario, world, schedule = just_in_time(1.0, [46.2])
    run = simulate(at_tick(scenario, 1.0), [schedule], [world])[0]
    assert run.totals["served"].sum() == 1
    assert run.total_usd == pytest.approx(41 / 3600 * 1.2)
    assert bound(scenario, world).lower_usd == pytest.approx(45 / 3600 * 1.2)  # three ticks of 15 s
    assert bound(scenario, world, [Paced(period=1.0)]).lower_usd == pytest.approx(
        (40 - 0.75 - 15) / 3600 * 1.2
    )


@pytest.mark.parametrize("env", ["quickstart", "flash-crowd", "steady", "sparse"])
def test_no_policy_costs_less_than_the_bound(env: str) -> None:
    scenario = load(env).replace(horizon_h=1.0)
    policies = [
        policy_from(p)
        for p in (
            *("static:replicas=1", "static:replicas=3", "hpa", "staffing", "predictive"),
            *("kpa", "keda", "ray-serve", "inferline", "mark", "sageserve", "wva"),
        )
    ]
    world = World(5)
    bracket = bound(scenario, world, policies)
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
