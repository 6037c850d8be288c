"""Kubernetes' Horizontal Pod Autoscaler v2, faithfully.

Origin: kubernetes/kubernetes `pkg/controller/podautoscaler/{replica_calculator,horizontal}.go`. The calculator
(what one metric proposes) and the limits (stabilisation, rates, bounds) are functions of plain values, which the
upstream test cases exercise; `Hpa` feeds them from observations. Utilisation and usage are in milli-units and
truncated as upstream truncates them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

import numpy as np
from msgspec import Meta

from pilotage.control.decisions import Decisions
from pilotage.control.policy import (
    INDEX,
    Controller,
    Decision,
    Observation,
    Pace,
    Policy,
    Situation,
    Together,
    columns_of,
    replicas_of,
    times_of,
)
from pilotage.world.spec import Count, NonNegative, Positive, PositiveCount, Spec

State = Literal["ready", "unready", "ignored"]
FEW: Final = 4  # services, below which arrays cost more than they save


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod as the calculator sees it: its sample (None: missing) and request in milli-units, and its group."""

    usage: int | None
    request: int = 1000
    state: State = "ready"


class NoMetricsError(Exception):
    """No pod has a usable sample; nothing is scaled."""


def within(ratio: float, tolerance_up: float, tolerance_down: float) -> bool:
    return 1 - tolerance_down <= ratio <= 1 + tolerance_up


def from_pods(
    current: int,
    pods: Sequence[Pod],
    target: int,
    *,
    utilization: bool,
    tolerance_up: float = 0.1,
    tolerance_down: float = 0.1,
) -> int:
    """Proposal of a resource (`utilization`: target in per cent) or pods metric (target in milli-units)."""
    groups = [p for p in pods if p.state != "ignored"]
    ready = [p for p in groups if p.state == "ready" and p.usage is not None]
    unready = [p for p in groups if p.state == "unready"]
    missing = [p for p in groups if p.state == "ready" and p.usage is None]

    def ratio(sampled: Sequence[tuple[int, int]]) -> float:
        if not sampled:
            raise NoMetricsError
        usage = sum(u for u, _ in sampled)
        if utilization:
            return math.trunc(100 * usage / sum(r for _, r in sampled)) / target
        return math.trunc(usage / len(sampled)) / target

    samples = [(p.usage, p.request) for p in ready if p.usage is not None]
    q = ratio(samples)
    if not missing and not (unready and q > 1):
        return current if within(q, tolerance_up, tolerance_down) else math.ceil(q * len(ready))
    if q < 1:  # assume the worst of the missing: that they are busy
        for p in missing:
            samples.append((p.request * max(100, target) // 100 if utilization else target, p.request))
    elif q > 1:  # or idle, and likewise of those that have not started
        samples += [(0, p.request) for p in [*missing, *unready]]
    again = ratio(samples)
    if within(again, tolerance_up, tolerance_down) or (q < 1) != (again < 1) or (q > 1) != (again > 1):
        return current
    wanted = math.ceil(again * len(samples))
    return current if (again < 1 and wanted > current) or (again > 1 and wanted < current) else wanted


def from_value(
    current: int,
    value: float,
    target: float,
    ready: int,
    *,
    tolerance_up: float = 0.1,
    tolerance_down: float = 0.1,
) -> int:
    """Proposal of an object or external metric with a `Value` target."""
    ratio = value / target
    if current == 0:
        return math.ceil(ratio)
    return current if within(ratio, tolerance_up, tolerance_down) else math.ceil(ratio * ready)


def from_average(
    current: int, total: float, target: float, *, tolerance_up: float = 0.1, tolerance_down: float = 0.1
) -> int:
    """Proposal of an object or external metric with an `AverageValue` target; readiness plays no part."""
    ratio = total / (target * current) if current else math.inf
    return current if within(ratio, tolerance_up, tolerance_down) else math.ceil(total / target)


class Rate(Spec, frozen=True, kw_only=True):
    """A behaviour policy: at most `value` pods, or per cent of them, within `period_s`."""

    type: Literal["pods", "percent"]
    value: PositiveCount
    period_s: Positive


class Behavior(Spec, frozen=True, kw_only=True):
    """Rates and stabilisation of one direction."""

    rates: tuple[Rate, ...]
    select: Literal["max", "min", "disabled"] = "max"


UP = Behavior(rates=(Rate(type="pods", value=4, period_s=15), Rate(type="percent", value=100, period_s=15)))
DOWN = Behavior(rates=(Rate(type="percent", value=100, period_s=15),))


def up_limit_without_behavior(current: int) -> int:
    """The most that one sync may ask for where no behaviour is set (autoscaling/v1)."""
    return max(2 * current, 4)


@dataclass(slots=True)
class History:
    """What an autoscaler remembers: raw recommendations and scale events, each as (time_s, count)."""

    recommendations: deque[tuple[float, int]] = field(default_factory=deque)
    ups: deque[tuple[float, int]] = field(default_factory=deque)
    downs: deque[tuple[float, int]] = field(default_factory=deque)

    def stabilised(self, now_s: float, raw: int, current: int, up_s: float, down_s: float) -> int:
        """The recommendation between the lowest of the up window and the highest of the down window."""
        longest = max(up_s, down_s)
        while self.recommendations and self.recommendations[0][0] < now_s - longest:
            self.recommendations.popleft()
        up_from_s, down_from_s = now_s - up_s, now_s - down_s
        up = min([raw, *[n for t, n in self.recommendations if t > up_from_s]])
        down = max([raw, *[n for t, n in self.recommendations if t > down_from_s]])
        self.recommendations.append((now_s, raw))
        return min(max(current, up), down)

    def count_before(self, now_s: float, current: int, period_s: float) -> int:
        """How many replicas there were a period ago, by the changes since."""

        def changed(events: deque[tuple[float, int]]) -> int:
            return sum(n for t, n in events if t > now_s - period_s)

        return current - changed(self.ups) + changed(self.downs)

    def up_limit(self, now_s: float, current: int, behavior: Behavior) -> int:
        """The highest count that the up rates allow."""
        if behavior.select == "disabled":
            return current
        limits = []
        for rate in behavior.rates:
            start = self.count_before(now_s, current, rate.period_s)
            grown = start + rate.value if rate.type == "pods" else math.ceil(start * (1 + rate.value / 100))
            limits.append(grown)
        return max(current, max(limits) if behavior.select == "max" else min(limits))

    def down_limit(self, now_s: float, current: int, behavior: Behavior) -> int:
        """The lowest count that the down rates allow."""
        if behavior.select == "disabled":
            return current
        limits = []
        for rate in behavior.rates:
            start = self.count_before(now_s, current, rate.period_s)
            left = start - rate.value if rate.type == "pods" else math.trunc(start * (1 - rate.value / 100))
            limits.append(left)
        return min(current, min(limits) if behavior.select == "max" else max(limits))

    def record(self, now_s: float, change: int, longest_s: float) -> None:
        """Remembers a change that was made, for as long as a rate may ask for it."""
        events = self.ups if change > 0 else self.downs
        if change:
            events.append((now_s, abs(change)))
        for kept in (self.ups, self.downs):
            while kept and kept[0][0] <= now_s - longest_s:
                kept.popleft()


SHARES = ("utilization", "kv_usage")  # means over ready replicas; the other metrics are totals


class Hpa(Policy, frozen=True, kw_only=True, tag="hpa"):
    """HPA v2 with upstream's defaults, on utilisation, on the KV usage of LLM replicas (held to `target_utilization`,
    too; services without a KV cache go by their utilisation), or on a per-replica average of another feature."""

    target_utilization: Annotated[float, Meta(ge=0.2, le=0.95)] = 0.8
    metric: Literal["utilization", "kv_usage", "concurrency", "arrival_rate"] = "utilization"
    target_average: Positive = 10.0
    tolerance_up: Annotated[float, Meta(ge=0, le=0.5)] = 0.1
    tolerance_down: Annotated[float, Meta(ge=0, le=0.5)] = 0.1
    stabilization_up_s: Annotated[float, Meta(ge=0, le=600)] = 0.0
    stabilization_down_s: Annotated[float, Meta(ge=0, le=1800)] = 300.0
    up: Behavior = UP
    down: Behavior = DOWN
    sync_period_s: NonNegative = 15.0
    min_replicas: Count | None = None
    max_replicas: PositiveCount | None = None

    def begin(self, situation: Situation) -> Controller:
        blind = self.metric == "kv_usage" and situation.service.llm is None
        return HpaController(self.replace(metric="utilization") if blind else self, situation)

    def begin_together(self, situations: Sequence[Situation]) -> Together | None:
        return _Together(self, situations) if len(situations) >= FEW else None

    def period_s(self) -> float | None:
        return self.sync_period_s or None


class HpaController:
    """The loop around the calculator; what one metric proposes is a method, so that others may feed it."""

    def __init__(self, policy: Hpa, situation: Situation) -> None:
        service = situation.service
        self._policy = policy
        self.low = service.min_replicas if policy.min_replicas is None else policy.min_replicas
        self.high = service.max_replicas if policy.max_replicas is None else policy.max_replicas
        self._history = History()
        self._pace = Pace(policy.sync_period_s, situation.tick_s)
        self._longest_s = max(r.period_s for r in (*policy.up.rates, *policy.down.rates))

    def decide(self, seen: Observation) -> Decision:
        p, now_s, current = self._policy, seen.now_s, seen.replicas
        if not self._pace.due(now_s):
            return Decision(reason="between syncs")
        if current == 0 and self.low > 0:
            return Decision(reason="disabled: scaled to zero by hand")
        if not self.low <= current <= self.high:
            target = min(max(current, self.low), self.high)
            self._history.record(now_s, target - current, self._longest_s)
            return Decision.towards(target, seen, reason="outside its bounds")
        try:
            raw = self.proposal(seen, current)
        except NoMetricsError:
            return Decision(reason="no metrics")
        stable = self._history.stabilised(now_s, raw, current, p.stabilization_up_s, p.stabilization_down_s)
        if stable > current:
            target = min(stable, self._history.up_limit(now_s, current, p.up))
        else:
            target = max(stable, self._history.down_limit(now_s, current, p.down))
        target = min(max(target, self.low), self.high)
        self._history.record(now_s, target - current, self._longest_s)
        return Decision.towards(target, seen, reason=f"{p.metric} proposes {raw}")

    def proposal(self, seen: Observation, current: int) -> int:
        """The raw recommendation; raises NoMetricsError where there is nothing to go by."""
        p = self._policy
        value = seen[p.metric]
        if math.isnan(value):
            raise NoMetricsError
        if p.metric not in SHARES:
            return from_average(
                current, value, p.target_average, tolerance_up=p.tolerance_up, tolerance_down=p.tolerance_down
            )
        ready = int(seen["replicas_ready"])
        pods = [Pod(usage=round(1000 * value))] * ready
        pods += [Pod(usage=None, state="unready")] * (current - ready)
        return from_pods(
            current,
            pods,
            round(100 * p.target_utilization),
            utilization=True,
            tolerance_up=p.tolerance_up,
            tolerance_down=p.tolerance_down,
        )


class _Together:
    """`HpaController` of many services at once, in arrays; all replicas of a service report alike."""

    def __init__(self, policy: Hpa, situations: Sequence[Situation]) -> None:
        services = [s.service for s in situations]
        self._policy = policy
        self._low = np.array(
            [s.min_replicas if policy.min_replicas is None else policy.min_replicas for s in services]
        )
        self._high = np.array(
            [s.max_replicas if policy.max_replicas is None else policy.max_replicas for s in services]
        )
        self._due_s = np.full(len(services), -np.inf)
        self._early_s = situations[0].tick_s / 2
        self._longest_s = max(r.period_s for r in (*policy.up.rates, *policy.down.rates))
        # of every tick, when and what was recommended (NaN: nothing), in places that are used again
        self._when_s, self._recommended = np.full((2, 0, len(services)), np.nan)
        self._next = 0
        self._changed: deque[tuple[np.ndarray, np.ndarray]] = deque()  # the same of what was changed

    def decide(self, seen: Sequence[Observation]) -> Decisions:
        p = self._policy
        metric, ready = columns_of(seen, [INDEX[p.metric], INDEX["replicas_ready"]]).T
        now_s = times_of(seen)
        current = replicas_of(seen).astype(float)
        due = self._due(now_s)
        disabled = (current == 0) & (self._low > 0)
        bounded = np.clip(current, self._low, self._high)
        outside = bounded != current
        with np.errstate(invalid="ignore", divide="ignore"):
            raw = self._proposals(metric, ready, current)
        judged = due & ~disabled & ~outside & np.isfinite(raw)
        stable = self._stabilised(now_s, np.where(judged, raw, np.nan), current)
        most, least = self._limits(now_s, current)
        target = np.where(stable > current, np.minimum(stable, most), np.maximum(stable, least))
        target = np.where(judged, np.clip(target, self._low, self._high), current)
        target = np.where(due & ~disabled & outside, bounded, target)
        self._record(now_s, target - current)

        def why(row: int) -> str:
            if judged[row]:
                return f"{p.metric} proposes {int(raw[row])}"
            if not due[row]:
                return "between syncs"
            if disabled[row]:
                return "disabled: scaled to zero by hand"
            return "outside its bounds" if outside[row] else "no metrics"

        return Decisions.towards(target.astype(np.int64), current.astype(np.int64), why)

    def _due(self, now_s: np.ndarray) -> np.ndarray:
        """`Pace` of every row."""
        due: np.ndarray = now_s >= self._due_s - self._early_s
        on_time = self._due_s > now_s - self._policy.sync_period_s
        following = np.where(on_time, self._due_s, now_s) + self._policy.sync_period_s
        self._due_s = np.where(due, following, self._due_s)
        return due

    def _proposals(self, value: np.ndarray, ready: np.ndarray, current: np.ndarray) -> np.ndarray:
        """`from_pods` or `from_average`; NaN where there is nothing to go by."""
        p = self._policy

        def near(ratio: np.ndarray) -> np.ndarray:
            return (1 - p.tolerance_down <= ratio) & (ratio <= 1 + p.tolerance_up)

        if p.metric != "utilization":
            ratio = np.where(current > 0, value / (p.target_average * current), np.inf)
            wanted = np.where(near(ratio), current, np.ceil(value / p.target_average))
            return np.where(value == value, wanted, np.nan)
        target = round(100 * p.target_utilization)
        ready, usage = np.trunc(ready), np.rint(1000 * value)
        q = np.trunc(100 * usage * ready / (1000 * ready)) / target
        plain = np.where(near(q), current, np.ceil(q * ready))
        again = np.trunc(100 * usage * ready / (1000 * current)) / target  # those that start are idle
        wanted = np.ceil(again * current)
        kept = near(again) | (again <= 1) | (wanted < current)
        return np.where((current > ready) & (q > 1), np.where(kept, current, wanted), plain)

    def _stabilised(self, now_s: np.ndarray, raw: np.ndarray, current: np.ndarray) -> np.ndarray:
        """`History.stabilised` of the rows that recommend something, NaN of the others."""
        p = self._policy
        up, down = (
            furthest(raw, self._since(now_s - window_s, furthest)) if window_s > 0 else raw
            for furthest, window_s in ((np.fmin, p.stabilization_up_s), (np.fmax, p.stabilization_down_s))
        )
        longest_s = max(p.stabilization_up_s, p.stabilization_down_s)
        if not len(self._when_s) or (self._when_s[self._next] > now_s - longest_s).any():  # still counts
            self._when_s, self._recommended = (
                np.insert(x, self._next, np.nan, axis=0) for x in (self._when_s, self._recommended)
            )
        self._when_s[self._next], self._recommended[self._next] = now_s, raw
        self._next = (self._next + 1) % len(self._when_s)
        return np.where(raw == raw, np.minimum(np.maximum(current, up), down), np.nan)

    def _since(self, from_s: np.ndarray, furthest: np.ufunc) -> np.ndarray:
        """The lowest or highest recommendation after a time, NaN where there is none."""
        found: np.ndarray = furthest.reduce(
            np.where(self._when_s > from_s, self._recommended, np.nan), axis=0, initial=np.nan
        )
        return found

    def _limits(self, now_s: np.ndarray, current: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The highest and the lowest counts that the rates allow, as `History.up_limit` and `down_limit`."""
        found = []
        for behavior, sign in ((self._policy.up, 1), (self._policy.down, -1)):
            if behavior.select == "disabled":
                found.append(current)
                continue
            limits = []
            for rate in behavior.rates:
                start = current.copy()
                for times, change in self._changed:
                    start -= np.where(times > now_s - rate.period_s, change, 0.0)
                if rate.type == "pods":
                    limits.append(start + sign * rate.value)
                else:
                    share = start * (1 + sign * rate.value / 100)
                    limits.append(np.ceil(share) if sign > 0 else np.trunc(share))
            furthest = np.maximum if (behavior.select == "max") == (sign > 0) else np.minimum
            limit = furthest.reduce(limits)
            found.append(np.maximum(current, limit) if sign > 0 else np.minimum(current, limit))
        return found[0], found[1]

    def _record(self, now_s: np.ndarray, change: np.ndarray) -> None:
        if change.any():
            self._changed.append((now_s, change))
        while self._changed and (self._changed[0][0] <= now_s - self._longest_s).all():
            self._changed.popleft()
