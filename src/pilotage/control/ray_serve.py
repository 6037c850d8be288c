"""Ray Serve's replica autoscaler, faithfully.

Origin: ray-project/ray `python/ray/serve/autoscaling_policy.py` and `config.py`, as of 2.60. `scaled` and `Delay`
are functions of plain values, as upstream's tests call them, and `wanted` puts them together; `RayServe` feeds it
from observations.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta

from pilotage.control.policy import Controller, Decision, Observation, Pace, Policy, Situation
from pilotage.world.spec import Count, NonNegative, Positive, PositiveCount

_LOG = {"log": True}


def scaled(desired: float, current: int, up_factor: float = 1.0, down_factor: float = 1.0) -> int:
    """The desired count after the factor on the change; a change downwards is at least one replica."""
    change = desired - current
    count = math.ceil(current + (up_factor if change > 0 else down_factor) * change)
    if math.ceil(desired) < current and count == current:
        count -= 1
    return count


@dataclass(slots=True)
class Delay:
    """A wish becomes a decision when it has kept its direction for long enough.

    `direction` is that of the wish (1, -1; 0: none), `since_s` since when it is held. Only the step from 1 to 0
    leads to zero, after `to_zero_s` (None: as any other step down).
    """

    up_s: float = 30.0
    down_s: float = 600.0
    to_zero_s: float | None = None
    direction: int = 0
    since_s: float = 0.0

    def decide(self, now_s: float, wish: int, target: int) -> int:
        """The new target, given the wish and the present target."""
        direction = (wish > target) - (wish < target)
        if direction != self.direction:
            self.direction, self.since_s = direction, now_s
        if direction == 0:
            return target
        delay_s = self.up_s
        if direction < 0:
            delay_s = self.down_s
            if target == 1:
                delay_s = self.down_s if self.to_zero_s is None else self.to_zero_s
            else:
                wish = max(1, wish)
        if now_s - self.since_s + 1e-6 < delay_s:
            return target
        self.direction = 0
        return wish


def wanted(
    now_s: float,
    requests: float,
    current: int,
    target: int,
    delay: Delay,
    *,
    target_ongoing: float,
    up_factor: float = 1.0,
    down_factor: float = 1.0,
) -> int:
    """The new target before the replica bounds. `current` replicas run, and have this many ongoing requests."""
    if current == 0:  # a cold start does not wait
        return max(math.ceil(up_factor), target) if requests > 0 else target
    desired = requests / target_ongoing
    return delay.decide(now_s, scaled(desired, current, up_factor, down_factor), target)


class RayServe(Policy, frozen=True, kw_only=True, tag="ray-serve"):
    """An AutoscalingConfig with upstream's defaults; replica bounds of None are the service's.

    Every `metrics_interval_s` the ongoing requests (executing and waiting) are averaged over `look_back_period_s`.
    Upstream's control loop runs ten times a second. Here it runs once: what it goes by changes every
    `metrics_interval_s`, and delays are whole seconds, so that only a cold start is later, by less than a second.
    `control_loop_s=0.1` is upstream's pace, at ten times the price.
    """

    target_ongoing_requests: Annotated[float, Meta(ge=0.5, le=64, extra=_LOG)] = 2.0
    look_back_period_s: Annotated[float, Meta(ge=1, le=600, extra=_LOG)] = 30.0
    upscale_delay_s: Annotated[float, Meta(ge=0, le=600)] = 30.0
    downscale_delay_s: Annotated[float, Meta(ge=0, le=3600)] = 600.0
    downscale_to_zero_delay_s: NonNegative | None = None
    upscaling_factor: Annotated[float, Meta(ge=0.1, le=10, extra=_LOG)] = 1.0
    downscaling_factor: Annotated[float, Meta(ge=0.1, le=10, extra=_LOG)] = 1.0
    metrics_interval_s: Positive = 10.0
    control_loop_s: Positive = 1.0
    min_replicas: Count | None = None
    max_replicas: PositiveCount | None = None

    def begin(self, situation: Situation) -> Controller:
        return _RayServe(self, situation)

    def period_s(self) -> float:
        return self.control_loop_s


class _RayServe:
    def __init__(self, policy: RayServe, situation: Situation) -> None:
        service = situation.service
        self._policy = policy
        self._low = service.min_replicas if policy.min_replicas is None else policy.min_replicas
        self._high = service.max_replicas if policy.max_replicas is None else policy.max_replicas
        self._delay = Delay(
            policy.upscale_delay_s, policy.downscale_delay_s, policy.downscale_to_zero_delay_s
        )
        self._recent: deque[float] = deque(maxlen=max(1, round(policy.look_back_period_s / situation.tick_s)))
        self._pushes = Pace(policy.metrics_interval_s, situation.tick_s)
        self._requests = 0.0
        self._target: int | None = None

    def decide(self, seen: Observation) -> Decision:
        p = self._policy
        if not seen.counted:
            return Decision(reason="no replica counts")
        if self._target is None:
            self._target = seen.replicas
        ongoing = seen["concurrency"]
        if not math.isnan(ongoing):
            self._recent.append(ongoing)
        if self._pushes.due(seen.now_s) and self._recent:
            self._requests = float(np.mean(self._recent))
        current = int(seen["replicas_ready"])
        requests = self._requests
        if current == 0:  # handles report at once what no replica takes
            requests = float(np.nan_to_num(seen["queue_length"]))
        if not self._recent:
            return Decision(reason="no metrics")
        target = wanted(
            seen.now_s,
            requests,
            current,
            self._target,
            self._delay,
            target_ongoing=p.target_ongoing_requests,
            up_factor=p.upscaling_factor,
            down_factor=p.downscaling_factor,
        )
        self._target = min(max(target, self._low), self._high)
        return Decision.towards(self._target, seen, reason=f"{requests:.1f} ongoing requests")
