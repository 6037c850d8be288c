"""Sequential tests against what can be computed exactly, and against plain versions of the same statistics."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm, rankdata

from pilotage.control.canary import ABORT, Arm, EProcess, Evidence
from pilotage.control.rollout import Sequential
from pilotage.control.sequential import (
    BETTER,
    CountEvidence,
    ExactSpending,
    band_width,
    msprt_log,
    shift,
    slower,
    z_score,
)

TOTALS, EXPOSED = (
    (3, 0, 4, 2),
    ((90, 10), (50, 50), (70, 30), (40, 60)),
)  # bad outcomes and requests per interval


def histories(rate: float = 1.0):
    """Every history of the canary's counts, with its probability if its rate is `rate` times the champion's."""
    for counts in product(*(range(n + 1) for n in TOTALS)):
        p = 1.0
        for x, n, (n0, n1) in zip(counts, TOTALS, EXPOSED, strict=True):
            p *= binom.pmf(x, n, rate * n1 / (rate * n1 + n0))
        yield counts, float(p)


@pytest.mark.parametrize(("ratios", "margin"), [((1.25, 2.0, 5.0), 1.0), (BETTER, 1.5)])
def test_the_e_process_has_mean_one_at_equality_and_less_inside_the_hypothesis(ratios, margin) -> None:
    def mean(rate: float) -> float:
        total = 0.0
        for counts, p in histories(rate):
            evidence = CountEvidence(ratios, margin)
            for x, n, (n0, n1) in zip(counts, TOTALS, EXPOSED, strict=True):
                log = evidence.see(np.array(n - x), np.array(x), np.array(n0), np.array(n1))
            total += p * np.exp(log)
        return total

    assert mean(margin) == pytest.approx(1.0, abs=1e-12)
    assert mean(0.5 if margin == 1.0 else 3.0) < 1
    assert mean(2.0 if margin == 1.0 else 1.0) > 1


@pytest.mark.parametrize("alpha", [0.02, 0.2, 0.6])
def test_exact_spending_spends_what_it_says(alpha) -> None:
    rejected = [0.0] * len(TOTALS)  # probability of a rejection by each interval, over every history
    for counts, p in histories():
        test, ever = ExactSpending(alpha, half_spent=2.0), False
        for k, (x, n, (n0, n1)) in enumerate(zip(counts, TOTALS, EXPOSED, strict=True)):
            ever |= bool(test.see(np.array(n - x), np.array(x), np.array(n0), np.array(n1)))
            rejected[k] += p * ever
    assert float(test.spent) == pytest.approx(rejected[-1], abs=1e-10)  # it depends on totals only
    for k, spent in enumerate(rejected):
        assert spent <= alpha * (k + 1) / (k + 3) + 1e-12
    assert alpha < 0.1 or rejected[-1] > 0


@pytest.mark.parametrize(("requests", "rate"), [(200, 0.02), (2000, 0.005)])
def test_false_aborts_are_as_many_as_the_law_says_and_at_most_alpha(requests, rate) -> None:
    rng, lanes, minutes = np.random.default_rng(11), 1500, 40
    rules = {"plain": EProcess(alpha=0.05), "exact": Sequential(errors=1.0, slow=0.0, wrong=0.0, latency=0.0)}
    judges, aborted = {k: r.begin() for k, r in rules.items()}, {k: np.zeros(lanes, bool) for k in rules}
    for t in range(minutes):
        p, share = rate * (1 + 0.5 * np.sin(t / 5)), 0.05 if t < 15 else 0.3
        n0, n1 = rng.poisson(requests * (1 - share), lanes), rng.poisson(requests * share, lanes)
        x0, x1 = rng.binomial(n0, p), rng.binomial(n1, p)
        seen = Evidence(Arm(requests=n0, errors=x0), Arm(requests=n1, errors=x1))
        for name, judge in judges.items():
            aborted[name] |= judge.step(seen) == ABORT
    spent = float(judges["exact"].tests["errors"].spent.mean())
    assert 0.01 < spent <= 0.02 * minutes / (minutes + 6) + 1e-9
    # errors are binomial, not Poisson, so the true level is a little below what the law spends
    low, high = binom.interval(0.9999, lanes, spent)
    assert 0.9 * low - 3 <= aborted["exact"].sum() <= high
    assert binomtest(int(aborted["plain"].sum()), lanes, 0.05, alternative="greater").pvalue > 1e-4


def test_the_hodges_lehmann_interval_is_where_the_mann_whitney_z_crosses() -> None:
    """Brute force: the z of every shift on a fine grid, with ties and continuity correction."""

    def z(x, y, d):
        m, n = len(x), len(y)
        both = np.r_[x - d, y]
        excess = rankdata(both)[:m].sum() - m * (m + 1) / 2 - m * n / 2
        _, ties = np.unique(both, return_counts=True)
        variance = m * n / 12 * ((m + n + 1) - (ties**3 - ties).sum() / ((m + n) * (m + n - 1)))
        return (excess - np.sign(excess) / 2) / np.sqrt(variance) if variance > 0 else 0.0

    rng, grid, critical = np.random.default_rng(0), np.arange(-1.003, 1.003, 0.0014), norm.ppf(0.99)
    crossed = 0
    for _ in range(8):
        x, y = (rng.integers(0, 6, rng.integers(7, 14)) / 8 for _ in range(2))
        scores = np.array([z(x, y, d) for d in grid])
        middle, low, high = shift(x, y, 0.98)
        assert middle == pytest.approx(np.median(np.subtract.outer(x, y)))
        for end, beyond in ((low, grid[scores > critical][-1:]), (high, grid[scores < -critical][:1])):
            if len(beyond):
                assert end == pytest.approx(beyond[0], abs=0.003)
                crossed += 1
    assert crossed > 10
    many = rng.normal(size=(3, 2, 20))
    whole = shift(many[:, 0], many[:, 1], 0.98)
    one = shift(many[1, 0], many[1, 1], 0.98)
    np.testing.assert_allclose([part[1] for part in whole], one)
    gaps = np.insert(many[1, 0], [3, 9], np.nan)  # left out
    np.testing.assert_allclose(shift(gaps, np.r_[many[1, 1], np.nan], 0.98), one)
    assert np.isnan(shift(np.full(5, np.nan), gaps, 0.98)).all()


def test_formulae_by_hand() -> None:
    assert band_width(np.array([100, 1000, 10_000]), 0.025) == pytest.approx([0.277, 0.089, 0.0284], abs=5e-4)
    for quantile, needed in ((0.5, 30), (0.9, 790), (0.95, 3200)):  # requests until an upper limit exists
        assert (
            band_width(np.array(1.1 * needed), 0.025)
            < 1 - quantile
            < band_width(np.array(0.9 * needed), 0.025)
        )
    # 10 of 1000 against 30 of 1000: pooled .02, d = .02
    assert z_score(*map(np.array, (10, 30, 1000, 1000))) == pytest.approx(0.02 / np.sqrt(0.02 * 0.98 * 0.002))
    pooled = 40.5 / 2001
    v, tau = pooled * (1 - pooled) * 0.002, 0.01
    expected = 0.5 * np.log(v / (v + tau**2)) + 0.02**2 * tau**2 / (2 * v * (v + tau**2))
    assert msprt_log(*map(np.array, (10, 30, 1000, 1000)), tau) == pytest.approx(expected)
    assert msprt_log(*map(np.array, (0, 0, 0, 10)), tau) == 0


def test_the_band_sees_a_slower_canary_and_not_an_equal_one() -> None:
    rng = np.random.default_rng(4)
    same, crossed = np.full(20, 0.05), np.zeros(200, bool)
    champion, canary = np.zeros((200, 20)), np.zeros((200, 20))
    for _ in range(50):
        champion += rng.multinomial(200, same, 200)
        canary += rng.multinomial(40, same, 200)
        crossed |= slower(champion, canary, 0.05)
    assert binomtest(int(crossed.sum()), 200, 0.05, alternative="greater").pvalue > 1e-4
    later = np.roll(canary, 3, axis=-1)
    later[:, :3] = 0
    assert slower(champion, later, 0.05).all()
    assert not slower(later, champion, 0.05).any()
    assert not slower(np.zeros(4), np.zeros(4), 0.05)
