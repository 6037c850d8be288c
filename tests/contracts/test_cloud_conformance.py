"""Predictive scaling as AWS documents it, and Autopilot's horizontal part as recalled from its paper (unverified)."""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.control.autopilot import Autopilot, deferred, recommended, settled
from pilotage.control.policy import FEATURES, INDEX, Observation, Situation
from pilotage.control.seasonal import HOUR_S, PredictiveSeasonal, effective, forecast, minimum, within
from pilotage.scenario import load

SCENARIO = load("quickstart")
SERVICE = SCENARIO.services[0]


def observation(now_s: float, ready: int, **values: float) -> Observation:
    seen = np.full(len(FEATURES), np.nan)
    seen[[INDEX["replicas_ready"], INDEX["replicas_starting"], INDEX["replicas_pending"]]] = ready, 0, 0
    for name, value in values.items():
        seen[INDEX[name]] = value
    return Observation(now_s, seen, np.zeros(len(FEATURES)))


# --- predictive scaling ---------------------------------------------------------------------------------------
def test_the_forecast_counts_from_the_buffer_before_the_hour() -> None:  # AWS 1
    load_of = {9: 400.0, 10: 950.0}
    at = [minimum(9.0 * HOUR_S + 60 * m, load_of, 100.0) for m in (0, 54.9, 55, 59)]
    assert at == [4, 4, 10, 10]
    assert minimum(10.5 * HOUR_S, load_of, 100.0) == 10
    assert minimum(9.95 * HOUR_S, {9: 950.0, 10: 400.0}, 100.0) == 10  # this hour is not over


@pytest.mark.parametrize(("dynamic", "expected"), [(6, 6), (None, 10)], ids=["AWS 2", "AWS 3"])
def test_effective(dynamic, expected) -> None:
    assert effective(4, dynamic, 10) == expected


@pytest.mark.parametrize(
    ("breach", "buffer", "expected"),
    [("HonorMaxCapacity", 0, (10, 10)), ("IncreaseMaxCapacity", 25, (12, 15))],
    ids=["AWS 4", "AWS 5"],
)
def test_breach(breach, buffer, expected) -> None:
    assert within(12, 10, breach, buffer) == expected
    assert within(8, 10, breach, buffer) == (8, 10)


def test_too_short_a_past_gives_no_forecast() -> None:  # AWS 6
    assert forecast(dict.fromkeys(range(20), 1.0), 20) is None
    assert forecast(dict.fromkeys(range(24), 1.0), 24) is not None


def test_the_forecast_is_the_mean_of_the_same_hours() -> None:
    found = forecast({h: float(h % 24) for h in range(30)}, 30)
    assert len(found) == 48
    assert found[33] == 9.0
    weeks = {h: float(h % 24) + (100 if h >= 168 else 0) for h in range(14 * 24)}
    assert forecast(weeks, 336)[340] == 4 + 50  # two of the same hour of the week
    assert forecast(weeks | dict.fromkeys(range(-48, 0), 1000000.0), 336)[340] == 54  # older than 14 days


def test_the_forecast_bounds_the_dynamic_policy_from_below() -> None:
    # a day with 20 requests a second, and 200 in the hour from 7 to 8; capacity 26.7, target 18.7
    hourly = np.full(24, 20.0)
    hourly[7] = 200.0
    past = np.repeat(hourly, 240)
    now_s = 24 * HOUR_S + 6.5 * HOUR_S
    policy = PredictiveSeasonal()
    controller = policy.begin(
        Situation(SERVICE, SCENARIO.pool_by_name, 15.0, np.r_[past, past[: 6 * 240 + 120]])
    )
    counts = [controller.decide(observation(now_s + 15.0 * k, 2, utilization=0.8)).order for k in range(120)]
    assert counts[:100] == [0] * 100  # until 6:55
    assert counts[100] == 9  # ceil(200 / 18.7) = 11
    alone = PredictiveSeasonal(dynamic=None)
    assert alone.period_s() is None
    controller = alone.begin(
        Situation(SERVICE, SCENARIO.pool_by_name, 15.0, np.r_[past, past[: 6 * 240 + 120]])
    )
    decision = controller.decide(observation(now_s, 30, utilization=0.1))
    assert (decision.order, decision.release) == (0, 0)


# --- Autopilot ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("usage", "percentile", "expected"),
    [([3.0, 12.2, 7.0], 100.0, 25), ([*np.linspace(1, 8, 95), *[12.0] * 5], 95.0, 16)],
    ids=["Autopilot 1", "Autopilot 2"],
)
def test_recommended(usage, percentile, expected) -> None:
    assert recommended(np.array(usage), 0.5, percentile) == expected


@pytest.mark.parametrize(("age", "expected"), [(47, 25), (49, 16)], ids=["Autopilot 3", "Autopilot 4"])
def test_deferred(age, expected) -> None:
    history = [(-age * HOUR_S, 25), (-24 * HOUR_S, 16), (0.0, 10)]
    assert deferred(history, 0.0, 48 * HOUR_S) == expected


@pytest.mark.parametrize(("wanted", "expected"), [(21, 20), (60, 40)], ids=["Autopilot 5", "Autopilot 6"])
def test_settled(wanted, expected) -> None:
    assert settled(wanted, 20) == expected


def test_growth_leaves_enough_that_run_and_decay_is_slow() -> None:
    assert settled(60, 30, starting=10) == 40
    assert settled(60, 40, starting=20) == 40  # no more before some have started
    assert settled(5, 0) == 1
    assert settled(10, 20, most_removed=0.2) == 16
    assert settled(0, 2, most_removed=0.2) == 1


def test_usage_is_remembered() -> None:
    controller = Autopilot(target_utilization=0.5, most_starting=1.0).begin(
        Situation(SERVICE, SCENARIO.pool_by_name, 300.0, np.zeros(0))
    )
    assert controller.decide(observation(0, 4, utilization=0.9)).order == 4  # 3.6 cores over 0.5
    for k in range(1, 500):
        decision = controller.decide(observation(300.0 * k, 8, utilization=0.1))
        assert (decision.order, decision.release) == (0, 0)
