"""The guard's brakes: cool-down, dollars, inputs the policy does not know, the fallback, and the switch for all."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.control.guard import Check, Guard, Range
from pilotage.control.hpa import Hpa
from pilotage.control.policy import FEATURES, INDEX, Decision, Observation, Policy, Situation
from pilotage.control.steer import Helm
from pilotage.world.arrivals import Poisson
from pilotage.world.pools import Pool, Resources
from pilotage.world.servers import Affine, BatchServer, Variant
from pilotage.world.services import Service
from pilotage.world.spec import SpecError, decode


def situation(price_usd: float = 2.0, name: str = "s", copies: int = 1, **limits: int) -> Situation:
    resources = Resources(gpus=1.0 / copies) if copies > 1 else None
    node = Resources(gpus=1.0) if copies > 1 else None
    variant = Variant(name="v", latency={"p": Affine(base_ms=20, per_item_ms=10)}, resources=resources)
    service = Service(
        name=name, traffic=Poisson(rate_rps=1), slo_ms=500, pools=("p",), variants=(variant,),
        server=BatchServer(max_batch=8), **({"max_replicas": 50} | limits),
    )  # fmt: skip
    return Situation(
        service=service,
        pools={"p": Pool(name="p", price_usd_per_hour=price_usd, node=node)},
        tick_s=15,
        history_rps=np.zeros(0),
    )


def seen(now_s: float, replicas: float, **values: float) -> Observation:
    columns = np.full(len(FEATURES), np.nan)
    counts = {"replicas_ready": replicas, "replicas_starting": 0.0, "replicas_pending": 0.0}
    for name, value in (counts | {"utilization": 0.5, "arrival_rate": 10.0} | values).items():
        columns[INDEX[name]] = value
    return Observation(now_s, columns, np.zeros(len(FEATURES)))


def judged(guard: Guard, *ticks: tuple[Observation, Decision | Exception]) -> list[Decision]:
    check = Check(guard, [situation()])
    return [check([one], [wanted])[0] for one, wanted in ticks]


def test_within_a_cooldown_nothing_is_ordered_or_released_but_bounds_hold() -> None:
    guard = Guard(order_cooldown_s=30, release_cooldown_s=60, min_replicas=2)
    more, fewer = Decision(order=1), Decision(release=1)
    found = judged(
        guard,
        (seen(0, 4), more),  # never changed as far as is known
        (seen(15, 5), more),  # the count has just changed
        (seen(30, 5), fewer),
        (seen(45, 5), more),  # 30 s after the change
        (seen(60, 5), fewer),
        (seen(75, 5), fewer),  # 60 s after
        (seen(90, 1), Decision()),  # someone took four away: the floor is not a matter of cooling down
    )
    assert [(d.order, d.release) for d in found] == [(1, 0), (0, 0), (0, 0), (1, 0), (0, 0), (0, 1), (1, 0)]
    assert found[1].reason.endswith("limited by guard")


@pytest.mark.parametrize("later_s", [-3600.0, 0.0, 3600.0])
def test_services_at_other_times_of_the_clock_cool_down_by_their_own(later_s: float) -> None:
    """Worlds that are simulated together begin at different times: a change in one is no reason to wait in another."""
    check = Check(Guard(order_cooldown_s=30), [situation()] * 2)
    found = [
        [one.order for one in check([seen(now_s, a), seen(now_s + later_s, b)], [Decision(order=1)] * 2)]
        for now_s, a, b in ((0, 4, 4), (15, 4, 5), (30, 5, 5), (45, 5, 5), (60, 5, 5))
    ]
    assert found == [[1, 1], [1, 0], [0, 0], [0, 1], [1, 1]]


def test_a_change_from_before_the_start_counts() -> None:
    check = Check(Guard(order_cooldown_s=30), [situation()], changed_s=[-10.0])
    orders = [check([seen(now_s, 3)], [Decision(order=1)])[0].order for now_s in (0, 15, 30)]
    assert orders == [0, 0, 1]


def test_dollars_of_a_service_are_a_bound_in_the_currency_of_shares_of_nodes() -> None:
    assert Guard(max_usd_per_hour=7).limits(situation(price_usd=2)) == (1, 3)
    assert Guard(max_usd_per_hour=7).limits(situation(price_usd=2, copies=4)) == (1, 14)
    assert Guard(max_usd_per_hour=1e-6).limits(situation(price_usd=0)) == (1, 50)
    with pytest.raises(SpecError, match="buys 0 replicas of service 's' at 2"):
        Guard(max_usd_per_hour=1).limits(situation(price_usd=2))
    with pytest.raises(SpecError, match="valid: at least 4"):
        Check(Guard(max_total_usd_per_hour=3), [situation(name="a"), situation(name="b")])


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 5), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    ceiling=st.floats(20, 200),
)
def test_no_order_takes_the_total_over_its_ceiling(rows, ceiling) -> None:
    here = [situation(price_usd=1.0 + k % 3, name=f"s{k}") for k in range(len(rows))]
    prices = np.array([s.replica_usd_per_hour for s in here])
    check = Check(Guard(max_total_usd_per_hour=ceiling), here)
    before = np.array([n for n, *_ in rows])
    first = check([seen(0, n) for n in before], [Decision()] * len(rows))
    assert all((d.order, d.release) == (0, 0) for d in first)
    # then some cannot be counted: they cost what they did
    now = [seen(15, n if known else math.nan) for n, _, _, known in rows]
    found = check(now, [Decision(order=o, release=min(r, n)) for n, o, r, _ in rows])
    orders, releases = np.array([d.order for d in found]), np.array([d.release for d in found])
    kept = before - np.minimum(orders, releases)  # what others release may fail to go
    assert float((kept + orders) @ prices) <= max(ceiling, float(before @ prices)) + 1e-6
    asked = np.array([o if known else 0 for _, o, _, known in rows])
    if float((before - np.minimum(asked, releases) + asked) @ prices) <= ceiling:
        assert orders.tolist() == asked.tolist()  # what can be afforded is not cut
    for (_, _, _, known), d in zip(rows, found, strict=True):
        assert known or (d.order, d.release) == (0, 0)


def test_fleets_have_a_ceiling_each() -> None:
    check = Check(Guard(max_total_usd_per_hour=10), [situation() for _ in range(4)], fleet=2)
    found = check([seen(0, 2), seen(0, 2), seen(0, 4), seen(0, 1)], [Decision(order=3)] * 4)
    assert sum(d.order for d in found[:2]) == 0  # half a replica each
    assert sum(d.order for d in found[2:]) == 0
    found = check([seen(0, 1), seen(0, 1), seen(0, 1), seen(0, 1)], [Decision(order=3), Decision()] * 2)
    assert [d.order for d in found] == [3, 0, 3, 0]


@pytest.mark.parametrize(
    "wanted",
    [
        ValueError("bug"),
        Decision(order=math.nan),
        Decision(order=-1),
        Decision(pool="nowhere"),
        Decision(variant="x"),
    ],  # type: ignore[arg-type]
)
def test_where_a_policy_fails_the_fallback_decides_as_the_hpa_would(wanted) -> None:
    inputs = [seen(15.0 * k, 4, utilization=u) for k, u in enumerate((0.5, 0.99, 0.99, 0.1))]
    alone = Hpa().begin(situation())
    expected = [alone.decide(one) for one in inputs]
    guard = Guard(fallback=Hpa())
    found = judged(guard, *[(one, Decision()) for one in inputs[:2]], *[(one, wanted) for one in inputs[2:]])
    assert [d.order for d in found[:2]] == [0, 0]
    assert [(d.order, d.release) for d in found[2:]] == [(d.order, d.release) for d in expected[2:]]
    assert expected[2].order > 0
    assert found[2].reason.startswith("fallback, utilization proposes")
    held = judged(Guard(), (inputs[1], wanted))[0]
    assert (held.order, held.release) == (0, 0)
    assert held.reason.startswith("held: ")


def test_missing_data_are_held_even_where_there_is_a_fallback() -> None:
    guard = Guard(fallback=Hpa(), required=("arrival_rate",))
    found = judged(guard, (seen(0, 4, utilization=0.99, arrival_rate=math.nan), Decision(order=2)))[0]
    assert (found.order, found.reason) == (0, "held: arrival_rate is missing or stale")


def test_inputs_beyond_their_range_are_not_the_policys_to_judge() -> None:
    guard = Guard(ranges=(Range(feature="arrival_rate", low=0, high=100),), outside=0.1)
    found = judged(
        guard,
        (seen(0, 4, arrival_rate=109.9), Decision(order=1, reason="r")),
        (seen(15, 4, arrival_rate=110.1), Decision(order=1)),
        (seen(30, 4, arrival_rate=math.nan), Decision(order=1, reason="r")),
    )
    assert [d.order for d in found] == [1, 0, 1]
    assert "arrival_rate of 110.1; known from 0 to 100" in found[1].reason
    with pytest.raises(SpecError, match="did you mean 'arrival_rate'"):
        Range(feature="arrival_rat", low=0, high=1)
    with pytest.raises(SpecError, match="low <= high"):
        Range(feature="arrival_rate", low=2, high=1)
    with pytest.raises(SpecError, match="did you mean 'arrival_rate'"):
        decode({"required": ["arival_rate"]}, Guard, "guard")
    assert (
        decode({"required": ["arrival_rate"], "fallback": {"kind": "hpa"}}, Guard, "guard").fallback == Hpa()
    )


def test_the_switch_stops_everything_at_once_and_again_lets_go(tmp_path: Path) -> None:
    switch = tmp_path / "HOLD"
    check = Check(Guard(hold_file=str(switch), min_replicas=3), [situation()])
    assert check([seen(0, 1)], [Decision()])[0].order == 2
    switch.write_text("")
    found = check([seen(15, 1)], [Decision(order=5)])[0]
    assert (found.order, found.reason) == (0, "held: everything: hold_file is there")  # not even the floor
    switch.unlink()
    assert check([seen(30, 1)], [Decision()])[0].order == 2
    assert (
        judged(Guard(hold=True), (seen(0, 4), Decision(order=1)))[0].reason == "held: everything: hold is set"
    )
    beneath = tmp_path / "file"
    beneath.write_text("")
    assert Guard(hold_file=str(beneath / "HOLD")).stopped() is None
    assert Guard(hold_file=str(tmp_path / ("x" * 5000))).stopped() is not None  # cannot be looked for


# --- policies that are late --------------------------------------------------------------------------------------
class Hangs(Policy, frozen=True, kw_only=True, tag="hangs-in-a-test"):
    def begin(self, situation: Situation) -> HangingController:
        return HangingController()


class HangingController:
    gate = threading.Event()
    asked = 0

    def decide(self, seen: Observation) -> Decision:
        type(self).asked += 1
        self.gate.wait(20)
        return Decision(order=1, reason="at last")


class One(Policy, frozen=True, kw_only=True, tag="one-in-a-test"):
    def begin(self, situation: Situation) -> OneController:
        return OneController()


class OneController:
    def decide(self, seen: Observation) -> Decision:
        return Decision(order=1, reason="one")


def test_a_policy_that_hangs_costs_its_tick_and_nobody_elses() -> None:
    HangingController.gate.clear()
    HangingController.asked = 0
    policies: Sequence[Policy] = [One(), Hangs(), One()]
    helm = Helm(policies, [situation(name=f"s{k}") for k in range(3)], Guard(fallback=Hpa()), within_s=0.2)
    now = [seen(0, 4)] * 3
    began = time.monotonic()
    first = helm.decide(now)
    assert time.monotonic() - began < 5
    assert first[0].order == 1
    assert "no decision within 0.2 s" in first[1].reason
    assert "no decision within" in first[2].reason  # it was behind the one that hangs, this once
    second = helm.decide(now)
    assert [d.order for d in second] == [1, 0, 1]
    assert HangingController.asked == 1  # it is not asked again while it hangs
    HangingController.gate.set()
    deadline = time.monotonic() + 10
    while helm.decide(now)[1].order != 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
