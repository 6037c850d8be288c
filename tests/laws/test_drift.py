"""What must hold of any decay, and of what knows it."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.control.learned_retraining import FEATURES, LearnedRetraining
from pilotage.control.retraining import (
    NO_PAST,
    CaraCt,
    CaraT,
    ForecastQuantile,
    FreshSki,
    Never,
    Paired,
    Past,
    Periodic,
    Seen,
    SkiRental,
    Stakes,
    cost_of,
    retrained_at,
)
from pilotage.engine.lifetimes import Stream, oracle
from pilotage.world.drift import Decay, GradualDrift, NoDrift, RecurringDrift, SeasonalDrift, SuddenDrift
from pilotage.world.spec import SpecError

KINDS = (
    NoDrift(), SuddenDrift(mean_batches=10), GradualDrift(batches_per_unit=30), SeasonalDrift(period_batches=20),
    GradualDrift(batches_per_unit=20, wander=1.0, lasts_batches=10), RecurringDrift(mean_batches=8, places=2),
)  # fmt: skip
QUIET = {"difficulty_cv": 0.0, "luck_cv": 0.0, "interaction_cv": 0.0, "batch_size": 100_000}
RULES = (
    Never(),
    Periodic(every_batches=3),
    CaraT(),
    CaraCt(),
    SkiRental(),
    SkiRental(positive=True),
    FreshSki(),
    Paired(),
    ForecastQuantile(),
)


def random_network():
    from pilotage.control.network import Network

    rng = np.random.default_rng(5)
    sizes = (len(FEATURES), 6, 5, 1)
    return Network(
        mean=(0.0,) * len(FEATURES),
        scale=(1.0,) * len(FEATURES),
        clip=5.0,
        weights=tuple(tuple(map(tuple, rng.normal(0, 0.7, (b, a)).tolist())) for a, b in pairwise(sizes)),
        biases=tuple(tuple(rng.normal(0, 0.5, b).tolist()) for b in sizes[1:]),
    )


ALL = (*RULES, LearnedRetraining(network=random_network()))


@pytest.mark.parametrize("drift", KINDS, ids=lambda d: d.__struct_config__.tag)
def test_errors_are_counts_above_the_diagonal_and_repeat_themselves(drift) -> None:
    decay = Decay(drift=drift, batch_size=50)
    first, second = (decay.errors(np.random.default_rng(3), 40) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (40, 40)
    assert first.min() >= 0
    assert first.max() <= 50
    assert np.tril(first, -1).sum() == 0


def test_without_drift_age_does_not_matter_and_with_a_jump_it_does() -> None:
    still = Decay(drift=NoDrift(), base_error=0.2, **QUIET).errors(np.random.default_rng(0), 30)
    rates = still[np.triu_indices(30)] / 100_000
    assert rates.mean() == pytest.approx(0.2, abs=0.001)
    assert rates.std() < 0.002  # chance alone
    rng = np.random.default_rng(1)
    jumps = Decay(
        drift=SuddenDrift(mean_batches=10, magnitude=1.0), base_error=0.1, worst_error=0.6, **QUIET
    ).errors(rng, 60)
    path = SuddenDrift(mean_batches=10, magnitude=1.0).path(np.random.default_rng(1), 64)[4:]
    first = int(np.flatnonzero(np.abs(np.diff(path[:, 0])) > 0)[0]) + 1
    before, after = jumps[0, first - 1] / 100_000, jumps[0, first] / 100_000
    assert before == pytest.approx(0.1, abs=0.05)
    assert after >= before + 0.5 * (1 - np.exp(-0.9)) - 0.05  # a magnitude of 1 loses 63 % of what there is


def test_a_seasonal_drift_comes_back() -> None:
    path = SeasonalDrift(period_batches=20, magnitude=1.0).path(np.random.default_rng(0), 41)
    np.testing.assert_allclose(path[0], path[20], atol=1e-9)
    assert np.linalg.norm(path[0] - path[10]) == pytest.approx(1.0)


def test_a_worst_below_the_base_is_refused() -> None:
    with pytest.raises(SpecError, match="worst_error"):
        Decay(drift=NoDrift(), base_error=0.3, worst_error=0.2)
    with pytest.raises(SpecError, match="label_delay"):
        Stakes(price=1, batch_size=10, batches=5, label_delay=5)


matrices = st.integers(2, 9).flatmap(
    lambda n: st.lists(st.integers(0, 30), min_size=n * n, max_size=n * n).map(
        lambda cells: np.triu(np.array(cells).reshape(n, n))
    )
)


@settings(max_examples=60, deadline=None)
@given(errors=matrices, price=st.floats(0.5, 40))
def test_the_oracle_is_the_best_of_all_ways(errors, price) -> None:
    n = len(errors)
    ways = (when for k in range(n) for when in combinations(range(1, n), k))
    best = min(cost_of(errors, price, when) for when in ways)
    assert oracle(errors.astype(float), price)[0] == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(
    errors=matrices,
    price=st.floats(0.5, 40),
    delay=st.integers(0, 3),
    policy=st.sampled_from(ALL),
    cut=st.integers(1, 8),
    probe=st.lists(st.integers(0, 30), min_size=9, max_size=9),
)
def test_decisions_depend_on_nothing_whose_labels_have_not_come(
    errors, price, delay, policy, cut, probe
) -> None:
    n = len(errors)
    stakes = Stakes(price=price, batch_size=50, batches=n, label_delay=min(delay, n - 1))
    when = retrained_at(policy, errors, stakes, NO_PAST, np.array(probe))
    changed, probes = errors.copy(), np.array(probe)
    changed[:, min(cut, n) :] = np.triu(np.full((n, n), 29))[:, min(cut, n) :]
    probes[min(cut, n) :] = 7
    known = min(cut, n) + stakes.label_delay  # the first decision that may differ is before the batch after
    other = retrained_at(policy, changed, stakes, NO_PAST, probes)
    assert [t for t in when if t <= known] == [t for t in other if t <= known]
    assert all(0 < t < n for t in when)
    assert when == sorted(set(when))


@settings(max_examples=30, deadline=None)
@given(
    errors=matrices,
    price=st.floats(0.5, 40),
    delay=st.integers(0, 2),
    past=matrices,
    probe=st.lists(st.integers(0, 30), min_size=18, max_size=18) | st.none(),
)
def test_the_compiled_twin_follows_the_same_policy(errors, price, delay, past, probe) -> None:
    retraining = pytest.importorskip("pilotage.agents.retraining")
    policy, n, begin = ALL[-1], len(errors), len(past)
    both = np.zeros((begin + n,) * 2, int)
    both[:begin, :begin], both[begin:, begin:] = past, errors
    probes = np.zeros(0, int) if probe is None else np.array(probe[: begin + n])
    stream = Stream.of(both, probes, begin, price, 50, min(delay, n - 1))
    when = retrained_at(policy, errors, stream.stakes, Past(past, probes[:begin]), probes[begin:])
    assert retraining.followed(policy, stream) == pytest.approx(cost_of(errors, price, when))
    assert stream.oracle_usd <= cost_of(errors, price, when) + 1e-9


def test_a_probe_tells_a_hard_batch_from_a_stale_version() -> None:
    # errors double from batch 4 on; if the probe's do, too, the batches are hard, and a retraining would not help
    errors = np.triu(np.full((12, 12), 10))
    errors[:, 4:] = np.triu(np.full((12, 12), 20))[:, 4:]
    stakes = Stakes(price=10, batch_size=100, batches=12)
    past = Past(np.triu(np.full((6, 6), 10)), np.full(6, 15))
    hard = np.where(np.arange(12) < 4, 15, 30)
    assert retrained_at(Paired(window_batches=4), errors, stakes, past, hard) == []
    stale = np.where(np.arange(12)[None] < 4, errors, np.triu(np.full((12, 12), 10)))
    stale[0, 4:] = 20
    found = retrained_at(Paired(window_batches=4), stale, stakes, past, np.full(12, 15))
    assert found == [
        6
    ]  # 2 of 4 batches show 10 more each: (10 + 10) / 5 for 6 batches is 24, at least twice the price


def test_a_forecast_by_hand() -> None:
    # versions lose 2 errors per batch of age in the past, surely: over 10 batches a retraining saves what the age
    # costs
    past = Past(np.triu(10 + 2 * (np.arange(8)[None] - np.arange(8)[:, None])))
    errors = np.triu(10 + 2 * (np.arange(10)[None] - np.arange(10)[:, None]))
    one = ForecastQuantile().begin(Stakes(price=20, batch_size=100, batches=10), past)
    # at age 4 with 6 left: the old one loses 8, 10, 10 (ages beyond 5 are unknown) more, the new one 0, 2, ... 10
    assert not one.decide(Seen(errors[0, :2], 2, 3))
    assert one.decide(Seen(errors[0, :4], 4, 6))


def test_ski_rental_by_hand() -> None:
    # a version makes 10 errors while it is fresh, then 14: after three batches the rent of 12 reaches the price
    errors = np.triu(np.full((8, 8), 10))
    errors[0, 1:] = 14
    stakes = Stakes(price=12, batch_size=100, batches=8)
    assert retrained_at(SkiRental(), errors, stakes) == [4]
    assert cost_of(errors, 12, [4]) == 10 + 3 * 14 + 4 * 10 + 12
    assert retrained_at(Periodic(every_batches=3), errors, stakes) == [3, 6]
    assert retrained_at(CaraT(threshold=0.04), errors, stakes) == [2]
    assert retrained_at(Never(), errors, stakes, NO_PAST) == []
