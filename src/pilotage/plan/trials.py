"""What the simulator answers to one deployment of one model: dollars, latency, misses, on the same traffic."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np
from scipy.stats import t as student

from pilotage.control.guard import Guard
from pilotage.control.hpa import Hpa
from pilotage.control.kpa import Kpa
from pilotage.control.policy import Policy, Situation
from pilotage.control.queueing import staffing_for_wait
from pilotage.control.ray_serve import RayServe
from pilotage.control.scaling import Schedule
from pilotage.engine.cluster import World, recorded
from pilotage.engine.layout import COUNTS
from pilotage.engine.run import Run, simulate
from pilotage.live.manifests import Autoscaling, Platform
from pilotage.metrics import BUCKET_MIDPOINTS_S, quantiles_s
from pilotage.plan.requirements import Model, Requirements
from pilotage.scenario import Scenario
from pilotage.world.pools import Pool
from pilotage.world.servers import Variant
from pilotage.world.services import Service
from pilotage.world.spec import SpecError

RUNS: Final = 5
UTILIZATIONS: Final = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # what an autoscaler aims at, cheapest first
TICK_S: Final = 15.0
MANY: Final = 20_000  # requests in a tick of all runs, from which on a second thread is worth its start
CONFIDENCE: Final = 0.95  # one-sided, that the objective is met


class Configuration(NamedTuple):
    """How every replica runs."""

    pool: str
    variant: str
    max_batch: int
    batch_wait_ms: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """A deployment and what came of it.

    `size` is a number of replicas, or the utilisation that an autoscaler aims at. `missed` is the share of requests
    that were late or dropped, `usd_per_hour` the nodes' bill, of each run: shapes (runs,).
    """

    configuration: Configuration
    size: float
    usd: np.ndarray
    missed: np.ndarray
    histogram: np.ndarray
    dropped_share: float
    replicas: float
    concurrency: float  # requests in a replica, time-averaged
    accuracy: float
    node_hours: float

    @property
    def usd_per_hour(self) -> float:
        return float(self.usd.mean())

    @property
    def p99_ms(self) -> float:
        return 1e3 * float(quantiles_s(self.histogram, (0.99,))[0])

    def missed_at(self, slo_s: float) -> np.ndarray:
        """The share of requests of each run that would be late at another objective (by the histogram: to 0.8 %)."""
        late = self.histogram[slo_s < BUCKET_MIDPOINTS_S].sum() / max(1, self.histogram.sum())
        # runs differ about as they do at the objective that was simulated
        spread = self.missed - self.missed.mean()
        shifted: np.ndarray = late * (1 - self.dropped_share) + self.dropped_share + spread
        return shifted


def surely_below(missed: np.ndarray, limit: float) -> bool:
    """Whether the mean of one value per run is below a limit with 95 % confidence (Student, one-sided)."""
    n = len(missed)
    margin = student.ppf(CONFIDENCE, n - 1) * missed.std(ddof=1) / math.sqrt(n) if n > 1 else 0.0
    return float(missed.mean() + margin) <= limit


class Trials:
    """The simulator's answers about one model under one load. They are remembered; all meet the same requests."""

    def __init__(
        self,
        asked: Requirements,
        model: Model,
        *,
        platform: Platform,
        seed: int = 0,
        runs: int = RUNS,
        longer: float = 1.0,
    ) -> None:
        self.asked, self.model, self.platform, self.seed = asked, model, platform, seed
        self.horizon_s = math.ceil(asked.horizon_s(model) * longer / TICK_S) * TICK_S
        self.slo_s = (model.slo_ms or math.inf) / 1e3
        self.runs = runs
        self.known: dict[tuple[Configuration, float], Outcome] = {}
        self._variants = {variant.name: variant for variant in model.variants}

    # --- what can be said without simulating -----------------------------------------------------------
    def configurations(self) -> list[Configuration]:
        """Everything that could run: pools with a law, on whose nodes the variant fits, batches the law knows."""
        found = []
        for pool in self.asked.allowed(self.model):
            for variant in self.model.variants:
                if pool not in variant.latency or self._copies(variant, self.asked.pool_by_name[pool]) < 1:
                    continue
                for batch in self.model.batches:
                    try:
                        variant.latency[pool].batch_times_s(batch)
                    except SpecError:
                        continue
                    waits = self.model.batch_waits_ms if batch > 1 else self.model.batch_waits_ms[:1]
                    found += [Configuration(pool, variant.name, batch, wait) for wait in waits]
        return found

    def _copies(self, variant: Variant, pool: Pool) -> int:
        if pool.node is None or variant.resources is None:
            return 1
        copies = variant.resources.copies_on(pool.node)
        return copies if self.model.max_per_node is None else min(copies, self.model.max_per_node)

    def copies(self, configuration: Configuration) -> int:
        """Replicas that one node takes."""
        return self._copies(self.variant(configuration), self.pool(configuration))

    def variant(self, configuration: Configuration) -> Variant:
        return self._variants[configuration.variant]

    def pool(self, configuration: Configuration) -> Pool:
        return self.asked.pool_by_name[configuration.pool]

    def batch_times_s(self, configuration: Configuration) -> np.ndarray:
        """Mean time of a batch of n requests, n from 1 to the limit; shape (max_batch,)."""
        law = self.variant(configuration).latency[configuration.pool]
        fixed, variable = law.batch_times_s(configuration.max_batch)
        times: np.ndarray = (fixed + variable)[1:]
        return times

    def capacity_rps(self, configuration: Configuration) -> float:
        """Requests per second that one replica serves at the best batch size."""
        times = self.batch_times_s(configuration)
        sizes = np.arange(1, len(times) + 1)
        return float(np.max(sizes / times)) * self.model.server.batches_in_flight

    @cached_property
    def worlds(self) -> list[World]:
        """One world per run, with its traffic drawn once and for all."""
        scenario = self.scenario(self.configurations()[0], self.model.min_replicas)
        return recorded(scenario, [World(self.seed + k) for k in range(self.runs)])

    @cached_property
    def rate_rps(self) -> float:
        """Mean rate over the runs."""
        return float(np.mean([len(self._times(world)) for world in self.worlds])) / self.horizon_s

    @cached_property
    def peak_rps(self) -> float:
        """Rate of the busiest minute over the runs."""
        minutes = [
            np.bincount(((t - t[0]) // 60).astype(int)) if len(t) else np.zeros(1)
            for t in map(self._times, self.worlds)
        ]
        return max(float(counts.max()) for counts in minutes) / 60

    def _times(self, world: World) -> np.ndarray:
        start_s = self.asked.start_h * 3600
        assert world.traffic is not None
        source = world.traffic[0].begin(None, start_s, start_s + self.horizon_s, None)  # type: ignore[arg-type]
        return source.until(start_s + self.horizon_s)

    def fewest(self, configuration: Configuration) -> int:
        """The least mean number of replicas that could serve the share of requests that must be served."""
        busy = self.model.attainment * self.rate_rps * self.horizon_s
        most = self.capacity_rps(configuration) * (self.horizon_s + self.slo_s)
        return max(self.model.min_replicas, math.ceil(busy / most - 1e-9))

    def floor_usd(self, configuration: Configuration, shared: bool = False) -> float:
        """A lower bound on dollars per hour: capacity at the best batch size, at no wait, all the time."""
        if self.model.steady:
            return self.fixed_usd(configuration, self.fewest(configuration), shared)
        busy = self.model.attainment * self.rate_rps * self.horizon_s
        mean = busy / (self.capacity_rps(configuration) * (self.horizon_s + self.slo_s))
        least = self.fixed_usd(configuration, self.model.min_replicas, shared)
        return max(least, mean * self.pool(configuration).price_usd_per_hour / self.copies(configuration))

    def fixed_usd(self, configuration: Configuration, replicas: int, shared: bool = False) -> float:
        """Dollars per hour of so many replicas: of whole nodes, or of their share of nodes that others use, too."""
        pool, nodes = self.pool(configuration), replicas / self.copies(configuration)
        if shared and pool.node and (needs := self.variant(configuration).resources):
            both = zip(needs.vector, pool.node.vector, strict=True)
            nodes = replicas * max(need / has for need, has in both if has > 0)
        return pool.price_usd_per_hour * (nodes if shared else math.ceil(nodes - 1e-9))

    def obstacle(self, configuration: Configuration) -> str:
        """Why no number of replicas could meet the objective; empty if some might."""
        variant, pool = self.variant(configuration), self.pool(configuration)
        if variant.accuracy < self.model.min_accuracy:
            return f"accuracy {variant.accuracy:g} is below the {self.model.min_accuracy:g} asked"
        law = variant.latency[configuration.pool]
        alike = (
            self.model.demand.table().std() == 0
        )  # else the shortest requests may take much less than the mean
        spread = math.sqrt(math.log1p(law.noise_cv**2)) if alike else 0.0
        slow = math.exp(spread * NormalDist().inv_cdf(self.model.attainment) - spread**2 / 2)
        alone_s = float(self.batch_times_s(configuration).min())
        if (left_s := self.slo_s - pool.network_ms / 1e3) < alone_s * slow * (1.0 if alike else 0.3):
            return f"one request alone takes {1e3 * alone_s * slow:.3g} ms, and there are {1e3 * left_s:.3g} ms for it"
        if self.fewest(configuration) > self.most(configuration):
            return (
                f"{self.fewest(configuration)} replicas would be needed, {self.most(configuration)} are allowed "
                f"(max_replicas {self.model.max_replicas}, nodes {pool.max_nodes} of {self.copies(configuration)})"
            )
        return ""

    def most(self, configuration: Configuration) -> int:
        """The largest number of replicas that is allowed and has room."""
        room = self.pool(configuration).max_nodes * self.copies(configuration)
        return min(self.model.max_replicas, room)

    def guess(self, configuration: Configuration) -> int:
        """Replicas by the wait's quantile in M/M/c, for batches of the size that the objective leaves time for."""
        times = self.batch_times_s(configuration)
        left_s = self.slo_s - self.pool(configuration).network_ms / 1e3
        size = int(np.searchsorted(times, left_s / 2, side="right")) or 1
        batch_s = float(times[size - 1])
        servers = staffing_for_wait(
            self.rate_rps * batch_s / size, self.model.attainment, max(0.0, left_s / batch_s - 1)
        )
        replicas = math.ceil(servers / self.model.server.batches_in_flight)
        return min(max(replicas, self.fewest(configuration)), self.most(configuration))

    # --- simulation ------------------------------------------------------------------------------------
    def sizes(self, configuration: Configuration) -> list[float]:
        """What may be chosen beside the configuration, from cheap to dear."""
        if self.model.steady:
            return list(map(float, range(self.fewest(configuration), self.most(configuration) + 1)))
        return list(UTILIZATIONS)

    def service(self, configuration: Configuration, initial: int) -> Service:
        variant = self.variant(configuration)
        law = variant.latency[configuration.pool]
        model = self.model
        assert model.traffic is not None
        return Service(
            name=model.name,
            traffic=model.traffic,
            slo_ms=model.slo_ms or 1e9,
            pools=(configuration.pool,),
            variants=(variant.replace(latency={configuration.pool: law}),),
            server=model.server.replace(
                max_batch=configuration.max_batch, batch_wait_ms=configuration.batch_wait_ms
            ),
            demand=model.demand,
            min_replicas=model.min_replicas,
            max_replicas=self.most(configuration),
            initial_replicas=initial,
            max_per_node=model.max_per_node,
        )

    def scenario(self, configuration: Configuration, initial: int) -> Scenario:
        return Scenario(
            title=self.asked.title or self.model.name,
            pools=(self.pool(configuration),),
            services=(self.service(configuration, initial),),
            tick_s=TICK_S,
            horizon_h=self.horizon_s / 3600,
            start_h=self.asked.start_h,
        )

    def autoscaling(self, configuration: Configuration, utilization: float) -> Autoscaling:
        """Settings that keep replicas at that share of their capacity."""
        situation = Situation(
            self.service(configuration, self.model.min_replicas), self.asked.pool_by_name, TICK_S, np.zeros(0)
        )
        most = math.ceil(2 * self.peak_rps / self.capacity_rps(configuration)) + 1
        return Autoscaling(
            platform=self.platform,
            min_replicas=self.model.min_replicas,
            max_replicas=max(min(most, self.most(configuration)), self.model.min_replicas),
            target_concurrency=max(0.05, round(situation.concurrency_at(utilization), 3)),
        )

    def outcome(self, configuration: Configuration, size: float) -> Outcome:
        """What comes of a deployment of that size: so many replicas, or an autoscaler that aims at a utilisation."""
        key = (configuration, size)
        if key not in self.known:
            if self.model.steady:
                policy: Policy = Schedule(targets=(int(size),))
                initial = int(size)
            else:
                settings = self.autoscaling(configuration, size)
                policy, initial = policy_of(settings), self.start(configuration, settings)
            self.known[key] = self.run(configuration, size, policy, initial)
        return self.known[key]

    def start(self, configuration: Configuration, settings: Autoscaling) -> int:
        """Replicas at the start of a run: what the mean rate takes, within the settings' bounds."""
        need = math.ceil(self.rate_rps / (0.7 * self.capacity_rps(configuration)))
        return min(max(need, settings.min_replicas), settings.max_replicas)

    def run(self, configuration: Configuration, size: float, policy: Policy, initial: int) -> Outcome:
        """Simulates a deployment under a policy."""
        per_tick = self.rate_rps * TICK_S * len(self.worlds)
        runs = simulate(
            self.scenario(configuration, initial),
            [policy] * len(self.worlds),
            self.worlds,
            guard=Guard(),
            threads=min(2, os.cpu_count() or 1) if per_tick > MANY else 1,
        )
        return digest(runs, 0, configuration, size, self.variant(configuration).accuracy, self.horizon_s)


def digest(
    runs: list[Run],
    service: int,
    configuration: Configuration,
    size: float,
    accuracy: float,
    horizon_s: float,
) -> Outcome:
    """The outcome of one service from its runs."""
    totals = {name: np.array([float(run.totals[name][service]) for run in runs]) for name in COUNTS}
    dropped = (
        totals["rejected"] + totals["timed_out"] + totals["abandoned"] + totals["lost"] + totals["overdue"]
    )
    asked = np.maximum(totals["served"] + dropped, 1.0)
    return Outcome(
        configuration=configuration,
        size=size,
        usd=totals["node_usd"] / (horizon_s / 3600),
        missed=(totals["late"] + dropped) / asked,
        histogram=sum(run.histogram[service] for run in runs),
        dropped_share=float(dropped.sum() / asked.sum()),
        replicas=float(totals["replica_s"].mean() / horizon_s),
        concurrency=float(totals["inside_s"].sum() / max(1e-9, totals["replica_s"].sum())),
        accuracy=accuracy,
        node_hours=float(totals["node_s"].sum() / 3600),
    )


def policy_of(settings: Autoscaling) -> Policy:
    """The autoscaler of a platform with those settings, as the simulator runs it."""
    low, high, target = settings.min_replicas, settings.max_replicas, settings.target_concurrency
    if settings.platform == "kserve":
        whole = max(1, math.ceil(target))  # see `live.manifests`
        return Kpa(target=whole, target_utilization=target / whole, min_replicas=low, max_replicas=high)
    if settings.platform == "ray-serve":
        return RayServe(target_ongoing_requests=target, min_replicas=low, max_replicas=high)
    return Hpa(metric="concurrency", target_average=target, min_replicas=low, max_replicas=high)
