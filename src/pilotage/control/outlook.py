"""What load may come while an order is on its way: reference loads and inputs of learned policies, for many services.

`LoadHistory` keeps the past so that the highest and the mean of any stretch of it are two look-ups (a sparse table for
range maxima: Bender & Farach-Colton 2000; and running sums). `Outlook` is a function of it alone: which loads the next
start-up delay could bring if the past were a guide (the last minutes, their trend, the same stretch of earlier periods
and of the day before), all in replicas, and what a network needs to know to choose among them.
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
_NOW, _TWO = np.zeros((1, 1), np.int64), np.full((1, 1), 2)


class LoadHistory:
    """Values of n rows, tick by tick, for the last `ticks` ticks. All arguments and results have rows along the last
    axis. `known` is how many ticks of each row have been seen; before them, the oldest seen value is assumed.

    With a `stretch` of ticks per row, the highest of every stretch and how far it rose above the two ticks before it
    are kept, too: one look-up instead of six.
    """

    def __init__(self, rows: int, ticks: int, longest: int, stretch: np.ndarray | None = None) -> None:
        self._size = ticks + 1
        self._levels = int(np.log2(max(1, min(longest, ticks)))) + 1
        self._highest = np.zeros((self._levels, self._size, rows))
        self._sum, self._squares = np.zeros((self._size, rows)), np.zeros((self._size, rows))
        self._rows = np.arange(rows)
        self._clock = 0  # ticks so far; the latest stands at (clock - 1) % size
        self.known = np.zeros(rows, np.int64)
        self._stretch = stretch
        if stretch is not None:
            self._peaks, self._rises = np.zeros((self._size, rows)), np.zeros((self._size, rows))
            self._one_stretch = len(set(stretch.tolist())) == 1

    def reset(self, row: int, values: np.ndarray) -> None:
        """Puts `values` (oldest first) into a row's past, and forgets what was there."""
        past = np.asarray(values, float)[-self._size :]
        self.known[row] = len(past)
        whole = np.full(self._size, past[0] if len(past) else 0.0)
        before = self._size - len(past)
        whole[before:] = past
        at = (self._clock - self._size + np.arange(self._size)) % self._size
        for sums, values in ((self._sum, whole), (self._squares, whole**2)):
            # sums count from the first known value on, so that they do not depend on how much is kept
            sums[at, row] = np.r_[values[0] * np.arange(1 - before, 1), np.cumsum(values[before:])]
        for level in range(self._levels):
            self._highest[level, at, row] = whole
            step = 1 << level
            whole = np.maximum(whole, np.r_[np.full(min(step, len(whole)), whole[0]), whole[:-step]])
        if self._stretch is not None:
            length = int(self._stretch[row])
            level = min(int(np.log2(length)), self._levels - 1)
            ends = self._clock - 1 - np.arange(self._size - length - 2)  # the oldest ones are never asked for
            highest, sums = self._highest[level, :, row], self._sum[:, row]
            began = ends - length
            peak = np.maximum(highest[ends % self._size], highest[(began + (1 << level)) % self._size])
            self._peaks[ends % self._size, row] = peak
            mean = (sums[began % self._size] - sums[(began - 2) % self._size]) / 2
            self._rises[ends % self._size, row] = np.maximum(peak - mean, 0.0)

    def update(self, values: np.ndarray) -> None:
        """Takes in the values of the tick that has passed; shape (rows,)."""
        for row in np.flatnonzero(self.known == 0).tolist():
            self.reset(row, np.full(1, values[row]))
        now, before = self._clock % self._size, (self._clock - 1) % self._size
        self._sum[now] = self._sum[before] + values
        self._squares[now] = self._squares[before] + values**2
        self._highest[0, now] = values
        for level in range(1, self._levels):
            step = 1 << (level - 1)
            earlier = self._highest[level - 1, (self._clock - step) % self._size]
            np.maximum(self._highest[level - 1, now], earlier, out=self._highest[level, now])
        self._clock += 1
        self.known += 1
        if self._stretch is not None:
            self._peaks[now] = self.highest(_NOW, self._stretch[None])[0]
            before_it = self.mean(self._stretch[None], _TWO)[0]
            self._rises[now] = np.maximum(self._peaks[now] - before_it, 0.0)

    def stretches(self, ago: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The highest of a stretch of which the last tick was `ago` ticks ago, and how far that rose above the two
        ticks before the stretch, at least 0; shapes (n, rows)."""
        end = (self._clock - 1 - ago) % self._size
        if self._one_stretch:  # then so are the times of all rows, and whole rows are copied
            return self._peaks[end[:, 0]], self._rises[end[:, 0]]
        return self._peaks[end, self._rows], self._rises[end, self._rows]

    def highest(self, ago: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The highest of `length` ticks of which the last was `ago` ticks ago (0: the latest); shape (n, rows)."""
        level = np.minimum(np.log2(length).astype(np.int64), self._levels - 1)
        end = self._clock - 1 - ago
        late = self._highest[level, end % self._size, self._rows]
        return np.maximum(late, self._highest[level, (end - length + (1 << level)) % self._size, self._rows])

    def mean(self, ago: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The mean over such stretches; shape (n, rows)."""
        return self._over(self._sum, ago, length)

    def deviation(self, ago: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The standard deviation over such stretches; shape (n, rows)."""
        mean = self.mean(ago, length)
        return np.sqrt(np.maximum(self._over(self._squares, ago, length) - mean**2, 0.0))

    def _over(self, sums: np.ndarray, ago: np.ndarray, length: np.ndarray) -> np.ndarray:
        end = self._clock - 1 - ago
        return (sums[end % self._size, self._rows] - sums[(end - length) % self._size, self._rows]) / length


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

        longest = max(ticks(_RECENT_S[-1]), int(stretch.max()))
        keep = self._day + longest + ticks(600)
        self._loads = LoadHistory(n, keep, longest, np.minimum(stretch, keep - 1))
        self._busiest = LoadHistory(n, ticks(_BUSY_S[-1]) + 1, ticks(_BUSY_S[-1]))
        self._ring_ticks = keep

        def spread(pairs: Sequence[tuple[object, object]]) -> tuple[np.ndarray, np.ndarray]:
            ago = np.stack([np.broadcast_to(np.asarray(a, np.int64), (n,)) for a, _ in pairs])
            length = np.stack([np.broadcast_to(np.asarray(b, np.int64), (n,)) for _, b in pairs])
            # a stretch that would reach into the future begins a little earlier instead
            return np.maximum(ago, 0), np.minimum(length, keep - 1)

        recent = [(0, 1)] + [(0, ticks(s)) for s in _RECENT_S]
        self._recent = spread(recent)
        self._means = spread([(0, ticks(s)) for s in _MEAN_S])
        self._busy = spread([(0, ticks(s)) for s in _BUSY_S])
        self._trends = [
            (spread([(0, ticks(s / 2)), (ticks(s / 2), ticks(s / 2))]), ticks(s / 2)) for s in _TREND_S
        ]
        periods: list[tuple[object, object]] = []
        self._period_starts: list[int] = []
        for minutes, count in _PERIODS:
            self._period_starts.append(len(periods))
            periods += [(k * ticks(60 * minutes) - stretch, stretch) for k in range(1, count + 1)]
        self._periods, _ = spread(periods)
        self._period_counts = np.array([count for _, count in _PERIODS])[:, None]
        self._ahead = spread([
            (self._day - stretch, stretch),
            (self._day - self.lead - ticks(1800), ticks(1800)),
            (self._day - self.lead - ticks(300), ticks(300)),
        ])  # fmt: skip
        self._ahead_mean = spread([
            (self._day - ticks(150), ticks(300)),
            (self._day - self.lead - ticks(150), ticks(300)),
        ])  # fmt: skip
        rises = [(k * stretch, stretch) for k in range(_RISES)]
        self._rises = spread(rises)
        self._rises_from = spread([((k + 1) * stretch, ticks(60)) for k in range(_RISES)])
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
        before = self._loads.highest(*(a[:1] for a in self._recent))[0]
        load = np.where(np.isnan(rate_rps), before, rate_rps / self.capacity_rps)
        peak = np.where(np.isnan(peak_rps), load, peak_rps / self.capacity_rps)
        self._loads.update(load)
        self._busiest.update(peak)

    def view(self) -> tuple[np.ndarray, np.ndarray]:
        """Reference loads in replicas (rows, len(REFERENCES)), and network inputs (rows, len(INPUTS))."""
        loads = self._loads
        recent, means = loads.highest(*self._recent), loads.mean(*self._means)
        present = means[0]
        short, five, half_hour = loads.mean(*self._half_hour)
        trends = []
        for where, apart in self._trends:
            late, early = loads.mean(*where)
            trends.append(np.maximum(late + (late - early) / apart * (apart / 2 + self.lead), 0.0))
        at, rise = loads.stretches(self._periods)
        highest_at = np.maximum.reduceat(at, self._period_starts)
        highest_rise = np.maximum.reduceat(rise, self._period_starts)
        mean_rise = np.add.reduceat(rise, self._period_starts) / self._period_counts
        ahead = loads.highest(*self._ahead)
        then, later = loads.mean(*self._ahead_mean)
        ratio = np.clip((five + 0.05) / (then + 0.05), 0.2, 5.0)
        rises = loads.highest(*self._rises) - loads.mean(*self._rises_from)
        references = np.stack([
            *recent,
            *means,
            *self._busiest.highest(*self._busy),
            *trends,
            *highest_at,
            *(present + highest_rise),
            *(present + mean_rise),
            ahead[0],
            ahead[1],
            later * ratio,
            ahead[2] * ratio,
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
