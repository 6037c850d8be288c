"""A virtual fleet with faults of every kind at random, steered by the real loop, guard, journal and ledger.

Only time, the monitor and the target are stand-ins, in this process: replicas become ready two ticks after they were
ordered; a monitor is down, has a bug, says NaN, part, or what is old; a target refuses, answers half, does what it says
it did not, or forgets services; a policy raises, hangs, orders NaN or ten thousand replicas; the disk is full for some
ticks; the clock jumps by an hour.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pilotage.control.hpa import Hpa
from pilotage.control.policy import INDEX, Controller, Decision, Observation, Policy, Situation
from pilotage.control.steer import steer
from pilotage.live.clock import Clock
from pilotage.live.entries import Entry, Record, entry_of
from pilotage.live.ledger import Ledger
from pilotage.live.monitors import MonitorError, Reading
from pilotage.live.status import Log
from pilotage.live.steer_config import Setup, load
from pilotage.live.steering import Steering
from pilotage.live.targets import ScaleOrder, TargetError

TICK_S, WARM_UP = 15.0, 0.2
LOW, HIGH, MAX_ORDER, CEILING_USD = 1, 20, 4, 40.0
GUARD = f"""[guard]
min_replicas = {LOW}
max_replicas = {HIGH}
max_order = {MAX_ORDER}
max_release = 2
release_cooldown_s = 60.0
max_total_usd_per_hour = {CEILING_USD}
required = ["arrival_rate"]
stale_after_s = 120.0
fallback = {{kind = "hpa"}}
ranges = [{{feature = "arrival_rate", low = 0.0, high = 500.0}}]
"""


class Chaos(Policy, frozen=True, kw_only=True, tag="chaos"):
    """The HPA, but for a share of the ticks."""

    seed: int
    share: float

    def begin(self, situation: Situation) -> Controller:
        return _Chaos(self, situation)


class _Chaos:
    def __init__(self, policy: Chaos, situation: Situation) -> None:
        self._inner = Hpa().begin(situation)
        self._rng, self._share = np.random.default_rng(policy.seed), policy.share

    def decide(self, seen: Observation) -> Decision:
        wanted = self._inner.decide(seen)
        if self._rng.random() >= self._share:
            return wanted
        what = self._rng.integers(0, 7)
        if what == 0:
            raise ValueError("a policy with a bug")
        if what == 1 and self._rng.random() < 0.02:
            time.sleep(0.3)  # longer than it may take
        return {
            2: Decision(order=10_000, reason="all of them"),
            3: Decision(order=math.nan, reason="not a number"),  # type: ignore[arg-type]
            4: Decision(release=10_000, reason="none of them"),
            5: Decision(order=-3, reason="minus three"),
            6: Decision(pool="../../etc", reason="elsewhere"),
        }.get(int(what), wanted)


class Fleet:
    """What is really there: replicas ordered and ready, and the load; it is monitor and target at once."""

    replays = False

    def __init__(self, names: Sequence[str], seed: int, faults: bool = True) -> None:
        self.names, self._rng, self._faults = list(names), np.random.default_rng(seed), faults
        self.ordered = dict.fromkeys(self.names, 3)
        self._late = [dict(self.ordered)] * 3
        self.tick, self.writes, self.monotonic_s, self.wall_s = 0, 0, 0.0, 1_000_000.0
        self.past_limits: list[str] = []

    def pass_tick(self) -> None:
        self.tick += 1
        self.monotonic_s += TICK_S
        self.wall_s += TICK_S
        if self._fault(0.001):
            self.wall_s += self._rng.choice([-3600.0, 3600.0])
        self._late = [*self._late[1:], dict(self.ordered)]

    def _fault(self, share: float) -> bool:
        return self._faults and self._rng.random() < share

    # --- as a monitor
    def read(self) -> Reading:
        if self._fault(0.02):
            raise MonitorError("the monitor is down")
        if self._fault(0.005):
            raise ZeroDivisionError("a monitor with a bug")
        reading = Reading.nothing(self.wall_s, len(self.names))
        reading.age_s[:] = 5.0
        for k, name in enumerate(self.names):
            rate = 60 + 50 * math.sin(self.tick / 200 + k)
            ready = min(self._late[0][name], self.ordered[name])
            reading.values[k, INDEX["arrival_rate"]] = 1e6 if self._fault(0.005) else rate
            reading.values[k, INDEX["utilization"]] = min(1.0, rate / 10 / max(ready, 1))
            reading.values[k, INDEX["replicas_ready"]] = ready
        if self._fault(0.02):
            reading.values[self._rng.random(reading.values.shape) < 0.3] = np.nan
        if self._fault(0.01):
            reading.age_s[:] = 900.0
        if self._fault(0.002):
            return Reading.nothing(math.nan, len(self.names))
        return reading

    def history_rps(self, ticks: int, tick_s: float) -> np.ndarray:
        return np.zeros((len(self.names), 0))

    # --- as a target
    def counts(self, services: Sequence[str]) -> Mapping[str, int]:
        if self._fault(0.02):
            raise TargetError("the target does not answer")
        return {name: self.ordered[name] for name in services if not self._fault(0.01)}

    def scale(self, orders: Sequence[ScaleOrder]) -> Sequence[str | TargetError]:
        self.writes += 1
        if self._fault(0.03):
            raise TargetError("429: too many requests")
        if self._fault(0.005):
            raise KeyError("a target with a bug")
        said: list[str | TargetError] = []
        for order in orders:
            if self._fault(0.03):
                said.append(TargetError("409: conflict"))
                continue
            self._check(order)
            self.ordered[order.service] = order.replicas
            said.append(TargetError("timed out, but it was done") if self._fault(0.03) else "scaled")
        if sum(self.ordered.values()) > CEILING_USD + 1e-9:
            self.past_limits.append(f"tick {self.tick}: {sum(self.ordered.values())} replicas at 1 USD")
        return said[:-1] if self._fault(0.005) else said

    def _check(self, order: ScaleOrder) -> None:
        change = order.replicas - self.ordered[order.service]
        if not (LOW <= order.replicas <= HIGH and -2 <= change <= MAX_ORDER):
            self.past_limits.append(f"tick {self.tick}: {order}, had {self.ordered[order.service]}")


class FullAtTimes(Ledger):
    """A ledger on a disk that is full for some ticks."""

    def __init__(self, folder: Path, fleet: Fleet) -> None:
        super().__init__(folder)
        self._fleet, self._full_until = fleet, -1

    def append(self, *records: Record, indexed: bool = True) -> list[Entry]:
        if self._fleet._fault(0.002):
            self._full_until = self._fleet.tick + int(self._fleet._rng.integers(1, 6))
        if self._fleet.tick < self._full_until:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().append(*records, indexed=indexed)


class Soak(Steering):
    """Steering in virtual time."""

    fleet: Fleet
    rss_mib: list[float]

    def wait(self) -> None:
        self.fleet.pass_tick()
        if self.fleet.tick % 500 == 0:
            self.rss_mib.append(resident_mib())
        if self.fleet.tick % 200 == 0:
            self.journal.catch_up()


def setup_of(
    folder: Path, services: int, mode: str = "act", policy: str = "hpa", guard: str = GUARD
) -> Setup:
    """A fleet of services alike, at one dollar per replica and hour."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        'title = "a fleet"',
        f"tick_s = {TICK_S}",
        "[[pools]]",
        'name = "cpu"',
        "price_usd_per_hour = 1.0",
    ]
    lines.append(f"max_nodes = {100 * services}")
    for k in range(services):
        lines += [
            "[[services]]", f'name = "s{k}"', "slo_ms = 500.0", 'pools = ["cpu"]', "max_replicas = 50",
            'traffic = {kind = "poisson", rate_rps = 10.0}', "server = {max_batch = 8}", "[[services.variants]]",
            'name = "v"', 'latency = {cpu = {kind = "affine", base_ms = 20.0, per_item_ms = 10.0}}',
        ]  # fmt: skip
    (folder / "fleet.toml").write_text("\n".join(lines) + "\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "steer.toml").write_text(
        f'scenario = "fleet.toml"\nledger = "ledger"\npolicy = "{policy}"\nmode = "{mode}"\ndecide_within_s = 0.2\n'
        f'[monitor]\nkind = "recording"\npath = "empty.jsonl"\n{guard}'
    )
    return load(folder / "steer.toml")


def soak(
    folder: Path, ticks: int, seed: int, services: int = 4, faults: bool = True
) -> dict[str, float | list[str]]:
    """Runs it and counts: entries missing or too many, limits passed, faults met, growth of memory after warm-up."""
    setup = setup_of(folder, services)
    share = 0.05 if faults else 0.0
    chaos = tuple(Chaos(seed=seed + k, share=share) for k in range(services))
    fleet = Fleet(setup.names, seed, faults)
    with (folder / "log.jsonl").open("w") as out:
        steering = Soak(
            replace(setup, policies=chaos),
            log=Log(out),
            monitor=fleet,
            target=fleet,
            clock=Clock(lambda: fleet.monotonic_s),
        )
        steering.fleet, steering.rss_mib = fleet, []
        steering.journal.ledger = FullAtTimes(setup.ledger, fleet)
        steer(steering, steering, ticks)
        steering.journal.ledger = Ledger(setup.ledger)
        steering.journal.note([])
    rss = steering.rss_mib or [resident_mib()]
    warm = rss[int(WARM_UP * len(rss))]
    found = audit(setup.ledger, ticks, services)
    return found | {
        "waiting": steering.journal.waiting,
        "lost": steering.journal.lost,
        "past_limits": fleet.past_limits,
        "faults": sum(steering.status.errors.values()),
        "interventions": sum(steering.status.interventions.values()),
        "writes": fleet.writes,
        "rss_warm_mib": warm,
        "rss_end_mib": rss[-1],
        "growth": max(rss[int(WARM_UP * len(rss)) :]) / warm - 1,
    }


def audit(folder: Path, ticks: int, services: int) -> dict[str, float | list[str]]:
    """What a ledger lacks: every service has one decision at every tick, and every intent one result."""
    decided: dict[tuple[str, str], int] = {}
    results, intents, entries = 0, 0, 0
    with (folder / "ledger.jsonl").open("rb") as lines:
        for line in lines:
            entry = entry_of(line)
            entries += 1
            if entry.of is not None:
                results += 1
                continue
            intents += entry.outcome == "intent"
            key = entry.subject["tick"], entry.service
            decided[key] = decided.get(key, 0) + 1
    problem = Ledger(folder).verify().problem
    return {
        "entries": entries,
        "missing": ticks * services - len(decided),
        "double": sum(count - 1 for count in decided.values()),
        "intents": intents,
        "unsettled": intents - results,
        "broken": [problem] if problem else [],
    }


def resident_mib() -> float:
    """Memory of this process that is resident now."""
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    import sys

    print(json.dumps(soak(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
