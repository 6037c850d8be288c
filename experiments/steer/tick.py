"""The time of one tick of many services, from observations to the ledger, and the memory of the process that runs it.

Run as a process of its own, so that what is imported and resident is what `pilotage steer` imports and holds:
`tick.py FOLDER SERVICES POLICY MODE FLEET TICKS` prints one JSON object. Loads are made before; the target is the dry
run. A fleet that `follows` has the replicas that were ordered; one that is `stuck` keeps three of each service, so that
every service that wants others is changed at every tick: the most that there can be to do.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import pilotage.cli  # noqa: F401  (what the command imports)
from pilotage.control.policy import INDEX, Decision, Observation
from pilotage.control.steer import steer
from pilotage.live.monitors import Reading
from pilotage.live.process import collect_seldom
from pilotage.live.status import Log
from pilotage.live.steering import Steering
from pilotage.live.targets import DryRunTarget

sys.path.insert(0, str(Path(__file__).parent))
from soak import resident_mib, setup_of

HISTORY_TICKS = 240
HEAVY = ("torch", "numba", "gymnasium", "stable_baselines3")
GUARD = """[guard]
required = ["arrival_rate"]
max_order = 4
release_cooldown_s = 60.0
ranges = [{feature = "arrival_rate", low = 0.0, high = 500.0}]
"""


class Made:
    """Observations made beforehand: each service's load is a wave of its own, worth two to eight replicas within eight
    minutes. Replicas are the target's, if there is one."""

    replays = True

    def __init__(self, services: int, ticks: int, seed: int, target: DryRunTarget | None) -> None:
        rng, k = np.random.default_rng(seed), np.arange(services)
        self._target, self._names = target, [f"s{one}" for one in range(services)]
        self._history = 300 + 200 * np.sin(np.arange(-HISTORY_TICKS, 0) / 5 + k[:, None])
        self._readings = []
        for tick in range(ticks):
            reading = Reading.nothing(1000.0 + 15.0 * tick, services)
            reading.age_s[:] = 1.0
            reading.values[:] = rng.random(reading.values.shape)
            wave = np.sin(tick / 5 + k)
            columns = {"arrival_rate": 300 + 200 * wave, "utilization": 0.5 + 0.4 * wave, "replicas_ready": 3}
            columns |= {"replicas_starting": 0, "replicas_pending": 0, "max_batch": 8}
            for name, column in columns.items():
                reading.values[:, INDEX[name]] = column
            self._readings.append(reading)

    def read(self) -> Reading | None:
        if not self._readings:
            return None
        reading = self._readings.pop(0)
        if self._target is not None:
            counts = self._target.counts(self._names)
            reading.values[:, INDEX["replicas_ready"]] = [counts.get(name, 3) for name in self._names]
        return reading

    def history_rps(self, ticks: int, tick_s: float) -> np.ndarray:
        return self._history


class Timed(Steering):
    """Steering that takes the time from decision to record."""

    spans: list[tuple[float, float]]

    def decide(self, seen: Sequence[Observation]) -> list[Decision]:
        self._from = time.perf_counter(), time.process_time()
        return super().decide(seen)

    def apply(self, decisions: Sequence[Decision]) -> None:
        super().apply(decisions)
        self.spans.append((time.perf_counter() - self._from[0], time.process_time() - self._from[1]))


def measure(folder: Path, services: int, policy: str, mode: str, fleet: str, ticks: int) -> dict[str, object]:
    setup = setup_of(folder, services, mode, policy, GUARD)
    setup = replace(setup, config=setup.config.replace(decide_within_s=5.0))  # as it is by default
    target = DryRunTarget()
    monitor = Made(services, ticks, 0, target if fleet == "follows" else None)
    with (folder / "log.jsonl").open("w") as out:
        steering = Timed(setup, log=Log(out), monitor=monitor, target=target)
        steering.spans = []
        collect_seldom()
        steer(steering, steering, None, going=steering.going)
    wall, cpu = (1e3 * np.array(column) for column in zip(*steering.spans, strict=True))
    outcomes = steering.status.outcomes
    return {
        "services": services, "policy": policy, "mode": mode, "fleet": fleet, "ticks": ticks,
        "changed": 1 - outcomes["kept"] / sum(outcomes.values()),
        "held": dict(steering.status.interventions),
        "wall_ms": [float(np.quantile(wall, q)) for q in (0.0, 0.25, 0.5, 0.95)],
        "cpu_ms": [float(np.quantile(cpu, q)) for q in (0.0, 0.25, 0.5, 0.95)],
        "rss_mib": resident_mib(),
        "heavy": [name for name in HEAVY if name in sys.modules],
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6], int(sys.argv[6]))))
