"""Closed forms against their published values, and the statistics that every table rests on."""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.control.queueing import (
    erlang_c,
    halfin_whitt,
    mean_wait,
    square_root_staffing,
    staffing,
    wait_quantile,
)
from pilotage.engine.queues import bucket
from pilotage.engine.randomness import draw, from_table
from pilotage.evaluate import ratio_interval
from pilotage.metrics import BUCKETS, ITEMS, bucket_of, dollars, quantiles_s
from pilotage.world.servers import Exponential, LogNormal, log_normal_table


@pytest.mark.parametrize(
    ("servers", "load", "c", "wait", "p95", "p99"),
    [
        (1, 0.5, 0.5, 1.0, 4.605170, 7.824046),
        (2, 1, 0.333333, 0.333333, 1.897120, 3.506558),
        (10, 8, 0.409180, 0.204590, 1.051066, 1.855785),
        (10, 9, 0.668732, 0.668732, 2.593360, 4.202798),
        (20, 16, 0.256078, 0.064019, 0.408365, 0.810724),
        (100, 90, 0.216940, 0.021694, 0.146760, 0.307704),
        (120, 100, 0.033196, 0.001660, 0, 0.059992),
    ],
)
def test_erlang_c(servers, load, c, wait, p95, p99) -> None:
    assert erlang_c(servers, load) == pytest.approx(c, abs=1e-6)
    assert mean_wait(servers, load) == pytest.approx(wait, abs=1e-6)
    assert wait_quantile(servers, load, 0.95) == pytest.approx(p95, abs=1e-6)
    assert wait_quantile(servers, load, 0.99) == pytest.approx(p99, abs=1e-6)


@pytest.mark.parametrize(
    ("delayed", "beta", "square_root", "exact"),
    [
        (0.5, 0.5061, (6, 19, 106), (6, 19, 106)),
        (0.2, 1.0615, (7, 21, 111), (7, 21, 111)),
        (0.1, 1.4202, (7, 22, 115), (8, 23, 115)),
        (0.05, 1.7398, (8, 23, 118), (9, 24, 119)),
        (0.01, 2.3749, (9, 26, 124), (10, 27, 125)),
    ],
)
def test_staffing(delayed, beta, square_root, exact) -> None:
    assert halfin_whitt(delayed) == pytest.approx(beta, abs=1e-4)
    assert tuple(square_root_staffing(load, beta) for load in (4, 16, 100)) == square_root
    assert tuple(staffing(load, delayed) for load in (4, 16, 100)) == exact


def test_overload_and_idleness() -> None:
    assert erlang_c(2, 3) == 1.0
    assert wait_quantile(2, 3, 0.9) == float("inf")
    assert staffing(0, 0.05) == 0


def test_histogram_quantiles_are_within_their_stated_error() -> None:
    rng = np.random.default_rng(1)
    latency = rng.lognormal(-2, 1.2, 200_000)
    histogram = np.bincount(bucket_of(latency), minlength=BUCKETS)
    for p in (0.01, 0.5, 0.9, 0.95, 0.99, 0.999):
        exact = np.quantile(latency, p, method="inverted_cdf")
        assert quantiles_s(histogram, (p,))[0] == pytest.approx(exact, rel=0.008)
    assert np.isnan(quantiles_s(np.zeros(BUCKETS, int), (0.5,)))[0]


def test_the_compiled_bucket_is_the_documented_one() -> None:
    latency = np.concatenate([10.0 ** np.linspace(-6, 7, 5000), [0.0, 2.0**-14, 0.5, 1.0, 2.0, 1e9]])
    assert [bucket(x) for x in latency] == bucket_of(latency).tolist()


def test_splitmix64_gives_the_published_sequence() -> None:
    # reference output of Vigna's splitmix64.c started at 1234567
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(draw(np.uint64(1234567), k)) for k in range(4)] == published


@pytest.mark.parametrize(("table", "cv"), [(log_normal_table(0.3), 0.3), (LogNormal(cv=1.0).table(), 1.0),
                                           (Exponential().table(), 1.0)])  # fmt: skip
def test_quantile_tables_have_mean_1_and_about_the_right_spread(table, cv) -> None:
    u = (np.arange(400_000) + 0.5) / 400_000
    x = np.array([from_table(table, v) for v in u])
    assert x.mean() == pytest.approx(1.0, abs=2e-3)
    assert x.std() == pytest.approx(cv, rel=0.03)
    assert (np.diff(x) >= 0).all()
    assert x[0] > 0 or cv == 1.0


def test_the_bill_is_the_sum_of_its_items() -> None:
    usd = dollars(
        3.0, np.array([2, 0]), 1, 4.0, 0.0, {"late_usd": 0.5, "dropped_usd": 2.0, "error_usd": 0.25}
    )
    assert usd.shape == (2, len(ITEMS))
    assert usd[0].tolist() == [3.0, 1.0, 2.0, 1.0, 0.0]


def test_bootstrap_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for k in range(300):
        base = rng.gamma(9, 1, 40)
        ratio = ratio_interval(0.8 * base + rng.normal(0, 0.4, 40), base, seed=k)
        covered += ratio["low"] <= 0.8 <= ratio["high"]
    assert 0.90 <= covered / 300 <= 0.98
