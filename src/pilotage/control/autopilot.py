"""Google's Autopilot, its horizontal part.

Origin: Rzadca et al., EuroSys'20; its code is not public, and all but the outline is as recalled from the paper,
unverified. The signal is the usage of all tasks, averaged over five minutes; a task's unit of usage is one replica
that is always busy.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Annotated

import numpy as np
from msgspec import Meta

from pilotage.control.policy import Controller, Decision, Observation, Policy, Situation

PERIOD_S = 300.0
_LOG = {"log": True}


def recommended(usage: np.ndarray, target: float, percentile: float = 100.0) -> int:
    """Tasks for a statistic (100: the maximum) of the summed usage over the window, at so much usage per task."""
    ranked = np.sort(usage)
    at = max(0, math.ceil(len(ranked) * percentile / 100) - 1)
    return math.ceil(float(ranked[at]) / target - 1e-9)


def deferred(recommendations: Iterable[tuple[float, int]], now_s: float, delay_s: float) -> int:
    """The highest of the recommendations (time, count) since `delay_s` ago: downscaling waits for so long."""
    return max(count for time_s, count in recommendations if time_s >= now_s - delay_s)


def settled(
    wanted: int,
    present: int,
    *,
    starting: int = 0,
    deadband: float = 0.1,
    most_starting: float = 0.5,
    most_removed: float = 1.0,
) -> int:
    """What becomes of a wish: small changes are ignored, growth leaves enough tasks that run, decay is slow.

    `deadband` and `most_removed` are shares of the present tasks, `most_starting` is one of the resulting ones.
    """
    if abs(wanted - present) <= deadband * present:
        return present
    if wanted > present:
        running = present - starting
        limit = math.floor(running / (1 - most_starting) + 1e-9) if most_starting < 1 else wanted
        return min(wanted, max(limit, present, 1))
    return max(wanted, present - max(1, math.floor(most_removed * present)))


class Autopilot(Policy, frozen=True, kw_only=True, tag="autopilot"):
    """Autopilot with the windows of the paper: usage of the last three days, downscaling after two.

    The paper names no default for the target, the deadband and the limits on growth and decay; those here are ours.
    Of the time before a run only arrival rates are known: its usage is taken to be their work at full batches.
    """

    target_utilization: Annotated[float, Meta(ge=0.2, le=0.95)] = 0.6
    percentile: Annotated[float, Meta(ge=50, le=100)] = 100.0
    window_s: Annotated[float, Meta(ge=600, le=604800, extra=_LOG)] = 72 * 3600.0
    downscale_delay_s: Annotated[float, Meta(ge=300, le=604800, extra=_LOG)] = 48 * 3600.0
    deadband: Annotated[float, Meta(ge=0, le=0.5)] = 0.1
    most_starting: Annotated[float, Meta(ge=0.1, le=1)] = 0.5
    most_removed: Annotated[float, Meta(ge=0.02, le=1)] = 0.2

    def begin(self, situation: Situation) -> Controller:
        return _Autopilot(self, situation)

    def period_s(self) -> float:
        return PERIOD_S


class _Autopilot:
    def __init__(self, policy: Autopilot, situation: Situation) -> None:
        self._policy, self._tick_s = policy, situation.tick_s
        self._usage: deque[float] = deque(maxlen=max(1, round(policy.window_s / situation.tick_s)))
        self._usage.extend((situation.history_rps / situation.capacity_rps()).tolist())
        self._recommendations: deque[tuple[float, int]] = deque(
            maxlen=max(1, round(policy.downscale_delay_s / situation.tick_s)) + 1
        )

    def decide(self, seen: Observation) -> Decision:
        p = self._policy
        busy = seen["utilization"] * seen["replicas_ready"]
        if not math.isnan(busy):
            self._usage.append(busy)
        if not self._usage or not seen.counted:
            return Decision(reason="no usage known yet")
        wanted = recommended(np.array(self._usage), p.target_utilization, p.percentile)
        self._recommendations.append((seen.now_s, wanted))
        wanted = deferred(self._recommendations, seen.now_s, p.downscale_delay_s)
        starting = seen.replicas - int(seen["replicas_ready"])
        count = settled(
            wanted,
            seen.replicas,
            starting=starting,
            deadband=p.deadband,
            most_starting=p.most_starting,
            most_removed=p.most_removed,
        )
        return Decision.towards(count, seen, reason=f"usage of the past wants {wanted}")
