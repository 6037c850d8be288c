"""Runs: a policy in a world, from start to end, through the steer loop, with its itemised bill."""

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
from pilotage.metrics import dollars
from pilotage.scenario import Scenario


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
        counters["rejected"] + counters["timed_out"] + counters["abandoned"] + counters["lost"],
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
