"""What is seen of a canary, and the rules that others judge it by.

A rule is a frozen specification; `begin()` gives the controller of one canary, whose `judge` takes the evidence of one
interval and answers continue, promote, abort or wait. *Wait* means that this interval says nothing: no traffic is
neither failure nor success. The champion's arm should be a fresh baseline: replicas started with the canary, with a
share of traffic to compare, not the long-running rest (caches and leaks differ). Counts may be arrays of one shape,
one canary each (`step`), so that a simulation of thousands runs what production runs.

Sources: fluxcd/flagger@15bd6ad, argoproj/argo-rollouts@9f8d111, spinnaker/kayenta@a69573b (NetflixACAJudge); tests:
`control.sequential`. Ours is `control.rollout.Sequential`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.control.sequential import (
    RATIOS,
    CountEvidence,
    msprt_log,
    shift,
    z_score,
)
from pilotage.world.spec import Positive, PositiveCount, Probability, Spec

OUTCOMES: Final = ("continue", "promote", "abort", "wait")
CONTINUE, PROMOTE, ABORT, WAIT = range(4)
METRICS: Final = {"errors": "requests", "slow": "requests", "wrong": "labelled"}  # bad outcomes: of what
Level = Annotated[float, Meta(gt=0, lt=1)]
QUIET: Final = "no traffic in one of the arms"
Numbers = Any  # a number, or an array of them: one per canary


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """What one version did in an interval. `errors` and `slow` (slower than the objective) are of `requests`; `wrong`
    answers of the `labelled`, those whose labels came in this interval, however late; `latency` is a histogram of shape
    (..., buckets), equal buckets in both arms; `usd` is what it cost."""

    requests: Numbers
    errors: Numbers = 0
    slow: Numbers = 0
    labelled: Numbers = 0
    wrong: Numbers = 0
    latency: np.ndarray | None = None
    usd: Numbers = 0.0


class Evidence(msgspec.Struct, frozen=True):
    """One interval of a canary beside its champion."""

    champion: Arm
    canary: Arm

    def of(self, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Bad outcomes of champion and canary, and what they are of."""
        bad = [np.asarray(getattr(arm, metric)) for arm in (self.champion, self.canary)]
        of = [np.asarray(getattr(arm, METRICS[metric])) for arm in (self.champion, self.canary)]
        return bad[0], bad[1], of[0], of[1]

    def check(self) -> None:
        """ValueError unless these are counts that can be."""
        for who, arm in (("champion", self.champion), ("canary", self.canary)):
            for name in ("requests", "errors", "slow", "labelled", "wrong"):
                values = np.asarray(getattr(arm, name))
                if values.dtype.kind not in "iu" or np.any(values < 0):
                    raise ValueError(f"{who}: {name} is {values}; valid: whole numbers from 0")
            for name, of in METRICS.items():
                if np.any(np.asarray(getattr(arm, name)) > getattr(arm, of)):
                    raise ValueError(
                        f"{who}: {name} is {getattr(arm, name)} of {of} {getattr(arm, of)}; valid: at most as many"
                    )
            if not np.all(np.isfinite(arm.usd)) or np.any(np.asarray(arm.usd) < 0):
                raise ValueError(f"{who}: usd is {arm.usd}; valid: a finite amount from 0")
        shapes = [None if arm.latency is None else arm.latency.shape for arm in (self.champion, self.canary)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"latency has shape {shapes[0]} and {shapes[1]}; valid: equal buckets in both")


class Verdict(msgspec.Struct, frozen=True):
    outcome: Literal["continue", "promote", "abort", "wait"]
    reason: str


class Judge:
    """The controller of one canary (or, by `step`, of an array of them)."""

    reason = ""

    def judge(self, seen: Evidence) -> Verdict:
        """The verdict on one canary after one more interval; ValueError for counts that cannot be."""
        seen.check()
        outcome = int(self.step(seen))
        return Verdict(OUTCOMES[outcome], self.reason)

    def step(self, seen: Evidence) -> np.ndarray:
        """Outcomes, indices of OUTCOMES, shape of the counts; sets `reason` where there is one canary."""
        raise NotImplementedError

    def say(self, outcomes: np.ndarray, reasons: Callable[[], str | Sequence[str]]) -> None:
        """Keeps the reason of one canary's outcome; `reasons` gives one, or one per outcome, in their order."""
        if outcomes.ndim == 0:
            known = reasons()
            self.reason = known if isinstance(known, str) else known[int(outcomes)]


class Rule(Spec, frozen=True, kw_only=True, tag_field="kind"):
    """A rule for canaries."""

    def begin(self) -> Judge:
        raise NotImplementedError


def outcomes_of(abort: np.ndarray, promote: Numbers = False, wait: Numbers = False) -> np.ndarray:
    return np.select([abort, np.asarray(promote), np.asarray(wait)], [ABORT, PROMOTE, WAIT], CONTINUE)


def rate(bad: np.ndarray, of: np.ndarray) -> np.ndarray:
    return np.divide(bad, of, out=np.full(np.broadcast(bad, of).shape, np.nan), where=np.asarray(of) > 0)


class Flagger(Rule, frozen=True, kw_only=True, tag="flagger"):
    """Every interval the canary's success rate, and the share that met the objective, against a fixed floor.

    A check without traffic fails ("no values found"). `threshold` failed checks abort; passes do not reset the count.
    `passes` passed checks (maxWeight / stepWeight) promote. `max_slow` None: no latency metric.
    """

    threshold: PositiveCount = 1
    min_success: Probability = 0.99
    max_slow: Probability | None = None
    passes: PositiveCount = 10

    def begin(self) -> Judge:
        return _Flagger(self)


class _Flagger(Judge):
    def __init__(self, rule: Flagger) -> None:
        self._rule, self._failed, self._passed = rule, np.zeros((), int), np.zeros((), int)

    def step(self, seen: Evidence) -> np.ndarray:
        _, x, _, n = seen.of("errors")
        ok = 1 - rate(x, n) >= self._rule.min_success  # without traffic: NaN, not ok
        if self._rule.max_slow is not None:
            ok &= rate(seen.of("slow")[1], n) <= self._rule.max_slow
        self._failed, self._passed = self._failed + ~ok, self._passed + ok
        out = outcomes_of(self._failed >= self._rule.threshold, self._passed >= self._rule.passes)
        self.say(
            out,
            lambda: (
                f"{self._failed} checks failed of {self._rule.threshold} that abort, {self._passed} passed"
            ),
        )
        return out


class Argo(Rule, frozen=True, kw_only=True, tag="argo-rollouts"):
    """An AnalysisRun on the canary's success rate: more than `failure_limit` failed measurements abort, and so do more
    than `consecutive_error_limit` in a row without a value (NaN that the condition does not handle is taken as an error
    of the measurement). After `count` measurements the rest promotes."""

    failure_limit: Annotated[int, Meta(ge=0)] = 0
    consecutive_error_limit: Annotated[int, Meta(ge=0)] = 4
    min_success: Probability = 0.95
    count: PositiveCount = 10

    def begin(self) -> Judge:
        return _Argo(self)


class _Argo(Judge):
    def __init__(self, rule: Argo) -> None:
        self._rule, self._taken = rule, 0
        self._failures, self._errors = np.zeros((), int), np.zeros((), int)

    def step(self, seen: Evidence) -> np.ndarray:
        _, x, _, n = seen.of("errors")
        self._taken += 1
        empty = np.asarray(n == 0)
        self._failures = self._failures + (1 - rate(x, n) < self._rule.min_success)
        self._errors = np.where(empty, self._errors + 1, 0)
        failed = self._failures > self._rule.failure_limit
        out = outcomes_of(
            failed | (self._errors > self._rule.consecutive_error_limit),
            self._taken >= self._rule.count,
            empty,
        )
        self.say(
            out,
            lambda: (
                f"{self._failures} of {self._taken} measurements failed, the last {self._errors} had no value"
            ),
        )
        return out


class Kayenta(Rule, frozen=True, kw_only=True, tag="kayenta"):
    """NetflixACAJudge on the series of per-interval error rates: High where the 98 % interval of the Hodges-Lehmann
    shift lies above `tolerance` times the shift and the means' ratio is at least `allowed_increase`.

    Judges every `every` intervals; after `lifetime` the score must reach `pass_score`. A score below `marginal_score`
    aborts at once. The metric's direction is *increase*, as it is configured for errors. Intervals without traffic are
    left out of a series; without any, the metric is Nodata and the score 0.
    """

    every: PositiveCount = 60
    lifetime: PositiveCount = 60
    tolerance: Annotated[float, Meta(ge=0)] = 0.25
    confidence: Level = 0.98
    allowed_increase: Positive = 1.0
    pass_score: Annotated[float, Meta(ge=0, le=100)] = 95.0
    marginal_score: Annotated[float, Meta(ge=0, le=100)] = 75.0

    def begin(self) -> Judge:
        return _Kayenta(self)


class _Kayenta(Judge):
    def __init__(self, rule: Kayenta) -> None:
        self._rule = rule
        self._champion: list[np.ndarray] = []
        self._canary: list[np.ndarray] = []

    def step(self, seen: Evidence) -> np.ndarray:
        x0, x1, n0, n1 = seen.of("errors")
        self._champion.append(rate(x0, n0))
        self._canary.append(rate(x1, n1))
        taken, rule = len(self._canary), self._rule
        if taken % rule.every and taken < rule.lifetime:
            out = outcomes_of(np.zeros(np.broadcast(x0, x1).shape, bool))
            self.say(out, lambda: f"judged every {rule.every} intervals")
            return out
        score = np.where(self._high(np.stack(self._champion, -1), np.stack(self._canary, -1)), 0.0, 100.0)
        over = taken >= rule.lifetime
        out = outcomes_of(score < (rule.pass_score if over else rule.marginal_score), over)
        self.say(out, lambda: f"score {float(score):g} after {taken} intervals")
        return out

    def _high(self, champion: np.ndarray, canary: np.ndarray) -> np.ndarray:
        """Whether the canary is High, or has no data."""
        middle, low, _ = shift(canary, champion, self._rule.confidence)
        means = [
            np.nansum(arm, axis=-1) / np.maximum(np.sum(~np.isnan(arm), axis=-1), 1)
            for arm in (champion, canary)
        ]
        high = (low > self._rule.tolerance * np.abs(middle)) & (
            means[1] >= self._rule.allowed_increase * means[0]
        )
        return np.asarray(high | np.isnan(middle))


class _Totals(Judge):
    """Judges what has been seen so far of errors."""

    statistic = ""

    def __init__(self) -> None:
        self.taken, self._totals = 0, (np.zeros((), int),) * 4

    def step(self, seen: Evidence) -> np.ndarray:
        self.taken += 1
        x0, x1, n0, n1 = seen.of("errors")
        now = (self._totals[0] + x0, self._totals[1] + x1, self._totals[2] + n0, self._totals[3] + n1)
        self._totals = now
        abort, value = self.rejects(*now)
        out = outcomes_of(abort, wait=(n0 == 0) | (n1 == 0))
        self.say(out, lambda: (*3 * (f"{self.statistic} is {float(value):.3g}",), QUIET))
        return out

    def rejects(
        self, x0: np.ndarray, x1: np.ndarray, n0: np.ndarray, n1: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError


class ZTest(Rule, frozen=True, kw_only=True, tag="z-test"):
    """Pooled one-sided z-test on errors so far: once after `at` intervals, or at every interval from the `peek_from`-th
    on, which inflates its level several-fold."""

    critical: Positive = 1.645
    at: PositiveCount = 60
    peek_from: PositiveCount | None = None

    def begin(self) -> Judge:
        return _ZTest(self)


class _ZTest(_Totals):
    statistic = "z"

    def __init__(self, rule: ZTest) -> None:
        super().__init__()
        self._rule = rule

    def rejects(
        self, x0: np.ndarray, x1: np.ndarray, n0: np.ndarray, n1: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        z, rule = z_score(x0, x1, n0, n1), self._rule
        looks = self.taken == rule.at if rule.peek_from is None else self.taken >= rule.peek_from
        return (z > rule.critical) & looks, z


class Msprt(Rule, frozen=True, kw_only=True, tag="msprt"):
    """Mixture SPRT on the difference of error rates, N(0, tau^2): asymptotic, both arms must see the same mix."""

    alpha: Level = 0.05
    tau: Positive = 0.01

    def begin(self) -> Judge:
        return _Msprt(self)


class _Msprt(_Totals):
    statistic = "log of the mixture likelihood ratio"

    def __init__(self, rule: Msprt) -> None:
        super().__init__()
        self._rule = rule

    def rejects(
        self, x0: np.ndarray, x1: np.ndarray, n0: np.ndarray, n1: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        log = msprt_log(x0, x1, n0, n1, self._rule.tau)
        worse = x1 * n0 > x0 * n1
        return (log >= -math.log(self._rule.alpha)) & worse, log


class EProcess(Rule, frozen=True, kw_only=True, tag="e-process"):
    """Error-count e-process: aborts where it reaches 1 / alpha, which a canary that is no worse does with a probability
    of at most alpha, however long and however often it is looked at, and under changing weights and rates."""

    alpha: Level = 0.05
    ratios: Annotated[tuple[Annotated[float, Meta(gt=1)], ...], Meta(min_length=1)] = RATIOS

    def begin(self) -> Judge:
        return _EProcess(self)


class _EProcess(Judge):
    def __init__(self, rule: EProcess) -> None:
        self._rule, self._evidence = rule, CountEvidence(rule.ratios)

    def step(self, seen: Evidence) -> np.ndarray:
        x0, x1, n0, n1 = seen.of("errors")
        log = self._evidence.see(x0, x1, n0, n1)
        out = outcomes_of(log >= -math.log(self._rule.alpha), wait=(n0 == 0) | (n1 == 0))
        needed = -math.log(self._rule.alpha)
        self.say(
            out,
            lambda: (*3 * (f"log of the e-process is {float(log):.3g}, of {needed:.3g} that abort",), QUIET),
        )
        return out
