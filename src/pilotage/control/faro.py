"""Faro: replicas by the utility of predicted latencies (M/D/c), and a reactive step between solutions.

Origin: beomyeol/faro `src/solver.py`, `src/policy.py` and the configurations of its experiments (EuroSys'25).
Upstream shares a cluster among jobs; here every service decides for itself below its own `max_replicas`, so that
the optimum over one integer is found by trying them all, where upstream uses COBYLA and an integer adjustment. Its
last step, dropping replicas for as long as the utility does not fall, is kept. Upstream serves one request at a time
and container; here a full batch is what it calls a request.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from msgspec import Meta

from pilotage.control.forecast import Horizon
from pilotage.control.policy import Controller, Decision, Observation, Pace, Policy, Situation
from pilotage.control.queueing import erlang_c
from pilotage.world.spec import Positive, PositiveCount

HIGHEST_LOAD = 0.95  # what is above it counts as dropped
NO_WORSE = 1e-4


def latency_s(rate_rps: float, service_s: float, replicas: int, percentile: float = 99.0) -> float:
    """A percentile of M/D/c latency, half of M/M/c's wait; beyond 95 % load, over the share that fits.

    Below 0 the percentile stands for the mean.
    """
    if rate_rps <= 0:
        return service_s
    served = min(rate_rps, HIGHEST_LOAD * replicas / service_s)
    waits = erlang_c(replicas, served * service_s)
    mean_wait_s = waits / (replicas / service_s - served)
    wait_s = mean_wait_s
    if percentile >= 0:
        probability = max(waits, NO_WORSE)
        wait_s = max(0.0, mean_wait_s / probability * math.log(100 * probability / (100 - percentile)))
    return (wait_s / 2 + service_s) / (served / rate_rps)


def utility(latency_s: float, slo_s: float, *, step: bool = False) -> float:
    """1 where the objective is met; else its share of the latency, or 0."""
    return float(latency_s <= slo_s) if step else min(1.0, slo_s / latency_s)


def mean_utility(
    rates_rps: np.ndarray,
    service_s: float,
    slo_s: float,
    present: int,
    replicas: int,
    *,
    starting_steps: int = 0,
    percentile: float = 99.0,
) -> float:
    """Over predicted steps; one that grows has its present count during the first `starting_steps`."""
    counts = [
        present if k < starting_steps and replicas > present else replicas for k in range(len(rates_rps))
    ]
    return float(
        np.mean(
            [
                utility(latency_s(rate, service_s, max(1, n), percentile), slo_s)
                for rate, n in zip(rates_rps.tolist(), counts, strict=True)
            ]
        )
    )


def solve(
    rates_rps: np.ndarray,
    service_s: float,
    slo_s: float,
    present: int,
    most: int,
    *,
    starting_steps: int = 0,
    percentile: float = 99.0,
) -> int:
    """The least count from 1 to `most` whose mean utility is the best, to within 1e-4."""
    found = [
        mean_utility(
            rates_rps, service_s, slo_s, present, n, starting_steps=starting_steps, percentile=percentile
        )
        for n in range(1, most + 1)
    ]
    return 1 + next(k for k, u in enumerate(found) if u >= max(found) - NO_WORSE)


class Faro(Policy, frozen=True, kw_only=True, tag="faro"):
    """The hybrid controller of the paper's experiments.

    Every `solve_interval_s` the utility of `steps` predicted minutes is maximised; every 10 s, a replica is added
    once the mean latency has been above the objective for `above_s`. `percentile` is of the latency that counts.
    """

    percentile: Annotated[float, Meta(ge=50, le=99.9)] = 99.0
    demand_factor: Annotated[float, Meta(ge=0.5, le=3)] = 1.0
    above_s: Annotated[float, Meta(ge=10, le=600)] = 30.0
    solve_interval_s: Positive = 300.0
    steps: PositiveCount = 7
    step_s: Positive = 60.0
    check_interval_s: Positive = 10.0

    def begin(self, situation: Situation) -> Controller:
        return _Faro(self, situation)

    def period_s(self) -> float:
        return self.check_interval_s


class _Faro:
    def __init__(self, policy: Faro, situation: Situation) -> None:
        p, service = policy, situation.service
        self._policy, self._low, self._high = policy, max(1, service.min_replicas), service.max_replicas
        self._slo_s, self._batch = service.slo_s, service.server.max_batch
        self._service_s = float(situation.batch_times_s()[-1]) / service.server.batches_in_flight
        self._starting = min(math.ceil(situation.start_up_s / p.step_s), p.steps - 1)
        leads_s = p.step_s * (1 + np.arange(p.steps))
        self._horizon = Horizon(situation.tick_s, leads_s, situation.history_rps)
        self._known = len(situation.history_rps) > 0
        self._checks = Pace(p.check_interval_s, situation.tick_s)
        self._solves = Pace(p.solve_interval_s, situation.tick_s)
        self._above = 0

    def decide(self, seen: Observation) -> Decision:
        p, rate = self._policy, seen["arrival_rate"]
        if not math.isnan(rate):
            self._horizon.update(rate)
            self._known = True
        if not (seen.counted and self._known):
            return Decision(reason="no metrics")
        present = seen.replicas
        if self._solves.due(seen.now_s):
            rates = self._horizon.rates_rps * p.demand_factor
            count = solve(
                rates / self._batch,
                self._service_s,
                self._slo_s,
                present,
                self._high,
                starting_steps=self._starting,
                percentile=p.percentile,
            )
            return Decision.towards(
                max(count, self._low), seen, reason=f"predicts {rates.max():.1f} requests/s"
            )
        if not self._checks.due(seen.now_s) or math.isnan(seen["latency_mean"]):
            return Decision(reason="nothing new")
        self._above = self._above + 1 if seen["latency_mean"] > self._slo_s else 0
        if self._above * p.check_interval_s < p.above_s - 1e-6:
            return Decision(reason="between solutions")
        self._above = 0
        return Decision.towards(
            min(present + 1, self._high), seen, reason="the mean latency misses the objective"
        )
