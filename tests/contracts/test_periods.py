"""Policies run at their own pace: what changes with it, and what must not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pilotage.agents.bound import bound
from pilotage.control.guard import Guard
from pilotage.control.hpa import Hpa
from pilotage.control.kpa import Kpa
from pilotage.control.policy import (
    FEATURES,
    INDEX,
    Controller,
    Decision,
    Observation,
    Pace,
    Policy,
    Situation,
)
from pilotage.control.scaling import Predictive, Static
from pilotage.engine.cluster import Cluster, World
from pilotage.engine.run import at_tick, bill, simulate, tick_of
from pilotage.results import timeline_rows
from pilotage.scenario import load
from pilotage.world.spec import Positive, SpecError

SCENARIO = load("quickstart").replace(horizon_h=1.0)
TICKS_S = (15.0, 60.0, 7.5, 2.0, 0.5)


class Probe(Policy, frozen=True, kw_only=True, tag="probe"):
    """Decides nothing, and keeps what it saw."""

    period: Positive | None = None
    seen: tuple[Any, ...] = ()

    def period_s(self) -> float | None:
        return self.period

    def begin(self, situation: Situation) -> Controller:
        return _Probe()


class _Probe:
    kept: list[Observation] = []  # noqa: RUF012  (of the latest run)

    def __init__(self) -> None:
        _Probe.kept = []

    def decide(self, seen: Observation) -> Decision:
        _Probe.kept.append(seen)
        return Decision()


@pytest.mark.parametrize(
    ("period", "ticks"), [(None, 240), (15.0, 240), (2.0, 1800), (7.0, 515), (5000.0, 1), (3000.0, 2)]
)
def test_a_run_is_cut_into_the_fewest_equal_ticks_of_at_most_the_period(period, ticks) -> None:
    found = at_tick(SCENARIO, tick_of(SCENARIO, Probe(period=period)))
    assert found.ticks == ticks
    assert found.ticks * found.tick_s == pytest.approx(3600, abs=1e-6)
    run = simulate(SCENARIO, [Probe(period=period)], [World(0)])[0]
    assert len(_Probe.kept) == ticks
    assert run.totals["seconds"].sum() == pytest.approx(3600, abs=1e-6)


def test_a_horizon_that_the_scenario_rounds_down_is_the_same_for_all() -> None:
    odd = SCENARIO.replace(horizon_h=0.66)  # 158 ticks of 15 s, and 6 s that are not simulated
    runs = simulate(odd, [Probe(period=p) for p in (None, 2.0, 4.0)], [World(0)] * 3)
    assert [run.totals["seconds"].sum() for run in runs] == pytest.approx([2370] * 3)


def test_the_pace_changes_neither_the_traffic_nor_what_requests_draw() -> None:
    clusters = [Cluster(at_tick(SCENARIO, tick_s), [World(3)]) for tick_s in TICKS_S]
    first = clusters[0]
    for other in clusters[1:]:
        np.testing.assert_array_equal(first.arrivals(0, 0), other.arrivals(0, 0))
        assert first.seeds(0, 0) == other.seeds(0, 0)
        assert first.seed_nodes(0) == other.seed_nodes(0)
    # with the same replicas from start to end, every request is served at the same time, whatever the tick
    service = SCENARIO.services[0].replace(initial_replicas=4)
    fixed = SCENARIO.replace(services=(service,))
    runs = [simulate(at_tick(fixed, tick_s), [Static(replicas=4)], [World(3)])[0] for tick_s in TICKS_S]
    for run in runs[1:]:
        for name in ("arrived", "served", "late", "rejected", "timed_out", "abandoned"):
            assert run.totals[name] == runs[0].totals[name], name
        np.testing.assert_array_equal(run.histogram, runs[0].histogram)
        np.testing.assert_allclose(run.usd, runs[0].usd, rtol=1e-9)


def test_metrics_are_of_windows_as_fine_as_the_own_tick() -> None:
    simulate(SCENARIO, [Probe(period=2.0)], [World(0)])
    rates = np.array([seen["arrival_rate"] for seen in _Probe.kept])
    times = np.array([seen.now_s for seen in _Probe.kept])
    np.testing.assert_allclose(np.diff(times), 2.0)
    arrivals = Cluster(SCENARIO, [World(0)]).arrivals(0, 0)
    counts = np.histogram(arrivals, np.arange(len(rates)) * 2.0)[0]
    np.testing.assert_allclose(rates[1:] * 2.0, counts)


@pytest.mark.parametrize("tick_s", [15.0, 7.0, 300.0])
def test_the_past_is_told_in_whole_ticks(tick_s) -> None:
    cluster = Cluster(SCENARIO.replace(tick_s=tick_s), [World(0)])
    past = cluster.situation(0, 0).history_rps
    assert len(past) == int(3600 / tick_s)
    assert past.mean() == pytest.approx(30, rel=0.3)
    assert past.min() > 0.3 * past.mean()  # no bin that is only half covered


def test_policies_of_different_pace_run_in_one_call_as_they_do_alone() -> None:
    policies = [Hpa(), Kpa(), Hpa(metric="concurrency"), Kpa(target=3.0)]
    worlds = [World(k) for k in range(4)]
    together = simulate(SCENARIO, policies, worlds, keep_timeline=True)
    for policy, world, run in zip(policies, worlds, together, strict=True):
        alone = simulate(SCENARIO, [policy], [world])[0]
        assert run.world == world
        assert run.tick_s == alone.tick_s == tick_of(SCENARIO, policy)
        assert run.total_usd == alone.total_usd
        assert len(run.timeline) == round(3600 / run.tick_s)


def test_services_of_one_world_cannot_be_steered_at_different_paces() -> None:
    with pytest.raises(SpecError, match=r"decide every 2 s, 15 s"):
        tick_of(SCENARIO, [Hpa(), Kpa()])


def test_timelines_are_told_at_the_ticks_of_the_scenario() -> None:
    for policy in (Hpa(), Kpa(), Probe(period=7.0), Probe(period=60.0)):
        run = simulate(SCENARIO, [policy], [World(1)], keep_timeline=True)[0]
        found = timeline_rows("x", SCENARIO, run)
        assert [row["hour"] for row in found] == [round(15 * (k + 1) / 3600, 5) for k in range(240)]
        spent = bill(run.timeline, SCENARIO).sum()
        assert sum(row["usd"] for row in found) == pytest.approx(spent, abs=1e-3)
        assert sum(row["late"] for row in found) == run.timeline["late"].sum()
        assert max(row["latency_p95_s"] for row in found) == pytest.approx(
            np.nanmax(run.timeline["latency_p95_s"]), abs=1e-4
        )
        assert np.mean([row["arrival_rate"] for row in found]) == pytest.approx(
            run.totals["arrived"].sum() / 3600, abs=1e-3
        )
    hpa = simulate(SCENARIO, [Hpa()], [World(1)], keep_timeline=True)[0]
    assert [row["late"] for row in timeline_rows("x", SCENARIO, hpa)] == hpa.timeline["late"][:, 0].tolist()


def test_the_bound_is_for_those_who_are_compared() -> None:
    world = World(2)
    own = bound(SCENARIO, world).lower_usd
    assert bound(SCENARIO, world, [Hpa(), Static()]).lower_usd == own
    rarer = bound(SCENARIO, world, [Probe(period=30.0)]).lower_usd  # who is guarded more rarely may hold less
    assert 0.95 * own < rarer <= own
    finer = bound(SCENARIO, world, [Hpa(), Kpa()]).lower_usd
    assert 0.8 * own < finer < own


def test_a_pace_is_kept_without_drifting() -> None:
    pace = Pace(15.0, 2.0)
    due = [t for t in np.arange(0, 100, 2.0).tolist() if pace.due(t)]
    assert due == [0, 14, 30, 44, 60, 74, 90]
    slow = Pace(15.0, 40.0)
    assert [slow.due(t) for t in (0.0, 40.0, 80.0)] == [True] * 3
    late = Pace(10.0, 1.0)
    assert [late.due(t) for t in (0.0, 35.0, 40.0, 45.0)] == [True, True, False, True]


def test_a_policy_that_is_asked_more_often_keeps_its_own_pace() -> None:
    finer = SCENARIO.replace(tick_s=5.0)
    controller = Hpa(target_utilization=0.5).begin(Cluster(finer, [World(0)]).situation(0, 0))
    reasons = []
    for k in range(7):
        seen = _ready(4, 5.0 * k)
        reasons.append(controller.decide(seen).reason)
    assert [reason == "between syncs" for reason in reasons] == [False, True, True, False, True, True, False]


def _ready(count: int, now_s: float) -> Observation:
    values = np.full(len(FEATURES), np.nan)
    values[[INDEX["replicas_ready"], INDEX["replicas_starting"], INDEX["replicas_pending"]]] = count, 0, 0
    values[INDEX["utilization"]] = 0.5
    return Observation(now_s, values, np.zeros(len(FEATURES)))


@pytest.mark.parametrize("policy", [Hpa(), Predictive(), Kpa()], ids=lambda policy: type(policy).__name__)
def test_worlds_that_begin_at_other_times_run_as_they_would_alone(policy: Policy) -> None:
    """In step, too, each has its own clock: for the guard, for the policy and for the engine."""
    scenario = load("diurnal").replace(horizon_h=0.75)
    worlds = [World(1, 40_000.0), World(2, 3_600.0), World(3, 72_000.0)]
    together = simulate(scenario, [policy] * 3, worlds, guard=Guard())
    for run, world in zip(together, worlds, strict=True):
        (alone,) = simulate(scenario, [policy], [world], guard=Guard())
        assert run.totals.tobytes() == alone.totals.tobytes()
        assert run.usd.tobytes() == alone.usd.tobytes()
