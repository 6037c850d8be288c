"""MArk: proactive, greedy provisioning over instance types.

Origin: MArk-Project `modules/proactive_controller2.py` (ATC'19). Upstream has no licence: this is written from a
description of the algorithm, and checked against outputs of the original. Instance types are the pools of a service.
Bursts go to serverless functions there, which the engine does not have; spot is one more pool with a price. The
forecaster (an LSTM there) is `forecast.Horizon`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta

from pilotage.control.fleet import Fleet
from pilotage.control.forecast import Horizon
from pilotage.control.policy import Controller, Decision, Observation, Policy, Situation
from pilotage.world.spec import PositiveCount

STEP_S = 60.0
NEAR = 6  # steps within which there must be enough


@dataclass(frozen=True, slots=True)
class InstanceType:
    """What one instance serves and costs; `launch_usd` is what launching one costs before it serves."""

    capacity_rps: float
    usd_per_s: float
    launch_usd: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Instances by type: wanted, of which to launch, and running ones that are not wanted."""

    wanted: tuple[int, ...]
    launch: tuple[int, ...]
    surplus: tuple[int, ...]


def plan(forecast_rps: np.ndarray, types: Sequence[InstanceType], running: Sequence[int]) -> Plan:
    """Adds the instance with the least cost per request, until the next six steps are covered.

    The cost is taken over the span from the first of the greatest shortages for as long as the forecast is not below
    the capacity; a running instance costs no launch. Of equal costs the later row wins, running ones coming last.
    """
    kept, launched = [0] * len(types), [0] * len(types)
    residual = np.array(forecast_rps, dtype=float)
    while residual[:NEAR].max() > 0:
        first = int(np.argmax(residual[:NEAR]))
        over = residual[first:] < 0
        span = residual[first : first + (int(np.argmax(over)) if over.any() else len(over))]
        best, cheapest = -1, math.inf
        for row in range(2 * len(types)):
            k, warm = row % len(types), row >= len(types)
            if warm and kept[k] >= running[k]:
                continue
            usd = types[k].usd_per_s * len(span) * STEP_S + (0.0 if warm else types[k].launch_usd)
            cost = usd / float(np.minimum(span, types[k].capacity_rps)[span > 0].sum())
            if cost <= cheapest * (1 + 1e-12):
                best, cheapest = row, cost
        k = best % len(types)
        (kept if best >= len(types) else launched)[k] += 1
        residual -= types[k].capacity_rps
    wanted = tuple(a + b for a, b in zip(kept, launched, strict=True))
    surplus = tuple(max(0, r - a) for r, a in zip(running, kept, strict=True))
    return Plan(wanted, tuple(launched), surplus)


class Mark(Policy, frozen=True, kw_only=True, tag="mark"):
    """MArk with the original's constants: a round a minute, 50 minutes of forecast, demand times 1.2.

    An instance goes if it was surplus in each of the last `patience` rounds, and no earlier than `cooldown` rounds
    after others went.
    """

    demand_factor: Annotated[float, Meta(ge=0.8, le=3)] = 1.2
    patience: Annotated[int, Meta(ge=1, le=60)] = 6
    cooldown: Annotated[int, Meta(ge=0, le=60)] = 5
    launch_overhead_s: Annotated[float, Meta(ge=0, le=3600)] = 180.0
    steps: PositiveCount = 50

    def begin(self, situation: Situation) -> Controller:
        return _Mark(self, situation)

    def period_s(self) -> float:
        return STEP_S


class _Mark:
    def __init__(self, policy: Mark, situation: Situation) -> None:
        service = situation.service
        self._policy = policy
        self._types = [
            InstanceType(
                situation.capacity_rps(name),
                situation.pools[name].price_usd_per_hour / 3600,
                situation.pools[name].price_usd_per_hour / 3600 * policy.launch_overhead_s,
            )
            for name in service.pools
        ]
        leads_s = STEP_S * (1 + np.arange(policy.steps))
        self._horizon = Horizon(situation.tick_s, leads_s, situation.history_rps)
        self._known = len(situation.history_rps) > 0
        self._pools, self._fleet = service.pools, Fleet(service.pools)
        self._surplus: list[tuple[int, ...]] = []
        self._since_release = policy.cooldown

    def decide(self, seen: Observation) -> Decision:
        p = self._policy
        if not math.isnan(seen["arrival_rate"]):
            self._horizon.update(seen["arrival_rate"])
            self._known = True
        if not (seen.counted and self._known):
            return Decision(reason="no metrics")
        self._fleet.settle(seen.replicas)
        forecast = p.demand_factor * self._horizon.rates_rps
        found = plan(forecast, self._types, list(self._fleet.counts.values()))
        self._surplus = [*self._surplus, found.surplus][-p.patience :]
        self._since_release += 1
        reason = f"needs {forecast[:NEAR].max():.1f} requests/s"
        if any(found.launch):
            k = int(np.argmax(found.launch))
            return self._fleet.order(self._pools[k], found.launch[k], reason)
        if len(self._surplus) < p.patience or self._since_release <= p.cooldown:
            return Decision(reason=reason)
        lasting = [min(column) for column in zip(*self._surplus, strict=True)]
        decision = self._fleet.release_surplus(dict(zip(self._pools, lasting, strict=True)), reason)
        if decision.release:
            self._since_release = 0
        return decision
