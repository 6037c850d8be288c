"""A simulated cluster: many worlds of one scenario, advanced together, each with the face of a live one."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pilotage.control.policy import FEATURES, Decision, Observation, Situation, measure
from pilotage.engine import kernel
from pilotage.engine.layout import (
    ANY_POOL,
    EVENT,
    FORMERS,
    ORDER,
    PARAMETERS,
    POOL,
    REPLICA,
    REQUEST,
    ROUTINGS,
    ROW,
    SLOT,
    TICK,
)
from pilotage.metrics import BUCKETS
from pilotage.scenario import Scenario
from pilotage.world.arrivals import Arrivals, Traffic
from pilotage.world.servers import TABLE_CELLS, log_normal_table
from pilotage.world.services import Service

_UNLIMITED = np.iinfo(np.int64).max
_STREAMS = ("demand", "noise", "patience", "route", "start")
_FRESH = np.zeros(len(FEATURES))
_FRESH.setflags(write=False)


class World(NamedTuple):
    """One run: its seed, where on the traffic's clock it starts (None: where the scenario says), and traffic
    that takes the place of the scenario's, one source per service (None: the scenario's).
    """

    seed: int
    start_s: float | None = None
    traffic: tuple[Traffic, ...] | None = None


def stream(seed: int, name: str) -> np.random.Generator:
    """The generator of a named random stream: the same draws whatever other streams exist."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, name)))


def _sequence(seed: int, name: str) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()),))


class Cluster:
    """`len(worlds)` independent worlds of one scenario, in structured arrays of one row per world and service.

    The batch face is `advance(orders)`: one control tick of all worlds in one compiled call. The face of a
    live cluster is `read()`, `apply(decisions)`, `wait()`, with the services of all worlds in a row. A world may
    be put back to the start of another run with `restart`; one that is not `active` stands still. With
    `threads` above 1 the worlds are shared out over cores.
    """

    def __init__(
        self, scenario: Scenario, worlds: Sequence[World], *, threads: int = 1, read_ahead_s: float = 600.0
    ) -> None:
        self.scenario = scenario
        self.worlds = list(worlds)
        self.threads = max(1, min(threads, len(self.worlds)))
        self._read_ahead_s = max(read_ahead_s, scenario.tick_s)
        w, s = len(self.worlds), len(scenario.services)
        self.shape = (w, s)
        self._build_static()
        self.rows = np.zeros(w * s, ROW)
        self.clock_s = np.zeros(w)
        self.active = np.ones(w, bool)
        self.used = np.zeros((w, len(scenario.pools)), np.int64)
        self.replicas = np.zeros(int(self.params["replica_hi"][-1]), REPLICA)
        self.slots = np.zeros(int(self.params["slot_hi"][-1]), SLOT)
        self.heap = np.zeros(int(self.params["event_hi"][-1]), EVENT)
        self.ready = np.zeros(len(self.replicas), np.int64)
        self.idle = np.zeros(len(self.slots), np.int64)
        self._request_capacity = np.full(w * s, 64)
        self._arrival_capacity = np.full(w * s, 64)
        self._reserve_requests()
        self._arrivals = np.zeros(0)
        self._reserve_arrivals()
        self.ticks = np.zeros((w, s), TICK)
        self.totals = np.zeros((w, s), TICK)
        self.histograms = np.zeros((w, s, BUCKETS), np.int64)
        self._blank = np.zeros(1, TICK)
        self._blank["latency_p95_s"] = np.nan
        self._scratch = np.zeros((self.threads, BUCKETS), np.int64)
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self._known_s = np.zeros(w)
        self._start_s = np.zeros(w)
        self._sources: dict[int, Arrivals] = {}
        self._history: list[np.ndarray] = [np.zeros(0)] * (w * s)
        self._decisions = self.no_orders()
        self.restart(range(w), self.worlds)

    # --- numbers from the scenario ---------------------------------------------------------------------
    def _build_static(self) -> None:
        scenario = self.scenario
        w, s = self.shape
        names = [pool.name for pool in scenario.pools]
        self.pools = np.zeros(len(names), POOL)
        for record, pool in zip(self.pools, scenario.pools, strict=True):
            record["usd_per_s"] = pool.price_usd_per_hour / 3600
            record["boot_s"] = pool.boot_s
            record["max_nodes"] = pool.max_nodes
            record["min_lifetime_s"] = pool.min_lifetime_s
            record["granularity_s"] = pool.billing_granularity_s
            record["minimum_s"] = pool.billing_minimum_s
            record["network_s"] = pool.network_ms / 1e3
        self.boots = np.array([log_normal_table(pool.boot_cv) for pool in scenario.pools])
        batch = max(service.server.max_batch for service in scenario.services)
        self.laws = np.zeros((s, len(names), 2, batch + 1))
        self.noises = np.ones((s, len(names), 2 * TABLE_CELLS))
        self.demands = np.array([service.demand.table() for service in scenario.services])
        self.loads = np.ones((s, 1 + 2 * TABLE_CELLS))
        self.allowed = np.full((s, max(len(service.pools) for service in scenario.services)), -1)
        one = np.zeros(s, PARAMETERS)
        for k, service in enumerate(scenario.services):
            variant, server = service.variants[0], service.server
            self.allowed[k, : len(service.pools)] = [names.index(name) for name in service.pools]
            for name in service.pools:
                law, p = variant.latency[name], names.index(name)
                self.laws[k, p, :, : server.max_batch + 1] = law.batch_times_s(server.max_batch)
                self.noises[k, p] = log_normal_table(law.noise_cv)
            self.loads[k] = np.r_[variant.load_s, log_normal_table(variant.load_cv)]
            one[k] = self._parameters(service, k)
        self.params = np.tile(one, w)
        for field, sizes in (
            ("replica", self.params["replica_hi"]),
            ("slot", self.params["slot_hi"]),
            ("event", self.params["event_hi"]),
        ):
            ends = np.cumsum(sizes)
            self.params[f"{field}_lo"] = np.r_[0, ends[:-1]]
            self.params[f"{field}_hi"] = ends

    def _parameters(self, service: Service, k: int) -> np.ndarray:
        """Parameters of one row; the three `_hi` fields hold sizes until they are laid out."""
        pools = self.scenario.pool_by_name
        server = service.server
        # replicas that drain keep their slot, so that a row may hold more than max_replicas for a while
        nodes = sum(pools[name].max_nodes for name in service.pools)
        replicas = min(nodes, 2 * service.max_replicas + 8)
        record = np.zeros((), PARAMETERS)
        record["slo_s"] = service.slo_s
        record["timeout_s"] = np.inf if server.request_timeout_s is None else server.request_timeout_s
        record["patience_s"] = np.inf if server.patience_s is None else server.patience_s
        record["abandoning"] = (
            -np.expm1(-record["timeout_s"] / record["patience_s"]) if server.patience_s else 0.0
        )
        record["batch_wait_s"] = server.batch_wait_ms / 1e3
        record["queue_limit"] = _UNLIMITED if server.queue_limit is None else server.queue_limit
        record["batch_limit"] = server.max_batch
        record["former"] = FORMERS[server.former]
        record["routing"] = ROUTINGS[server.routing]
        record["slots"] = server.batches_in_flight
        record["service"] = k
        record["replica_hi"] = replicas
        record["slot_hi"] = replicas * server.batches_in_flight
        record["event_hi"] = replicas * (server.batches_in_flight + 2) + 1
        record["error_share"] = 1 - service.variants[0].accuracy
        record["initial"] = min(service.initial_replicas, replicas)
        return record

    def seeds(self, world: int, service: int) -> dict[str, int]:
        """The 64-bit seeds of a row's counter-based streams, as `seed_demand` and so on."""
        name = self.scenario.services[service].name
        seed = self.worlds[world].seed
        return {
            f"seed_{s}": int(_sequence(seed, f"{name}/{s}").generate_state(1, np.uint64)[0]) for s in _STREAMS
        }

    # --- runs ------------------------------------------------------------------------------------------
    def restart(self, indices: Sequence[int] | range, worlds: Sequence[World]) -> None:
        """Puts the worlds at `indices` to the start of the runs `worlds`."""
        scenario = self.scenario
        services = self.shape[1]
        for w, world in zip(indices, worlds, strict=True):
            self.worlds[w] = world
            start_s = scenario.start_h * 3600 if world.start_s is None else world.start_s
            self._start_s[w] = start_s
            self.clock_s[w] = 0.0
            self._known_s[w] = 0.0
            self.ticks[w] = self._blank[0]
            self.totals[w] = np.zeros((), TICK)
            self.histograms[w] = 0
            for s in range(services):
                r = w * services + s
                for name, seed in self.seeds(w, s).items():
                    self.params[r][name] = seed
                begin_s = max(0.0, start_s - scenario.history_h * 3600)
                source = self._open(w, s, begin_s)
                bins = round((start_s - begin_s) / scenario.tick_s)
                edges = start_s + scenario.tick_s * (np.arange(bins + 1) - bins)
                past = source.until(start_s)
                self._history[r] = np.diff(np.searchsorted(past, edges)) / scenario.tick_s
                self._sources[r] = source
            kernel.begin(
                w, w + 1, self.rows, self.params, self.replicas, self.slots, self.ready, self.idle, self.used,
                self.pools, self.allowed,
            )  # fmt: skip
            mine = slice(w * services, (w + 1) * services)
            self.rows["arrival_lo"][mine] = self.rows["arrival_hi"][mine] = self._arrival_offset[mine]
            self._place_requests(mine)
            for field in ("ready", "pending", "max_batch"):  # what a monitor sees before the first tick
                self.ticks[field][w] = self.rows[field][mine]

    def _open(self, w: int, s: int, begin_s: float) -> Arrivals:
        """The traffic of one row from `begin_s` to the end of its run, on the traffic's clock."""
        scenario, world = self.scenario, self.worlds[w]
        service = scenario.services[s]
        source = service.traffic if world.traffic is None else world.traffic[s]
        return source.begin(
            lambda name: stream(world.seed, f"{service.name}/traffic/{name}"),
            begin_s,
            self._start_s[w] + scenario.ticks * scenario.tick_s,
            Path(scenario.data) if scenario.data else None,
        )

    def arrivals(self, w: int, s: int) -> np.ndarray:
        """All arrival times of one row's run, in seconds since its start."""
        start_s = self._start_s[w]
        source = self._open(w, s, max(0.0, start_s - self.scenario.history_h * 3600))
        source.until(start_s)
        return source.until(start_s + self.scenario.ticks * self.scenario.tick_s) - start_s

    @property
    def now_s(self) -> np.ndarray:
        """The time on the traffic's clock, per world, in seconds."""
        return self._start_s + self.clock_s

    def situation(self, world: int, service: int) -> Situation:
        """What a policy knows before the first tick of a run."""
        return Situation(
            service=self.scenario.services[service],
            pools=self.scenario.pool_by_name,
            tick_s=self.scenario.tick_s,
            history_rps=self._history[world * self.shape[1] + service],
        )

    def no_orders(self) -> np.ndarray:
        """Orders of shape (worlds, services) that change nothing."""
        orders = np.zeros(self.shape, ORDER)
        orders["pool"] = ANY_POOL
        return orders

    def advance(self, orders: np.ndarray) -> np.ndarray:
        """One control tick of every world. Takes orders and returns counters, both of shape (worlds, services)."""
        self._read_arrivals()
        until = self.clock_s + self.scenario.tick_s
        w, s = self.shape
        while (r := kernel.short_of_requests(0, w, self.rows, self._arrivals, until, s)) >= 0:
            lo, hi = self.rows["arrival_lo"][r], self.rows["arrival_hi"][r]
            coming = np.searchsorted(self._arrivals[lo:hi], until[r // s])
            self._request_capacity[r] = int(1.5 * (self.rows["inside"][r] + coming)) + 64
            self._reserve_requests()
        if self._pool is None:
            self._advance(0, w, 0, orders)
        else:
            cuts = np.linspace(0, w, self.threads + 1).astype(int)
            jobs = [
                self._pool.submit(self._advance, int(cuts[k]), int(cuts[k + 1]), k, orders)
                for k in range(self.threads)
            ]
            for job in jobs:
                job.result()
        return self.ticks

    def _advance(self, lo: int, hi: int, thread: int, orders: np.ndarray) -> None:
        w, s = self.shape
        kernel.advance(
            lo, hi, self.active, self.clock_s, self.scenario.tick_s, self.rows, self.params, self.replicas, self.slots,
            self.heap, self.ready, self.idle, self._requests, self._arrivals, self.pools, self.used, self.laws,
            self.noises, self.demands, self.boots, self.loads, self.allowed, orders.reshape(w * s),
            self.ticks.reshape(w * s), self.totals.reshape(w * s), self._blank,
            self.histograms.reshape(w * s, BUCKETS), self._scratch[thread],
        )  # fmt: skip

    def finish(self, indices: Sequence[int] | None = None) -> None:
        """Ends runs: requests that have died count as dropped, those past their objective as overdue."""
        w, s = self.shape
        for k in range(w) if indices is None else indices:
            kernel.finish(
                k, k + 1, self.clock_s, self.rows, self.params, self.replicas, self.slots, self._requests,
                self.ticks.reshape(w * s), self.totals.reshape(w * s), s,
            )  # fmt: skip

    # --- storage that grows ----------------------------------------------------------------------------
    def _read_arrivals(self) -> None:
        """Reads traffic ahead for worlds that would run dry within the tick."""
        scenario = self.scenario
        horizon_s = scenario.ticks * scenario.tick_s
        services = self.shape[1]
        for w in np.flatnonzero(self.active & (self._known_s < self.clock_s + scenario.tick_s)):
            known = min(
                self._known_s[w] + self._read_ahead_s, max(horizon_s, self.clock_s[w] + scenario.tick_s)
            )
            for r in range(w * services, (w + 1) * services):
                fresh = self._sources[r].until(self._start_s[w] + known) - self._start_s[w]
                lo, hi = self.rows["arrival_lo"][r], self.rows["arrival_hi"][r]
                left = hi - lo
                if left + len(fresh) > self._arrival_capacity[r]:
                    self._arrival_capacity[r] = int(1.25 * (left + len(fresh))) + 64
                    self._reserve_arrivals()
                    lo, hi = self.rows["arrival_lo"][r], self.rows["arrival_hi"][r]
                at = self._arrival_offset[r]
                self._arrivals[at : at + left] = self._arrivals[lo:hi].copy()
                self._arrivals[at + left : at + left + len(fresh)] = fresh
                self.rows["arrival_lo"][r], self.rows["arrival_hi"][r] = at, at + left + len(fresh)
            self._known_s[w] = known

    def _reserve_arrivals(self) -> None:
        ends = np.cumsum(self._arrival_capacity)
        offsets = np.r_[0, ends[:-1]]
        arrivals = np.zeros(ends[-1])
        for r, row in enumerate(self.rows):
            kept = self._arrivals[row["arrival_lo"] : row["arrival_hi"]]
            arrivals[offsets[r] : offsets[r] + len(kept)] = kept
            row["arrival_lo"], row["arrival_hi"] = offsets[r], offsets[r] + len(kept)
        self._arrivals, self._arrival_offset = arrivals, offsets

    def _reserve_requests(self) -> None:
        old, rows = getattr(self, "_requests", np.zeros(0, REQUEST)), self.rows.copy()
        self._requests = np.zeros(int(self._request_capacity.sum()), REQUEST)
        self._place_requests(slice(None))
        for before, row in zip(rows, self.rows, strict=True):
            kept = old[before["request_lo"] : before["request_hi"]]
            self._requests[row["request_lo"] : row["request_lo"] + len(kept)] = kept

    def _place_requests(self, which: slice) -> None:
        ends = np.cumsum(self._request_capacity)
        self.rows["request_hi"][which] = ends[which]
        self.rows["request_lo"][which] = (ends - self._request_capacity)[which]

    # --- the face of a live cluster --------------------------------------------------------------------
    def read(self) -> tuple[Observation, ...]:
        """What a monitor would report now of every row: the services of the first world, of the second, …"""
        services = self.shape[1]
        now_s = self.now_s.tolist()
        values = measure(self.ticks).reshape(-1, len(FEATURES))
        return tuple(Observation(now_s[r // services], row, _FRESH) for r, row in enumerate(values))

    def apply(self, decisions: Sequence[Decision]) -> None:
        """Takes one decision per row; they act when time goes on."""
        self._decisions = np.array(
            [
                (
                    decision.order,
                    decision.release,
                    decision.max_batch or 0,
                    ANY_POOL if decision.pool is None else self._pool_index[decision.pool],
                )
                for decision in decisions
            ],
            ORDER,
        ).reshape(self.shape)

    def wait(self) -> None:
        """Lets one tick pass."""
        self.advance(self._decisions)

    @cached_property
    def _pool_index(self) -> Mapping[str, int]:
        return {pool.name: k for k, pool in enumerate(self.scenario.pools)}
