"""What must hold of every detector: causality, invariance, and stated behaviour on bad input."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.control.anomaly import MetricAnomaly
from pilotage.control.detection import Cusum, ErrorRise, Library
from pilotage.control.shift import InputDrift, attribute, expected_accuracy
from pilotage.world.spec import SpecError

DETECTORS = (ErrorRise(), ErrorRise(false_alarms_per_10k=50), Cusum(usual_rate=0.2))
HOURLY = MetricAnomaly(interval_s=3600)
batches = st.lists(
    st.integers(0, 30).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), max_size=40
)
values = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), max_size=80)


@settings(max_examples=60, deadline=None)
@given(spec=st.sampled_from(DETECTORS), stream=batches)
def test_a_detector_repeats_itself_and_a_gap_changes_nothing(spec, stream) -> None:
    plain, gappy = spec.begin(), spec.begin()
    for errors, count in stream:
        verdict = plain.update(errors, count)
        gappy.update(0, 0)
        assert gappy.update(errors, count) == verdict
        assert math.isfinite(verdict.score)
        assert verdict.score >= 0


@settings(max_examples=40, deadline=None)
@given(past=values, one=values, other=values)
def test_what_comes_later_never_changes_a_reading(past, one, other) -> None:
    def read(series: list[float]) -> list[tuple]:
        watch = HOURLY.begin()
        return [tuple(watch.update(x)) for x in series]

    assert read(past + one)[: len(past)] == read(past + other)[: len(past)] == read(past)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), power=st.integers(-20, 20))
def test_a_metric_in_another_unit_has_the_same_score(seed, power) -> None:
    series = np.random.default_rng(seed).gamma(3.0, size=150)
    one, other = HOURLY.begin(), HOURLY.begin()
    for x in series.tolist():
        a, b = one.update(x), other.update(x * 4.0**power)
        assert a.score == pytest.approx(b.score, rel=1e-6, abs=1e-9)
        assert a.alert == b.alert


def test_a_constant_metric_is_never_unusual_until_it_moves() -> None:
    for constant in (0.0, 3.7, -1e-9):
        watch = HOURLY.begin()
        readings = [watch.update(constant) for _ in range(200)]
        assert all(reading == (0.0, 0.0, False) for reading in readings)
        moved = watch.update(constant + 1.0)
        assert moved.alert
        assert math.isfinite(moved.score)


def test_too_few_values_are_not_scored_and_missing_ones_neither() -> None:
    watch = HOURLY.begin()
    assert [watch.update(x).score for x in (1.0, 900.0, 1.0, -5.0)] == [0.0] * 4
    watch = HOURLY.begin()
    assert all(watch.update(math.nan) == (0.0, 0.0, False) for _ in range(300))
    rng = np.random.default_rng(0)
    readings = [watch.update(x if k % 3 else math.nan) for k, x in enumerate(rng.normal(10, 1, 300).tolist())]
    assert all(reading == (0.0, 0.0, False) for reading in readings[::3])
    assert max(reading.score for reading in readings) > 0
    with pytest.raises(ValueError, match="inf"):
        watch.update(math.inf)


def test_a_missed_day_does_not_shift_the_rhythm() -> None:
    hour = np.arange(24 * 14)
    rhythm = 100 + 80 * np.sin(2 * np.pi * hour / 24) + np.random.default_rng(1).normal(0, 1, len(hour))
    watch = HOURLY.begin()
    for k, x in enumerate(rhythm.tolist()):
        reading = watch.update(math.nan if 24 * 9 <= k < 24 * 10 + 5 else x)
        if k >= 24 * 11:
            assert reading.score < 40  # a value that belongs to another time of the day has hundreds
    wrong_time = watch.update(float(rhythm[6]))  # the peak, at midnight
    assert wrong_time.score > 40


def test_an_alert_is_not_repeated_before_its_rest_is_over() -> None:
    watch = MetricAnomaly(interval_s=3600, rest_s=6 * 3600).begin()
    rng = np.random.default_rng(2)
    for x in rng.normal(100, 5, 24 * 20).tolist():
        watch.update(x)
    alerts = [k for k in range(10) if watch.update(900.0 + 100 * k).alert]
    assert alerts[0] == 0
    assert all(b - a > 6 for a, b in pairwise(alerts))


@pytest.mark.parametrize(("errors", "count"), [(-1, 3), (4, 3), (0, -1)])
def test_impossible_counts_are_refused(errors, count) -> None:
    for spec in DETECTORS:
        with pytest.raises(ValueError, match="valid"):
            spec.begin().update(errors, count)


def test_extreme_batches_keep_the_evidence_finite() -> None:
    detector = ErrorRise().begin()
    detector.update(0, 10**6)
    verdict = detector.update(10**6, 10**6)
    assert verdict.flag
    assert math.isfinite(verdict.score)
    assert not detector.update(0, 10**6).flag  # a fall is no rise
    with pytest.raises(SpecError, match="usual_rate"):
        Cusum(usual_rate=0.95, rise=0.1)


@pytest.mark.parametrize("name", ["ADWIN", "PageHinkley", "DDM", "HDDMA", "HDDMW"])
def test_river_detectors_behind_the_same_face(name) -> None:
    pytest.importorskip("river")
    rng = np.random.default_rng(0)
    detector = Library(name=name).begin()
    wrong = np.r_[rng.random(1500) < 0.05, rng.random(1500) < 0.6].astype(int)
    flags = [detector.update(int(part.sum()), len(part)).flag for part in wrong.reshape(30, 100)]
    assert not any(flags[:10])
    assert any(flags[15:])


def test_inputs_that_cannot_be_compared() -> None:
    drift = InputDrift()
    few = drift.compare({"x": np.arange(5.0)}, {"x": np.arange(5.0) + 100})[0]
    assert few.reason
    assert not few.moved
    constant = drift.compare({"x": np.ones(100)}, {"x": np.ones(100)})[0]
    assert (constant.effect, constant.moved) == (0.0, False)
    assert drift.compare({"x": np.ones(100)}, {"x": np.ones(100) * 2})[0].moved
    unseen = drift.compare({"c": np.array(["a", "b"] * 50)}, {"c": np.array(["a", "new"] * 50)})[0]
    assert unseen.moved
    assert unseen.effect == pytest.approx(0.5)
    single = drift.compare({"c": np.array(["a"] * 50)}, {"c": np.array(["a"] * 50)})[0]
    assert not single.moved
    holes = np.where(np.arange(100) % 2 == 0, np.nan, np.arange(100.0))
    missing = drift.compare({"x": np.arange(100.0)}, {"x": holes})[0]
    assert missing.moved
    assert missing.missing_effect == pytest.approx(0.5)
    with pytest.raises(ValueError, match="lacks the inputs y"):
        drift.compare({"x": np.ones(30), "y": np.ones(30)}, {"x": np.ones(30)})
    with pytest.raises(ValueError, match="at least 1"):
        drift.compare({"x": np.ones(30)}, {"x": np.ones(0)})
    with pytest.raises(ValueError, match="does not exist"):
        attribute(lambda table: 0.0, {"x": np.ones(3)}, {"x": np.ones(3)}, ["z"])


def test_a_large_batch_does_not_make_a_small_shift_an_alarm() -> None:
    rng = np.random.default_rng(0)
    found = InputDrift().compare({"x": rng.normal(size=100_000)}, {"x": rng.normal(0.03, size=100_000)})[0]
    assert found.p_value < 1e-6
    assert not found.moved


@pytest.mark.parametrize(
    "wrong", [np.array([0.2, 1.4]), np.array([[0.5, 0.4]]), np.array([math.nan]), np.ones((2, 2, 2))]
)
def test_probabilities_that_are_none_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="valid"):
        expected_accuracy(wrong)
