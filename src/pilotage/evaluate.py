"""Policies x windows of traffic -> one table in dollars, with intervals from paired windows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pilotage.control.guard import Guard
from pilotage.control.policy import Controller, Policy
from pilotage.control.steer import steer
from pilotage.engine.cluster import Cluster, World
from pilotage.engine.layout import COUNTS
from pilotage.metrics import ITEMS, attainment, dollars, quantiles_s
from pilotage.scenario import Scenario

RESAMPLES = 2000
_PERCENTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Run:
    """One policy in one world, from start to end.

    `usd` has shape (services, len(ITEMS)); `totals` is the engine's TICK record per service, summed over the
    run; `histogram` has shape (services, BUCKETS); `timeline`, if it was kept, shape (ticks, services).
    """

    policy: str
    world: World
    usd: np.ndarray
    totals: np.ndarray
    histogram: np.ndarray
    seconds: float
    timeline: np.ndarray | None = None

    @property
    def total_usd(self) -> float:
        return float(self.usd.sum())


def prices(scenario: Scenario) -> dict[str, np.ndarray]:
    """Dollars per late, dropped and wrongly answered request, each of shape (services,)."""
    return {
        name: np.array([getattr(service.economics, name) for service in scenario.services])
        for name in ("late_usd", "dropped_usd", "error_usd")
    }


def bill(counters: np.ndarray, scenario: Scenario) -> np.ndarray:
    """The itemised dollars of engine counters of shape (..., services), along a new last axis of ITEMS."""
    return dollars(
        counters["node_usd"],
        counters["late"] + counters["overdue"],
        counters["rejected"] + counters["timed_out"] + counters["abandoned"],
        counters["wrong"],
        0.0,
        prices(scenario),
    )


def simulate(
    scenario: Scenario,
    policies: Sequence[Policy | Sequence[Policy]],
    worlds: Sequence[World],
    *,
    label: str = "",
    guard: Guard | None = None,
    keep_timeline: bool = False,
    threads: int = 1,
) -> list[Run]:
    """Runs policy k in world k, for all k together. A policy is one for all services, or one per service.

    With a guard, every controller runs behind it. All runs of a call advance in the same compiled calls.
    """
    cluster = Cluster(scenario, worlds, threads=threads)
    services = len(scenario.services)
    controllers: list[Controller] = []
    for w, policy in enumerate(policies):
        for s in range(services):
            situation = cluster.situation(w, s)
            one = policy if isinstance(policy, Policy) else policy[s]
            controller = one.begin(situation)
            controllers.append(guard.begin(controller, situation) if guard else controller)
    shape = (scenario.ticks, *cluster.shape)
    timeline = np.zeros(shape, cluster.ticks.dtype) if keep_timeline else None

    def record(tick: int, *_: Any) -> None:
        if timeline is not None:
            timeline[tick] = cluster.ticks

    began = time.perf_counter()
    steer(cluster, controllers, scenario.ticks, record)
    cluster.finish()
    if timeline is not None:
        timeline[-1] = cluster.ticks
    seconds = (time.perf_counter() - began) / len(worlds)
    usd = bill(cluster.totals, scenario)
    return [
        Run(
            policy=label,
            world=world,
            usd=usd[w],
            totals=cluster.totals[w].copy(),
            histogram=cluster.histograms[w].copy(),
            seconds=seconds,
            timeline=None if timeline is None else timeline[:, w],
        )
        for w, world in enumerate(worlds)
    ]


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
    dropped = totals["rejected"] + totals["timed_out"] + totals["abandoned"]
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
