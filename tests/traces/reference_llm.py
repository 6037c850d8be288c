"""One LLM replica in plain Python, iteration by iteration, and several behind a router: what the engine must equal.

It shares no code with the engine: lists of dictionaries, KV blocks one by one, a list of prefixes in order of use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(eq=False)
class Request:
    arrival: float
    prompt: int
    output: int
    ids: tuple[int, ...] = ()
    here: float = 0.0
    target: int = 0
    done: int = 0
    prefilled: bool = False
    blocks: list = field(default_factory=list)  # ("own", None) or ("prefix", id)
    holding: bool = False
    restarts: int = 0
    first: float = math.nan
    tokens: list[float] = field(default_factory=list)
    end: float = math.nan
    state: str = "coming"
    cached: int = 0

    def __post_init__(self) -> None:
        self.here, self.target = self.arrival, self.prompt


class Replica:
    def __init__(self, server, law, role: str = "unified", transfer=(0.0, 0.0)) -> None:
        self.s, self.law, self.role, self.transfer = server, law, role, transfer
        self.total = server.blocks
        self.prefixes: dict[int, int] = {}  # id -> holders, in no order
        self.unused: list[int] = []  # ids nobody holds, the least recently used first
        self.queue: list[Request] = []
        self.running: list[Request] = []
        self.flight: list[tuple[Request, int]] = []
        self.now, self.ends = 0.0, math.nan
        self.iterations, self.prefilled, self.produced = 0, 0, 0
        self.holders: list[Request] = []
        self.taken_by_prefixes = 0
        self.passed: list[Request] = []

    # blocks: those of requests by themselves, and of prefixes that somebody holds
    @property
    def per_prefix(self) -> int:
        size = self.s.prefix_block_tokens
        return 0 if size is None or self.role == "decode" else size // self.s.block_tokens

    @property
    def free(self) -> int:
        own = sum(len(r.blocks) for r in self.holders)
        return self.total - own - self.per_prefix * sum(h > 0 for h in self.prefixes.values())

    def make_room(self) -> None:
        """Prefixes that nobody holds go, oldest first, until all fits."""
        while self.free < self.per_prefix * len(self.unused):
            del self.prefixes[self.unused.pop(0)]

    def hits(self, r: Request) -> list[int]:
        if not self.per_prefix:
            return []
        found = []
        for i in r.ids[: (min(r.prompt, r.target) - 1) // self.s.prefix_block_tokens]:
            if i not in self.prefixes:
                break
            found.append(i)
        return found

    def blocks_for(self, tokens: int) -> int:
        return math.ceil(tokens / self.s.block_tokens)

    def admissible(self, r: Request) -> bool:
        found = self.hits(r)
        in_use = sum(self.prefixes[i] > 0 for i in found)
        return self.free - (self.blocks_for(r.target) - in_use * self.per_prefix) >= self.s.watermark_blocks

    def admit(self, r: Request) -> int:
        found, size = self.hits(r), self.s.prefix_block_tokens
        r.prefix_held = []
        for i in found:
            if self.prefixes[i] == 0:
                self.unused.remove(i)
            self.prefixes[i] += 1
            r.prefix_held.append(i)
        r.blocks = [0] * (self.blocks_for(r.target) - len(found) * self.per_prefix)
        r.holding = True
        self.holders.append(r)
        self.make_room()
        if self.per_prefix:
            for i in r.ids[len(found) : min(r.target, r.prompt) // size]:
                if i not in self.prefixes:
                    self.prefixes[i] = 1
                    r.prefix_held.append(i)
                    del r.blocks[-self.per_prefix :]
        cached = len(found) * (size or 0)
        r.cached += cached
        r.done = cached
        return cached

    def release(self, r: Request) -> None:
        for i in reversed(r.prefix_held):
            self.prefixes[i] -= 1
            if self.prefixes[i] == 0:
                self.unused.append(i)
        r.blocks, r.prefix_held, r.holding = [], [], False
        self.holders.remove(r)

    def slots(self, r: Request) -> int:
        return (len(r.blocks) + len(r.prefix_held) * self.per_prefix) * self.s.block_tokens

    # the rules
    def rejection(self, r: Request) -> str:
        longest = r.prompt if self.role == "prefill" else r.prompt + r.output - 1
        if self.s.scheduler == "prefill-first" and longest > self.s.max_tokens:
            return "longer than max_tokens"
        if self.blocks_for(longest) > self.total - max(self.s.watermark_blocks, 1):
            return "larger than the KV cache"
        return ""

    def restart(self, r: Request) -> None:
        self.release(r)
        if r.prefilled or self.s.vidur:
            r.target = r.done
        r.done, r.prefilled, r.restarts, r.state = 0, False, r.restarts + 1, "waiting"
        self.queue.insert(0, r)

    def arrived(self) -> bool:
        return bool(self.queue) and self.queue[0].here <= self.now

    def decode(self, r: Request) -> bool:
        while self.free < 1:
            if self.running:
                self.restart(self.running.pop())
            else:
                self.restart(r)
                return False
        if r.done > self.slots(r):
            r.blocks.append(0)
            self.make_room()
        self.flight.append((r, 1))
        return True

    def form(self) -> None:
        s = self.s
        if self.role == "decode":
            while self.arrived() and self.queue[0].prefilled and len(self.holders) < s.max_batch:
                if self.free - self.blocks_for(self.queue[0].target) < s.watermark_blocks:
                    break
                r = self.queue.pop(0)
                done = r.done
                self.admit(r)
                r.done, r.state = done, "running"
                self.running.append(r)
        if s.scheduler == "prefill-first":
            while self.arrived() and not self.queue[0].prefilled:
                r = self.queue[0]
                new = r.target - len(self.hits(r)) * (s.prefix_block_tokens or 0)
                longest = max([new] + [k for _, k in self.flight])
                if not self.admissible(r) or (len(self.flight) + 1) * longest > s.max_tokens:
                    break
                if len(self.holders) == s.max_batch or len(self.flight) == s.max_batch:
                    break
                self.queue.pop(0)
                self.admit(r)
                self.flight.append((r, new))
            if not self.flight:
                self.running.sort(key=lambda r: r.arrival)
                while self.running:
                    self.decode(self.running.pop(0))
        else:
            budget, going_on = s.chunk_tokens, []
            while self.running:
                r = self.running.pop(0)
                if not r.prefilled:
                    going_on.append(r)
                elif self.decode(r):
                    budget -= 1
            for r in going_on:
                k = max(0, min(r.target - r.done, budget))
                if k == 0:
                    self.running.append(r)
                else:
                    self.flight.append((r, k))
                    budget -= k
            self.running.sort(key=lambda r: r.arrival)
            while self.arrived() and not self.queue[0].prefilled and budget > 0:
                if len(self.holders) == s.max_batch or len(self.flight) == s.max_batch:
                    break
                if not self.admissible(self.queue[0]):
                    break
                r = self.queue.pop(0)
                k = min(r.target - self.admit(r), budget)
                self.flight.append((r, k))
                budget -= k
        prefill = sum(k for r, k in self.flight if not r.prefilled)
        sequences = sum(r.prefilled for r, _ in self.flight)
        context = sum(r.done for r, _ in self.flight)
        square = sum(k * k for r, k in self.flight if not r.prefilled)
        cross = sum(k * r.done for r, k in self.flight if not r.prefilled)
        self.ends = self.now + self.law.seconds(
            float(prefill), float(sequences), float(context), float(square), float(cross)
        )
        self.iterations += 1

    def finish(self) -> None:
        self.now, flight, self.flight = self.ends, self.flight, []
        for r, k in flight:
            r.done += k
            token = r.prefilled
            if not r.prefilled:
                self.prefilled += k
                if r.done == r.target:
                    r.prefilled = token = True
                    r.done += 1
            if token:
                self.produced += 1
                r.tokens.append(self.now)
            if r.done == r.prompt + r.output:
                r.end, r.state = self.now, "served"
                self.release(r)
            elif r.prefilled and self.role == "prefill":
                r.here, r.state = self.now + (self.transfer[0] + self.transfer[1] * r.target), "passed"
                self.release(r)
                self.passed.append(r)
            else:
                self.running.append(r)

    def bring(self, until: float) -> None:
        while True:
            if self.flight:
                if self.ends > until:
                    return
                self.finish()
            if not self.running:
                if not self.queue:
                    return
                self.now = max(self.now, self.queue[0].here)
            if self.now >= until:
                return
            self.form()
            assert self.flight, "nothing can run, and yet something waits"

    @property
    def outstanding(self) -> int:
        return len(self.queue) + len(self.running) + len(self.flight)

    def cost(self, r: Request) -> float:
        new = self.blocks_for(r.target) - len(self.hits(r)) * self.per_prefix
        waiting = sum(self.blocks_for(q.target) for q in self.queue)
        return self.s.overlap_weight * (new + waiting) + (self.total - self.free)


def serve(server, law, requests: list[Request], replicas: list[Replica], first=0, until=math.inf) -> None:
    """All requests, in order of the time they are here, and all replicas `until` then; `first` came before them."""
    for turn, r in enumerate(requests, first):
        for replica in replicas:
            replica.bring(r.here)
        if server.routing == "round-robin":
            chosen = replicas[turn % len(replicas)]
        elif server.routing == "least-outstanding":
            chosen = min(replicas, key=lambda replica: replica.outstanding)
        else:
            chosen = min(replicas, key=lambda replica: replica.cost(r))
        why = chosen.rejection(r)
        r.state = why or "waiting"
        if not why:
            chosen.queue.append(r)
    for replica in replicas:
        replica.bring(until)
