"""Load as a policy sees it: levels, peaks, lags, and a forecast with its error, for many services at once."""

from __future__ import annotations

import numpy as np

_DAY_S = 86400.0
_FAST_S, _SLOW_S = 60.0, 900.0


class LoadTracker:
    """Follows the arrival rates of n rows, tick by tick; all properties are in requests per second, shape (n,).

    The forecast for `lead_s` ahead is level + damped trend + seasonal difference: Holt's linear trend with
    damping (Gardner & McKenzie 1985), plus `seasonal_weight` times how much the load rose over the same stretch
    a day earlier, as far as the history reaches. Its error is tracked by remembering forecasts until their time
    comes. A missing measurement (NaN) carries the last one forward.
    """

    def __init__(
        self,
        tick_s: float,
        lead_s: np.ndarray,
        history_rps: list[np.ndarray],
        *,
        level_s: float,
        trend_s: float,
        damping: float,
        seasonal_weight: float,
        error_s: float,
    ) -> None:
        n = len(lead_s)
        self._tick_s = tick_s
        self._lead = np.maximum(1, np.ceil(lead_s / tick_s)).astype(np.int64)
        self._day = round(_DAY_S / tick_s)
        self._size = self._day + int(self._lead.max()) + 2 * round(1800 / tick_s) + 2
        self._alpha = _weight(tick_s, level_s)
        self._beta = _weight(tick_s, trend_s)
        self._gain = _weight(tick_s, error_s)
        self._fast_gain, self._slow_gain = _weight(tick_s, _FAST_S), _weight(tick_s, _SLOW_S)
        self._seasonal_weight = seasonal_weight
        steps = self._lead
        # sum of damping**1 .. damping**lead: how far a damped trend carries
        self._carry = damping * (1 - damping**steps) / (1 - damping) if damping < 1 else steps.astype(float)
        self._damping = damping
        self._rows = np.arange(n)
        self._ring = np.zeros((self._size, n))  # smoothed rates
        self._peaks = np.zeros((round(1800 / tick_s) + 1, n))
        self._made = np.zeros((int(self._lead.max()) + 1, n))  # forecasts whose time has not come
        self._clock = 0
        self._known = np.zeros(n, np.int64)  # ticks of history of each row
        self.rate, self.peak = np.zeros(n), np.zeros(n)
        self.fast, self.slow = np.zeros(n), np.zeros(n)
        self._level, self._trend, self._square = np.zeros(n), np.zeros(n), np.zeros(n)
        self.forecast = np.zeros(n)
        for row, history in enumerate(history_rps):
            self.reset(row, history)

    def reset(self, row: int, history_rps: np.ndarray) -> None:
        """Forgets a row and puts `history_rps` (oldest first) into its past."""
        past = np.asarray(history_rps, float)[-(self._size - 1) :]
        for state in (self.rate, self.peak, self.fast, self.slow, self._level, self._trend, self._square):
            state[row] = 0.0
        self._ring[:, row] = self._peaks[:, row] = self._made[:, row] = 0.0
        self._known[row] = len(past)
        if len(past) == 0:
            self.forecast[row] = 0.0
            return
        smooth = _smooth(past, max(1, round(_FAST_S / self._tick_s)))
        at = (self._clock - 1 - np.arange(len(past))) % self._size
        self._ring[at, row] = smooth[::-1]
        recent = past[-len(self._peaks) :]
        self._peaks[(self._clock - 1 - np.arange(len(recent))) % len(self._peaks), row] = recent[::-1]
        level, trend, square, lead = past[0], 0.0, 0.0, int(self._lead[row])
        fast = slow = past[0]
        made = np.zeros(len(past))
        for k, rate in enumerate(past.tolist()):
            if k >= lead:
                square += self._gain * ((rate - made[k - lead]) ** 2 - square)
            before = level
            level += self._alpha * (rate - level - self._damping * trend) + self._damping * trend
            trend = self._damping * trend + self._beta * (level - before - self._damping * trend)
            fast += self._fast_gain * (rate - fast)
            slow += self._slow_gain * (rate - slow)
            made[k] = level + self._carry[row] * trend
        self._level[row], self._trend[row], self._square[row] = level, trend, square
        self.fast[row], self.slow[row] = fast, slow
        self.rate[row] = self.peak[row] = past[-1]
        waiting = made[-lead:]
        self._made[(self._clock - len(waiting) + np.arange(len(waiting))) % len(self._made), row] = waiting
        self.forecast[row] = self._predict()[row]

    def update(self, rate_rps: np.ndarray, peak_rps: np.ndarray) -> None:
        """Takes in the mean and the busiest-second rate of the tick that has passed."""
        rate = np.where(np.isnan(rate_rps), self.rate, rate_rps)
        peak = np.where(np.isnan(peak_rps), rate, peak_rps)
        fresh = self._known == 0
        if fresh.any():
            for state in (self._level, self.fast, self.slow):
                state[fresh] = rate[fresh]
        due = self._made[(self._clock - self._lead) % len(self._made), self._rows]
        ripe = self._known >= self._lead
        self._square += np.where(ripe, self._gain * ((rate - due) ** 2 - self._square), 0.0)
        drift = self._damping * self._trend
        level = self._level + self._alpha * (rate - self._level - drift) + drift
        self._trend = drift + self._beta * (level - self._level - drift)
        self._level = level
        self.fast = self.fast + self._fast_gain * (rate - self.fast)
        self.slow = self.slow + self._slow_gain * (rate - self.slow)
        self.rate, self.peak = rate, peak
        self._ring[self._clock % self._size] = self.fast
        self._peaks[self._clock % len(self._peaks)] = peak
        self._known += 1
        self.forecast = self._predict()
        self._made[self._clock % len(self._made)] = self.forecast
        self._clock += 1

    def _predict(self) -> np.ndarray:
        ahead = self._level + self._carry * self._trend
        if self._seasonal_weight > 0:
            then = self._ring[(self._clock - self._day + self._lead) % self._size, self._rows]
            now = self._ring[(self._clock - self._day) % self._size, self._rows]
            ahead = ahead + np.where(self._known > self._day, self._seasonal_weight * (then - now), 0.0)
        return np.maximum(ahead, 0.0)

    @property
    def forecast_error(self) -> np.ndarray:
        """Root mean square of recent forecast errors."""
        return np.sqrt(self._square)

    def lag(self, seconds: float) -> np.ndarray:
        """The smoothed load so long ago; today's level where the history is too short."""
        ticks = round(seconds / self._tick_s)
        return np.where(self._known > ticks, self._ring[(self._clock - 1 - ticks) % self._size], self.slow)

    def highest(self, seconds: float) -> np.ndarray:
        """The busiest second of so long a past (at most 30 minutes)."""
        ticks = min(max(1, round(seconds / self._tick_s)), len(self._peaks))
        return self._peaks[(self._clock - 1 - np.arange(ticks)) % len(self._peaks)].max(axis=0)


class Horizon:
    """The forecast of one service for several times ahead: a `LoadTracker` with one row for each.

    What papers forecast with (LSTM, ARIMA, N-HiTS) was trained on their own traces; this stands in for all of them:
    level and damped trend, and, once the past is longer than a day, what the day before had in store.
    """

    def __init__(self, tick_s: float, leads_s: np.ndarray, history_rps: np.ndarray) -> None:
        self._rows = len(leads_s)
        self._tracker = LoadTracker(
            tick_s,
            np.asarray(leads_s, float),
            [history_rps] * self._rows,
            level_s=max(120.0, tick_s),
            trend_s=1800.0,
            damping=float(np.exp(-tick_s / 600.0)),
            seasonal_weight=1.0,
            error_s=1800.0,
        )

    def update(self, rate_rps: float) -> None:
        """Takes in the mean rate of the tick that has passed (NaN: not known)."""
        self._tracker.update(np.full(self._rows, rate_rps), np.full(self._rows, rate_rps))

    @property
    def rates_rps(self) -> np.ndarray:
        """The rate at each of the times ahead, in requests per second; shape (leads,)."""
        return self._tracker.forecast


def _weight(tick_s: float, time_constant_s: float) -> float:
    """Gain per tick of an exponential average with a time constant."""
    return float(-np.expm1(-tick_s / time_constant_s))


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Trailing mean over `width` values (fewer at the start)."""
    total = np.cumsum(np.r_[0.0, values])
    at = np.arange(1, len(values) + 1)
    low = np.maximum(at - width, 0)
    return (total[at] - total[low]) / (at - low)
