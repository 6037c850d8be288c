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
from pilotage.control.policy import Controller, Decision, Observation, Policy, Situation
from pilotage.control.scaling import Schedule
from pilotage.engine.cluster import World
from pilotage.engine.relaxation import cheapest, least_missed, priced_work
from pilotage.engine.run import at_tick, bill, simulate
from pilotage.scenario import Scenario, load
from pilotage.world.pools import Pool
from pilotage.world.servers import Affine, BatchServer, Constant, LogNormal, Table
from pilotage.world.services import Economics
from tests import strategies
from tests.strategies import Times, cases, one_of


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


class Erratic(Policy, frozen=True, kw_only=True, tag="erratic"):
    """Orders, releases and limits batches at random, about as much as it likes, at its own pace."""

    seed: int
    restless: float
    period: float

    def period_s(self) -> float:
        return self.period

    def begin(self, situation: Situation) -> Controller:
        return _Erratic(self, np.random.default_rng(self.seed))


class _Erratic:
    def __init__(self, policy: Erratic, rng: np.random.Generator) -> None:
        self._policy, self._rng = policy, rng

    def decide(self, seen: Observation) -> Decision:
        acts = self._rng.random(3) < self._policy.restless
        order, release, size = np.where(acts, self._rng.integers(1, 4, 3), 0).tolist()
        return Decision(order, release, max_batch=size or None)


@st.composite
def central(draw):
    """A service with one queue, a pool to itself and all that the sharper parts of the bound speak of."""
    most = draw(one_of(1, 2, 3, 5))
    noise_cv = draw(one_of(0.0, 0.3, 1.0))
    law = draw(
        one_of(
            Affine(
                base_ms=draw(one_of(0.0, 60.0, 300.0)),
                per_item_ms=draw(one_of(30.0, 125.0)),
                noise_cv=noise_cv,
            ),
            Table(batch_ms=(250.0, 125.0, 400.0, 300.0, 900.0)[:most], noise_cv=noise_cv),
        )
    )
    server = BatchServer(
        max_batch=most,
        batch_wait_ms=draw(one_of(0.0, 125.0, 400.0)),
        former=draw(one_of("late-binding", "closed")),
        batches_in_flight=draw(one_of(1, 1, 2)),
        queue_limit=draw(one_of(None, None, 1, 4, 12)),
        request_timeout_s=draw(one_of(None, 0.25, 1.0, 1.0)),
        patience_s=draw(one_of(None, 0.5, 8.0)),
    )
    pool = Pool(
        name="cpu",
        price_usd_per_hour=draw(one_of(3.6, 36.0)),
        boot_s=draw(one_of(0.0, 1.7, 6.0)),
        boot_cv=draw(one_of(0.0, 0.5)),
        max_nodes=draw(one_of(1, 2, 3, 6)),
        idle_removal_s=draw(one_of(0.0, 0.0, 0.8)),
    )
    service = strategies.service(
        law=law,
        load_s=draw(one_of(0.0, 0.5)),
        load_cv=0.4,
        slo_ms=draw(one_of(187.5, 500.0, 1000.0)),
        server=server,
        economics=Economics(late_usd=draw(one_of(0.003, 0.03)), dropped_usd=0.02),
        demand=draw(one_of(Constant(), LogNormal(cv=1.0))),
        min_replicas=draw(st.integers(0, pool.max_nodes)),
        max_replicas=max(pool.max_nodes, draw(one_of(3, 100))),
        initial_replicas=draw(st.integers(0, 3)),
    )
    return strategies.scenario(
        [service], [pool], tick_s=draw(one_of(0.25, 0.5, 1.0)), ticks=draw(st.integers(4, 24))
    )


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    scenario=central(),
    data=st.data(),
    seed=st.integers(0, 2**31),
    pace=one_of(1.0, 1.0, 2.0, 0.5, 0.4, 1.5),
    guarded=st.booleans(),
)
def test_nor_does_any_of_many_policies_with_one_queue(scenario, data, seed, pace, guarded) -> None:
    horizon_s = scenario.ticks * scenario.tick_s
    world = World(seed, traffic=(Times(data.draw(strategies.times(horizon_s))),))
    period = pace * scenario.tick_s
    policies = [Erratic(seed=k, restless=(0.0, 0.1, 0.3, 0.7)[k % 4], period=period) for k in range(8)]
    guard = Guard() if guarded else None
    rng = np.random.default_rng(seed)
    plans = [Schedule(targets=(n,) * scenario.ticks) for n in range(4)]
    plans += [Schedule(targets=tuple(rng.integers(0, 4, scenario.ticks).tolist())) for _ in range(8)]
    plans += [
        Schedule(targets=tuple(np.repeat(rng.integers(0, 4, 8), 3)[: scenario.ticks].tolist()))
        for _ in range(8)
    ]
    for mine in (policies, plans):
        bracket = bound(scenario, world, mine, guard=guard)
        runs = simulate(scenario, mine, [world] * len(mine), guard=guard)
        least_usd = min(run.total_usd for run in runs)
        assert bracket.lower_usd <= least_usd * (1 + 1e-9) + 1e-9
        if mine is plans:
            assert bracket.lower_usd <= bracket.schedule.total_usd * (1 + 1e-9) + 1e-9


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(scenario=central(), data=st.data(), seed=st.integers(0, 2**31), guarded=st.booleans())
def test_nor_does_any_schedule_of_few_ticks(scenario, data, seed, guarded) -> None:
    ticks = 5
    scenario = scenario.replace(horizon_h=ticks * scenario.tick_s / 3600)
    world = World(seed, traffic=(Times(data.draw(strategies.times(ticks * scenario.tick_s))),))
    plans = [Schedule(targets=targets) for targets in itertools.product(range(3), repeat=ticks)]
    guard = Guard() if guarded else None
    runs = simulate(scenario, plans, [world] * len(plans), guard=guard)
    bracket = bound(scenario, world, guard=guard)
    assert bracket.lower_usd <= min(run.total_usd for run in runs) * (1 + 1e-9) + 1e-9


@settings(max_examples=300, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_no_batch_lasts_less_than_its_requests_in_time_are_said_to_take(data, seed) -> None:
    rng = np.random.default_rng(seed)
    count, most = int(rng.integers(1, 40)), int(rng.integers(1, 6))
    arrival = np.sort(rng.uniform(0, data.draw(one_of(1.0, 5.0, 30.0)), count))
    demand = rng.lognormal(0, data.draw(one_of(0.0, 1.0)), count)
    noise = rng.lognormal(0, data.draw(one_of(0.0, 0.5)), count)
    stays = rng.random(count) < data.draw(one_of(1.0, 0.8, 0.5))
    fixed, variable = rng.uniform(0, 0.5, (2, most + 1)) * data.draw(one_of((1, 1), (0, 1), (1, 0)))[0]
    variable = variable + 0.01
    if data.draw(st.booleans()):  # as an affine law has it
        fixed[:], variable = fixed[0], variable[0] * np.arange(most + 1)
    slo_s, timeout_s = data.draw(one_of(0.5, 1.0, 3.0)), data.draw(one_of(0.5, 2.0, np.inf))
    work = priced_work(arrival, demand, noise, stays, fixed, variable, slo_s, timeout_s)
    assert (work >= 0).all()
    for first in range(count):
        for _ in range(20):
            size, dead = int(rng.integers(1, most + 1)), rng.random(count) < rng.random()
            batch = [first, *(i for i in range(first + 1, count) if stays[i] or not dead[i])][:size]
            start_s = arrival[batch[-1]] + rng.choice([0.0, rng.uniform(0, slo_s)])
            if start_s - arrival[first] > timeout_s:
                continue
            n = len(batch)
            end_s = start_s + noise[first] * (fixed[n] + variable[n] * demand[batch].mean())
            in_time = [i for i in batch if arrival[i] + slo_s >= end_s]
            assert work[in_time].sum() <= end_s - start_s + 1e-7


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), initial=st.integers(0, 3), step=st.sampled_from([0.0, 0.5, 3.0]))
def test_the_cheapest_sequence_is_the_one_found_by_trying_all(seed, initial, step) -> None:
    cost = np.random.default_rng(seed).integers(0, 9, (5, 3)).astype(float)

    def usd(path: tuple[int, ...]) -> float:
        ups = np.maximum(np.diff([initial, *path]), 0).sum()
        return float(cost[np.arange(5), path].sum() + step * ups)

    found, path = cheapest(cost, step, initial)
    assert found == usd(tuple(path)) == min(map(usd, itertools.product(range(3), repeat=5)))
