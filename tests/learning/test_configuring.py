"""Choosing configurations: prices that the engine agrees with, and training on problems with a known optimum."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from pilotage.agents.configuring import (
    Priced,
    Settings,
    deployment_at_random,
    priced,
    regrets,
    rule_of_thumb,
    train,
)
from pilotage.control.configuring import FEATURES, Configured, deployed
from pilotage.control.foresight import Foresight
from pilotage.control.network import Forward
from pilotage.control.scaling import Static
from pilotage.engine.cluster import Cluster, World
from pilotage.scenario import Scenario, load
from pilotage.world.arrivals import Poisson

SMALL = Settings(epochs=60, services_per_batch=20, hidden=(16,))
RENT, FULL = FEATURES.index("rent"), FEATURES.index("full")


def two_pools(cheaper: float) -> Scenario:
    """`steady` on two kinds of nodes that differ in nothing but price; as it is deployed, on the dearer one."""
    steady = load("steady").replace(horizon_h=0.25, history_h=0.25)
    service, pool = steady.services[0], steady.pools[0]
    other = pool.replace(name="other", price_usd_per_hour=cheaper * pool.price_usd_per_hour)
    variants = tuple(v.replace(latency=v.latency | {"other": v.latency[pool.name]}) for v in service.variants)
    return steady.replace(
        pools=(pool, other),
        services=(
            service.replace(
                pools=(pool.name, "other"),
                variants=variants,
                traffic=Poisson(rate_rps=40.0),
                initial_replicas=3,
            ),
        ),
    )


def test_a_pool_at_half_the_price_costs_half_and_is_chosen() -> None:
    table = priced([two_pools(0.5), two_pools(0.5)], Static(replicas=4), seed=1)
    for one in table:
        at = dict(zip(one.options, one.usd, strict=True))
        here = deployed(one.situation)
        assert at[here._replace(pool="other")] == pytest.approx(0.5 * at[here], rel=0.1)
        assert rule_of_thumb(one.situation, one.options).pool == "other"
        network, _ = train(table, table, SMALL)
        policy = Configured(network=network, replicas=Foresight())
        assert policy.choose(one.situation, one.options).pool == "other"


def made_up(rng: np.random.Generator, count: int) -> list[Priced]:
    """Tables whose cost is known: rent, and ten times as much where a full batch does not fit the objective."""
    scenario = two_pools(0.5)
    situation = Cluster(scenario, [World(1)]).situation(0, 0)
    found = []
    for _ in range(count):
        x = rng.standard_normal((12, len(FEATURES)))
        found.append(
            Priced(scenario, situation, World(1), (), x, np.exp(x[:, RENT]) * np.where(x[:, FULL] > 0, 10, 1))
        )
    return found


def test_training_finds_the_optimum_of_a_known_cost_and_repeats_itself() -> None:
    rng = np.random.default_rng(2)
    learn, judged, fresh = made_up(rng, 200), made_up(rng, 40), made_up(rng, 200)
    settings = Settings(epochs=120, services_per_batch=50, hidden=(32, 32))
    network, curve = train(learn, judged, settings)
    again, _ = train(learn, judged, settings)
    assert network == again
    assert min(curve) < 0.2 * curve[0]
    score = Forward(network)
    chosen = [int(score(one.features)[:, 0].argmin()) for one in fresh]
    regret = regrets(fresh)[np.arange(len(fresh)), chosen]
    by_chance = regrets(fresh).mean()
    assert by_chance > 1
    assert regret.mean() < 0.2 * by_chance


def test_deployments_are_of_all_kinds_and_the_same_again() -> None:
    drawn = [deployment_at_random(np.random.default_rng(k), 1.0) for k in range(40)]
    assert drawn == [deployment_at_random(np.random.default_rng(k), 1.0) for k in range(40)]
    assert len({len(one.pools) for one in drawn}) > 2
    assert len({len(one.services[0].variants) for one in drawn}) == 3
    assert any(pool.spot for one in drawn for pool in one.pools)
    assert all(one.pool_by_name[one.services[0].pools[0]].spot is None for one in drawn)
