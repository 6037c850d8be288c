"""Predictive scaling as AWS offers it, with a seasonal mean in place of its forecaster, which is not public.

Origin: EC2 Auto Scaling's user guide and `PredictiveScalingConfiguration` API. The forecast sets a lower bound on
the group from hour to hour, and never scales in; a dynamic policy runs beside it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from pilotage.control.hpa import Hpa
from pilotage.control.policy import Controller, Decision, Observation, Pace, Policy, Situation

HOUR_S = 3600.0
LEAST_H, MOST_H, AHEAD_H = 24, 14 * 24, 48
DAY_H, WEEK_H = 24, 7 * 24


def forecast(load: Mapping[int, float], hour: int) -> dict[int, float] | None:
    """The load of the 48 hours from `hour` on; None where fewer than 24 hours are known.

    `load` maps hours since Monday 00:00 to their mean load. An hour's forecast is the mean of the same hours of the
    week in the last 14 days, or of the day where there is none.
    """
    known = {h: v for h, v in load.items() if hour - MOST_H <= h < hour}
    if len(known) < LEAST_H:
        return None
    means: dict[int, dict[int, list[float]]] = {DAY_H: defaultdict(list), WEEK_H: defaultdict(list)}
    for h, v in known.items():
        for season, values in means.items():
            values[h % season].append(v)
    out = {}
    for h in range(hour, hour + AHEAD_H):
        same = means[WEEK_H].get(h % WEEK_H) or means[DAY_H].get(h % DAY_H)
        out[h] = float(np.mean(same)) if same else float(np.mean(list(known.values())))
    return out


def minimum(now_s: float, load: Mapping[int, float], target: float, buffer_s: float = 300.0) -> int:
    """Instances wanted at least: for this hour, and for the next from `buffer_s` before it begins."""
    hours = {int(now_s // HOUR_S), int((now_s + buffer_s) // HOUR_S)}
    return max(math.ceil(load.get(hour, 0.0) / target - 1e-9) for hour in hours)


def within(
    wanted: int,
    most: int,
    breach: Literal["HonorMaxCapacity", "IncreaseMaxCapacity"] = "HonorMaxCapacity",
    buffer_percent: float = 0.0,
) -> tuple[int, int]:
    """The forecast count and the group's maximum, which a breach may raise for good."""
    if wanted <= most or breach == "HonorMaxCapacity":
        return min(wanted, most), most
    return wanted, math.ceil(wanted * (1 + buffer_percent / 100) - 1e-9)


def effective(minimum: int, dynamic: int | None, present: int) -> int:
    """The size of the group; a forecast alone does not scale in."""
    return max(minimum, present if dynamic is None else dynamic)


class PredictiveSeasonal(Policy, frozen=True, kw_only=True, tag="predictive-seasonal"):
    """Predictive scaling in the mode ForecastAndScale, beside a dynamic policy (None: nothing scales in).

    The load metric is the arrival rate, and the target value `target_utilization` of what a replica serves at full
    batches. The maximum is honoured, as is the default: what bounds a service here is not a policy's to raise.
    """

    target_utilization: Annotated[float, Meta(ge=0.2, le=1.2)] = 0.7
    scheduling_buffer_s: Annotated[float, Meta(ge=0, le=3599)] = 300.0
    refresh_s: Annotated[float, Meta(gt=0, le=86400)] = 6 * HOUR_S
    dynamic: Hpa | None = Hpa()

    def begin(self, situation: Situation) -> Controller:
        return _PredictiveSeasonal(self, situation)

    def period_s(self) -> float | None:
        return None if self.dynamic is None else self.dynamic.period_s()


class _PredictiveSeasonal:
    def __init__(self, policy: PredictiveSeasonal, situation: Situation) -> None:
        self._policy, self._situation = policy, situation
        self._target = policy.target_utilization * situation.capacity_rps()
        self._hpa = None if policy.dynamic is None else policy.dynamic.begin(situation)
        self._refresh = Pace(policy.refresh_s, situation.tick_s)
        self._sums: defaultdict[int, list[float]] = defaultdict(list)
        self._forecast: dict[int, float] | None = None
        self._begun = False

    def decide(self, seen: Observation) -> Decision:
        situation, now_s = self._situation, seen.now_s
        if not self._begun:
            past = situation.history_rps
            times_s = now_s - situation.tick_s * np.arange(len(past), 0, -1)
            for time_s, rate in zip(times_s.tolist(), past.tolist(), strict=True):
                self._note(time_s, rate)
            self._begun = True
        else:
            self._note(now_s - situation.tick_s, seen["arrival_rate"])
        if not seen.counted:
            return Decision(reason="no replica counts")
        if self._refresh.due(now_s):
            whole = HOUR_S / situation.tick_s
            load = {h: float(np.mean(v)) for h, v in self._sums.items() if len(v) > 0.99 * whole - 1}
            self._forecast = forecast(load, int(now_s // HOUR_S))
        least = 0
        if self._forecast is not None:
            least = minimum(now_s, self._forecast, self._target, self._policy.scheduling_buffer_s)
            least, _ = within(least, situation.service.max_replicas)
        dynamic = None
        reason = "no forecast" if self._forecast is None else f"forecast wants at least {least}"
        if self._hpa is not None:
            decision = self._hpa.decide(seen)
            dynamic = seen.replicas + decision.order - decision.release
            reason += f"; {decision.reason}"
        return Decision.towards(effective(least, dynamic, seen.replicas), seen, reason=reason)

    def _note(self, time_s: float, rate_rps: float) -> None:
        if not math.isnan(rate_rps):
            self._sums[int(time_s // HOUR_S)].append(rate_rps)
