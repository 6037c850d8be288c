"""Decision-focused training: the cost it differentiates is the engine's, its derivative is right, and it learns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pilotage.control.guard import Guard
from pilotage.control.scaling import Anticipate, Schedule
from pilotage.engine import hindsight
from pilotage.engine.cluster import World
from pilotage.engine.run import simulate
from pilotage.scenario import load
from pilotage.world.arrivals import Poisson, Segment, Splice

torch = pytest.importorskip("torch")
training = pytest.importorskip("pilotage.agents.hindsight")

QUICK = load("quickstart").replace(horizon_h=0.5, history_h=2.0, start_h=2.0)


def pulses(period_s: float, burst_s: float) -> Splice:
    """60 requests/s for `burst_s` in every period, else 10."""
    parts = (
        Segment(source=Poisson(rate_rps=10.0), duration_s=period_s - burst_s),
        Segment(source=Poisson(rate_rps=60.0), duration_s=burst_s),
    )
    return Splice(segments=parts * round(4 * 3600 / period_s))


def follow(order, keep, missed, start, price, lead):
    held, why = np.zeros(order.shape), np.zeros(order.shape, np.int8)
    least_at = np.zeros(order.shape, np.int64)
    cost = hindsight.follow(order, keep, missed, start, price, lead, held, why, least_at)
    return cost, held, why, least_at


def test_costs_by_hand() -> None:
    """One replica is needed in ticks 2 and 3, at a lead of 1 tick; a tick missed costs 10, a replica 1."""
    missed = np.zeros((1, 4, 2))
    missed[0, 2:, 0] = 10.0
    price, lead, start = np.ones(1), np.ones(1, np.int64), np.zeros(1)

    def cost(*targets: float) -> float:
        plan = np.array([targets])
        return float(follow(plan, plan, missed, start, price, lead)[0][0])

    assert cost(0, 0, 0, 0) == 20
    assert cost(0, 0, 1, 1) == 12  # too late for tick 2
    assert cost(0, 1, 1, 1) == 3
    assert cost(0, 0.5, 0.5, 0.5) == 1.5 + 10  # half of a replica misses half
    assert hindsight.least(missed, price, lead, np.zeros(1, np.int64))[0] == 3


def test_the_least_cost_is_that_of_the_best_plan() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        missed = np.sort(rng.exponential(2.0, (1, 5, 3)), axis=2)[:, :, ::-1].copy()
        price, lead = rng.uniform(0.1, 1, 1), np.array([int(rng.integers(0, 3))])
        plans = [np.array([p], float) for p in itertools.product(range(3), repeat=5)]
        costs = [follow(p, p, missed, p[:, 0], price, lead)[0][0] for p in plans]
        # plans that begin ready: both start for nothing
        assert hindsight.least(missed, price, lead, np.zeros(1, np.int64))[0] == pytest.approx(min(costs))


def test_the_derivative_is_the_quotient_of_differences() -> None:
    rng = np.random.default_rng(1)
    missed = np.sort(rng.exponential(2.0, (3, 12, 6)), axis=2)[:, :, ::-1].copy()
    order = rng.uniform(0.2, 4.8, (3, 12))
    keep = order + rng.uniform(0, 1, order.shape)
    run = (missed, np.full(3, 2.3), rng.uniform(0.1, 1, 3), np.array([0, 2, 4]))
    _, held, why, least_at = follow(order, keep, *run)
    weight, by_order, by_keep = rng.uniform(0.5, 1, 3), np.zeros(order.shape), np.zeros(order.shape)
    hindsight.trace_back(weight, missed, run[2], held, why, least_at, by_order, by_keep)
    step = 1e-6
    for which, found in ((order, by_order), (keep, by_keep)):
        for at in np.ndindex(order.shape):
            which[at] += step
            above = weight @ follow(order, keep, *run)[0]
            which[at] -= 2 * step
            below = weight @ follow(order, keep, *run)[0]
            which[at] += step
            assert found[at] == pytest.approx((above - below) / (2 * step), abs=1e-4)


def test_what_hindsight_says_is_what_the_engine_bills() -> None:
    """A plan with slow changes, with start-ups of no variation: within 5 % of a run of the engine."""
    pool = QUICK.pools[0].replace(boot_s=40.0, boot_cv=0.0)
    one = QUICK.services[0]
    one = one.replace(variants=(one.variants[0].replace(load_cv=0.0),))
    scenario = QUICK.replace(pools=(pool,), services=(one,))
    worlds = [World(k) for k in range(3)]
    table = training.look_back(scenario, worlds)
    plan = np.tile(np.where(np.arange(scenario.ticks) // 30 % 2, 4.0, 3.0), (3, 1))
    lead = np.full(3, 4)  # 60 s to the second
    cost = follow(plan, plan, table.missed_usd, np.full(3, 3.0), table.price_usd, lead)[0]
    policy = Schedule(targets=tuple(int(n) for n in plan[0]))
    runs = simulate(scenario, [policy] * 3, worlds, guard=Guard())
    np.testing.assert_allclose(cost, [run.total_usd for run in runs], rtol=0.05)


def test_bursts_at_fixed_times_are_learned() -> None:
    """Every 10 minutes 60 requests/s for 2 minutes, else 10: who knows it pays for 3 replicas a quarter of the time."""
    one = QUICK.services[0].replace(traffic=pulses(600.0, 120.0))
    scenario = QUICK.replace(services=(one,))
    table = training.look_back(scenario, [World(k) for k in range(4)])
    untrained, curve = training.train(table, table, training.Settings(epochs=0))
    assert untrained.network is not None
    learned, curve = training.train(
        table, table, training.Settings(epochs=60, windows_per_batch=4, ticks=120, dropout=0.0)
    )
    assert curve[-1] < 1.4
    assert curve[-1] < 0.6 * curve[0]
    unseen = [World(100 + k) for k in range(2)]
    always = simulate(scenario, [Schedule(targets=(4,))] * 2, unseen, guard=Guard())
    runs = simulate(scenario, [learned] * 2, unseen, guard=Guard())
    assert sum(r.total_usd for r in runs) < 0.8 * sum(r.total_usd for r in always)


def test_the_exported_network_says_what_the_trained_one_did() -> None:
    table = training.look_back(QUICK, [World(1)])
    torch.manual_seed(0)
    reader = training.Reader(table.inputs, (16,))
    torch.nn.init.normal_(reader.out.weight, std=0.3)
    reader.eval()
    with torch.no_grad():
        expected = reader(torch.from_numpy(table.inputs[0]), torch.from_numpy(table.references[0]))
    read = training.Foresight(network=reader.network()).reader()
    for one, other in zip(read(table.references[0], table.inputs[0]), expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=1e-4)


def test_a_search_on_hindsight_finds_what_costs_least_in_the_engine() -> None:
    """A wasteful rule is searched: what is found saves as much in runs as hindsight promised, within 10 %."""
    scenario = QUICK.replace(services=(QUICK.services[0].replace(traffic=Poisson(rate_rps=60.0)),))
    worlds = [World(k) for k in range(2)]
    table = training.look_back(scenario, worlds)
    wasteful = Anticipate(beta=2.0, margin=2.0, five_minutes=1.5)
    found, ratios = training.search(wasteful, table, trials=40, seed=1)
    assert ratios[0] == pytest.approx(np.exp(np.log(training.ratios(wasteful, table)).mean()))
    assert min(ratios) < 0.7 * ratios[0]
    runs = [simulate(scenario, [policy] * 2, worlds, guard=Guard()) for policy in (wasteful, found)]
    before, after = (sum(run.total_usd for run in of) for of in runs)
    promised = training.costs_usd(found, table).sum() / training.costs_usd(wasteful, table).sum()
    assert after / before == pytest.approx(promised, rel=0.1)


def test_training_repeats_itself() -> None:
    table = training.look_back(QUICK, [World(k) for k in range(2)])
    settings = training.Settings(epochs=2, windows_per_batch=2, seed=3)
    assert training.train(table, table, settings) == training.train(table, table, settings)
