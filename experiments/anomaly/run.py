"""How well unusual values of serving metrics are ranked, and alerts timed, against static thresholds.

Ranking: on service telemetry with expert labels per point (`metrics/cloud_monitoring`), mean average precision
without any tolerance, of all rows after the first tenth (30 at least), of the series that have a label there; beside
it the distance from the mean of the first tenth in its standard deviations (`3 sigma`), the step from the value
before, and chance. Alerting: share of runs of labelled points in which a detector alerted, and alerts outside of them
per series and week; the static threshold is the one that, with the same rest between alerts and chosen with
hindsight, finds most at no more than one false alert per series and week. NAB: the rule of its paper (Lavin & Ahmad,
ICMLA 2015), on the series that are there, written in NAB's own format under `work/nab`, too, for the official scorer.
The detector's parameters are its defaults, which were fixed on NAB and on synthetic series; nothing was chosen on
cloud_monitoring. Intervals are 95 %, by bootstrap over series.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

from pilotage.control.anomaly import MetricAnomaly
from pilotage.evaluate import interval, ratio_interval
from pilotage.results import as_csv, provenance, write_whole

MOST_ROWS, WEEK_S = 20_000, 604_800
REST_S = 21_600.0
PROFILES = {  # NAB's weights of a hit, a false alarm and a miss
    "standard": (1.0, 0.11, 1.0), "reward low FP": (1.0, 0.22, 1.0), "reward low FN": (1.0, 0.11, 2.0),
}  # fmt: skip


class Series(NamedTuple):
    name: str
    interval_s: float
    values: np.ndarray
    labels: np.ndarray
    first: int  # row from which it is judged


def cloud_monitoring(folder: Path) -> list[Series]:
    """All series with a label after their first tenth; raises SystemExit if there are none."""
    series = []
    for path in sorted(folder.glob("*/*.csv.gz")):
        table = pd.read_csv(path).head(MOST_ROWS)
        first = max(30, len(table) // 10)
        labels = table["Label"].to_numpy() > 0
        if labels[first:].any():
            step = pd.to_datetime(table["TimeStamp"]).diff().median().total_seconds()
            values = table["Value"].ffill().fillna(0.0).to_numpy(float)
            series.append(Series(f"{path.parent.name}/{path.name}", step, values, labels, first))
    if not series:
        raise SystemExit(
            f"error: {folder}: no labelled series; valid: the folder cloud_monitoring of the data"
        )
    return series


def watched(series: Series) -> np.ndarray:
    """Score, surprise and alert of every row, shape (rows, 3)."""
    watch = MetricAnomaly(interval_s=series.interval_s, rest_s=REST_S).begin()
    return np.array([watch.update(float(x)) for x in series.values], float)


def static(values: np.ndarray, first: int) -> np.ndarray:
    return np.abs(values - values[:first].mean()) / (values[:first].std() + 1e-9)


def rested(alarms: np.ndarray, rest: int) -> np.ndarray:
    """Alarms less those within `rest` rows of one that counted."""
    out, last = np.zeros(len(alarms), bool), -rest - 1
    for i in np.flatnonzero(alarms):
        if i - last > rest:
            out[i], last = True, i
    return out


def alerted(series: Series, alerts: np.ndarray) -> tuple[int, int, float]:
    """Events with an alert, events in all, and false alerts per week, of the judged rows."""
    labels, alerts = series.labels[series.first :], alerts[series.first :]
    event = np.cumsum(np.diff(labels.astype(int), prepend=0) == 1) * labels
    weeks = len(labels) * series.interval_s / WEEK_S
    return len(np.unique(event[alerts & labels])), int(event.max()), float((alerts & ~labels).sum() / weeks)


def best_static(series: list[Series]) -> tuple[float, np.ndarray]:
    """The one threshold, in standard deviations, with most events found at one false alert per series and week."""
    found = {}
    for threshold in np.geomspace(1, 100, 60):
        of = [
            alerted(s, rested(static(s.values, s.first) > threshold, round(REST_S / s.interval_s)))
            for s in series
        ]
        if np.mean([false for _, _, false in of]) <= 1:
            found[float(threshold)] = np.array(of)
    best = max(found, key=lambda threshold: (found[threshold][:, 0].sum(), threshold))
    return best, found[best]


# --- NAB ------------------------------------------------------------------------------------------------------
def nab_series(folder: Path) -> tuple[list[Series], list[list[tuple[int, int]]]]:
    """NAB's series that are there, and their windows as first and last row."""
    windows = json.loads(gzip.decompress((folder / "combined_windows.json.gz").read_bytes()))
    series, rows = [], []
    for name, spans in windows.items():
        path = folder / f"{name}.gz"
        if not path.exists():
            continue
        table = pd.read_csv(path)
        when = pd.to_datetime(table["timestamp"])
        inside = [
            np.flatnonzero((when >= pd.Timestamp(a)) & (when <= pd.Timestamp(b))) for a, b in sorted(spans)
        ]
        labels = np.zeros(len(table), bool)
        for span in inside:
            labels[span] = True
        step = when.diff().median().total_seconds()
        probation = min(int(0.15 * len(table)), 750)
        series.append(Series(name, step, table["value"].to_numpy(float), labels, probation))
        rows.append([(int(span[0]), int(span[-1])) for span in inside])
    return series, rows


def emitted(scores: np.ndarray, rest: int) -> np.ndarray:
    """Scores that exceed all emitted in the last `rest` rows; 0 elsewhere."""
    out, recent = np.zeros(len(scores)), deque[tuple[int, float]]()
    for i, score in enumerate(scores.tolist()):
        while recent and recent[0][0] < i - rest:
            recent.popleft()
        if score > max((other for _, other in recent), default=0.0):
            out[i] = score
            recent.append((i, score))
    return out


def nab_score(
    scores: list[np.ndarray], series: list[Series], windows: list[list[tuple[int, int]]], profile: str
) -> float:
    """NAB's score: 0 for no detections, 100 for perfect ones, at the one threshold that suits the corpus best."""
    hit, false, miss = PROFILES[profile]
    rows, count = [], 0
    for score, one, spans in zip(scores, series, windows, strict=True):
        worth, window = np.full(len(score), -false), np.full(len(score), -1)
        for k, (left, right) in enumerate(spans):
            after = np.arange(right + 1, spans[k + 1][0] if k + 1 < len(spans) else len(score))
            far = (after - right) / max(right - left, 1)
            worth[after] = np.where(far > 3, -false, false * _sigmoid(far))
            within = np.arange(left, right + 1)
            worth[within] = (
                hit * _sigmoid(-(right - within + 1) / (right - left + 1)) / _sigmoid(np.array(-1.0))
            )
            window[within] = count + k
        count += len(spans)
        rows.append(np.column_stack([score, worth, window])[one.first :])
    table = np.concatenate(rows)
    table = table[np.argsort(-table[:, 0], kind="stable")]
    raw = highest = -miss * count
    caught = np.full(count, -miss)
    for k, (score, worth, window) in enumerate(table.tolist()):
        if window < 0:
            raw += worth
        elif worth > caught[int(window)]:
            raw += worth - caught[int(window)]
            caught[int(window)] = worth
        if k + 1 == len(table) or table[k + 1, 0] < score:
            highest = max(highest, raw)
    return float(100 * (highest + miss * count) / (count * (hit + miss)))


def _sigmoid(y: np.ndarray) -> np.ndarray:
    return 2 / (1 + np.exp(5 * y)) - 1


def write_nab(folder: Path, detector: str, one: Series, stamps: list[str], scores: np.ndarray) -> None:
    """A result file as NAB's scorer reads it."""
    category, name = one.name.split("/")
    path = folder / detector / category / f"{detector}_{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(("timestamp", "value", "anomaly_score", "label"))
        out.writerows(
            zip(
                stamps,
                one.values.tolist(),
                scores.round(6).tolist(),
                one.labels.astype(int).tolist(),
                strict=True,
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with metrics/")
    parser.add_argument("--out", type=Path, default=Path("results/anomaly"))
    parser.add_argument("--seed", type=int, default=0, help="of chance")
    parser.add_argument("--quick", action="store_true", help="four series of each kind")
    parser.add_argument("--nab-only", action="store_true", help="leave cloud_monitoring shut")
    options = parser.parse_args()
    started, began = datetime.now(UTC), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, lines, lasted = [], [], {}
    pool = ProcessPoolExecutor(os.cpu_count())

    nab, windows = nab_series(options.data / "metrics" / "nab")
    if options.quick:
        nab, windows = nab[:4], windows[:4]
    surprises = [
        emitted(read[:, 1], round(REST_S / one.interval_s))
        for one, read in zip(nab, pool.map(watched, nab), strict=True)
    ]
    thresholds = [static(one.values, one.first) for one in nab]
    for one, ours, theirs in zip(nab, surprises, thresholds, strict=True):
        stamps = pd.read_csv(options.data / "metrics" / "nab" / f"{one.name}.gz")["timestamp"].tolist()
        write_nab(options.out / "work" / "nab", "pilotage", one, stamps, np.minimum(ours / 20, 1.0))
        write_nab(options.out / "work" / "nab", "static", one, stamps, 1 - np.exp(-theirs / 10))
    same_rest = [
        emitted(score, round(REST_S / one.interval_s)) for one, score in zip(nab, thresholds, strict=True)
    ]
    scored = {"metric anomaly": surprises, "3 sigma": thresholds, "3 sigma, same rest": same_rest}
    for profile in PROFILES:
        for name, scores in scored.items():
            figure = nab_score(scores, nab, windows, profile)
            rows.append(
                {"data": "NAB", "of": profile, "series": len(nab), "score": name, "nab": f"{figure:.4g}"}
            )
            print(rows[-1], flush=True)
            if profile == "standard" and name == "metric anomaly":
                lines.append(
                    (
                        "NAB score, standard",
                        "> 60",
                        dict.fromkeys(("mean", "low", "high"), figure),
                        figure > 60,
                    )
                )
            elif profile == "standard":
                of = dict.fromkeys(("mean", "low", "high"), figure)
                lines.append((f"NAB score of {name}, standard", "", of, ""))
    lasted["nab"] = round(time.perf_counter() - began, 1)

    if not options.nab_only:
        series = cloud_monitoring(options.data / "metrics" / "cloud_monitoring")
        series = series[:: max(1, len(series) // 4)] if options.quick else series
        read = list(pool.map(watched, series))
        chance = np.random.default_rng(options.seed)
        precision: dict[str, list[float]] = {}
        for one, ours in zip(series, read, strict=True):
            scores = {
                "metric anomaly": ours[:, 0],
                "3 sigma": static(one.values, one.first),
                "step": np.abs(np.diff(one.values, prepend=one.values[0])),
                "chance": chance.random(len(one.values)),
            }
            for name, score in scores.items():
                precision.setdefault(name, []).append(
                    float(average_precision_score(one.labels[one.first :], score[one.first :]))
                )
        domains = np.array([one.name.split("/")[0] for one in series])
        for domain in ("", *sorted(set(domains.tolist()))):
            of = domains == domain if domain else np.ones(len(series), bool)
            for name, values in precision.items():
                figure = interval(np.array(values)[of])
                rows.append(
                    {
                        "data": "cloud monitoring", "of": domain or "all", "series": int(of.sum()), "score": name,
                        "average_precision": f"{figure['mean']:.4g}",
                        "low": f"{figure['low']:.4g}" if of.sum() > 1 else "",
                        "high": f"{figure['high']:.4g}" if of.sum() > 1 else "",
                    }
                )  # fmt: skip
                print(rows[-1], flush=True)
        ours_map = interval(np.array(precision["metric anomaly"]))
        lines.append(("mean average precision", ">= 0.58", ours_map, ours_map["mean"] >= 0.58))
        best = max(("3 sigma", "step"), key=lambda name: float(np.mean(precision[name])))
        over = ratio_interval(np.array(precision["metric anomaly"]), np.array(precision[best]))
        lines.append(
            (f"over the better of 3 sigma and step ({best}), same run", "> 1", over, over["mean"] > 1)
        )
        ours_alerts = np.array([alerted(one, got[:, 2] > 0) for one, got in zip(series, read, strict=True)])
        threshold, static_alerts = best_static(series)
        for name, of in (
            ("metric anomaly", ours_alerts),
            (f"{threshold:.3g} sigma, with hindsight", static_alerts),
        ):
            rows.append(
                {
                    "data": "cloud monitoring", "of": "alerts", "series": len(series), "score": name,
                    "events": int(of[:, 1].sum()), "events_found": int(of[:, 0].sum()),
                    "false_alerts_per_week": f"{of[:, 2].mean():.4g}",
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
        false = interval(ours_alerts[:, 2])
        lines.append(("false alerts per series and week", "<= 1", false, false["mean"] <= 1))
        found = ratio_interval(ours_alerts[:, 0], ours_alerts[:, 1])
        least = static_alerts[:, 0].sum() / static_alerts[:, 1].sum()
        asked = f"> {least:.4g} (static threshold with hindsight)"
        lines.append(("event recall", asked, found, bool(found["mean"] > least)))
        lasted["cloud_monitoring"] = round(time.perf_counter() - began - lasted["nab"], 1)
    pool.shutdown()
    acceptance = [
        {
            "line": line, "asked": asked, "measured": f"{of['mean']:.4g}", "low": f"{of['low']:.4g}",
            "high": f"{of['high']:.4g}", "met": met,
        }
        for line, asked, of, met in lines
    ]  # fmt: skip
    for line in acceptance:
        print(line)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_whole(options.out / "table.csv", as_csv([dict.fromkeys(columns, "") | row for row in rows]))
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    record = provenance("anomaly", sys.argv, started, lasted)
    record |= {"seed": options.seed}
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
