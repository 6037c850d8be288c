"""The reference simulator: what `pilotage.engine` says it does, written again in plain Python.

Slow, small and separate on purpose. It shares with the engine only the specifications of `pilotage.world` and
their tables; it keeps a log of requests, batches and replicas, and every counter is worked out from that log
afterwards, where the engine keeps running sums.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from dataclasses import dataclass, field

from pilotage.world.servers import log_normal_table

READINESS, COMPLETION, WELCOME, ARRIVAL, TIMER = range(5)  # the order of events at one instant
_MASK = (1 << 64) - 1


def draw(seed: int, number: int) -> int:
    """The number-th output of SplitMix64 started at `seed`."""
    z = (seed + 0x9E3779B97F4A7C15 * (number + 1)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, number: int) -> float:
    return (draw(seed, number) >> 11) * 2.0**-53


def quantile(table: list[float], u: float) -> float:
    """Half the table spans all of [0, 1] but the last cell, the other half spans the last cell."""
    cells = len(table) // 2
    k, x = divmod(u * cells, 1.0)
    if k == cells - 1:
        j, x = divmod(x * cells, 1.0)
        k += j
    return table[int(k)] + (table[int(k) + 1] - table[int(k)]) * x


def bucket(latency_s: float) -> int:
    """64 equal buckets to each octave, from 2**-14 s up; 34 octaves."""
    mantissa, exponent = math.frexp(max(latency_s, 2.0**-14))
    return min((exponent + 13) * 64 + int((2 * mantissa - 1) * 64), 34 * 64 - 1)


def bucket_midpoint_s(b: int) -> float:
    return 2.0 ** (b // 64 - 14) * (1 + (b % 64 + 0.5) / 64)


@dataclass(eq=False)
class Request:
    number: int
    arrival: float
    waits: float  # how long until it dies
    death: str  # how it dies if it does: timed_out or abandoned
    demand: float
    outcome: str = "waiting"  # then executing, and served, rejected, timed_out or abandoned
    left: float = math.inf
    latency: float = math.nan
    replica: int = -1  # ordinal of the one that serves it

    def dead(self, now: float) -> bool:
        return now - self.arrival > self.waits


@dataclass(eq=False)
class Queue:
    number: int
    open: deque[Request] = field(default_factory=deque)  # all that wait, or the batch that is still open
    closed: deque[deque[Request]] = field(default_factory=deque)
    opened: float = math.nan

    @property
    def waiting(self) -> int:
        return len(self.open) + sum(map(len, self.closed))


@dataclass(eq=False)
class Replica:
    index: int  # its place among the service's replicas; a later one may take it again
    ordinal: int
    pool: str
    ordered: float
    ready: float
    queue: Queue
    running: list[list[Request] | None]  # by execution slot
    free: list[float]  # since when each slot has been free
    state: str = "starting"  # then ready, draining, gone
    gone: float = math.inf

    @property
    def outstanding(self) -> int:
        return self.queue.waiting + sum(len(batch) for batch in self.running if batch)


class ServiceRun:
    """One service of one world."""

    def __init__(self, world: Reference, service, arrivals: list[float], seeds: dict[str, int]) -> None:
        self.world, self.service, self.server, self.seeds = world, service, service.server, seeds
        self.central = self.server.routing == "central"
        self.wait_s = self.server.batch_wait_ms / 1e3
        self.variant = service.variants[0]
        laws, most = self.variant.latency, self.server.max_batch
        self.laws = {p: [x.tolist() for x in laws[p].batch_times_s(most)] for p in service.pools}
        self.noises = {p: log_normal_table(laws[p].noise_cv).tolist() for p in service.pools}
        self.loads = log_normal_table(self.variant.load_cv).tolist()
        self.demands = service.demand.table().tolist()
        self.max_batch, self.pool, self.turn = most, None, 0
        self.heap = [(t, ARRIVAL, k) for k, t in enumerate(arrivals)]
        self.queue = Queue(0)  # the central queue, or the door
        self.timers: set[int] = set()  # numbers of queues that have a timer running
        self.requests: list[Request] = []
        self.batches: list[tuple[float, float, int]] = []  # start, end, size
        self.replicas: list[Replica] = []  # all there ever were
        self.holds: dict[int, Replica] = {}  # the latest replica of every place
        self.line: list[Replica] = []  # ready ones, longest ready first
        self.idle: list[tuple[Replica, int]] = []  # central routing: idle slots
        self.books = (0.0, 0.0, 0.0)
        self.room = min(sum(world.pools[p].max_nodes for p in service.pools), 2 * service.max_replicas + 8)
        self.pending = min(service.initial_replicas, self.room)

    # --- replicas ------------------------------------------------------------------------------------
    def place(self, now: float, at_once: bool = False) -> bool:
        """Gives one pending replica a node, if there is one."""
        pools, ordinal, seed = self.world.pools, len(self.replicas), self.seeds["seed_start"]
        choice = [self.pool] if self.pool else self.service.pools
        pool = next((p for p in choice if self.world.used(p) < pools[p].max_nodes), None)
        taken = {r.index for r in self.replicas if r.state != "gone"}
        index = next((k for k in range(self.room) if k not in taken), None)
        if pool is None or index is None:
            return False
        boot_s = pools[pool].boot_s * quantile(
            self.world.boots[pool], uniform(self.world.seed_nodes, 8 * self.world.nodes)
        )
        self.world.nodes += 1
        load_s = self.variant.load_s * quantile(self.loads, uniform(seed, 4 * ordinal + 1))
        due = now if at_once else now + boot_s + load_s
        slots = [None] * self.server.batches_in_flight
        replica = Replica(index, ordinal, pool, now, due, Queue(index + 1), slots, [due] * len(slots))
        self.pending -= 1
        self.replicas.append(replica)
        self.holds[index] = replica
        if at_once:
            self.serve(replica)
        else:
            heapq.heappush(self.heap, (due, READINESS, index))
        return True

    def serve(self, replica: Replica) -> None:
        replica.state = "ready"
        self.line.append(replica)
        if self.central:
            self.idle.extend((replica, j) for j in range(len(replica.running)))

    def release(self, count: int, now: float) -> None:
        taken = min(count, self.pending)
        self.pending -= taken
        for state in ("starting", "ready"):
            for r in reversed(self.replicas):
                old_enough = now - r.ordered >= self.world.pools[r.pool].min_lifetime_s - 1e-9
                if taken < count and r.state == state and old_enough:
                    taken += 1
                    r.state = "draining"
                    if state == "starting":
                        r.ready = math.inf  # it will never be
                    else:
                        self.line.remove(r)
                        self.idle = [slot for slot in self.idle if slot[0] is not r]
                    self.part(r, now)

    def part(self, replica: Replica, now: float) -> None:
        """A draining replica goes when it has nothing left to do."""
        if replica.state == "draining" and not replica.outstanding:
            replica.state, replica.gone = "gone", now

    # --- queues and batches --------------------------------------------------------------------------
    def closing(self, queue: Queue) -> bool:
        """Whether batches close in this queue: not at the door."""
        return self.server.former == "closed" and (self.central or queue.number > 0)

    def sweep(self, line: deque[Request], now: float) -> None:
        """Buries the dead at the head of a line."""
        while line and line[0].dead(now):
            dead = line.popleft()
            dead.outcome, dead.left = dead.death, now

    def sweep_all(self, queue: Queue, now: float) -> None:
        """Sweeps all that wait, batch by batch; the dead in an open batch stay in it."""
        for batch in queue.closed if self.closing(queue) else [queue.open]:
            self.sweep(batch, now)
            if batch:
                break
        queue.closed = deque(batch for batch in queue.closed if batch)

    def form(self, queue: Queue, now: float) -> None:
        """Closes the open batch when it is due."""
        if self.closing(queue) and queue.open:
            due = queue.opened + self.wait_s
            if len(queue.open) >= self.max_batch or due <= now:
                queue.closed.append(queue.open)
                queue.open = deque()
            else:
                self.wake(queue, due)

    def wake(self, queue: Queue, due: float) -> None:
        """A queue has one timer at a time; if it comes too early, it is set again."""
        if queue.number not in self.timers:
            self.timers.add(queue.number)
            heapq.heappush(self.heap, (due, TIMER, queue.number))

    def take(self, queue: Queue, now: float) -> list[Request] | None:
        """The living of the next batch that is due; None if none is due."""
        if self.closing(queue):
            line, most = (queue.closed.popleft(), math.inf) if queue.closed else (deque(), 0)
        else:
            line, most = queue.open, self.max_batch
            while line:
                if len(line) < most and line[0].arrival + self.wait_s > now:
                    self.wake(queue, line[0].arrival + self.wait_s)
                    return None
                if not line[0].dead(now):
                    break
                self.sweep(line, now)
        if not line:
            return None
        batch: list[Request] = []
        self.sweep(line, now)
        while line and len(batch) < most:
            batch.append(line.popleft())
            if len(batch) < most:
                self.sweep(line, now)
        return batch

    def dispatch(self, queue: Queue, replica: Replica | None, now: float) -> None:
        """Gives due batches to free slots: of the replica, or of all if the queue is central."""
        while self.idle if replica is None else None in replica.running:
            batch = self.take(queue, now)
            if batch is None:
                return
            if batch:
                slots = (
                    [(replica, j) for j, b in enumerate(replica.running) if b is None]
                    if replica
                    else self.idle
                )
                who, j = min(slots, key=lambda slot: (slot[0].free[slot[1]], slot[0].index, slot[1]))
                if replica is None:
                    self.idle.remove((who, j))
                fixed, variable = self.laws[who.pool]
                n, luck = len(batch), uniform(self.seeds["seed_noise"], batch[0].number)
                seconds = fixed[n] + variable[n] * (sum(r.demand for r in batch) / n)
                end = now + seconds * quantile(self.noises[who.pool], luck)
                who.running[j] = batch
                for request in batch:
                    request.outcome, request.replica = "executing", who.ordinal
                self.batches.append((now, end, n))
                heapq.heappush(self.heap, (end, COMPLETION, who.index * len(who.running) + j))

    def route(self, request: Request, now: float) -> None:
        """Sends a request to the central queue, to a replica, or to the door if none is ready."""
        line, m, replica = self.line, len(self.line), None
        if m and self.server.routing == "round-robin":
            replica = line[self.turn % m]
            self.turn += 1
        elif m and self.server.routing == "least-outstanding":
            replica = min(line, key=lambda r: r.outstanding)
        elif m and self.server.routing == "power-of-two":
            bits = draw(self.seeds["seed_route"], request.number)
            i, j = (bits >> 32) * m >> 32, (bits & 0xFFFFFFFF) * (m - 1) >> 32  # j among the others
            replica = min([line[i], *(line[:i] + line[i + 1 :])[j : j + 1]], key=lambda r: r.outstanding)
        queue = replica.queue if replica else self.queue
        if queue.waiting >= (self.server.queue_limit or math.inf):
            request.outcome, request.left = "rejected", now
            return
        queue.opened = queue.opened if queue.open else now
        queue.open.append(request)
        self.form(queue, now)
        if self.central or replica:
            self.dispatch(queue, replica, now)

    # --- events --------------------------------------------------------------------------------------
    def arrive(self, number: int, now: float) -> None:
        timeout, patience = self.server.request_timeout_s or math.inf, math.inf
        if self.server.patience_s:
            patience = -math.log1p(-uniform(self.seeds["seed_patience"], number)) * self.server.patience_s
        death = "timed_out" if timeout <= patience else "abandoned"
        demand = quantile(self.demands, uniform(self.seeds["seed_demand"], number))
        self.requests.append(Request(number, now, min(timeout, patience), death, demand))
        self.route(self.requests[-1], now)

    def complete(self, number: int, now: float) -> None:
        index, j = divmod(number, self.server.batches_in_flight)
        replica = self.holds[index]
        for request in replica.running[j]:
            request.outcome, request.left = "served", now
            request.latency = now - request.arrival + self.world.pools[replica.pool].network_ms / 1e3
        replica.running[j], replica.free[j] = None, now
        others = (
            self.idle if self.central else [(replica, i) for i, b in enumerate(replica.running) if b is None]
        )
        # where a slot was free before, what becomes due now does not owe it to this completion
        enabled = all(who.free[i] == now for who, i in others)
        if self.central and replica.state == "ready":
            self.idle.append((replica, j))
        if enabled and not self.central:
            self.dispatch(replica.queue, replica, now)
        elif enabled and replica.state == "ready":
            self.dispatch(self.queue, None, now)
        self.part(replica, now)

    def get_ready(self, index: int, now: float) -> None:
        replica = self.holds[index]
        if replica.state != "starting" or replica.ready != now:
            return  # the one that was to be ready now has been released
        self.serve(replica)
        if self.central:
            heapq.heappush(self.heap, (now, WELCOME, index))
            return
        self.sweep(self.queue.open, now)
        while self.queue.open:
            self.route(self.queue.open.popleft(), now)
            self.sweep(self.queue.open, now)

    def welcome(self, _: int, now: float) -> None:
        """What a new replica allows, once the completions of the same time are known."""
        self.dispatch(self.queue, None, now)

    def ring(self, number: int, now: float) -> None:
        self.timers.discard(number)
        replica = self.holds[number - 1] if number else None
        self.act_on(replica.queue if replica else self.queue, replica, now)

    def act_on(self, queue: Queue, replica: Replica | None, now: float) -> None:
        self.form(queue, now)
        self.dispatch(queue, replica, now)
        if replica:
            self.part(replica, now)

    def refresh(self, now: float) -> None:
        """The end of a decision: sweeps, and batches that became due."""
        self.sweep_all(self.queue, now)
        if self.central:
            self.act_on(self.queue, None, now)
            return
        for _, replica in sorted(self.holds.items()):
            if replica.state in ("ready", "draining"):
                self.sweep_all(replica.queue, now)
                self.act_on(replica.queue, replica, now)

    def until(self, end: float) -> None:
        act = {
            READINESS: self.get_ready,
            COMPLETION: self.complete,
            WELCOME: self.welcome,
            ARRIVAL: self.arrive,
            TIMER: self.ring,
        }
        while self.heap and self.heap[0][0] < end:
            now, kind, number = heapq.heappop(self.heap)
            act[kind](number, now)

    # --- counters, from the log ----------------------------------------------------------------------
    def count(self, t0: float, t1: float) -> dict[str, float]:
        """What happened in [t0, t1), and how things stand at t1, which must be now."""

        def overlap(a, b):
            return max(0.0, min(b, t1) - max(a, t0))

        arrived = [r.arrival for r in self.requests if t0 <= r.arrival < t1]
        left = [r for r in self.requests if t0 <= r.left < t1]
        latencies = sorted(r.latency for r in left if r.outcome == "served")
        started = [size for start, _, size in self.batches if t0 <= start < t1]
        ended, outcomes = Counter(r.outcome for r in left), Counter(r.outcome for r in self.requests)
        states = Counter(r.state for r in self.replicas)
        before, self.books = self.books, self.bill(t1)
        node_usd, node_s, replica_s = (x - y for x, y in zip(self.books, before, strict=True))
        p95 = latencies[math.ceil(0.95 * len(latencies)) - 1] if latencies else math.nan
        return {
            "seconds": self.world.scenario.tick_s,
            "arrived": len(arrived),
            "late": sum(x > self.service.slo_ms / 1e3 for x in latencies),
            "overdue": 0,
            "lost": 0,
            "failed": 0,
            "latency_s": sum(latencies),
            "latency_p95_s": bucket_midpoint_s(bucket(p95)) if latencies else p95,
            "peak_second": max(Counter(int(t - t0) for t in arrived).values(), default=0),
            "inside_s": sum(overlap(r.arrival, r.left) for r in self.requests),
            "busy_s": sum(overlap(start, end) for start, end, _ in self.batches),
            "ready_s": sum(overlap(r.ready, r.gone) for r in self.replicas) * self.server.batches_in_flight,
            "batches": len(started),
            "batched": sum(started),
            "pending": self.pending,
            "max_batch": self.max_batch,
            "wrong": len(latencies) * (1 - self.variant.accuracy),
            "node_usd": node_usd,
            "node_s": node_s,
            "replica_s": replica_s,
            **{name: ended[name] for name in ("served", "rejected", "timed_out", "abandoned")},
            **{name: outcomes[name] for name in ("waiting", "executing")},
            **{name: states[name] for name in ("ready", "starting", "draining")},
        }

    def bill(self, now: float) -> tuple[float, float, float]:
        """Dollars, billed seconds and lived seconds of all replicas up to now."""
        usd = billed_s = lived_s = 0.0
        for r in self.replicas:
            pool, life = self.world.pools[r.pool], min(now, r.gone) - r.ordered
            paid = max(life, pool.billing_minimum_s)
            if pool.billing_granularity_s:
                paid = math.ceil(paid / pool.billing_granularity_s - 1e-9) * pool.billing_granularity_s
            usd += paid / 3600 * pool.price_usd_per_hour
            billed_s += paid
            lived_s += life
        return usd, billed_s, lived_s

    def finish(self, now: float) -> dict[str, int]:
        """What the end of the run adds: the dead, and those that are overdue."""
        dead = [r for r in self.requests if r.outcome == "waiting" and r.dead(now)]
        for r in dead:
            r.outcome = r.death
        inside = [r for r in self.requests if r.outcome in ("waiting", "executing")]
        deaths = Counter(r.death for r in dead)
        overdue = sum(now - r.arrival > self.service.slo_ms / 1e3 for r in inside)
        return {"timed_out": deaths["timed_out"], "abandoned": deaths["abandoned"], "overdue": overdue}

    @property
    def histogram(self) -> Counter[int]:
        return Counter(bucket(r.latency) for r in self.requests if r.outcome == "served")


class Reference:
    """One world: services that share pools. Orders are (order, release, max_batch, pool index, variant), as ORDER.

    Plain worlds only: one replica per node, one variant, nothing fails."""

    def __init__(
        self, scenario, arrivals: list[list[float]], seeds: list[dict[str, int]], seed_nodes: int
    ) -> None:
        self.scenario, self.now = scenario, 0.0
        self.seed_nodes, self.nodes = seed_nodes, 0  # nodes that were ever opened
        self.pools = {pool.name: pool for pool in scenario.pools}
        self.boots = {name: log_normal_table(pool.boot_cv).tolist() for name, pool in self.pools.items()}
        self.runs: list[ServiceRun] = []
        for service, times, seed in zip(scenario.services, arrivals, seeds, strict=True):
            self.runs.append(ServiceRun(self, service, times, seed))
        self.place(0.0, at_once=True)

    def used(self, pool: str) -> int:
        """Nodes of a pool in use by all services."""
        return sum(r.pool == pool and r.state != "gone" for run in self.runs for r in run.replicas)

    def place(self, now: float, at_once: bool = False) -> None:
        """Gives pending replicas nodes, one per service and round, until nothing fits."""
        while sum([run.place(now, at_once) for run in self.runs if run.pending]):
            pass

    def advance(self, orders: list[tuple[int, int, int, int, int]]) -> list[dict[str, float]]:
        now, end = self.now, self.now + self.scenario.tick_s
        for run, (order, release, max_batch, pool, _) in zip(self.runs, orders, strict=True):
            run.pool = list(self.pools)[pool] if pool >= 0 else run.pool
            run.release(release, now)
            run.pending += order
            run.max_batch = min(max_batch, run.server.max_batch) if max_batch else run.max_batch
        self.place(now)
        for run in self.runs:
            run.refresh(now)
            run.until(end)
        self.now = end
        return [run.count(now, end) for run in self.runs]

    def finish(self) -> list[dict[str, int]]:
        return [run.finish(self.now) for run in self.runs]
