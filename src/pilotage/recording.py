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
    upto = np.searchsorted(BUCKET_MIDPOINTS_S, np.asarray(edges_s), side="right")
    points = scenario.ticks + 1
    totals, ticks = np.zeros((2, points, services), cluster.totals.dtype)
    latencies = np.zeros((points, services, len(edges_s) + 1), np.int64)
    starts = _StartUps(points, services)
    for point in range(points):
        totals[point], ticks[point] = cluster.totals[0], cluster.ticks[0]
        cumulative = np.cumsum(np.pad(cluster.histograms[0], ((0, 0), (1, 0))), axis=1)
        latencies[point] = cumulative[:, [*upto, -1]]
        starts.see(point, cluster)
        if point < scenario.ticks:
            cluster.apply(helm.decide(cluster.read()))
            cluster.wait()
    times = [f"{began_s + scenario.tick_s * point:.3f}" for point in range(points)]
    lines: list[str] = []  # untyped: what is read back is names, labels, values and times

    def add(name: str, labels: str, values: np.ndarray) -> None:
        start = f"{name}{{{labels}}} "
        said = (
            map(str, values.tolist()) if values.dtype.kind == "i" else (f"{v:.10g}" for v in values.tolist())
        )
        lines.extend([f"{start}{value} {at_s}" for value, at_s in zip(said, times, strict=True)])

    def add_histogram(name: str, labels: str, edges: Sequence[float], counts: np.ndarray) -> None:
        for edge, column in zip([*map("{:g}".format, edges), "+Inf"], counts.T, strict=True):
            add(f"{name}_bucket", f'{labels},le="{edge}"', column)

    for s, service in enumerate(scenario.services):
        total, tick = totals[:, s], ticks[:, s]
        own, deployed = f'service="{service.name}"', f'deployment="{service.name}"'
        lost = total["rejected"] + total["timed_out"] + total["abandoned"] + total["lost"]
        add("requests_total", own, total["arrived"])
        add("responses_total", f'{own},outcome="served"', total["served"])
        add("responses_total", f'{own},outcome="dropped"', lost)
        add_histogram("latency_seconds", own, edges_s, latencies[:, s])
        add("latency_seconds_count", own, latencies[:, s, -1])
        add("latency_seconds_sum", own, total["latency_s"])
        add("batch_requests_count", own, total["batches"])
        add("batch_requests_sum", own, total["batched"])
        add("busy_seconds_total", own, total["busy_s"])
        add("kube_deployment_status_replicas_ready", deployed, tick["ready"])
        add("kube_deployment_spec_replicas", deployed, tick["ready"] + tick["starting"] + tick["pending"])
        add_histogram("replica_startup_seconds", own, START_EDGES_S, starts.counts[:, s])
        add("replica_startup_seconds_sum", own, starts.sum_s[:, s])
    return "\n".join([*lines, "# EOF", ""])


class _StartUps:
    """Start-ups that have ended: their cumulative histogram, shape (points, services, edges + 1), and summed seconds,
    shape (points, services)."""

    def __init__(self, points: int, services: int) -> None:
        self.counts = np.zeros((points, services, len(START_EDGES_S) + 1), np.int64)
        self.sum_s = np.zeros((points, services))
        self._seen: set[tuple[int, int, float]] = set()

    def see(self, point: int, cluster: Cluster) -> None:
        """Takes in what has become ready since the last point."""
        if point:
            self.counts[point], self.sum_s[point] = self.counts[point - 1], self.sum_s[point - 1]
        replicas = cluster.replicas
        for k in np.flatnonzero((replicas["state"] == READY) & (replicas["ordered_s"] > 0)).tolist():
            ready_s, ordered_s = float(replicas[k]["ready_s"]), float(replicas[k]["ordered_s"])
            key = (k, int(replicas[k]["ordinal"]), ready_s)
            if key not in self._seen:
                self._seen.add(key)
                s = int(np.searchsorted(cluster.params["replica_hi"], k, side="right"))
                took_s = ready_s - ordered_s
                self.counts[point, s] += np.append(np.asarray(START_EDGES_S) >= took_s, True)
                self.sum_s[point, s] += took_s
