"""The LLM services of a cluster: their arrays, and one tick of each, beside the rows that batch.

Decisions, placement, bills and faults are the same for all services (`nodes`); only who serves differs. A sequence has
a place in its row's arrays from its arrival until it has left, so that memory follows what is in the system.

Where prefill and decode are apart, the rows of one service are two: what the first has handed over in a tick, and what
was still on its way, arrives at the second, whose places for arrivals are given their times.

What an LLM service does not have yet: queue limits, timeouts and impatient clients, models that decay. A batch limit
lowered by a policy acts on admissions only, another budget of tokens on the iterations that begin from then on.
"""

from __future__ import annotations

import numpy as np

from pilotage.engine import llm_ticks
from pilotage.engine.layout import TOKEN_COUNTS, Numbers, State
from pilotage.engine.llm_layout import (
    BUILD,
    COMING,
    DECODE,
    DONE,
    ENGINE,
    HANDED_OVER,
    PREFILL,
    RUNNING,
    SEQUENCE,
    UNIFIED,
    UNUSED,
    WAITING,
)
from pilotage.engine.numbers import data_path
from pilotage.engine.serving import build_record, new_fleet, server_record
from pilotage.scenario import Scenario
from pilotage.world.arrivals import Handover
from pilotage.world.llm import LLMServer
from pilotage.world.servers import IterationLaw
from pilotage.world.tokens import Tokens

_AT_FIRST = 1024  # sequences
_ROLES = {"unified": UNIFIED, "prefill": PREFILL, "decode": DECODE}
_NOBODY = np.zeros(0, SEQUENCE)


class Row:
    """One LLM service in one world."""

    def __init__(self, server: LLMServer, tokens: Tokens, slots: int, ready: np.ndarray) -> None:
        self.tokens, self._chunk_tokens = tokens, server.chunk_tokens
        record, engines = server_record(server, _ROLES[server.role]), np.zeros(slots, ENGINE)
        sequences = np.zeros(0, SEQUENCE)
        self.fleet = new_fleet(record, engines, sequences, tokens.ids, tokens.distinct)._replace(ready=ready)
        self.coming = np.zeros(0, np.int32)
        self.handed = self._on_their_way = _NOBODY  # by this row in the last tick; to this row
        self.restart()

    def restart(self) -> None:
        """Forgets a run; a new one begins."""
        f = self.fleet
        f.engines[:] = np.zeros((), f.engines.dtype)
        f.engines["stamp"] = -1
        f.server["chunk"] = self._chunk_tokens
        f.desk[:] = 0
        f.itl[:] = 0
        sequences = np.zeros(_AT_FIRST, SEQUENCE)
        sequences["state"] = UNUSED
        self.fleet = f._replace(
            sequences=sequences,
            done=np.zeros(_AT_FIRST, np.int32),
            holds=np.zeros(_AT_FIRST * self.tokens.most, np.uint8),
        )
        self._free = np.arange(_AT_FIRST)[::-1].copy()  # a stack of the places that are free
        self._left = _AT_FIRST
        self.handed = self._on_their_way = _NOBODY

    def limit(self, what: str, value: int) -> None:
        """Sets a limit of the iterations that begin from now on."""
        if self.fleet.server[what] != value:
            self.fleet.server[what] = value
            self.fleet.engines["quiet_s"] = 0.0  # who waits may now be let in, and be through before

    def outstanding(self) -> np.ndarray:
        e = self.fleet.engines
        total: np.ndarray = e["queued"] + e["running"] + e["flying"]
        return total

    def take_in(self, times_s: np.ndarray, numbers: np.ndarray, seed: int) -> None:
        """Gives the requests that arrive in the coming tick a place."""
        at = self._places(len(times_s))
        lengths, q = self.tokens.of(seed, numbers), np.zeros(len(times_s), SEQUENCE)
        q["arrival_s"] = q["here_s"] = times_s
        q["first_s"] = q["last_s"] = np.nan
        q["prompt"] = q["target"] = lengths.prompt
        q["total"] = lengths.prompt + lengths.output
        q["blocks"] = q["replica"] = -1
        if self.tokens.most:
            q["id_lo"], q["ids"], q["hold_lo"] = lengths.lo, lengths.blocks, at * self.tokens.most
        self.fleet.sequences[at] = q
        self.coming = at.astype(np.int32)

    def take_over(self, giver: Row, until: float) -> np.ndarray:
        """Gives what is here before `until`, of all that another row has handed over, a place; returns when it is."""
        q = np.concatenate([self._on_their_way, giver.handed])
        q = q[np.argsort(q["here_s"], kind="stable")]
        n = int(np.searchsorted(q["here_s"], until))
        self._on_their_way, q = q[n:], q[:n]
        at = self._places(n)
        q["state"], q["replica"], q["ids"] = COMING, -1, 0
        self.fleet.sequences[at] = q
        self.coming = at.astype(np.int32)
        times_s: np.ndarray = q["here_s"]
        return times_s

    def _places(self, n: int) -> np.ndarray:
        if self._left < n:
            self._grow(n)
        at = self._free[self._left - n : self._left][::-1]
        self._left -= n
        return at

    def _grow(self, n: int) -> None:
        old = len(self.fleet.sequences)
        new = 2 * old + n
        sequences = np.zeros(new, SEQUENCE)
        sequences["state"] = UNUSED
        sequences[:old] = self.fleet.sequences
        holds = np.zeros(new * self.tokens.most, np.uint8)
        holds[: len(self.fleet.holds)] = self.fleet.holds
        self.fleet = self.fleet._replace(sequences=sequences, holds=holds, done=np.zeros(new, np.int32))
        free = np.zeros(new, self._free.dtype)
        free[: self._left] = self._free[: self._left]
        free[self._left : self._left + new - old] = np.arange(new - 1, old - 1, -1)
        self._free, self._left = free, self._left + new - old

    def let_go(self) -> None:
        """Frees the places of the sequences that have left."""
        f = self.fleet
        n = int(f.desk[DONE])
        gone = f.done[:n]
        left = f.sequences[gone]
        self.handed = left[left["state"] == HANDED_OVER]
        f.sequences["state"][gone] = UNUSED
        self._free[self._left : self._left + n] = gone
        self._left += n

    def overdue(self, now_s: float, slo_s: float) -> int:
        """Requests inside whose first token is, or was, too late; of a decode service, whose tokens are."""
        q = self.fleet.sequences
        inside = (q["state"] == COMING) | (q["state"] == WAITING) | (q["state"] == RUNNING)
        if self.fleet.server["role"] == DECODE:
            later = q["total"] - q["prompt"] - 1
            return int((inside & (now_s - q["first_s"] > slo_s * later)).sum())
        first_s = np.where(np.isnan(q["first_s"]), now_s, q["first_s"])
        return int((inside & (first_s - q["arrival_s"] > slo_s)).sum())


class LlmRows:
    """The LLM services of all worlds of a cluster. `others` are the rows that are none, as stretches (first, end)."""

    def __init__(self, scenario: Scenario, numbers: Numbers, params: np.ndarray, state: State) -> None:
        services = len(scenario.services)
        self._services = services
        self._builds = np.zeros(numbers.laws.shape, BUILD)
        pools = [pool.name for pool in scenario.pools]
        self.rows: dict[int, Row] = {}
        for s, service in enumerate(scenario.services):
            if service.llm is None or service.tokens is None:
                continue
            for v, variant in enumerate(service.variants, int(params["variant_lo"][s])):
                for name, law in variant.latency.items():
                    if name in service.pools and isinstance(law, IterationLaw):
                        self._builds[v, pools.index(name)] = build_record(service.llm, law)
            tokens = service.tokens.begin(data_path(scenario), service.llm.prefix_block_tokens)
            for r in range(s, len(params), services):
                lo, hi = params["replica_lo"][r], params["replica_hi"][r]
                self.rows[r] = Row(service.llm, tokens, hi - lo, state.ready[lo:hi])
        self._givers: dict[int, int] = {}  # of the rows that take over, the rows that they take over from
        names = [service.name for service in scenario.services]
        for r in self.rows:
            if isinstance(traffic := scenario.services[r % services].traffic, Handover):
                self._givers[r] = giver = r - r % services + names.index(traffic.service)
                record = self.rows[giver].fleet.server
                record["transfer_s"] = traffic.transfer_ms / 1e3
                record["transfer_s_per_token"] = traffic.transfer_us_per_token / 1e6
        others = [r for r in range(len(params)) if r not in self.rows]
        cuts = np.flatnonzero(np.diff(others) > 1) + 1
        self.others = [(int(part[0]), int(part[-1]) + 1) for part in np.split(others, cuts) if len(part)]
        self._params = params

    def restart(self, w: int) -> None:
        for r, row in self.rows.items():
            if r // self._services == w:
                row.restart()

    def tell(self, active: np.ndarray, replicas: np.ndarray, orders: np.ndarray) -> None:
        """Says of every replica how many requests it has, until `tick`: who drains with none goes at once. Takes in the
        budgets of tokens that are ordered."""
        for r, row in self.rows.items():
            if not active[r // self._services]:
                continue
            if orders["chunk_tokens"][r] > 0:
                row.limit("chunk", int(orders["chunk_tokens"][r]))
            lo, hi = self._params["replica_lo"][r], self._params["replica_hi"][r]
            replicas["waiting"][lo:hi] = row.outstanding()

    def tick(
        self, active: np.ndarray, clock_s: np.ndarray, tick_s: float, state: State, numbers: Numbers,
        arrivals: np.ndarray, requests: np.ndarray, histograms: np.ndarray, totals: np.ndarray,
    ) -> None:  # fmt: skip
        """One tick of all rows; what `nodes` needs at its end is in the state."""
        for r, row in self.rows.items():
            w = r // self._services
            if not active[w]:
                continue
            record, t0 = state.rows[r], float(clock_s[w])
            lo = int(record["storage_lo"] + record["arrival_lo"])
            if r in self._givers:
                times_s = row.take_over(self.rows[self._givers[r]], t0 + tick_s)
                arrivals[lo : lo + len(times_s)] = times_s
            else:
                hi = int(record["storage_lo"] + record["arrival_hi"])
                n = int(np.searchsorted(arrivals[lo:hi], t0 + tick_s))
                numbers_of = int(record["first_number"] + record["arrival_lo"]) + np.arange(n)
                row.take_in(arrivals[lo : lo + n], numbers_of, int(self._params["seed_demand"][r]))
            row.limit("max_batch", min(int(record["max_batch"]), row.fleet.running.shape[1]))
            llm_ticks.tick(
                r, row.fleet, self._builds, row.coming, state, numbers, arrivals, requests, histograms[r],
                t0, t0 + tick_s,
            )  # fmt: skip
            row.let_go()
            for name in TOKEN_COUNTS:
                totals[name][r] += state.ticks[name][r]

    def finish(self, w: int, now_s: float, totals: np.ndarray) -> None:
        """The end of a run: requests whose first token is too late are overdue."""
        for r, row in self.rows.items():
            if r // self._services == w:
                totals["overdue"][r] += row.overdue(now_s, float(self._params["slo_s"][r]))
