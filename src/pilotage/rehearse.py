"""Does the scenario that was fitted explain what was recorded, and what would other policies have cost?

The replay runs the recorded traffic and the recorded orders of replicas through the simulator, and sets p50, p95, p99,
replica-hours and the mean batch beside the recorded ones, quantiles read from the same buckets. A fit that misses is
not called good, and the part that misfits is named: traffic (requests that no counter knows), the service law (busy
time drifts from it), start-up (replica-hours), and, where these hold but batches or latency do not, routing and
batching.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from pilotage.control.decisions import Decisions
from pilotage.control.guard import Guard
from pilotage.control.policy import Observation, Policy, replicas_of
from pilotage.control.steer import Decides, Helm, steer
from pilotage.engine.cluster import Cluster, World
from pilotage.engine.run import Run, at_tick, bill, tick_of
from pilotage.evaluate import summary
from pilotage.live.calibrate import Fit, Fleet, Known
from pilotage.live.history import Recording, quantile_s
from pilotage.metrics import BUCKET_MIDPOINTS_S
from pilotage.results import write_whole
from pilotage.scenario import Scenario
from pilotage.workers import Workers
from pilotage.world.arrivals import Counts
from pilotage.world.pools import Pool
from pilotage.world.servers import Affine, Variant
from pilotage.world.services import Service
from pilotage.world.spec import Spec

QUANTILES: Final = (0.5, 0.95, 0.99)
TOLERANCE: Final = {"p50": 0.10, "p95": 0.10, "p99": 0.15, "replica_hours": 0.03, "batch_size": 0.03}
UNEXPLAINED: Final = 0.03
DRIFT: Final = 0.08
SEEDS: Final = 3
DRAWS: Final = 5  # of the fitted numbers, from their bootstrap
ENOUGH: Final = 30_000  # steps of services, from which on processes are worth their start


@dataclass(frozen=True, slots=True)
class Check:
    """A service's replay beside its record, and what misfits (empty: nothing)."""

    service: str
    recorded: dict[str, float]
    predicted: dict[str, float]
    misfits: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not self.misfits


def service_of(
    known: Known, history: Recording, fitted: Fit, law: tuple[float, float] | None = None
) -> Service:
    """A service of the scenario; `law` (base and per item, ms) takes the place of what was fitted."""
    base, per_item = law or (fitted.base_ms[0], fitted.per_item_ms[0])
    return Service(
        name=known.name,
        traffic=Counts(path=f"{known.name}.txt", interval_s=history.step_s),
        slo_ms=known.slo_ms,
        pools=(known.pool,),
        variants=(
            Variant(
                name="live",
                accuracy=1.0 if known.accuracy is None else known.accuracy,
                load_s=fitted.start_up_s[0],
                load_cv=fitted.start_up_cv,
                latency={
                    known.pool: Affine(base_ms=base, per_item_ms=per_item, noise_cv=min(fitted.noise_cv, 3.0))
                },
            ),
        ),
        server=known.server,
        demand=known.demand,
        economics=known.economics,
        lifecycle=known.lifecycle,
        min_replicas=known.min_replicas,
        max_replicas=max(known.max_replicas, int(history.wanted.max())),
        initial_replicas=int(history.ready[0]),
    )


def scenario_of(
    fleet: Fleet, pools: Sequence[Pool], found: Sequence[tuple[Known, Recording, Fit]], folder: Path
) -> Scenario:
    """The scenario of a fleet; its traffic is written below `folder`, one count per step and line."""
    folder.mkdir(parents=True, exist_ok=True)
    for known, history, _ in found:
        counts = np.diff(
            np.round(np.cumsum(np.r_[0.0, history.arrived]))
        )  # whole requests, none lost to rounding
        write_whole(folder / f"{known.name}.txt", "".join(f"{int(n)}\n" for n in counts))
    first = found[0][1]
    return Scenario(
        title=fleet.title,
        # what was seen of a start-up is from order to readiness: the variant has it
        pools=tuple(pool.replace(boot_s=0.0, boot_cv=0.0) for pool in pools),
        services=tuple(service_of(*one) for one in found),
        tick_s=first.step_s,
        horizon_h=first.step_s * len(first.arrived) / 3600,
        data=str(folder),
        name="calibrated",
    )


def _serving(scenario: Scenario) -> Scenario:
    """Without the lives of models: a replay and a rehearsal are of what serves, not of retrainings."""
    serving: Scenario = scenario.replace(
        services=tuple(service.replace(lifecycle=None) for service in scenario.services)
    )
    return serving


def workers_for(fleet: Fleet) -> Workers:
    """Processes of this machine, where there is enough to do for them."""
    return Workers("local" if len(fleet.prometheus.times_s) * len(fleet.services) > ENOUGH else None)


def check(
    scenario: Scenario, found: Sequence[tuple[Known, Recording, Fit]], workers: Workers | None = None
) -> list[Check]:
    """Replays what was recorded, and judges the fit of each service."""
    scenario = _serving(scenario)
    wanted = np.array([history.wanted[1:] for _, history, _ in found])
    workers = workers or Workers()
    tasks = [(scenario, [World(k) for k in part], wanted) for part in _parts(SEEDS, workers.count)]
    runs = [run for part in workers.map(_replayed, tasks) for run in part]
    out = []
    for s, (known, history, fitted) in enumerate(found):
        upto = np.searchsorted(BUCKET_MIDPOINTS_S, history.edges_s, side="right")
        fine = sum(run.histogram[s] for run in runs)
        cumulative = np.concatenate([[0], np.cumsum(fine)])
        predicted_counts = np.diff(np.append(cumulative[upto], cumulative[-1]), prepend=0.0)
        recorded_counts = history.buckets.sum(axis=0)
        recorded = {f"p{round(100 * p)}": quantile_s(history.edges_s, recorded_counts, p) for p in QUANTILES}
        predicted = {
            f"p{round(100 * p)}": quantile_s(history.edges_s, predicted_counts, p) for p in QUANTILES
        }
        # ready replicas at both ends of each step: a start within it counts for half
        recorded["replica_hours"] = float(
            (history.ready[1:] + history.ready[:-1]).sum() / 2 * history.step_s / 3600
        )
        ready_s = np.mean([float(run.totals["ready_s"][s]) for run in runs])
        predicted["replica_hours"] = float(ready_s) / known.server.batches_in_flight / 3600
        # routing decides who waits together, so it shows in batches before it shows in latency
        recorded["batch_size"] = float(history.batched.sum() / history.batches.sum())
        batches = sum(float(run.totals["batches"][s]) for run in runs)
        predicted["batch_size"] = sum(float(run.totals["batched"][s]) for run in runs) / max(batches, 1.0)
        out.append(Check(known.name, recorded, predicted, _misfits(recorded, predicted, fitted)))
    return out


def _misfits(recorded: dict[str, float], predicted: dict[str, float], fitted: Fit) -> tuple[str, ...]:
    off = {
        name: predicted[name] / recorded[name] - 1 if recorded[name] else float("nan") for name in TOLERANCE
    }
    wrong = [name for name, limit in TOLERANCE.items() if not abs(off[name]) <= limit]
    found = []
    if fitted.unexplained > UNEXPLAINED:
        found.append(
            f"traffic: {100 * fitted.unexplained:.3g} % more requests were executed than arrived by the counter"
        )
    if fitted.drift > DRIFT:
        found.append(
            f"service law: busy time of a tenth of the history is {100 * fitted.drift:.3g} % off the law"
        )
    if "replica_hours" in wrong:
        found.append(f"start-up: replica-hours {100 * off['replica_hours']:+.3g} %")
    late = [f"{name} {100 * off[name]:+.3g} %" for name in wrong if name != "replica_hours"]
    if late and not found:
        found.append(
            f"routing, batching or unequal nodes: traffic, law and start-up fit, but {', '.join(late)}"
        )
    elif late:
        found[-1] += f"; {', '.join(late)}"
    if any("too coarse" in note for note in fitted.notes):
        found.append("buckets: too coarse at the objective to call any fit good")
    return tuple(found)


def rehearse(
    scenario: Scenario,
    found: Sequence[tuple[Known, Recording, Fit]],
    policies: Sequence[tuple[str, Policy]],
    seed: int = 0,
    workers: Workers | None = None,
) -> list[dict[str, Any]]:
    """What each policy would have cost on the recorded traffic, with intervals over draws of the fitted numbers."""
    rng = np.random.default_rng(seed)
    draws = [_serving(scenario)]
    for _ in range(DRAWS - 1):
        services = []
        for known, history, fitted in found:
            base, per_item = fitted.draws[rng.integers(len(fitted.draws))]
            services.append(service_of(known, history, fitted, (float(base), float(per_item))))
        draws.append(_serving(scenario.replace(services=tuple(services))))
    worlds = [World(seed + 1000 + k) for k in range(DRAWS)]
    workers = workers or Workers()
    # as many tasks as share out evenly, and no more: the more runs are in one, the less a decision costs
    parts = _parts(DRAWS, workers.count // math.gcd(workers.count, len(policies)))
    tasks = [
        ([draws[k] for k in part], [worlds[k] for k in part], label, policy)
        for label, policy in policies
        for part in parts
    ]
    runs = [run for part in workers.map(_rehearsed, tasks) for run in part]
    rows = []
    for k, (label, _) in enumerate(policies):
        mine = runs[k * DRAWS : (k + 1) * DRAWS]
        row = summary(label, mine)
        totals = np.array([run.total_usd for run in mine])
        row["total_usd"] = {
            "mean": float(totals.mean()),
            "low": float(totals.min()),
            "high": float(totals.max()),
        }
        rows.append(row)
    return rows


def _parts(runs: int, parts: int) -> list[range]:
    """Runs in so many parts, or in as many as there are runs, next to each other."""
    edges = np.linspace(0, runs, min(parts, runs) + 1).round().astype(int).tolist()
    return [range(lo, hi) for lo, hi in pairwise(edges)]


class _AsRecorded:
    """Orders the replicas that were wanted, shape (services, ticks), in every cluster."""

    def __init__(self, wanted: np.ndarray) -> None:
        self._wanted, self._tick = wanted, -1

    def decide(self, seen: Sequence[Observation]) -> Decisions:
        self._tick += 1
        wanted = np.tile(self._wanted[:, self._tick].astype(np.int64), len(seen) // len(self._wanted))
        return Decisions.towards(wanted, replicas_of(seen), lambda row: f"recorded: {wanted[row]}")


def _replayed(scenario: Scenario, worlds: Sequence[World], wanted: np.ndarray) -> list[Run]:
    return _run(Cluster(scenario, worlds), _AsRecorded(wanted), "recorded")


def _rehearsed(
    scenarios: Sequence[Scenario], worlds: Sequence[World], label: str, policy: Policy
) -> list[Run]:
    """One policy in scenarios that differ in their laws alone, behind the guard, which is asked about all at once."""
    tick_s = tick_of(scenarios[0], policy)
    each = [at_tick(one, tick_s) for one in scenarios]
    cluster = Cluster(each[0], worlds, each=each)
    worlds_, services = cluster.shape
    situations = [cluster.situation(w, s) for w in range(worlds_) for s in range(services)]
    helm = Helm([policy] * len(situations), situations, Guard(), fleet=services)
    return _run(cluster, helm, label)


def _run(cluster: Cluster, helm: Decides, label: str) -> list[Run]:
    began = time.perf_counter()
    scenario = cluster.scenario
    steer(cluster, helm, scenario.ticks)
    cluster.finish()
    each_s = (time.perf_counter() - began) / len(cluster.worlds)
    return [
        Run(
            policy=label,
            world=world,
            tick_s=scenario.tick_s,
            usd=bill(cluster.totals[w], scenario),
            totals=cluster.totals[w],
            histogram=cluster.histograms[w],
            seconds=each_s,
        )
        for w, world in enumerate(cluster.worlds)
    ]


def as_toml(scenario: Scenario) -> str:
    """A scenario file: what differs from the defaults."""
    raw = _told(scenario)
    for key in ("name", "data"):
        raw.pop(key, None)
    lines = [f"{key} = {_toml(value)}" for key, value in raw.items() if key not in ("pools", "services")]
    for table in ("pools", "services"):
        for item in raw[table]:
            lines += ["", f"[[{table}]]", *(f"{key} = {_toml(value)}" for key, value in item.items())]
    return "\n".join([*lines, ""])


def _told(value: Any) -> Any:
    """Builtins of a specification, without fields at their defaults."""
    if isinstance(value, Spec):
        config = type(value).__struct_config__
        out: dict[str, Any] = {str(config.tag_field): config.tag} if config.tag_field else {}
        for field in msgspec.structs.fields(value):
            mine = getattr(value, field.name)
            if mine is not None and (field.required or mine != field.default):
                out[field.name] = _told(mine)
        return out
    if isinstance(value, dict):
        return {key: _told(inner) for key, inner in value.items()}
    return [_told(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)  # of text, numbers and truth, JSON's form is TOML's
