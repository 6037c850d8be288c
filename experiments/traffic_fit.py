"""How close do the traffic generators come to real traces?

Fits by the method of moments, and compares real with synthetic traffic: mean, peak minute over mean minute, CV of
gaps, index of dispersion of counts per second and per minute. Writes results/traffic_fit/{table.csv,fits.toml,
run.json,figures/traffic_fit.svg}.

diurnal: level of the weekend from the ratio of means, rhythm from the first Fourier coefficient of the day,
crowds from minutes above twice the median of their three hours (how many, how high, excess area over height),
noise from the variance and the lag-10-min covariance (correlation of 6 h at most) of what remains less its Poisson
part, cv from the dispersion of seconds within minutes (1 where only minutes are known). mmpp: two states from mean,
variance, third moment and lag-1 covariance of the intensity (moments of counts less their Poisson part). gamma:
mean and CV of gaps.

Outages (no request for `outage_s` or more) are left out of the real statistics: the generators do not make them.
Where a trace gives counts per minute, its arrivals lie uniformly within the minute, so what is below a minute
(CV and dispersion per second) is that assumption's and not the trace's.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pilotage.results import as_csv, provenance, write_whole
from pilotage.world.arrivals import (
    Arrivals,
    Counts,
    Diurnal,
    FlashCrowds,
    Gamma,
    Mmpp,
    MmppState,
    Source,
    Trace,
)

FUNCTIONS = "arrivals/azure_functions_2019_f0-f5_day00-06.csv.gz"
DAY_S = 86400


class Recording(NamedTuple):
    source: Counts | Trace
    resolution_s: float
    monday_s: float  # where the recording begins on a clock that starts on Monday 00:00
    outage_s: float
    models: tuple[str, ...]


RECORDINGS = {
    "twitter": Recording(
        Counts(path="arrivals/twitter_2021_08_persec_day00-13.txt.gz", interval_s=1),
        1,
        6 * DAY_S,
        30,
        ("diurnal",),
    ),
    "nasa": Recording(
        Counts(path="arrivals/nasa_1995_persec_day00-30.txt.gz", interval_s=1),
        1,
        5 * DAY_S,
        3600,
        ("diurnal",),
    ),
    **{
        name: Recording(Counts(path=FUNCTIONS, interval_s=60, column=name), 60, 0, math.inf, models)
        for name, models in {
            "f0": ("diurnal",),
            "f1": ("diurnal", "mmpp"),
            "f4": ("diurnal", "mmpp"),
            "f3": ("mmpp",),
            "f5": ("mmpp",),
        }.items()
    },
    "azure_chat": Recording(
        Trace(path="arrivals/azure_llm_2023_conv.csv.gz", duplicates="spread"),
        0.001,
        0,
        math.inf,
        ("gamma", "mmpp"),
    ),
}


class Sample(NamedTuple):
    """What is kept of a stream of arrivals: counts per second, and the moments of the gaps."""

    seconds: np.ndarray
    gap_s: tuple[int, float, float]


def streams(seed: int) -> Callable[[str], np.random.Generator]:
    return lambda name: np.random.default_rng(
        np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()),))
    )


def sample(arrivals: Arrivals, start_s: float, length_s: int, outage_s: float) -> Sample:
    seconds, n, total, squares, last = np.zeros(length_s, np.int64), 0, 0.0, 0.0, math.nan
    for lo in range(0, length_s, 6 * 3600):
        hi = min(lo + 6 * 3600, length_s)
        times = arrivals.until(start_s + hi) - start_s
        seconds[lo:hi] = np.bincount(np.clip(times.astype(np.int64), lo, hi - 1) - lo, minlength=hi - lo)
        gaps = np.diff(times, prepend=last)
        gaps = gaps[gaps < outage_s]
        n, total, squares = n + len(gaps), total + gaps.sum(), squares + gaps @ gaps
        last = times[-1] if len(times) else last
    return Sample(seconds, (n, total, squares))


def live_minutes(seconds: np.ndarray, outage_s: float) -> np.ndarray:
    """Which minutes hold no second of an outage."""
    edges = np.flatnonzero(np.diff(np.r_[0, seconds == 0, 0]))
    down = np.zeros(len(seconds) + 1, np.int64)
    for a, b in edges.reshape(-1, 2)[np.diff(edges.reshape(-1, 2))[:, 0] >= outage_s]:
        down[a] += 1
        down[b] -= 1
    return ~np.cumsum(down)[: len(seconds) // 60 * 60].reshape(-1, 60).any(axis=1)


def statistics(x: Sample, outage_s: float) -> dict[str, float]:
    table = x.seconds[: len(x.seconds) // 60 * 60].reshape(-1, 60)[live_minutes(x.seconds, outage_s)]
    minutes, seconds = table.sum(axis=1), table.ravel()
    n, total, squares = x.gap_s
    return {
        "mean_rps": seconds.mean(),
        "peak_to_mean_minute": minutes.max() / minutes.mean(),
        "cv_gaps": math.sqrt(max(squares / n - (total / n) ** 2, 0)) / (total / n),
        "idc_1s": seconds.var() / seconds.mean(),
        "idc_60s": minutes.var() / minutes.mean(),
    }


# --- fits ----------------------------------------------------------------------------------------------
def fit_diurnal(x: Sample, recording: Recording) -> Diurnal:
    table = x.seconds[: len(x.seconds) // 60 * 60].reshape(-1, 60)
    live = live_minutes(x.seconds, recording.outage_s)
    rate = np.where(live, table.mean(axis=1), np.nan)
    t_s = recording.monday_s + 60 * np.arange(len(rate)) + 30
    weekend = t_s / DAY_S % 7 >= 5
    ratio = float(np.nanmean(rate[weekend]) / np.nanmean(rate[~weekend]))
    flat = Diurnal(rate_rps=1, day_amplitude=0, weekend_factor=ratio)
    turn = np.exp(-2j * np.pi * t_s / DAY_S)
    levelled = rate / flat.rhythm_rps(t_s)
    wave = complex(np.nanmean(levelled * turn) / np.nanmean(levelled))
    rhythm = Diurnal(
        rate_rps=1,
        day_amplitude=min(1.0, 2 * abs(wave)),
        peak_hour=-np.angle(wave) * 24 / (2 * np.pi) % 24,
        weekend_factor=ratio,
    ).rhythm_rps(t_s)
    rest = np.where(rhythm > 0.1, rate / np.maximum(rhythm, 0.1), np.nan)
    rest /= np.nanmean(rest)

    ahead = rest[: len(rest) // 180 * 180].reshape(-1, 180)
    with np.errstate(all="ignore"):
        usual = np.array([np.nanmedian(a) if np.isfinite(a).any() else np.nan for a in ahead])
        usual = np.r_[np.repeat(usual, 180), np.full(len(rest) - ahead.size, np.nan)]
        excess = rest / np.maximum(usual, 0.25) - 1  # a burst out of near idleness has no finite ratio
    high = (excess > 1) & (rate * 60 >= 20)
    edges = np.flatnonzero(np.diff(np.r_[0, high, 0])).reshape(-1, 2)
    heights = np.array([excess[a:b].max() for a, b in edges])
    areas_s = np.array([60 * excess[a:b].sum() for a, b in edges])
    crowds = None
    if len(edges) >= 3:
        crowds = FlashCrowds(
            per_day=len(edges) / (live.sum() / 1440),
            magnitude=float(heights.mean()),
            magnitude_cv=float(heights.std() / heights.mean()),
            ramp_s=30,
            hold_s=0,
            decay_s=max(15.0, float(areas_s.sum() / heights.sum()) - 15),
        )
    calm = np.where(high, np.nan, rest)
    calm = calm / np.nanmean(calm) - 1
    poisson = np.nanmean(1 / (60 * np.maximum(rate, 1 / 60)))
    variance = max(1e-4, float(np.nanvar(calm) - poisson))
    covariance = float(np.nanmean(calm[10:] * calm[:-10]))
    kept = np.clip(math.log1p(max(covariance, 1e-9)) / math.log1p(variance), 0.05, 0.973)
    # longer than 6 h is not noise but what the rhythm misses
    cv = 1.0
    if recording.resolution_s <= 1:
        busy = table[live & (table.sum(axis=1) > 0)]
        cv = math.sqrt(np.clip(np.sum(busy.var(axis=1, ddof=1)) / np.sum(busy.mean(axis=1)), 0.1, 25))
    mean_excess = crowds.mean_excess if crowds else 0.0
    # a recording that holds more weekends than a week does is weighed by the rhythm it should have had
    return Diurnal(
        rate_rps=float(np.nanmean(rate) / np.mean(rhythm[live]) / (1 + mean_excess)),
        day_amplitude=min(1.0, 2 * abs(wave)),
        peak_hour=float(-np.angle(wave) * 24 / (2 * np.pi) % 24),
        weekend_factor=ratio,
        noise_cv=math.sqrt(variance),
        noise_correlation_s=float(-600 / math.log(kept)),
        crowds=crowds,
        cv=cv,
    )


def fit_mmpp(x: Sample, width_s: int) -> Mmpp:
    counts = x.seconds[: len(x.seconds) // width_s * width_s].reshape(-1, width_s).sum(axis=1).astype(float)
    mean, centred = counts.mean(), counts - counts.mean()
    variance = max(centred.var() - mean, 0.01 * mean)  # of the intensity, integrated over an interval
    third = np.mean(centred**3) - 3 * variance - mean
    lag = np.clip(np.mean(centred[1:] * centred[:-1]) / variance, 0.02, 0.98)
    lo, hi = 1e-3, 1e3  # interval over correlation time, by bisection
    for _ in range(80):
        u = math.sqrt(lo * hi)
        lo, hi = (u, hi) if (1 - math.exp(-u)) ** 2 / (2 * (u - 1 + math.exp(-u))) > lag else (lo, u)
    tau_s, rate = width_s / u, mean / width_s
    spread = math.sqrt(variance / (2 * tau_s**2 * (u - 1 + math.exp(-u))))
    skew = third / variance**1.5
    share = 0.5 * (1 - skew / math.sqrt(4 + skew**2))  # of time in the high state
    low = rate - spread * math.sqrt(share / (1 - share))
    if low < 0:  # on-off: the third moment cannot be met as well
        low, share = 0.0, rate**2 / (rate**2 + spread**2)
    high = (rate - (1 - share) * low) / share
    return Mmpp(
        states=(
            MmppState(rate_rps=low, mean_dwell_s=tau_s / share),
            MmppState(rate_rps=high, mean_dwell_s=tau_s / (1 - share)),
        )
    )


def fit(model: str, x: Sample, recording: Recording) -> Source:
    if model == "diurnal":
        return fit_diurnal(x, recording)
    if model == "mmpp":
        return fit_mmpp(x, 60 if recording.resolution_s == 60 else 10)
    n, total, squares = x.gap_s
    return Gamma(rate_rps=n / total, cv=math.sqrt(squares / n - (total / n) ** 2) / (total / n))


def as_toml(source: Any) -> str:
    """A source as the lines of a [services.traffic] block."""

    def value(v: Any) -> str:
        if isinstance(v, float):
            return f"{v:.4g}" if abs(v) < 1e4 else f"{v:.0f}"
        if isinstance(v, tuple):
            return "[" + ", ".join(value(item) for item in v) + "]"
        if hasattr(v, "__struct_fields__"):
            return "{ " + ", ".join(f"{k} = {value(getattr(v, k))}" for k in v.__struct_fields__) + " }"
        return json.dumps(v)

    fields = ((k, getattr(source, k)) for k in source.__struct_fields__)
    lines = [f"{k} = {value(v)}" for k, v in fields if v is not None]
    return "\n".join([f'kind = "{source.__struct_config__.tag}"', *lines]) + "\n"


# --- the figure ----------------------------------------------------------------------------------------
def figure(
    path: Path, series: dict[str, tuple[np.ndarray, np.ndarray, float]], rows: list[dict[str, Any]]
) -> None:
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "pilotage", "axes.spines.top": False})
    mpl.rcParams["axes.spines.right"] = False
    fig, axes = plt.subplots(len(series) + 1, 1, figsize=(8, 1.7 * len(series) + 3.4), layout="constrained",
                             height_ratios=[1] * len(series) + [1.9])  # fmt: skip
    for axis, (title, (real, made, unit_s)) in zip(axes, series.items(), strict=False):
        clock_s, clock = (DAY_S, "days") if len(real) * unit_s >= DAY_S else (60, "minutes")
        axis.set_xlabel(clock)
        for values, colour, label in ((real, "#0072B2", "real"), (made, "#D55E00", "synthetic")):
            axis.plot(
                np.arange(len(values)) * unit_s / clock_s,
                values,
                color=colour,
                lw=0.8,
                alpha=0.85,
                label=label,
            )
        axis.set_title(title, loc="left")
        axis.set_ylabel("requests/s")
        axis.margins(x=0)
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False, ncols=2, loc="upper right")
    names = list(dict.fromkeys(f"{r['trace']} {r['model']}" for r in rows))
    marks = {
        "mean_rps": ("o", "mean"),
        "peak_to_mean_minute": ("^", "peak / mean minute"),
        "cv_gaps": ("s", "CV of gaps"),
        "idc_1s": ("D", "dispersion at 1 s"),
        "idc_60s": ("v", "dispersion at 60 s"),
    }
    colours = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7")
    for k, (statistic, (mark, label)) in enumerate(marks.items()):
        points = [(r["ratio"], f"{r['trace']} {r['model']}") for r in rows if r["statistic"] == statistic]
        axes[-1].scatter(
            [p for p, _ in points],
            [names.index(n) + 0.12 * (k - 2) for _, n in points],
            marker=mark, color=colours[k], s=26, label=label, zorder=3,
        )  # fmt: skip
    axes[-1].axvline(1, color="#888888", lw=0.8)
    axes[-1].set(xscale="log", xlabel="synthetic / real", yticks=range(len(names)), yticklabels=names)
    ticks = (0.2, 0.5, 1, 2, 5)
    axes[-1].set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    axes[-1].minorticks_off()
    axes[-1].invert_yaxis()
    axes[-1].grid(axis="y", color="#dddddd", lw=0.5)
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    part = path.with_name(path.name + ".part")
    fig.savefig(part, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    part.replace(path)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the directory that holds arrivals/")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/traffic_fit"))
    parser.add_argument("--quick", action="store_true", help="one synthetic run instead of three")
    args = parser.parse_args()
    started, durations = datetime.now(UTC), {}
    seeds = [args.seed + k for k in range(1 if args.quick else 3)]
    rows: list[dict[str, Any]] = []
    series: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
    fits = ""
    for name, recording in RECORDINGS.items():
        began = time.perf_counter()
        length_s = int(recording.source.span_s(args.data)) // 60 * 60
        stream = recording.source.begin(streams(args.seed), 0.0, float(length_s), args.data)
        real = sample(stream, 0.0, length_s, recording.outage_s)
        measured = statistics(real, recording.outage_s)
        for model in recording.models:
            source = fit(model, real, recording)
            start_s = recording.monday_s
            made = [
                sample(
                    source.begin(streams(s), start_s, start_s + length_s, None), start_s, length_s, math.inf
                )
                for s in seeds
            ]
            found = [statistics(x, math.inf) for x in made]
            fits += f"# {name} ({length_s / DAY_S:.2g} days)\n[{name}.{model}]\n{as_toml(source)}\n"
            for statistic, value in measured.items():
                synthetic = float(np.mean([f[statistic] for f in found]))
                rows.append(
                    {
                        "trace": name,
                        "resolution_s": recording.resolution_s,
                        "model": model,
                        "statistic": statistic,
                        "real": float(f"{value:.5g}"),
                        "synthetic": float(f"{synthetic:.5g}"),
                        "ratio": float(f"{synthetic / value:.4g}"),
                    }
                )
            if model == "diurnal" or name == "azure_chat":
                unit_s = 60 if name == "azure_chat" else 600
                shown = min(length_s, 7 * DAY_S) // unit_s * unit_s
                pair = [x.seconds[:shown].reshape(-1, unit_s).mean(axis=1) for x in (real, made[0])]
                series[f"{name}: {model}"] = (pair[0], pair[1], unit_s)
        durations[name] = round(time.perf_counter() - began, 2)
    (args.out / "figures").mkdir(parents=True, exist_ok=True)
    figure(args.out / "figures" / "traffic_fit.svg", series, rows)
    write_whole(args.out / "table.csv", as_csv(rows))
    write_whole(args.out / "fits.toml", fits)
    origin = provenance("traffic_fit", [], started, durations)
    origin |= {"command": shlex.join(["python", *sys.argv]), "seeds": seeds}
    write_whole(args.out / "run.json", json.dumps(origin, indent=1) + "\n")
    print(fits)
    print(f"{'trace':11}{'model':9}{'statistic':22}{'real':>10}{'synthetic':>11}{'ratio':>7}")
    for r in rows:
        print(
            f"{r['trace']:11}{r['model']:9}{r['statistic']:22}{r['real']:10.4g}{r['synthetic']:11.4g}{r['ratio']:7.2f}"
        )


if __name__ == "__main__":
    main()
