"""How much the quantiles of load forecasts are worth: what share of loads falls below them, and at what loss.

`forecasts.py --data DIR --out DIR` forecasts the load of the validation windows that `judge.py --split validate` judges
on, 1, 5 and 15 minutes ahead, at every tick, from what was known then, and writes `forecasts.csv`: by family (and over
all, every family counting alike), how far ahead, stated quantile, forecaster and the way from forecast to quantile,
the share of loads at or below the quantile, the pinball loss in replicas, and microseconds of processor time for each.

Forecasters: `tracker` is `control.forecast.LoadTracker` as `predictive` has it by default; `exponential smoothing` is
its level alone, with the time constant that forecast the day before the window best; `seasonal naive` is the load at
that time a day before; `last` is the last load. Quantiles: `normal` adds normal quantiles of the error that is tracked
(root mean square over about half an hour), `tracked` learns the quantiles of that ratio (`Margins`). With statsmodels
installed, `ets` is its exponential smoothing with damped trend and its own intervals, refitted at every 120th tick to
the two hours before. A load of 0 is at or below any quantile, so idle services are covered more often than stated.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import protocol
from scipy.stats import norm

from pilotage.agents.domain import capacity_rps
from pilotage.control.forecast import LoadTracker
from pilotage.control.scaling import Predictive
from pilotage.engine.cluster import recorded
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Scenario

AHEAD_S = (60.0, 300.0, 900.0)
QUANTILES = (0.5, 0.9, 0.99)
WARM_UP_S = 7200.0  # before the window, in which errors and quantiles are tracked but not judged
LEVELS_S = (15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0)
ERROR_S = 1800.0
LEAST_ERROR = 0.02  # replicas; less matters to nobody
GAIN = 0.2  # of `Margins`, for a load one tick ahead
EVERY = 120  # ticks between forecasts of `ets`


class Margins:
    """How far a quantile lies above the forecast, in units of the error that is tracked; shape (quantiles, rows).

    `normal`: the normal quantile. `tracked`: moved after every load by a gain times q if the load was above what was
    stated, and by the gain times 1 - q downwards if not, so that the share below tends to q whatever the loads are
    (Gibbs & Candes 2021; quantile tracking of Angelopoulos, Candes & Tibshirani, Conformal PID control, 2023); the gain
    falls with the ticks that a load lets wait for it.
    """

    def __init__(self, way: str, rows: int, ahead: int) -> None:
        self._q = np.array(QUANTILES)[:, None]
        self._gain = GAIN / ahead if way == "tracked" else 0.0
        self.now = np.repeat(norm.ppf(self._q), rows, axis=1)

    def update(self, load: np.ndarray, stated: np.ndarray) -> None:
        """Takes in loads of shape (rows,) and the quantiles that had been stated for them."""
        self.now += self._gain * ((load > stated) - (1 - self._q))


def loads_of(scenario: Scenario, seed: int, quick: bool) -> tuple[np.ndarray, np.ndarray]:
    """Families, of shape (windows,), and loads in replicas, (windows, ticks), the past before the window included."""
    found = protocol.windows(
        scenario, "validate", np.random.default_rng([seed, 1004]), protocol.JUDGED["validate"]
    )[:: 8 if quick else 1]
    past = round(scenario.history_h * 3600 / scenario.tick_s)
    rows = []
    for world in recorded(scenario, [world for _, world in found]):
        assert world.start_s is not None
        assert world.traffic is not None
        edges = world.start_s + scenario.tick_s * np.arange(-past, scenario.ticks + 1)
        times_s = world.traffic[0].begin(None, edges[0], edges[-1], None).until(edges[-1])  # type: ignore[arg-type]
        rows.append(np.diff(np.searchsorted(times_s, edges)) / scenario.tick_s)
    return np.array([family for family, _ in found]), np.array(rows) / capacity_rps(scenario)


Forecaster = Iterator[
    np.ndarray
]  # after each tick from the first judged or warming one on: forecasts, (rows,)


def tracker(loads: np.ndarray, from_: int, ahead: int, tick_s: float, **changes: float) -> Forecaster:
    """`LoadTracker` with the settings of `predictive`, but for changes; loads of shape (rows, ticks)."""
    rule = Predictive()
    settings = {
        "level_s": rule.level_s,
        "trend_s": rule.trend_s,
        "damping": rule.damping,
        "seasonal_weight": rule.seasonal_weight,
    }
    follows = LoadTracker(
        tick_s,
        np.full(len(loads), ahead * tick_s),
        [row[:from_] for row in loads],
        **(settings | changes),
        error_s=ERROR_S,
    )
    for load in loads[:, from_:].T:
        follows.update(load, load)
        yield follows.forecast


def smoothing(loads: np.ndarray, from_: int, ahead: int, tick_s: float) -> Forecaster:
    """The level of exponential smoothing, with each row's best time constant on what was known before."""
    day, best, least = loads[:, :from_], np.zeros(len(loads)), np.full(len(loads), np.inf)
    for level_s in LEVELS_S:
        level, square, gain = day[:, 0], np.zeros(len(loads)), -np.expm1(-tick_s / level_s)
        for now, later in zip(day.T[:-ahead], day.T[ahead:], strict=True):
            level = level + gain * (now - level)
            square += (later - level) ** 2
        best, least = np.where(square < least, level_s, best), np.minimum(square, least)
    gain = -np.expm1(-tick_s / best)
    level = day[:, 0]
    for k, load in enumerate(loads.T):
        level = level + gain * (load - level)
        if k >= from_:
            yield level


def seasonal_naive(loads: np.ndarray, from_: int, ahead: int, tick_s: float) -> Forecaster:
    day = round(86400 / tick_s)
    for k in range(from_, loads.shape[1]):
        yield loads[:, k + ahead - day]


def last(loads: np.ndarray, from_: int, ahead: int, tick_s: float) -> Forecaster:
    yield from loads[:, from_:].T


FORECASTERS: dict[str, Callable[..., Forecaster]] = {
    "tracker": tracker,
    "exponential smoothing": smoothing,
    "seasonal naive": seasonal_naive,
    "last": last,
}


def quantiles(
    forecasts: Forecaster, loads: np.ndarray, from_: int, ahead: int, tick_s: float, way: str
) -> np.ndarray:
    """What was stated for every tick; (quantiles, rows, ticks), NaN where nothing was."""
    rows, ticks = loads.shape
    out = np.full((len(QUANTILES), rows, ticks), np.nan)
    made = np.full((rows, ticks), np.nan)
    square, gain, margins = np.zeros(rows), -np.expm1(-tick_s / ERROR_S), Margins(way, rows, ahead)
    for k, forecast in zip(range(from_, ticks), forecasts, strict=False):
        if k - from_ >= ahead:
            error = loads[:, k] - made[:, k]
            margins.update(loads[:, k], out[:, :, k])
            # the mean so far, until there is more than is remembered
            square += max(gain, 1 / (k - from_ - ahead + 1)) * (error**2 - square)
        if k + ahead < ticks:
            made[:, k + ahead] = forecast
            scale = np.maximum(np.sqrt(square), LEAST_ERROR)
            out[:, :, k + ahead] = np.maximum(forecast + margins.now * scale, 0.0)
    return out


def ets(loads: np.ndarray, first: int, ahead: int, tick_s: float) -> tuple[np.ndarray, float]:
    """The same by statsmodels, where it was asked, and seconds per forecast."""
    from statsmodels.tsa.exponential_smoothing.ets import ETSModel

    out = np.full((len(QUANTILES), *loads.shape), np.nan)
    began, made, past = time.process_time(), 0, round(WARM_UP_S / tick_s)
    for row, load in enumerate(loads):
        for k in range(first, loads.shape[1], EVERY):  # forecasts tick k, from what was known `ahead` before
            known = load[k - ahead + 1 - past : k - ahead + 1]
            if np.ptp(known) < 1e-9:
                out[:, row, k] = known[-1]
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fit = ETSModel(pd.Series(known), error="add", trend="add", damped_trend=True).fit(
                    disp=False, maxiter=50
                )
                told = fit.get_prediction(start=past, end=past + ahead - 1)
            mean = float(np.asarray(told.predicted_mean)[-1])
            scale = float(np.sqrt(np.asarray(told.forecast_variance)[-1]))
            out[:, row, k] = np.maximum(mean + norm.ppf(QUANTILES) * scale, 0.0)
            made += 1
    return out, (time.process_time() - began) / max(made, 1)


def judged(
    name: str,
    way: str,
    stated: np.ndarray,
    loads: np.ndarray,
    families: np.ndarray,
    first: int,
    each_s: float,
) -> Iterator[dict[str, object]]:
    """Rows of the table for one forecaster and way; every window of a family counts alike, and every family of all."""
    actual = loads[:, first:]
    for q, values in zip(QUANTILES, stated[:, :, first:], strict=True):
        there = ~np.isnan(values)
        over = actual - values
        loss = np.where(over > 0, q * over, (q - 1) * over)
        covered = np.array([(o[t] <= 0).mean() for o, t in zip(over, there, strict=True)])
        lost = np.array([x[t].mean() for x, t in zip(loss, there, strict=True)])
        names = list(dict.fromkeys(families))
        of = {f: (covered[families == f].mean(), lost[families == f].mean()) for f in names}
        of["all"] = tuple(np.mean(list(of.values()), axis=0))
        for family, (share, mean_loss) in of.items():
            yield {
                "forecaster": name,
                "quantiles": way,
                "family": family,
                "quantile": q,
                "coverage": f"{share:.4f}",
                "pinball_replicas": f"{mean_loss:.5f}",
                "us_per_forecast": f"{1e6 * each_s:.3g}",
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/scaling"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    started, began = datetime.now(UTC), time.perf_counter()
    scenario = protocol.service(options.data)
    families, loads = loads_of(scenario, options.seed, options.quick)
    tick_s, first = scenario.tick_s, loads.shape[1] - scenario.ticks
    from_ = first - round(WARM_UP_S / tick_s)
    rows: list[dict[str, object]] = []
    for ahead_s in AHEAD_S:
        ahead = round(ahead_s / tick_s)
        for name, forecaster in FORECASTERS.items():
            for way in ("normal", "tracked"):
                since = time.process_time()
                stated = quantiles(forecaster(loads, from_, ahead, tick_s), loads, from_, ahead, tick_s, way)
                each_s = (time.process_time() - since) / (len(loads) * (loads.shape[1] - from_))
                found = judged(name, way, stated, loads, families, first, each_s)
                rows += [{"ahead_s": ahead_s} | row for row in found]
        if importlib.util.find_spec("statsmodels"):
            stated, each_s = ets(loads, first, ahead, tick_s)
            found = judged("ets", "its own", stated, loads, families, first, each_s)
            rows += [{"ahead_s": ahead_s} | row for row in found]
        print(f"{ahead_s:g} s ahead: {time.perf_counter() - began:.0f} s", flush=True)
    for row in rows:
        if row["family"] == "all":
            print(row)
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "forecasts.csv", as_csv(rows))
    facts = provenance("scaling", sys.argv, started, {"forecasts": round(time.perf_counter() - began, 1)})
    facts |= {"seeds": [options.seed]}
    write_whole(options.out / "forecasts_run.json", json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
