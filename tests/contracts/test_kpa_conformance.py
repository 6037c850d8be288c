"""Knative's own cases for the pod autoscaler, by the names of the upstream tests (autoscaler_test.go)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pilotage.control.kpa import Autoscaler, Decider, Kpa, Window, ZeroGate
from pilotage.control.policy import FEATURES, INDEX, Observation, Situation
from pilotage.scenario import load

# (time s, ready pods, stable average, panic average, wanted pods, excess burst capacity or None)
Step = tuple[float, int, float, float, int, int | None]


def decider(target: float, burst_capacity: float = 0.0, **changes: float) -> Decider:
    """The fixture of the upstream tests."""
    given = {"max_up_rate": 10.0, "max_down_rate": 10.0, "panic_threshold": 2.0} | changes
    return Decider(target=target, total=target / 0.75, burst_capacity=burst_capacity, **given)


CASES: dict[str, tuple[Decider, tuple[float | None, int], list[Step]]] = {
    "TestAutoscalerStableModeIncreaseWithConcurrencyDefault": (
        decider(10, 101), (None, 0), [(0, 1, 50, 10, 5, -98), (60, 1, 100, 10, 10, -98)],
    ),
    "TestAutoscalerStableModeDecrease": (
        decider(10, 98), (None, 0), [(0, 8, 100, 100, 10, -92), (60, 8, 50, 50, 5, -42)],
    ),
    "TestAutoscalerStableModeNoTrafficScaleToZero": (
        decider(10, 75), (None, 0), [(0, 1, 1, 0, 1, -62), (60, 1, 0, 0, 0, -62)],
    ),
    "TestAutoscalerActivationScale": (
        decider(10, 75, activation_scale=2), (None, 0), [(0, 1, 0, 0, 0, -62), (60, 1, 1, 0, 2, -62)],
    ),
    "TestAutoscalerPanicModeDoublePodCount": (decider(10, 84), (None, 0), [(0, 1, 50, 100, 10, -171)]),
    "TestAutoscalerUnpanicAfterSlowIncrease": (
        decider(1, 98), (None, 0),
        [(0, 10, 11, 25, 25, -110), (30, 40, 30, 41, 41, -86), (62, 55, 50, 56, 50, -81)],
    ),
    "TestAutoscalerExtendPanicWindow": (
        decider(1, 98), (None, 0), [(0, 10, 11, 25, 25, None), (30, 40, 30, 80, 80, None)],
    ),
    "TestAutoscalerPanicThenUnPanicScaleDown": (
        decider(10, 93), (None, 0),
        [(0, 1, 100, 100, 10, -180), (1, 10, 100, 1000, 100, -960), (31, 10, 1, 1, 100, 39),
         (62, 10, 1, 1, 1, 39)],
    ),
    "TestAutoscalerRateLimitScaleUp": (
        decider(10, 61), (None, 0), [(0, 1, 1000, 1001, 10, None), (2, 10, 1000, 1001, 100, None)],
    ),
    "TestAutoscalerRateLimitScaleDown": (
        decider(10, 61), (None, 0), [(0, 100, 1, 1, 10, None), (2, 10, 1, 1, 1, None)],
    ),
    "TestAutoscalerPanicStableLargerThanPanic": (decider(1, 100), (-5, 5), [(0, 5, 50, 30, 50, -124)]),
    "TestAutoscalerPanicStableLessThanPanic": (decider(1, 100), (-5, 5), [(0, 5, 20, 30, 30, -124)]),
    "TestAutoscalerStableModeIncreaseWithSmallScaleUpRate": (
        decider(1, 1982, max_up_rate=1.1), (None, 0), [(0, 2, 3, 3.1, 3, -1983)],
    ),
    "TestAutoscalerStableModeDecreaseWithSmallScaleDownRate": (
        decider(10, 1982, max_down_rate=1.1), (None, 0), [(0, 100, 1, 1, 90, -650)],
    ),
    "TestAutoscalerStableModeDecreaseNonReachable": (
        decider(10, 1982, max_down_rate=1.1, reachable=False), (None, 0), [(0, 100, 1, 1, 1, None)],
    ),
    "TestAutoscalerUseOnePodAsMinimumIfEndpointsNotFound": (
        decider(10, 81), (None, 0), [(0, 0, 1000, 888, 10, -969)],
    ),
    "TestAutoscalerScaleDownDelay": (
        decider(10, panic_threshold=100.0, scale_down_delay_s=300.0), (None, 0),
        [(2, 0, 40, 40, 4, 0), (300, 0, 0, 0, 4, 0), (302, 0, 0, 0, 0, 0)],
    ),
    "TestAutoscalerScaleDownDelay, gradual": (
        decider(10, panic_threshold=100.0, scale_down_delay_s=300.0), (None, 0),
        [(540, 0, 40, 40, 4, 0), (600, 0, 30, 30, 4, 0), (660, 0, 0, 0, 4, 0), (840, 0, 0, 0, 3, 0),
         (900, 0, 0, 0, 0, 0)],
    ),
    "TestAutoscalerPanicModeExponentialTrackAndStabilize": (
        decider(1, 101), (None, 0),
        [(t, n, load, load, load, None)
         for t, (n, load) in enumerate([(1, 6), (6, 36), (36, 216), (216, 1296), (1296, 1296)])],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "panic", "steps"), CASES.values(), ids=CASES)
def test_autoscaler(given, panic, steps) -> None:
    scaler = Autoscaler(given, *panic)
    for now_s, ready, stable, lately, wanted, burst in steps:
        pods, excess = scaler.scale(now_s, ready, stable, lately)
        assert pods == wanted, f"at {now_s} s"
        assert burst is None or abs(excess - burst) <= 1, f"at {now_s} s"


@pytest.mark.parametrize(
    ("steps", "panic_s"),
    [
        pytest.param([(0, 10, 11, 25), (30, 40, 30, 41)], 0, id="TestAutoscalerUnpanicAfterSlowIncrease"),
        pytest.param([(0, 10, 11, 25), (30, 40, 30, 80)], 30, id="TestAutoscalerExtendPanicWindow"),
    ],
)
def test_since_when_there_is_panic(steps, panic_s) -> None:
    scaler = Autoscaler(decider(1, 98))
    for step in steps:
        scaler.scale(*step)
    assert scaler.panic_s == panic_s


@pytest.mark.parametrize(
    ("ready", "panics", "pods"),
    [(0, False, 0), (1, False, 0), (2, True, 2)],
    ids=[f"TestStartInPanicMode, {n} ready" for n in range(3)],
)
def test_start_in_panic_mode(ready, panics, pods) -> None:
    scaler = Autoscaler.create(decider(10), 7.0, ready)
    assert (scaler.panic_s is not None) == panics
    assert scaler.max_panic_pods == pods


# --- the window average, by its definition --------------------------------------------------------------------
def test_a_window_that_has_only_begun_is_averaged_over_what_there_is() -> None:
    window = Window(30)
    assert window.average(5) == 0.0
    assert not window.begun
    for bucket, value in enumerate([4.0, 8.0]):
        window.record(bucket, value)
    assert window.average(1) == 6.0


def test_a_gap_inside_a_window_counts_as_zero_and_one_at_its_end_does_not() -> None:
    window = Window(4)
    for bucket, value in [(0, 4.0), (1, 8.0), (3, 6.0)]:
        window.record(bucket, value)
    assert window.average(3) == 18 / 4
    assert window.average(5) == 3.0  # buckets 2 (a gap) and 3 are left of 2..5
    assert window.average(7) == 0.0  # a whole window without data


def test_averages_have_six_digits() -> None:
    window = Window(3)
    for bucket, value in enumerate([1.0, 0.0, 0.0]):
        window.record(bucket, value)
    assert window.average(2) == 0.333333


# --- to zero, step by step (scaler.go) ------------------------------------------------------------------------
def test_zero_is_reached_after_the_stable_window_and_the_grace_period() -> None:
    gate = ZeroGate()
    assert gate.pass_through(0, 3, 3, 10) == 3
    assert gate.pass_through(2, 0, 3, 10) == 1  # active for less than the stable window: at most one pod
    assert gate.pass_through(59, 0, 1, 10) == 1
    assert (
        gate.pass_through(60, 0, 1, 10) is None
    )  # becomes inactive; the activator has been in the path since 2
    assert gate.pass_through(62, 0, 1, 10) == 0
    late = ZeroGate(state="inactive", state_s=100.0, proxied_s=100.0)
    assert late.pass_through(129, 0, 1, 10) is None
    assert late.pass_through(130, 0, 1, 10) == 0


def test_the_last_pod_is_retained_for_as_long_as_is_asked() -> None:
    gate = ZeroGate(retention_s=50.0, state="inactive", state_s=100.0, proxied_s=0.0)
    assert gate.pass_through(149, 0, 1, -1) is None
    assert gate.pass_through(150, 0, 1, -1) == 0


def test_traffic_makes_a_revision_active_again_and_zero_may_be_switched_off() -> None:
    gate = ZeroGate(state="inactive", state_s=0.0)
    assert gate.pass_through(5, 2, 0, -1) == 2
    assert gate.state == "activating"
    assert gate.pass_through(7, 0, 0, -1) is None
    assert gate.pass_through(9, 1, 1, -1) == 1
    assert gate.state == "active"
    assert ZeroGate(enabled=False).pass_through(0, 0, 1, 0) == 1
    assert gate.pass_through(9 + 60, 0, 1, -1) is None
    stuck = ZeroGate(state="activating", state_s=0.0)
    assert stuck.pass_through(609, 0, 0, -1) is None
    assert stuck.pass_through(610, 0, 0, -1) == 0


# --- fed from observations ------------------------------------------------------------------------------------
SCENARIO = load("quickstart")


def run(kpa: Kpa, ticks: list[dict[str, float]], low: int = 0) -> list[int]:
    """The counts that a fresh controller asks for at ticks of 2 s; the replicas follow at once."""
    service = SCENARIO.services[0].replace(min_replicas=low)
    controller = kpa.begin(Situation(service, SCENARIO.pool_by_name, 2.0, np.zeros(0)))
    counts, now = [], int(ticks[0].pop("ready"))
    for k, values in enumerate(ticks):
        seen = np.full(len(FEATURES), np.nan)
        seen[[INDEX["replicas_ready"], INDEX["replicas_starting"], INDEX["replicas_pending"]]] = now, 0, 0
        for name, value in values.items():
            seen[INDEX[name]] = value
        decision = controller.decide(Observation(2.0 * k, seen, np.zeros(len(FEATURES))))
        now += decision.order - decision.release
        counts.append(now)
    return counts


@pytest.mark.parametrize("expected", [[5, 5, 5]], ids=["TestAutoscalerNoDataNoAutoscale"])
def test_no_data_no_autoscale(expected) -> None:
    assert run(Kpa(), [{"ready": 5}, {}, {}]) == expected


def test_a_burst_is_met_in_panic_and_given_back_after_a_stable_window() -> None:
    kpa = Kpa(target=10.0, target_utilization=1.0)
    busy = [{"concurrency": 10.0}] * 10 + [{"concurrency": 100.0}] * 3 + [{"concurrency": 10.0}] * 70
    counts = run(kpa, [{"ready": 1, "concurrency": 10.0}, *busy], low=1)
    assert counts[10] == 1
    assert counts[13] == 10  # the panic window of 6 s holds 100 of the three ticks
    assert counts[20] == 10
    assert counts[-1] == 1


def test_a_revision_without_traffic_goes_to_zero_and_comes_back_at_the_first_request() -> None:
    idle = [{"concurrency": 0.0}] * 40
    counts = run(Kpa(target=10.0), [{"ready": 1, "concurrency": 0.0}, *idle, {"concurrency": 0.5}])
    assert counts[29] == 1
    assert counts[39] == 0
    assert counts[-1] == 1


def test_the_own_target_is_where_a_replica_serves_its_share_of_capacity() -> None:
    situation = Situation(SCENARIO.services[0], SCENARIO.pool_by_name, 2.0, np.zeros(0))
    n = situation.concurrency_at(0.7)  # n / (60 + 30 n) ms = 0.7 * 8 / 300 ms
    assert n / (0.06 + 0.03 * n) == pytest.approx(0.7 * situation.capacity_rps(), rel=0.01)
    assert situation.concurrency_at(1.0) == 8.0
    assert situation.concurrency_at(1.5) == 12.0
    assert math.isclose(situation.concurrency_at(0.1), 0.1 * 8 / 0.3 * 0.09, rel_tol=0.05)
