"""The reference simulator's books: every counter, worked out from the log of a service's run."""

from __future__ import annotations

import math
from collections import Counter

from tests.traces.reference import ServiceRun


def bucket(latency_s: float) -> int:
    """64 equal buckets to each octave, from 2**-14 s up; 34 octaves."""
    mantissa, exponent = math.frexp(max(latency_s, 2.0**-14))
    return min((exponent + 13) * 64 + int((2 * mantissa - 1) * 64), 34 * 64 - 1)


def bucket_midpoint_s(b: int) -> float:
    return 2.0 ** (b // 64 - 14) * (1 + (b % 64 + 0.5) / 64)


def count(run: ServiceRun, t0: float, t1: float) -> dict[str, float]:
    """What happened in [t0, t1), and how things stand at t1, which must be now; all of TICK but the bill."""

    def overlap(a, b):
        return max(0.0, min(b, t1) - max(a, t0))

    arrived = [r.arrival for r in run.requests if t0 <= r.arrival < t1]
    left = [r for r in run.requests if t0 <= r.left < t1]
    served = [r for r in left if r.outcome == "served"]
    latencies = sorted(r.latency for r in served)
    started = [len(b.requests) for b in run.batches if t0 <= b.start < t1]
    ended, outcomes = Counter(r.outcome for r in left), Counter(r.outcome for r in run.requests)
    states, excess, shown = Counter(r.state for r in run.replicas), run.replacing, {}
    states["pending"] = run.pending
    for state in ("pending", "starting", "ready"):  # what a rollout has in excess is not shown
        shown[state] = max(states[state] - excess, 0)
        excess -= states[state] - shown[state]
    p95 = latencies[math.ceil(0.95 * len(latencies)) - 1] if latencies else math.nan
    per = run.server.batches_in_flight
    return {
        "arrived": len(arrived),
        "late": sum(x > run.service.slo_ms / 1e3 for x in latencies),
        "overdue": 0,
        "failed": sum(t0 <= t < t1 for t in run.failures),
        "latency_s": sum(latencies),
        "latency_p95_s": bucket_midpoint_s(bucket(p95)) if latencies else p95,
        "peak_second": max(Counter(int(t - t0) for t in arrived).values(), default=0),
        "inside_s": sum(overlap(r.arrival, r.left) for r in run.requests),
        "busy_s": sum(overlap(b.start, b.end) for b in run.batches),
        "ready_s": per * sum(overlap(a, b) for r in run.replicas for a, b in r.serving),
        "replica_s": sum(overlap(r.ordered, r.gone) for r in run.replicas),
        "batches": len(started),
        "batched": sum(started),
        "max_batch": run.max_batch,
        "wrong": sum(r.error_share for r in served),
        "draining": states["draining"] + states["leaving"],
        **shown,
        **{name: ended[name] for name in ("served", "rejected", "timed_out", "abandoned", "lost")},
        **{name: outcomes[name] for name in ("waiting", "executing")},
    }


def finish(run: ServiceRun) -> dict[str, int]:
    """What the end of the run adds: the dead, and those that are overdue."""
    dead = [r for r in run.requests if r.outcome == "waiting" and r.dead(run.now)]
    for r in dead:
        r.outcome = r.death
    inside = [r for r in run.requests if r.outcome in ("waiting", "executing")]
    deaths = Counter(r.death for r in dead)
    overdue = sum(run.now - r.arrival > run.service.slo_ms / 1e3 for r in inside)
    return {"timed_out": deaths["timed_out"], "abandoned": deaths["abandoned"], "overdue": overdue}


def histogram(run: ServiceRun) -> Counter[int]:
    """The served by the bucket of their latency."""
    return Counter(bucket(r.latency) for r in run.requests if r.outcome == "served")
