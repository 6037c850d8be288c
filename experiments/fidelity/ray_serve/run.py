"""Does the simulator agree with a real Ray Serve?

    python experiments/fidelity/ray_serve/run.py --data FOLDER_OF_TRACES
    python experiments/fidelity/ray_serve/run.py --data FOLDER_WITH_CASES_OF_YOUR_OWN     # from measure.py

Replays the times at which each case's requests were sent, and compares latencies. Whether a case is below
saturation or in overload is told by its configuration and its rate. Below: percentiles of the latency. In
overload: whether the router collapses, and to how many requests per second. Overheads come from requests that
met no other: their level from the case's own measurement before the run, one request at a time; their shape
from the *other* cases. Writes table.csv, acceptance.csv, run.json and figures/.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from recording import Overheads, Recording, find, read
from simulate import simulate

from pilotage.results import as_csv, provenance, write_whole

ASKED = {50: 5.0, 90: 8.0, 95: 8.0, 99: 12.0}  # percent of the measured percentile, below saturation
RATE_ASKED = 20.0  # percent of the measured rate, in overload
RATE_WINDOW_S = 2.5
FULL_SPEED = 0.8  # a router that serves less than this share of what its replicas could has collapsed
GAP_MS = 0.6  # between two batches that follow each other on a replica; 0.52 to 0.65 in every case
ENOUGH = 100  # requests that met an empty system, for the shape of their delay
QUANTILES = 201

# The shape of the delay (delay over level), where the other cases have too few requests that met an empty
# system: shares and quantiles of the 1277 such requests of the four reference cases.
SHARES = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1)
SHAPE = (0.48, 0.68, 0.81, 0.87, 0.94, 1.01, 1.06, 1.13, 1.2, 1.31, 1.45, 1.75, 2.03, 2.66, 3.6, 5.88, 11.78)


@dataclass(frozen=True)
class Verdict:
    recording: Recording
    overheads: Overheads
    regime: str  # below saturation, or overload
    rows: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    simulated_s: np.ndarray  # latencies, per seed
    spans: list[tuple[float, float]]


def overheads_of(recording: Recording, others: Sequence[Recording]) -> Overheads:
    ratios = np.concatenate([np.zeros(0), *(other.idle_ratios() for other in others)])
    share = np.linspace(0, 1, QUANTILES)
    shape = np.quantile(ratios, share) if len(ratios) >= ENOUGH else np.interp(share, SHARES, SHAPE)
    low = recording.low_load_ms
    return Overheads(
        window_s=low["handler_to_batch_start"] / 1e3,
        batch_s=(low["batch_exec"] - recording.nominal_ms + GAP_MS) / 1e3,
        request_s=shape * recording.level_ms() / 1e3,
    )


def rates(done_s: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Requests served per second, window by window."""
    edges = np.arange(span[0], span[1] + 1e-9, RATE_WINDOW_S)
    return np.histogram(done_s[np.isfinite(done_s)], edges)[0] / RATE_WINDOW_S


def row(recording: Recording, regime: str, what: str, was: float, values: np.ndarray) -> dict[str, Any]:
    """One row of table.csv: the measured value, and the simulated one with the interval of 95 % of the seeds."""
    return {
        "case": recording.name,
        "regime": regime,
        "quantity": what,
        "measured": round(float(was), 2),
        "simulated": round(values.mean(), 2),
        "seed_low": round(np.quantile(values, 0.025), 2),
        "seed_high": round(np.quantile(values, 0.975), 2),
        "error_percent": round(100 * (values.mean() / was - 1), 2) if was else "",
    }


def line(recording: Recording, what: str, asked: str, values: np.ndarray, met: bool) -> dict[str, Any]:
    """One line of acceptance.csv: the mean over the seeds, and the interval that holds 95 % of them."""
    low, high = np.quantile(values, [0.025, 0.975])
    return {
        "line": f"{recording.name}: {what}",
        "asked": asked,
        "measured": f"{values.mean():.4g}",
        "low": f"{low:.4g}",
        "high": f"{high:.4g}",
        "met": met,
    }


def judge(recording: Recording, others: Sequence[Recording], seeds: Sequence[int]) -> Verdict:
    overheads = overheads_of(recording, others)
    spans = recording.overloads(overheads)
    simulated_s = simulate(recording.deployment, recording.send_s, overheads, seeds)
    rows, lines = [], []
    if not spans:
        kept = recording.on_time
        measured = np.percentile(recording.latency_s[kept], list(ASKED)) * 1e3
        simulated = np.array([np.percentile(latency[kept], list(ASKED)) * 1e3 for latency in simulated_s])
        for k, (percentile, asked) in enumerate(ASKED.items()):
            rows.append(row(recording, "below saturation", f"p{percentile}_ms", measured[k], simulated[:, k]))
            error = 100 * (simulated[:, k] / measured[k] - 1)
            what = f"p{percentile} within {asked:g} % of the measured"
            lines.append(line(recording, what, f"±{asked:g} %", error, abs(error.mean()) <= asked))
    for span in spans:
        done_s = recording.table["done_s"].to_numpy()
        real = rates(done_s, span)
        made = [rates(recording.send_s + latency, span) for latency in simulated_s]
        where = f"{span[0]:.0f}-{span[1]:.0f} s"
        able = FULL_SPEED * float(recording.load(overheads)["capacity"][int(span[0]) : int(span[1])].mean())
        slow = np.array([np.mean(x < able) for x in made])
        medians = np.array([np.median(x) for x in made])
        for quantity, was, values in (
            ("median_served_rps", float(np.median(real)), medians),
            ("mean_served_rps", real.mean(), np.array([x.mean() for x in made])),
            ("time_collapsed_percent", 100 * float(np.mean(real < able)), 100 * slow),
        ):
            rows.append(row(recording, "overload", f"{quantity} {where}", was, values))
        collapsed = bool(np.mean(real < able) > 0.5)
        what = f"{'collapsed' if collapsed else 'at full speed'} {where}: share of time collapsed"
        asked_share = "> 0.5" if collapsed else "<= 0.5"
        lines.append(line(recording, what, asked_share, slow, (slow.mean() > 0.5) == collapsed))
        error = 100 * (medians / np.median(real) - 1)
        what = f"served rate {where} within {RATE_ASKED:g} % of the measured"
        lines.append(line(recording, what, f"±{RATE_ASKED:g} %", error, abs(error.mean()) <= RATE_ASKED))
    regime = "overload" if spans else "below saturation"
    return Verdict(recording, overheads, regime, rows, lines, simulated_s, spans)


def draw(verdict: Verdict, path: Path) -> None:
    """Measured against simulated: latencies, and in overload the served rate over time."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from pilotage.figures import INKS, STYLE

    recording = verdict.recording
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 2 if verdict.spans else 1, figsize=(9.2 if verdict.spans else 4.6, 3.0), layout="constrained"
        )
        left = axes[0] if verdict.spans else axes
        kept = recording.on_time
        for latency, ink, name in (
            (recording.latency_s[kept], "ink", "Ray Serve"),
            (np.concatenate([x[kept] for x in verdict.simulated_s]), "blue", "simulated"),
        ):
            latency = latency[np.isfinite(latency)]
            share = np.linspace(0, 1, min(len(latency), 400))
            left.plot(np.quantile(latency, share) * 1e3, share, color=INKS[ink], label=name)
        left.set(xscale="log", xlabel="latency, ms", ylabel="share of requests", title=recording.name)
        left.xaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        left.xaxis.set_minor_formatter(NullFormatter())
        left.legend(loc="lower right")
        if verdict.spans:
            end = float(recording.send_s[-1])
            every = [rates(recording.send_s + x, (0, end)) for x in verdict.simulated_s]
            real = rates(recording.table["done_s"].to_numpy(), (0, end))
            middle = (np.arange(len(real)) + 0.5) * RATE_WINDOW_S
            low, high = np.min(every, axis=0), np.max(every, axis=0)
            axes[1].fill_between(middle, low, high, color=INKS["blue"], alpha=0.15, lw=0)
            axes[1].plot(middle, every[0], color=INKS["blue"], label="simulated, one seed")
            axes[1].plot(middle, real, color=INKS["ink"], label="Ray Serve")
            for start, stop in verdict.spans:
                axes[1].axvspan(start, stop, color=INKS["amber"], alpha=0.10, lw=0)
            axes[1].set(xlabel="s", ylabel="requests/s", ylim=(0, None), title="served; overload is shaded")
            axes[1].legend(loc="upper left")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, required=True, help="holds fidelity/ray_serve, or cases itself")
    parser.add_argument("--seed", type=int, default=1, help="the first of the routing seeds")
    parser.add_argument("--out", type=Path, default=Path("results/fidelity/ray_serve"))
    parser.add_argument("--quick", action="store_true", help="4 routing seeds instead of 16")
    options = parser.parse_args()
    started, began = datetime.now(UTC), time.perf_counter()
    seeds = range(options.seed, options.seed + (4 if options.quick else 16))
    recordings = [read(path) for path in find(options.data)]
    (options.out / "figures").mkdir(parents=True, exist_ok=True)
    rows, acceptance = [], []
    for recording in recordings:
        verdict = judge(recording, [other for other in recordings if other is not recording], seeds)
        rows += verdict.rows
        acceptance += verdict.lines
        draw(verdict, options.out / "figures" / f"{recording.name}.svg")
        print(f"{recording.name}: {verdict.regime}, {len(recording.table)} requests")
        for r in verdict.rows:
            compared = f"measured {r['measured']:9.2f}  simulated {r['simulated']:9.2f}"
            print(f"  {r['quantity']:32} {compared} [{r['seed_low']:.1f}, {r['seed_high']:.1f}]")
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    facts = provenance("fidelity/ray_serve", [], started, {"all": round(time.perf_counter() - began, 1)})
    facts |= {
        "command": "python experiments/fidelity/ray_serve/run.py "
        + shlex.join("DATA" if word == str(options.data) else word for word in sys.argv[1:]),
        "seeds": list(seeds),
        "cases": [recording.name for recording in recordings],
    }
    write_whole(options.out / "run.json", json.dumps(facts, indent=2) + "\n")
    for entry in acceptance:
        met = "met    " if entry["met"] else "NOT MET"
        print(f"{met} {entry['line']}: {entry['measured']} (asked {entry['asked']})")


if __name__ == "__main__":
    main()
