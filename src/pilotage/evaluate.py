"""Policies x windows of traffic -> one table in dollars, with intervals from paired windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pilotage.engine.layout import COUNTS
from pilotage.engine.run import Run
from pilotage.metrics import ITEMS, attainment, quantiles_s
from pilotage.scenario import Scenario

RESAMPLES = 2000
_PERCENTILES = (0.5, 0.95, 0.99)


def interval(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of one value per window, with the 95 % percentile bootstrap interval over windows."""
    return ratio_interval(values, np.ones_like(values), seed)


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Ratio of two sums over the same windows, with the 95 % paired bootstrap interval over windows.

    Both have shape (windows,). With fewer than two windows the interval is unknown: NaN.
    """
    n = len(numerator)
    mean = float(numerator.sum() / denominator.sum()) if denominator.sum() else float("nan")
    if n < 2:
        return {"mean": mean, "low": float("nan"), "high": float("nan")}
    picks = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    below = denominator[picks].sum(axis=1)
    ratios = np.divide(numerator[picks].sum(axis=1), below, out=np.full(RESAMPLES, np.nan), where=below != 0)
    low, high = np.nanquantile(ratios, [0.025, 0.975])
    return {"mean": mean, "low": float(low), "high": float(high)}


def summary(policy: str, runs: Sequence[Run], lower_usd: np.ndarray | None = None) -> dict[str, Any]:
    """One policy's row of the table: all numbers pooled over its runs (windows), dollars per run."""
    totals = {name: float(sum(run.totals[name].sum() for run in runs)) for name in COUNTS}
    usd = np.array([run.usd.sum(axis=0) for run in runs])
    dropped = totals["rejected"] + totals["timed_out"] + totals["abandoned"] + totals["lost"]
    latency_s = quantiles_s(sum(run.histogram.sum(axis=0) for run in runs), _PERCENTILES)
    over = None if lower_usd is None else ratio_interval(usd.sum(axis=1), lower_usd)
    return {
        "policy": policy,
        "total_usd": interval(usd.sum(axis=1)),
        "usd": dict(zip(ITEMS, usd.mean(axis=0).tolist(), strict=True)),
        "slo_attainment": attainment(
            totals["served"] - totals["late"], totals["served"] + dropped + totals["overdue"]
        ),
        "latency_ms": {
            f"p{round(100 * p)}": float(1e3 * v) for p, v in zip(_PERCENTILES, latency_s, strict=True)
        },
        "requests": int(totals["arrived"]),
        "dropped": int(dropped),
        "replica_hours": totals["replica_s"] / 3600,
        "node_hours": totals["node_s"] / 3600,
        "accuracy": 1 - totals["wrong"] / totals["served"] if totals["served"] else None,
        "over_bound": over,
    }


def compare(
    scenario: Scenario,
    results: Sequence[tuple[str, Sequence[Run]]],
    lower_usd: np.ndarray | None = None,
    schedule: Sequence[Run] | None = None,
) -> dict[str, Any]:
    """The evaluation object of the command line: every policy, and every pair of policies window by window.

    `results` are (label, runs) with the same windows in the same order; `lower_usd` holds the bound of each.
    """
    totals = {label: np.array([run.total_usd for run in runs]) for label, runs in results}
    labels = list(totals)
    versus = []
    for k, label in enumerate(labels):
        for baseline in labels[:k]:
            share = ratio_interval(totals[label], totals[baseline])
            saving = {"mean": 1 - share["mean"], "low": 1 - share["high"], "high": 1 - share["low"]}
            versus.append({"policy": label, "baseline": baseline, "saving": saving})
    bound = None
    if lower_usd is not None and schedule is not None:
        bound = {
            "lower": float(np.mean(lower_usd)),
            "schedule": float(np.mean([run.total_usd for run in schedule])),
        }
    first = results[0][1]
    arrived = sum(float(run.totals["arrived"].sum()) for _, runs in results for run in runs)
    seconds = sum(run.seconds for _, runs in results for run in runs)
    return {
        "env": scenario.name,
        "seeds": [run.world.seed for run in first],
        "hours": scenario.ticks * scenario.tick_s / 3600,
        "policies": [summary(label, runs, lower_usd) for label, runs in results],
        "versus": versus,
        "bound_usd": bound,
        "engine": {"requests_per_s": arrived / seconds if seconds else 0.0},
    }
