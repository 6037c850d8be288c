"""Every source of traffic keeps the same promises, and meets its theory."""

import gzip
import math
import os
import zlib
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pilotage.world.arrivals import (
    Counts,
    Diurnal,
    FlashCrowds,
    Gamma,
    Handover,
    Jitter,
    Mmpp,
    MmppState,
    Poisson,
    Scale,
    Segment,
    Source,
    Splice,
    Sum,
    Trace,
    Traffic,
    Warp,
)
from pilotage.world.spec import Spec, SpecError, decode

SPAN_S = 1200.0  # how long the recorded sources of these tests last
BURSTY = Mmpp(
    states=(MmppState(rate_rps=50, mean_dwell_s=5), MmppState(rate_rps=0, mean_dwell_s=15))
)  # mean 12.5 rps
RHYTHM = Diurnal(
    rate_rps=20,
    day_amplitude=0.4,
    weekend_factor=0.5,
    noise_cv=0.3,
    noise_correlation_s=60,
    crowds=FlashCrowds(per_day=100, magnitude=2, decay_s=60),
    cv=1.5,
)
COUNTS = Counts(path="counts.csv.gz", interval_s=10, column="f1")
TRACE = Trace(path="times.csv")
SOURCES: dict[str, Traffic] = {
    "poisson": Poisson(rate_rps=20),
    "gamma bursty": Gamma(rate_rps=20, cv=3),
    "gamma regular": Gamma(rate_rps=20, cv=0.3),
    "mmpp": BURSTY,
    "diurnal": RHYTHM,
    "counts": COUNTS,
    "trace": TRACE,
    "trace spread": Trace(path="coarse.txt.gz", duplicates="spread"),
    "sum": Sum(sources=(Poisson(rate_rps=5), COUNTS, BURSTY)),
    "scale random": Scale(source=RHYTHM, factor=0.4),
    "scale counts": Scale(source=COUNTS, factor=2.3),
    "scale trace up": Scale(source=TRACE, factor=2.6),
    "scale trace down": Scale(source=TRACE, factor=0.3),
    "warp": Warp(source=TRACE, speed=0.9, shift_s=77.7),
    "jitter": Jitter(source=COUNTS, max_s=12.5),
    "splice": Splice(
        segments=(
            Segment(source=TRACE, duration_s=333.3),
            Segment(source=RHYTHM, duration_s=400),
            Segment(source=Warp(source=COUNTS, shift_s=100.0), duration_s=600),
        )
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(7)
    counts = rng.poisson(40, 120)
    counts[20:60] = 0
    rows = "".join(f"{k},{a},{b}\n" for k, (a, b) in enumerate(zip(counts, counts[::-1], strict=True)))
    (folder / "counts.csv.gz").write_bytes(gzip.compress(b"minute,f0,f1\n" + rows.encode()))
    times = np.unique(np.cumsum(rng.gamma(0.3, 1, 12_000)) / 3)
    times = times[times < SPAN_S]
    (folder / "times.csv").write_text("arrival_s,tokens\n" + "".join(f"{t!r},5\n" for t in times.tolist()))
    coarse = "\n".join(f"{t:.1f}" for t in times)
    (folder / "coarse.txt.gz").write_bytes(gzip.compress(coarse.encode()))
    return folder


def streams(seed):
    def stream(name):
        sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()),))
        return np.random.Generator(np.random.PCG64(sequence))

    return stream


def arrivals(source, data=None, seed=1, start_s=0.0, end_s=1000.0):
    return source.begin(streams(seed), start_s, end_s, data).until(end_s)


@pytest.fixture(params=SOURCES.values(), ids=SOURCES.keys())
def source(request):
    return request.param


# --- promises --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("start_s", [0.0, 123.4])
def test_arrivals_are_sorted_finite_and_within_the_window(source, data, start_s):
    times = arrivals(source, data, start_s=start_s)
    assert len(times) > 500
    assert times.dtype == np.float64
    assert np.all(np.diff(times) >= 0)
    assert times[0] >= start_s
    assert times[-1] < 1000


@pytest.mark.parametrize("start_s", [0.0, 123.4])
def test_how_time_is_cut_does_not_matter(source, data, start_s):
    whole = arrivals(source, data, start_s=start_s)
    for cuts in (
        np.arange(150, 1001, 50),
        np.r_[130, 130, 130.01, 400, 999.99, 1000],
        np.arange(124, 999.5, 0.7),
    ):
        parts = source.begin(streams(1), start_s, 1000.0, data)
        pieces = [parts.until(float(t)) for t in [*cuts, 1000.0]]
        assert all(np.all(p < t) for p, t in zip(pieces, [*cuts, 1000.0], strict=True))
        assert np.array_equal(np.concatenate(pieces), whole)


def test_truncating_the_future_does_not_change_the_past(source, data):
    whole = arrivals(source, data)
    for end_s in (1.0, 500.0, 640.0):
        assert np.array_equal(arrivals(source, data, end_s=end_s), whole[whole < end_s])


def test_seeds_decide_what_is_random(source, data):
    assert np.array_equal(arrivals(source, data), arrivals(source, data))
    deterministic = isinstance(source, Trace) or (
        isinstance(source, Warp) and isinstance(source.source, Trace)
    )
    assert np.array_equal(arrivals(source, data), arrivals(source, data, seed=2)) == deterministic


def test_time_runs_forward(source, data):
    stream = source.begin(streams(1), 0.0, 1000.0, data)
    stream.until(10.0)
    with pytest.raises(ValueError, match="already advanced to 10"):
        stream.until(9.0)


def test_sources_survive_a_round_trip(source):
    assert decode(msgspec.to_builtins(source), Traffic, "scenario") == source


def test_compositions_are_read_from_toml():
    text = """
    kind = "sum"
    [[sources]]
    kind = "poisson"
    rate_rps = 5
    [[sources]]
    kind = "scale"
    factor = 2.3
    source = { kind = "counts", path = "counts.csv.gz", interval_s = 10, column = "f1" }
    """
    expected = Sum(sources=(Poisson(rate_rps=5), Scale(source=COUNTS, factor=2.3)))
    assert decode(msgspec.toml.decode(text), Traffic, "scenario") == expected


def test_every_kind_is_tested():
    tested = {type(source) for source in SOURCES.values()} | {Handover}  # whose times another service makes
    assert tested == {c for c in Source.__subclasses__() if c.__module__ == Source.__module__}


# --- theory ----------------------------------------------------------------------------------------------
MEANS = [
    (Poisson(rate_rps=20), 20),
    (Gamma(rate_rps=20, cv=3), 20),
    (Gamma(rate_rps=20, cv=0.3), 20),
    (BURSTY, 12.5),
    (Diurnal(rate_rps=20, day_amplitude=0, noise_cv=0.5, noise_correlation_s=10), 20),
    (RHYTHM, 20 * 7 / 6 * (1 + 0.4 * math.cos(2 * math.pi * 14 / 24)) * (1 + RHYTHM.crowds.mean_excess)),
    (Scale(source=Gamma(rate_rps=20, cv=3), factor=2.5), 50),
    (Warp(source=BURSTY, speed=2.0, shift_s=5.0), 25),
    (Sum(sources=(Poisson(rate_rps=20), BURSTY)), 32.5),
]


@pytest.mark.parametrize(("source", "rate_rps"), MEANS, ids=lambda v: str(v)[:40])
def test_mean_rate(source, rate_rps):
    """Short windows from the start of a run: also a test that every source starts in its stationary law."""
    rates = np.array([len(arrivals(source, seed=k, end_s=60.0)) / 60 for k in range(400)])
    half = 4 * rates.std(ddof=1) / math.sqrt(len(rates))  # a false alarm in 16,000
    assert abs(rates.mean() - rate_rps) < half
    assert half < 0.21 * rate_rps


def test_gaps_of_a_gamma_source_have_their_cv():
    for cv in (0.3, 1.0, 3.0):
        gaps = np.diff(arrivals(Gamma(rate_rps=20, cv=cv), end_s=20_000.0))
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def dispersion(times, end_s, width_s):
    counts = np.bincount((times / width_s).astype(int), minlength=round(end_s / width_s))
    return counts.var(ddof=1) / counts.mean()


def test_dispersion_of_a_markov_modulated_process_meets_the_closed_form():
    """Var N(t) of a two-state MMPP, Fischer & Meier-Hellstern (1993), equation for the symmetric form."""
    (r1, d1), (r2, d2) = ((s.rate_rps, s.mean_dwell_s) for s in BURSTY.states)
    mean, q = (r1 * d1 + r2 * d2) / (d1 + d2), 1 / d1 + 1 / d2
    variance = (r1 - r2) ** 2 * d1 * d2 / (d1 + d2) ** 2
    times = [arrivals(BURSTY, seed=k, end_s=40_000.0) for k in range(10)]
    for t in (1.0, 20.0):
        theory = 1 + 2 * variance / (q * mean) * (1 - (1 - math.exp(-q * t)) / (q * t))
        measured = np.array([dispersion(x, 40_000.0, t) for x in times])
        half = 4 * measured.std(ddof=1) / math.sqrt(len(measured))
        assert abs(measured.mean() - theory) < half
        assert half < 0.1 * theory


def test_states_of_a_markov_modulated_process_are_visited_in_proportion_to_their_dwell():
    rates, dwells = np.array([1.0, 10.0, 100.0]), np.array([3.0, 2.0, 1.0])
    states = tuple(MmppState(rate_rps=r, mean_dwell_s=d) for r, d in zip(rates, dwells, strict=True))
    means = np.array([len(arrivals(Mmpp(states=states), seed=k, end_s=5000.0)) / 5000 for k in range(20)])
    half = 4 * means.std(ddof=1) / math.sqrt(20)
    assert abs(means.mean() - rates @ dwells / dwells.sum()) < half < 2.5


def test_diurnal_rhythm():
    source = Diurnal(rate_rps=1, day_amplitude=0.6, peak_hour=15, weekend_factor=0.4)
    hours = np.histogram(arrivals(source, end_s=7 * 86400.0), 168, (0, 7 * 86400))[0].reshape(7, 24) / 3600
    assert hours.mean() == pytest.approx(1, abs=0.01)
    assert hours[5:].mean() / hours[:5].mean() == pytest.approx(0.4, abs=0.01)
    daily = hours.mean(axis=0) / hours.mean()
    expected = 1 + 0.6 * np.cos(2 * np.pi * (np.arange(24) + 0.5 - 15) / 24)
    assert daily == pytest.approx(expected, abs=0.04)


def test_diurnal_noise_has_its_variance_and_correlation():
    source = Diurnal(rate_rps=20, day_amplitude=0, noise_cv=0.4, noise_correlation_s=300)
    counts = np.histogram(arrivals(source, end_s=400_000.0), 40_000, (0, 400_000))[0] / 200
    assert counts.var() - 5e-3 == pytest.approx(0.4**2, rel=0.15)
    # the covariance of log-normal noise: exp(variance * correlation) - 1
    lagged = np.mean((counts[30:] - 1) * (counts[:-30] - 1))
    assert lagged == pytest.approx(math.expm1(math.log1p(0.16) * math.exp(-1)), rel=0.2)


def test_a_flash_crowd_has_its_shape():
    crowds = FlashCrowds(per_day=2, magnitude=10, magnitude_cv=0, ramp_s=100, hold_s=200, decay_s=300)
    source = Diurnal(rate_rps=50, day_amplitude=0, crowds=crowds)
    rate = np.histogram(arrivals(source, seed=3, end_s=86400.0), 8640, (0, 86400))[0] / 500
    peak = int(np.argmax(np.convolve(rate, np.ones(20), "valid")))  # where 200 s are highest
    assert rate[peak + 2 : peak + 18].mean() == pytest.approx(11, rel=0.05)
    assert rate[peak - 15 : peak - 11].mean() == pytest.approx(1, rel=0.1)
    assert rate[peak + 45 : peak + 55].mean() == pytest.approx(1 + 10 * math.exp(-1), rel=0.15)


# --- recorded traffic ------------------------------------------------------------------------------------
def test_counts_are_reproduced_exactly(data):
    counts = COUNTS.counts(data)
    times = arrivals(COUNTS, data, end_s=SPAN_S)
    assert np.array_equal(np.bincount((times / 10).astype(int), minlength=120), counts)
    doubled = arrivals(Scale(source=COUNTS, factor=2), data, end_s=SPAN_S)
    assert np.array_equal(np.bincount((doubled / 10).astype(int), minlength=120), 2 * counts)


def test_arrivals_are_uniform_within_their_interval(data):
    phase = np.sort(arrivals(COUNTS, data, end_s=SPAN_S) % 10 / 10)
    gap = np.abs(phase - (np.arange(len(phase)) + 0.5) / len(phase)).max()
    assert gap < 1.95 / math.sqrt(len(phase))  # Kolmogorov-Smirnov at 0.1 %


def test_times_are_reproduced_exactly(data):
    times = np.loadtxt(data / "times.csv", delimiter=",", skiprows=1, usecols=0)
    assert np.array_equal(arrivals(TRACE, data, end_s=TRACE.span_s(data)), times - times[0])


@pytest.mark.parametrize("factor", [0.3, 1.7, 4.0])
@pytest.mark.parametrize("recorded", [COUNTS, TRACE], ids=["counts", "trace"])
def test_scaled_recordings_keep_their_profile(data, recorded, factor):
    bins = {"bins": 30, "range": (0, SPAN_S)}
    end_s = recorded.span_s(data)
    own = np.histogram(arrivals(recorded, data, end_s=end_s), **bins)[0]
    scaled = np.histogram(arrivals(Scale(source=recorded, factor=factor), data, end_s=end_s), **bins)[0]
    f = factor % 1
    half = 4.5 * np.sqrt(own * f * (1 - f)) + 2 * factor  # binomial; and copies that cross the edge of a bin
    assert np.all(np.abs(scaled - factor * own) <= half)


def test_spread_duplicates_stay_within_the_resolution_of_the_clock(data):
    kept = arrivals(Trace(path="coarse.txt.gz", duplicates="keep"), data)
    spread = arrivals(Trace(path="coarse.txt.gz", duplicates="spread"), data)
    assert np.any(np.diff(kept) == 0)
    assert np.all(np.diff(spread) > 0)
    n = min(len(kept), len(spread))
    assert np.all((spread[:n] >= kept[:n]) & (spread[:n] < kept[:n] + 0.1))


def test_warp_places_a_window_anywhere(data):
    times = arrivals(TRACE, data, end_s=TRACE.span_s(data))
    warped = arrivals(Warp(source=TRACE, speed=2, shift_s=200.0), data, end_s=400.0)
    assert warped == pytest.approx((times[(times >= 200) & (times < 1000)] - 200) / 2)


def test_jitter_loses_nothing_and_moves_nothing_too_far(data):
    end_s = TRACE.span_s(data)
    own = arrivals(TRACE, data, end_s=end_s)
    moved = arrivals(Jitter(source=TRACE, max_s=3.0), data, end_s=end_s)
    assert len(moved) == len(own)
    assert np.abs(moved - own).max() <= 3.0  # holds in sorted order too
    assert np.abs(moved - own).max() > 0.1


def test_splice_joins_segments():
    parts = (
        Segment(source=Poisson(rate_rps=5), duration_s=400),
        Segment(source=Poisson(rate_rps=50), duration_s=400),
    )
    times = arrivals(Splice(segments=parts), end_s=800.0)
    low, high = np.histogram(times, [0, 400, 800])[0]
    assert low == pytest.approx(2000, abs=4 * math.sqrt(2000))
    assert high == pytest.approx(20_000, abs=4 * math.sqrt(20_000))


def test_parts_of_a_sum_are_independent():
    times = arrivals(Sum(sources=(Poisson(rate_rps=5), Poisson(rate_rps=5))))
    assert np.all(np.diff(times) > 0)  # were the streams the same, every arrival would come twice


def test_parquet(data):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame({"arrival_s": [0.0, 1.5, 2.0], "tokens": [1, 2, 3]}).to_parquet(data / "t.parquet")
    assert list(arrivals(Trace(path="t.parquet"), data, end_s=2.5)) == [0.0, 1.5, 2.0]


# --- bad input -------------------------------------------------------------------------------------------
def refuses(source, data, *parts, end_s=1.0):
    with pytest.raises(SpecError) as caught:
        source.begin(streams(1), 0.0, end_s, data)
    for part in parts:
        assert part in str(caught.value)


def test_no_data_directory(tmp_path):
    refuses(TRACE, None, "'times.csv'", "--data DIR", "PILOTAGE_DATA")
    refuses(TRACE, tmp_path / "absent", "absent", "does not exist", "--data DIR", "PILOTAGE_DATA")


def test_absent_file(data):
    refuses(Trace(path="tmies.csv"), data, "'tmies.csv'", "absent", "did you mean 'times.csv'?")
    refuses(Trace(path="sub/times.csv"), data, "'sub/times.csv'", "there is no directory")


def test_nothing_outside_the_data_directory_is_read(data, tmp_path):
    (tmp_path / "secret.csv").write_text("arrival_s\n1\n2\n")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.csv").symlink_to(tmp_path / "secret.csv")
    for path in ("../secret.csv", str(tmp_path / "secret.csv"), "link.csv", "a/../../secret.csv"):
        refuses(Trace(path=path), inside, path, "outside the data directory", "relative to it")


BAD_FILES = [
    ("empty.csv", "", Trace, ["empty.csv: empty trace"]),
    ("header.csv", "arrival_s\n", Trace, ["header.csv: empty trace"]),
    ("empty.txt", "\n", Counts, ["empty.txt: empty trace"]),
    ("nan.csv", "arrival_s\n0\nnan\n", Trace, ["nan.csv:3: nan", "finite"]),
    ("inf.txt", "4\n\ninf\n", Counts, ["inf.txt:3: inf", "finite"]),
    ("word.csv", "arrival_s,x\n0,a\nsoon,b\n", Trace, ["word.csv:3: 'soon' is not a number"]),
    ("short.csv", "x,arrival_s\n0,1\n1\n", Trace, ["short.csv:3: '' is not a number"]),
    ("negative.txt", "4\n-2\n", Counts, ["negative.txt:2: count -2", "from 0"]),
    ("half.txt", "4\n2.5\n", Counts, ["half.txt:2: count 2.5", "whole"]),
    ("back.csv", "arrival_s\n0\n3\n2\n", Trace, ["back.csv:4: unsorted: 2.0 s", "sort = true"]),
    ("same.csv", "arrival_s\n0\n1\n1\n", Trace, ["same.csv:4: duplicate time 1.0 s", "'spread'"]),
    ("one.csv", "arrival_s\n5\n", Trace, ["one.csv: only one time", "at least two"]),
    ("column.csv", "time,n\n0,1\n", Trace, ["column.csv: no column 'arrival_s'", "valid: time, n"]),
    ("which.csv", "f0,f1\n0,1\n", Counts, ["which.csv: which column?", "valid: f0, f1"]),
    ("data.xlsx", "0\n", Trace, ["unknown format", ".csv.gz", ".parquet"]),
    ("bad.csv.gz", "plain text", Trace, ["bad.csv.gz: cannot be read", "intact"]),
    ("bad.parquet", "plain text", Trace, ["bad.parquet"]),
]


@pytest.mark.parametrize(("name", "text", "kind", "parts"), BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_bad_files(tmp_path, name, text, kind, parts):
    (tmp_path / name).write_text(text)
    refuses(Trace(path=name) if kind is Trace else Counts(path=name, interval_s=1), tmp_path, *parts)


def test_a_column_of_a_text_file(tmp_path):
    (tmp_path / "n.txt").write_text("0\n")
    source = Counts(path="n.txt", interval_s=1, column="x")
    refuses(source, tmp_path, "n.txt: column 'x'", "leave `column` out")


def test_a_truncated_gzip_file(data, tmp_path):
    (tmp_path / "cut.csv.gz").write_bytes((data / "counts.csv.gz").read_bytes()[:-20])
    refuses(Counts(path="cut.csv.gz", interval_s=1, column="f0"), tmp_path, "cut.csv.gz: cannot be read")


def test_unsorted_and_duplicate_times_where_they_are_allowed(tmp_path):
    (tmp_path / "t.csv").write_text("arrival_s\n1\n3\n1\n2\n")
    refuses(Trace(path="t.csv", sort=True), tmp_path, "duplicate time 1.0 s")
    keep = Trace(path="t.csv", sort=True, duplicates="keep")
    assert list(arrivals(keep, tmp_path, end_s=2.5)) == [0, 0, 1, 2]
    spread = Trace(path="t.csv", sort=True, duplicates="spread")
    assert list(arrivals(spread, tmp_path, end_s=2.5)) == [0, 0.5, 1, 2]


def test_a_changed_file_is_read_again(tmp_path):
    (tmp_path / "n.txt").write_text("3\n")
    assert len(arrivals(Counts(path="n.txt", interval_s=1), tmp_path, end_s=1.0)) == 3
    (tmp_path / "n.txt").write_text("14\n")
    assert len(arrivals(Counts(path="n.txt", interval_s=1), tmp_path, end_s=1.0)) == 14


def test_a_horizon_longer_than_the_trace(data):
    refuses(COUNTS, data, "'counts.csv.gz' lasts 1200 s", "to 5000 s", "at most 1200 s", end_s=5000.0)
    refuses(Warp(source=COUNTS, shift_s=200.0), data, "lasts 1000 s", "at most 1000 s", end_s=1200.0)
    refuses(Sum(sources=(COUNTS, Poisson(rate_rps=1))), data, "'sum' lasts 1200 s", end_s=1201.0)
    refuses(Warp(source=COUNTS, shift_s=1200.0), data, "shift_s 1200 is beyond the end", "below 1200 s")
    long = Splice(segments=(Segment(source=COUNTS, duration_s=1500),))
    refuses(long, data, "duration_s 1500 is longer than", "'counts.csv.gz'", "at most 1200 s")


class Holder(Spec, frozen=True, kw_only=True):
    traffic: Traffic


BAD_SPECS = [
    ({"kind": "poisson", "rate_rps": -1.0}, "`float` > 0.0"),
    ({"kind": "poisson", "rate_rps": math.nan}, "`float` > 0.0"),
    ({"kind": "poisson", "rate_rps": math.inf}, "<= 1000000.0"),
    ({"kind": "poisson", "rate_rsp": 1.0}, "did you mean 'rate_rps'?"),
    ({"kind": "posson", "rate_rps": 1.0}, "did you mean 'poisson'?"),
    ({"kind": "scale", "factor": 2.0, "source": {"kind": "gama", "rate_rps": 1.0, "cv": 2.0}}, "'gamma'?"),
    ({"kind": "mmpp", "states": [{"rate_rps": 1.0, "mean_dwell_s": 1.0}]}, "length >= 2"),
    ({"kind": "mmpp", "states": [{"rate_rps": 0.0, "mean_dwell_s": 1.0}] * 2}, "at least one state"),
    ({"kind": "sum", "sources": []}, "length >= 1"),
    ({"kind": "counts", "path": "x.txt", "interval_s": 0.0}, "`float` > 0.0"),
    ({"kind": "trace", "path": "x.csv", "duplicates": "drop"}, "duplicates"),
]


@pytest.mark.parametrize(("raw", "part"), BAD_SPECS, ids=[f"{b[0]['kind']}-{b[1][:12]}" for b in BAD_SPECS])
def test_bad_specifications(raw, part):
    with pytest.raises(SpecError, match=r"scenario: .*\$\.traffic") as caught:
        decode({"traffic": raw}, Holder, "scenario")
    assert part in str(caught.value)


def test_a_run_that_ends_before_it_starts():
    with pytest.raises(SpecError, match="valid: 0 <= start <= end"):
        Poisson(rate_rps=1).begin(streams(1), 5.0, 4.0, None)


# --- the development data, where it is -------------------------------------------------------------------
SHARED = Path(os.environ.get("PILOTAGE_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data")


@pytest.mark.skipif(not (SHARED / "arrivals").is_dir(), reason="no recorded traffic: set PILOTAGE_DATA")
def test_real_traces():
    twitter = Counts(path="arrivals/twitter_2021_08_persec_day00-13.txt.gz", interval_s=1)
    function = Counts(path="arrivals/azure_functions_2019_f0-f5_day00-06.csv.gz", interval_s=60, column="f3")
    chat = Trace(path="arrivals/azure_llm_2023_conv.csv.gz", duplicates="spread")
    assert twitter.span_s(SHARED) == 1_209_600
    assert function.span_s(SHARED) == 10_080 * 60
    day = [arrivals(twitter, SHARED, start_s=k * 86400.0, end_s=k * 86400.0 + 3600) for k in (0, 13)]
    own = twitter.counts(SHARED)
    assert [len(x) for x in day] == [own[:3600].sum(), own[13 * 86400 :][:3600].sum()]
    assert len(arrivals(chat, SHARED, end_s=chat.span_s(SHARED))) == 19_366
    refuses(Trace(path=chat.path), SHARED, "azure_llm_2023_conv.csv.gz:", "duplicate time", "'spread'")
    assert all(b > a for a, b in pairwise(chat.times(SHARED)[:100]))
