"""llm-d's Workload Variant Autoscaler: replicas by a queueing model of continuous batching.

Origin: llm-d-incubation/workload-variant-autoscaler `pkg/analyzer`, `pkg/core/allocation.go`, `pkg/config/defaults.go`
("unlimited" mode; upstream computes in single precision). A replica is a state-dependent M/M/1/K queue, whose targets
are means: time to first token (waiting and prefill) and inter-token latency.

A batching server is a model whose requests have one token in and one out: `prefill(n) = gamma + delta n` is its batch
time, there is no decoding, and the time to the first token is the latency; an LLM service is what upstream models. The
pools of a service are the accelerators; each of upstream's variants is a deployment of its own, so that a change of
accelerator orders all replicas in one pool and releases all in the other, at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta

from pilotage.control.fleet import Fleet
from pilotage.control.policy import Controller, Decision, Observation, Policy, Situation
from pilotage.world.servers import IterationLaw
from pilotage.world.spec import Count, Positive

QUEUE_TO_BATCH = 10  # requests that may wait, in batches
EPSILON = 1e-3  # rates stay so far from 0 and from saturation, relatively
TPS_MARGIN = 0.1  # of the highest rate, kept free where a token rate is the target
PENALTY = 0.1  # of both costs, for a change of accelerator
PERIOD_S = 60.0


class Infeasible(Exception):  # noqa: N818  (a finding, not a failure)
    """No rate meets the target."""


@dataclass(frozen=True, slots=True)
class Performance:
    """What a replica does at one arrival rate: means, in requests/s and milliseconds."""

    throughput_rps: float
    wait_ms: float
    in_service: float
    concurrency: float
    ttft_ms: float
    itl_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A model on an accelerator: `alpha + beta n` ms to decode, `gamma + delta in n` ms to prefill n requests."""

    alpha: float
    beta: float
    gamma: float
    delta: float
    tokens_in: float
    tokens_out: float
    max_batch: int

    def decode_ms(self, n: float) -> float:
        return self.alpha + self.beta * n

    def prefill_ms(self, n: float) -> float:
        return self.gamma + self.delta * self.tokens_in * n if self.tokens_in > 0 else 0.0

    def service_rps(self, n: int) -> float:
        """Requests per second that n requests in service leave at."""
        return 1e3 * n / (self.prefill_ms(n) + (self.tokens_out - 1) * self.decode_ms(n))

    @property
    def range_rps(self) -> tuple[float, float]:
        """The arrival rates that the model is used for."""
        return self.service_rps(1) * EPSILON, self.service_rps(self.max_batch) * (1 - EPSILON)

    def analyse(self, rate_rps: float) -> Performance:
        """The stationary behaviour of the queue with room for 11 batches."""
        room = self.max_batch * (1 + QUEUE_TO_BATCH)
        n = np.arange(room + 1)
        served = np.array([self.service_rps(k) for k in range(1, self.max_batch + 1)])
        departures = np.r_[served, np.full(room - self.max_batch, served[-1])]
        weights = np.r_[0.0, np.cumsum(np.log(rate_rps / departures))]
        p = np.exp(weights - weights.max())
        p /= p.sum()
        in_system = float(p @ n)
        in_service = float(p @ np.minimum(n, self.max_batch))
        throughput = rate_rps * (1 - float(p[-1]))
        wait_ms = 1e3 * (in_system - in_service) / throughput
        # the batch size whose service time is the mean one
        more = self.tokens_out - 1
        fixed_ms = (self.gamma if self.tokens_in > 0 else 0.0) + self.alpha * more
        per_request_ms = self.delta * self.tokens_in + self.beta * more
        mean_ms = 1e3 * in_service / throughput
        concurrency = min(max((mean_ms - fixed_ms) / per_request_ms, 0.0), self.max_batch)
        ttft_ms = wait_ms + self.prefill_ms(concurrency)
        return Performance(throughput, wait_ms, in_service, concurrency, ttft_ms, self.decode_ms(concurrency))

    def highest_rps(
        self, *, ttft_ms: float | None = None, itl_ms: float | None = None, tps: float | None = None
    ) -> float:
        """The highest arrival rate that meets all targets; Infeasible where none does."""
        _, high = self.range_rps
        rates = [high]
        if ttft_ms is not None:
            rates.append(self._meets(ttft_ms, lambda rate: self.analyse(rate).ttft_ms))
        if itl_ms is not None:
            rates.append(self._meets(itl_ms, lambda rate: self.analyse(rate).itl_ms))
        if tps is not None:
            rates.append(high * (1 - TPS_MARGIN))
        return min(rates)

    def _meets(self, target: float, of: Callable[[float], float]) -> float:
        """Where a measure that grows with the rate reaches its target, to 1e-6."""
        low, high = self.range_rps
        if target >= of(high):
            return high
        if target < of(low):
            raise Infeasible
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if of(middle) <= target else (low, middle)
            if high - low <= 1e-6 * high:
                break
        return (low + high) / 2


def replicas(
    rate_rps: float,
    per_replica_rps: float,
    *,
    low: int = 1,
    tps: float | None = None,
    tokens_out: float = 1.0,
) -> int:
    """Replicas for a load, or for a rate of tokens where that is the target."""
    total = rate_rps if tps is None else tps / tokens_out
    return max(low, math.ceil(total / per_replica_rps - 1e-9))


def value(usd: float, present_usd: float, *, same: bool) -> float:
    """What upstream minimises over accelerators: the change in cost, and a penalty for changing the accelerator."""
    return usd - present_usd + (0.0 if same else PENALTY * (usd + present_usd))


class Wva(Policy, frozen=True, kw_only=True, tag="wva"):
    """The optimiser with upstream's constants, once a minute, on the arrival rate of the last minute.

    The target is the service's objective, times `target_share`: upstream's targets are means, and the share of 1/3
    that would make them 95th percentiles of an exponential wait is defined there, but not applied.
    """

    target_share: Annotated[float, Meta(ge=0.1, le=1.0)] = 1.0
    period: Positive = PERIOD_S
    min_replicas: Count | None = None

    def begin(self, situation: Situation) -> Controller:
        return _Wva(self, situation)

    def period_s(self) -> float:
        return self.period


class _Wva:
    def __init__(self, policy: Wva, situation: Situation) -> None:
        service = situation.service
        self._low = service.min_replicas if policy.min_replicas is None else policy.min_replicas
        self._fleet = Fleet(service.pools)
        target_ms = policy.target_share * service.slo_ms
        itl_ms = None if service.llm is None else service.llm.objectives.tpot_ms
        decodes = service.llm is not None and service.llm.role == "decode"
        self._rps: Mapping[str, float] = {}
        for name in service.pools:
            profile = _profile(situation, name)
            try:
                ttft_ms = target_ms - situation.pools[name].network_ms
                rate = profile.highest_rps(
                    ttft_ms=None if decodes else ttft_ms, itl_ms=target_ms if decodes else itl_ms
                )
            except Infeasible:
                continue
            per_slot = profile.analyse(rate).throughput_rps
            self._rps[name] = per_slot * service.server.batches_in_flight
        self._usd = {name: situation.pools[name].price_usd_per_hour for name in service.pools}

    def decide(self, seen: Observation) -> Decision:
        rate = seen["arrival_rate"]
        if math.isnan(rate) or not seen.counted:
            return Decision(reason="no metrics")
        if not self._rps:
            return Decision(reason="no pool meets the objective")
        self._fleet.settle(seen.replicas)
        here = self._fleet.counts
        main = max(here, key=lambda name: here[name])
        present_usd = sum(self._usd[name] * count for name, count in here.items())
        counts = {name: replicas(rate, rps, low=self._low) for name, rps in self._rps.items()}
        pool = min(
            counts,
            key=lambda name: value(self._usd[name] * counts[name], present_usd, same=name == main),
        )
        reason = f"{rate:.1f} requests/s at {self._rps[pool]:.1f} a replica"
        return self._fleet.move(pool, counts[pool], reason)


def _profile(situation: Situation, pool: str) -> Profile:
    """A service's batch times on a pool as a line through those of one request and of a full batch; of an LLM service
    its iteration law at the mean request, half-way through the output; where prefill and decode are apart, the one has
    no output but the first token, and the other no input."""
    service = situation.service
    law = service.variants[0].latency[pool]
    if service.llm is not None and service.tokens is not None and isinstance(law, IterationLaw):
        tokens_in, tokens_out = service.tokens.means
        decode, context = law.decode or law, tokens_in + tokens_out / 2
        fit = int((law.kv_blocks or service.llm.blocks) * service.llm.block_tokens / context)
        return Profile(
            alpha=1e3 * decode.base_s,
            beta=1e3 * (decode.sequence_s + decode.context_s * context),
            gamma=1e3 * law.base_s,
            delta=1e3 * (law.prefill_s + law.square_s * min(tokens_in, service.llm.chunk_tokens)),
            tokens_in=0.0 if service.llm.role == "decode" else tokens_in,
            tokens_out=1.0 if service.llm.role == "prefill" else tokens_out,
            max_batch=max(1, min(service.server.max_batch, fit)),
        )
    times_ms = 1e3 * situation.batch_times_s(pool)
    largest = len(times_ms)
    slope = float(times_ms[-1] - times_ms[0]) / (largest - 1) if largest > 1 else 0.0
    return Profile(
        alpha=0.0,
        beta=0.0,
        gamma=float(times_ms[0]) - slope,
        delta=slope or 1e-9,
        tokens_in=1.0,
        tokens_out=1.0,
        max_batch=largest,
    )
