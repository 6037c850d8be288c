"""A simulated run as a Prometheus would have seen it: OpenMetrics text, by the names of `control.policy.FEATURES`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from pilotage.control.guard import Guard
from pilotage.control.policy import Policy
from pilotage.control.steer import Helm
from pilotage.engine.cluster import Cluster, World
from pilotage.engine.layout import READY
from pilotage.metrics import BUCKET_MIDPOINTS_S
from pilotage.scenario import Scenario

EDGES_S: Final = tuple(float(f"{10 ** (k / 24):.4g}") for k in range(-60, 25))  # 3 ms to 10 s, 10 % apart
START_EDGES_S: Final = tuple(float(f"{1.25**k:.4g}") for k in range(32))


def open_metrics(
    scenario: Scenario,
    policies: Sequence[Policy],
    world: World,
    *,
    began_s: float,
    edges_s: Sequence[float] = EDGES_S,
) -> str:
    """One run, with one policy per service, sampled at every tick from `began_s` (Unix time) on."""
    cluster = Cluster(scenario, [world])
    services = len(scenario.services)
    helm = Helm(list(policies), [cluster.situation(0, s) for s in range(services)], Guard())
    edges = np.asarray(edges_s)
    upto = np.searchsorted(BUCKET_MIDPOINTS_S, edges, side="right")
    seen: set[tuple[int, int, float]] = set()
    starts = [(0, 0.0, np.zeros(len(START_EDGES_S), np.int64))] * services
    rows: dict[str, list[str]] = {}

    def add(kind: str, family: str, name: str, labels: str, value: float, at_s: float) -> None:
        rows.setdefault(f"{kind} {family}", []).append(f"{name}{{{labels}}} {value:.10g} {at_s:.3f}")

    def sample(at_s: float) -> None:
        for s, service in enumerate(scenario.services):
            total, tick = cluster.totals[0, s], cluster.ticks[0, s]
            own, deployed = f'service="{service.name}"', f'deployment="{service.name}"'
            lo, hi = int(cluster.params[s]["replica_lo"]), int(cluster.params[s]["replica_hi"])
            for k in range(lo, hi):
                replica = cluster.replicas[k]
                key = (k, int(replica["ordinal"]), float(replica["ready_s"]))
                if replica["state"] == READY and replica["ordered_s"] > 0 and key not in seen:
                    seen.add(key)
                    took = float(replica["ready_s"] - replica["ordered_s"])
                    n, sum_s, counts = starts[s]
                    starts[s] = (n + 1, sum_s + took, counts + (np.asarray(START_EDGES_S) >= took))
            add("counter", "requests", "requests_total", own, total["arrived"], at_s)
            add("counter", "responses", "responses_total", f'{own},outcome="served"', total["served"], at_s)
            lost = sum(int(total[name]) for name in ("rejected", "timed_out", "abandoned", "lost"))
            add("counter", "responses", "responses_total", f'{own},outcome="dropped"', lost, at_s)
            cumulative = np.concatenate([[0], np.cumsum(cluster.histograms[0, s])])
            for edge, k in zip(edges_s, upto.tolist(), strict=True):
                add(
                    "histogram",
                    "latency_seconds",
                    "latency_seconds_bucket",
                    f'{own},le="{edge:g}"',
                    cumulative[k],
                    at_s,
                )
            add(
                "histogram",
                "latency_seconds",
                "latency_seconds_bucket",
                f'{own},le="+Inf"',
                cumulative[-1],
                at_s,
            )
            add("histogram", "latency_seconds", "latency_seconds_count", own, cumulative[-1], at_s)
            add("histogram", "latency_seconds", "latency_seconds_sum", own, total["latency_s"], at_s)
            add("counter", "batch_requests_count", "batch_requests_count", own, total["batches"], at_s)
            add("counter", "batch_requests_sum", "batch_requests_sum", own, total["batched"], at_s)
            add("counter", "busy_seconds", "busy_seconds_total", own, total["busy_s"], at_s)
            ordered = int(tick["ready"] + tick["starting"] + tick["pending"])
            add("gauge", "ready", "kube_deployment_status_replicas_ready", deployed, tick["ready"], at_s)
            add("gauge", "spec", "kube_deployment_spec_replicas", deployed, ordered, at_s)
            n, sum_s, counts = starts[s]
            for edge, count in zip(START_EDGES_S, counts.tolist(), strict=True):
                add(
                    "histogram",
                    "startup",
                    "replica_startup_seconds_bucket",
                    f'{own},le="{edge:g}"',
                    count,
                    at_s,
                )
            add("histogram", "startup", "replica_startup_seconds_bucket", f'{own},le="+Inf"', n, at_s)
            add("histogram", "startup", "replica_startup_seconds_sum", own, sum_s, at_s)

    for tick in range(scenario.ticks):
        sample(began_s + tick * scenario.tick_s)
        cluster.apply(helm.decide(cluster.read()))
        cluster.wait()
    sample(began_s + scenario.ticks * scenario.tick_s)
    lines: list[str] = []
    for family in rows.values():  # untyped: what is read back is names, labels, values and times
        lines += family
    return "\n".join([*lines, "# EOF", ""])
