"""Ray Serve's own cases, by the names of the upstream tests (test_autoscaling_policy.py)."""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.control.policy import FEATURES, INDEX, Observation, Situation
from pilotage.control.ray_serve import Delay, RayServe, scaled, wanted
from pilotage.scenario import load


def at_once() -> Delay:
    return Delay(0.0, 0.0)


@pytest.mark.parametrize(
    ("requests", "expected"),
    [(20, 4), (100, 20), (10, 2), (21, 5)],
    ids=[f"test_single_replica_receives_all_requests, {n}" for n in (20, 100, 10, 21)],
)
def test_requests_over_target(requests, expected) -> None:
    assert wanted(0.0, requests, 4, 4, at_once(), target_ongoing=5) == expected


@pytest.mark.parametrize(
    ("factor", "target", "requests", "expected"),
    [
        pytest.param(10.0, 0, 1, 10, id="test_scaling_factor_scale_up_from_0_replicas, 10"),
        pytest.param(0.5, 0, 1, 1, id="test_scaling_factor_scale_up_from_0_replicas, 0.5"),
        pytest.param(1.0, 0, 7, 1, id="from zero one is enough"),
        pytest.param(1.0, 3, 4, 3, id="from zero to the target"),
        pytest.param(1.0, 3, 0, 3, id="from zero to the target without requests"),
    ],
)
def test_cold_starts_do_not_wait(factor, target, requests, expected) -> None:
    delay = Delay(30.0, 600.0)
    assert wanted(0.0, requests, 0, target, delay, target_ongoing=1, up_factor=factor) == expected


@pytest.mark.parametrize(
    ("factor", "counts"),
    [
        pytest.param(10.0, [5, 1, 0], id="test_scaling_factor_scale_down_to_0_replicas, 10"),
        pytest.param(0.2, [5, 4, 3, 2, 1, 0], id="test_scaling_factor_scale_down_to_0_replicas, 0.2"),
    ],
)
def test_zero_is_reached_from_one(factor, counts) -> None:
    count, found, delay = counts[0], [counts[0]], at_once()
    while count > 0:
        count = max(0, wanted(0.0, 0, count, count, delay, target_ongoing=1, down_factor=factor))
        found.append(count)
    assert found == counts


@pytest.mark.parametrize(
    ("desired", "current", "up", "down", "expected"),
    [
        pytest.param(20, 10, 0.5, 1.0, 15, id="test_apply_scaling_factors_upscale"),
        pytest.param(15, 10, 0.5, 1.0, 13, id="test_apply_scaling_factors_upscale, 15"),
        pytest.param(5, 20, 1.0, 0.5, 13, id="test_apply_scaling_factors_downscale"),
        pytest.param(9, 10, 1.0, 0.5, 9, id="test_apply_scaling_factors_stuck_downscale"),
    ],
)
def test_scaling_factors(desired, current, up, down, expected) -> None:
    assert scaled(desired, current, up, down) == expected


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(
            [(1, 1, 100, 100), (1, 100, 100, 100), (3, 100, 123, 123), (4, 123, 10, 123)],
            id="test_replicas_delayed_startup",
        )
    ],
)
def test_what_starts_is_not_ordered_again(steps) -> None:
    delay = Delay(0.0, 1e5)
    for k, (current, target, requests, expected) in enumerate(steps):
        assert wanted(float(k), requests, current, target, delay, target_ongoing=1) == expected


@pytest.mark.parametrize(
    ("delay_s", "counts"),
    [
        pytest.param(30.0, {1}, id="test_fluctuating_ongoing_requests, from 1"),
        pytest.param(0.0, {1, 2}, id="test_fluctuating_ongoing_requests, no delay"),
    ],
)
def test_fluctuation(delay_s, counts) -> None:
    delay, count, found = Delay(delay_s, delay_s), 1, set()
    for k in range(1000):
        count = wanted(0.1 * k, 40 if k % 2 else 100, count, count, delay, target_ongoing=50)
        assert delay_s or count == (1 if k % 2 else 2)
        found.add(count)
    assert found == counts


@pytest.mark.parametrize("count", [2], ids=["test_fluctuating_ongoing_requests, from 2"])
def test_fluctuation_from_two(count) -> None:
    delay = Delay(30.0, 30.0)
    for k in range(1000):
        assert wanted(0.1 * k, 40 if k % 2 else 100, count, count, delay, target_ongoing=50) == count


def test_apply_delay_logic_upscale() -> None:
    delay, target, found = Delay(0.3, 1.0), 1, []
    for now_s in (0, 0.05, 0.10, 0.31):
        target = delay.decide(now_s, 5, target)
        found.append(target)
    assert found == [1, 1, 1, 5]


def test_apply_delay_logic_downscale() -> None:
    delay, target, found = Delay(1.0, 0.3, 0.4), 4, []
    for now_s in (0, 0.05, 0.10, 0.31, 0.5, 0.6, 0.7, 0.91):
        target = delay.decide(now_s, 0, target)
        found.append(target)
    assert found == [4, 4, 4, 1, 1, 1, 1, 0]


def test_upscale_delay_respected_with_slow_loop_steps() -> None:
    delay = Delay(100.0, 0.0)
    fired = next(0.6 * k for k in range(1000) if delay.decide(0.6 * k, 5, 1) == 5)
    assert 100 <= fired <= 100.6


def test_a_wish_that_turns_round_starts_anew() -> None:
    delay = Delay(10.0, 10.0)
    assert [delay.decide(t, wish, 3) for t, wish in [(0, 5), (6, 1), (12, 1), (13, 3), (14, 1), (23, 1)]] == [
        3
    ] * 6
    assert delay.decide(24, 1, 3) == 1


# --- fed from observations ------------------------------------------------------------------------------------
SCENARIO = load("quickstart")


def run(policy: RayServe, ready: int, ongoing: list[float], waiting: float = 0.0, low: int = 0) -> list[int]:
    """The counts that a fresh controller asks for at ticks of 1 s; the replicas follow at once."""
    service = SCENARIO.services[0].replace(min_replicas=low)
    controller = policy.begin(Situation(service, SCENARIO.pool_by_name, 1.0, np.zeros(0)))
    counts = []
    for k, value in enumerate(ongoing):
        seen = np.full(len(FEATURES), np.nan)
        seen[[INDEX["replicas_ready"], INDEX["replicas_starting"], INDEX["replicas_pending"]]] = ready, 0, 0
        seen[INDEX["concurrency"]], seen[INDEX["queue_length"]] = value, waiting
        decision = controller.decide(Observation(float(k), seen, np.zeros(len(FEATURES))))
        ready += decision.order - decision.release
        counts.append(ready)
    return counts


def test_metrics_are_pushed_every_ten_seconds_and_averaged_over_thirty() -> None:
    counts = run(RayServe(upscale_delay_s=0.0), 2, [4.0] * 31 + [16.0] * 30)
    # two a replica; the push at 40 s sees 20 seconds of 4 and 10 of 16
    assert (counts[39], counts[40], counts[50], counts[60]) == (2, 4, 6, 8)


def test_the_target_waits_for_the_upscale_delay() -> None:
    counts = run(RayServe(), 2, [16.0] * 60)
    assert counts[29] == 2
    assert counts[30] == 8


def test_it_goes_to_zero_and_comes_back_at_once() -> None:
    policy = RayServe(downscale_delay_s=20.0, downscale_to_zero_delay_s=40.0)
    counts = run(policy, 3, [0.0] * 90)
    assert (counts[19], counts[20], counts[60], counts[61]) == (3, 1, 1, 0)
    assert run(policy, 0, [3.0], waiting=3.0) == [1]
