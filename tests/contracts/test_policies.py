"""One contract for every policy and the guard around it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.control.forecast import LoadTracker
from pilotage.control.guard import Guard
from pilotage.control.learned import OBSERVATIONS, Learned, policy_from
from pilotage.control.network import Network
from pilotage.control.policy import FEATURES, INDEX, Decision, Observation, Situation
from pilotage.control.saturation import Saturation
from pilotage.control.scaling import (
    Anticipate,
    Autopilot,
    Faro,
    Foresight,
    Hpa,
    InferLine,
    Keda,
    Kpa,
    Mark,
    Predictive,
    PredictiveSeasonal,
    RayServe,
    SageServe,
    Scaling,
    Schedule,
    Staffing,
    Static,
    Wva,
    describe,
    parse,
    tunable,
)
from pilotage.control.steer import Helm
from pilotage.engine.cluster import World
from pilotage.engine.run import simulate
from pilotage.scenario import load
from pilotage.world.arrivals import Poisson
from pilotage.world.spec import SpecError
from tests.strategies import Times

SCENARIO = load("quickstart")
SERVICE = SCENARIO.services[0]
SILENT = Network(
    mean=(0.0,) * len(OBSERVATIONS), scale=(1.0,) * len(OBSERVATIONS), clip=10.0,
    weights=(((0.0,) * len(OBSERVATIONS),) * 3,), biases=((0.3, -0.2, 0.1),),
)  # fmt: skip
POLICIES = [
    Static(replicas=3), Schedule(targets=(1, 5, 2)), Hpa(), Hpa(metric="concurrency"), Staffing(),
    Staffing(rule="erlang-c"), Staffing(rule="little"), Staffing(rule="wait"), Predictive(),
    PredictiveSeasonal(), Kpa(), Kpa(metric="arrival_rate", scale_down_delay_s=60.0), Keda(),
    Keda(metric="queue_length", fallback_replicas=3, idle_replicas=0), RayServe(), InferLine(), Faro(), Mark(),
    Anticipate(), Foresight(), SageServe(), SageServe(gates="lt-ua"), SageServe(gates="reactive"), Wva(), Autopilot(),
    Saturation(),
    Learned(base=Predictive(), network=SILENT),
]  # fmt: skip
named = pytest.mark.parametrize(
    "policy", POLICIES, ids=[f"{k}-{p.__struct_config__.tag}" for k, p in enumerate(POLICIES)]
)


def situation(history: int = 100) -> Situation:
    rates = 40 + 10 * np.sin(np.arange(history) / 50)
    return Situation(SERVICE, SCENARIO.pool_by_name, SCENARIO.tick_s, rates)


def observation(tick: int, **values: float) -> Observation:
    seen = np.full(len(FEATURES), np.nan)
    for name, value in values.items():
        seen[INDEX[name]] = value
    return Observation(15.0 * tick, seen, np.zeros(len(FEATURES)))


@st.composite
def observations(draw, count: int = 12) -> list[Observation]:
    out = []
    for tick in range(count):
        seen = np.array([draw(st.one_of(st.just(math.nan), st.floats(0, 500))) for _ in FEATURES])
        for name in ("replicas_ready", "replicas_starting", "replicas_pending", "replicas_draining"):
            seen[INDEX[name]] = draw(st.integers(0, 30))
        out.append(Observation(15.0 * tick, seen, np.zeros(len(FEATURES))))
    return out


def test_every_policy_is_here() -> None:
    assert set(Scaling.__args__) <= {type(policy) for policy in POLICIES}


@named
@settings(max_examples=25, deadline=None)
@given(seen=observations())
def test_a_policy_keeps_its_contract_behind_the_guard(policy, seen) -> None:
    first, second = (Guard().begin(policy.begin(situation()), situation()) for _ in range(2))
    for one in seen:
        before = one.values.copy()
        decision = first.decide(one)
        assert decision == second.decide(one), "a controller must depend on nothing but what it saw"
        np.testing.assert_array_equal(one.values, before)
        assert decision.order >= 0
        assert 0 <= decision.release <= one.replicas
        after = one.replicas + decision.order - decision.release
        assert SERVICE.min_replicas <= after <= SERVICE.max_replicas
    assert not first.check.interventions["policy failed"]


@named
def test_nothing_known_changes_nothing_outside_the_bounds(policy) -> None:
    controller = policy.begin(situation(history=0))
    for tick in range(5):
        decision = controller.decide(observation(tick))
        assert isinstance(decision, Decision)


@pytest.mark.parametrize("policy", POLICIES[:-1], ids=lambda p: describe(p))
def test_a_policy_is_named_by_what_describes_it(policy) -> None:
    if not isinstance(policy, Schedule):
        assert parse(describe(policy)) == policy
    assert describe(type(policy)(**({"targets": (1,)} if isinstance(policy, Schedule) else {})))


def test_a_policy_file_is_read(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('kind = "hpa"\ntarget_utilization = 0.6\n')
    assert policy_from(str(path)) == Hpa(target_utilization=0.6)
    path.write_text('kind = "hpa"\nup = {rates = [{type = "pods", value = 0, period_s = 15.0}]}\n')
    with pytest.raises(SpecError, match=r"mine.toml.*up.rates\[0\].value"):
        policy_from(str(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [("hpa:up", "field=value"), ("predictive:z=99", "z"), ("stattic", "did you mean 'static'")],
)
def test_a_wrong_argument_says_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        policy_from(text)


@pytest.mark.parametrize("kind", Scaling.__args__, ids=lambda kind: kind.__struct_config__.tag)
def test_every_policy_can_be_tuned_from_its_defaults(kind) -> None:
    found = tunable(kind)
    if kind is Schedule:
        assert not found
        return
    assert found
    for name, bounds in found.items():
        assert bounds.low <= getattr(kind(), name) <= bounds.high, name
        assert not bounds.log or bounds.low > 0, name
        for end in (bounds.low, bounds.high):
            value = round(end) if bounds.integer else end
            assert isinstance(
                kind().replace(**{name: value}).begin(situation()).decide(observation(0)), Decision
            )


@named
def test_a_period_is_none_or_a_positive_number(policy) -> None:
    period_s = policy.period_s()
    assert period_s is None or 0 < period_s <= 3600


@pytest.mark.parametrize(
    "policy", [kind() for kind in Scaling.__args__ if kind not in (Schedule, Static)], ids=describe
)
def test_a_rise_in_load_is_answered_and_a_fall_too(policy) -> None:
    """Half an hour of a load of two replicas, half an hour of eight, an hour of two: more, then fewer."""
    service = SERVICE.replace(traffic=Poisson(rate_rps=1.0))
    scenario = SCENARIO.replace(services=(service,), horizon_h=2.0, start_h=0.0, history_h=0.0)
    if isinstance(policy, Autopilot):  # which remembers three days
        policy = policy.replace(window_s=1800.0, downscale_delay_s=600.0)
    if isinstance(policy, SageServe):  # which plans for the hour
        policy = policy.replace(plan_interval_s=600.0, down_below=0.4)
    rates = [40.0] * 1800 + [160.0] * 1800 + [40.0] * 3600
    times = np.concatenate([k + (np.arange(int(rate)) + 0.5) / rate for k, rate in enumerate(rates)])
    run = simulate(
        scenario, [policy], [World(0, traffic=(Times(times),))], guard=Guard(), keep_timeline=True
    )[0]
    ready = run.timeline["ready"][:, 0]
    at = [int(hour * len(ready) / 2) for hour in (0.5, 1.0, 2.0)]
    calm, busy, later = (int(ready[k - 1]) for k in at)
    assert calm < busy > later
    assert busy >= 6
    assert run.totals["served"].sum() > 0.8 * len(times)


def test_tunable_fields_are_the_bounded_ones() -> None:
    assert set(tunable(Hpa)) == {
        "target_utilization", "tolerance_up", "tolerance_down", "stabilization_up_s", "stabilization_down_s",
    }  # fmt: skip
    assert tunable(Static)["replicas"].integer
    assert tunable(Predictive)["level_s"].log


class Broken:
    def __init__(self, what) -> None:
        self.what = what

    def decide(self, seen):
        if isinstance(self.what, Exception):
            raise self.what
        return self.what


@named
@settings(max_examples=8, deadline=None)
@given(runs=st.lists(observations(), min_size=2, max_size=4))
def test_services_that_are_asked_together_get_what_they_would_get_alone(policy, runs) -> None:
    rows = [situation(history) for history in (100, 0, 7, 2000)[: len(runs)]]
    alone = [policy.begin(row) for row in rows]
    helm = Helm([policy] * len(rows), rows)
    for seen in zip(*runs, strict=True):
        apart = [controller.decide(one) for controller, one in zip(alone, seen, strict=True)]
        assert list(helm.decide(seen)) == apart


def test_one_policy_that_fails_holds_its_own_service_only() -> None:
    rows = [situation(), situation()]
    seen = [observation(0, replicas_ready=4, replicas_starting=0, replicas_pending=0)] * 2

    class Failing(Static, frozen=True):
        def begin(self, situation):
            return Broken(ValueError("no"))

    decisions = Helm([Failing(), Static(replicas=9)], rows, Guard()).decide(seen)
    assert (decisions[0].order, decisions[1].order) == (0, 5)
    assert decisions[0].reason.startswith("held")
    with pytest.raises(ValueError, match="no"):
        Helm([Failing(), Static(replicas=9)], rows).decide(seen)


@pytest.mark.parametrize(
    "what",
    [
        ValueError("no"),
        Decision(order=-1),
        Decision(order=10**9),
        Decision(order=float("nan")),
        Decision(release=2.5),
        Decision(pool="nowhere"),
    ],
)
def test_the_guard_holds_whatever_a_policy_does(what) -> None:
    guarded = Guard().begin(Broken(what), situation())
    decision = guarded.decide(observation(0, replicas_ready=4, replicas_starting=0, replicas_pending=0))
    assert (decision.order, decision.release) == (0, 0)
    assert decision.reason.startswith("held")
    assert sum(guarded.check.interventions.values()) == 1


def test_the_guard_holds_on_missing_or_stale_data_but_keeps_the_bounds() -> None:
    guard = Guard(required=("arrival_rate",), min_replicas=2, stale_after_s=60)
    guarded = guard.begin(Broken(Decision(order=5)), situation())
    seen = observation(0, replicas_ready=1, replicas_starting=0, replicas_pending=0)
    assert guarded.decide(seen).order == 1
    old = observation(0, replicas_ready=3, replicas_starting=0, replicas_pending=0, arrival_rate=9)
    old.age_s[INDEX["arrival_rate"]] = 61
    assert guarded.decide(old).order == 0
    old.age_s[INDEX["arrival_rate"]] = 59
    assert guarded.decide(old).order == 5


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.integers(0, 50)] * 3), min_size=1, max_size=8),
    low=st.integers(0, 10), span=st.integers(0, 20),
    max_order=st.none() | st.integers(1, 5), max_release=st.none() | st.integers(1, 5),
)  # fmt: skip
def test_clamping_ends_within_bounds_and_changes_no_more_than_it_must(
    rows, low, span, max_order, max_release
) -> None:
    order, release, current = np.array(rows).T
    limits = np.tile([low, low + span], (len(rows), 1))
    guard = Guard(max_order=max_order, max_release=max_release)
    a, b = guard.clamp(order, release, current, limits)
    after = current + a - b
    assert (a >= 0).all()
    assert (b >= 0).all()
    assert (b <= current).all()
    assert (after >= low).all()
    assert (after <= low + span).all()
    inside = (current >= low) & (current <= low + span)
    if max_order is not None:
        assert (np.maximum(after - current, 0)[inside] <= max_order).all()
    if max_release is not None:
        assert (np.maximum(current - after, 0)[inside] <= max_release).all()
    same = (
        (current + order - release >= low) & (current + order - release <= low + span) & (release <= current)
    )
    if max_order is None and max_release is None:
        np.testing.assert_array_equal(a[same], order[same])
        np.testing.assert_array_equal(b[same], release[same])


# --- the forecast ------------------------------------------------------------------------------------------
def tracker(histories: list[np.ndarray], **changes) -> LoadTracker:
    options = {"level_s": 60.0, "trend_s": 600.0, "damping": 0.98, "seasonal_weight": 0.0, "error_s": 1800.0}
    return LoadTracker(15.0, np.full(len(histories), 60.0), histories, **(options | changes))


def test_a_constant_load_is_forecast_exactly() -> None:
    t = tracker([np.full(500, 30.0)])
    for _ in range(50):
        t.update(np.array([30.0]), np.array([31.0]))
    assert t.forecast[0] == pytest.approx(30.0)
    assert t.forecast_error[0] == pytest.approx(0.0, abs=1e-9)
    assert t.highest(60)[0] == 31.0


def test_a_ramp_is_followed_ahead() -> None:
    t = tracker([np.zeros(0)], damping=0.99)
    for k in range(800):
        t.update(np.array([0.1 * k]), np.array([0.1 * k]))
    assert t.forecast[0] > 0.1 * 799  # ahead of now
    assert t.forecast[0] == pytest.approx(0.1 * 803, abs=0.6)


def test_a_day_of_history_beats_none_on_a_daily_rhythm() -> None:
    day = round(86400 / 15)
    load = 50 + 40 * np.sin(2 * np.pi * 12 * np.arange(2 * day) / day)  # twelve waves a day
    errors = []
    for weight in (0.0, 1.0):
        t = tracker([load[: day + 20]], seasonal_weight=weight)
        wrong = []
        for k in range(day + 20, 2 * day - 4):
            t.update(load[k : k + 1], load[k : k + 1])
            wrong.append(t.forecast[0] - load[k + 4])
        errors.append(float(np.sqrt(np.mean(np.square(wrong)))))
    assert errors[1] < 0.5 * errors[0]


def test_rows_do_not_know_of_one_another_and_missing_values_carry_forward() -> None:
    rng = np.random.default_rng(3)
    histories = [rng.uniform(0, 50, n) for n in (0, 40, 700)]
    loads = rng.uniform(0, 50, (300, 3))
    loads[rng.random((300, 3)) < 0.1] = np.nan
    together = tracker(histories)
    alone = [tracker([history]) for history in histories]
    for row in loads:
        together.update(row, row * 1.5)
        for k, one in enumerate(alone):
            one.update(row[k : k + 1], row[k : k + 1] * 1.5)
    for k, one in enumerate(alone):
        for name in ("forecast", "forecast_error", "fast", "slow", "rate", "peak"):
            assert getattr(together, name)[k] == getattr(one, name)[0]
        assert together.lag(3600)[k] == one.lag(3600)[0]
        assert together.highest(300)[k] == one.highest(300)[0]
    assert np.isfinite(together.forecast).all()
