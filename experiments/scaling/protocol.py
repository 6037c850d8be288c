"""Which traffic is learned on, chosen on and judged on: families, days and sizes of `experiments/scaling`.

Days of training come before days of validation, and those before days of test. NASA and ServeGen are never trained on.
Every trace is sized by its busy minutes in training days, so that a window needs 2 to 12 replicas at its busiest.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from pilotage.agents.domain import busy_rps, capacity_rps, log_uniform, sized, traffic_at_random
from pilotage.engine.cluster import World
from pilotage.scenario import Scenario, load
from pilotage.world.arrivals import Counts, Gamma, Poisson, Segment, Splice, Traffic

DAY_S, HOUR_S = 86400.0, 3600.0
HORIZON_H, HISTORY_H = 4.0, 26.0
SYNTHETIC = ("diurnal", "flash", "on-off", "timers")
_FUNCTIONS = "arrivals/azure_functions_2019_f0-f5_day00-06.csv.gz"


class Recorded(NamedTuple):
    """A trace: its days of training, validation and test (None: never)."""

    source: Counts
    train: tuple[float, float] | None
    validate: tuple[float, float] | None
    test: tuple[float, float]


TRACES = {
    "twitter": [
        Recorded(
            Counts(path="arrivals/twitter_2021_08_persec_day00-13.txt.gz", interval_s=1.0),
            (1.1, 8),
            (8, 10),
            (10, 14),
        )
    ],
    "functions": [
        Recorded(Counts(path=_FUNCTIONS, interval_s=60.0, column=f"f{k}"), (1.1, 4), (4, 5.3), (5.3, 7))
        for k in range(6)
    ],
    "nasa": [
        Recorded(
            Counts(path="arrivals/nasa_1995_persec_day00-30.txt.gz", interval_s=1.0), None, None, (4, 27)
        )
    ],
}
# windows of a family per split
SHARES = {
    "train": {"twitter": 2, "functions": 2, "synthetic": 2},  # for each of many services
    "validate": {"twitter": 1, "functions": 2, "synthetic": 1},
}
# windows of the one service that is judged; two families are never seen before test
JUDGED = {
    "validate": {"twitter": 6, "functions": 9, "diurnal": 2, "flash": 2, "on-off": 3, "timers": 3},
    "test": {
        "twitter": 8, "functions": 12, "nasa": 8, "servegen": 8, "diurnal": 4, "flash": 4, "on-off": 4, "timers": 4,
    },
}  # fmt: skip


def service(data: Path) -> Scenario:
    """The service that is judged: the quickstart's, for windows of four hours after a day and two hours of history."""
    scenario: Scenario = load("quickstart", data).replace(horizon_h=HORIZON_H, history_h=HISTORY_H)
    return scenario


def windows(
    scenario: Scenario, split: str, rng: np.random.Generator, shares: dict[str, int]
) -> list[tuple[str, World]]:
    """Windows of a split, by family, sized for a service."""
    capacity, data, out = capacity_rps(scenario), Path(scenario.data or "."), []
    for family, count in shares.items():
        picks = rng.permutation(len(TRACES.get(family, ())))
        for k in range(count):
            replicas = log_uniform(rng, 2, 12)
            if family in (*SYNTHETIC, "synthetic"):
                kind = str(rng.choice(SYNTHETIC)) if family == "synthetic" else family
                start_s = _start(rng, (1.1, 5.0))
                traffic: Traffic = traffic_at_random(
                    rng, kind, replicas * capacity, start_s + HORIZON_H * HOUR_S + 60
                )
            elif family == "servegen":
                start_s = _start(rng, (1.1, 6.5))
                traffic = _servegen(data, rng, start_s)
                busy = busy_rps(traffic, data, start_s - DAY_S, start_s)
                traffic = sized(traffic, busy, replicas, capacity)
            else:
                trace = TRACES[family][picks[k % len(picks)]]
                days = {"train": trace.train, "validate": trace.validate, "test": trace.test}[
                    split
                ] or trace.test
                start_s = _busy_start(rng, trace.source, days, data)
                known = trace.train or (0.0, trace.test[0])
                busy = busy_rps(trace.source, data, known[0] * DAY_S, known[1] * DAY_S)
                traffic = sized(trace.source, busy, replicas, capacity)
            out.append((family, World(int(rng.integers(2**31)), start_s, (traffic,))))
    return out


def _start(rng: np.random.Generator, days: tuple[float, float]) -> float:
    """A start such that the whole window lies in those days, at a tick."""
    return float(np.round(rng.uniform(days[0] * DAY_S, days[1] * DAY_S - HORIZON_H * HOUR_S) / 60) * 60)


def _busy_start(rng: np.random.Generator, source: Counts, days: tuple[float, float], data: Path) -> float:
    """A start at which there is something to decide: a window that is not all but idle beside the trace's mean."""
    counts, step_s = source.counts(data), source.interval_s
    for _ in range(100):
        start_s = _start(rng, days)
        lo = int(start_s / step_s)
        if counts[lo : lo + int(HORIZON_H * HOUR_S / step_s)].mean() > 0.1 * counts.mean():
            break
    return start_s


@lru_cache(maxsize=1)
def _clients(data: Path) -> pd.DataFrame:
    return pd.read_csv(data / "arrivals/servegen/language_m-small_rates_day00-06.csv.gz")


def _servegen(data: Path, rng: np.random.Generator, start_s: float) -> Traffic:
    """One client of the ServeGen workload around a window: gamma gaps, with every 10 minutes' rate and variation."""
    table = _clients(data)
    busy = table.groupby("client")["rate_rps"].sum()
    client = rng.choice(busy.index[busy > busy.quantile(0.5)])
    rows = table[table["client"] == client].set_index("t_s").sort_index()
    end_s = start_s + HORIZON_H * HOUR_S + 600
    segments = []
    for t in np.arange(0.0, end_s, 600.0):
        source: Traffic = Poisson(rate_rps=1e-3)
        if t in rows.index and t >= start_s - 27 * HOUR_S:
            row = rows.loc[t]
            source = Gamma(rate_rps=max(float(row["rate_rps"]), 1e-3), cv=float(np.clip(row["cv"], 0.2, 20)))
        segments.append(Segment(source=source, duration_s=600.0))
    return Splice(segments=tuple(segments))
