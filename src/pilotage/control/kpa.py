"""Knative's Pod Autoscaler, faithfully.

Origin: knative/serving `pkg/autoscaler/scaling/autoscaler.go`, `pkg/autoscaler/aggregation/bucketing.go` and
`pkg/reconciler/autoscaling/kpa/scaler.go`. `Autoscaler` (stable and panic mode), `Window` (the average of a metric)
and `ZeroGate` (the last step, to and from zero) are fed with plain values, as upstream's tests feed them; `Kpa`
feeds them from observations. While no replica is ready the engine holds requests at the door, as Knative's activator
does, and counts them as concurrency. The engine's concurrency is exact, where upstream samples some of the pods
every second.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from pilotage.control.policy import Controller, Decision, Observation, Pace, Policy, Situation
from pilotage.world.spec import Count, NonNegative, Positive, PositiveCount

TICK_S = 2.0
PROGRESS_DEADLINE_S = 610.0  # an activation that has not succeeded by then is given up


@dataclass(frozen=True, slots=True, kw_only=True)
class Decider:
    """What the autoscaler is told of a revision. `target` is what a pod should carry, `total` what it can."""

    target: float
    total: float
    max_up_rate: float = 1000.0
    max_down_rate: float = 2.0
    panic_threshold: float = 2.0
    stable_window_s: float = 60.0
    burst_capacity: float = 211.0
    activation_scale: int = 1
    reachable: bool = True
    scale_down_delay_s: float = 0.0


@dataclass(slots=True)
class Autoscaler:
    """Stable and panic mode. `panic_s` is when panic was entered or last extended (None: no panic)."""

    decider: Decider
    panic_s: float | None = None
    max_panic_pods: int = 0
    _delayed: deque[tuple[int, int]] = field(default_factory=deque)

    @staticmethod
    def create(decider: Decider, now_s: float, ready: int) -> Autoscaler:
        """A new autoscaler panics where there is more than one pod, so as not to undo what another has done."""
        return Autoscaler(decider, now_s, ready) if ready > 1 else Autoscaler(decider)

    def scale(self, now_s: float, ready: int, stable: float, panic: float) -> tuple[int, int]:
        """The wanted number of pods, and the excess burst capacity (below 0: the activator takes part).

        `stable` and `panic` are the metric's averages over the two windows, of which one or both may be 0.
        """
        d = self.decider
        pods = max(1, ready)
        highest = math.ceil(d.max_up_rate * pods)
        lowest = math.floor(pods / d.max_down_rate) if d.reachable else 0
        for_stable, for_panic = math.ceil(stable / d.target), math.ceil(panic / d.target)
        wanted = min(max(for_stable, lowest), highest)
        wanted_panic = min(max(for_panic, lowest), highest)
        if d.activation_scale > 1:
            wanted = max(wanted, d.activation_scale) if for_stable > 0 else wanted
            wanted_panic = max(wanted_panic, d.activation_scale) if for_panic > 0 else wanted_panic
        if for_panic / pods >= d.panic_threshold:
            self.panic_s = now_s
        elif self.panic_s is not None and self.panic_s + d.stable_window_s < now_s:
            self.panic_s, self.max_panic_pods = None, 0
        if self.panic_s is not None:  # no scaling down in panic
            wanted = self.max_panic_pods = max(self.max_panic_pods, wanted, wanted_panic)
        if d.scale_down_delay_s > 0 and d.reachable:
            wanted = self._highest_within_delay(now_s, wanted)
        return wanted, self._excess_burst_capacity(ready, panic)

    def _highest_within_delay(self, now_s: float, wanted: int) -> int:
        slot = int(now_s / TICK_S)
        slots = math.ceil(self.decider.scale_down_delay_s / TICK_S)
        while self._delayed and (slot - self._delayed[0][0] >= slots):
            self._delayed.popleft()
        self._delayed.append((slot, wanted))
        return max(n for _, n in self._delayed)

    def _excess_burst_capacity(self, ready: int, panic: float) -> int:
        d = self.decider
        if d.burst_capacity <= 0:
            return int(d.burst_capacity)  # 0: never through the activator, -1: always
        return math.floor(ready * d.total - d.burst_capacity - panic)


class Window:
    """The average of a metric over the last `size` buckets.

    A window that has only begun is averaged over what there is; a gap at its end is left out, one in between
    counts as 0; a whole window without data is 0.
    """

    def __init__(self, size: int) -> None:
        self._size, self._first = size, 0
        self._buckets: deque[tuple[int, float]] = deque()
        self._total = 0.0
        self.begun = False

    def record(self, bucket: int, value: float) -> None:
        if not self.begun:
            self.begun, self._first = True, bucket
        self._buckets.append((bucket, value))
        self._total += value

    def average(self, now: int) -> float:
        """At bucket `now`, rounded to 6 digits as upstream rounds it."""
        while self._buckets and self._buckets[0][0] <= now - self._size:
            self._total -= self._buckets.popleft()[1]
        if not self._buckets:
            self._total = 0.0  # of what adding and subtracting leave
            return 0.0
        last = self._buckets[-1][0]
        valid = min(last - self._first + 1, self._size - (now - last))
        return round(self._total / valid, 6)


@dataclass(slots=True)
class ZeroGate:
    """The way to zero: active for a stable window, then inactive behind the activator for the grace period.

    Not in upstream's tables of cases, but as `scaler.go` has it. `state_s` is since when the state holds.
    """

    enabled: bool = True
    stable_window_s: float = 60.0
    grace_s: float = 30.0
    retention_s: float = 0.0
    state: Literal["activating", "active", "inactive"] = "activating"
    state_s: float = 0.0
    proxied_s: float | None = None

    def pass_through(self, now_s: float, wanted: int, ready: int, burst_capacity: int) -> int | None:
        """The count to be set (None: leave what is there)."""
        if wanted > 0:
            self._become("active" if ready > 0 else "activating", now_s)
        if wanted > 0 and burst_capacity >= 0:
            self.proxied_s = None
        elif self.proxied_s is None:
            self.proxied_s = now_s
        if wanted > 0:
            return wanted
        if not self.enabled:
            return 1
        since_s = now_s - self.state_s
        if self.state == "activating":
            if ready > 0:  # it has become active in the meantime
                self._become("active", now_s)
                return 1
            return 0 if since_s >= PROGRESS_DEADLINE_S else None
        if self.state == "active":
            if since_s < self.stable_window_s:
                return 1
            self._become("inactive", now_s)
            return None
        proxied_for_s = now_s - self.proxied_s if self.proxied_s is not None else 0.0
        if since_s >= max(self.grace_s, self.retention_s):
            return 0
        return 0 if since_s >= self.retention_s and proxied_for_s >= self.grace_s else None

    def _become(self, state: Literal["activating", "active", "inactive"], now_s: float) -> None:
        if self.state != state:
            self.state, self.state_s = state, now_s


class Kpa(Policy, frozen=True, kw_only=True, tag="kpa"):
    """KPA with upstream's defaults, on concurrency or on requests per second.

    A replica is given `target_utilization` of `target`, upstream's containerConcurrency or requests per second. None:
    what a load test would say, so that a replica that is given its part serves `target_utilization` of its capacity;
    upstream takes 100 or 200 for revisions that do not say. Replica bounds of None are the service's.
    """

    metric: Literal["concurrency", "arrival_rate"] = "concurrency"
    target: Positive | None = None
    target_utilization: Annotated[float, Meta(ge=0.1, le=1.5)] = 0.7
    stable_window_s: Annotated[float, Meta(ge=6, le=3600, extra={"log": True})] = 60.0
    panic_window_percentage: Annotated[float, Meta(ge=1, le=100)] = 10.0
    panic_threshold_percentage: Annotated[float, Meta(ge=110, le=1000, extra={"log": True})] = 200.0
    max_scale_up_rate: Annotated[float, Meta(gt=1)] = 1000.0
    max_scale_down_rate: Annotated[float, Meta(ge=1.01, le=10)] = 2.0
    target_burst_capacity: Annotated[float, Meta(ge=-1)] = 211.0
    scale_down_delay_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    activation_scale: PositiveCount = 1
    enable_scale_to_zero: bool = True
    scale_to_zero_grace_s: NonNegative = 30.0
    last_pod_retention_s: NonNegative = 0.0
    min_replicas: Count | None = None
    max_replicas: PositiveCount | None = None

    def begin(self, situation: Situation) -> Controller:
        return _Kpa(self, situation)

    def period_s(self) -> float:
        return TICK_S


class _Kpa:
    def __init__(self, policy: Kpa, situation: Situation) -> None:
        service = situation.service
        self._metric = policy.metric
        self._low = service.min_replicas if policy.min_replicas is None else policy.min_replicas
        self._high = service.max_replicas if policy.max_replicas is None else policy.max_replicas
        share = policy.target_utilization
        if policy.target is not None:
            target = share * policy.target
        elif policy.metric == "concurrency":
            target = situation.concurrency_at(share)
        else:
            target = share * situation.capacity_rps()
        self._decider = Decider(
            target=max(0.01, target),
            total=target / share,
            max_up_rate=policy.max_scale_up_rate,
            max_down_rate=policy.max_scale_down_rate,
            panic_threshold=policy.panic_threshold_percentage / 100,
            stable_window_s=policy.stable_window_s,
            burst_capacity=policy.target_burst_capacity,
            activation_scale=policy.activation_scale,
            scale_down_delay_s=policy.scale_down_delay_s,
        )
        self._gate = ZeroGate(
            enabled=policy.enable_scale_to_zero,
            stable_window_s=policy.stable_window_s,
            grace_s=policy.scale_to_zero_grace_s,
            retention_s=policy.last_pod_retention_s,
        )
        panic_s = max(1.0, round(policy.stable_window_s * policy.panic_window_percentage / 100))
        # a bucket is a tick: what upstream scrapes within it, the engine has averaged exactly
        self._stable = Window(max(1, round(policy.stable_window_s / situation.tick_s)))
        self._panic = Window(max(1, round(panic_s / situation.tick_s)))
        self._pace = Pace(TICK_S, situation.tick_s)
        self._autoscaler: Autoscaler | None = None
        self._bucket = 0

    def decide(self, seen: Observation) -> Decision:
        self._bucket += 1
        value = seen[self._metric]
        if not math.isnan(value):
            self._stable.record(self._bucket, value)
            self._panic.record(self._bucket, value)
        if not seen.counted:
            return Decision(reason="no pod counts")
        ready = int(seen["replicas_ready"])
        if self._autoscaler is None:
            self._autoscaler = Autoscaler.create(self._decider, seen.now_s, ready)
            self._gate.state_s = seen.now_s
        if not self._pace.due(seen.now_s):
            return Decision(reason="between ticks")
        if not self._stable.begun:
            return Decision(reason="no metrics")
        stable, panic = self._stable.average(self._bucket), self._panic.average(self._bucket)
        wanted, burst_capacity = self._autoscaler.scale(seen.now_s, ready, stable, panic)
        mode = "stable" if self._autoscaler.panic_s is None else "panic"
        wanted = min(max(wanted, self._low), self._high)
        count = self._gate.pass_through(seen.now_s, wanted, ready, burst_capacity)
        if count is None:
            return Decision(reason="waits before it goes to zero")
        return Decision.towards(count, seen, reason=f"{mode} mode: {stable:.1f}, lately {panic:.1f}")
