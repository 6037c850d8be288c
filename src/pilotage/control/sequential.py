"""Tests of two versions that may be looked at after every interval.

Everything works on lanes: arrays of any one shape (one canary: scalars), so that a controller and a simulation of
thousands of canaries run the same code. Counts of one interval are `x0` bad ones of `n0` exposures under the champion
and `x1` of `n1` under the canary. Given `x0 + x1`, and if both have the same rate, `x1` is binomial with the share
`n1 / (n0 + n1)`: exact for Poisson counts, conservative for binomial ones; the rate may change from interval to
interval, and so may the share. Bad outcomes must be independent: requests of one user or one batch are not, so count
users or thin them.

Sources: Lindon & Malek, NeurIPS 2022 (arXiv 2011.03567), for the e-process; Lan & DeMets, Biometrika 70, 1983, for
spending; Johari, Koomen, Pekelis & Walsh, KDD 2017 (arXiv 1512.04922), for the mSPRT; Howard & Ramdas, Bernoulli 28(3),
2022 (arXiv 1906.09712), for the band; Hodges & Lehmann, Ann. Math. Stat. 34, 1963, for the shift.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binom, norm

RATIOS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0)  # canary's rate over the champion's, equally likely beforehand
BETTER = (0.25, 0.5, 0.8)  # the same over the margin, where a canary is to be shown better than it
_FORGOTTEN = 1e-13  # probability at either end of the law that is no longer followed; it counts as spent


def share_of(n0: np.ndarray, n1: np.ndarray, margin: float = 1.0) -> np.ndarray:
    """The canary's share of the bad outcomes if its rate is `margin` times the champion's; 0 without exposures."""
    n0, n1 = np.asarray(n0, float), np.asarray(n1, float)
    return np.divide(
        margin * n1, margin * n1 + n0, out=np.zeros(np.broadcast(n0, n1).shape), where=n0 + n1 > 0
    )


class CountEvidence:
    """E-process against "the canary's rate is at most `margin` times the champion's" (with ratios above 1), or "at
    least" (below 1): a mixture over the ratios of likelihood ratios, whose mean at any time is at most 1.

    The probability that it ever reaches 1 / alpha is at most alpha (Ville).
    """

    def __init__(self, ratios: tuple[float, ...] = RATIOS, margin: float = 1.0) -> None:
        self._log_ratio = np.log(ratios)
        self._beyond = np.array(ratios) - 1
        self._margin = margin
        self.logs: np.ndarray = np.zeros(len(ratios))  # (..., ratios), of each ratio on its own

    def see(self, x0: np.ndarray, x1: np.ndarray, n0: np.ndarray, n1: np.ndarray) -> np.ndarray:
        """Log of the e-process after one more interval."""
        share = share_of(n0, n1, self._margin)[..., None]
        bad = np.asarray(x0)[..., None] + np.asarray(x1)[..., None]
        self.logs = (
            self.logs + np.asarray(x1)[..., None] * self._log_ratio - bad * np.log1p(self._beyond * share)
        )
        return self.log

    @property
    def log(self) -> np.ndarray:
        top = self.logs.max(axis=-1)
        return top + np.log(np.exp(self.logs - top[..., None]).mean(axis=-1))


class ExactSpending:
    """Test of "the canary's rate is at most the champion's" that spends a level `alpha` over all intervals to come.

    Of all canaries that are no worse, at most `alpha * t / (t + half_spent)` are rejected within t intervals that had
    data, for every history of totals and shares, hence at most `alpha` ever. The canary's count so far is sufficient
    for a constant ratio of rates, also where the share changes, so the test rejects when it reaches a boundary: the
    least one whose probability, among canaries not yet rejected, is within what may be spent by now. That probability
    is computed, not bounded: the law of the count is followed exactly, and what counts being whole leaves unspent is
    spent later. (The e-process at the same level spends less within any given time.) Lanes with the same totals and
    shares so far share a law.
    """

    def __init__(self, alpha: float, half_spent: float) -> None:
        self._alpha, self._half = alpha, half_spent
        # laws: probability at equality and without a rejection so far, shape (laws, counts from their _low)
        self._law = np.ones((1, 1))
        self._low = np.zeros(1, int)
        self._spent, self._looks = np.zeros(1), np.zeros(1)
        self._law_of: np.ndarray | None = None  # of each lane
        self.count: np.ndarray = np.zeros((), int)  # the canary's, so far

    @property
    def spent(self) -> np.ndarray:
        """The level spent so far, by lane."""
        spent: np.ndarray = self._spent[0 if self._law_of is None else self._law_of].reshape(self.count.shape)
        return spent

    def see(self, x0: np.ndarray, x1: np.ndarray, n0: np.ndarray, n1: np.ndarray) -> np.ndarray:
        """Whether it rejects after one more interval (bool, lanes)."""
        shape = np.broadcast(x0, x1, n0, n1).shape
        share = np.broadcast_to(share_of(n0, n1), shape).ravel()
        total = np.broadcast_to(np.asarray(x0) + x1, shape).ravel()
        before = np.zeros(share.size, int) if self._law_of is None else self._law_of
        apart = [before, total, share]
        _, first, law_of = np.unique(np.stack(apart), axis=1, return_index=True, return_inverse=True)
        before, total, share = (column[first] for column in apart)
        self._law_of, self.count = law_of.reshape(-1), self.count + np.broadcast_to(x1, shape)
        self._looks = self._looks[before] + ((share > 0) & (share < 1))  # both arms had traffic
        self._spent, self._low = self._spent[before], self._low[before]
        law = self._followed(self._law[before], total, share)
        above = np.zeros((len(law), law.shape[1] + 1))
        above[:, :-1] = np.cumsum(law[:, ::-1], axis=1)[:, ::-1]
        allowed = self._alpha * self._looks / (self._looks + self._half) - self._spent
        boundary = (above > np.maximum(allowed, 0)[:, None]).sum(axis=1)
        self._spent += above[np.arange(len(law)), boundary]
        law[np.arange(law.shape[1]) >= boundary[:, None]] = 0
        self._law = law
        return np.asarray(self.count >= (self._low + boundary)[self._law_of].reshape(shape))

    def _followed(self, law: np.ndarray, total: np.ndarray, share: np.ndarray) -> np.ndarray:
        """The laws of the count after `total` more bad outcomes, each from its own `_low` on."""
        if not total.any():
            return law
        least = np.maximum(binom.ppf(_FORGOTTEN, total, share), 0).astype(int)
        most = np.maximum(binom.isf(_FORGOTTEN, total, share), least).astype(int)
        more = binom.pmf(least[:, None] + np.arange((most - least).max() + 1), total[:, None], share[:, None])
        after = np.zeros((len(law), law.shape[1] + more.shape[1] - 1))
        for k in range(more.shape[1]):
            after[:, k : k + law.shape[1]] += law * more[:, k, None]
        seen = after > _FORGOTTEN
        first = seen.argmax(axis=1)
        beyond = np.where(seen.any(axis=1), seen.shape[1] - seen[:, ::-1].argmax(axis=1), 1)
        at = first[:, None] + np.arange((beyond - first).max())
        inside = at < after.shape[1]
        after = np.where(inside, np.take_along_axis(after, np.where(inside, at, 0), axis=1), 0.0)
        self._low = self._low + least + first
        self._spent += np.maximum(law.sum(axis=1) - after.sum(axis=1), 0)
        return after


# --- on totals so far -----------------------------------------------------------------------------------------
def z_score(x0: np.ndarray, x1: np.ndarray, n0: np.ndarray, n1: np.ndarray) -> np.ndarray:
    """Pooled two-proportion z, canary less champion; 0 where there is nothing to compare."""
    n0, n1 = np.maximum(n0, 1), np.maximum(n1, 1)
    pooled = (np.asarray(x0) + x1) / (n0 + n1)
    variance = pooled * (1 - pooled) * (1 / n0 + 1 / n1)
    return np.divide(x1 / n1 - x0 / n0, np.sqrt(variance), out=np.zeros(variance.shape), where=variance > 0)


def msprt_log(x0: np.ndarray, x1: np.ndarray, n0: np.ndarray, n1: np.ndarray, tau: float) -> np.ndarray:
    """Log of the mixture likelihood ratio, N(0, tau^2) on the difference of rates; 0 without exposures of both arms."""
    both = (np.asarray(n0) > 0) & (np.asarray(n1) > 0)
    n0, n1 = np.maximum(n0, 1), np.maximum(n1, 1)
    pooled = (np.asarray(x0) + x1 + 0.5) / (n0 + n1 + 1)
    v = np.maximum(pooled * (1 - pooled), 1e-12) * (1 / n0 + 1 / n1)
    d = x1 / n1 - x0 / n0
    return np.where(both, 0.5 * np.log(v / (v + tau**2)) + d**2 * tau**2 / (2 * v * (v + tau**2)), 0.0)


def band_width(n: np.ndarray, alpha: float) -> np.ndarray:
    """Half width of the band about an empirical distribution function of n values that holds for all n at once with
    probability 1 - alpha; 1 or more (nothing is known) for few values."""
    n = np.maximum(np.asarray(n, float), 1e-9)
    return 0.85 * np.sqrt((np.log(np.log(math.e * np.maximum(n, 1))) + 0.8 * math.log(1612 / alpha)) / n)


def slower(champion: np.ndarray, canary: np.ndarray, alpha: float) -> np.ndarray:
    """Whether the canary's latency is higher at some quantile, valid at any time at level alpha.

    Both are histograms so far with the same buckets, shape (..., buckets). Serves quantiles up to about the 95th.
    """
    n0, n1 = champion.sum(axis=-1), canary.sum(axis=-1)
    below0 = np.cumsum(champion, axis=-1) / np.maximum(n0, 1)[..., None]
    below1 = np.cumsum(canary, axis=-1) / np.maximum(n1, 1)[..., None]
    apart = (below0 - below1).max(axis=-1)
    known = (n0 > 0) & (n1 > 0)
    return np.asarray(known & (apart > band_width(n0, alpha / 2) + band_width(n1, alpha / 2)))


def shift(
    canary: np.ndarray, control: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hodges-Lehmann shift of two series, canary less control, and its interval: (estimate, low, high).

    Both have shape (..., values); NaN is left out, and where nothing is left all are NaN. The ends are the roots of the
    Mann-Whitney z of `canary - shift` against `control` with continuity correction and correction for ties within a
    series. That z is a step function that falls at the pairwise differences, so its roots are among these, and no
    search is needed.
    """
    m, n = (np.sum(~np.isnan(series), axis=-1) for series in (canary, control))
    pairs = canary[..., :, None] - control[..., None, :]
    pairs = np.sort(pairs.reshape(*pairs.shape[:-2], -1), axis=-1)  # NaN last
    of, both = m * n, np.maximum(m + n, 2)
    sigma = np.sqrt(of / 12 * ((both + 1) - (_ties(canary) + _ties(control)) / (both * (both - 1))))
    j = np.ceil(of / 2 + 0.5 - norm.ppf(0.5 + confidence / 2) * sigma).astype(int) - 1

    def at(rank: np.ndarray) -> np.ndarray:
        """The difference of that rank, from 1."""
        index = np.clip(rank, 1, np.maximum(of, 1)) - 1
        return np.where(of > 0, np.take_along_axis(pairs, index[..., None], axis=-1)[..., 0], np.nan)

    j = np.maximum(j, 1)
    return (at((of + 1) // 2) + at(of // 2 + 1)) / 2, at(j), at(of + 1 - j)


def _ties(values: np.ndarray) -> np.ndarray:
    """Sum of t^3 - t over the groups of t equal values."""
    same = (values[..., :, None] == values[..., None, :]).sum(axis=-1)  # 0 for NaN
    return (same**2 - (same > 0)).sum(axis=-1)
