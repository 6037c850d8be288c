"""KEDA's own cases, by the names of the upstream tests (scale_scaledobjects_test.go, fallback_test.go)."""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.control.hpa import NoMetricsError
from pilotage.control.keda import Executor, Fallback, Keda
from pilotage.control.policy import FEATURES, INDEX, Observation, Situation
from pilotage.scenario import load

NOW_S = 10_000.0


@pytest.mark.parametrize(
    ("executor", "count", "active", "expected"),
    [
        pytest.param(Executor(0), 10, False, 0, id="TestScaleToMinReplicasWhenNotActive"),
        pytest.param(Executor(5), 1, False, 5, id="TestScaleToMinReplicasFromLowerInitialReplicaCount"),
        pytest.param(Executor(0), 0, True, 1, id="TestScaleFromMinReplicasWhenActive"),
        pytest.param(Executor(5, idle=0), 10, False, 0, id="TestScaleToIdleReplicasWhenNotActive"),
        pytest.param(Executor(5, idle=0), 0, True, 5, id="TestScaleFromIdleToMinReplicasWhenActive"),
        pytest.param(Executor(0, last_active_s=NOW_S - 200), 4, False, None, id="cooling down"),
        pytest.param(Executor(0, last_active_s=NOW_S - 301), 4, False, 0, id="cooled down"),
        pytest.param(Executor(2), 4, False, None, id="above the minimum the HPA decides"),
        pytest.param(Executor(0, initial_cooldown_s=60, created_s=NOW_S - 50), 4, False, None, id="too new"),
        pytest.param(Executor(0, initial_cooldown_s=60, created_s=NOW_S - 61), 4, False, 0, id="old enough"),
    ],
)
def test_executor(executor, count, active, expected) -> None:
    before = executor.last_active_s
    assert executor.scale(NOW_S, count, active=active) == expected
    assert executor.last_active_s == (NOW_S if active else before)


def test_a_failing_trigger_is_left_to_the_fallback() -> None:
    assert Executor(0).scale(NOW_S, 4, active=False, failing=True) is None


@pytest.mark.parametrize(
    ("fallback", "current", "expected"),
    [
        pytest.param(Fallback(10, 10.0, failures=3), 7, 100, id="beyond the failure threshold"),
        pytest.param(Fallback(10, 10.0, failures=3, behaviour="currentReplicas"), 6, 60, id="currentReplicas"),
        pytest.param(
            Fallback(10, 10.0, failures=3, behaviour="currentReplicasIfHigher"), 6, 100,
            id="currentReplicasIfHigher",
        ),
        pytest.param(
            Fallback(10, 10.0, failures=3, behaviour="currentReplicasIfLower"), 6, 60,
            id="currentReplicasIfLower",
        ),
        pytest.param(Fallback(10, 10.0, failures=3, behaviour="static"), 15, 100, id="static"),
    ],
)  # fmt: skip
def test_fallback(fallback, current, expected) -> None:
    assert fallback.metric(None, current) == expected
    assert fallback.failures == 4


def test_a_failure_passes_until_there_have_been_too_many_and_a_value_ends_them() -> None:
    fallback = Fallback(10, 10.0)
    for _ in range(3):
        with pytest.raises(NoMetricsError):
            fallback.metric(None, 5)
    assert fallback.metric(None, 5) == 100
    assert fallback.metric(42.0, 5) == 42
    assert fallback.failures == 0


def test_a_value_target_is_divided_among_the_ready() -> None:
    assert Fallback(10, 10.0, failures=3).metric(None, 5, ready=4) == 25
    with pytest.raises(NoMetricsError):
        Fallback(10, 10.0, failures=3).metric(None, 5, ready=0)


# --- fed from observations ------------------------------------------------------------------------------------
SCENARIO = load("quickstart")


def run(keda: Keda, ready: int, rates: list[float], low: int = 0) -> list[int]:
    """The counts that a fresh controller asks for at ticks of 15 s; the replicas follow at once."""
    service = SCENARIO.services[0].replace(min_replicas=low)
    controller = keda.begin(Situation(service, SCENARIO.pool_by_name, 15.0, np.zeros(0)))
    counts = []
    for k, rate in enumerate(rates):
        seen = np.full(len(FEATURES), np.nan)
        seen[[INDEX["replicas_ready"], INDEX["replicas_starting"], INDEX["replicas_pending"]]] = ready, 0, 0
        seen[INDEX["arrival_rate"]] = rate
        decision = controller.decide(Observation(15.0 * k, seen, np.zeros(len(FEATURES))))
        ready += decision.order - decision.release
        counts.append(ready)
    return counts


def test_the_scaler_wakes_it_and_the_hpa_takes_over() -> None:
    keda = Keda(threshold=10.0, window_s=15.0)
    counts = run(keda, 0, [0.0, 0.0, 0.0, 60.0, 60.0, 60.0, 60.0])
    # polls are every 30 s; the HPA then adds at most four at once
    assert counts == [0, 0, 0, 0, 1, 5, 6]


def test_it_sleeps_after_the_cooldown() -> None:
    counts = run(Keda(threshold=10.0, window_s=15.0), 3, [30.0] + [0.0] * 30)
    assert counts[19] == 3  # the HPA's own stabilisation holds them
    assert counts[20] == counts[21] == 1
    assert counts[22] == 0  # the first poll more than 300 s after the last that was active


def test_missing_metrics_fall_back() -> None:
    keda = Keda(threshold=10.0, fallback_replicas=8)
    assert run(keda, 2, [20.0] + [np.nan] * 5, low=1) == [2, 2, 2, 2, 6, 8]
    assert run(Keda(threshold=10.0), 2, [20.0] + [np.nan] * 5, low=1) == [2] * 6
