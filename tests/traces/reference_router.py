"""Ray Serve's router with closed batches, in plain Python: the rules of `engine.router`, with nothing made fast.

One service whose replicas become ready at given times and stay. Draws are by counter, as the engine's.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pilotage.world.servers import Router
from tests.traces.reference import draw, uniform


@dataclass(eq=False)
class Replica:
    """One former and one executor: a batch closes at its size or on its own clock, and is never topped up."""

    max_batch: int
    wait_s: float
    batch_s: Callable[[int], float]
    done_s: dict[int, float]
    forming: list[int] = field(default_factory=list)
    close_s: float = math.inf
    free_s: float = -math.inf
    batches: list[tuple[float, float, int]] = field(default_factory=list)  # start, end, size
    completions: deque[float] = field(default_factory=deque)
    untold: deque[float] = field(default_factory=deque)  # completions that the router has not heard of
    ongoing: int = 0
    cached: int = 0  # what the router believes `ongoing` to be
    answered_s: float = 0.0

    def put(self, request: int, now_s: float) -> None:
        self.ongoing += 1
        self.forming.append(request)
        if len(self.forming) == 1:
            self.close_s = now_s + self.wait_s
        if len(self.forming) == self.max_batch or self.close_s <= now_s:
            self.close(now_s)

    def close(self, now_s: float) -> None:
        size = len(self.forming)
        start_s = max(now_s, self.free_s)
        self.free_s = start_s + self.batch_s(size)
        self.batches.append((start_s, self.free_s, size))
        self.done_s |= dict.fromkeys(self.forming, self.free_s)
        self.completions.extend([self.free_s] * size)
        self.forming, self.close_s = [], math.inf

    def advance(self, now_s: float) -> None:
        if self.forming and self.close_s < now_s:
            self.close(self.close_s)
        while self.completions and self.completions[0] <= now_s:
            self.untold.append(self.completions.popleft())
            self.ongoing -= 1

    def look(self, ready_s: float, now_s: float) -> None:
        """The router looks at `now_s`, and hears of what completed until `ready_s`."""
        self.advance(now_s)
        while self.untold and self.untold[0] <= ready_s:
            self.untold.popleft()
            self.cached = max(0, self.cached - 1)


@dataclass(eq=False)
class Task:
    """A routing task: polls until the request that it took for its own is sent, by it or by another."""

    wake_s: float
    own: int | None = None
    tries: int = 0
    attempt: int = 0
    asked: list[Replica] = field(default_factory=list)


@dataclass
class Simulation:
    """`ready_s`: when each replica is ready, ascending; `batch_s`: seconds of a batch by its size."""

    router: Router
    arrivals_s: Sequence[float]
    ready_s: Sequence[float]
    max_batch: int
    wait_s: float
    batch_s: Callable[[int], float]
    seed_route: int

    def __post_init__(self) -> None:
        self.done_s: dict[int, float] = {}
        self.replicas: list[Replica] = []
        self.busy_until_s = 0.0
        self.pending: list[int] = []  # in order of arrival
        self.tasks: list[Task] = []  # in order of their start
        self.sends: deque[tuple[float, int, Replica]] = deque()
        self.hits: deque[tuple[float, int, Replica]] = deque()
        self.answers: list[tuple[float, int | None, Replica, int]] = []  # refused request, replica, its count
        self.starting = deque(self.ready_s)
        self.coming = deque(enumerate(self.arrivals_s))
        self.draws = 0
        self.seed = (self.seed_route + 1) % 2**64

    # --- draws -----------------------------------------------------------------------------------------
    def counter(self, count: int) -> int:
        self.draws += count
        return self.draws - count + 1

    def hop_s(self) -> float:
        number = self.counter(2)
        radius = math.sqrt(-2 * math.log1p(-uniform(self.seed, number)))
        z = radius * math.cos(2 * math.pi * uniform(self.seed, number + 1))
        return self.router.hop_ms / 1e3 * math.exp(self.router.hop_spread * z)

    def two(self, bits: int) -> list[Replica]:
        """Two different replicas in random order: one from each half of the bits."""
        first, rest = self.replicas[(bits >> 32) * len(self.replicas) >> 32], bits & 0xFFFFFFFF
        if len(self.replicas) == 1:
            return [first]
        others = [replica for replica in self.replicas if replica is not first]
        return [first, others[rest * len(others) >> 32]]

    # --- time ------------------------------------------------------------------------------------------
    def run_until(self, end_s: float) -> None:
        """All that happens before `end_s`."""
        while True:
            task = min(self.tasks, key=lambda t: t.wake_s, default=None)
            ready = (
                self.sends[0][0] if self.sends else math.inf,
                self.answers[0][0] if self.answers else math.inf,
                self.coming[0][1] if self.coming else math.inf,
                task.wake_s if task else math.inf,
            )
            at_s = min(ready)
            now_s = max(at_s, self.busy_until_s)
            starts_s = self.starting[0] if self.starting else math.inf
            hits_s = self.hits[0][0] if self.hits else math.inf
            if min(now_s, starts_s, hits_s) >= end_s:
                break
            if starts_s <= min(now_s, hits_s):
                self.starting.popleft()
                self.replicas.append(Replica(self.max_batch, self.wait_s, self.batch_s, self.done_s))
                self.start_tasks(starts_s)
            elif hits_s <= now_s:
                self.hit(*self.hits.popleft())
            elif at_s == ready[0]:
                self.send(*self.sends.popleft(), now_s)
            elif at_s == ready[1]:
                self.answer(*self.answers.pop(0), now_s)
            elif at_s == ready[2]:
                self.arrive(at_s, self.coming.popleft()[0], now_s)
            else:
                assert task is not None
                self.poll(task, now_s)
        for replica in self.replicas:
            replica.advance(end_s)

    # --- the router ------------------------------------------------------------------------------------
    def shortest(self, counts: list[tuple[Replica, int]]) -> Replica | None:
        """The replica with the smallest count, the first of equals, if it has room."""
        replica, count = min(counts, key=lambda c: c[1], default=(None, math.inf))
        return replica if count < self.router.max_ongoing_requests else None

    def target(self) -> int:
        most = min(self.router.max_tasks, self.router.tasks_per_replica * len(self.replicas))
        return min(len(self.pending), most)

    def unowned(self) -> int | None:
        owned = {task.own for task in self.tasks}
        return next((request for request in self.pending if request not in owned), None)

    def start_tasks(self, now_s: float) -> None:
        if self.unowned() is not None:
            self.tasks += [Task(now_s) for _ in range(self.target() - len(self.tasks))]

    def arrive(self, at_s: float, request: int, now_s: float) -> None:
        if self.replicas and not (self.pending or self.tasks or self.sends or self.hits or self.answers):
            drawn = self.two(draw(self.seed_route, request))
            for replica in drawn:
                replica.look(at_s, now_s)
            found = self.shortest([(replica, replica.cached) for replica in drawn])
            if found and found.ongoing < self.router.max_ongoing_requests:
                found.put(request, now_s)
                found.cached += 1
                return
        self.pending.append(request)
        self.start_tasks(now_s)

    def send(self, at_s: float, request: int, replica: Replica, now_s: float) -> None:
        for task in self.tasks:
            if task.own == request:  # cancelled, for another has found room for its own
                self.tasks.remove(task)
                self.start_tasks(now_s)
                break
        replica.look(at_s, now_s)
        replica.cached += 1
        self.busy_until_s = now_s + self.router.send_ms / 1e3
        self.hits.append((self.busy_until_s + self.router.hop_ms / 1e3, request, replica))

    def hit(self, now_s: float, request: int, replica: Replica) -> None:
        replica.advance(now_s)
        refused = replica.ongoing >= self.router.max_ongoing_requests
        if not refused:
            replica.put(request, now_s)
        replica.answered_s = max(replica.answered_s, now_s) + self.router.reject_ms / 1e3
        ready_s = replica.answered_s + self.hop_s()
        insort(
            self.answers,
            (ready_s, request if refused else None, replica, replica.ongoing),
            key=lambda answer: answer[0],
        )

    def answer(self, at_s: float, refused: int | None, replica: Replica, count: int, now_s: float) -> None:
        replica.look(at_s, now_s)
        replica.cached = count
        self.busy_until_s = now_s + self.router.answer_ms / 1e3
        if refused is not None:
            insort(self.pending, refused)
            self.start_tasks(now_s)

    def poll(self, task: Task, now_s: float) -> None:
        ready_s = task.wake_s
        asked, task.asked = task.asked, []
        while True:
            if task.own is None:
                task.own = self.unowned() if len(self.tasks) <= self.target() else None
                if task.own is None:
                    self.tasks.remove(task)
                    break
                task.tries, task.attempt = 0, 0
            if asked:
                for replica in asked:
                    replica.look(ready_s, now_s)
                    replica.cached = replica.ongoing
                found = self.shortest([(replica, replica.ongoing) for replica in asked])
                asked = []
            else:
                drawn = self.two(draw(self.seed, self.counter(1)))
                for replica in drawn:
                    replica.look(ready_s, now_s)
                found = self.shortest([(replica, replica.cached) for replica in drawn])
                if found is None:  # asks; goes on when the answers are there
                    task.asked = drawn
                    task.wake_s = now_s + max(self.hop_s() + self.hop_s() for _ in drawn)
                    break
                for replica in drawn:
                    if replica.cached >= self.router.max_ongoing_requests:
                        replica.cached = replica.ongoing
            if found:  # for the oldest, which need not be its own; the count does not move yet
                oldest = self.pending.pop(0)
                self.sends.append((now_s, oldest, found))
                if task.own == oldest:
                    task.own = None
                    continue
                for other in self.tasks:
                    if other.own == oldest:
                        other.wake_s, other.asked = math.inf, []
            task.tries += 1
            if task.tries > self.router.tries_at_once:
                backoff_ms = min(self.router.backoff_ms * 2**task.attempt, self.router.max_backoff_ms)
                jitter = uniform(self.seed, self.counter(1))
                task.wake_s = now_s + backoff_ms / 1e3 + self.router.timer_ms / 1e3 * jitter
                task.attempt += 1
                break
        self.busy_until_s = now_s
        self.start_tasks(now_s)
