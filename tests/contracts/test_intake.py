"""Bad measurements of an exported policy: done with as its table says, counted, and said in the reason."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from pilotage.control.guard import Guard
from pilotage.control.handover import Bundled, Handed
from pilotage.control.intake import Measured, table
from pilotage.control.policy import FEATURES, INDEX, Observation, Situation
from pilotage.control.scaling import Predictive, Static
from pilotage.scenario import load
from pilotage.world.spec import SpecError, decode

SCENARIO = load("quickstart")
SITUATION = Situation(SCENARIO.services[0], SCENARIO.pool_by_name, SCENARIO.tick_s, np.full(240, 20.0))
USUAL = {
    "arrival_rate": 20.0,
    "arrival_peak": 30.0,
    "replicas_ready": 3.0,
    "utilization": 0.5,
    "attainment": 0.99,
}


def seen(tick: int, **values: float) -> Observation:
    row = np.ones(len(FEATURES))
    for name in ("replicas_starting", "replicas_pending"):
        row[INDEX[name]] = 0.0
    for name, value in (USUAL | values).items():
        row[INDEX[name]] = value
    return Observation(15.0 * tick, row, np.zeros(len(FEATURES)))


def handed(policy: Any = None, guard: Guard | None = None, **rows: dict[str, Any]) -> Handed:
    """A policy handed over, with some rows of its table changed."""
    observation = tuple(
        msgspec.structs.replace(row, **rows.get(row.name, {}))
        for row in table({"arrival_rate": (5.0, 50.0), "queue_length": (0.0, 100.0)})
    )
    bundled = Bundled(policy=policy or Predictive(), observation=observation, guard=guard or Guard())
    return Handed(bundled, [SITUATION])


def test_good_measurements_pass_unchanged() -> None:
    one, plain = handed(), Predictive().begin(SITUATION)
    for tick in range(20):
        observation = seen(tick, arrival_rate=20.0 + tick)
        assert one.decide([observation])[0] == plain.decide(observation)
    assert not one.counts


@pytest.mark.parametrize(
    ("value", "kind"),
    [(math.nan, "missing"), (math.inf, "infinite"), (-math.inf, "infinite"), (-3.0, "impossible")],
)
def test_what_is_not_known_is_replaced_by_the_last_known(value: float, kind: str) -> None:
    one, plain = handed(), Predictive().begin(SITUATION)
    for tick in range(5):
        one.decide([seen(tick)])
        plain.decide(seen(tick))
    found = one.decide([seen(5, arrival_rate=value)])[0]
    assert found.reason.endswith("last value 20 used")
    assert f"arrival_rate is {kind}" in found.reason
    expected = plain.decide(seen(5))
    assert (found.order, found.release) == (expected.order, expected.release)
    assert one.counts == {f"arrival_rate is {kind}: last": 1}


def test_before_a_value_was_ever_known_it_stays_missing_and_that_is_said() -> None:
    assert (
        "arrival_rate is missing: left missing" in handed().decide([seen(0, arrival_rate=math.nan)])[0].reason
    )


def test_what_may_be_undefined_is_silent_but_an_infinite_one_is_not() -> None:
    one = handed()
    assert one.decide([seen(0, latency_p95=math.nan)])[0].reason.startswith("forecast needs")
    assert not one.counts
    assert "latency_p95 is infinite: left missing" in one.decide([seen(1, latency_p95=math.inf)])[0].reason


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_nothing_is_decided_while_replicas_are_not_counted(value: float) -> None:
    one = handed(Static(replicas=9))
    assert one.decide([seen(0)])[0].order == 6
    held = one.decide([seen(1, replicas_ready=value)])[0]
    assert (held.order, held.release) == (0, 0)
    assert held.reason.startswith("held: replicas_ready is")


def test_what_is_beyond_the_seen_range_is_used_clipped_or_refused_as_the_table_says() -> None:
    crowd = {"arrival_rate": 500.0}
    used, clipped, refused = (
        handed(),
        handed(arrival_rate={"beyond": "clip"}),
        handed(arrival_rate={"beyond": "hold"}),
    )
    at_the_edge = handed()
    for tick in range(4):
        for one in (used, clipped, refused, at_the_edge):
            one.decide([seen(tick)])
    more = used.decide([seen(4, **crowd)])[0]
    assert more.reason.endswith("; beyond what was seen: arrival_rate 500 (5 to 50)")
    less = clipped.decide([seen(4, **crowd)])[0]
    edge = at_the_edge.decide([seen(4, arrival_rate=50.0)])[0]
    assert (less.order, less.release) == (edge.order, edge.release)
    assert "clipped" in less.reason
    assert more.order > less.order
    none = refused.decide([seen(4, **crowd)])[0]
    assert (none.order, none.release) == (0, 0)
    assert none.reason == "held: arrival_rate 500 is beyond the seen 5 to 50: no decision"
    assert used.counts == {"arrival_rate beyond: accept": 1}


def test_bad_measurements_of_one_service_touch_no_other() -> None:
    bundled = Bundled(policy=Predictive(), observation=table(), guard=Guard())
    together, plain = bundled.begin_together([SITUATION] * 3), Predictive().begin_together([SITUATION] * 3)
    good = [seen(0)] * 3
    together.decide(good)
    plain.decide(good)
    found = together.decide([seen(1), seen(1, arrival_rate=math.nan, replicas_ready=math.nan), seen(1)])
    expected = plain.decide([seen(1)] * 3)
    assert found[0] == expected[0]
    assert found[2] == expected[2]
    assert found[1].reason.startswith("held: ")
    assert "arrival_rate is missing" in found[1].reason


def test_the_guard_of_a_bundle_holds_alone_and_together() -> None:
    guard = Guard(max_order=2, max_replicas=8)
    bundled = Bundled(policy=Static(replicas=60), observation=table(), guard=guard)
    for rows in (1, 4):
        for found in bundled.begin_together([SITUATION] * rows).decide([seen(0)] * rows):
            assert found.order == 2
            assert found.reason.endswith("limited by guard")
        for found in bundled.begin_together([SITUATION] * rows).decide([seen(0, replicas_ready=11.0)] * rows):
            assert (found.order, found.release) == (0, 3)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"name": "arrival_rat", "unit": "requests/s"}, "did you mean 'arrival_rate'"),
        ({"name": "arrival_rate", "unit": "requests/min"}, "here it is in 'requests/s'"),
        ({"name": "queue_length", "unit": "requests", "low": 5.0, "high": 1.0}, "low <= seen <= high"),
        ({"name": "queue_length", "unit": "requests", "seen": [-1.0, 3.0]}, "low <= seen <= high"),
        ({"name": "queue_length", "unit": "requests", "missing": "zero"}, "Invalid enum value 'zero'"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        decode(row, Measured, "row")
