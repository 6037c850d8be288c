"""From a fleet's history to the numbers of a scenario, each with an interval: service law, start-up, traffic.

The law is that of busy time: a step in which `b` batches of `r` requests in all were started was busy for
`base * b + per_item * r` seconds, whatever the sizes of the batches were; least squares over steps, and a bootstrap
over blocks of steps. What the residuals are beyond that is the noise of batches. Nothing here simulates; whether the
numbers explain the latencies that were recorded is `pilotage.rehearse`'s question.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
from msgspec import Meta

from pilotage.live.generations import Estimate, Generations, generations
from pilotage.live.history import Prometheus, Recording, read
from pilotage.live.mlflow_server import MlflowServer
from pilotage.live.prices import PriceOf
from pilotage.live.registries import Folder
from pilotage.world.lifecycle import Lifecycle
from pilotage.world.pools import Pool
from pilotage.world.servers import BatchServer, Constant, RequestDemand
from pilotage.world.services import Economics
from pilotage.world.spec import (
    Count,
    Name,
    Positive,
    PositiveCount,
    Probability,
    Spec,
    SpecError,
    closest,
    decode,
    read_toml,
)

BLOCKS: Final = 40
RESAMPLES: Final = 300
DAY_S: Final = 86400.0
COARSEST: Final = 1.6  # ratio of the edges of the bucket that holds the objective


class Known(Spec, frozen=True, kw_only=True):
    """A service of the fleet: what metrics do not tell of it.

    Without `accuracy` it is the registry's, of `metric` of the version of `model` (None: of the service's name) that is
    live, or 1. A `lifecycle` is what is assumed of drift and retrainings; what the registry knows of versions takes its
    place.
    """

    name: Name
    slo_ms: Positive
    pool: Name
    server: BatchServer = BatchServer()
    demand: RequestDemand = Constant()
    accuracy: Probability | None = None
    economics: Economics = Economics()
    lifecycle: Lifecycle | None = None
    model: str | None = None
    metric: str = "accuracy"
    min_replicas: Count = 1
    max_replicas: PositiveCount = 100


class Fleet(Spec, frozen=True, kw_only=True):
    """A file of `pilotage calibrate`: where the history is, the pools, the services.

    Where `prices` names a pool, its price is looked up; where not, it is the `price_usd_per_hour` that the file says.
    `registry` is where the models' versions are.
    """

    title: str = "calibrated fleet"
    prometheus: Prometheus
    pools: Annotated[tuple[Pool, ...], Meta(min_length=1)]
    services: Annotated[tuple[Known, ...], Meta(min_length=1)]
    registry: MlflowServer | Folder | None = None
    prices: dict[Name, PriceOf] = {}  # noqa: RUF012  (msgspec copies it)
    policies: tuple[str, ...] = ("hpa", "predictive")

    def __post_init__(self) -> None:
        pools = [pool.name for pool in self.pools]
        for service in self.services:
            if service.pool not in pools:
                raise SpecError(
                    f"service {service.name!r} runs on pool {service.pool!r}; {closest(service.pool, pools)}"
                )
        for name in self.prices:
            if name not in pools:
                raise SpecError(f"prices of pool {name!r}, which does not exist; {closest(name, pools)}")

    @staticmethod
    def load(path: Path) -> Fleet:
        return decode(read_toml(path, "a file of a fleet"), Fleet, str(path))

    def known(self, service: Known) -> tuple[Known, Generations | None]:
        """A service with what the registry knows of its model; RegistryError where that fails."""
        if self.registry is None:
            return service, None
        found = generations(
            self.registry, service.model or service.name, service.metric, self.prometheus.start_s, self.prometheus.end_s
        )  # fmt: skip
        accuracy, life = service.accuracy, service.lifecycle
        if accuracy is None and found.accuracy is not None:
            accuracy = found.accuracy[0]
        return service.replace(accuracy=accuracy, lifecycle=life and found.fitted(life)), found

    def priced(self, folder: Path) -> tuple[Pool, ...]:
        """The pools, with prices (and shapes of nodes, where the pool has none) from tables below `folder`."""
        out = []
        for pool in self.pools:
            if pool.name in self.prices:
                usd, node = self.prices[pool.name].look_up(folder)
                pool = pool.replace(price_usd_per_hour=usd, node=pool.node or node)
            out.append(pool)
        return tuple(out)


@dataclass(frozen=True, slots=True)
class Fit:
    """What was fitted to a service's history, each as (value, low, high) with 95 % bootstrap intervals.

    `drift` is how far the busy time of a tenth of the history is from the law's at most, as a share; `unexplained` the
    share of executed requests that no counter of arrivals knows.
    """

    rate_rps: Estimate
    base_ms: Estimate
    per_item_ms: Estimate
    noise_cv: float
    start_up_s: Estimate
    start_up_cv: float
    drift: float
    unexplained: float
    draws: np.ndarray  # (RESAMPLES, 2): base and per item, in ms
    notes: tuple[str, ...]


def read_and_fit(source: Prometheus, service: str, slo_s: float) -> tuple[Recording, Fit]:
    """A service's history and its numbers; raises what `read` and `fit` do."""
    history = read(source, service)
    return history, fit(history, slo_s)


def fit(history: Recording, slo_s: float, seed: int = 0) -> Fit:
    """The numbers of one service. SpecError where the history has no traffic or no batches."""
    if history.arrived.sum() < 100 or history.batches.sum() < 100:
        raise SpecError(
            f"service {history.service!r}: {history.arrived.sum():.0f} requests and {history.batches.sum():.0f} "
            "batches in the history; valid: at least 100 of each"
        )
    rng = np.random.default_rng(seed)
    notes = []
    span_s = history.step_s * len(history.arrived)
    if span_s < DAY_S:
        notes.append(
            f"history of {span_s / 3600:.3g} h is shorter than a day: it says nothing of other hours"
        )
    if history.missing_share > 0.01:
        notes.append(
            f"{100 * history.missing_share:.2g} % of the points have no replica count: the last known was kept"
        )
    blocks = np.array_split(np.arange(len(history.arrived)), min(BLOCKS, len(history.arrived)))
    arrived = np.array([history.arrived[block].sum() for block in blocks])
    seconds = np.array([history.step_s * len(block) for block in blocks])
    sums = np.array([_sums(history.batches[b], history.batched[b], history.busy_s[b]) for b in blocks])
    picked = rng.integers(0, len(blocks), (RESAMPLES, len(blocks)))
    value, draws = _laws(sums.sum(axis=0)), _laws(sums[picked].sum(axis=1))
    rates = arrived[picked].sum(axis=1) / seconds[picked].sum(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    expected = 1e-3 * (value[0] * history.batches + value[1] * history.batched)
    tenths = np.array_split(np.arange(len(expected)), min(10, len(expected)))
    ratios = [history.busy_s[t].sum() / expected[t].sum() for t in tenths if history.batches[t].sum() >= 50]
    if abs(np.corrcoef(history.batches, history.batched)[0, 1]) > 0.9999:
        notes.append(
            "batches hardly differ in size: base and per-item time are not told apart, only their sum is known"
        )
    start = history.start_up_mean_s
    margin = 1.96 * start * history.start_up_cv / np.sqrt(max(history.start_ups, 1))
    if not history.start_ups:
        notes.append(
            "no start-up was recorded (replica_startup_seconds): start-ups are taken to last no time"
        )
        start = margin = 0.0
    k = int(np.searchsorted(history.edges_s, slo_s))
    if k == 0 or k >= len(history.edges_s) or history.edges_s[k] / history.edges_s[k - 1] > COARSEST:
        notes.append(
            f"the buckets of latency_seconds are too coarse at the objective of {slo_s:g} s to judge a fit there; put "
            "edges on both sides of it, no further apart than by a factor of 1.6"
        )
    return Fit(
        rate_rps=(
            float(arrived.sum()) / span_s,
            float(np.quantile(rates, 0.025)),
            float(np.quantile(rates, 0.975)),
        ),
        base_ms=(float(value[0]), float(low[0]), float(high[0])),
        per_item_ms=(float(value[1]), float(low[1]), float(high[1])),
        noise_cv=_noise(history, expected),
        start_up_s=(start, start - margin, start + margin),
        start_up_cv=history.start_up_cv if history.start_ups else 0.0,
        drift=float(np.max(np.abs(np.array(ratios) - 1))) if ratios else 0.0,
        unexplained=float(history.batched.sum() / arrived.sum() - 1),
        draws=draws,
        notes=tuple(notes),
    )


def _sums(batches: np.ndarray, batched: np.ndarray, busy_s: np.ndarray) -> list[float]:
    """What `_laws` needs of some steps, weighted by 1 / batches, as their noise is; the whole is the sum of parts."""
    b, r, y = (x[batches > 0] for x in (batches, batched, busy_s))
    return [b.sum(), r.sum(), (r * r / b).sum(), y.sum(), (r * y / b).sum()]


def _laws(sums: np.ndarray) -> np.ndarray:
    """Base and per-item time in ms by least squares of busy time, neither negative; shapes (..., 5) and (..., 2)."""
    bb, br, rr, by, ry = np.moveaxis(np.asarray(sums, float), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        both = np.stack([rr * by - br * ry, bb * ry - br * by], axis=-1) / (bb * rr - br * br)[..., None]
        one = np.stack([by / bb, ry / rr], axis=-1)
        inside = np.isfinite(both).all(axis=-1) & (both >= 0).all(axis=-1)
    better = np.stack([by * one[..., 0] >= ry * one[..., 1]] * 2, axis=-1)
    better[..., 1] = ~better[..., 0]
    return 1e3 * np.where(inside[..., None], both, np.where(better, one, 0.0))


def _noise(history: Recording, expected_s: np.ndarray) -> float:
    """Coefficient of variation of a batch's time, from residuals: of `b` batches they have the variance of b. The time
    of batches that are cut by a step's ends is noise, too, which successive residuals give back: half their difference
    with the opposite sign is taken out."""
    some = history.batches > 0
    residual = (history.busy_s - expected_s)[some]
    each = expected_s[some] / history.batches[some]
    variance = float(np.mean(residual**2) + 2 * np.mean(residual[1:] * residual[:-1]))
    scale = float(np.mean(history.batches[some] * each**2))
    return float(np.sqrt(max(variance, 0.0) / scale)) if scale else 0.0
