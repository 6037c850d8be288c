"""A simulated cluster: many worlds of one scenario, advanced together, each with the face of a live one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pilotage.control.decisions import Decisions
from pilotage.control.placing import LearnedPlacement, shipped
from pilotage.control.policy import FEATURES, Decision, Observations, Situation
from pilotage.engine import kernel, traffic  # noqa: F401  (traffic: compiled drawing of arrivals)
from pilotage.engine.layout import (
    ANY_POOL,
    CANDIDATE,
    CLOSURE,
    EVENT,
    MESSAGE,
    NODE,
    ORDER,
    REPLICA,
    REQUEST,
    ROUTER,
    ROW,
    SAME_VARIANT,
    SAME_WAIT,
    SLOT,
    TICK,
    State,
)
from pilotage.engine.llm_rows import LlmRows
from pilotage.engine.nodes import POOL_NODES
from pilotage.engine.numbers import closures, encode, lay_out, side_by_side
from pilotage.engine.placement import PAIRWISE, RULES, TERMS, WEIGHTS
from pilotage.metrics import BUCKETS
from pilotage.scenario import Placement, Scenario
from pilotage.world.arrivals import Arrivals, Handover, Traffic
from pilotage.world.spec import SpecError, decode

T = TypeVar("T")
R = TypeVar("R")
_STREAMS = ("demand", "noise", "patience", "route", "start")
# Traffic is read ahead by about so many requests a row: enough that a read costs little, few enough for the caches;
# and no more in all rows, nor for longer, than this.
_READ_AT_ONCE, _READ_IN_ALL, _READ_AHEAD_S = 16_384, 4_194_304, 3600.0
_FRESH = np.zeros(len(FEATURES))
_FRESH.setflags(write=False)


class World(NamedTuple):
    """One run: its seed, where on the traffic's clock it starts (None: where the scenario says), and traffic
    that takes the place of the scenario's, one source per service (None: the scenario's).
    """

    seed: int
    start_s: float | None = None
    traffic: tuple[Traffic | Recorded, ...] | None = None


class Recorded:
    """Arrivals that have been drawn, history included, as a source for many runs of the same window."""

    def __init__(self, times_s: np.ndarray) -> None:
        self._times_s = times_s

    def begin(self, stream: Any, start_s: float, end_s: float, data: Path | None) -> Arrivals:
        """All of them from `start_s` on; see `world.arrivals.Source.begin`."""
        return Arrivals(iter([(self._times_s, math.inf)]), start_s)


class _Later:
    """Places for the requests of a decode service, one for every request that its prefill service knows of: when they
    come the engine finds out, until then they are infinitely far away."""

    def __init__(self, giver: Arrivals | _Later) -> None:
        self._giver = giver

    def until(self, t_s: float) -> np.ndarray:
        return np.full(len(self._giver.until(t_s)), math.inf)


def recorded(scenario: Scenario, worlds: Sequence[World]) -> list[World]:
    """The same worlds with their traffic drawn once and for all: runs are the same, and need not draw it again."""
    cluster = Cluster(scenario.replace(history_h=0.0), worlds)  # which would draw the history, too
    end_s = cluster.now_s + scenario.ticks * scenario.tick_s
    begin_s = np.maximum(0.0, cluster.now_s - scenario.history_h * 3600)
    out = []
    for w, world in enumerate(worlds):
        sources: list[Traffic | Recorded] = []
        for s in range(len(scenario.services)):
            own = scenario.services[s].traffic
            if isinstance(own, Handover):
                sources.append(own)
            else:
                sources.append(Recorded(cluster.open(w, s, float(begin_s[w])).until(float(end_s[w]))))
        out.append(world._replace(start_s=float(cluster.now_s[w]), traffic=tuple(sources)))
    return out


def observed(ticks: np.ndarray, now_s: np.ndarray) -> Observations:
    """What a monitor would report of counters of shape (worlds, services), row by row, at times of shape (worlds,).

    The counters are kept: give ones that do not change.
    """
    return Observations(np.repeat(now_s, ticks.shape[1]), ticks.reshape(-1), _FRESH)


def stream(seed: int, name: str) -> np.random.Generator:
    """The generator of a named random stream: the same draws whatever other streams exist."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, name)))


def _sequence(seed: int, name: str) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()),))


def weights_of(scenario: Scenario) -> tuple[float, ...]:
    """The weights of a scenario's placement rule; of a learned one that has none of its own, those that are shipped."""
    rule, weights = scenario.placement.rule, scenario.placement.weights
    if rule in PAIRWISE and not weights:
        return shipped().weights_of(TERMS)
    if len(weights) not in WEIGHTS[rule]:
        raise SpecError(
            f"placement rule {rule!r} has {len(weights)} weights; valid: {' or '.join(map(str, WEIGHTS[rule]))}"
        )
    return weights


def placement_from(text: str) -> Placement:
    """The placement that a command-line argument names: a rule, or a `placement.json` or the folder that holds one."""
    if text.endswith(".json") or Path(text).is_dir():
        found = LearnedPlacement.read(Path(text))
        return Placement(rule="learned-placement", weights=found.weights_of(TERMS), at_notice=found.at_notice)
    return decode({"rule": text}, Placement, "placement")


class Cluster:
    """`len(worlds)` independent worlds of one scenario, in structured arrays of one row per world and service.

    The batch face is `advance(orders)`: one control tick of all worlds in one compiled call. The face of a
    live cluster is `read()`, `apply(decisions)`, `wait()`, with the services of all worlds in a row. A world may
    be put back to the start of another run with `restart`; one that is not `active` stands still. With
    `threads` above 1 the rows are shared out over cores. `rule` and `weights` take the place of the scenario's
    placement: any function compiled with `engine.placement.rule`, such as a learned scorer; `jointly` (None: as the
    scenario's rule does) chooses the best pair of a pending replica of any service and a node, instead of taking the
    services in turn. `weights` may be changed in place before a `restart`. `each` gives every world a scenario of its
    own, which is `scenario` but for the mean batch times (not with LLM services). How far ahead traffic is read
    (`read_ahead_s`; None: as suits the traffic) changes no result. Rows of LLM services are served by `llm_rows`, on
    one thread.
    """

    def __init__(
        self,
        scenario: Scenario,
        worlds: Sequence[World],
        *,
        threads: int = 1,
        read_ahead_s: float | None = None,
        rule: Any = None,
        weights: np.ndarray | None = None,
        jointly: bool | None = None,
        each: Sequence[Scenario] | None = None,
    ) -> None:
        self.scenario, self._each = scenario, each
        self.worlds = list(worlds)
        self.threads = max(1, min(threads, len(self.worlds) * len(scenario.services)))
        self._read_ahead_s = max(60.0 if read_ahead_s is None else read_ahead_s, scenario.tick_s)
        self._adapts = read_ahead_s is None
        w, s = len(self.worlds), len(scenario.services)
        self.shape = (w, s)
        if each is None:
            self.numbers, one = encode(scenario)
            self.params = lay_out(one, w)
        else:
            self.numbers, rows = side_by_side(each)
            self.params = lay_out(rows, 1)
        self.rows = np.zeros(w * s, ROW)
        self.clock_s = np.zeros(w)
        self.active = np.ones(w, bool)
        self.ticks = np.zeros((w, s), TICK)
        self.totals = np.zeros((w, s), TICK)
        self.histograms = np.zeros((w, s, BUCKETS), np.int64)
        self.replicas = np.zeros(int(self.params["replica_hi"][-1]), REPLICA)
        self.nodes = np.zeros((w, sum(pool.max_nodes for pool in scenario.pools)), NODE)
        self.slots = np.zeros(int(self.params["slot_hi"][-1]), SLOT)
        self._state = State(
            rows=self.rows,
            params=self.params,
            ticks=self.ticks.reshape(-1),
            replicas=self.replicas,
            ready=np.zeros(len(self.replicas), np.int64),
            slots=self.slots,
            tree=np.zeros(int(self.params["winner_hi"][-1]), EVENT),
            trees=np.zeros((2, int(self.params["tree_hi"][-1]))),
            scratch=np.zeros((self.threads, BUCKETS + 4), np.int64),
            nodes=self.nodes,
            summary=np.zeros((w, POOL_NODES + len(scenario.pools)), np.int64),
            in_zone=np.zeros((w, self.numbers.zone_ok.shape[1]), np.int64),
            cached=np.zeros((w, self.nodes.shape[1], len(self.numbers.variants))),
            closures=np.zeros((w, 0), CLOSURE),
            candidate=np.zeros(w, CANDIDATE),
            seeds=np.zeros(w, np.uint64),
            routers=np.zeros(int(self.params["router_hi"][-1]) + 1, ROUTER),
            messages=np.zeros(0, MESSAGE),
        )
        llm = any(service.llm is not None for service in scenario.services)
        if llm and each is not None:
            raise SpecError(
                "LLM services have no scenario of their own in each world; valid: one for all worlds"
            )
        self._llm = LlmRows(scenario, self.numbers, self.params, self._state) if llm else None
        self._jointly = rule is None and scenario.placement.rule in PAIRWISE if jointly is None else jointly
        self._rule = RULES[scenario.placement.rule] if rule is None else rule
        self.weights = np.array(weights_of(scenario) if weights is None else weights, dtype=np.float64)
        self._most = np.full(s, 64)  # per service: storage for so many arrivals
        self._capacity = np.tile(self._most, w)
        self.arrival_storage, self.requests = np.zeros(0), np.zeros(0, REQUEST)
        self._reserve()
        self._blank = np.zeros(1, TICK)
        self._blank["latency_p95_s"] = np.nan
        self._pool = ThreadPoolExecutor(self.threads - 1) if self.threads > 1 else None
        self._known_s = np.zeros(w)
        self._dry_s = 0.0  # how long the traffic read so far lasts
        self._start_s = np.zeros(w)
        self._sources: dict[int, Arrivals | _Later] = {}
        self._history: list[np.ndarray] = [np.zeros(0)] * (w * s)
        self.decisions = self.no_orders()
        self.restart(range(w), self.worlds)

    def seeds(self, world: int, service: int) -> dict[str, int]:
        """The 64-bit seeds of a row's counter-based streams, as `seed_demand` and so on."""
        name = self.scenario.services[service].name
        seed = self.worlds[world].seed
        return {
            f"seed_{s}": int(_sequence(seed, f"{name}/{s}").generate_state(1, np.uint64)[0]) for s in _STREAMS
        }

    def seed_nodes(self, world: int) -> int:
        """The 64-bit seed of what happens to a world's nodes."""
        return int(_sequence(self.worlds[world].seed, "nodes").generate_state(1, np.uint64)[0])

    @property
    def routers(self) -> np.ndarray:
        """The routers of the rows that have one, as ROUTER records; what they send is in `messages`."""
        return self._state.routers

    @property
    def messages(self) -> np.ndarray:
        return self._state.messages

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
            self._dry_s = 0.0
            self.ticks[w] = self._blank[0]
            self.totals[w] = np.zeros((), TICK)
            self.histograms[w] = 0
            for s in range(services):
                r = w * services + s
                for name, seed in self.seeds(w, s).items():
                    self.params[r][name] = seed
                begin_s = max(0.0, start_s - scenario.history_h * 3600)
                source = self.open(w, s, begin_s)
                bins = int((start_s - begin_s) / scenario.tick_s + 1e-9)
                edges = start_s + scenario.tick_s * (np.arange(bins + 1) - bins)
                past = source.until(start_s)
                self._history[r] = np.diff(np.searchsorted(past, edges)) / scenario.tick_s
                if isinstance(source, _Later):  # about what its prefill service was sent
                    self._history[r] = self._history[w * services + self._giver(s)]
                self._sources[r] = source
            self._state.seeds[w] = self.seed_nodes(w)
            self._close(w, closures(scenario, start_s, stream(world.seed, "outages")))
            if self._llm is not None:
                self._llm.restart(w)
            kernel.begin(w, w + 1, self._state, self.numbers, self._rule, self.weights, self._jointly)
            mine = slice(w * services, (w + 1) * services)
            for field in ("ready", "pending", "max_batch"):  # what a monitor sees before the first tick
                self.ticks[field][w] = self.rows[field][mine]

    def _close(self, w: int, found: np.ndarray) -> None:
        """Sets the closures of one world; a closure of pool -1 is none."""
        known = self._state.closures
        if known.shape[1] < len(found):
            wider = np.zeros((known.shape[0], len(found)), CLOSURE)
            wider["pool"] = -1
            wider[:, : known.shape[1]] = known
            self._state = self._state._replace(closures=wider)
        self._state.closures[w]["pool"] = -1
        self._state.closures[w, : len(found)] = found

    def _giver(self, s: int) -> int:
        """The prefill service from which decode service s takes over."""
        source = self.scenario.services[s].traffic
        assert isinstance(source, Handover)
        return [service.name for service in self.scenario.services].index(source.service)

    def open(self, w: int, s: int, begin_s: float) -> Arrivals | _Later:
        """The traffic of one row from `begin_s` to the end of its run, on the traffic's clock."""
        scenario, world = self.scenario, self.worlds[w]
        service = scenario.services[s]
        if isinstance(service.traffic, Handover):
            return _Later(self.open(w, self._giver(s), begin_s))
        source = service.traffic if world.traffic is None else world.traffic[s]
        return source.begin(
            lambda name: stream(world.seed, f"{service.name}/traffic/{name}"),
            begin_s,
            self._start_s[w] + scenario.ticks * scenario.tick_s,
            Path(scenario.data) if scenario.data else None,
        )

    def arrivals(self, w: int, s: int) -> np.ndarray:
        """All arrival times of one row's run, in seconds since its start."""
        source = self.open(w, s, max(0.0, self._start_s[w] - self.scenario.history_h * 3600))
        source.until(self._start_s[w])
        return source.until(self._start_s[w] + self.scenario.ticks * self.scenario.tick_s) - self._start_s[w]

    @property
    def now_s(self) -> np.ndarray:
        """The time on the traffic's clock, per world, in seconds."""
        return self._start_s + self.clock_s

    def situation(self, world: int, service: int) -> Situation:
        """What a policy knows before the first tick of a run."""
        scenario = self._each[world] if self._each else self.scenario
        return Situation(
            service=scenario.services[service],
            pools=self.scenario.pool_by_name,
            tick_s=self.scenario.tick_s,
            history_rps=self._history[world * self.shape[1] + service],
        )

    def no_orders(self) -> np.ndarray:
        """Orders of shape (worlds, services) that change nothing."""
        orders = np.zeros(self.shape, ORDER)
        orders["pool"] = ANY_POOL
        orders["variant"] = SAME_VARIANT
        orders["batch_wait_s"] = SAME_WAIT
        return orders

    def advance(self, orders: np.ndarray) -> np.ndarray:
        """One control tick of every world. Takes orders and returns counters, both of shape (worlds, services)."""
        if self._dry_s < self.scenario.tick_s + 1e-6:  # sums of ticks are rounded
            self._read_arrivals()
        self._dry_s -= self.scenario.tick_s
        w, s = self.shape
        books = (self.active, self.clock_s, self.scenario.tick_s, self._state, self.numbers)
        storage = (self.arrival_storage, self.requests)
        histograms, totals = self.histograms.reshape(w * s, BUCKETS), self.totals.reshape(w * s)
        taken = (np.ascontiguousarray(orders).reshape(w * s), self._blank)
        rule = (self._rule, self.weights, self._jointly)
        if self._llm is not None:
            self._llm.tell(self.active, self.replicas, taken[0])
            if kernel.decide(*books, *taken):
                kernel.place(*books, *rule)
            for lo, hi in self._llm.others:
                kernel.serve(lo, hi, 0, *books, *storage, histograms)
            self._llm.tick(*books, *storage, histograms, totals)
            kernel.settle(*books, totals)
        elif self._pool is None:
            if kernel.advance(*books, *storage, *taken, histograms, totals):
                kernel.place(*books, *rule)
                kernel.complete(*books, *storage, histograms, totals)
        else:
            if kernel.decide(*books, *taken):
                kernel.place(*books, *rule)
            cuts = np.linspace(0, w * s, self.threads + 1).astype(int).tolist()
            common = (*books, *storage, histograms)
            parts = [(lo, hi, k, *common) for k, (lo, hi) in enumerate(pairwise(cuts))]
            self._share_out(lambda part: kernel.serve(*part), parts)
            kernel.settle(*books, totals)
        return self.ticks

    def _share_out(self, work: Callable[[T], R], parts: Sequence[T]) -> list[R]:
        """Does a part of the work on every thread, the first on this one."""
        later = [self._pool.submit(work, part) for part in parts[1:]] if self._pool else []
        return [work(parts[0]), *(future.result() for future in later)]

    def finish(self, indices: Sequence[int] | None = None) -> None:
        """Ends runs: requests that have died count as dropped, those past their objective as overdue."""
        totals = self.totals.reshape(-1)
        for k in range(self.shape[0]) if indices is None else indices:
            kernel.finish(
                k, k + 1, self.clock_s, self._state, self.numbers, self.arrival_storage, self.requests, totals
            )
            if self._llm is not None:
                self._llm.finish(int(k), float(self.clock_s[k]), totals)

    # --- storage that grows ----------------------------------------------------------------------------
    def _read_arrivals(self) -> None:
        """Reads traffic ahead for worlds that would run dry within the tick."""
        scenario = self.scenario
        horizon_s = scenario.ticks * scenario.tick_s
        services = self.shape[1]
        dry = np.flatnonzero(self.active & (self._known_s < self.clock_s + scenario.tick_s))
        at_least_s = np.maximum(horizon_s, self.clock_s + scenario.tick_s)
        self._known_s[dry] = np.minimum(self._known_s + self._read_ahead_s, at_least_s)[dry]
        self._dry_s = float((self._known_s - self.clock_s).min())
        if len(dry) == 0:
            return
        rows = (dry[:, None] * services + np.arange(services)).reshape(-1)
        read = self._share_out(self._read, np.array_split(rows, min(self.threads, len(rows))))
        fresh = [times for part in read for times in part]
        coming = np.array([len(times) for times in fresh])
        if self._adapts:
            wanted = min(_READ_AT_ONCE, _READ_IN_ALL / len(self.rows))
            self._read_ahead_s *= np.clip(wanted / (1 + coming.mean()), 0.25, 4.0)
            self._read_ahead_s = min(max(self._read_ahead_s, scenario.tick_s), _READ_AHEAD_S)
        kernel.compact(rows, self._state, self.numbers, self.arrival_storage, self.requests)
        needed = self.rows["arrival_hi"][rows] + coming
        if (needed > self._capacity[rows]).any():
            # what one world needs, the others will need too
            np.maximum.at(self._most, rows % services, needed + needed // 2 + 64)
            self._capacity = np.tile(self._most, self.shape[0])
            self._reserve()
        at = self.rows["storage_lo"] + self.rows["arrival_hi"]
        for r, times in zip(rows.tolist(), fresh, strict=True):
            self.arrival_storage[at[r] : at[r] + len(times)] = times
        self.rows["arrival_hi"][rows] += coming

    def _read(self, rows: np.ndarray) -> list[np.ndarray]:
        """The arrivals of some rows up to the time until which their worlds' traffic is to be known."""
        found = []
        for r in rows.tolist():
            w = r // self.shape[1]
            found.append(self._sources[r].until(self._start_s[w] + self._known_s[w]) - self._start_s[w])
        return found

    def _reserve(self) -> None:
        """Gives every row as much storage as its capacity says, and moves what it has."""
        ends = np.cumsum(self._capacity)
        arrivals, requests = np.zeros(ends[-1]), np.zeros(ends[-1], REQUEST)
        known = self._state.messages
        messages = np.zeros(ends[-1] if self.params["router_hi"][-1] > 0 else 0, MESSAGE)
        for row, hi, capacity in zip(self.rows, ends, self._capacity, strict=True):
            lo, kept = row["storage_lo"], row["arrival_hi"]
            at = hi - capacity
            arrivals[at : at + kept] = self.arrival_storage[lo : lo + kept]
            requests[at : at + kept] = self.requests[lo : lo + kept]
            messages[at : at + kept] = known[lo : lo + kept]
            row["storage_lo"], row["storage_hi"] = at, hi
        self.arrival_storage, self.requests = arrivals, requests
        self._state = self._state._replace(messages=messages)

    # --- the face of a live cluster --------------------------------------------------------------------
    def read(self) -> Observations:
        """What a monitor would report now of every row: the services of the first world, of the second, …"""
        as_bytes = self.ticks.view(np.uint8)  # copied field by field, records take ten times as long
        return observed(as_bytes.copy().view(TICK), self.now_s)

    def apply(self, decisions: Sequence[Decision]) -> None:
        """Takes one decision per row; they act when time goes on."""
        orders = self.no_orders()
        rows = orders.reshape(-1)
        if isinstance(decisions, Decisions):
            rows["order"], rows["release"] = decisions.order, decisions.release
            decisions = ()
        for k, decision in enumerate(decisions):
            if not (decision.order or decision.release or decision.max_batch) and (
                decision.pool is decision.variant is decision.batch_wait_s is decision.chunk_tokens is None
            ):
                continue  # most change nothing
            rows[k] = (
                decision.order,
                decision.release,
                decision.max_batch or 0,
                ANY_POOL if decision.pool is None else self._pool_index[decision.pool],
                SAME_VARIANT
                if decision.variant is None
                else self._variant_index[k % self.shape[1]][decision.variant],
                SAME_WAIT if decision.batch_wait_s is None else decision.batch_wait_s,
                decision.chunk_tokens or 0,
            )
        self.decisions = orders

    def wait(self) -> None:
        """Lets one tick pass."""
        self.advance(self.decisions)

    @cached_property
    def _pool_index(self) -> Mapping[str, int]:
        return {pool.name: k for k, pool in enumerate(self.scenario.pools)}

    @cached_property
    def _variant_index(self) -> list[dict[str, int]]:
        return [{v.name: k for k, v in enumerate(service.variants)} for service in self.scenario.services]
