"""What the simulator says will happen under given requests, and which settings of Ray's autoscaler would do best."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

WORLDS = 16
DRAIN_S = 30.0  # to wait for answers after the last request


def predicted(
    spec: Any, times_s: np.ndarray, policy: str, seed: int, monitor: tuple[float, float] | None = None
) -> dict[str, Any]:
    """What will happen, in WORLDS runs with these requests: means, and the interval that holds 95 % of the runs.

    With a `monitor`, of a window and an age in seconds, the policy sees what that would show (see `scraped`).
    """
    from pilotage.control.learned import policy_from
    from pilotage.engine.cluster import Recorded, World
    from pilotage.engine.run import at_tick, bill, simulate, tick_of
    from pilotage.metrics import quantiles_s

    end_s = spec.horizon_h * 3600
    chosen = policy_from(policy)
    if monitor is not None:
        from scraped import Scraped

        chosen = Scraped(policy=chosen, tick_s=spec.tick_s, window_s=monitor[0], age_s=monitor[1])
    longer = spec.replace(horizon_h=(end_s + DRAIN_S) / 3600)  # so that all are answered
    worlds = [World(seed + 1 + k, start_s=0.0, traffic=(Recorded(times_s),)) for k in range(WORLDS)]
    runs = simulate(longer, [chosen] * WORLDS, worlds, keep_timeline=True)
    tick_s = runs[0].tick_s
    at = at_tick(longer, tick_of(longer, chosen))
    timelines = np.stack([run.timeline[: round(end_s / tick_s), 0] for run in runs])
    nodes_usd = timelines["node_usd"].sum(axis=1)
    late = np.array([bill(run.totals, at)[:, 1:].sum() for run in runs])
    p95_ms = np.array([1e3 * float(quantiles_s(run.histogram.sum(axis=0), (0.95,))[0]) for run in runs])
    replica_h = timelines["node_s"].sum(axis=1) / 3600
    return {
        "policy": policy, "p95_ms": spread(p95_ms), "replica_hours": spread(replica_h), "usd": spread(nodes_usd + late),
        "late": spread(np.array([float(run.totals["late"].sum() + run.totals["overdue"].sum()) for run in runs])),
        "tick_s": tick_s, "ready": timelines["ready"].mean(axis=0).tolist(),
        "latency_p95_s": np.nanmean(timelines["latency_p95_s"], axis=0).tolist(),
    }  # fmt: skip


def spread(values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def best_of_ray(spec: Any, times_s: np.ndarray, seed: int) -> dict[str, float]:
    """The settings of Ray's autoscaler that cost least for this very load, as far as the simulator can tell."""
    found: list[tuple[float, dict[str, float]]] = []
    for target, up_s, down_s in itertools.product(
        (1.0, 1.5, 2.0), (0.0, 2.0, 5.0, 10.0), (5.0, 10.0, 20.0, 60.0)
    ):
        settings = {
            "target_ongoing_requests": target, "upscale_delay_s": up_s, "downscale_delay_s": down_s,
            "look_back_period_s": 10.0, "metrics_interval_s": 2.0,
        }  # fmt: skip
        found.append((predicted(spec, times_s, ray_policy(settings), seed)["usd"]["mean"], settings))
    return min(found, key=lambda one: one[0])[1]


def ray_policy(settings: dict[str, float]) -> str:
    return "ray-serve" + (":" + ",".join(f"{k}={v:g}" for k, v in settings.items()) if settings else "")
