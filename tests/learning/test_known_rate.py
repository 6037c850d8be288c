"""Somebody who knows the rate but not the sample: the rate is kept, and the plan lies between bound and rules."""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.agents.bound import bound
from pilotage.control.guard import Guard
from pilotage.control.scaling import Hpa, Schedule
from pilotage.engine.cluster import Cluster, World, recorded
from pilotage.engine.run import simulate
from pilotage.scenario import load
from pilotage.world.arrivals import Counts, Mmpp, MmppState, Poisson, Scale
from pilotage.world.spec import SpecError

pytest.importorskip("torch")  # what hindsight tells comes with the training of networks
known = pytest.importorskip("pilotage.agents.known_rate")

QUICK = load("quickstart").replace(horizon_h=0.5)
BURSTS = Mmpp(
    states=(MmppState(rate_rps=100.0, mean_dwell_s=200.0), MmppState(rate_rps=0.0, mean_dwell_s=200.0))
)


def arrivals(world: World) -> np.ndarray:
    return Cluster(QUICK.replace(history_h=0.0), [world]).arrivals(0, 0)


def counts(world: World, step_s: float) -> np.ndarray:
    return np.histogram(arrivals(world), np.arange(0, 1800 + step_s, step_s))[0]


def test_the_same_seed_gives_the_same_sample() -> None:
    for traffic in (QUICK.services[0].traffic, Scale(source=BURSTS, factor=0.7)):
        world = World(5, 3600.0, (traffic,))
        expected = arrivals(recorded(QUICK, [world])[0])
        np.testing.assert_array_equal(arrivals(known.same_rate(QUICK, world, [5])[0]), expected)


def test_other_seeds_keep_the_rate_and_change_the_sample() -> None:
    world = World(5, 3600.0, (BURSTS,))
    own = counts(recorded(QUICK, [world])[0], 5.0)
    for other in known.same_rate(QUICK, world, [6, 7]):
        found = counts(other, 5.0)
        assert not np.array_equal(found, own)
        assert np.mean((found == 0) == (own == 0)) > 0.97  # on when the others are on
    stranger = counts(recorded(QUICK, [World(6, 3600.0, (BURSTS,))])[0], 5.0)
    assert np.mean((stranger == 0) == (own == 0)) < 0.9


def test_the_rate_of_recorded_counts_is_what_was_recorded(tmp_path) -> None:
    (tmp_path / "counts.txt").write_text("\n".join(str(k % 7) for k in range(200)))
    world = World(1, 0.0, (Counts(path="counts.txt", interval_s=60.0),))
    one, other = known.same_rate(QUICK.replace(data=str(tmp_path)), world, [1, 2])
    np.testing.assert_array_equal(counts(one, 60.0), [k % 7 for k in range(30)])
    np.testing.assert_array_equal(counts(other, 60.0), counts(one, 60.0))
    assert not np.array_equal(arrivals(other), arrivals(one))


def test_drawn_arrivals_have_no_rate() -> None:
    with pytest.raises(SpecError, match=r"traffic of service 'ranker' has been drawn"):
        known.same_rate(QUICK, recorded(QUICK, [World(0)])[0], [1])
    with pytest.raises(ValueError, match="samples 1"):
        known.rate_known(QUICK, World(0), samples=1)


def test_of_a_constant_rate_the_best_constant_count_is_all_there_is_to_know() -> None:
    """In the mean over fresh samples the plan costs what the best constant count costs, within 1 %."""
    scenario = QUICK.replace(services=(QUICK.services[0].replace(traffic=Poisson(rate_rps=60.0)),))
    plan = known.rate_known(scenario, World(0), guard=Guard())
    unseen = [World(100 + k) for k in range(8)]

    def usd(policy: Schedule) -> float:
        return sum(run.total_usd for run in simulate(scenario, [policy] * 8, unseen, guard=Guard()))

    best = min(usd(Schedule(targets=(n,))) for n in range(1, 7))
    assert 0.99 * best <= usd(plan) <= 1.01 * best


def test_it_costs_no_less_than_the_bound_and_less_than_a_rule() -> None:
    worlds = [World(k, 9 * 3600.0) for k in range(3)]
    plans = [known.rate_known(QUICK, world, guard=Guard(), samples=4) for world in worlds]
    found = [run.total_usd for run in simulate(QUICK, plans, worlds, guard=Guard())]
    rule = [run.total_usd for run in simulate(QUICK, [Hpa()] * 3, worlds, guard=Guard())]
    for world, plan, usd in zip(worlds, plans, found, strict=True):
        assert usd >= bound(QUICK, world, [plan], guard=Guard()).lower_usd
    assert np.mean(found) < np.mean(rule)
