"""How a replica serves: latency laws by batch size, batch formation, and the variants of a model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.world.pools import Resources
from pilotage.world.spec import (
    Count,
    Name,
    NonNegative,
    Positive,
    PositiveCount,
    Probability,
    Spec,
    SpecError,
)

# A distribution is drawn through a table of its quantiles: TABLE_CELLS equal steps of probability, of which
# the last is divided into TABLE_CELLS once more, so that the tail is resolved to 1 in TABLE_CELLS**2.
TABLE_CELLS: Final = 512


def quantile_table(quantile: Callable[[float], float]) -> np.ndarray:
    """Quantiles of a positive distribution, scaled to mean 1 under linear interpolation.

    Shape (2 * TABLE_CELLS,): entry k <= TABLE_CELLS - 1 stands at probability k / TABLE_CELLS, later ones
    at equal steps through the last cell. The ends are cut half a cell from 0 and from 1.
    """
    coarse = np.arange(TABLE_CELLS - 1) / TABLE_CELLS
    fine = (TABLE_CELLS - 1 + np.arange(TABLE_CELLS + 1) / TABLE_CELLS) / TABLE_CELLS
    at = np.concatenate([coarse, fine])
    at[0] = 0.5 / TABLE_CELLS
    at[-1] = 1 - 0.5 / TABLE_CELLS**2
    table = np.array([quantile(float(p)) for p in at])
    weights = np.r_[np.full(TABLE_CELLS - 1, 1 / TABLE_CELLS), np.full(TABLE_CELLS, 1 / TABLE_CELLS**2)]
    return table / float(np.sum(weights * (table[1:] + table[:-1]) / 2))


@functools.cache
def log_normal_table(cv: float) -> np.ndarray:
    """Quantile table of the log-normal law with mean 1 and coefficient of variation `cv`; not to be written."""
    sigma = math.sqrt(math.log1p(cv * cv))
    normal = NormalDist()
    table = quantile_table(lambda p: math.exp(sigma * normal.inv_cdf(p))) if cv else np.ones(2 * TABLE_CELLS)
    table.setflags(write=False)
    return table


def _measured_law(
    mean_s: float, cv: float, quantiles: tuple[float, ...] | None, unit_s: float
) -> tuple[float, np.ndarray]:
    """Mean in seconds and relative quantile table of a duration: log-normal, or as measured in `unit_s`."""
    if quantiles is None:
        return mean_s, log_normal_table(cv)
    steps, seconds = np.linspace(0, 1, len(quantiles)), np.asarray(quantiles) * unit_s
    mean_s = float(np.sum((seconds[1:] + seconds[:-1]) / 2) / (len(seconds) - 1))
    return mean_s, quantile_table(lambda p: float(np.interp(p, steps, seconds)))


def _check_quantiles(spec: Spec, what: str, unit: str) -> None:
    """Refuses measured quantiles of a duration that make no sense, or stand beside a log-normal law."""
    name, mean = f"{what}_quantiles_{unit}", f"{what}_{unit}"
    quantiles = getattr(spec, name)
    if quantiles is None:
        return
    if getattr(spec, mean) or getattr(spec, f"{what}_cv"):
        raise SpecError(f"{name} is given beside {mean} or {what}_cv; give one or the other")
    if len(quantiles) < 2 or list(quantiles) != sorted(quantiles):
        raise SpecError(f"{name} must be at least two times in ascending order")
    if quantiles[-1] <= 0:
        raise SpecError(f"{name} are all 0; leave it out for what takes no time")


class Demand(Spec, frozen=True, kw_only=True, tag_field="kind"):
    """How unequal requests are: the law of a request's demand relative to the mean request."""

    def table(self) -> np.ndarray:
        """Quantile table with mean 1, of shape (2 * TABLE_CELLS,)."""
        return np.ones(2 * TABLE_CELLS)


class Constant(Demand, frozen=True, kw_only=True, tag="constant"):
    """All requests are alike."""


class LogNormal(Demand, frozen=True, kw_only=True, tag="log-normal"):
    """Log-normal demand with coefficient of variation `cv`."""

    cv: Annotated[float, Meta(ge=0, le=5)]

    def table(self) -> np.ndarray:
        return log_normal_table(self.cv)


class Exponential(Demand, frozen=True, kw_only=True, tag="exponential"):
    """Exponential demand, the M of queueing theory."""

    def table(self) -> np.ndarray:
        return quantile_table(lambda p: -math.log1p(-p))


RequestDemand = Constant | LogNormal | Exponential


class Idling(Spec, frozen=True, kw_only=True):
    """What a batch takes longer on a replica that has been idle: its caches are cold, its processor asleep.

    `extra_ms` times how cold the replica is when the batch starts, from 0 to 1. While it is idle, what it lacks to 1
    falls by a factor of e in `cooling_ms`; while it works, how cold it is falls so in `warming_ms`. It starts cold.
    With several batches in flight, each of them has a warmth of its own.
    """

    extra_ms: NonNegative
    cooling_ms: Positive
    warming_ms: Positive

    @property
    def seconds(self) -> tuple[float, float, float]:
        """The three, in seconds."""
        return self.extra_ms / 1e3, self.cooling_ms / 1e3, self.warming_ms / 1e3


class Stalls(Spec, frozen=True, kw_only=True):
    """A replica stands still now and then: its machine is shared, its garbage collected.

    Stalls begin at random, `per_s` a second in the mean, also while a replica is idle, and last `mean_ms` in the mean
    (exponential). A batch comes upon at most one of them: one that still lasts when it starts, or that begins while it
    is served. They are few: `per_s` times `mean_ms` is at most a fifth of the time.
    """

    per_s: NonNegative
    mean_ms: Positive

    def __post_init__(self) -> None:
        share = self.per_s * self.mean_ms / 1e3
        if share > 0.2:
            raise SpecError(f"per_s times mean_ms is {100 * share:.3g} % of the time; valid: at most 20 %")


class Law(Spec, frozen=True, kw_only=True, tag_field="kind"):
    """Time to serve one batch of `n` requests whose relative demands are `x_1..x_n` (mean 1).

    `(fixed[n] + variable[n] * mean(x) + idle) * noise`, where `noise` has mean 1 and coefficient of variation
    `noise_cv` (log-normal through a quantile table, which gives it a positive minimum). `idle` (None: 0) is what a
    replica takes longer that has been idle. A batch that comes upon a stall waits for its end, too (`stalls`).
    """

    noise_cv: Annotated[float, Meta(ge=0, le=3)] = 0.0
    idle: Idling | None = None
    stalls: Stalls | None = None

    def batch_times_s(self, max_batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns `fixed` and `variable` in seconds, each of shape (max_batch + 1,); index 0 is unused."""
        raise TypeError(f"{type(self).__name__} is an abstract law")


class Affine(Law, frozen=True, kw_only=True, tag="affine"):
    """`base_ms` for a batch, and `per_item_ms` times the demand of each of its requests."""

    base_ms: NonNegative
    per_item_ms: NonNegative

    def __post_init__(self) -> None:
        if self.base_ms + self.per_item_ms <= 0:
            raise SpecError("base_ms and per_item_ms are both 0; at least one must be positive")

    def batch_times_s(self, max_batch: int) -> tuple[np.ndarray, np.ndarray]:
        n = np.arange(max_batch + 1)
        return np.full(max_batch + 1, self.base_ms / 1e3), n * self.per_item_ms / 1e3


class Table(Law, frozen=True, kw_only=True, tag="table"):
    """Measured batch times: `batch_ms[n - 1]` for a batch of n requests of mean demand 1."""

    batch_ms: Annotated[tuple[Positive, ...], Meta(min_length=1)]

    def batch_times_s(self, max_batch: int) -> tuple[np.ndarray, np.ndarray]:
        if len(self.batch_ms) < max_batch:
            raise SpecError(
                f"batch_ms has {len(self.batch_ms)} entries, but max_batch is {max_batch}; "
                f"give one entry for every batch size from 1 to {max_batch}"
            )
        times = np.zeros(max_batch + 1)
        times[1:] = np.asarray(self.batch_ms[:max_batch]) / 1e3
        return np.zeros(max_batch + 1), times


Coefficient = Annotated[float, Meta(ge=0, le=1e4)]


class IterationLaw(Law, frozen=True, kw_only=True, tag="iteration"):
    """Seconds of one iteration (forward pass) of an LLM replica; the five terms of Vidur-like simulators, and a sixth.

    `base_s + prefill_s p + sequence_s d + context_s k + square_s s + cross_s x`, from left to right in double
    precision: `p` prefill tokens in the batch, `d` sequences that decode, `k` tokens that all members have in the KV
    cache already, `s` the sum of the squares of the prefill chunks, `x` that of every chunk times the tokens that its
    sequence has in the cache already: the attention of a chunk to what came before it, which the five terms leave out
    (`experiments/fidelity/h100`). `decode` (None: the same) is the law of iterations without a
    prefill. `kv_blocks` (None: as the server says) are the KV blocks of a replica on this pool's GPUs.
    """

    base_s: Coefficient
    prefill_s: Coefficient
    sequence_s: Coefficient
    context_s: Coefficient
    square_s: Coefficient = 0.0
    cross_s: Coefficient = 0.0
    decode: IterationLaw | None = None
    kv_blocks: Annotated[int, Meta(ge=2, le=100_000_000)] | None = None

    def __post_init__(self) -> None:
        if self.base_s + self.sequence_s <= 0:
            raise SpecError("base_s and sequence_s are both 0: a decode would take no time; give one of them")
        for given in ("noise_cv", "idle", "stalls"):
            if getattr(self, given):
                raise SpecError(f"{given} is given, but the time of an iteration has none; leave it out")

    def batch_times_s(self, max_batch: int) -> tuple[np.ndarray, np.ndarray]:
        raise SpecError("an iteration law has no batch times by itself; a service has, of its mean request")

    @property
    def vector(self) -> tuple[float, ...]:
        return self.base_s, self.prefill_s, self.sequence_s, self.context_s, self.square_s, self.cross_s

    def seconds(
        self, prefill: float, sequences: float, context: float, square: float, cross: float = 0.0
    ) -> float:
        return (
            self.base_s
            + self.prefill_s * prefill
            + self.sequence_s * sequences
            + self.context_s * context
            + self.square_s * square
            + self.cross_s * cross
        )


class Profiled(IterationLaw, frozen=True, kw_only=True, tag="profile"):
    """The iteration law of a profile that comes with the package (`world.llm.PROFILES`), by name."""

    name: str
    base_s: Coefficient = 0.0
    prefill_s: Coefficient = 0.0
    sequence_s: Coefficient = 0.0
    context_s: Coefficient = 0.0

    def __post_init__(self) -> None:
        from pilotage.world.llm import shipped_profile  # which is made of laws itself

        law = shipped_profile(self.name).law
        for name in ("base_s", "prefill_s", "sequence_s", "context_s", "square_s", "cross_s", "decode"):
            msgspec.structs.force_setattr(self, name, getattr(law, name))
        IterationLaw.__post_init__(self)


LatencyLaw = Affine | Table | IterationLaw | Profiled


class Variant(Spec, frozen=True, kw_only=True):
    """One build of the model: its accuracy, what it needs, and its latency law on each pool it can run on.

    A replica on a node that has not carried this variant yet first pulls the image for `image_pull_s`
    (log-normal, coefficient of variation `image_pull_cv`), then loads the weights for `load_s` (log-normal,
    `load_cv`; or `load_quantiles_s`: measured load times at equal steps of probability from 0 to 1). Where
    it has run before, image and weights are cached: the load takes `warm_load_share` of its time.
    """

    name: Name
    latency: dict[Name, LatencyLaw]
    accuracy: Probability = 1.0
    resources: Resources | None = None
    image_pull_s: NonNegative = 0.0
    image_pull_cv: NonNegative = 0.0
    load_s: NonNegative = 0.0
    load_cv: NonNegative = 0.0
    load_quantiles_s: tuple[NonNegative, ...] | None = None
    warm_load_share: Probability = 1.0

    def __post_init__(self) -> None:
        _check_quantiles(self, "load", "s")

    def load_law(self) -> tuple[float, np.ndarray]:
        """Mean cold load time in seconds, and the quantile table of its relative value."""
        return _measured_law(self.load_s, self.load_cv, self.load_quantiles_s, 1.0)

    @property
    def start_up_s(self) -> float:
        """Expected time from a node that is up to readiness, with nothing cached, in seconds."""
        return self.image_pull_s + self.load_law()[0]


class Router(Spec, frozen=True, kw_only=True):
    """Ray Serve's router (semantics and sources: `engine.router`); defaults as in Ray 2.60, times as measured on it.

    A replica takes at most `max_ongoing_requests`. While none has room, up to `max_tasks` tasks,
    `tasks_per_replica` for every replica, poll for the waiting requests: `tries_at_once` times more at once,
    then after `backoff_ms`, doubled up to `max_backoff_ms`, and up to `timer_ms` late. The router is one event
    loop: a request sent takes it `send_ms`, an answer `answer_ms`; a replica takes or refuses a request in
    `reject_ms`. The way between them takes `hop_ms` in the median (log-normal; `hop_spread`: standard deviation
    of the logarithm).
    """

    max_ongoing_requests: PositiveCount = 5
    tasks_per_replica: PositiveCount = 2
    max_tasks: Annotated[int, Meta(ge=1, le=64)] = 50
    tries_at_once: Count = 2
    backoff_ms: Positive = 25.0
    max_backoff_ms: Positive = 500.0
    timer_ms: NonNegative = 1.0
    send_ms: NonNegative = 1.0
    answer_ms: NonNegative = 0.5
    reject_ms: NonNegative = 1.5
    hop_ms: NonNegative = 1.5
    hop_spread: Annotated[float, Meta(ge=0, le=3)] = 1.0


class BatchServer(Spec, frozen=True, kw_only=True):
    """Dynamic batching and routing.

    `former`: *late-binding* (Triton, TF Serving) lets a free replica take what is waiting, up to `max_batch`,
    as soon as `max_batch` wait or the oldest has waited `batch_wait_ms`. *closed* (Ray Serve) closes a batch
    at `max_batch` requests or `batch_wait_ms` after its first, whether or not a replica is free; closed
    batches wait in order and are never topped up.

    `routing`: *central* keeps one queue for all replicas; *round-robin*, *least-outstanding* and
    *power-of-two* bind a request to a replica on arrival, for good. Without a ready replica requests wait at
    the door. *ray-serve* is Ray Serve's `router`, with its limit on what a replica has in hand.
    `queue_limit` bounds the requests waiting in each queue, or in the router (a request beyond it is
    rejected); `request_timeout_s` bounds the time until service starts; `patience_s` is the mean of the
    exponential time after which a client leaves. A request that has timed out or whose client has left keeps
    its place until a batch former reaches it, or the sweep at a control tick: servers learn of it no earlier.
    `batches_in_flight` is the number of batches one replica executes at the same time. `overhead_ms` is the
    mean time that a request spends outside the server (client, proxy, serialisation; log-normal, `overhead_cv`;
    or `overhead_quantiles_ms` at equal steps of probability from 0 to 1); it is added to its latency.
    """

    max_batch: Annotated[int, Meta(ge=1, le=1024)] = 1
    batch_wait_ms: NonNegative = 0.0
    former: Literal["late-binding", "closed"] = "late-binding"
    routing: Literal["central", "round-robin", "least-outstanding", "power-of-two", "ray-serve"] = "central"
    router: Router | None = None
    batches_in_flight: Annotated[int, Meta(ge=1, le=64)] = 1
    queue_limit: PositiveCount | None = None
    request_timeout_s: Positive | None = None
    patience_s: Positive | None = None
    overhead_ms: NonNegative = 0.0
    overhead_cv: NonNegative = 0.0
    overhead_quantiles_ms: tuple[NonNegative, ...] | None = None

    def __post_init__(self) -> None:
        if self.router is not None and self.routing != "ray-serve":
            raise SpecError(f"router is given, but routing is {self.routing!r}; it belongs to 'ray-serve'")
        _check_quantiles(self, "overhead", "ms")

    def overhead_law(self) -> tuple[float, np.ndarray]:
        """Mean time of a request outside the server in seconds, and the quantile table of its relative value."""
        return _measured_law(self.overhead_ms / 1e3, self.overhead_cv, self.overhead_quantiles_ms, 1e-3)
