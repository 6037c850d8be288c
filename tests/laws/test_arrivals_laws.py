"""Laws 2 and 5 for traffic: random compositions, random cuts of time, random ends."""

import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pilotage.world.arrivals import (
    Counts,
    Diurnal,
    FlashCrowds,
    Gamma,
    Jitter,
    Mmpp,
    MmppState,
    Poisson,
    Scale,
    Segment,
    Splice,
    Sum,
    Trace,
    Warp,
)

END_S = 300.0
rates = st.floats(0.02, 40)
states = st.builds(MmppState, rate_rps=rates, mean_dwell_s=st.floats(0.1, 500))
crowds = st.builds(
    FlashCrowds,
    per_day=st.floats(1, 2000),
    magnitude=st.floats(0.1, 5),
    magnitude_cv=st.floats(0, 2),
    ramp_s=st.floats(0, 100),
    hold_s=st.floats(0, 100),
    decay_s=st.floats(1, 100),
)
leaves = st.one_of(
    st.builds(Poisson, rate_rps=rates),
    st.builds(Gamma, rate_rps=rates, cv=st.floats(0.1, 8)),
    st.builds(Mmpp, states=st.lists(states, min_size=2, max_size=4).map(tuple)),
    st.builds(
        Diurnal,
        rate_rps=rates,
        day_amplitude=st.floats(0, 1),
        peak_hour=st.floats(0, 24),
        weekend_factor=st.floats(0, 3),
        noise_cv=st.floats(0, 2),
        noise_correlation_s=st.floats(10, 1000),
        crowds=st.none() | crowds,
        cv=st.floats(0.2, 4),
    ),
    st.builds(Counts, path=st.just("counts.txt"), interval_s=st.floats(20, 100)),
    st.builds(Trace, path=st.just("times.txt"), duplicates=st.sampled_from(["keep", "spread"])),
)


def composed(inner):
    return st.one_of(
        st.builds(Sum, sources=st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.builds(Scale, source=inner, factor=st.floats(0.05, 4)),
        st.builds(Warp, source=inner, speed=st.floats(0.3, 1.5), shift_s=st.floats(0, 50)),
        st.builds(Jitter, source=inner, max_s=st.floats(0.01, 400)),
        st.builds(
            lambda a, b, s: Splice(
                segments=(Segment(source=a, duration_s=s), Segment(source=b, duration_s=400 - s))
            ),
            inner,
            inner,
            st.floats(1, 399),
        ),
    )


sources = st.recursive(leaves, composed, max_leaves=5)
moments = st.floats(0, END_S)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Recordings that last 2,000 s and more, longer than any composition of these asks for."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(3)
    (folder / "counts.txt").write_text("\n".join(map(str, rng.negative_binomial(1, 0.05, 100))))
    times = np.sort(rng.uniform(0, 3000, 9000)).round(1)
    (folder / "times.txt").write_text("\n".join(map(str, [0.0, *times.tolist(), 3000.5])))
    return folder


def begin(source, data, seed, start_s=0.0, end_s=END_S):
    span_s = source.span_s(data)
    assume(span_s is None or span_s >= END_S)  # several warps of a splice may be too short

    def stream(name):
        sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()),))
        return np.random.Generator(np.random.PCG64(sequence))

    return source.begin(stream, start_s, end_s, data)


@settings(deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    source=sources,
    seed=st.integers(0, 2**64 - 1),
    start_s=st.floats(0, 50),
    cuts=st.lists(moments, max_size=12),
    end_s=moments,
)
def test_neither_the_cuts_nor_the_end_of_time_change_what_arrives(data, source, seed, start_s, cuts, end_s):
    whole = begin(source, data, seed, start_s).until(END_S)
    assert np.all(np.diff(whole) >= 0)
    assert len(whole) == 0 or (whole[0] >= start_s and whole[-1] < END_S)

    cuts = [*sorted(max(c, start_s) for c in cuts), END_S]
    stream = begin(source, data, seed, start_s)
    pieces = [stream.until(t) for t in cuts]
    assert all(np.all(p < t) for p, t in zip(pieces, cuts, strict=True))
    assert np.array_equal(np.concatenate(pieces), whole)

    end_s = max(end_s, start_s)
    assert np.array_equal(begin(source, data, seed, start_s, end_s).until(end_s), whole[whole < end_s])
