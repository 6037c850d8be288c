"""A policy behind a monitor that scrapes, for the simulator: what it sees is older and smoother than what happened.

The simulator looks every second, and the policy decides at its ticks. It sees the mean rate of `window_s` that ended
`age_s` ago, as Prometheus tells it, and the busiest seconds of that as `measurement.PEAK` asks for them. Counts of
replicas are of the moment: the target has the last word on them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pilotage.control.policy import INDEX, Controller, Decision, Observation, Pace, Policy, Situation

LOOK_S = 1.0
SMOOTHED = 4  # looks, of the busiest seconds
RATE, BUSIEST = INDEX["arrival_rate"], INDEX["arrival_peak"]


class Scraped(Policy, frozen=True, kw_only=True, tag="scraped"):
    """`policy` deciding every `tick_s`; without a past, as the live one has none."""

    policy: Policy
    tick_s: float
    window_s: float
    age_s: float

    def begin(self, situation: Situation) -> Controller:
        return _Scraped(self, replace(situation, tick_s=self.tick_s, history_rps=np.zeros(0)))

    def period_s(self) -> float:
        return LOOK_S


class _Scraped:
    def __init__(self, scraped: Scraped, situation: Situation) -> None:
        self._inner = scraped.policy.begin(situation)
        self._pace = Pace(scraped.tick_s, LOOK_S)
        self._window, self._age = round(scraped.window_s / LOOK_S), round(scraped.age_s / LOOK_S)
        self._rates: list[float] = []

    def decide(self, seen: Observation) -> Decision:
        self._rates.append(seen["arrival_rate"])
        if not self._pace.due(seen.now_s):
            return Decision(reason="between ticks")
        rates = np.nan_to_num(np.r_[np.zeros(self._window + self._age), self._rates])
        window = rates[len(rates) - self._age - self._window : len(rates) - self._age]
        values = seen.values.copy()
        values[RATE] = window.mean()
        values[BUSIEST] = np.convolve(window, np.full(SMOOTHED, 1 / SMOOTHED), "valid").max()
        return self._inner.decide(Observation(seen.now_s, values, seen.age_s))
