"""The research baselines against outputs of the originals, or values worked out from their formulae.

InferLine, Faro, MArk, SageServe and WVA have no tests of their own that could be named; cases carry a number.
"""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.control import faro, inferline, mark, sageserve, wva
from pilotage.control.fleet import Fleet
from pilotage.control.policy import FEATURES, INDEX, Observation, Situation
from pilotage.scenario import load

SCENARIO = load("quickstart")
SERVICE = SCENARIO.services[0]
SPOT = load("spot-fleet")


def numbered(name: str, count: int) -> list[str]:
    return [f"{name} {k}" for k in range(1, count + 1)]


def observation(now_s: float, ready: int, **values: float) -> Observation:
    seen = np.full(len(FEATURES), np.nan)
    seen[[INDEX["replicas_ready"], INDEX["replicas_starting"], INDEX["replicas_pending"]]] = ready, 0, 0
    for name, value in values.items():
        seen[INDEX[name]] = value
    return Observation(now_s, seen, np.zeros(len(FEATURES)))


# --- InferLine ------------------------------------------------------------------------------------------------
def test_envelope() -> None:  # InferLine 1
    windows = inferline.windows(0.1, 0.8)
    np.testing.assert_allclose(windows, [0.1, 0.2, 0.4, 0.8])
    counts = inferline.envelope(np.array([0, 0.05, 0.1, 0.9]), windows)
    assert counts.tolist() == [3, 3, 3, 3]
    np.testing.assert_allclose(counts / windows, [30, 15, 7.5, 3.75])
    assert inferline.windows(1.0).tolist() == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("rate", "sample", "scale_factor", "expected"),
    [(120, 100, 1.0, 3), (120, 100, 0.5, 2), (120, 120, 1.0, 2)],
    ids=["InferLine 2", "InferLine 3", "InferLine 4"],
)
def test_scaling_up(rate, sample, scale_factor, expected) -> None:
    rates, known = np.array([rate, 10.0]), np.array([sample, 50.0])
    model = {"scale_factor": scale_factor, "throughput_rps": 50.0, "provisioning": 0.8}
    assert inferline.scale_up(rates, known, 2, **model) == expected


@pytest.mark.parametrize(("quiet_s", "expected"), [(20, 2), (10, 4)], ids=["InferLine 5", "InferLine 6"])
def test_scaling_down(quiet_s, expected) -> None:
    model = {"scale_factor": 1.0, "throughput_rps": 50.0, "provisioning": 0.6}
    assert inferline.scale_down(40.0, 4, quiet_s, **model) == expected


def test_the_envelope_of_counts_is_that_of_arrivals_in_whole_seconds() -> None:
    counts = np.array([3, 0, 1, 7, 2, 0])
    assert inferline.envelope_of_counts(counts, [1, 2, 4, 8]).tolist() == [7, 9, 11, 0]


def test_the_plan_lets_nothing_of_the_envelope_wait_too_long() -> None:
    windows, envelope = np.array([1.0, 2, 4]), np.array([30.0, 40, 60])
    count = inferline.planned(envelope, windows, throughput_rps=10.0, spare_s=0.5)
    assert count == 2  # 30 / (10 * 1.5), 40 / (10 * 2.5), 60 / (10 * 4.5)
    assert np.all(envelope / (10 * count) - windows <= 0.5)
    assert inferline.planned(envelope, windows, throughput_rps=10.0, spare_s=0.49) == 3


def test_the_tuner_follows_its_envelope() -> None:
    steady = np.full(600, 20.0)
    controller = inferline.InferLine().begin(Situation(SERVICE, SCENARIO.pool_by_name, 1.0, steady))
    # planned for 20 a second at 26.7: one replica, busy for 75 %
    assert controller.decide(observation(0, 1, arrival_rate=20.0)).order == 0
    assert controller.decide(observation(1, 1, arrival_rate=40.0)).order == 1  # 40 / (26.7 * 0.75)
    released = [controller.decide(observation(2 + k, 2, arrival_rate=20.0)).release for k in range(40)]
    # the envelope of 32 s stays exceeded for half a minute; only then, and 15 s after the change, one goes
    assert sum(released[:13]) == 0
    assert 1 in released


# --- Faro -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rate", "replicas", "latency_ms", "utility"),
    [
        (10, 3, 447.661, 1),
        (10, 2, 2180.584, 0.330187),
        (20, 3, 3643.630, 0.197605),
        (20, 4, 1162.485, 0.619363),
        (2, 1, 683.932, 1),
        (5, 1, 4229.829, 0.170220),
    ],
    ids=numbered("Faro", 6),
)
def test_latency_and_utility(rate, replicas, latency_ms, utility) -> None:
    latency_s = faro.latency_s(rate, 0.18, replicas)
    assert 1e3 * latency_s == pytest.approx(latency_ms, abs=1e-3)
    assert faro.utility(latency_s, 0.72) == pytest.approx(utility, abs=1e-6)
    assert faro.utility(latency_s, 0.72, step=True) == (utility == 1)


def test_the_solution_is_the_least_count_of_the_best_utility() -> None:
    rates = np.full(7, 10.0)
    assert faro.solve(rates, 0.18, 0.72, 1, 20) == 3
    assert faro.solve(np.zeros(7), 0.18, 0.72, 5, 20) == 1
    assert faro.solve(np.full(7, 1000.0), 0.18, 0.72, 5, 20) == 20
    # one that grows has its old count at first, but that is no reason not to grow
    assert faro.solve(rates, 0.18, 0.72, 1, 20, starting_steps=2) == 3
    slow = faro.mean_utility(rates, 0.18, 0.72, 2, 3, starting_steps=3)
    assert slow == pytest.approx((3 * 0.330187 + 4) / 7, abs=1e-6)
    assert faro.mean_utility(rates, 0.18, 0.72, 4, 3, starting_steps=3) == 1.0


def test_between_solutions_a_lasting_miss_adds_a_replica() -> None:
    past = np.full(360, 20.0)
    controller = faro.Faro().begin(Situation(SERVICE, SCENARIO.pool_by_name, 10.0, past))
    orders = []
    for k, latency in enumerate([0.1, 0.9, 0.9, 0.75, 0.9, 0.9, 0.9, 0.9]):
        decision = controller.decide(observation(10.0 * k, 2, arrival_rate=20.0, latency_mean=latency))
        orders.append(decision.order)
    assert orders[1:] == [0, 0, 0, 0, 0, 1, 0]


# --- MArk -----------------------------------------------------------------------------------------------------
A = mark.InstanceType(10.0, 0.0001, 0.018)
B = mark.InstanceType(40.0, 0.0003, 0.054)


@pytest.mark.parametrize(
    ("forecast", "running", "wanted", "launch", "surplus"),
    [
        ([35] * 50, (0, 0), (0, 1), (0, 1), (0, 0)),
        ([35] * 50, (2, 0), (0, 1), (0, 1), (2, 0)),
        ([8] * 50, (0, 1), (1, 0), (1, 0), (0, 1)),
        ([8] * 3 + [80] * 3 + [8] * 44, (1, 0), (1, 2), (0, 2), (0, 0)),
        ([8] * 10 + [80] * 40, (1, 0), (0, 1), (0, 1), (1, 0)),
        ([0] * 25 + [-3] * 25, (3, 2), (0, 0), (0, 0), (3, 2)),
    ],
    ids=numbered("MArk", 6),
)
def test_plan(forecast, running, wanted, launch, surplus) -> None:
    assert mark.plan(np.array(forecast), [A, B], running) == mark.Plan(wanted, launch, surplus)


def test_of_equal_costs_the_later_row_wins() -> None:
    assert mark.plan(np.full(50, 8.0), [A, A], (0, 0)).wanted == (0, 1)
    free = mark.InstanceType(10.0, 0.0001, 0.0)
    assert mark.plan(np.full(50, 8.0), [free], (1,)) == mark.Plan((1,), (0,), (0,))


def test_what_is_surplus_for_six_rounds_goes_and_then_nothing_for_five() -> None:
    controller = mark.Mark().begin(Situation(SERVICE, SCENARIO.pool_by_name, 60.0, np.full(60, 1.0)))
    ready, released = 6, []
    for k in range(20):
        decision = controller.decide(observation(60.0 * k, ready, arrival_rate=1.0))
        ready -= decision.release
        released.append(decision.release)
    assert released.index(5) == 5
    assert sum(released) == 5
    assert ready == 1


# --- SageServe ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("present", "demand", "expected"),
    [(1, 101, 1), (1, 10, 0), (3, 10, -2), (1, 0, -1)],
    ids=numbered("SageServe", 4),
)
def test_allocation(present, demand, expected) -> None:
    assert sageserve.allocation([present], [100], [10], [150], demand) == [expected]


def test_an_allocation_keeps_what_runs_unless_it_pays_to_start() -> None:
    # demand 100: three dear ones of 40 run; two cheap ones of 60 would do, at 8 and 120 to start
    assert sageserve.allocation([3, 0], [40, 60], [10, 8], [150, 120], 100) == [0, 0]
    assert sageserve.allocation([3, 0], [40, 60], [10, 8], [0, 0], 100) == [-3, 2]


@pytest.mark.parametrize(
    ("utilization", "pending", "expected"),
    [(0.6, 2, (1, 1)), (0.4, 2, (0, 2)), (0.95, 0, (1, -1)), (0.2, -1, (-1, 0))],
    ids=[f"SageServe {k}" for k in range(5, 9)],
)
def test_gate(utilization, pending, expected) -> None:
    assert sageserve.gate("lt-u", utilization, pending) == expected


def test_the_other_gates() -> None:
    assert [sageserve.gate("reactive", u, 7)[0] for u in (0.2, 0.3, 0.51)] == [-1, 0, 1]
    assert sageserve.gate("lt-ua", 0.95, 0, surprise=4.9) == (0, 0)
    assert sageserve.gate("lt-ua", 0.3, 0, surprise=5.1) == (1, -1)
    assert sageserve.gate("lt-ua", 0.6, 1, surprise=5.1) == (1, 0)


def test_one_change_at_a_time() -> None:
    policy = sageserve.SageServe(gates="reactive")
    controller = policy.begin(Situation(SERVICE, SCENARIO.pool_by_name, 15.0, np.full(60, 20.0)))
    orders = [
        controller.decide(observation(15.0 * k, 2, arrival_rate=20.0, concurrency=12.0)).order
        for k in range(9)
    ]
    assert orders == [1, 0, 0, 0, 1, 0, 0, 0, 1]  # 60 s to start


# --- WVA ------------------------------------------------------------------------------------------------------
LLAMA = wva.Profile(alpha=20.58, beta=0.41, gamma=5.2, delta=0.1, tokens_in=128, tokens_out=128, max_batch=64)
SMALL = wva.Profile(
    alpha=7, beta=0.03, gamma=5.2, delta=0.0007, tokens_in=1024, tokens_out=128, max_batch=256
)


def test_range() -> None:  # WVA 1
    assert LLAMA.service_rps(1) == pytest.approx(0.372616, rel=1e-5)
    assert LLAMA.range_rps[1] == pytest.approx(9.443264, rel=1e-6)


@pytest.mark.parametrize(
    ("profile", "rate", "ttft", "itl", "concurrency", "in_service"),
    [(LLAMA, 5, 272.213, 29.1327, 20.8604, 19.8604), (SMALL, 30, 28.280, 7.96596, 32.1987, None)],
    ids=["WVA 2", "WVA 6"],
)
def test_performance(profile, rate, ttft, itl, concurrency, in_service) -> None:
    found = profile.analyse(rate)
    assert found.ttft_ms == pytest.approx(ttft, rel=1e-5)
    assert found.itl_ms == pytest.approx(itl, rel=1e-5)
    assert found.concurrency == pytest.approx(concurrency, rel=1e-5)
    if in_service is not None:
        assert found.in_service == pytest.approx(in_service, rel=1e-5)
        assert found.wait_ms == pytest.approx(3.1e-7, rel=0.05)


@pytest.mark.parametrize(
    ("profile", "targets", "expected"),
    [
        (LLAMA, {"ttft_ms": 500}, 7.33284),
        (LLAMA, {"itl_ms": 24}, 2.32327),
        (SMALL, {"ttft_ms": 500}, 122.752),
        (SMALL, {"itl_ms": 10}, 73.5032),
    ],
    ids=["WVA 3", "WVA 4", "WVA 7, TTFT", "WVA 7, ITL"],
)
def test_highest_rate(profile, targets, expected) -> None:
    assert profile.highest_rps(**targets) == pytest.approx(expected, rel=1e-5)


def test_replicas() -> None:  # WVA 5
    rate = LLAMA.highest_rps(ttft_ms=500, itl_ms=24)
    assert wva.replicas(600 / 60, LLAMA.analyse(rate).throughput_rps) == 5


def test_infeasible() -> None:  # WVA 8
    with pytest.raises(wva.Infeasible):
        SMALL.highest_rps(itl_ms=7)


def test_targets_out_of_range_and_token_rates() -> None:
    high = LLAMA.range_rps[1]
    assert LLAMA.highest_rps(ttft_ms=1e6) == high
    assert LLAMA.highest_rps(tps=1000) == pytest.approx(0.9 * high)
    assert wva.replicas(1.0, 5.0, tps=1280, tokens_out=128) == 2
    assert wva.replicas(0.0, 5.0, low=0) == 0


def test_a_cheaper_accelerator_is_taken_where_the_saving_exceeds_the_penalty() -> None:
    assert wva.value(10, 10, same=True) == 0
    assert wva.value(8, 10, same=False) == pytest.approx(-0.2)  # 10 % of 18 is less than 2
    assert wva.value(8.5, 10, same=False) > 0


def test_a_change_of_accelerator_replaces_all() -> None:
    service = SPOT.services[0]
    assert service.pools == ("spot-near", "on-demand")
    prices = {name: pool.replace(price_usd_per_hour=0.2 if name == "on-demand" else 1.0, spot=None)
              for name, pool in SPOT.pool_by_name.items()}  # fmt: skip
    controller = wva.Wva().begin(Situation(service, prices, 60.0, np.zeros(0)))
    decision = controller.decide(observation(0, 4, arrival_rate=50.0))
    assert decision.pool == "on-demand"
    assert decision.release == 4
    assert decision.order > 0
    again = controller.decide(observation(60, decision.order, arrival_rate=50.0))
    assert (again.order, again.release) == (0, 0)


# --- which pools replicas are in ------------------------------------------------------------------------------
def test_a_fleet_remembers_its_orders_and_loses_the_youngest() -> None:
    fleet = Fleet(("a", "b"))
    fleet.settle(2)
    fleet.order("b", 3, "")
    assert fleet.counts == {"a": 2, "b": 3}
    fleet.settle(4)
    assert fleet.counts == {"a": 2, "b": 2}
    fleet.settle(5)  # someone else ordered: where orders went last
    assert fleet.counts == {"a": 2, "b": 3}
    assert fleet.release_surplus({"a": 2, "b": 0}, "").release == 0  # the youngest have to stay
    assert fleet.release_surplus({"a": 2, "b": 1}, "").release == 1
    assert fleet.release_surplus({"a": 1, "b": 5}, "").release == 3
    assert fleet.counts == {"a": 1, "b": 0}
    assert fleet.move("a", 4, "").order == 3
    moved = fleet.move("b", 2, "")
    assert (moved.order, moved.release, moved.pool) == (2, 4, "b")
    assert fleet.counts == {"a": 0, "b": 2}


def test_mark_launches_in_the_pool_that_is_cheapest_for_a_request() -> None:
    service = SPOT.services[0]
    controller = mark.Mark().begin(Situation(service, SPOT.pool_by_name, 60.0, np.full(120, 400.0)))
    decision = controller.decide(observation(0, 0, arrival_rate=400.0))
    assert decision.pool == "spot-near"
    assert decision.order > 1
