"""Services and traffic at random are services and traffic: valid, runnable, and as busy as was asked."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from pilotage.agents.domain import busy_rps, capacity_rps, service_at_random, sized, traffic_at_random
from pilotage.engine.cluster import Cluster, World, recorded
from pilotage.scenario import Scenario, load
from pilotage.world.arrivals import Poisson

QUICK = load("quickstart")
KINDS = ("diurnal", "flash", "on-off", "timers")


@pytest.mark.parametrize("seed", range(8))
def test_a_service_at_random_is_a_valid_scenario_that_runs(seed: int) -> None:
    scenario = service_at_random(np.random.default_rng(seed), QUICK).replace(horizon_h=0.02, history_h=0.0)
    assert msgspec.json.decode(msgspec.json.encode(scenario), type=Scenario) == scenario
    assert 4 <= capacity_rps(scenario) <= 60 * (1 + 1e-9)
    cluster = Cluster(scenario, [World(seed)])
    for _ in range(scenario.ticks):
        cluster.advance(cluster.no_orders())
    assert cluster.totals["arrived"].sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_busy_minutes_are_about_as_busy_as_asked(kind: str) -> None:
    found = [
        busy_rps(traffic_at_random(np.random.default_rng(seed), kind, 50.0, 30 * 3600.0), None, 0.0, 86400.0)
        for seed in range(6)
    ]
    assert 20 < np.median(found) < 100
    assert sized(Poisson(rate_rps=5.0), 5.0, 3.0, 20.0).factor == 12.0


def test_an_unknown_kind_of_traffic_is_refused() -> None:
    with pytest.raises(ValueError, match="valid: diurnal, flash, on-off, timers"):
        traffic_at_random(np.random.default_rng(0), "calm", 1.0, 1.0)


def test_recorded_traffic_is_the_traffic() -> None:
    """Runs, histories and all draws are the same, to the bit, whether traffic is drawn anew or was drawn before."""
    scenario = QUICK.replace(horizon_h=0.1)
    worlds = [World(3), World(4, start_s=50_000.0)]
    plain, again = Cluster(scenario, worlds), Cluster(scenario, recorded(scenario, worlds))
    for cluster in (plain, again):
        for _ in range(scenario.ticks):
            cluster.advance(cluster.no_orders())
    assert plain.totals.tobytes() == again.totals.tobytes()
    np.testing.assert_array_equal(plain.situation(1, 0).history_rps, again.situation(1, 0).history_rps)
