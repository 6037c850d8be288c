"""Policies of two levels find out that replicas serve less than their law says, and order more."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pilotage.control.guard import Guard
from pilotage.control.learned import policy_from
from pilotage.control.policy import FEATURES, INDEX, Controller, Policy, Situation
from pilotage.control.shortfall import MOST, RISE, Shortfall
from pilotage.engine.cluster import World
from pilotage.engine.run import simulate
from pilotage.scenario import load
from pilotage.world.arrivals import Poisson
from pilotage.world.servers import Affine

QUICKSTART = load("quickstart")
SITUATION = Situation(QUICKSTART.services[0], QUICKSTART.pool_by_name, 15.0, np.zeros(0))


def seen(**values: float) -> np.ndarray:
    row = np.full((1, len(FEATURES)), math.nan)
    known = {"completion_rate": 50.0, "drop_rate": 0.0, "replicas_starting": 0.0, "replicas_pending": 0.0}
    for name, value in (known | values).items():
        row[0, INDEX[name]] = value
    return row


def factors(shortfall: Shortfall, *rows: np.ndarray) -> list[float]:
    out = []
    for row in rows:
        shortfall.update(row)
        out.append(float(shortfall.factor[0]))
    return out


def test_by_hand() -> None:
    """Half of 50 requests a second late costs more than a replica. Another takes six ticks to come: from the seventh
    tick of that on the factor rises; what is on its way, or not measured, ends it, and it falls only slowly."""
    late = seen(attainment=0.5)
    shortfall = Shortfall([SITUATION], np.array([6]))
    assert factors(shortfall, *[late] * 8) == [1.0] * 6 + [RISE, RISE**2]
    assert 1.0 < factors(shortfall, seen(attainment=0.5, replicas_starting=1.0))[0] < RISE**2
    assert max(factors(shortfall, *[late] * 6)) < RISE**2  # the count begins anew
    assert factors(shortfall, *[late] * 40)[-1] == MOST
    fallen = factors(shortfall, *[seen(attainment=1.0)] * 960)[-1]  # four hours
    assert fallen - 1 == pytest.approx((MOST - 1) / math.e, rel=1e-6)


def test_what_is_no_evidence_changes_nothing() -> None:
    service = SITUATION.service
    a_replica_s = SITUATION.replica_usd_per_hour / 3600 / service.economics.late_usd  # requests a second
    for row in (
        seen(attainment=math.nan),
        seen(attainment=0.5, replicas_pending=math.nan),
        seen(attainment=1 - 0.9 * a_replica_s / 50),  # costs less than a replica
    ):
        assert factors(Shortfall([SITUATION], np.array([4])), *[row] * 20) == [1.0] * 20


class Misled(Policy, frozen=True, kw_only=True, tag="misled"):
    """The shipped policy, which is told that batches take half the time that they do."""

    def begin(self, situation: Situation) -> Controller:
        service = situation.service
        (variant,) = service.variants
        laws = {}
        for pool, law in variant.latency.items():
            assert isinstance(law, Affine)
            laws[pool] = law.replace(base_ms=law.base_ms / 2, per_item_ms=law.per_item_ms / 2)
        told = service.replace(variants=(variant.replace(latency=laws),))
        return policy_from("learned").begin(
            Situation(told, situation.pools, situation.tick_s, situation.history_rps)
        )


def test_a_policy_that_is_told_too_much_of_its_replicas_comes_to_order_what_is_needed() -> None:
    capacity_rps = SITUATION.capacity_rps()
    service = QUICKSTART.services[0].replace(traffic=Poisson(rate_rps=4 * capacity_rps), initial_replicas=3)
    scenario = QUICKSTART.replace(services=(service,), horizon_h=1.5)
    (run,) = simulate(scenario, [Misled()], [World(3)], guard=Guard(), keep_timeline=True)
    assert run.timeline is not None
    ready = run.timeline["ready"][:, 0]
    assert ready[:20].max() < 4.5
    last = run.timeline[-60:]
    assert last["late"].sum() < 0.02 * last["served"].sum()
    assert 5 <= ready[-60:].mean() < 9
