"""What is unusual in a serving metric: one value per interval in, a score, its surprise and an alert out.

Causal: a reading depends on nothing that comes later. Four views of a value are taken, on the scale of its square root
(where the noise of counts is even; of negative values, minus that of their size): its distance from what this time of
day is like, the same less the last day's level, its distance from all that is remembered, and its step from the value
before. Each is measured in its own robust standard deviations, so that one scale serves all metrics; their weighted sum
is the score, which is made to rank and is therefore not bounded. Alerts come from its tail: exceedances of a high
quantile are taken as exponential (peaks over threshold, after Siffer et al., KDD 2017), of the score's logarithm, as
scores of telemetry have Pareto tails; an alert is not repeated for a rest time.
"""

from __future__ import annotations

import math
from typing import Annotated, Final, NamedTuple

import numpy as np
from msgspec import Meta

from pilotage.world.spec import Positive, Spec

_DAY_S, _WEEK_S = 86_400, 604_800
_FEWEST: Final = 10  # values before anything is scored
_FEWEST_SCORES: Final = 60  # scores before anything is an alert
_WEIGHTS: Final = (1.0, 1.0, 1.0, 0.5)  # of the four views
_TAIL: Final = 0.02  # share of scores that counts as the tail
_FREAKS: Final = 0.002  # share of the highest scores that the tail is not fitted to
_NORMAL: Final = 1.4826  # standard deviations in a median absolute deviation


class Reading(NamedTuple):
    """`score` ranks, 0 being usual; `surprise` is -log10 of the chance of such a score; `alert` is worth a human."""

    score: float
    surprise: float
    alert: bool


class MetricAnomaly(Spec, frozen=True, kw_only=True):
    """An anomaly detector for a metric that is read every `interval_s`.

    A day's rhythm is used where the median of this time of the last seven days has told values better than the median
    of all (by a fifth, in median error), from the third day on. `memory_days` are kept. Ten values are needed before
    anything is scored, sixty scores before anything is an alert. Alerts come at most every `rest_s`, and as if by
    chance `false_alerts_per_week`. The score is the same for any unit of the metric (scale), not for any origin.
    """

    interval_s: Annotated[float, Meta(gt=0, le=_DAY_S / 4)]
    rest_s: Positive = 21_600.0
    false_alerts_per_week: Annotated[float, Meta(gt=0, le=100, extra={"log": True})] = 1.0
    memory_days: Annotated[float, Meta(ge=2, le=90)] = 28.0

    def begin(self) -> Watch:
        return Watch(self)


class Watch:
    """One metric being watched."""

    def __init__(self, spec: MetricAnomaly) -> None:
        self._day = round(_DAY_S / spec.interval_s)
        self._memory = max(round(spec.memory_days * self._day), 2 * self._day)
        self._refresh = max(1, self._day // 48)
        self._rest = max(1, round(spec.rest_s / spec.interval_s))
        self._alarming = math.log10(_WEEK_S / spec.interval_s / spec.false_alerts_per_week)
        self._values = _History(self._memory)
        self._by_season, self._by_level = _History(self._memory), _History(self._memory)  # absolute errors
        self._views = [_History(self._memory) for _ in _WEIGHTS]
        self._scores = _History(self._memory)
        self._level = self._recent = math.nan
        self._seasonal = False
        self._centre_spread = [(0.0, math.nan)] * len(_WEIGHTS)
        self._tail = (math.inf, 1.0)
        self._seen, self._last, self._since_alert = 0, math.nan, math.inf

    def update(self, value: float) -> Reading:
        """The next value. A missing one (NaN) is no evidence: score 0; it keeps its place in the day.

        Raises ValueError on an infinite value.
        """
        if math.isinf(value):
            raise ValueError(f"metric value {value}; valid: a number, or NaN where it is missing")
        x = math.copysign(math.sqrt(abs(value)), value)
        if self._seen % self._refresh == 0 or self._seen < 2 * self._refresh:
            self._learn()
        season = self._season()
        usual = season if self._seasonal and not math.isnan(season) else self._level
        views = (x - usual, x - usual - self._recent, x - self._level, x - self._last)
        score = 0.0
        for weight, view, (centre, spread) in zip(_WEIGHTS, views, self._centre_spread, strict=True):
            z = abs(view - centre) / spread
            score += weight * z if z == z else 0.0
        surprise = self._surprise(score)
        self._since_alert += 1
        alert = surprise >= self._alarming and self._since_alert > self._rest
        if alert:
            self._since_alert = 0
        self._by_season.add(abs(x - season))
        self._by_level.add(abs(x - self._level))
        for history, view in zip(self._views, views, strict=True):
            history.add(view)
        self._values.add(x)
        self._scores.add(score if x == x and self._level == self._level else math.nan)
        self._seen += 1
        self._last = self._last if x != x else x
        return Reading(score, surprise, alert)

    def _season(self) -> float:
        """The median of this time of the day on the last seven days, NaN where none is remembered."""
        then = [self._values.back(days * self._day) for days in range(1, 8)]
        return _median(np.array([v for v in then if v == v]))

    def _surprise(self, score: float) -> float:
        high, excess = self._tail
        beyond = math.log1p(score) - high
        return max(0.0, -math.log10(_TAIL) + beyond / (excess * math.log(10))) if beyond > 0 else 0.0

    def _learn(self) -> None:
        """What is usual, of all that is remembered."""
        values = self._values.all()
        if len(values) < _FEWEST:
            return
        self._level = _median(values)
        errors = self._by_season.all()
        if len(errors) >= self._day:
            self._seasonal = _median(errors) < 0.8 * _median(self._by_level.all())
        recent = self._views[0].last(self._day)
        self._recent = _median(recent) if len(recent) else 0.0
        floor = 1e-9 * abs(self._level) + 1e-150
        for k, history in enumerate(self._views):
            view = history.all()
            if len(view) >= 3:
                centre = _median(view)
                off = np.abs(view - centre)
                self._centre_spread[k] = (
                    centre,
                    max(_NORMAL * _median(off), 0.25 * float(off.mean()), floor),
                )
        scores = self._scores.all()
        if len(scores) >= _FEWEST_SCORES:
            scores = np.sort(np.log1p(scores))
            high = float(np.quantile(scores, 1 - _TAIL))
            kept = scores[: len(scores) - math.floor(_FREAKS * len(scores))]
            beyond = kept[kept > high] - high
            self._tail = (high, max(float(beyond.mean()), 1e-3)) if len(beyond) else (high, 1.0)


class _History:
    """The last values in order, in an array; missing ones keep their place."""

    def __init__(self, most: int) -> None:
        self._most, self._n = most, 0
        self._values = np.full(min(2 * most, 256), math.nan)

    def add(self, value: float) -> None:
        if self._n == len(self._values):
            if self._n < 2 * self._most:
                self._values = np.concatenate(
                    [self._values, np.full(min(self._n, 2 * self._most - self._n), math.nan)]
                )
            else:
                self._values[: self._most] = self._values[self._most :]
                self._n = self._most
        self._values[self._n] = value
        self._n += 1

    def back(self, steps: int) -> float:
        """The value so many steps before the one to come; NaN if it is not remembered."""
        return float(self._values[self._n - steps]) if steps <= min(self._n, self._most) else math.nan

    def last(self, most: int) -> np.ndarray:
        values = self._values[max(0, self._n - most) : self._n]
        return values[values == values]

    def all(self) -> np.ndarray:
        return self.last(self._most)


def _median(values: np.ndarray) -> float:
    """As numpy's, faster; NaN of none."""
    n = len(values)
    if n == 0:
        return math.nan
    middle = np.partition(values, [(n - 1) // 2, n // 2])
    return 0.5 * float(middle[(n - 1) // 2] + middle[n // 2])
