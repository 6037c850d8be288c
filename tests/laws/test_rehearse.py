"""Draws that run abreast are the runs that they are alone, to the bit, and so are those of other processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pilotage.control.guard import Guard
from pilotage.control.hpa import Hpa
from pilotage.control.policy import Policy
from pilotage.control.scaling import Predictive, Schedule
from pilotage.engine.cluster import World
from pilotage.engine.run import simulate
from pilotage.live.calibrate import Fit, Fleet, Known, fit
from pilotage.live.history import Prometheus, Recording
from pilotage.rehearse import _rehearsed, _replayed, check, rehearse, scenario_of, service_of
from pilotage.scenario import Scenario
from pilotage.workers import Workers
from pilotage.world.pools import Pool
from pilotage.world.servers import BatchServer

STEPS = 60
POOL = Pool(name="cpu", price_usd_per_hour=0.5, max_nodes=40)
Found = list[tuple[Known, Recording, Fit]]


def made(folder: Path, services: int = 10) -> tuple[Scenario, Found]:
    """An hour of services, whose loads rise and fall."""
    found = []
    for k in range(services):
        rng = np.random.default_rng(k)
        arrived = rng.poisson(60 * (2 + k) * (1 + 0.9 * np.sin(np.arange(STEPS) / 6))).astype(float)
        batches = np.ceil(arrived / rng.uniform(1, 2, STEPS))
        wanted = 1.0 + (np.arange(STEPS + 1) // 20) % 3
        edges = np.geomspace(0.01, 1.0, 20)
        recorded = Recording(
            f"s{k}", 60.0, arrived, arrived, np.zeros(STEPS), edges, np.ones((STEPS, 21)), batches, arrived,
            0.1 * batches + 0.06 * arrived, wanted, wanted, 5, 40.0, 0.1, 0.0,
        )  # fmt: skip
        known = Known(name=f"s{k}", slo_ms=300.0, pool="cpu", server=BatchServer(max_batch=4))
        found.append((known, recorded, fit(recorded, 0.3)))
    source = Prometheus(url="http://127.0.0.1:9090", start="2026-01-05T00:00", end="2026-01-05T01:00")
    fleet = Fleet(prometheus=source, pools=(POOL,), services=tuple(known for known, _, _ in found))
    return scenario_of(fleet, fleet.pools, found, folder), found


@pytest.mark.parametrize("policy", [Hpa(), Predictive()], ids=["hpa", "predictive"])
def test_abreast_is_one_by_one(policy: Policy, tmp_path: Path) -> None:
    scenario, found = made(tmp_path)
    slower = tuple(service_of(*one, law=(150.0, 70.0)) for one in found)
    scenarios = [scenario, scenario.replace(services=slower)]
    worlds = [World(1), World(2)]
    together = _rehearsed(scenarios, worlds, "both", policy)
    assert together[0].total_usd != together[1].total_usd
    for one, world, run in zip(scenarios, worlds, together, strict=True):
        alone = simulate(one, [policy], [world], guard=Guard())[0]
        assert run.tick_s == alone.tick_s
        assert (run.usd == alone.usd).all()
        assert (run.histogram == alone.histogram).all()
        assert run.totals.tobytes() == alone.totals.tobytes()


def test_a_replay_orders_what_was_recorded(tmp_path: Path) -> None:
    scenario, found = made(tmp_path)
    schedules = [Schedule(targets=tuple(int(n) for n in history.wanted[1:])) for _, history, _ in found]
    alone = simulate(scenario, [schedules], [World(0)])[0]
    wanted = np.array([history.wanted[1:] for _, history, _ in found])
    replayed = _replayed(scenario, [World(0)], wanted)[0]
    assert replayed.totals.tobytes() == alone.totals.tobytes()
    assert replayed.totals["replica_s"].max() > 3600 * 1.5


def test_processes_change_nothing(tmp_path: Path) -> None:
    scenario, found = made(tmp_path, services=2)
    policies: list[tuple[str, Policy]] = [("hpa", Hpa())]
    here, checked = rehearse(scenario, found, policies), check(scenario, found)
    with Workers("local:2") as workers:
        there = rehearse(scenario, found, policies, workers=workers)
        assert check(scenario, found, workers) == checked
    assert there[0]["total_usd"] == pytest.approx(here[0]["total_usd"], rel=1e-12)
    assert there[0]["requests"] == here[0]["requests"]
