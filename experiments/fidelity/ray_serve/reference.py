"""Ray Serve's batch queue and router in plain Python: the rules, one after the other, with nothing made fast.

Rules and evidence: the README. What it adds to a perfect power-of-two router is what makes Ray's collapse
when replicas are full: requests wait in the router for *tasks* that poll; a task that has found a free slot
sends until its *own* request is served, before the counts that it looks at have moved; the replica rejects
what does not fit, and rejected requests return ahead of those that the tasks own. The router is one event
loop, a queue of handles with a cost each, and learns of answers and completions in the order of that queue.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from recording import Deployment, Overheads


@dataclass(frozen=True)
class Router:
    """Constants of the router: Ray 2.60's defaults, and times measured on an idle machine."""

    tasks_per_replica: int = 2
    max_tasks: int = 50
    tries_at_once: int = 2  # same-node pass and first retry
    backoff_s: float = 0.025
    max_backoff_s: float = 0.5
    send_s: float = 0.001  # of the loop, per request sent
    answer_s: float = 0.0005  # of the loop, per answer
    reject_s: float = 0.0015  # of the replica, per request it takes in or rejects
    hop_s: float = 0.0015  # median of the way between router and replica
    hop_spread: float = 1.0  # its standard deviation, on a log scale
    timer_s: float = 0.001  # timers fire up to this late


class Replica:
    """One former and one executor: a batch closes at its size or on its own clock, and is never topped up."""

    def __init__(self, deployment: Deployment, overheads: Overheads, end_s: np.ndarray, batch: np.ndarray):
        self.deployment, self.overheads = deployment, overheads
        self.end_s, self.batch = end_s, batch
        self.forming: list[int] = []
        self.close_s = math.inf
        self.free_s = -math.inf
        self.completions: deque[float] = deque()
        self.untold: deque[float] = deque()  # completions that the router has not heard of
        self.ongoing = 0
        self.cached = 0  # what the router believes `ongoing` to be
        self.answered_s = -math.inf

    def put(self, request: int, now_s: float) -> None:
        self.ongoing += 1
        self.forming.append(request)
        if len(self.forming) == 1:
            self.close_s = now_s + self.overheads.window_s
        if len(self.forming) == self.deployment.max_batch:
            self.close(now_s)

    def close(self, now_s: float) -> None:
        size = len(self.forming)
        service_s = self.deployment.base_s + self.deployment.per_item_s * size + self.overheads.batch_s
        self.free_s = max(now_s, self.free_s) + service_s
        self.end_s[self.forming] = self.free_s
        self.batch[self.forming] = size
        self.completions.extend([self.free_s] * size)
        self.forming, self.close_s = [], math.inf

    def advance(self, now_s: float) -> None:
        if self.forming and self.close_s <= now_s:
            self.close(self.close_s)
        while self.completions and self.completions[0] <= now_s:
            self.untold.append(self.completions.popleft())
            self.ongoing -= 1

    def hear(self, ready_s: float) -> None:
        """The router handles what completed until then."""
        self.advance(ready_s)
        while self.untold and self.untold[0] <= ready_s:
            self.untold.popleft()
            self.cached = max(0, self.cached - 1)


@dataclass(eq=False)
class Task:
    """A routing task: polls until the request that it took for its own is served, by it or by another."""

    wake_s: float
    own: int | None = None
    tries: int = 0
    attempt: int = 0
    probing: list[Replica] = field(default_factory=list)


Handle = tuple[float, int, "Replica | Task"]  # ready, request to send to the replica; or -1 and a task to end
Answer = tuple[float, int, Replica, int]  # ready, rejected request or -1, replica, its count


@dataclass
class Simulation:
    deployment: Deployment
    send_s: np.ndarray
    overheads: Overheads
    seed: int
    router: Router = field(default_factory=Router)

    def __post_init__(self) -> None:
        requests = len(self.send_s)
        self.random = np.random.default_rng(self.seed)
        self.end_s = np.full(requests, math.nan)
        self.batch = np.zeros(requests, int)
        self.rejected = 0
        self.replicas: list[Replica] = []
        self.busy_until_s = -math.inf
        self.pending: list[int] = []  # in order of arrival
        self.tasks: list[Task] = []  # in order of their start
        self.owned: dict[int, Task] = {}
        self.handles: deque[Handle] = deque()
        self.answers: list[Answer] = []

    def run(self) -> dict[str, np.ndarray]:
        """Latency, batch size of every request, in the order of `send_s`."""
        starting, arrivals = deque(sorted(self.deployment.ready_s)), deque(enumerate(self.send_s))
        while True:
            task = min(self.tasks, key=lambda t: t.wake_s, default=None)
            ready = (
                starting[0] if starting else math.inf,
                self.handles[0][0] if self.handles else math.inf,
                self.answers[0][0] if self.answers else math.inf,
                arrivals[0][1] if arrivals else math.inf,
                task.wake_s if task else math.inf,
            )
            at_s = min(ready)
            if at_s == math.inf:
                break
            now_s = max(at_s, self.busy_until_s)
            match ready.index(at_s):  # ties: in this order
                case 0:
                    starting.popleft()
                    self.replicas.append(Replica(self.deployment, self.overheads, self.end_s, self.batch))
                    self.start_tasks(at_s)
                case 1:
                    self.handle(*self.handles.popleft(), now_s)
                case 2:
                    self.answer(*self.answers.pop(0), now_s)
                case 3:
                    self.arrive(at_s, arrivals.popleft()[0], now_s)
                case _:
                    assert task is not None
                    self.poll(task, now_s)
        for replica in self.replicas:
            replica.advance(math.inf)
        delay_s = np.quantile(self.overheads.request_s, self.random.random(len(self.send_s)))
        return {"latency_s": self.end_s + delay_s - self.send_s, "batch": self.batch}

    def hop_s(self) -> float:
        return self.router.hop_s * math.exp(self.router.hop_spread * self.random.standard_normal())

    def drawn(self) -> list[Replica]:
        """Two distinct replicas, in random order."""
        count = len(self.replicas)
        if count < 2:
            return self.replicas[:]
        first, second = self.random.integers(count), self.random.integers(count - 1)
        return [self.replicas[first], self.replicas[second + (second >= first)]]

    def shortest(self, counts: list[tuple[Replica, int]]) -> Replica | None:
        """The usable replica with the smallest count, the first of equals."""
        replica, count = min(counts, key=lambda c: c[1], default=(None, 0))
        return replica if count < self.deployment.max_ongoing else None

    def target(self) -> int:
        most = min(self.router.max_tasks, self.router.tasks_per_replica * len(self.replicas))
        return min(len(self.pending), most)

    def unowned(self) -> int | None:
        return next((request for request in self.pending if request not in self.owned), None)

    def start_tasks(self, now_s: float) -> None:
        if self.unowned() is not None:
            self.tasks += [Task(now_s) for _ in range(self.target() - len(self.tasks))]

    def arrive(self, at_s: float, request: int, now_s: float) -> None:
        if self.replicas and not (self.pending or self.tasks or self.handles or self.answers):
            drawn = self.drawn()
            for replica in drawn:
                replica.hear(at_s)
            found = self.shortest([(replica, replica.cached) for replica in drawn])
            if found:
                found.advance(now_s)
                found.put(request, now_s)
                found.cached += 1
                return
        self.pending.append(request)
        self.start_tasks(now_s)

    def handle(self, at_s: float, request: int, of: Replica | Task, now_s: float) -> None:
        if isinstance(of, Task):
            self.tasks.remove(of)
            self.start_tasks(now_s)
            return
        replica = of
        replica.hear(at_s)
        replica.cached += 1
        self.busy_until_s = now_s + self.router.send_s
        hit_s = self.busy_until_s + self.router.hop_s
        replica.advance(hit_s)
        replica.answered_s = max(replica.answered_s, hit_s) + self.router.reject_s
        if replica.ongoing < self.deployment.max_ongoing:
            replica.put(request, hit_s)
            request = -1
        self.rejected += request >= 0
        answer = (replica.answered_s + self.hop_s(), request, replica, replica.ongoing)
        insort(self.answers, answer, key=lambda a: a[:2])

    def answer(self, at_s: float, request: int, replica: Replica, count: int, now_s: float) -> None:
        replica.hear(at_s)
        replica.cached = count
        self.busy_until_s = now_s + self.router.answer_s
        if request >= 0:
            insort(self.pending, request)
            self.start_tasks(now_s)

    def poll(self, task: Task, now_s: float) -> None:
        for replica in self.replicas:
            replica.hear(task.wake_s)
            replica.advance(now_s)
        probed = [(replica, replica.ongoing) for replica in task.probing]
        for replica, count in probed:
            replica.cached = count
        task.probing = []
        while True:
            if task.own is None:
                request = self.unowned() if len(self.tasks) <= self.target() else None
                if request is None:
                    self.tasks.remove(task)
                    break
                task.own, task.tries, task.attempt = request, 0, 0
                self.owned[request] = task
            if probed:
                found = self.shortest(probed)
                probed = []
            else:
                drawn = self.drawn()
                found = self.shortest([(replica, replica.cached) for replica in drawn])
                full = [replica for replica in drawn if replica.cached >= self.deployment.max_ongoing]
                if found is None:  # ask the replicas; the task goes on when their answers are there
                    task.probing = full
                    task.wake_s = now_s + max(self.hop_s() + self.hop_s() for _ in full)
                    break
                for replica in full:
                    replica.cached = replica.ongoing
            if found:  # for the oldest, which need not be its own; the cached count does not move yet
                oldest = self.pending.pop(0)
                owner = self.owned.pop(oldest, None)
                if owner and owner is not task:  # cancelled: it counts until the loop gets to it
                    owner.wake_s, owner.probing = math.inf, []
                    self.handles.append((now_s, -1, owner))
                self.handles.append((now_s, oldest, found))
                if owner is task:
                    task.own = None
                    continue
            task.tries += 1
            if task.tries > self.router.tries_at_once:
                backoff_s = min(self.router.backoff_s * 2**task.attempt, self.router.max_backoff_s)
                task.wake_s = now_s + backoff_s + self.router.timer_s * self.random.random()
                task.attempt += 1
                break
        self.busy_until_s = now_s
        self.start_tasks(now_s)
