"""The outlook is what it says: stretches of the past by hand, and the same whichever way the past came in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.control.foresight import READOUT, Anticipate, Foresight, levels, whole
from pilotage.control.network import Network
from pilotage.control.outlook import INPUTS, REFERENCES, LoadHistory, Outlook
from pilotage.control.policy import Situation
from pilotage.scenario import load
from pilotage.world.spec import SpecError

SCENARIO = load("quickstart")
AT = {name: k for k, name in enumerate(REFERENCES)}


def situation(history_rps: np.ndarray) -> Situation:
    return Situation(SCENARIO.services[0], SCENARIO.pool_by_name, SCENARIO.tick_s, history_rps)


LENGTHS = [1, 2, 5, 63, 64, 65, 127, 128, 150, 200]  # beside the ends of chunks, and on them


def past_of(past: list[float], new: list[float], stretch: tuple[int, int]) -> tuple[LoadHistory, np.ndarray]:
    """A history of two rows, of which the first came at once and then tick by tick, and what it is of."""
    history = LoadHistory(2, 200, 40, np.array(stretch))
    early = len(new) // 2
    for value in new[:early]:
        history.update(np.array([value, 1.0]))
    history.reset(0, np.array(past))
    for value in new[early:]:
        history.update(np.array([value, 1.0]))
    return history, np.array([past[0]] * 300 + past + new[early:])


LOADS = st.lists(st.floats(0, 50), min_size=1, max_size=300)


@settings(max_examples=60, deadline=None)
@given(LOADS, LOADS, st.integers(0, 20), st.integers(1, 16))
def test_a_stretch_is_what_a_slice_of_the_past_says(
    past: list[float], new: list[float], ago: int, length: int
) -> None:
    history, series = past_of(past, new, (3, 9))
    stretch = series[len(series) - ago - length : len(series) - ago]
    where = np.array([[ago, ago]]), np.array([[length, length]])
    assert history.at(np.array([[ago, 0], [0, ago]]))[:, 0].tolist() == [series[-1 - ago], series[-1]]
    assert history.mean(*where)[0, 0] == pytest.approx(stretch.mean(), abs=1e-9)
    assert history.deviation(*where)[0, 0] == pytest.approx(stretch.std(), abs=1e-3)
    assert history.highest(LENGTHS)[:, 0].tolist() == [series[-n:].max() for n in LENGTHS]
    totals = [history.total(n)[0] for n in LENGTHS]
    np.testing.assert_allclose(totals, [series[-n:].sum() for n in LENGTHS], atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(LOADS, LOADS, st.tuples(st.integers(1, 30), st.integers(1, 30)), st.integers(0, 150))
def test_the_highest_of_every_stretch_is_known_and_how_far_it_rose(
    past: list[float], new: list[float], lengths: tuple[int, int], ago: int
) -> None:
    history, series = past_of(past, new, lengths)
    peak, rise = history.stretches(np.full((1, 2), ago))
    end = len(series) - ago
    highest = series[end - lengths[0] : end].max()
    before = series[end - lengths[0] - 2 : end - lengths[0]].mean()
    assert peak[0, 0] == highest
    assert rise[0, 0] == pytest.approx(max(highest - before, 0.0), abs=1e-9)


def test_history_and_updates_lead_to_the_same_outlook() -> None:
    rates = 40 + 20 * np.sin(np.arange(9000) / 30) + np.arange(9000) % 7
    at_once, bit_by_bit = Outlook([situation(rates)]), Outlook([situation(rates[:8500])])
    for rate in rates[8500:]:
        bit_by_bit.update(np.array([rate]), np.array([rate]))
    for one, other in zip(at_once.view(), bit_by_bit.view(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_burst_at_every_half_hour_is_expected_before_it_comes() -> None:
    """A burst of 5 minutes each half hour: known one start-up before it, forgotten when it does not come."""
    tick = np.arange(6 * 240)
    rates = np.where(tick % 120 < 20, 200.0, 20.0)
    expected = []
    for late in (113, 114, 119, 120, 125):  # ticks after the last burst began: the next is due at 120
        past = np.r_[rates, np.full(late, 20.0)] if late > 120 else np.r_[rates, rates[:late]]
        references, _ = Outlook([situation(past)]).view()
        expected.append(references[0, AT["highest_rise_at_30min_x6"]])
    low, high = 20 / (8 / 0.3), 200 / (8 / 0.3)
    np.testing.assert_allclose(expected, [low, high, high, high, low], rtol=1e-6)


def test_missing_measurements_carry_the_last_ones_forward() -> None:
    known, missing = Outlook([situation(np.full(300, 30.0))]), Outlook([situation(np.full(300, 30.0))])
    known.update(np.array([30.0]), np.array([30.0]))
    missing.update(np.array([np.nan]), np.array([np.nan]))
    for one, other in zip(known.view(), missing.view(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_service_without_a_past_has_an_outlook() -> None:
    references, inputs = Outlook([situation(np.zeros(0))]).view()
    assert references.shape == (1, len(REFERENCES))
    assert inputs.shape == (1, len(INPUTS))
    assert (references == 0).all()
    assert np.isfinite(inputs).all()


def test_levels_grow_with_the_load_and_the_lower_is_never_above() -> None:
    rng = np.random.default_rng(0)
    readout, references = rng.normal(size=(50, READOUT)), rng.uniform(0, 9, (50, len(REFERENCES)))
    order, keep = levels(readout, references)
    assert (keep >= order).all()
    assert (levels(readout, references + 1)[0] > order).all()
    order, keep = whole(np.array([2.5, 2.51, 3.0]), np.array([2.5, 2.6, 3.4]))
    assert order.tolist() == [2, 3, 3]
    assert keep.tolist() == [3, 3, 3]


def test_the_rule_takes_the_largest_of_what_may_come() -> None:
    references = np.zeros((1, len(REFERENCES)))
    references[0, AT["mean_1min"]], references[0, AT["highest_rise_at_30min_x6"]] = 2.0, 9.0
    rule = Anticipate(beta=0.0, margin=0.5, half_hours=1.0)
    assert rule.reader()(references, np.zeros((1, len(INPUTS))))[0] == 9.5
    assert rule.replace(half_hours=0.0).reader()(references, np.zeros((1, len(INPUTS))))[0] == 2.5


def test_a_network_of_another_shape_is_refused() -> None:
    one = Network(mean=(0.0,), scale=(1.0,), clip=1.0, weights=(((0.0,),),), biases=((0.0,),))
    with pytest.raises(SpecError, match=f"valid: {len(INPUTS)} to {READOUT}"):
        Foresight(network=one)
