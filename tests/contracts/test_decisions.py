"""Decisions and observations in arrays are what they are one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotage.control.decisions import Decisions
from pilotage.control.foresight import Foresight
from pilotage.control.guard import Check, Guard
from pilotage.control.hpa import Hpa
from pilotage.control.policy import (
    FEATURES,
    INDEX,
    Decision,
    Observation,
    Observations,
    ages_of,
    columns_of,
    counts_of,
    measure,
    replicas_of,
    times_of,
    values_of,
)
from pilotage.control.steer import Helm
from pilotage.engine.cluster import Cluster, World
from pilotage.engine.numbers import side_by_side
from pilotage.scenario import Scenario, load
from pilotage.world.spec import SpecError

COUNTS = ("replicas_ready", "replicas_starting", "replicas_pending")
ROWS = 6
SITUATIONS = [Cluster(load("quickstart"), [World(0)]).situation(0, 0)] * ROWS
GUARDS = (
    Guard(),
    Guard(min_replicas=2, max_replicas=7, max_order=2, max_release=1),
    Guard(order_cooldown_s=40.0, release_cooldown_s=70.0),
    Guard(max_total_usd_per_hour=8.0, min_replicas=1),
    Guard(required=("arrival_rate",), fallback=Hpa()),
)


def reported(rng: np.random.Generator, now_s: float) -> list[Observation]:
    values = rng.uniform(0, 5, (ROWS, len(FEATURES)))
    for name in COUNTS:
        values[:, INDEX[name]] = rng.integers(0, 4, ROWS)
    values[rng.random(ROWS) < 0.1, INDEX["replicas_ready"]] = np.nan
    values[rng.random(ROWS) < 0.1, INDEX["arrival_rate"]] = np.nan
    return [Observation(now_s, row, np.zeros(len(FEATURES))) for row in values]


@pytest.mark.parametrize("guard", GUARDS)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_guard_does_to_arrays_what_it_does_to_decisions(guard: Guard, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays, objects = Check(guard, SITUATIONS), Check(guard, SITUATIONS)
    for tick in range(6):
        seen = reported(rng, 30.0 * tick)
        together = Observations(
            times_of(seen), np.stack([one.values for one in seen]), np.zeros(len(FEATURES))
        )
        order, release = rng.integers(-1 if tick == 3 else 0, 5, (2, ROWS))
        said = Decisions(order, release, lambda row, tick=tick: f"{tick}/{row}")
        assert list(arrays(together, said)) == list(objects(seen, list(said)))
    assert +arrays.interventions == +objects.interventions


def test_a_row_is_a_decision_when_it_is_asked_for() -> None:
    said = Decisions.towards(np.array([3, 1, 2]), np.array([1, 4, 2]), lambda row: f"row {row}")
    assert list(said) == [
        Decision(order=2, reason="row 0"), Decision(release=3, reason="row 1"), Decision(reason="row 2"),
    ]  # fmt: skip
    assert said[-1] == said[2]
    assert list(said[1:]) == list(said)[1:]
    with pytest.raises(IndexError):
        said[3]


def test_counters_are_the_values_that_they_measure() -> None:
    scenario = load("quickstart").replace(horizon_h=0.1)
    cluster = Cluster(scenario, [World(1), World(2)])
    for _ in range(3):
        cluster.apply(Decisions(np.array([2, 0]), np.array([0, 1]), lambda _: ""))
        cluster.wait()
    seen, values = cluster.read(), measure(cluster.ticks).reshape(2, -1)
    at = [INDEX["utilization"], INDEX["arrival_rate"]]
    assert np.array_equal(columns_of(seen, at), values[:, at], equal_nan=True)
    present = values[:, [INDEX[name] for name in COUNTS]].sum(axis=1)
    assert (counts_of(seen) == present).all()
    assert (replicas_of(list(seen)) == present).all()
    cluster.wait()  # what was read stays as it was
    assert np.array_equal(values_of(seen), values, equal_nan=True)
    assert present[0] != present[1]


def test_a_helm_says_who_said_too_little() -> None:
    class Short(Hpa, frozen=True, tag="short"):
        def begin_together(self, situations):
            return self

        def decide(self, seen):
            return [Decision(order=1)]

    policy = Short()
    seen = reported(np.random.default_rng(0), 0.0)
    with pytest.raises(ValueError, match="1 decisions for 6 services"):
        Helm([policy] * ROWS, SITUATIONS).decide(seen)
    for within_s in (None, 60.0):
        held = Helm([policy] * ROWS, SITUATIONS, Guard(), within_s=within_s).decide(seen)
        assert all(one.reason.startswith("held: policy failed: ValueError: 1 decisions") for one in held)


def test_a_deadline_changes_nothing_that_is_said_in_time() -> None:
    policies = [Foresight()] * ROWS
    slow, free = (Helm(policies, SITUATIONS, within_s=within_s) for within_s in (60.0, None))
    for tick in range(3):
        seen = reported(np.random.default_rng(tick), 30.0 * tick)
        said, in_time = free.decide(seen), slow.decide(seen)
        assert isinstance(said, Decisions)
        assert isinstance(in_time, Decisions)
        assert list(in_time) == [said[row] for row in range(ROWS)]


def test_only_batch_times_may_differ_between_scenarios_side_by_side() -> None:
    scenario: Scenario = load("quickstart")
    numbers, params = side_by_side([scenario, scenario])
    assert len(params) == 2 * len(scenario.services)
    assert params["variant_lo"][-1] == len(numbers.variants) // 2
    other = scenario.services[0].replace(slo_ms=1.0)
    with pytest.raises(SpecError, match="scenario 1 of those side by side"):
        side_by_side([scenario, scenario.replace(services=(other, *scenario.services[1:]))])


def test_rows_keep_their_own_ages_where_they_have_them() -> None:
    values = np.arange(3.0 * len(FEATURES)).reshape(3, -1)
    own = Observations(np.array([1.0, 2.0, 3.0]), values, 10 * values)
    for seen in (own, list(own)):
        np.testing.assert_array_equal(ages_of(seen), 10 * values)
    np.testing.assert_array_equal(ages_of(own[1:]), 10 * values[1:])
    one = Observations(np.array([1.0, 2.0, 3.0]), values, values[0])
    np.testing.assert_array_equal(ages_of(one), [values[0]] * 3)
    np.testing.assert_array_equal(one[2].age_s, values[0])
