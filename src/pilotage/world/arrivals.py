"""Where requests come from: random sources, recorded traffic, and ways to compose them.

A source is a frozen spec; `begin` gives a stream of arrival times for one run. A source is a generator of
blocks whose sizes depend on nothing but the source and its start: so neither how a run cuts its time nor how
long it lasts can change what arrives (laws 2 and 5 of DESIGN). Times are seconds on the source's own clock:
0 is Monday 00:00 for `diurnal`, the first interval for `counts`, the first row for `trace`.

Every random source is a renewal process of unit rate in operational time, carried to clock time through the
cumulative piecewise-constant rate (Cox & Isham, Point Processes, 1980, ch. 4). `scale` multiplies that rate,
so it keeps the rhythm, the noise and the dispersion of what it scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Final, Literal, Union

import numpy as np
from msgspec import Meta

from pilotage.world import traces
from pilotage.world.spec import Name, Spec, SpecError

Rate = Annotated[float, Meta(gt=0, le=1e6)]
Seconds = Annotated[float, Meta(gt=0, le=1e9)]
Delay = Annotated[float, Meta(ge=0, le=1e9)]
Variation = Annotated[float, Meta(gt=0, le=20)]

Streams = Callable[[str], np.random.Generator]
Block = tuple[np.ndarray, float]  # sorted arrival times, and the time before which nothing more can come

BLOCK: Final = 8192  # arrivals drawn at once
STEP_S: Final = 10.0  # the rate of `diurnal` is constant over a step
STEPS: Final = 256  # steps of rate computed at once
DAY_S: Final = 86400.0
# streams from which a rate is drawn; the others draw arrivals, given the rate
RATE_STREAMS: Final = ("states", "noise", "crowds")


class Arrivals:
    """The arrivals of one run, pulled forward in time."""

    def __init__(self, blocks: Iterator[Block], start_s: float) -> None:
        self._blocks, self._now_s, self._start_s = blocks, start_s, start_s
        self._waiting = [np.zeros(0)]
        self.known_s = -math.inf  # all arrivals before this time have been drawn

    def until(self, t_s: float) -> np.ndarray:
        """All arrival times in [previous t_s, t_s), sorted, in seconds on the source's clock."""
        if t_s < self._now_s:
            raise ValueError(
                f"until {t_s} s: time has already advanced to {self._now_s} s; ask for a later time"
            )
        self._now_s = t_s
        while self.known_s < t_s:
            self.draw()
        times = np.concatenate(self._waiting) if len(self._waiting) != 1 else self._waiting[0]
        cut = np.searchsorted(times, t_s)
        self._waiting = [times[cut:]]
        return times[:cut]

    def draw(self) -> None:
        """Draws one more block; beyond the end of a finite source nothing comes."""
        times, self.known_s = next(self._blocks, (np.zeros(0), math.inf))
        self._waiting.append(times[np.searchsorted(times, self._start_s) :])


class Source(Spec, frozen=True, kw_only=True, tag_field="kind"):
    """A source of requests."""

    def begin(self, stream: Streams, start_s: float, end_s: float, data: Path | None) -> Arrivals:
        """The arrivals of one run over [start_s, end_s) of the source's clock.

        `stream(name)` gives an independent generator by name; traces are read below `data`. Raises SpecError
        where a trace cannot be read, or is shorter than `end_s`.
        """
        if not 0 <= start_s <= end_s:
            raise SpecError(f"{self.label}: run from {start_s} s to {end_s} s; valid: 0 <= start <= end")
        span_s = self.span_s(data)
        if span_s is not None and end_s > span_s:
            raise SpecError(
                f"{self.label} lasts {span_s:.6g} s ({span_s / 3600:.4g} h), shorter than the run from "
                f"{start_s:.6g} s to {end_s:.6g} s ({end_s / 3600:.4g} h); "
                f"valid: start plus horizon of at most {span_s:.6g} s"
            )
        return Arrivals(self.blocks(stream, start_s, data, 1.0), start_s)

    def span_s(self, data: Path | None) -> float | None:
        """How long the source lasts, in seconds from 0 on its clock; None: endless."""
        return None

    @property
    def label(self) -> str:
        """The source as error messages name it."""
        return f"traffic {type(self).__struct_config__.tag!r}"

    def blocks(self, stream: Streams, start_s: float, data: Path | None, gain: float) -> Iterator[Block]:
        """Successive blocks of arrivals from about `start_s` on, with the rate multiplied by `gain`."""
        raise NotImplementedError


# --- random sources ------------------------------------------------------------------------------------
class Poisson(Source, frozen=True, kw_only=True, tag="poisson"):
    """A Poisson process with a constant rate, in requests per second."""

    rate_rps: Rate

    def blocks(self, stream: Streams, start_s: float, data: Path | None, gain: float) -> Iterator[Block]:
        return _timed(_gaps(stream("gaps"), 1.0), _constant(start_s, self.rate_rps * gain))


class Gamma(Source, frozen=True, kw_only=True, tag="gamma"):
    """A stationary renewal process with gamma gaps; `cv` > 1: bursty, 1: Poisson, < 1: regular.

    The index of dispersion of counts tends to cv**2 over intervals that hold many arrivals.
    """

    rate_rps: Rate
    cv: Variation

    def blocks(self, stream: Streams, start_s: float, data: Path | None, gain: float) -> Iterator[Block]:
        return _timed(_gaps(stream("gaps"), self.cv), _constant(start_s, self.rate_rps * gain))


class MmppState(Spec, frozen=True, kw_only=True):
    """A state of a Markov-modulated Poisson process; a rate of 0 is idleness."""

    rate_rps: Annotated[float, Meta(ge=0, le=1e6)]
    mean_dwell_s: Seconds


class Mmpp(Source, frozen=True, kw_only=True, tag="mmpp"):
    """A Markov-modulated Poisson process: exponential dwell times, the next state uniform among the others.

    Starts in its stationary law, in which a state's share is its mean dwell over the sum of all. Two states,
    one with rate 0, are an on-off source. See Fischer & Meier-Hellstern, Performance Evaluation 18 (1993).
    """

    states: Annotated[tuple[MmppState, ...], Meta(min_length=2)]

    def __post_init__(self) -> None:
        if not any(state.rate_rps > 0 for state in self.states):
            raise SpecError("rate_rps is 0 in every state; give at least one state a rate above 0")

    def blocks(self, stream: Streams, start_s: float, data: Path | None, gain: float) -> Iterator[Block]:
        return _timed(_gaps(stream("gaps"), 1.0), self._rates(stream("states"), start_s, gain))

    def _rates(
        self, rng: np.random.Generator, t_s: float, gain: float
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rates = np.array([state.rate_rps for state in self.states]) * gain
        dwells = np.array([state.mean_dwell_s for state in self.states])
        n = len(rates)
        state = int(np.searchsorted(np.cumsum(dwells / dwells.sum()), rng.random(), side="right")) % n
        while True:
            states = (state + np.concatenate([[0], np.cumsum(rng.integers(1, n, size=256))])) % n
            edges = t_s + np.concatenate(
                [[0], np.cumsum(rng.standard_exponential(256) * dwells[states[:-1]])]
            )
            yield edges, rates[states[:-1]]
            state, t_s = int(states[-1]), float(edges[-1])


class FlashCrowds(Spec, frozen=True, kw_only=True):
    """Crowds that come at random times (a Poisson process of `per_day`) and multiply the rate by 1 + a pulse.

    The pulse rises linearly over `ramp_s`, holds, then decays exponentially; its height is log-normal with
    mean `magnitude` and coefficient of variation `magnitude_cv`. Crowds that overlap add up.
    """

    per_day: Annotated[float, Meta(gt=0, le=1e4)]
    magnitude: Annotated[float, Meta(gt=0, le=1e4)]
    magnitude_cv: Annotated[float, Meta(ge=0, le=20)] = 0.5
    ramp_s: Delay = 60.0
    hold_s: Delay = 120.0
    decay_s: Seconds = 300.0

    @property
    def mean_excess(self) -> float:
        """The long-run mean of the pulses: by how much crowds raise the mean rate, as a share of it."""
        return self.per_day / DAY_S * self.magnitude * (self.ramp_s / 2 + self.hold_s + self.decay_s)

    def factors(self, rng: np.random.Generator, start_s: float) -> Iterator[np.ndarray]:
        """1 + pulses at the middle of each step, block after block from `start_s` on."""
        block_s = STEPS * STEP_S
        # a crowd is forgotten after 12 decay times, when 6e-6 of it is left
        lasts_s = self.ramp_s + self.hold_s + 12 * self.decay_s
        begins, heights = self._occur(rng, start_s - lasts_s, lasts_s)
        while True:
            fresh = self._occur(rng, start_s, block_s)
            begins, heights = np.concatenate([begins, fresh[0]]), np.concatenate([heights, fresh[1]])
            age = (start_s + (np.arange(STEPS) + 0.5) * STEP_S)[:, None] - begins
            fall = np.exp(-np.maximum(age - self.ramp_s - self.hold_s, 0) / self.decay_s)
            rise = np.clip(age, 0, self.ramp_s) / self.ramp_s if self.ramp_s else (age >= 0).astype(float)
            yield 1 + (rise * fall) @ heights
            start_s += block_s
            kept = begins > start_s - lasts_s
            begins, heights = begins[kept], heights[kept]

    def _occur(self, rng: np.random.Generator, from_s: float, for_s: float) -> tuple[np.ndarray, np.ndarray]:
        begins = from_s + for_s * rng.random(rng.poisson(self.per_day * for_s / DAY_S))
        variance = math.log1p(self.magnitude_cv**2)
        return begins, self.magnitude * rng.lognormal(-variance / 2, math.sqrt(variance), len(begins))


class Diurnal(Source, frozen=True, kw_only=True, tag="diurnal"):
    """Daily and weekly rhythm with noise and flash crowds; 0 on the clock is Monday 00:00.

    The rate is the product of
    - `rate_rps`, the mean over a week, crowds aside;
    - the hour: 1 + `day_amplitude` cos(2 pi (hour - `peak_hour`) / 24);
    - the day: Saturday and Sunday stand to the other days as `weekend_factor` to 1;
    - noise: log-normal of mean 1, its logarithm an AR(1) process with correlation exp(-lag /
      `noise_correlation_s`);
    - crowds.
    It is constant over steps of 10 s. `cv` is the coefficient of variation of gaps in operational time, as in
    `gamma`.
    """

    rate_rps: Rate
    day_amplitude: Annotated[float, Meta(ge=0, le=1)] = 0.5
    peak_hour: Annotated[float, Meta(ge=0, le=24)] = 14.0
    weekend_factor: Annotated[float, Meta(ge=0, le=100)] = 1.0
    noise_cv: Annotated[float, Meta(ge=0, le=20)] = 0.0
    noise_correlation_s: Annotated[float, Meta(ge=STEP_S, le=1e9)] = 600.0
    crowds: FlashCrowds | None = None
    cv: Variation = 1.0

    def blocks(self, stream: Streams, start_s: float, data: Path | None, gain: float) -> Iterator[Block]:
        return _timed(_gaps(stream("gaps"), self.cv), self._rates(stream, start_s, gain))

    def rhythm_rps(self, t_s: np.ndarray) -> np.ndarray:
        """The mean rate at times on the clock, crowds aside, in requests per second."""
        day = 1 + self.day_amplitude * np.cos(2 * np.pi * (t_s / DAY_S - self.peak_hour / 24))
        level = np.where(t_s / DAY_S % 7 < 5, 1.0, self.weekend_factor) * 7 / (5 + 2 * self.weekend_factor)
        return self.rate_rps * day * level

    def _rates(self, stream: Streams, t_s: float, gain: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        noise = _log_normal_ar1(stream("noise"), self.noise_cv, self.noise_correlation_s)
        crowds = self.crowds.factors(stream("crowds"), t_s) if self.crowds else None
        steps = np.arange(STEPS + 1) * STEP_S
        while True:
            rates = gain * self.rhythm_rps(t_s + steps[:-1] + STEP_S / 2) * next(noise)
            if crowds:
                rates *= next(crowds)
            yield t_s + steps, rates
            t_s += STEPS * STEP_S


# --- recorded traffic ----------------------------------------------------------------------------------
class Counts(Source, frozen=True, kw_only=True, tag="counts"):
    """Recorded counts per interval; arrivals lie uniformly at random within their interval.

    `path` is relative to the data directory. Under `scale` each count is multiplied, its fractional part
    drawn binomially: the profile is kept, and the index of dispersion grows with the factor.
    """

    path: str
    interval_s: Seconds
    column: str | None = None

    @property
    def label(self) -> str:
        return f"{super().label} {self.path!r}"

    def span_s(self, data: Path | None) -> float:
        return len(self.counts(data)) * self.interval_s

    def counts(self, data: Path | None) -> np.ndarray:
        """Requests per interval."""
        return traces.counts_of(self.path, data, self.column)

    def blocks(self, stream: Streams, start_s: float, data: Path | None, gain: float) -> Iterator[Block]:
        counts, rng = self.counts(data), stream("counts")
        lo = int(start_s // self.interval_s)
        while lo < len(counts):
            n = counts[lo : lo + BLOCK]
            n = n[: max(1, int(np.searchsorted(np.cumsum(n) * gain, BLOCK, side="right")))]
            hi = lo + len(n)
            if gain != 1:
                n = int(gain) * n + rng.binomial(n, gain - int(gain))
            edges = np.arange(lo, hi + 1) * self.interval_s
            times = np.repeat(edges[:-1], n) + self.interval_s * rng.random(int(n.sum()))
            # rounding may carry an arrival to the end of its interval, which belongs to the next
            yield np.sort(np.minimum(times, np.repeat(np.nextafter(edges[1:], 0), n))), float(edges[-1])
            lo = hi


class Trace(Source, frozen=True, kw_only=True, tag="trace"):
    """Recorded arrival times; the clock starts at the first row, and ends one mean gap after the last.

    `path` is relative to the data directory; text files have no `column`. `sort` accepts rows out of order.
    Equal times, which coarse clocks record, are refused unless `duplicates` says to `keep` them or to
    `spread` them evenly over the resolution of the clock (the smallest gap in the file). Under `scale`,
    arrivals are thinned, or joined by copies placed uniformly in the gap that follows, which keeps the local
    rate.
    """

    path: str
    column: str = "arrival_s"
    sort: bool = False
    duplicates: Literal["refuse", "keep", "spread"] = "refuse"

    @property
    def label(self) -> str:
        return f"{super().label} {self.path!r}"

    def span_s(self, data: Path | None) -> float:
        times = self.times(data)
        return float(times[-1] * len(times) / (len(times) - 1))

    def times(self, data: Path | None) -> np.ndarray:
        """Arrival times in seconds since the first, sorted."""
        return traces.times_of(self.path, data, self.column, self.sort, self.duplicates)

    def blocks(self, stream: Streams, start_s: float, data: Path | None, gain: float) -> Iterator[Block]:
        times, rng = self.times(data), stream("copies")
        # copies of the row before the start may lie in the run
        begin = max(0, int(np.searchsorted(times, start_s)) - 1)
        for lo in range(begin, len(times), BLOCK):
            own = times[lo : lo + BLOCK]
            known_s = float(times[lo + BLOCK]) if lo + BLOCK < len(times) else self.span_s(data)
            if gain != 1:
                copies = int(gain) + (rng.random(len(own)) < gain - int(gain))
                gap = np.repeat(np.append(own[1:], known_s) - own, copies)
                extra = np.arange(len(gap)) > np.repeat(np.cumsum(copies) - copies, copies)
                own = np.sort(np.repeat(own, copies) + gap * rng.random(len(gap)) * extra)
            yield own, known_s


# --- combinators ---------------------------------------------------------------------------------------
class Sum(Source, frozen=True, kw_only=True, tag="sum"):
    """Several sources at once, independent of one another; lasts as long as the shortest."""

    sources: Annotated[tuple[Traffic, ...], Meta(min_length=1)]

    def span_s(self, data: Path | None) -> float | None:
        return min((s for source in self.sources if (s := source.span_s(data)) is not None), default=None)

    def blocks(self, stream: Streams, start_s: float, data: Path | None, gain: float) -> Iterator[Block]:
        parts = [
            Arrivals(source.blocks(_child(stream, k), start_s, data, gain), start_s)
            for k, source in enumerate(self.sources)
        ]
        known_s = start_s
        while known_s < math.inf:
            min(parts, key=lambda part: part.known_s).draw()
            if (upto_s := min(part.known_s for part in parts)) > known_s:
                yield np.sort(np.concatenate([part.until(upto_s) for part in parts])), upto_s
                known_s = upto_s


class Scale(Source, frozen=True, kw_only=True, tag="scale"):
    """A source with its rate multiplied by `factor`; its rhythm and noise stay. See `counts` and `trace`."""

    source: Traffic
    factor: Annotated[float, Meta(gt=0, le=1e6)]

    def span_s(self, data: Path | None) -> float | None:
        return self.source.span_s(data)

    def blocks(self, stream: Streams, start_s: float, data: Path | None, gain: float) -> Iterator[Block]:
        return self.source.blocks(_child(stream, 0), start_s, data, gain * self.factor)


class Warp(Source, frozen=True, kw_only=True, tag="warp"):
    """A source whose clock runs `speed` times as fast, from `shift_s` on: its time is shift_s + speed * time.

    `speed` 2 halves the gaps and doubles the rate; `shift_s` begins a trace in the middle.
    """

    source: Traffic
    speed: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    shift_s: Delay = 0.0

    def span_s(self, data: Path | None) -> float | None:
        span_s = self.source.span_s(data)
        if span_s is not None and self.shift_s >= span_s:
            raise SpecError(
                f"warp: shift_s {self.shift_s:g} is beyond the end of {self.source.label}; "
                f"valid: below {span_s:g} s"
            )
        return None if span_s is None else (span_s - self.shift_s) / self.speed

    def blocks(self, stream: Streams, start_s: float, data: Path | None, gain: float) -> Iterator[Block]:
        inner_s = self.shift_s + self.speed * start_s
        for times, known_s in self.source.blocks(_child(stream, 0), inner_s, data, gain):
            yield (times - self.shift_s) / self.speed, (known_s - self.shift_s) / self.speed


class Jitter(Source, frozen=True, kw_only=True, tag="jitter"):
    """Moves arrivals by uniform draws from [-max_s, max_s], reflected at the ends of the source's clock."""

    source: Traffic
    max_s: Seconds

    def span_s(self, data: Path | None) -> float | None:
        return self.source.span_s(data)

    def blocks(self, stream: Streams, start_s: float, data: Path | None, gain: float) -> Iterator[Block]:
        span_s, rng = self.span_s(data), stream("jitter")
        inner_s = max(0.0, start_s - self.max_s)  # arrivals from before the start may move into the run
        waiting = np.zeros(0)
        for times, known_s in self.source.blocks(_child(stream, 0), inner_s, data, gain):
            times = times[np.searchsorted(times, inner_s) :]
            moved = np.abs(times + self.max_s * (2 * rng.random(len(times)) - 1))
            if span_s is not None:
                moved = np.minimum(
                    np.where(moved < span_s, moved, 2 * span_s - moved), np.nextafter(span_s, 0)
                )
            waiting = np.sort(np.concatenate([waiting, moved]))
            cut = np.searchsorted(waiting, known_s - self.max_s)
            yield waiting[:cut], known_s - self.max_s
            waiting = waiting[cut:]
        yield waiting, math.inf


class Segment(Spec, frozen=True, kw_only=True):
    """A part of a `splice`: `duration_s` seconds of a source, from 0 on its own clock."""

    source: Traffic
    duration_s: Seconds


class Splice(Source, frozen=True, kw_only=True, tag="splice"):
    """Segments one after another. To begin a segment elsewhere in its source, `warp` it with `shift_s`."""

    segments: Annotated[tuple[Segment, ...], Meta(min_length=1)]

    def span_s(self, data: Path | None) -> float:
        for segment in self.segments:
            span_s = segment.source.span_s(data)
            if span_s is not None and span_s < segment.duration_s:
                raise SpecError(
                    f"splice: duration_s {segment.duration_s:g} is longer than {segment.source.label}; "
                    f"valid: at most {span_s:g} s"
                )
        return math.fsum(segment.duration_s for segment in self.segments)

    def blocks(self, stream: Streams, start_s: float, data: Path | None, gain: float) -> Iterator[Block]:
        ends = np.cumsum([segment.duration_s for segment in self.segments])
        for k, (segment, end_s) in enumerate(zip(self.segments, ends.tolist(), strict=True)):
            if end_s <= start_s:
                continue
            begin_s, last_s = end_s - segment.duration_s, np.nextafter(end_s, 0)
            inner_s = max(0.0, start_s - begin_s)
            part = Arrivals(segment.source.blocks(_child(stream, k), inner_s, data, gain), inner_s)
            while part.known_s < segment.duration_s:
                part.draw()
                upto_s = min(part.known_s, segment.duration_s)
                if upto_s > inner_s:
                    yield np.minimum(begin_s + part.until(upto_s), last_s), begin_s + upto_s


class Handover(Source, frozen=True, kw_only=True, tag="handover"):
    """What LLM `service` has prefilled: its KV blocks are here `transfer_ms`, and `transfer_us_per_token` for every
    token of the prompt, after the first token. It has no arrivals of its own, so it can be no part of other sources."""

    service: Name
    transfer_ms: Annotated[float, Meta(ge=0, le=60_000)] = 0.0
    transfer_us_per_token: Annotated[float, Meta(ge=0, le=1e6)] = 0.0

    def blocks(self, stream: Streams, start_s: float, data: Path | None, gain: float) -> Iterator[Block]:
        raise SpecError(
            f"{self.label} from {self.service!r} is the traffic of a decode service, and of nothing else"
        )


Traffic = Union[  # noqa: UP007
    Poisson, Gamma, Mmpp, Diurnal, Counts, Trace, Sum, Scale, Warp, Jitter, Splice, Handover
]


# --- the machinery of random sources -------------------------------------------------------------------
def _child(stream: Streams, k: int) -> Streams:
    return lambda name: stream(f"{k}/{name}")


def _constant(t_s: float, rate_rps: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while True:  # day by day, which keeps operational time small and so precise
        yield np.array([t_s, t_s + DAY_S]), np.array([rate_rps])
        t_s += DAY_S


def _gaps(rng: np.random.Generator, cv: float) -> Iterator[np.ndarray]:
    """Blocks of gamma gaps of mean 1; the first is what is left of a gap at a random time (stationarity)."""
    shape = 1 / cv**2
    yield np.array([rng.random() * rng.standard_gamma(shape + 1) / shape])
    while True:
        yield rng.standard_exponential(BLOCK) if cv == 1 else rng.standard_gamma(shape, BLOCK) / shape


def _log_normal_ar1(rng: np.random.Generator, cv: float, correlation_s: float) -> Iterator[np.ndarray]:
    """Blocks of STEPS log-normal factors of mean 1, one a step; stationary from the start."""
    if cv == 0:
        while True:
            yield np.ones(STEPS)
    variance = math.log1p(cv**2)
    phi = math.exp(-STEP_S / correlation_s)
    run = 64  # steps that one product of matrices takes from one state to those that follow it
    lag = np.subtract.outer(np.arange(run), np.arange(run))
    weights = np.where(lag >= 0, phi ** np.maximum(lag, 0), 0.0) * math.sqrt(1 - phi * phi)
    decay = phi ** np.arange(1, run + 1)
    last = rng.standard_normal()
    while True:
        states = rng.standard_normal((STEPS // run, run)) @ weights.T
        for part in states:
            part += decay * last
            last = part[-1]
        yield np.exp(math.sqrt(variance) * states.ravel() - variance / 2)


def carry(
    start: float, gaps: np.ndarray, cumulative: np.ndarray, edges: np.ndarray, last_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Operational times start + cumsum(gaps), and the clock times of those before cumulative[-1], up to last_s.

    `cumulative` is the integral of the rate at `edges`. The engine puts a compiled twin in this place, which gives the
    same bits: this is most of the work of drawing traffic, and this package must not depend on a compiler.
    """
    ahead = start + np.cumsum(gaps)
    inside = ahead[: np.searchsorted(ahead, cumulative[-1])]
    return ahead, np.minimum(np.interp(inside, cumulative, edges), last_s)


def _timed(gaps: Iterator[np.ndarray], rates: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[Block]:
    """Carries a unit-rate process to clock time. `rates` gives edges in seconds and the rate between them."""
    ahead = np.cumsum(next(gaps))  # operational times, counted from the start of the current piece of rates
    for edges, rate in rates:
        cumulative = np.concatenate([[0.0], np.cumsum(rate * np.diff(edges))])
        last_s = float(np.nextafter(edges[-1], -np.inf))
        inside = ahead[: np.searchsorted(ahead, cumulative[-1])]
        times = np.minimum(np.interp(inside, cumulative, edges), last_s)
        while len(times) == len(ahead):
            yield times, float(times[-1])
            ahead, times = carry(float(ahead[-1]), next(gaps), cumulative, edges, last_s)
        yield times, float(edges[-1])
        ahead = ahead[len(times) :] - cumulative[-1]
