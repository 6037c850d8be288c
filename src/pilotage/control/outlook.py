"""What load may come while an order is on its way: reference loads and inputs of learned policies, for many services.

`LoadHistory` keeps the past once, and beside it only what makes looking it up cheap: 50 kB for a day of ticks of 15 s.
`Outlook` is a function of it alone: which loads the next start-up delay could bring if the past were a guide (the last
minutes, their trend, the same stretch of earlier periods and of the day before), all in replicas, and what a network
needs to know to choose among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from pilotage.control.policy import Situation

_DAY_S: Final = 86400.0
_RECENT_S: Final = (60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 21600.0, 86400.0)
_MEAN_S: Final = (60.0, 300.0, 900.0, 3600.0, 86400.0)
_BUSY_S: Final = (60.0, 300.0, 1800.0)
_TREND_S: Final = (300.0, 900.0)
# (minutes of a period, how many of them back): what is scheduled comes again at the same minute
_PERIODS: Final = ((5, 12), (10, 12), (15, 8), (20, 6), (30, 6), (30, 24), (60, 6), (60, 23))
_RISES: Final = 16  # how many stretches back rises are looked at

# loads, in replicas, that may come; a learned policy weighs them against each other
REFERENCES: Final = (
    "last",
    *(f"highest_{s / 60:g}min" for s in _RECENT_S),
    *(f"mean_{s / 60:g}min" for s in _MEAN_S),
    *(f"busiest_second_{s / 60:g}min" for s in _BUSY_S),
    *(f"trend_{s / 60:g}min" for s in _TREND_S),
    *(f"highest_at_{m}min_x{n}" for m, n in _PERIODS),
    *(f"highest_rise_at_{m}min_x{n}" for m, n in _PERIODS),
    *(f"mean_rise_at_{m}min_x{n}" for m, n in _PERIODS),
    "day_ahead",
    "day_ahead_30min",
    "day_scaled",
    "day_scaled_highest",
    "rise_typical",
    "rise_highest",
)
_CONTEXT: Final = (
    "scale",  # log of 1 + the present load
    "fluctuation_5min",
    "fluctuation_30min",
    "fluctuation_relative",
    "idle_2min",
    "idle_30min",
    "day_ratio",  # log of today's load relative to yesterday's
    "day_known",
    "lead",  # log of the start-up delay in minutes
    "stake",  # log of what a replica's worth of requests costs if missed, relative to the replica
    "grain",  # log of the requests that one replica serves in a tick
    "patience",  # log of the objective relative to a full batch
    "usable",  # log of the share of its capacity that a replica can use within the objective
)
# what a network sees: every reference relative to the present load, and the context
INPUTS: Final = (*REFERENCES, *_CONTEXT)
_LIMIT: Final = 8.0
_NOW: Final = np.zeros((1, 1), np.int64)
_CHUNK: Final = 64  # ticks; about the square root of those of a day


class LoadHistory:
    """Values of n rows, tick by tick, for the last `ticks` ticks. All arguments and results have rows along the last
    axis. `known` is how many ticks of each row have been seen; before them, the oldest seen value is assumed.

    The highest and the mean of the last ticks come from those of whole chunks and the values at both ends; means and
    deviations of any stretch of the last `averaged` ticks from running sums. With a `stretch` of ticks per row, where
    its highest stood is remembered at every tick, in a byte or two.
    """

    def __init__(self, rows: int, ticks: int, averaged: int = 0, stretch: np.ndarray | None = None) -> None:
        self._chunks = -(-ticks // _CHUNK) + 1
        self._size = self._chunks * _CHUNK
        self._values = np.zeros((self._size, rows))
        # highest and sum of the chunks, of which the latest is not complete
        self._of_chunks = np.full((self._chunks, rows), -np.inf), np.zeros((self._chunks, rows))
        # the same of the last 0, 1, 2, ... complete ones; None: to be found anew
        self._of_last: tuple[np.ndarray, np.ndarray] | None = None
        self._sums = np.zeros((2, averaged + 1, rows))  # of values, and of their squares, up to a tick
        self._columns = np.arange(rows)
        self._clock = 0  # ticks so far; the latest stands at (clock - 1) % size
        self.known = np.zeros(rows, np.int64)
        self._stretch = stretch
        if stretch is not None:
            longest = int(stretch.max())
            self._since = np.zeros((self._size, rows), np.min_scalar_type(longest))
            # ticks ago that are within a row's stretch; one that is shorter than others has its last one repeatedly
            self._within = np.minimum(np.arange(longest)[:, None], stretch - 1)

    def reset(self, row: int, values: np.ndarray) -> None:
        """Puts `values` (oldest first) into a row's past, and forgets what was there."""
        past = np.asarray(values, float)[-self._size :]
        self.known[row] = len(past)
        whole = np.full(self._size, past[0] if len(past) else 0.0)
        before = self._size - len(past)
        whole[before:] = past
        at = np.arange(self._clock - self._size, self._clock)
        self._values[at % self._size, row] = whole
        late = (self._clock - 1) % _CHUNK + 1
        folded = whole[_CHUNK - late : self._size - late].reshape(-1, _CHUNK)
        chunks = at[-late] // _CHUNK - np.arange(self._chunks)[::-1]
        for of_chunks, fold in zip(self._of_chunks, (np.maximum, np.add), strict=True):
            of_chunks[chunks % self._chunks, row] = np.r_[
                fold.reduce(folded, axis=1), fold.reduce(whole[-late:])
            ]
        self._of_last = None
        kept = self._sums.shape[1]
        for sums, terms in zip(self._sums, (whole, whole**2), strict=True):
            # sums count from the first known value on, so that they do not depend on how much is kept
            total = np.r_[terms[0] * np.arange(1 - before, 1), np.cumsum(terms[before:])]
            sums[at[-kept:] % kept, row] = total[-kept:]
        if self._stretch is not None:
            stretches = np.lib.stride_tricks.sliding_window_view(whole[::-1], int(self._stretch[row]))
            ends = self._clock - 1 - np.arange(len(stretches))
            self._since[ends % self._size, row] = stretches.argmax(axis=1)

    def update(self, values: np.ndarray) -> None:
        """Takes in the values of the tick that has passed; shape (rows,)."""
        for row in np.flatnonzero(self.known == 0).tolist():
            self.reset(row, np.full(1, values[row]))
        now, chunk = self._clock % self._size, self._clock // _CHUNK % self._chunks
        highest, total = self._of_chunks
        if self._clock % _CHUNK == 0:
            highest[chunk], total[chunk] = values, values
            self._of_last = None
        else:
            np.maximum(highest[chunk], values, out=highest[chunk])
            total[chunk] += values
        self._values[now] = values
        kept = self._sums.shape[1]
        for sums, terms in zip(self._sums, (values, values**2), strict=True):
            sums[self._clock % kept] = sums[(self._clock - 1) % kept] + terms
        self._clock += 1
        self.known += 1
        if self._stretch is not None:
            self._since[now] = self.at(self._within).argmax(axis=0)

    def at(self, ago: np.ndarray) -> np.ndarray:
        """The values of so many ticks ago (0: the latest); shape (n, rows)."""
        return self._values.take(self._places(ago, self._size))

    def _places(self, ago: np.ndarray, size: int) -> np.ndarray:
        """Where a tick stands in a flat ring of so many; below 0 means before its end, as it does everywhere."""
        return ((self._clock - 1) % size - ago) * len(self._columns) + self._columns

    def highest(self, lengths: Sequence[int]) -> np.ndarray:
        """The highest of the last so many ticks; shape (n, rows)."""
        return np.stack([self._folded(length, np.maximum, 0) for length in lengths])

    def total(self, length: int) -> np.ndarray:
        """The sum of the last so many ticks; shape (rows,)."""
        return self._folded(length, np.add, 1)

    def _folded(self, length: int, fold: np.ufunc, which: int) -> np.ndarray:
        """The first values up to the end of their chunk, the complete chunks after it, and the latest one."""
        first, latest = self._clock - length, (self._clock - 1) // _CHUNK
        place, complete = first % self._size, latest - first // _CHUNK - 1
        if complete < 0:
            begun: np.ndarray = fold.reduce(self._values[place : place + length], axis=0)
            return begun
        if self._of_last is None:
            back = (latest - np.arange(1, self._chunks)) % self._chunks
            none = np.full((1, len(self._columns)), -np.inf), np.zeros((1, len(self._columns)))
            highest, sums = (np.r_[n, of[back]] for n, of in zip(none, self._of_chunks, strict=True))
            self._of_last = np.maximum.accumulate(highest), np.cumsum(sums, axis=0)
        early = fold.reduce(self._values[place : (place // _CHUNK + 1) * _CHUNK], axis=0)
        late = fold(self._of_last[which][complete], self._of_chunks[which][latest % self._chunks])
        folded: np.ndarray = fold(early, late)
        return folded

    def stretches(self, ago: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The highest of a stretch of which the last tick was `ago` ticks ago, and how far that rose above the two
        ticks before the stretch, at least 0; shapes (n, rows)."""
        assert self._stretch is not None
        rows, end = len(self._columns), self._places(ago, self._size)
        highest = self._values.take(end - self._since.take(end).astype(np.int64) * rows)
        before = end - self._stretch * rows
        rise = highest - (self._values.take(before) + self._values.take(before - rows)) / 2
        return highest, np.maximum(rise, 0.0)

    def mean(self, ago: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The mean of `length` ticks of which the last was `ago` ticks ago; shape (n, rows)."""
        return self._over(self._sums[0], ago, length)

    def deviation(self, ago: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The standard deviation over such stretches; shape (n, rows)."""
        mean = self.mean(ago, length)
        return np.sqrt(np.maximum(self._over(self._sums[1], ago, length) - mean**2, 0.0))

    def _over(self, sums: np.ndarray, ago: np.ndarray, length: np.ndarray) -> np.ndarray:
        last = self._places(ago, len(sums))
        mean: np.ndarray = (sums.take(last) - sums.take(last - length * len(self._columns))) / length
        return mean


def _longest_s(s: Situation) -> float:
    """The wait at the largest batch at which the answer does not come too slowly whatever the wait."""
    waits_s = s.waits_s()
    finite = waits_s[np.isfinite(waits_s)]
    return float(finite[-1] if len(finite) else 2 * s.batch_times_s()[-1])


def _usable(s: Situation) -> float:
    """The share of a replica's capacity that is left if no request may wait for longer than the objective."""
    times_s, waits_s = s.batch_times_s(), s.waits_s()
    sizes = np.arange(1, len(times_s) + 1)
    fits = waits_s <= s.service.slo_s
    rates = sizes / times_s
    best = rates[fits].max() if fits.any() else rates[0] * min(1.0, s.service.slo_s / waits_s[0])
    return max(float(best / rates.max()), 1e-3)


class Outlook:
    """Reference loads and network inputs of rows of services; `update` takes in a tick, `view` shows what it means.

    All services of an outlook have ticks of the same length. The stretch that matters begins now and ends two ticks
    after what is ordered now is ready: `lead` ticks ahead.
    """

    def __init__(self, situations: Sequence[Situation]) -> None:
        tick_s = situations[0].tick_s
        n = len(situations)
        self.capacity_rps = np.array([s.capacity_rps() for s in situations])
        self.lead = np.array([max(1, math.ceil(s.start_up_s * 1.1 / tick_s)) for s in situations])
        stretch = self.lead + 2
        self._day = round(_DAY_S / tick_s)

        def ticks(seconds: float) -> int:
            return max(1, round(seconds / tick_s))

        rises = _RISES * int(stretch.max()) + ticks(60)
        keep = max(self._day + ticks(600), rises) + 2
        self._loads = LoadHistory(n, keep, max(ticks(_MEAN_S[-2]), rises), stretch)
        self._busiest = LoadHistory(n, ticks(_BUSY_S[-1]))

        def spread(pairs: Sequence[tuple[object, object]]) -> tuple[np.ndarray, np.ndarray]:
            ago = np.stack([np.broadcast_to(np.asarray(a, np.int64), (n,)) for a, _ in pairs])
            length = np.stack([np.broadcast_to(np.asarray(b, np.int64), (n,)) for _, b in pairs])
            return ago, length

        def since(ago: np.ndarray, seconds: float) -> np.ndarray:
            """Every tick of so many seconds, the last one so many ticks ago; what would be in the future, is now."""
            return np.maximum(ago, 0) + np.arange(ticks(seconds))[:, None]

        self._recent = [1, *(ticks(s) for s in _RECENT_S)]
        self._means = spread([(0, ticks(s)) for s in _MEAN_S[:-1]])
        self._busy = [ticks(s) for s in _BUSY_S]
        self._trends = [
            (spread([(0, ticks(s / 2)), (ticks(s / 2), ticks(s / 2))]), ticks(s / 2)) for s in _TREND_S
        ]
        # a stretch that would reach into the future begins a little earlier instead
        periods = [k * ticks(60 * minutes) for minutes, count in _PERIODS for k in range(1, count + 1)]
        different = sorted(set(periods))
        counts = [count for _, count in _PERIODS]
        back = [different.index(one) for one in periods]
        begin = np.cumsum([0, *counts])
        # which of the different ones each period has (the last one repeatedly), and its share in their mean
        self._of_period = np.array([
            [back[at + min(k, count - 1)] for at, count in zip(begin, counts, strict=False)]
            for k in range(max(counts))
        ])  # fmt: skip
        self._share = np.zeros((len(counts), len(different)))
        for k, count in enumerate(counts):
            np.add.at(self._share[k], back[begin[k] : begin[k + 1]], 1 / count)
        self._stretches = np.concatenate([
            np.maximum(np.append(different, self._day)[:, None] - stretch, 0),
            np.arange(_RISES)[:, None] * stretch,
        ])  # fmt: skip
        self._rises_from = spread([((k + 1) * stretch, ticks(60)) for k in range(_RISES)])
        self._ahead = since(self._day - self.lead - ticks(1800), 1800)
        self._ahead_soon = since(self._day - self.lead - ticks(300), 300)
        self._then = since(np.full(n, self._day - ticks(150)), 300)
        self._later = since(self._day - self.lead - ticks(150), 300)
        self._half_hour = spread([(0, ticks(120)), (0, ticks(300)), (0, ticks(1800))])
        self._service = np.log(np.stack([self._about(s) for s in situations], axis=1))
        for row, situation in enumerate(situations):
            self.reset(row, situation)

    def _about(self, s: Situation) -> np.ndarray:
        """What the context says of a service itself, before the logarithm."""
        price_per_s = s.pools[s.service.pools[0]].price_usd_per_hour / 3600
        capacity_rps, money = s.capacity_rps(), s.service.economics
        stake = min(money.late_usd, money.dropped_usd) * capacity_rps / max(price_per_s, 1e-12)
        return np.array([
            max(s.start_up_s, 1.0) / 60,
            np.clip(stake, 1e-3, 1e6),
            capacity_rps * s.tick_s,
            max(2 * s.service.slo_s / _longest_s(s), 1e-3),
            _usable(s),
        ])  # fmt: skip

    def reset(self, row: int, situation: Situation) -> None:
        """Forgets a row's run; a new one begins, with a past of mean rates."""
        past = situation.history_rps / self.capacity_rps[row]
        self._loads.reset(row, past)
        self._busiest.reset(row, past)

    def update(self, rate_rps: np.ndarray, peak_rps: np.ndarray) -> None:
        """Takes in the mean and busiest-second rate of the tick that has passed (NaN: as before); shape (rows,)."""
        before = self._loads.at(_NOW)[0]
        load = np.where(np.isnan(rate_rps), before, rate_rps / self.capacity_rps)
        peak = np.where(np.isnan(peak_rps), load, peak_rps / self.capacity_rps)
        self._loads.update(load)
        self._busiest.update(peak)

    def view(self) -> tuple[np.ndarray, np.ndarray]:
        """Reference loads in replicas (rows, len(REFERENCES)), and network inputs (rows, len(INPUTS))."""
        loads = self._loads
        recent, means = loads.highest(self._recent), loads.mean(*self._means)
        present = means[0]
        short, five, half_hour = loads.mean(*self._half_hour)
        trends = []
        for where, apart in self._trends:
            late, early = loads.mean(*where)
            trends.append(np.maximum(late + (late - early) / apart * (apart / 2 + self.lead), 0.0))
        highest, rise = loads.stretches(self._stretches)
        highest_at = highest[self._of_period].max(axis=0)
        highest_rise = rise[self._of_period].max(axis=0)
        mean_rise = self._share @ rise[: self._share.shape[1]]
        ahead, soon = loads.at(self._ahead).max(axis=0), loads.at(self._ahead_soon).max(axis=0)
        then, later = loads.at(self._then).mean(axis=0), loads.at(self._later).mean(axis=0)
        ratio = np.clip((five + 0.05) / (then + 0.05), 0.2, 5.0)
        rises = highest[-_RISES:] - loads.mean(*self._rises_from)
        references = np.stack([
            *recent,
            *means,
            loads.total(self._recent[-1]) / self._recent[-1],
            *self._busiest.highest(self._busy),
            *trends,
            *highest_at,
            *(present + highest_rise),
            *(present + mean_rise),
            highest[len(highest) - _RISES - 1],
            ahead,
            later * ratio,
            soon * ratio,
            present + np.sqrt(np.mean(rises**2, axis=0)),
            present + np.maximum(rises.max(axis=0), 0.0),
        ])  # fmt: skip
        scale = np.log1p(np.maximum(present, half_hour))
        fluctuation = loads.deviation(*self._half_hour)
        context = np.stack([
            scale,
            np.sqrt(fluctuation[1]),
            np.sqrt(fluctuation[2]),
            np.log1p(fluctuation[2] / (half_hour + 0.02)),
            short < 0.01,
            half_hour < 0.01,
            np.log(ratio),
            loads.known >= self._day,
            *self._service,
        ])  # fmt: skip
        inputs = np.concatenate([np.log1p(references) - scale, context]).T
        return references.T, np.clip(inputs, -_LIMIT, _LIMIT)
