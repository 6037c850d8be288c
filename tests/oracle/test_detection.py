"""Detectors against what theory, brute force and hand calculation say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import poisson

from pilotage.control.detection import Cusum, ErrorRise
from pilotage.control.shift import InputDrift, attribute, expected_accuracy


def brute_force(wrong: list[int], counts: list[int], rises: tuple[float, ...]) -> float:
    """Evidence of a rise, summed over every start of a batch, rise and usual rate, from the likelihoods themselves."""
    angle = (np.arange(128) + 0.5) / 128 * math.pi / 2
    usual = np.sin(angle) ** 2
    evidence = 0.0
    everything = usual ** sum(wrong) * (1 - usual) ** (sum(counts) - sum(wrong))
    for start in range(1, len(wrong)):
        before, answers = sum(wrong[:start]), sum(counts[:start])
        after, rest = sum(wrong[start:]), sum(counts[start:])
        for rise in rises:
            risen = np.sin(np.minimum(angle + rise, (1 - 0.25 / 128) * math.pi / 2)) ** 2
            likelihood = (
                usual**before
                * (1 - usual) ** (answers - before)
                * risen**after
                * (1 - risen) ** (rest - after)
            )
            evidence += counts[start] / len(rises) * likelihood.sum()
    return float(evidence / everything.sum())


@pytest.mark.parametrize(
    ("wrong", "counts"),
    [([0, 0, 1, 0, 1, 1, 1], [1] * 7), ([1, 3, 7], [10, 12, 9]), ([0, 0], [5, 5])],
)
def test_the_evidence_is_the_sum_over_every_start_of_a_rise(wrong, counts) -> None:
    spec = ErrorRise(false_alarms_per_10k=1.0)
    detector = spec.begin()
    for errors, count in zip(wrong, counts, strict=True):
        verdict = detector.update(errors, count)
    assert verdict.score * 1e4 == pytest.approx(brute_force(wrong, counts, spec.rises), rel=1e-9)
    assert not verdict.flag


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_false_alarms_are_no_more_than_asked(rate) -> None:
    # 40,000 answers at 20 per 10,000: 80 may be expected at most; the theory gives an upper bound, not the number
    alarms = 0
    for seed in range(8):
        detector = ErrorRise(false_alarms_per_10k=20).begin()
        wrong = np.random.default_rng(seed).random(5000) < rate
        alarms += sum(detector.update(int(x)).flag for x in wrong)
    assert poisson.sf(alarms - 1, 80) > 1e-3
    assert alarms > 8  # and it is no detector that never alarms


def test_in_batches_it_alarms_when_the_rate_has_risen() -> None:
    rng = np.random.default_rng(1)
    detector = ErrorRise(false_alarms_per_10k=0.1).begin()
    flags = [detector.update(int(rng.binomial(200, 0.1 if k < 30 else 0.2)), 200).flag for k in range(36)]
    assert not any(flags[:30])
    assert any(flags[30:33])


def test_cusum_by_hand() -> None:
    # usual rate 1/2, rise 1/4: an error adds ln(3/2), a right answer ln(1/2), never below nothing
    detector = Cusum(usual_rate=0.5, rise=0.25, threshold=1.0).begin()
    scores = [detector.update(x).score for x in (0, 1, 1, 0, 1)]
    up, down = math.log(1.5), math.log(0.5)
    assert scores == pytest.approx([0.0, up, 2 * up, 2 * up + down, 3 * up + down])
    assert detector.update(1).flag is False
    assert detector.update(1).flag is True  # 5 up + down = 1.33
    assert detector.update(0).score == 0.0


def test_expected_accuracy_is_the_accuracy_of_a_calibrated_classifier() -> None:
    rng = np.random.default_rng(2)
    sure = rng.beta(2, 1, 20_000)
    right = (sure > 0.5) == (rng.random(20_000) < sure)
    estimate = expected_accuracy(sure)
    assert right.mean() == pytest.approx(estimate.accuracy, abs=4 * estimate.standard_error)
    by_hand = expected_accuracy(np.array([[0.7, 0.2, 0.1], [0.1, 0.9, 0.0]]))
    assert by_hand.accuracy == pytest.approx(0.8)
    assert by_hand.standard_error == pytest.approx(math.sqrt(0.7 * 0.3 + 0.9 * 0.1) / 2)


def test_false_alarms_over_many_inputs_are_held() -> None:
    rng = np.random.default_rng(3)
    drift, alarms = InputDrift(least_effect=0.0), 0
    for _ in range(60):
        reference = {f"x{k}": rng.normal(size=300) for k in range(15)} | {"c": rng.choice(list("abc"), 300)}
        batch = {f"x{k}": rng.normal(size=100) for k in range(15)} | {"c": rng.choice(list("abc"), 100)}
        alarms += any(one.moved for one in drift.compare(reference, batch))
    assert alarms <= 9  # 5 % of 60 is 3; 9 or fewer with probability 0.999


def test_what_moved_and_by_how_much_it_hurts() -> None:
    rng = np.random.default_rng(4)
    reference = {"a": rng.normal(size=4000), "b": rng.normal(size=4000), "c": rng.normal(size=4000)}
    batch = {"a": rng.normal(2.0, size=4000), "b": rng.normal(1.0, size=4000), "c": rng.normal(size=4000)}
    moved = {one.name: one.moved for one in InputDrift().compare(reference, batch)}
    assert moved == {"a": True, "b": True, "c": False}
    # the model errs where a is above 1 and does not look at b
    parts = attribute(lambda table: float((table["a"] > 1).mean()), reference, batch, ["b", "a"])
    assert list(parts) == ["a", "b"]
    assert parts["a"] == pytest.approx(0.841 - 0.159, abs=0.03)  # of the normal distribution
    assert parts["b"] == 0.0


def test_the_rule_of_nab_by_hand() -> None:
    run = pytest.importorskip("experiments.anomaly.run", reason="needs scikit-learn (extra explain)")
    rows = np.zeros(200)
    one = run.Series("a/b.csv", 300.0, rows, rows > 0, 30)  # 30 rows of probation
    windows = [[(100, 109)]]

    def score(alarms: list[int], profile: str = "standard") -> float:
        scores = rows.copy()
        scores[alarms] = 1.0
        return run.nab_score([scores], [one], windows, profile)

    def sigmoid(y: float) -> float:
        return 2 / (1 + math.exp(5 * y)) - 1

    assert score([]) == pytest.approx(0)
    assert score([100]) == pytest.approx(100)  # the first row of the window
    assert score([10, 100]) == pytest.approx(100)  # probation is not judged
    late = sigmoid(-0.1) / sigmoid(-1)  # the last row: a tenth of the window from its end
    assert score([109]) == pytest.approx(100 * (late + 1) / 2)
    assert score([105, 109]) == pytest.approx(
        100 * (sigmoid(-0.5) / sigmoid(-1) + 1) / 2
    )  # the earliest counts
    assert score([50, 100]) == pytest.approx(100 * (2 - 0.11) / 2)  # before any window: in full
    assert score([100, 112]) == pytest.approx(100 * (2 + 0.11 * sigmoid(3 / 9)) / 2)  # soon after: less
    assert score([100, 150], "reward low FP") == pytest.approx(100 * (2 - 0.22) / 2)
    np.testing.assert_array_equal(run.emitted(np.array([1.0, 2, 1, 0, 1.5]), 2), [1, 2, 0, 0, 1.5])
    np.testing.assert_array_equal(run.rested(np.array([1, 1, 1, 0, 1], bool), 2), [1, 0, 0, 0, 1])
