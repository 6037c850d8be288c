"""The reference simulator: what `pilotage.engine` says it does, written again in plain Python.

Slow, small and separate on purpose. It shares with the engine only the specifications of `pilotage.world` and
their tables; it keeps a log of requests, batches and replicas, and every counter is worked out from that log
afterwards, where the engine keeps running sums. This part is one service between two decisions; nodes, placement
and bills are in `reference_cluster`, the counters in `reference_log`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pilotage.world.servers import log_normal_table

if TYPE_CHECKING:
    from tests.traces.reference_cluster import Node

# the order of events at one instant; nothing happens at the END itself
END, DEATH, CRASH, READINESS, COMPLETION, START, ARRIVAL, WAIT = range(8)
_MASK = (1 << 64) - 1


# --- draws ---------------------------------------------------------------------------------------------------
def draw(seed: int, number: int) -> int:
    """The number-th output of SplitMix64 started at `seed`."""
    z = (seed + 0x9E3779B97F4A7C15 * (number + 1)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, number: int) -> float:
    return (draw(seed, number) >> 11) * 2.0**-53


def exponential(seed: int, number: int) -> float:
    """An exponential draw of mean 1."""
    return -math.log1p(-uniform(seed, number))


def quantile(table: list[float], u: float) -> float:
    """Half the table spans all of [0, 1] but the last cell, the other half spans the last cell."""
    cells = len(table) // 2
    k, x = divmod(u * cells, 1.0)
    if k == cells - 1:
        j, x = divmod(x * cells, 1.0)
        k += j
    return table[int(k)] + (table[int(k) + 1] - table[int(k)]) * x


# --- what there is -------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Request:
    number: int
    arrival: float
    waits: float  # how long until it dies
    death: str  # how it dies if it does: timed_out or abandoned
    demand: float
    outcome: str = "waiting"  # then executing, and served, rejected, timed_out, abandoned or lost
    left: float = math.inf
    latency: float = math.nan
    error_share: float = 0.0

    def dead(self, now: float) -> bool:
        return now - self.arrival > self.waits

    def leave(self, outcome: str, now: float) -> None:
        self.outcome, self.left = outcome, now


@dataclass(eq=False)
class Queue:
    closes: bool  # whether batches close in it; not at the door
    replica: Replica | None = None  # whose queue it is; None: the central queue, or the door
    open: list[Request] = field(default_factory=list)  # all that wait, or the batch that is still open
    closed: list[list[Request]] = field(default_factory=list)
    opened: float = math.nan

    @property
    def waiting(self) -> int:
        return len(self.open) + sum(map(len, self.closed))


@dataclass(eq=False)
class Batch:
    requests: list[Request]
    start: float
    end: float


@dataclass(eq=False)
class Slot:
    number: int
    replica: Replica
    since: float = 0.0  # since when it has been free
    batch: Batch | None = None
    cold: float = 1.0


@dataclass(eq=False)
class Replica:
    number: int  # the lowest that was free among those of the service
    ordinal: int
    run: ServiceRun
    node: Node
    variant: int
    ordered: float
    ready: float = math.inf
    pace: float = 1.0
    state: str = "starting"  # then ready, perhaps leaving, draining, gone
    lives: int = 0
    crash: float = math.inf
    gone: float = math.inf
    serving: list[list[float]] = field(default_factory=list)  # from when to when

    def __post_init__(self) -> None:
        per = self.run.server.batches_in_flight
        self.slots = [Slot(self.number * per + j, self) for j in range(per)]
        self.queue = Queue(self.run.closes, self)

    @property
    def requests(self) -> list[Request]:
        """All that it executes or that wait for it."""
        running = [r for slot in self.slots if slot.batch for r in slot.batch.requests]
        return running + [r for line in (*self.queue.closed, self.queue.open) for r in line]


class ServiceRun:
    """One service of one world."""

    def __init__(self, service: Any, arrivals: list[float], seeds: dict[str, int]) -> None:
        self.service, self.server, self.seeds = service, service.server, seeds
        self.central = self.server.routing == "central"
        self.closes = self.server.former == "closed"
        self.wait_s = self.server.batch_wait_ms / 1e3
        # of variant and pool: fixed time of a batch of n, time per request, quantiles of the noise, the law
        self.laws = {}
        for v, variant in enumerate(service.variants):
            for pool, law in variant.latency.items():
                fixed, variable = law.batch_times_s(self.server.max_batch)
                each = [0.0, *(variable[1:] / range(1, len(variable))).tolist()]
                self.laws[v, pool] = fixed.tolist(), each, log_normal_table(law.noise_cv).tolist(), law
        self.loads = [(mean, table.tolist()) for mean, table in (v.load_law() for v in service.variants)]
        self.demands = service.demand.table().tolist()
        self.now, self.arrivals, self.stirred = 0.0, arrivals, False
        self.max_batch, self.pool, self.variant, self.turn = self.server.max_batch, None, 0, 0
        self.pending, self.replacing = service.initial_replicas, 0
        self.queue = Queue(self.closes and self.central)
        self.requests: list[Request] = []
        self.batches: list[Batch] = []
        self.replicas: list[Replica] = []  # all there ever were
        self.line: list[Replica] = []  # those that get work, longest ready first
        self.failures: list[float] = []

    @property
    def present(self) -> list[Replica]:
        return sorted((r for r in self.replicas if r.state != "gone"), key=lambda r: r.number)

    def load_s(self, replica: Replica) -> float:
        mean, table = self.loads[replica.variant]
        return mean * quantile(table, uniform(self.seeds["seed_start"], 4 * replica.ordinal + 1))

    # --- events --------------------------------------------------------------------------------------------
    def run(self, start: float, end: float) -> None:
        """From one decision to the next."""
        self.now, self.stirred = start, True
        for queue in self.queues():
            self.sweep(queue)
            self.part(queue.replica)
        act = {
            DEATH: self.die, CRASH: self.crash, READINESS: self.get_ready, COMPLETION: self.complete,
            START: self.start_all, ARRIVAL: self.arrive, WAIT: self.dispatch,
        }  # fmt: skip
        while self.now < end:
            self.now, kind, _, what = min(self.events(end))
            if kind != END:
                act[kind](what)

    def events(self, end: float) -> Iterator[tuple[float, int, int, Any]]:
        """What may happen next: time, kind, number, and what it happens to."""
        yield end, END, 0, None
        if self.stirred:
            yield self.now, START, 0, None
        if len(self.requests) < len(self.arrivals):
            yield self.arrivals[len(self.requests)], ARRIVAL, 0, len(self.requests)
        for r in self.present:
            time, kind = (r.ready, READINESS) if r.state == "starting" else (r.crash, CRASH)
            yield time, kind, r.number, r
            yield r.node.death, DEATH, r.number, r
            yield from ((s.batch.end, COMPLETION, s.number, s) for s in r.slots if s.batch)
        for n, queue in enumerate(self.queues()):
            if queue.open and (queue.closes or self.free(queue)):
                since = queue.opened if queue.closes else queue.open[0].arrival
                yield max(self.now, since + self.wait_s), WAIT, n, queue

    def arrive(self, number: int) -> None:
        timeout, patience = self.server.request_timeout_s or math.inf, math.inf
        if self.server.patience_s:
            patience = exponential(self.seeds["seed_patience"], number) * self.server.patience_s
        death = "timed_out" if timeout <= patience else "abandoned"
        demand = quantile(self.demands, uniform(self.seeds["seed_demand"], number))
        self.requests.append(Request(number, self.now, min(timeout, patience), death, demand))
        self.route(self.requests[-1])

    def complete(self, slot: Slot) -> None:
        variant, pool = self.service.variants[slot.replica.variant], slot.replica.node.pool
        for request in slot.batch.requests:
            request.leave("served", self.now)
            request.latency = self.now - request.arrival + pool.network_ms / 1e3
            request.error_share = 1 - variant.accuracy
        slot.batch, slot.since = None, self.now
        self.part(slot.replica)
        self.stirred = True

    def get_ready(self, replica: Replica) -> None:
        replica.state = "ready"
        replica.serving.append([self.now, math.inf])
        number = 64 * replica.ordinal + min(replica.lives, 63)
        if self.service.crashes_per_hour:
            per_s = self.service.crashes_per_hour / 3600
            replica.crash = self.now + exponential(self.seeds["seed_start"] + 1, number) / per_s
        for slot in replica.slots:
            slot.since, slot.cold = self.now, 1.0
        self.line.append(replica)
        if not self.central:
            door, self.queue.open = self.queue.open, []
            for request in door:
                if request.dead(self.now):
                    request.leave(request.death, self.now)
                else:
                    self.route(request)
        self.stirred = True

    def die(self, replica: Replica) -> None:
        """Its node goes, and takes along all that is on it."""
        self.failures.append(self.now)
        self.pending += replica.state not in ("draining", "leaving")
        self.line = [r for r in self.line if r.node.death > self.now]
        self.go(replica)
        self.give_back(replica)

    def crash(self, replica: Replica) -> None:
        self.failures.append(self.now)
        if replica.state in ("draining", "leaving"):
            self.line = [r for r in self.line if r is not replica]
            self.go(replica)
        else:
            self.line.remove(replica)
            replica.serving[-1][1] = self.now
            replica.state, replica.lives = "starting", replica.lives + 1
            warm_share = self.service.variants[replica.variant].warm_load_share
            replica.ready = self.now + self.load_s(replica) * warm_share
        self.give_back(replica)

    def drain(self, replica: Replica, now: float) -> None:
        """No more work for it; one that has nothing to do goes at once."""
        self.now = now
        if replica.state in ("ready", "leaving"):
            self.line.remove(replica)
            replica.state = "draining"
            self.part(replica)
        else:
            self.go(replica)

    def part(self, replica: Replica | None) -> None:
        """A draining replica goes when it has nothing left to do."""
        if replica and replica.state == "draining" and not replica.requests:
            self.go(replica)

    def go(self, replica: Replica) -> None:
        if replica.state != "starting":
            replica.serving[-1][1] = self.now
        replica.state, replica.gone = "gone", self.now

    def give_back(self, replica: Replica) -> None:
        """What becomes of the requests of a replica that died."""
        back = sorted(replica.requests, key=lambda r: r.number)
        for slot in replica.slots:
            if slot.batch:
                slot.batch.end, slot.batch = self.now, None
        replica.queue = Queue(self.closes, replica)
        for request in back:
            request.outcome = "waiting"
        self.stirred = True
        if self.service.on_failure == "lost":
            for request in back:
                request.leave("lost", self.now)
        elif self.queue.closes:
            n = self.max_batch
            self.queue.closed[:0] = [back[i : i + n] for i in range(0, len(back), n)]
        elif self.central or not self.line:
            self.queue.open[:0] = back
        else:  # completions of this instant come before what is routed
            for slot in [slot for r in self.line for slot in r.slots]:
                if slot.batch and slot.batch.end == self.now:
                    self.complete(slot)
            for r in self.line:
                self.dispatch(r.queue, before_waits=True)
            for request in back:
                self.route(request)

    # --- queues and batches ----------------------------------------------------------------------------------
    def queues(self) -> list[Queue]:
        return [self.queue, *(r.queue for r in self.present if r.state in ("ready", "draining", "leaving"))]

    def sweep(self, queue: Queue) -> None:
        """Buries the dead at the head of a queue; those in an open batch stay in it."""
        for line in queue.closed if queue.closes else [queue.open]:
            while line and line[0].dead(self.now):
                dead = line.pop(0)
                dead.leave(dead.death, self.now)
            if line:
                break
        queue.closed = [line for line in queue.closed if line]

    def route(self, request: Request) -> None:
        """Sends a request to the central queue, to a replica, or to the door if none is ready."""
        line, m, replica = self.line, len(self.line), None
        if m and self.server.routing == "round-robin":
            replica = line[self.turn % m]
            self.turn += 1
        elif m and self.server.routing == "least-outstanding":
            replica = min(line, key=lambda r: len(r.requests))
        elif m and self.server.routing == "power-of-two":
            bits = draw(self.seeds["seed_route"], request.number)
            i, j = (bits >> 32) * m >> 32, (bits & 0xFFFFFFFF) * (m - 1) >> 32  # j among the others
            two = [line[i], *(line[:i] + line[i + 1 :])[j : j + 1]]
            replica = min(two, key=lambda r: len(r.requests))
        queue = replica.queue if replica else self.queue
        if queue.waiting >= (self.server.queue_limit or math.inf):
            request.leave("rejected", self.now)
            return
        queue.opened = queue.opened if queue.open else self.now
        queue.open.append(request)
        self.dispatch(queue)

    def free(self, queue: Queue) -> list[Slot]:
        """The free slots for which a queue is, in the order in which they get work."""
        central = self.line if self.central else []
        slots = [slot for r in ([queue.replica] if queue.replica else central) for slot in r.slots]
        return sorted((s for s in slots if not s.batch), key=lambda s: (s.since, s.number))

    def is_over(self, since: float, before_waits: bool) -> bool:
        """Whether the wait for a batch is over; `before_waits` when it is not yet the turn of waits that end now."""
        over = since + self.wait_s
        return over < self.now or (over == self.now and not before_waits)

    def start_all(self, _: None) -> None:
        """What completions, new replicas, what came back and a decision allow."""
        self.stirred = False
        for queue in self.queues():
            self.dispatch(queue, before_waits=True)

    def dispatch(self, queue: Queue, before_waits: bool = False) -> None:
        """Closes a batch that is due, and gives free slots what is due."""
        full = len(queue.open) >= self.max_batch
        if queue.closes and queue.open and (full or self.is_over(queue.opened, before_waits)):
            queue.closed.append(queue.open)
            queue.open = []
        while free := self.free(queue):
            # what a slot that comes free just now may take is a start that its completion allows
            batch = self.take(queue, before_waits and free[0].since < self.now)
            if batch is None:
                break
            if batch:
                self.start(batch, free[0])
        self.part(queue.replica)

    def take(self, queue: Queue, before_waits: bool) -> list[Request] | None:
        """The living of the next batch; None if none is due."""
        if queue.closes:
            if not queue.closed:
                return None
            line, most = queue.closed.pop(0), math.inf
        else:
            line, most = queue.open, self.max_batch
            while True:
                if not line or not (len(line) >= most or self.is_over(line[0].arrival, before_waits)):
                    return None
                if not line[0].dead(self.now):
                    break
                self.sweep(queue)
        batch: list[Request] = []
        while line and len(batch) < most:
            request = line.pop(0)
            if request.dead(self.now):
                request.leave(request.death, self.now)
            else:
                batch.append(request)
        return batch

    def start(self, requests: list[Request], slot: Slot) -> None:
        fixed, each, noise, law = self.laws[slot.replica.variant, slot.replica.node.pool.name]
        n, luck = len(requests), uniform(self.seeds["seed_noise"], requests[0].number)
        seconds = fixed[n] + each[n] * sum(r.demand for r in requests)
        if idle := law.idle:
            slot.cold = 1 - (1 - slot.cold) * math.exp((slot.since - self.now) / (idle.cooling_ms / 1e3))
            seconds += idle.extra_ms / 1e3 * slot.cold
        seconds = seconds * slot.replica.pace * quantile(noise, luck)
        if law.stalls:
            lasts = law.stalls.mean_ms / 1e3
            hit = law.stalls.per_s * (seconds + lasts * (1 - math.exp((slot.since - self.now) / lasts)))
            luck = uniform(self.seeds["seed_noise"] + 2, requests[0].number)
            if luck < hit:
                seconds -= lasts * math.log(max(luck, 1e-12) / hit)
        if idle:
            slot.cold *= math.exp(-seconds / (idle.warming_ms / 1e3))
        slot.batch = Batch(requests, self.now, self.now + seconds)
        self.batches.append(slot.batch)
        for request in requests:
            request.outcome = "executing"
