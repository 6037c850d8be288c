"""KEDA, faithfully: a scaler that owns the step between zero (or idle) and the least count, and an HPA above it.

Origin: kedacore/keda `pkg/scaling/executor/scale_scaledobjects.go`, `pkg/fallback/fallback.go`,
`apis/keda/v1alpha1`. `Executor` and `Fallback` take plain values, as upstream's tests give them; the HPA is the one
of `hpa.py`, on an external metric. `Keda` feeds them from observations; it has one trigger.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from pilotage.control.hpa import Hpa, HpaController, NoMetricsError, from_average
from pilotage.control.policy import Controller, Decision, Observation, Pace, Policy, Situation
from pilotage.world.spec import Count, NonNegative, Positive, PositiveCount

Behaviour = Literal["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]


@dataclass(slots=True)
class Executor:
    """What one poll does to the count. `idle` is None where there is no idle mode; times are in seconds."""

    low: int = 0
    idle: int | None = None
    cooldown_s: float = 300.0
    initial_cooldown_s: float = 0.0
    created_s: float = -math.inf
    last_active_s: float | None = None

    def scale(self, now_s: float, count: int, *, active: bool, failing: bool = False) -> int | None:
        """The count to be set (None: leave it to the HPA, and to its fallback where the trigger is failing)."""
        if active:
            self.last_active_s = now_s
            asleep = count == 0 or (self.idle is not None and count < self.low)
            return max(self.low, 1) if asleep else None
        if failing:
            return None
        above = count > self.idle if self.idle is not None else count > 0 and self.low == 0
        if above:
            if self.last_active_s is None:
                cooled = self.created_s + self.initial_cooldown_s < now_s
            else:
                cooled = self.last_active_s + self.cooldown_s < now_s
            return (self.low if self.idle is None else self.idle) if cooled else None
        return self.low if self.idle is None and count < self.low else None


@dataclass(slots=True)
class Fallback:
    """What the metric is taken to be after more than `failure_threshold` failures in a row."""

    replicas: int
    target: float
    failure_threshold: int = 3
    behaviour: Behaviour = "static"
    failures: int = 0

    def metric(self, value: float | None, current: int, ready: int | None = None) -> float:
        """The metric, or its stand-in where it failed (None); raises NoMetricsError while that is not yet due.

        `ready` is given where the target is of type Value instead of AverageValue.
        """
        if value is not None:
            self.failures = 0
            return value
        self.failures += 1
        if self.failures <= self.failure_threshold or ready == 0:
            raise NoMetricsError
        count = {
            "static": self.replicas,
            "currentReplicas": current,
            "currentReplicasIfHigher": max(current, self.replicas),
            "currentReplicasIfLower": min(current, self.replicas),
        }[self.behaviour]
        return self.target * count / (1 if ready is None else ready)


class Keda(Policy, frozen=True, kw_only=True, tag="keda"):
    """A ScaledObject with upstream's defaults and one trigger, whose query averages `metric` over `window_s`.

    `threshold` is the trigger's target per replica, for which upstream has no default. None: the requests per second
    of a replica that serves `target_utilization` of its capacity, or the requests in it then. Replica bounds of None
    are the service's. The HPA runs every 15 s, the scaler every `polling_interval_s`.
    """

    metric: Literal["arrival_rate", "concurrency", "queue_length"] = "arrival_rate"
    threshold: Positive | None = None
    target_utilization: Annotated[float, Meta(ge=0.1, le=1.5)] = 0.7
    activation_threshold: NonNegative = 0.0
    window_s: Annotated[float, Meta(ge=15, le=600, extra={"log": True})] = 120.0
    polling_interval_s: Positive = 30.0
    cooldown_period_s: Annotated[float, Meta(ge=0, le=3600)] = 300.0
    initial_cooldown_period_s: NonNegative = 0.0
    tolerance: Annotated[float, Meta(ge=0, le=0.5)] = 0.1
    stabilization_up_s: Annotated[float, Meta(ge=0, le=600)] = 0.0
    stabilization_down_s: Annotated[float, Meta(ge=0, le=1800)] = 300.0
    fallback_replicas: Count | None = None
    fallback_behaviour: Behaviour = "static"
    failure_threshold: PositiveCount = 3
    idle_replicas: Literal[0] | None = None
    min_replicas: Count | None = None
    max_replicas: PositiveCount | None = None

    def begin(self, situation: Situation) -> Controller:
        return _Keda(self, situation)

    def period_s(self) -> float:
        return min(self.polling_interval_s, Hpa().sync_period_s)


class _Keda:
    def __init__(self, policy: Keda, situation: Situation) -> None:
        low = situation.service.min_replicas if policy.min_replicas is None else policy.min_replicas
        self._policy = policy
        if policy.threshold is not None:
            self._target = policy.threshold
        elif policy.metric == "arrival_rate":
            self._target = policy.target_utilization * situation.capacity_rps()
        else:
            self._target = situation.concurrency_at(policy.target_utilization)
        self._values: deque[float] = deque(maxlen=max(1, round(policy.window_s / situation.tick_s)))
        self._executor = Executor(
            low, policy.idle_replicas, policy.cooldown_period_s, policy.initial_cooldown_period_s
        )
        self._fallback = None
        if policy.fallback_replicas is not None:
            self._fallback = Fallback(
                policy.fallback_replicas, self._target, policy.failure_threshold, policy.fallback_behaviour
            )
        self._polls = Pace(policy.polling_interval_s, situation.tick_s)
        hpa = Hpa(
            tolerance_up=policy.tolerance,
            tolerance_down=policy.tolerance,
            stabilization_up_s=policy.stabilization_up_s,
            stabilization_down_s=policy.stabilization_down_s,
            min_replicas=max(low, 1),
            max_replicas=policy.max_replicas,
        )
        self._hpa = _External(hpa, situation, self._target)
        self._begun = False

    def decide(self, seen: Observation) -> Decision:
        if not seen.counted:
            return Decision(reason="no replica counts")
        if not self._begun:
            self._begun, self._executor.created_s = True, seen.now_s
        value = seen[self._policy.metric]
        if not math.isnan(value):
            self._values.append(value)
        total = float(np.mean(self._values)) if self._values and not math.isnan(value) else None
        if self._polls.due(seen.now_s):
            active = total is not None and total > self._policy.activation_threshold
            count = self._executor.scale(seen.now_s, seen.replicas, active=active, failing=total is None)
            if count is not None:
                return Decision.towards(count, seen, reason="active" if active else "inactive")
        self._hpa.total = total
        self._hpa.fallback = self._fallback
        return self._hpa.decide(seen)


class _External(HpaController):
    """An HPA on an external metric with an average target, of which KEDA says what it is."""

    def __init__(self, policy: Hpa, situation: Situation, target: float) -> None:
        super().__init__(policy, situation)
        self._target = target
        self.total: float | None = None
        self.fallback: Fallback | None = None

    def proposal(self, seen: Observation, current: int) -> int:
        total = self.total
        if self.fallback is not None:
            total = self.fallback.metric(total, current)
        if total is None:
            raise NoMetricsError
        p = self._policy
        return from_average(
            current, total, self._target, tolerance_up=p.tolerance_up, tolerance_down=p.tolerance_down
        )
