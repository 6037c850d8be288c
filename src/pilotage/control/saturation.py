"""llm-d's saturation rule: replicas by spare KV cache and spare queue.

Origin: llm-d-incubation/workload-variant-autoscaler, the saturation analyser and its documentation
(`docs/saturation-analyzer.md`). A replica is saturated at a KV usage or a queue above a threshold; one more is ordered
when the mean spare of either, to its threshold, is below a trigger, and none is on its way; one is released when the
rest would still have that spare with its load on top. Upstream looks at every replica's peak of the last minute; here
at the service's, divided by its ready replicas.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Annotated

from msgspec import Meta

from pilotage.control.policy import Controller, Decision, Observation, Pace, Policy, Situation


def wanted(
    ready: int, kv: float, queue: float, *, kv_threshold: float, queue_threshold: float, kv_spare: float,
    queue_spare: float,
) -> int:  # fmt: skip
    """The change (1, 0, -1) for mean KV usage and queue length per ready replica."""
    if kv_threshold - kv < kv_spare or queue_threshold - queue < queue_spare:
        return 1
    if ready < 2:
        return 0
    more = ready / (ready - 1)  # what the rest would have
    safe = kv_threshold - kv * more >= kv_spare and queue_threshold - queue * more >= queue_spare
    return -1 if safe else 0


class Saturation(Policy, frozen=True, kw_only=True, tag="saturation"):
    """The rule with upstream's thresholds, once a minute. Without a KV usage (no LLM service) the queue decides."""

    kv_threshold: Annotated[float, Meta(ge=0.2, le=0.99)] = 0.8
    queue_threshold: Annotated[float, Meta(ge=1.0, le=100.0)] = 5.0
    kv_spare: Annotated[float, Meta(ge=0.0, le=0.5)] = 0.1
    queue_spare: Annotated[float, Meta(ge=0.0, le=50.0)] = 3.0
    interval_s: Annotated[float, Meta(ge=15, le=600, extra={"log": True})] = 60.0

    def begin(self, situation: Situation) -> Controller:
        return _Saturation(self, situation)


class _Saturation:
    def __init__(self, policy: Saturation, situation: Situation) -> None:
        self._policy = policy
        self._pace = Pace(policy.interval_s, situation.tick_s)
        self._minute: deque[tuple[float, float]] = deque(maxlen=max(1, round(60 / situation.tick_s)))

    def decide(self, seen: Observation) -> Decision:
        p, kv, queue = self._policy, seen["kv_usage"], seen["queue_length"]
        ready = seen["replicas_ready"]
        if math.isnan(queue) or not seen.counted:
            return Decision(reason="no metrics")
        self._minute.append((0.0 if math.isnan(kv) else kv, queue / max(ready, 1.0)))
        if not self._pace.due(seen.now_s):
            return Decision(reason="between two looks")
        if seen.replicas == 0:
            return Decision(order=1, reason="no replica")
        kv, queue = (max(values) for values in zip(*self._minute, strict=True))
        change = wanted(
            int(ready), kv, queue, kv_threshold=p.kv_threshold, queue_threshold=p.queue_threshold,
            kv_spare=p.kv_spare, queue_spare=p.queue_spare,
        )  # fmt: skip
        reason = f"KV usage {kv:.0%}, {queue:.1f} waiting a replica"
        if change > 0 and seen.replicas > ready:
            return Decision(reason=f"{reason}; one is on its way")
        return Decision(order=max(change, 0), release=max(-change, 0), reason=reason)
