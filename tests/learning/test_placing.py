"""Learned placement: the search on problems with a known optimum, what training promises, and what it may not do."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.agents.packing import Instance, Replica, optimum, replay
from pilotage.agents.placing import Fleet, Packed, Settings, search, train, vector
from pilotage.control.placing import LearnedPlacement, shipped
from pilotage.control.scaling import Static
from pilotage.engine.cluster import Cluster, World, placement_from, weights_of
from pilotage.engine.layout import CANDIDATE, GONE
from pilotage.engine.placement import PAIRWISE, RULES, TERMS, terms
from pilotage.scenario import Placement, load
from pilotage.world.arrivals import Poisson
from pilotage.world.faults import Hazard, Spot
from pilotage.world.pools import Pool, Resources
from pilotage.world.spec import SpecError

RULE = "learned-placement"
TINY = Settings(
    instances=12, fleets=2, validation_instances=6, validation_fleets=2, generations_packing=4, generations=2,
    population=6, fleet_population=6, instances_per_generation=8, fleets_per_generation=2, fleet_hours=0.2,
    evaluations=1,
)  # fmt: skip


def test_the_search_finds_the_minimum_of_an_ill_conditioned_bowl_in_noise():
    rng, at = np.random.default_rng(0), np.array([1.0, -2.0, 0.5, 3.0])

    def losses(asked: np.ndarray) -> np.ndarray:
        bowl = ((asked - at) ** 2 * [1, 10, 100, 1000]).sum(axis=1)
        return bowl * (1 + 0.05 * rng.standard_normal(len(asked)))

    *_, mean = search(np.zeros(4), 0.5, 150, 12, 1, losses)
    assert np.allclose(mean, at, atol=0.05)


def test_weights_learned_on_packing_come_near_the_optimum():
    """Two thirds and one third of a node, all at once: the optimum pairs them, whatever their order."""
    train_on = [Packed(np.random.default_rng([5, k]), dynamic=False) for k in range(40)]
    *_, mean = search(
        vector({"rent_new": 1.0}), 0.5, 40, 12, 0,
        lambda asked: np.array([np.mean([p.loss(x) for p in train_on]) for x in asked]),
    )  # fmt: skip
    fresh = [Packed(np.random.default_rng([6, k]), dynamic=False) for k in range(40)]
    learned, kubernetes = (np.mean([math.exp(p.loss(w, r)) for p in fresh])
                           for w, r in ((mean, RULE), (np.zeros(0), "kubernetes")))  # fmt: skip
    assert 1 <= learned < 1.08
    assert learned < kubernetes - 0.05


def test_training_repeats_itself_and_is_kept_whole(tmp_path: Path):
    first, curve = train(TINY)
    second, again = train(TINY)
    assert first == second
    assert curve == again
    first.save(tmp_path)
    assert LearnedPlacement.read(tmp_path) == first
    placement = placement_from(str(tmp_path))
    assert placement == Placement(rule=RULE, weights=first.weights_of(TERMS), at_notice=TINY.at_notice)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["placement.json"]


def test_a_fleet_costs_the_same_again_and_its_baseline_is_kubernetes():
    fleet = Fleet(load("steady").replace(horizon_h=0.2), Static(replicas=3), [World(1), World(2)])
    assert fleet.usd(vector({"rent_new": 1.0})) == pytest.approx(fleet.usd(vector({"rent_new": 1.0})))
    assert fleet.loss(vector({"rent_new": 1.0})) == pytest.approx(
        0
    )  # one pool, one replica per node: no choice


# --- what the scores mean -----------------------------------------------------------------------------------
def candidate(**fields) -> np.void:
    record = np.zeros(1, CANDIDATE)[0]
    record["has"], record["free"], record["needs"] = (8, 32, 0, 0), (8, 32, 0, 0), (4, 8, 0, 0)
    record["node"], record["usd_per_hour"], record["slowdown"] = -1, 1.0, 1.0
    for name, value in fields.items():
        record[name] = value
    return record


def of(name: str, **fields) -> float:
    out = np.zeros(len(TERMS))
    terms(candidate(**fields), out)
    return float(out[TERMS.index(name)])


def test_terms_are_dollars_per_hour_by_hand():
    assert of("rent_new") == 1
    assert of("rent_new", node=3) == 0
    assert of("rent_share") == 0.5
    assert of("rent_left") == pytest.approx((0.5 + 0.75) / 2)
    assert of("rent_unfilled", unfilled=0.25) == 0.25
    worth = {"worth_usd_per_hour": 0.4, "filled_usd_per_hour": 0.8}
    assert of("rent_amortized", **worth) == 0.5
    assert of("rent_wasted", **worth) == pytest.approx(0.2)
    assert of("rent_above_worth", **worth) == pytest.approx(0.1)
    assert of("stake_slowed", missed_usd_per_hour=12, slowdown=3) == pytest.approx(8)
    assert of("stake_slowing", harm_usd_per_hour=5) == 5
    spot = {
        "missed_usd_per_hour": 100, "interruptions_per_hour": 0.5, "ready_in_s": 360, "recovery_s": 360, "serving": 4,
    }  # fmt: skip
    assert of("stake_interrupted", **spot) == pytest.approx(100 * 0.05 / 1.05)
    assert of("stake_interrupted_few", **spot) == pytest.approx(100 * 0.05 / 1.05 / 5)
    assert of("stake_interrupted_together", **spot, on_spot=2) == pytest.approx(100 * 0.05 / 1.05 * 2 / 5)
    assert of("stake_failing", failing=0.25, **spot) == pytest.approx(2.5)
    tight = spot | {"needed": 0.9 * 4, "pending": 1}  # the load at which half of the requests suffer
    assert of("stake_short_start", **tight) == pytest.approx(100 * 3.6 * 0.5 * 0.1)
    assert of("stake_short_failing", failing=0.25, **tight) == pytest.approx(100 * 3.6 * 0.5 * 0.1 * 0.25)
    assert of("stake_short_interrupted", **tight) == pytest.approx(100 * 3.6 * 0.05 / 1.05 * 0.5)
    assert of("stake_zone", in_zone=3, in_emptiest_zone=1, **spot) == pytest.approx(100 * 2 / 5)


def test_an_interruption_costs_less_with_head_room_and_more_where_the_others_may_go_too():
    tight = {
        "missed_usd_per_hour": 100, "interruptions_per_hour": 0.5, "recovery_s": 360, "needed": 3.0, "serving": 3,
        "pending": 1,
    }  # fmt: skip
    name = "stake_short_interrupted"
    at_three = of(name, **tight)
    assert of(name, **tight | {"pending": 2}) < at_three / 5
    assert of(name, **tight | {"on_spot": 3}) > 1.05 * at_three
    assert of(name, **tight | {"interruptions_per_hour": 0.0}) == 0
    assert of(name, **tight | {"needed": 0.0}) == 0


def test_what_is_short_goes_on_demand_and_what_has_head_room_on_spot():
    """Two replicas serve and a third is ordered; spot orders may fail. The load decides where it goes."""
    steady = load("steady")
    base, service = steady.pools[0].replace(node=None, boot_s=60.0), steady.services[0]
    spot = base.replace(
        name="spot", price_usd_per_hour=base.price_usd_per_hour / 2, provisioning_failure=0.3,
        spot=Spot(market=Hazard(per_hour=0.2)),
    )  # fmt: skip
    law = service.variants[0].latency[base.name]
    variant = service.variants[0].replace(latency={"spot": law, base.name: law})
    weights = vector({"rent_new": 1.0, "stake_short_failing": 0.3})
    for share, on_spot in ((0.2, 3), (1.0, 2)):
        one = service.replace(
            pools=("spot", base.name), variants=(variant,), initial_replicas=2,
            economics=service.economics.replace(late_usd=0.01, dropped_usd=0.01),
        )  # fmt: skip
        scenario = steady.replace(
            pools=(spot, base),
            services=(one,),
            placement=Placement(rule=RULE, weights=tuple(weights.tolist())),
        )
        cluster = Cluster(scenario, [World(0)])
        capacity = cluster.situation(0, 0).capacity_rps()
        traffic = Poisson(rate_rps=2 * share * capacity)
        cluster = Cluster(scenario.replace(services=(one.replace(traffic=traffic),)), [World(0)])
        orders = cluster.decisions.copy()
        for order in (0, 0, 0, 1):
            orders["order"] = order
            cluster.advance(orders)
        replicas = cluster.replicas
        assert (replicas["pool"][replicas["state"] != GONE] == 0).sum() == on_spot


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 100), st.lists(st.floats(-3, 3), min_size=len(TERMS), max_size=len(TERMS)))
def test_another_currency_changes_no_order(factor, weights):
    one = {"missed_usd_per_hour": 7.0, "harm_usd_per_hour": 2.0, "usd_per_hour": 1.5, "slowdown": 2.0}
    score = RULES[RULE](candidate(**one), np.array(weights))
    one |= {name: one[name] * factor for name in one if "usd" in name}
    assert RULES[RULE](candidate(**one), np.array(weights)) == pytest.approx(
        factor * score, rel=1e-9, abs=1e-9
    )


def test_pairs_let_the_large_go_first_where_that_saves_a_node():
    """4, 4, 4, 6, 6, 6 on nodes of 10: in this order a rule that looks at one replica at a time needs four nodes."""
    replicas = tuple(Replica(needs=Resources(cpu=n), end_s=1.0) for n in (4, 4, 4, 6, 6, 6))
    pools = (Pool(name="p", price_usd_per_hour=3600.0, node=Resources(cpu=10)),)
    instance = Instance(pools=pools, replicas=replicas)
    weights = vector({"rent_new": 0.1, "rent_left_squared": 1.0, "rent_share_squared": -5.0})
    assert replay(instance, RULE, weights).usd == pytest.approx(optimum(instance).usd) == pytest.approx(3)
    assert replay(instance, RULE, weights, jointly=False).usd == pytest.approx(4)
    assert replay(instance, "best-fit").usd == pytest.approx(4)


def test_where_nodes_are_short_they_go_to_whom_most_is_at_stake():
    """The first service asks first, the last has more to lose; there is one node."""
    steady = load("steady")
    pool, service = steady.pools[0].replace(max_nodes=1, node=None), steady.services[0]
    worth = [
        service.replace(
            name=name, initial_replicas=1, economics=service.economics.replace(late_usd=usd, dropped_usd=usd)
        )
        for name, usd in (("cheap", 1e-5), ("dear", 1e-2))
    ]
    scenario = steady.replace(pools=(pool,), services=tuple(worth))
    for rule, weights, winner in (
        (RULE, vector({"rent_new": 1.0, "stake": -0.1}), 1),
        (RULE, vector({"rent_new": 1.0, "stake": 0.1}), 0),
        ("kubernetes", (), 0),
    ):
        placed = scenario.replace(placement=Placement(rule=rule, weights=tuple(map(float, weights))))
        cluster = Cluster(placed, [World(0)])
        assert cluster.ticks["ready"][0].tolist() == [int(k == winner) for k in range(2)]


# --- the file -----------------------------------------------------------------------------------------------
def test_the_shipped_placement_is_what_the_experiment_wrote():
    assert RULE in PAIRWISE
    scenario = load("steady").replace(placement=Placement(rule=RULE))
    assert weights_of(scenario) == shipped().weights_of(TERMS)
    assert shipped() == LearnedPlacement.read(Path(__file__).parents[2] / "results" / "placement")


def test_files_that_do_not_fit_are_refused(tmp_path: Path):
    good = LearnedPlacement(terms=("rent_new",), weights=(1.0,))
    with pytest.raises(SpecError, match="no weight for 'rent_share'; train it anew"):
        good.weights_of(TERMS)
    with pytest.raises(SpecError, match="weighs 'rent_mew', which does not exist; did you mean 'rent_new'"):
        LearnedPlacement(terms=("rent_mew",), weights=(1.0,)).weights_of(TERMS)
    with pytest.raises(SpecError, match="2 weights for 1 terms"):
        LearnedPlacement(terms=("rent_new",), weights=(1.0, 2.0))
    with pytest.raises(SpecError, match="a finite number"):
        LearnedPlacement(terms=("rent_new",), weights=(math.inf,))
    with pytest.raises(SpecError, match="cannot be read"):
        LearnedPlacement.read(tmp_path / "none.json")
    (tmp_path / "placement.json").write_text("{")
    with pytest.raises(SpecError, match="not valid JSON"):
        placement_from(str(tmp_path))
    with pytest.raises(SpecError, match="did you mean 'best-fit'"):
        placement_from("best-fti")
