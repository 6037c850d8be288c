"""The learned rollout policy: what is believed of a new version, and a network that says what to do next.

After every interval it chooses the canary's share of the next one, or to promote, or to abort. What it looks at is the
posterior of how many times the champion's rate each kind of bad outcome has under the canary, what that is worth in
dollars, how much traffic tells, and how long the decision will last. A test that is valid at any time stands above it:
what that rejects is aborted whatever the network says. It works on lanes as `control.sequential` does, so that training
runs what production runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from pilotage.control.canary import (
    ABORT,
    CONTINUE,
    METRICS,
    PROMOTE,
    QUIET,
    WAIT,
    Evidence,
    Judge,
    Level,
    Numbers,
    Rule,
)
from pilotage.control.network import Forward, Network
from pilotage.control.sequential import RATIOS, CountEvidence
from pilotage.world.spec import NonNegative, Positive, PositiveCount

GRID: Final = (0.5, 0.75, 0.9, 1.0, *RATIOS)  # canary's rate over the champion's
_SAME: Final = GRID.index(1.0)
_ABOVE: Final = np.maximum(np.array(GRID) - 1, 0)
_CHANGE: Final = np.array(GRID) - 1
SHARES: Final = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
ACTIONS: Final = len(SHARES) + 2  # the shares, then promote, then abort
BEGINS: Final = 0.05  # the share of the first interval, before anything is known
LEAST: Final = 200  # requests of the canary, before which it is not promoted

# worth: dollars a request of the champion's costs by a kind of bad outcome; stakes: their sum and the gain
FEATURES: Final = (
    *(f"{metric}_{what}" for metric in METRICS for what in (
        "odds",  # log odds that the canary is worse
        "loss",  # expected rise of the worth, over the stakes
        "seen",  # log of the bad outcomes so far
        "tells",  # log of the bad outcomes that all traffic of an interval has
        "worth",  # log, over the stakes
    )),
    "gain",  # log of what a request is worth more under a good version, over the stakes
    "value",  # what it is expected to be worth more, over the stakes
    "spread",  # standard deviation of that, log
    "certainty",  # value over spread
    "share",  # log of the canary's share
    "age",  # log of intervals so far
    "left",  # log of intervals to come
    "trial",  # log of what an interval on trial costs, over the stakes of its traffic
    "requests",  # log of the canary's so far
    "labels",  # 1 once labels have come
)  # fmt: skip


class Prices:
    """What a decision is worth: numbers, or arrays of them, one per lane."""

    __slots__ = ()

    error_usd: Numbers
    slow_usd: Numbers
    wrong_usd: Numbers
    gain_usd: Numbers
    trial_usd: Numbers
    prior_bad: Numbers
    horizon: Numbers
    alpha: float

    @property
    def by_metric(self) -> dict[str, Numbers]:
        return {"errors": self.error_usd, "slow": self.slow_usd, "wrong": self.wrong_usd}


class Belief:
    """What is known of canaries (lanes) so far, FEATURES of it, and what actions come to."""

    def __init__(self, terms: Prices) -> None:
        self._terms = terms
        self.share = np.asarray(BEGINS)  # the canary's of all traffic, in the interval to come
        self._quiet = np.zeros((), bool)
        self._tests = {metric: CountEvidence(GRID) for metric in METRICS}
        self._bad = dict.fromkeys(METRICS, np.zeros(()))
        self._of = dict.fromkeys(METRICS, np.zeros(()))
        self._found = dict.fromkeys(METRICS, np.zeros(()))  # under both
        self._traffic, self._labelled = np.zeros(()), np.zeros(())
        self._requests, self._age = np.zeros(()), np.zeros(())

    def see(self, seen: Evidence) -> np.ndarray:
        """FEATURES, shape (..., features), after one more interval."""
        requests = np.asarray(seen.canary.requests)
        self._quiet = (requests == 0) | (np.asarray(seen.champion.requests) == 0)
        self._requests = self._requests + requests
        self._traffic = self._traffic + requests / self.share
        self._labelled = self._labelled + seen.champion.labelled + seen.canary.labelled
        self._age = self._age + np.ones(requests.shape)
        for metric, test in self._tests.items():
            x0, x1, n0, n1 = seen.of(metric)
            test.see(x0, x1, n0, n1)
            self._bad[metric], self._of[metric] = self._bad[metric] + x0, self._of[metric] + n0
            self._found[metric] = self._found[metric] + x0 + x1
        return self._features()

    def act(self, actions: np.ndarray) -> np.ndarray:
        """Outcomes of actions, and the next share. An interval without traffic in one of the arms is waited out; what a
        test that is valid at any time rejects is aborted, and nothing is promoted on fewer than LEAST requests."""
        rejected = np.zeros((), bool)
        for test in self._tests.values():
            log = _mean_exp(test.logs[..., _SAME + 1 :])
            rejected = rejected | (log >= math.log(len(METRICS) / self._terms.alpha))
        more = np.asarray(actions) < len(SHARES)
        moved = more & ~self._quiet & ~rejected
        self.share = np.where(moved, np.array(SHARES)[np.where(more, actions, 0)], self.share)
        enough = self._requests >= LEAST
        aborts, promotes = np.asarray(actions) == ACTIONS - 1, ~more & enough
        return np.select([rejected, self._quiet, aborts, promotes], [ABORT, WAIT, ABORT, PROMOTE], CONTINUE)

    def forget(self, lanes: np.ndarray) -> None:
        """Begins anew in some lanes."""
        self.share[lanes] = BEGINS
        for values in (self._requests, self._age, self._traffic, self._labelled):
            values[lanes] = 0
        for metric, test in self._tests.items():
            test.logs[lanes] = 0
            for by_metric in (self._bad, self._of, self._found):
                by_metric[metric][lanes] = 0

    def _features(self) -> np.ndarray:
        terms = self._terms
        per_interval = self._traffic / np.maximum(self._age, 1)
        rates = {metric: (self._bad[metric] + 0.5) / (self._of[metric] + 1.0) for metric in METRICS}
        worth = {metric: rates[metric] * price for metric, price in terms.by_metric.items()}
        stakes = terms.gain_usd + sum(worth.values())
        columns, value, variance, good = [], 0.0, 0.0, 1.0
        for metric, test in self._tests.items():
            believed = self._believed(test.logs)
            bad = believed[..., _SAME + 1 :].sum(axis=-1)
            rise = (believed * _CHANGE).sum(axis=-1)
            good = good * (1 - bad)
            value = value - rise * worth[metric]
            variance = variance + ((believed * _CHANGE**2).sum(axis=-1) - rise**2) * worth[metric] ** 2
            tells = per_interval * rates[metric] * (
                self._labelled / np.maximum(self._traffic, 1.0) if metric == "wrong" else 1.0
            )  # fmt: skip
            columns += [
                np.log(bad + 1e-6) - np.log(1 - bad + 1e-6),
                _squashed(rise * worth[metric] / stakes * 10),
                np.log1p(self._found[metric]),
                np.log(tells + 1e-3),
                np.log(worth[metric] / stakes + 1e-4),
            ]
        value = value + good * terms.gain_usd
        spread = np.sqrt(np.maximum(variance + good * (1 - good) * terms.gain_usd**2, 0)) / stakes + 1e-4
        columns += [
            np.log(terms.gain_usd / stakes + 1e-4),
            _squashed(value / stakes * 10),
            np.log(spread),
            _squashed(value / stakes / spread),
            np.log(self.share),
            np.log1p(self._age),
            np.log1p(np.maximum(terms.horizon - self._age, 0)),
            np.log(terms.trial_usd / np.maximum(per_interval * stakes, 1e-12) + 1e-4),
            np.log1p(self._requests),
            self._labelled > 0,
        ]
        return np.stack(np.broadcast_arrays(*columns), axis=-1).astype(float)

    def _believed(self, logs: np.ndarray) -> np.ndarray:
        """Posterior over GRID: beforehand as often worse as makes `prior_bad` of all metrics together, better in half
        of the rest, each spread evenly."""
        bad = 1 - (1 - np.asarray(self._terms.prior_bad)[..., None]) ** (1 / len(METRICS))
        prior = np.where(np.arange(len(GRID)) > _SAME, bad / len(RATIOS), (1 - bad) / (2 * _SAME))
        prior = np.where(np.arange(len(GRID)) == _SAME, (1 - bad) / 2, prior)
        odds = prior * np.exp(logs - logs.max(axis=-1, keepdims=True))
        believed: np.ndarray = odds / odds.sum(axis=-1, keepdims=True)
        return believed


def _mean_exp(logs: np.ndarray) -> np.ndarray:
    """Log of the mean of exponentials over the last axis."""
    top = logs.max(axis=-1)
    out: np.ndarray = top + np.log(np.exp(logs - top[..., None]).mean(axis=-1))
    return out


def _squashed(x: Numbers) -> Numbers:
    return np.sign(x) * np.log1p(np.abs(x))


class LearnedRollout(Rule, Prices, frozen=True, kw_only=True, tag="learned-rollout"):
    """A network that says, of FEATURES, which of ACTIONS comes next.

    Prices are of one request that is answered with an error, slowly, or wrongly; `gain_usd` is what one is worth more
    under a good version, and `trial_usd` what an interval on trial costs (replicas beside those that serve). What is
    decided lasts until `horizon` intervals after the beginning, of which a version is bad with `prior_bad`. `alpha` is
    the level of the test that aborts in any case.
    """

    network: Network
    error_usd: Positive = 0.01
    slow_usd: NonNegative = 0.001
    wrong_usd: NonNegative = 0.001
    gain_usd: Positive = 1e-5
    trial_usd: NonNegative = 0.0
    prior_bad: Level = 0.2
    horizon: PositiveCount = 240
    alpha: Level = 0.02

    def __post_init__(self) -> None:
        self.network.must_map(len(FEATURES), ACTIONS)

    def begin(self) -> Judge:
        return Learned(Forward(self.network), self)


class Learned(Judge):
    """Judge and schedule in one, of what scores actions by FEATURES, and of what things are worth."""

    def __init__(self, scores: Callable[[np.ndarray], np.ndarray], prices: Prices) -> None:
        self._scores, self._belief = scores, Belief(prices)

    def step(self, seen: Evidence) -> np.ndarray:
        rows = self._belief.see(seen)
        actions = self._scores(rows.reshape(-1, len(FEATURES))).argmax(axis=-1).reshape(rows.shape[:-1])
        out = self._belief.act(actions)
        self.say(out, lambda: self._reasons(rows))
        return out

    def weight(self, seen: Evidence | None) -> np.ndarray:
        """The canary's share in the next interval."""
        return self._belief.share

    def _reasons(self, rows: np.ndarray) -> Sequence[str]:
        of = dict(zip(FEATURES, rows.tolist(), strict=True))
        worst = max(METRICS, key=lambda metric: of[f"{metric}_odds"])
        chance = 1 / (1 + math.exp(-of[f"{worst}_odds"]))
        said = f"{worst}: worse with probability {chance:.3g}; the version is worth {of['certainty']:+.3g} spreads"
        return (f"{said}: goes on at a share of {float(self._belief.share):g}", said, said, QUIET)
