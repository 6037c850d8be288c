"""Observation, decision, policy: the three words every part of pilotage agrees on.

An observation holds only what production can measure. `FEATURES` is the one table that says so: each row
names a feature, its unit, how the engine computes it from its counters, and the PromQL that measures it live
(`$service` and `$window` are filled in by the monitor). The same names appear in explanations and reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol, overload

import msgspec
import numpy as np

from pilotage.world.pools import Pool
from pilotage.world.services import Service
from pilotage.world.spec import Spec

Counters = Mapping[str, Any] | np.ndarray  # the engine's counters of one tick, by name


@dataclass(frozen=True, slots=True)
class Feature:
    """One measurable quantity of a service over the last tick; missing values are NaN."""

    name: str
    unit: str
    engine: Callable[[Counters], np.ndarray]
    promql: str
    meaning: str


def _share(numerator: Any, denominator: Any) -> np.ndarray:
    return np.divide(
        numerator, denominator, out=np.full(np.shape(denominator), np.nan), where=denominator > 0
    )


FEATURES: Final = (
    Feature(
        "arrival_rate",
        "requests/s",
        lambda c: c["arrived"] / c["seconds"],
        "sum(rate(requests_total{service='$service'}[$window]))",
        "requests that arrived",
    ),
    Feature(
        "arrival_peak",
        "requests/s",
        lambda c: np.where(c["seconds"] > 0, c["peak_second"], np.nan),
        "max_over_time(sum(rate(requests_total{service='$service'}[1s]))[$window:1s])",
        "requests in the busiest second",
    ),
    Feature(
        "completion_rate",
        "requests/s",
        lambda c: c["served"] / c["seconds"],
        "sum(rate(responses_total{service='$service',outcome='served'}[$window]))",
        "requests that were answered",
    ),
    Feature(
        "drop_rate",
        "requests/s",
        lambda c: (c["rejected"] + c["timed_out"] + c["abandoned"] + c["lost"]) / c["seconds"],
        "sum(rate(responses_total{service='$service',outcome!='served'}[$window]))",
        "requests rejected, timed out, abandoned or lost",
    ),
    Feature(
        "attainment",
        "share",
        lambda c: _share(
            c["served"] - c["late"],
            c["served"] + c["rejected"] + c["timed_out"] + c["abandoned"] + c["lost"],
        ),
        "sum(rate(latency_seconds_bucket{service='$service',le='$slo'}[$window]))"
        " / sum(rate(responses_total{service='$service'}[$window]))",
        "finished requests that met the latency objective",
    ),
    Feature(
        "latency_mean",
        "s",
        lambda c: _share(c["latency_s"], c["served"]),
        "sum(rate(latency_seconds_sum{service='$service'}[$window]))"
        " / sum(rate(latency_seconds_count{service='$service'}[$window]))",
        "mean latency of answered requests",
    ),
    Feature(
        "latency_p95",
        "s",
        lambda c: c["latency_p95_s"],
        "histogram_quantile(0.95, sum by (le) (rate(latency_seconds_bucket{service='$service'}[$window])))",
        "95th percentile of latency",
    ),
    Feature(
        "queue_length",
        "requests",
        lambda c: c["waiting"],
        "sum(queue_length{service='$service'})",
        "requests waiting at the tick",
    ),
    Feature(
        "in_flight",
        "requests",
        lambda c: c["executing"],
        "sum(requests_executing{service='$service'})",
        "requests in execution at the tick",
    ),
    Feature(
        "concurrency",
        "requests",
        lambda c: c["inside_s"] / c["seconds"],
        "avg_over_time(sum(requests_in_system{service='$service'})[$window:])",
        "time-averaged requests waiting or in execution",
    ),
    Feature(
        "utilization",
        "share",
        lambda c: _share(c["busy_s"], c["ready_s"]),
        "sum(rate(busy_seconds_total{service='$service'}[$window]))"
        " / sum(avg_over_time(replica_slots_ready{service='$service'}[$window]))",
        "busy time of ready replicas",
    ),
    Feature(
        "batch_size",
        "requests",
        lambda c: _share(c["batched"], c["batches"]),
        "sum(rate(batch_requests_sum{service='$service'}[$window]))"
        " / sum(rate(batch_requests_count{service='$service'}[$window]))",
        "mean size of the batches started",
    ),
    Feature(
        "replicas_ready",
        "replicas",
        lambda c: c["ready"],
        "sum(kube_deployment_status_replicas_ready{deployment='$service'})",
        "replicas that serve",
    ),
    Feature(
        "replicas_starting",
        "replicas",
        lambda c: c["starting"],
        "sum(kube_deployment_status_replicas_unavailable{deployment='$service'})"
        " - sum(kube_pod_status_phase{deployment='$service',phase='Pending'})",
        "replicas that boot or load",
    ),
    Feature(
        "replicas_pending",
        "replicas",
        lambda c: c["pending"],
        "sum(kube_pod_status_phase{deployment='$service',phase='Pending'})",
        "replicas ordered but without a node",
    ),
    Feature(
        "replicas_draining",
        "replicas",
        lambda c: c["draining"],
        "sum(replicas_draining{service='$service'})",
        "replicas that finish their work before they go",
    ),
    Feature(
        "replicas_failed",
        "replicas",
        lambda c: c["failed"],
        "sum(increase(kube_pod_container_status_restarts_total{container='$service'}[$window]))"
        " + sum(increase(replicas_evicted_total{service='$service'}[$window]))",
        "replicas that crashed, died with their node, were interrupted, or whose node never came",
    ),
    Feature(
        "max_batch",
        "requests",
        lambda c: c["max_batch"],
        "max(max_batch_size{service='$service'})",
        "the batch-size limit in force",
    ),
    # of LLM services, as vLLM exports them; missing elsewhere
    Feature(
        "kv_usage",
        "share",
        lambda c: _share(c["kv_used"], c["kv_blocks"]),
        "avg(vllm:kv_cache_usage_perc{service='$service'})",
        "KV blocks in use of the ready replicas",
    ),
    Feature(
        "prompt_token_rate",
        "tokens/s",
        lambda c: np.where(c["kv_blocks"] > 0, c["prompt_tokens"] / c["seconds"], np.nan),
        "sum(rate(vllm:prompt_tokens_total{service='$service'}[$window]))",
        "prompt tokens processed",
    ),
    Feature(
        "output_token_rate",
        "tokens/s",
        lambda c: np.where(c["kv_blocks"] > 0, c["output_tokens"] / c["seconds"], np.nan),
        "sum(rate(vllm:generation_tokens_total{service='$service'}[$window]))",
        "output tokens produced",
    ),
    Feature(
        "prefix_hit_rate",
        "share",
        lambda c: _share(c["hit_tokens"], c["queried_tokens"]),
        "sum(rate(vllm:prefix_cache_hits_total{service='$service'}[$window]))"
        " / sum(rate(vllm:prefix_cache_queries_total{service='$service'}[$window]))",
        "prompt tokens that were found in the prefix cache",
    ),
    Feature(
        "preemption_rate",
        "requests/s",
        lambda c: np.where(c["kv_blocks"] > 0, c["preempted"] / c["seconds"], np.nan),
        "sum(rate(vllm:num_preemptions_total{service='$service'}[$window]))",
        "requests that lost their KV blocks and are computed anew",
    ),
    Feature(
        "tpot_mean",
        "s",
        lambda c: _share(c["tpot_s"], c["tpots"]),
        "sum(rate(vllm:request_time_per_output_token_seconds_sum{service='$service'}[$window]))"
        " / sum(rate(vllm:request_time_per_output_token_seconds_count{service='$service'}[$window]))",
        "mean time per output token of answered requests",
    ),
)
INDEX: Final[Mapping[str, int]] = {feature.name: k for k, feature in enumerate(FEATURES)}


_READY, _STARTING, _PENDING = (INDEX[f"replicas_{what}"] for what in ("ready", "starting", "pending"))


def measure(counters: Counters, features: Sequence[Feature] = FEATURES) -> np.ndarray:
    """Feature values from engine counters of any shape; the features are along the last axis."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = [f.engine(counters) for f in features]
    values = np.empty((*np.shape(found[0]), len(features)))
    for k, column in enumerate(found):
        values[..., k] = column
    return values


@dataclass(frozen=True, slots=True)
class Observation:
    """What a monitor reports of one service at a tick.

    `now_s` is the time of the tick on the service's clock (0 is Monday 00:00, or the first row of a trace).
    `values` and `age_s` have shape (len(FEATURES),); a value is NaN where it is missing.
    """

    now_s: float
    values: np.ndarray
    age_s: np.ndarray

    def __getitem__(self, name: str) -> float:
        return float(self.values[INDEX[name]])

    def age(self, name: str) -> float:
        """How old a value is, in seconds."""
        return float(self.age_s[INDEX[name]])

    @property
    def replicas(self) -> int:
        """Replicas that are ordered and not released: pending, starting and ready. NaN counts as none."""
        total = self._replicas
        return int(total) if total == total else 0

    @property
    def counted(self) -> bool:
        """Whether the number of replicas is known; without it no change can be ordered safely."""
        total = self._replicas
        return total == total

    @property
    def _replicas(self) -> float:
        values = self.values
        return float(values[_READY] + values[_STARTING] + values[_PENDING])


class Observations(Sequence[Observation]):
    """What is reported of many services at a tick, in arrays: times of shape (rows,), values (rows, len(FEATURES)).

    `values` may be engine counters of shape (rows,) instead, which nobody changes any more. A row becomes an
    `Observation`, and counters become values, when they are asked for; who needs less of all saves that. `age_s` has
    the shape of the values, or of one row where all are of one age.
    """

    def __init__(self, now_s: np.ndarray, values: np.ndarray, age_s: np.ndarray) -> None:
        self.now_s, self._known, self._age_s = now_s, values, age_s

    def __len__(self) -> int:
        return len(self._known)

    @property
    def values(self) -> np.ndarray:
        """All features of all rows."""
        if self._known.dtype.names:
            self._known = measure(self._known)
            self._known.setflags(write=False)
        return self._known

    def columns(self, at: Sequence[int]) -> np.ndarray:
        """Some features of all rows, by their places in FEATURES; shape (rows, len(at))."""
        if self._known.dtype.names:
            return measure(self._known, [FEATURES[k] for k in at])
        return self._known[:, at]

    @cached_property
    def replicas(self) -> np.ndarray:
        """Replicas that are ordered and not released, of all rows: NaN where they are not known."""
        total: np.ndarray = self.columns([_READY, _STARTING, _PENDING]).sum(axis=1)
        return total

    @overload
    def __getitem__(self, row: int) -> Observation: ...
    @overload
    def __getitem__(self, row: slice) -> Observations: ...
    def __getitem__(self, row: int | slice) -> Observation | Observations:
        if isinstance(row, slice):
            return Observations(self.now_s[row], self._known[row], self._age_of(row))
        return Observation(float(self.now_s[row]), self.values[row], self._age_of(row))

    def _age_of(self, row: int | slice) -> np.ndarray:
        return self._age_s if self._age_s.ndim == 1 else self._age_s[row]

    @property
    def ages_s(self) -> np.ndarray:
        """The ages of all features of all rows."""
        return np.broadcast_to(self._age_s, (len(self), len(FEATURES)))


def values_of(seen: Sequence[Observation]) -> np.ndarray:
    """The values of all rows; shape (rows, len(FEATURES))."""
    return seen.values if isinstance(seen, Observations) else np.stack([one.values for one in seen])


def ages_of(seen: Sequence[Observation]) -> np.ndarray:
    """The ages of all values of all rows, in seconds; shape (rows, len(FEATURES))."""
    return seen.ages_s if isinstance(seen, Observations) else np.stack([one.age_s for one in seen])


def columns_of(seen: Sequence[Observation], at: Sequence[int]) -> np.ndarray:
    """Some values of all rows, by their places in FEATURES; shape (rows, len(at))."""
    return seen.columns(at) if isinstance(seen, Observations) else values_of(seen)[:, at]


def counts_of(seen: Sequence[Observation]) -> np.ndarray:
    """Replicas that are ordered and not released, of all rows, NaN where they are not known; shape (rows,)."""
    if isinstance(seen, Observations):
        return seen.replicas
    return values_of(seen)[:, [_READY, _STARTING, _PENDING]].sum(axis=1)


def replicas_of(seen: Sequence[Observation]) -> np.ndarray:
    """`Observation.replicas` of all rows; shape (rows,), whole numbers."""
    total = counts_of(seen)
    return np.where(np.isfinite(total), total, 0.0).astype(np.int64)


def times_of(seen: Sequence[Observation]) -> np.ndarray:
    """The times of all rows, in seconds; shape (rows,)."""
    return seen.now_s if isinstance(seen, Observations) else np.array([one.now_s for one in seen], float)


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What a policy orders for one service: replicas to order (ready only after boot and load) and to release
    (now). What is None is left as it is in force; `pool` names where new replicas go, `variant` the build to which the
    service is rolled over, `batch_wait_s` how long a batch that is not full waits, `chunk_tokens` how many tokens an
    iteration of an LLM service may have (vLLM's `max_num_batched_tokens`).
    """

    order: int = 0
    release: int = 0
    max_batch: int | None = None
    pool: str | None = None
    variant: str | None = None
    reason: str = ""
    batch_wait_s: float | None = None
    chunk_tokens: int | None = None

    @staticmethod
    def towards(
        target: int,
        seen: Observation,
        *,
        max_batch: int | None = None,
        variant: str | None = None,
        reason: str = "",
    ) -> Decision:
        """A plain target count, mapped as Kubernetes maps it: the difference to what is ordered already."""
        change = target - seen.replicas
        return Decision(
            order=max(0, change), release=max(0, -change), max_batch=max_batch, variant=variant, reason=reason
        )


@dataclass(frozen=True, slots=True)
class Situation:
    """What a policy knows of its service before the first tick.

    `history_rps` holds the arrival rates of the ticks before the run (oldest first; may be empty): a
    production system has a past. Shape: (ticks,).
    """

    service: Service
    pools: Mapping[str, Pool]
    tick_s: float
    history_rps: np.ndarray

    @property
    def start_up_s(self) -> float:
        """Expected time from order to readiness in the preferred pool, in seconds."""
        return self.pools[self.service.pools[0]].boot_s + self.service.variants[0].start_up_s

    @property
    def replica_usd_per_hour(self) -> float:
        """What a replica costs as its share of a full node, in the pool and build where that is most."""
        places = [
            (self.pools[name].price_usd_per_hour, self.service.replicas_on_node(variant, self.pools[name]))
            for name in self.service.pools
            for variant in self.service.variants
        ]
        return max((price / fitting for price, fitting in places if fitting), default=0.0)

    @property
    def concurrency(self) -> int:
        """Requests that one replica executes at once."""
        return self.service.server.max_batch * self.service.server.batches_in_flight

    def batch_times_s(self, pool: str | None = None) -> np.ndarray:
        """Time of a batch of n requests of mean demand, for n from 1 up to the limit; shape (max_batch,)."""
        law = self.service.variants[0].latency[pool or self.service.pools[0]]
        fixed, variable = self.service.batch_times_s(law)
        times: np.ndarray = (fixed + variable)[1:]
        return times

    def waits_s(self, pool: str | None = None) -> np.ndarray:
        """What `Service.waits_s` says, in a pool (None: the preferred one); shape (max_batch,)."""
        return self.service.waits_s(self.service.variants[0].latency[pool or self.service.pools[0]])

    def concurrency_at(self, utilization: float) -> float:
        """Requests in a replica's batches while it serves that share of its capacity, always with a batch of one size.

        A load test would find it. It is less than the same share of `concurrency`, because small batches take longer
        per request; beyond a share of 1 it goes on in proportion.
        """
        times_s = self.batch_times_s()
        sizes = np.linspace(0, len(times_s), 64 * len(times_s) + 1)
        rates = sizes / np.interp(sizes, np.arange(1, len(times_s) + 1), times_s)
        enough = int(np.argmax(rates >= min(utilization, 1.0) * rates.max() * (1 - 1e-12)))
        return float(sizes[enough]) * max(utilization, 1.0) * self.service.server.batches_in_flight

    def capacity_rps(self, pool: str | None = None) -> float:
        """Requests per second that one replica serves at the best batch size (None: in the preferred pool)."""
        times_s = self.batch_times_s(pool)
        sizes = np.arange(1, len(times_s) + 1)
        return float(np.max(sizes / times_s)) * self.service.server.batches_in_flight


class Pace:
    """Says when a period has passed, to the nearest tick, without drifting; at first it always has."""

    def __init__(self, period_s: float, tick_s: float) -> None:
        self._period_s, self._early_s = period_s, tick_s / 2
        self._next_s = -math.inf

    def due(self, now_s: float) -> bool:
        if now_s < self._next_s - self._early_s:
            return False
        on_time = self._next_s > now_s - self._period_s
        self._next_s = (self._next_s if on_time else now_s) + self._period_s
        return True


class Controller(Protocol):
    """A policy in one run: it may remember, and is thrown away afterwards."""

    def decide(self, seen: Observation) -> Decision: ...


class Together(Protocol):
    """A policy in one run of many services, which it decides for at once; the same as one by one, up to rounding."""

    def decide(self, seen: Sequence[Observation]) -> Sequence[Decision]: ...


class Alone:
    """One service of a policy that decides for many."""

    def __init__(self, together: Together) -> None:
        self.together = together

    def decide(self, seen: Observation) -> Decision:
        return self.together.decide([seen])[0]


class Policy(Spec, frozen=True, tag_field="kind"):
    """The frozen part of a policy. A numeric field with both a lower and an upper bound can be tuned."""

    def begin(self, situation: Situation) -> Controller:
        """A fresh controller for one service and one run."""
        raise TypeError(f"{type(self).__name__} is an abstract policy")

    def begin_together(self, situations: Sequence[Situation]) -> Together | None:
        """The same for many services, if that is cheaper than one by one; None: it is not."""
        return None

    def period_s(self) -> float | None:
        """How often the policy decides, in seconds (None: whenever it is asked, at the scenario's ticks).

        A policy that is asked at some other pace acts at the ticks nearest to its own.
        """
        return None
