"""Is the engine right? Queueing theory says what must come out; intervals come from independent worlds.

Every test asserts twice: that theory lies within the interval, and that the interval is narrow, so that
it could have failed. Seeds are fixed; a correct engine fails a fresh set of them about once in 2,000.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from pilotage.engine.cluster import Cluster, Recorded, World
from pilotage.metrics import BUCKET_MIDPOINTS_S, quantiles_s
from pilotage.world.arrivals import Poisson
from pilotage.world.pools import Pool
from pilotage.world.servers import (
    TABLE_CELLS,
    Affine,
    BatchServer,
    Constant,
    Exponential,
    Idling,
    IterationLaw,
    LogNormal,
    Stalls,
    Table,
    Variant,
    log_normal_table,
)
from pilotage.world.services import Service
from pilotage.world.spec import SpecError
from tests.strategies import Case, scenario, service

WORLDS = 40
MEAN_S = 0.01  # mean service time, where nothing else is said
WARM_UP = 2  # ticks of TICK_S that do not count
TICK_S = 100.0


class Sums:
    """Counters of each world after the warm-up, and the run's latency histogram with the warm-up."""

    def __init__(self, cluster: Cluster, start: np.ndarray) -> None:
        cluster.finish()
        self.start, self.end = start, cluster.totals
        self.seconds = self["seconds"]
        self.histogram = cluster.histograms.sum(axis=(0, 1))

    def __getitem__(self, name: str) -> np.ndarray:
        return (self.end[name] - self.start[name])[:, 0].astype(float)


def simulate(
    rate_rps, ticks=20, law=None, demand=None, replicas=1, worlds=WORLDS, network_ms=0.0, **server
) -> Sums:
    """Independent worlds of one service under Poisson traffic; exponential service unless `law` says more."""
    law = law or Affine(base_ms=0.0, per_item_ms=MEAN_S * 1e3)
    one = Service(
        name="queue",
        traffic=Poisson(rate_rps=rate_rps),
        slo_ms=1e6,
        pools=("cpu",),
        variants=(Variant(name="v", latency={"cpu": law}),),
        server=BatchServer(**server),
        demand=demand or Exponential(),
        initial_replicas=replicas,
    )
    pool = Pool(name="cpu", price_usd_per_hour=1.0, network_ms=network_ms)
    cluster = Cluster(scenario([one], [pool], TICK_S, ticks), [World(seed) for seed in range(worlds)])
    orders = cluster.no_orders()
    start = cluster.totals.copy()
    for tick in range(ticks):
        cluster.advance(orders)
        if tick + 1 == WARM_UP:
            start = cluster.totals.copy()
    return Sums(cluster, start)


def assert_met(samples: np.ndarray, theory: float, width: float = 0.03) -> None:
    """Theory lies in the interval of the replications' mean, which is at most `width` of theory wide."""
    half = 3.8 * samples.std(ddof=1) / math.sqrt(len(samples))  # Student's t with 39 d.o.f. at 1 in 2,000
    assert abs(samples.mean() - theory) < half, f"{samples.mean()} +- {half}, theory {theory}"
    assert half < width * theory, f"the interval {half} is too wide to say anything about {theory}"


def second_moment(table: np.ndarray) -> float:
    """Of the piecewise-linear quantile function with mean 1, exactly."""
    widths = np.r_[np.full(TABLE_CELLS - 1, 1 / TABLE_CELLS), np.full(TABLE_CELLS, 1 / TABLE_CELLS**2)]
    a, b = table[:-1], table[1:]
    return float(np.sum(widths * (a * a + a * b + b * b) / 3))


def erlang_c(c: int, load: float) -> float:
    """The probability that an arrival waits, M/M/c with offered load `load` in erlang."""
    b = 1.0
    for k in range(1, c + 1):
        b = load * b / (k + load * b)
    return c * b / (c - load * (1 - b))


def birth_death(births, deaths) -> np.ndarray:
    """Stationary law of a birth-death chain: births[k] from k to k + 1, deaths[k] from k + 1 to k."""
    weights = np.cumprod(np.r_[1.0, np.asarray(births) / np.asarray(deaths)])
    return weights / weights.sum()


def test_mm1() -> None:
    rate, mu = 80.0, 1 / MEAN_S
    run = simulate(rate)
    assert_met(run["latency_s"] / run["served"], 1 / (mu - rate))
    assert_met(run["inside_s"] / run["seconds"], rate / (mu - rate))
    assert_met(run["busy_s"] / run["ready_s"], rate / mu, 0.005)
    # sojourn times are exponential; 1 % for the histogram, 2 % for the sample
    p50, p95, p99 = quantiles_s(run.histogram, (0.5, 0.95, 0.99))
    np.testing.assert_allclose([p50, p95, p99], np.log([2, 20, 100]) / (mu - rate), rtol=0.03)


@pytest.mark.parametrize(("replicas", "slots"), [(4, 1), (1, 4), (3, 2)])
def test_mmc(replicas: int, slots: int) -> None:
    c, mu = replicas * slots, 1 / MEAN_S
    rate = 0.85 * c * mu
    run = simulate(rate, replicas=replicas, batches_in_flight=slots, ticks=9)
    wait = erlang_c(c, rate / mu) / (c * mu - rate)
    assert_met(run["latency_s"] / run["served"] - MEAN_S, wait, 0.05)
    assert_met(run["busy_s"] / run["ready_s"], 0.85, 0.005)


def test_md1() -> None:
    rate = 80.0
    run = simulate(rate, demand=Constant())
    assert_met(run["latency_s"] / run["served"] - MEAN_S, 0.8 * MEAN_S / (2 * 0.2))


@pytest.mark.parametrize("noise_cv", [0.0, 0.7])
@pytest.mark.parametrize("demand", [LogNormal(cv=1.5), Exponential()])
def test_mg1(demand, noise_cv: float) -> None:
    # Pollaczek-Khinchine; demand and noise are independent factors of the service time
    rate, network_ms = 70.0, 5.0
    law = Affine(base_ms=0.0, per_item_ms=MEAN_S * 1e3, noise_cv=noise_cv)
    run = simulate(rate, law=law, demand=demand, network_ms=network_ms)
    square = MEAN_S**2 * second_moment(demand.table()) * second_moment(log_normal_table(noise_cv))
    wait = rate * square / (2 * (1 - rate * MEAN_S))
    assert_met(run["latency_s"] / run["served"] - network_ms / 1e3 - MEAN_S, wait, 0.06)


def test_mg1_whose_first_service_of_a_busy_period_is_exceptional() -> None:
    """Cold at once when idle, warm at once when not: Welch (1964), On a generalized M/G/1 queuing process in which the
    first customer of each busy period receives exceptional service."""
    rate, extra_s = 60.0, 0.005
    idle = Idling(extra_ms=1e3 * extra_s, cooling_ms=1e-6, warming_ms=1e-6)
    run = simulate(rate, law=Affine(base_ms=0.0, per_item_ms=MEAN_S * 1e3, idle=idle), demand=Constant())
    first_s = MEAN_S + extra_s
    idle_share = (1 - rate * MEAN_S) / (1 - rate * (MEAN_S - first_s))
    wait = rate * MEAN_S**2 / (2 * (1 - rate * MEAN_S))
    wait += rate * (first_s**2 - MEAN_S**2) / (2 * (1 - rate * MEAN_S + rate * first_s))
    assert_met(run["latency_s"] / run["served"], wait + MEAN_S + idle_share * extra_s)
    assert_met(run["busy_s"] / run["ready_s"], 1 - idle_share, 0.005)


def test_stalls_are_a_vacation_of_the_server() -> None:
    """Where they are rare, mean sojourn times grow as those of M/G/1 whose service, now and then, holds a stall, and a
    share of those that find the server idle waits for a stall's end."""
    rate, per_s, mean_s = 50.0, 0.2, 0.03
    law = Affine(base_ms=0.0, per_item_ms=MEAN_S * 1e3, stalls=Stalls(per_s=per_s, mean_ms=1e3 * mean_s))
    run = simulate(rate, law=law, demand=Constant(), ticks=40)
    # what a batch waits beyond its service: with probability p an exponential of mean m; see `engine`
    m, gap_s = (
        mean_s,
        1 / rate,
    )  # the server is idle for an exponential time: 1 - E exp(-t / m) = gap / (gap + m)
    p = per_s * MEAN_S
    first_p = p + per_s * m * gap_s / (gap_s + m)
    moments = [(MEAN_S + q * m, MEAN_S**2 + 2 * q * MEAN_S * m + 2 * q * m**2) for q in (p, first_p)]
    (one, square), (first, first_square) = moments
    idle_share = (1 - rate * one) / (1 - rate * one + rate * first)
    wait = rate * square / (2 * (1 - rate * one))
    wait += rate * (first_square - square) / (2 * (1 - rate * one + rate * first))
    sojourn = wait + one + idle_share * (first - one)
    assert_met(run["latency_s"] / run["served"], sojourn)
    assert_met(run["busy_s"] / run["ready_s"], 1 - idle_share, 0.005)


def test_stalls_that_are_not_few_and_idling_of_an_iteration_are_refused() -> None:
    with pytest.raises(SpecError, match=r"25 % of the time; valid: at most 20 %"):
        Stalls(per_s=5.0, mean_ms=50.0)
    idle = Idling(extra_ms=1.0, cooling_ms=1.0, warming_ms=1.0)
    for given in ({"idle": idle}, {"stalls": Stalls(per_s=1.0, mean_ms=1.0)}):
        with pytest.raises(
            SpecError, match=f"{next(iter(given))} is given, but the time of an iteration has none"
        ):
            IterationLaw(base_s=0.01, prefill_s=0.0, sequence_s=0.0, context_s=0.0, **given)


def test_a_replica_cools_while_it_is_idle_and_warms_while_it_works() -> None:
    """By hand: two requests, the second 100 ms after the first is through, and a third that waits for it."""
    idle = Idling(extra_ms=10.0, cooling_ms=50.0, warming_ms=20.0)
    law = Affine(base_ms=40.0, per_item_ms=0.0, idle=idle)
    due_s = np.array([1.0, 1.15, 1.16])
    one = service(law=law, server=BatchServer())
    world = World(0, 0.0, (Recorded(due_s),))
    cluster = Cluster(scenario([one], [Pool(name="cpu", price_usd_per_hour=1.0)]), [world])
    for _ in range(8):
        cluster.advance(cluster.no_orders())
    cluster.finish()
    first_s = 0.05  # cold
    cold = 1 - (1 - math.exp(-first_s / 0.02)) * math.exp(-0.1 / 0.05)
    second_s = 0.04 + 0.01 * cold
    third_s = 0.04 + 0.01 * cold * math.exp(-second_s / 0.02)
    expected_s = first_s + second_s + (second_s - 0.01 + third_s)
    assert cluster.totals["latency_s"][0, 0] == pytest.approx(expected_s, rel=1e-12)


def test_the_tables_have_nearly_the_moments_of_their_laws() -> None:
    # What the tables cut off; M in these tests is as exponential as this.
    assert second_moment(Exponential().table()) == pytest.approx(2, rel=1e-3)
    assert second_moment(log_normal_table(0.7)) == pytest.approx(1.49, rel=1e-3)
    assert second_moment(log_normal_table(1.5)) == pytest.approx(3.25, rel=0.02)


@pytest.mark.parametrize(("c", "limit"), [(1, 1), (3, 2), (2, 6)])
def test_mmck_rejects(c: int, limit: int) -> None:
    mu = 1 / MEAN_S
    rate = 0.9 * c * mu
    run = simulate(rate, replicas=c, queue_limit=limit, ticks=8)
    k = c + limit
    p = birth_death([rate] * k, [min(n, c) * mu for n in range(1, k + 1)])
    assert_met(run["rejected"] / run["arrived"], p[-1])
    assert_met(run["inside_s"] / run["seconds"], float(p @ np.arange(k + 1)))


def test_erlang_a() -> None:
    # M/M/c+M: the dead stay in line until they are noticed, but cost no service time, so that who abandons
    # is as if they left at once.
    c, mu, patience_s = 3, 1 / MEAN_S, 0.02
    rate = 1.1 * c * mu
    run = simulate(rate, replicas=c, patience_s=patience_s, ticks=8)
    k = 200
    p = birth_death([rate] * k, [min(n, c) * mu + max(0, n - c) / patience_s for n in range(1, k + 1)])
    waiting = float(p @ np.maximum(0, np.arange(k + 1) - c))
    assert_met(run["abandoned"] / run["arrived"], waiting / patience_s / rate)


def test_md_timeout() -> None:
    # M/M/1+D: whoever would wait longer than d leaves unserved. The virtual wait V has P(V = 0) = p0 and the
    # density p0 * rate * exp(-(mu - rate) x) below d, and rate * p0 * exp(rate d - mu x) above it.
    mu, d = 1 / MEAN_S, 0.03
    rate = 0.95 * mu
    run = simulate(rate, request_timeout_s=d, ticks=8)
    gap = mu - rate
    below = rate * -math.expm1(-gap * d) / gap
    above = rate * math.exp(-gap * d) / mu
    assert_met(run["timed_out"] / run["arrived"], above / (1 + below + above))


def batch_chain(rate: float, times_s: list[float], most: int = 400) -> tuple[float, float]:
    """Mean sojourn time and mean batch size of M/D[n]/1 with bulk service, `times_s[n - 1]` for n requests.

    The chain of the number left behind by a batch: from k > 0 the next batch takes min(k, b); from 0 it is the next
    arrival alone. Renewal-reward over the time between batches gives the number inside, Little's law the rest.
    """
    b = len(times_s)
    counts = np.arange(most + 1)
    log_factorial = np.cumsum(np.r_[0.0, np.log(np.maximum(counts[1:], 1))])

    def poisson(mean):
        return np.exp(counts * math.log(mean) - mean - log_factorial)

    step = np.zeros((most + 1, most + 1))
    area, length, size = np.zeros((3, most + 1))
    for k in range(most + 1):
        n = max(1, min(k, b))
        arrivals = poisson(rate * times_s[n - 1])
        rest = max(k, 1) - n
        step[k, rest:] = arrivals[: most + 1 - rest]
        step[k, -1] += 1 - step[k].sum()
        area[k] = max(k, 1) * times_s[n - 1] + rate * times_s[n - 1] ** 2 / 2
        length[k] = times_s[n - 1] + (1 / rate if k == 0 else 0)
        size[k] = n
    system = np.vstack([step.T - np.eye(most + 1), np.ones(most + 1)])
    p = np.linalg.lstsq(system, np.r_[np.zeros(most + 1), 1.0], rcond=None)[0]
    return float(p @ area / (p @ length)) / rate, float(p @ size)


@pytest.mark.parametrize("routing", ["central", "round-robin"])
@pytest.mark.parametrize(
    ("law", "rate"),
    [
        (Affine(base_ms=10.0, per_item_ms=0.0), 250.0),
        (Affine(base_ms=10.0, per_item_ms=5.0), 110.0),
        (Table(batch_ms=(10.0, 25.0, 26.0, 27.0)), 120.0),
    ],
)
def test_batch_service(law, rate: float, routing: str) -> None:
    run = simulate(rate, law=law, demand=Constant(), max_batch=4, routing=routing, ticks=10)
    fixed, variable = law.batch_times_s(4)
    sojourn, size = batch_chain(rate, (fixed + variable)[1:].tolist())
    assert_met(run["latency_s"] / run["served"], sojourn)
    assert_met(run["batched"] / run["batches"], size, 0.01)


def test_batch_chain_is_md1_without_batches() -> None:
    sojourn, size = batch_chain(80.0, [MEAN_S])
    assert sojourn == pytest.approx(MEAN_S + 0.8 * MEAN_S / (2 * 0.2), rel=1e-6)
    assert size == pytest.approx(1)


def test_closed_batches_with_endless_servers() -> None:
    # As long as a slot is always idle, a batch is its first request and whoever comes within the wait: the mean size is
    # 1 + rate * wait, and the mean time to the close is the wait for the first, half of it for the others.
    rate, wait_s = 100.0, 0.02
    law = Affine(base_ms=10.0, per_item_ms=0.0)
    server = {"former": "closed", "max_batch": 64, "batch_wait_ms": wait_s * 1e3, "batches_in_flight": 40}
    run = simulate(rate, law=law, ticks=6, **server)
    size = 1 + rate * wait_s
    assert_met(run["batched"] / run["batches"], size, 0.01)
    assert_met(run["latency_s"] / run["served"], 0.01 + wait_s * (1 + (size - 1) / 2) / size, 0.01)


@pytest.mark.parametrize("c", [2, 3])
def test_round_robin(c: int) -> None:
    # Each replica is an E_c/M/1 queue: s solves s = (rate / (rate + mu (1 - s)))^c, the sojourn is 1 / (mu (1 - s)).
    mu = 1 / MEAN_S
    rate = 0.8 * c * mu
    run = simulate(rate, replicas=c, routing="round-robin", ticks=11)
    s = 0.5
    for _ in range(1000):
        s = (rate / (rate + mu * (1 - s))) ** c
    assert_met(run["latency_s"] / run["served"], 1 / (mu * (1 - s)))


@pytest.mark.parametrize("routing", ["least-outstanding", "power-of-two"])
def test_shorter_of_two_queues(routing: str) -> None:
    # With two replicas both rules send a request to the shorter queue; the chain is solved on {0..n}^2.
    mu, n = 1 / MEAN_S, 35
    rate = 0.8 * 2 * mu
    states = [(i, j) for i in range(n + 1) for j in range(n + 1)]
    at = {state: k for k, state in enumerate(states)}
    flow = np.zeros((len(states), len(states)))
    for i, j in states:
        first = 1.0 if i < j else 0.5 if i == j else 0.0  # the law of the number inside ignores how ties fall
        moves = [((i + 1, j), first * rate), ((i, j + 1), (1 - first) * rate)]
        moves += [((i - 1, j), mu), ((i, j - 1), mu)]
        for state, speed in moves:
            if state in at:
                flow[at[i, j], at[state]] += speed
                flow[at[i, j], at[i, j]] -= speed
    flow[:, 0] = 1.0  # one balance equation is redundant; its place takes the sum of probabilities
    p = np.linalg.solve(flow.T, np.eye(len(states))[0])
    inside = float(sum(q * (i + j) for q, (i, j) in zip(p, states, strict=True)))
    run = simulate(rate, replicas=2, routing=routing, ticks=15)
    assert_met(run["inside_s"] / run["seconds"], inside)
    assert_met(run["latency_s"] / run["served"], inside / rate)


@pytest.mark.parametrize("routing", ["central", "power-of-two"])
@pytest.mark.parametrize("former", ["closed", "late-binding"])
def test_little(former: str, routing: str) -> None:
    """On one sample path that ends empty: the integral of the number inside is the sum of the times inside."""
    rng = np.random.default_rng(5)
    count = 20_000
    times = np.cumsum(rng.gamma(0.4, 2.5 / 130.0, count))
    server = BatchServer(former=former, routing=routing, max_batch=8, batch_wait_ms=15.0, batches_in_flight=2)
    law = Affine(base_ms=20.0, per_item_ms=10.0, noise_cv=0.4)
    one = service(law=law, server=server, demand=LogNormal(cv=1.0), initial_replicas=3)
    ticks = math.ceil(times[-1] / 10.0) + 3
    pool = Pool(name="cpu", price_usd_per_hour=1.0)
    case = Case(scenario([one], [pool], 10.0, ticks), [[times]], np.zeros(0), [9])
    cluster = case.cluster(read_ahead_s=25.0)
    mean_inside = [cluster.advance(cluster.no_orders())["inside_s"][0, 0] / 10.0 for _ in range(ticks)]
    total = cluster.totals[0, 0]
    assert total["served"] == total["arrived"] == count
    assert total["inside_s"] == pytest.approx(total["latency_s"], rel=1e-9)
    rate = count / (ticks * 10.0)
    assert np.mean(mean_inside) == pytest.approx(rate * total["latency_s"] / count, rel=1e-9)
    middle = (
        cluster.histograms[0, 0] @ BUCKET_MIDPOINTS_S
    )  # the histogram's mean is wrong by half a bucket at most
    assert middle == pytest.approx(total["latency_s"], rel=0.008)
