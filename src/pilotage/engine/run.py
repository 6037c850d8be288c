"""Runs: a policy in a world, from start to end, through the steer loop, with its itemised bill."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pilotage.control.guard import Guard
from pilotage.control.policy import Policy
from pilotage.control.retraining import Never, Retraining
from pilotage.control.steer import Helm, steer
from pilotage.engine.cluster import Cluster, World
from pilotage.engine.lifecycle import FleetHelm, Lives, with_jobs, with_silence
from pilotage.metrics import dollars
from pilotage.scenario import Scenario
from pilotage.world.spec import SpecError


@dataclass(frozen=True, slots=True)
class Run:
    """One policy in one world, from start to end, at control ticks of `tick_s`.

    `usd` has shape (services, len(ITEMS)); `totals` is the engine's TICK record per service, summed over the
    run; `histogram` has shape (services, BUCKETS); `timeline`, if it was kept, shape (ticks, services). `retrained_s`
    says, of every service that decays, when new versions came into service.
    """

    policy: str
    world: World
    tick_s: float
    usd: np.ndarray
    totals: np.ndarray
    histogram: np.ndarray
    seconds: float
    timeline: np.ndarray | None = None
    retrained_s: Sequence[Sequence[float]] = ()

    @property
    def total_usd(self) -> float:
        return float(self.usd.sum())


def prices(scenario: Scenario) -> dict[str, np.ndarray]:
    """Dollars per late, dropped and wrongly answered request, each of shape (services,)."""
    return {
        name: np.array([getattr(service.economics, name) for service in scenario.services])
        for name in ("late_usd", "dropped_usd", "error_usd")
    }


def bill(counters: np.ndarray, scenario: Scenario, retraining_usd: np.ndarray | float = 0.0) -> np.ndarray:
    """The itemised dollars of engine counters of shape (..., services), along a new last axis of ITEMS."""
    return dollars(
        counters["node_usd"],
        counters["late"] + counters["overdue"],
        counters["rejected"] + counters["timed_out"] + counters["abandoned"] + counters["lost"],
        counters["wrong"],
        retraining_usd,
        prices(scenario),
    )


def tick_of(scenario: Scenario, policy: Policy | Sequence[Policy]) -> float:
    """The control tick at which a policy (or one per service) runs in a scenario, in seconds.

    It is the policy's own period, or the scenario's tick. A run lasts as long as the scenario says at its own
    tick, to the second: a horizon that is no multiple of the period is cut into the fewest equal ticks that are
    no longer than the period.
    """
    horizon_s = scenario.ticks * scenario.tick_s
    found = set()
    for one in [policy] if isinstance(policy, Policy) else policy:
        period_s = one.period_s()
        if period_s is None or period_s == scenario.tick_s:
            found.add(scenario.tick_s)
        else:
            found.add(horizon_s / math.ceil(horizon_s / period_s - 1e-9))
    if len(found) > 1:
        raise SpecError(
            f"the policies of one world decide every {' s, '.join(f'{t:g}' for t in sorted(found))} s; "
            "services meet at ticks, so give policies of one period"
        )
    return found.pop()


def at_tick(scenario: Scenario, tick_s: float) -> Scenario:
    """The same scenario, as long, at another control tick: its traffic and all random streams stay the same."""
    if tick_s == scenario.tick_s:
        return scenario
    changed: Scenario = scenario.replace(tick_s=tick_s, horizon_h=scenario.ticks * scenario.tick_s / 3600)
    return changed


def simulate(
    scenario: Scenario,
    policies: Sequence[Policy | Sequence[Policy]],
    worlds: Sequence[World],
    *,
    retraining: Sequence[Retraining | Sequence[Retraining]] | Retraining | None = None,
    label: str = "",
    guard: Guard | None = None,
    keep_timeline: bool = False,
    threads: int = 1,
) -> list[Run]:
    """Runs policy k in world k, for all k. A policy is one for all services, or one per service.

    `retraining` says when models that decay are retrained (None: never): one policy, or one per world, and there one
    for all services that decay, or one for each. Every policy runs at its own tick (see `tick_of`), and sees metrics
    of windows as fine as that. With a guard, every controller runs behind it. All runs with the same tick advance in
    the same compiled calls.
    """
    if retraining is None or isinstance(retraining, Retraining):
        retraining = [retraining or Never()] * len(worlds)
    ticks_s = [tick_of(scenario, policy) for policy in policies]
    runs: dict[int, Run] = {}
    for tick_s in dict.fromkeys(ticks_s):
        chosen = [k for k, t in enumerate(ticks_s) if t == tick_s]
        found = _in_step(
            at_tick(scenario, tick_s),
            [policies[k] for k in chosen],
            [worlds[k] for k in chosen],
            [retraining[k] for k in chosen],
            label=label,
            guard=guard,
            keep_timeline=keep_timeline,
            threads=threads,
        )
        runs |= dict(zip(chosen, found, strict=True))
    return [runs[k] for k in range(len(policies))]


def _in_step(
    scenario: Scenario,
    policies: Sequence[Policy | Sequence[Policy]],
    worlds: Sequence[World],
    retraining: Sequence[Retraining | Sequence[Retraining]],
    *,
    label: str,
    guard: Guard | None,
    keep_timeline: bool,
    threads: int,
) -> list[Run]:
    """`simulate` where all policies decide at the scenario's ticks."""
    decays = any(service.lifecycle for service in scenario.services)
    if decays:
        cluster = Cluster(with_jobs(scenario), with_silence(scenario, worlds), threads=threads)
    else:
        cluster = Cluster(scenario, worlds, threads=threads)
    services = len(scenario.services)
    helm = Helm(
        [policy if isinstance(policy, Policy) else policy[s] for policy in policies for s in range(services)],
        [cluster.situation(w, s) for w in range(len(worlds)) for s in range(services)],
        guard,
        fleet=services,
    )
    lives = Lives(scenario, cluster, retraining) if decays else None
    shape = (scenario.ticks, len(worlds), services)
    timeline = np.zeros(shape, cluster.ticks.dtype) if keep_timeline else None

    def record(tick: int, *_: Any) -> None:
        if lives is not None:
            lives.account()
        if timeline is not None:
            timeline[tick] = cluster.ticks[:, :services]

    began = time.perf_counter()
    steer(cluster, FleetHelm(helm, lives, services) if lives else helm, scenario.ticks, record)
    cluster.finish()
    if timeline is not None:
        timeline[-1] = cluster.ticks[:, :services]
    seconds = (time.perf_counter() - began) / len(worlds)
    totals = cluster.totals[:, :services]
    usd = bill(totals, scenario, lives.retraining_usd() if lives else 0.0)
    return [
        Run(
            policy=label,
            world=world,
            tick_s=scenario.tick_s,
            usd=usd[w],
            totals=totals[w].copy(),
            histogram=cluster.histograms[w, :services].copy(),
            seconds=seconds,
            timeline=None if timeline is None else timeline[:, w],
            retrained_s=lives.retrained_s[w] if lives else [],
        )
        for w, world in enumerate(worlds)
    ]
