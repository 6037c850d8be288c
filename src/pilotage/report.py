"""A results folder -> figures and one self-contained HTML page. Draws and words; computes no new result.

`run.json` and `evaluation.json` must be there; every other file adds a section. A figure is drawn in two widths,
for the desk (also kept in `figures/`) and for the phone. Figures use the colours of `INKS` only: in the page each
becomes a CSS variable, so that they follow light and dark. Nothing in the page refers to the network.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

import jinja2
import matplotlib
import msgspec
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pilotage.metrics import ITEMS
from pilotage.world.spec import SpecError


class ReportError(SpecError):
    """A results folder that cannot be reported; the message names the file and what is wrong with it."""


# --- what is read ------------------------------------------------------------------------------------------
class Interval(msgspec.Struct, frozen=True):
    """A mean with its 95 % interval; None is unknown."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        """What the interval of a saving lets one say."""
        if self.low is None or self.high is None:
            return "no interval"
        return "cheaper" if self.low > 0 else "dearer" if self.high < 0 else "no clear difference"

    def reversed(self) -> Interval:
        """The saving of the baseline over the policy (percentile intervals keep under monotone maps)."""
        mean, low, high = (None if v is None or v >= 1 else 1 - 1 / (1 - v) for v in msgspec.structs.astuple(self))
        return Interval(mean, high, low)


class Row(msgspec.Struct, frozen=True):
    """One policy's measurements."""

    policy: str
    total_usd: Interval
    usd: dict[str, float]
    slo_attainment: float
    latency_ms: dict[str, float | None]
    requests: int
    dropped: int
    replica_hours: float
    node_hours: float
    accuracy: float | None = None
    over_bound: Interval | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.policy

    @property
    def foresees(self) -> bool:
        """It knows the future: a yardstick, not a contender."""
        return "clairvoyant" in self.name.lower()

    @property
    def improved(self) -> bool:
        """It was tuned or learned."""
        return re.search(r"\b(tuned|learned|ppo|sac|td3|dqn|a2c)\b", self.policy.lower()) is not None

    @property
    def usd_mean(self) -> float:
        return math.inf if self.total_usd.mean is None else self.total_usd.mean


class Pair(msgspec.Struct, frozen=True):
    policy: str
    baseline: str
    saving: Interval


class Bound(msgspec.Struct, frozen=True):
    lower: float | None
    schedule: float | None = None


class Evaluation(msgspec.Struct, frozen=True):
    """Policies compared on the same windows of one kind of traffic."""

    policies: list[Row]
    env: str = ""
    group: str = ""
    seeds: list[int] = []
    hours: float = 0.0
    versus: list[Pair] = []
    bound_usd: Bound | None = None

    @property
    def name(self) -> str:
        return self.group or self.env or "all"

    @property
    def ranked(self) -> list[Row]:
        return sorted(self.policies, key=lambda row: (row.foresees, row.usd_mean))

    def row(self, policy: str) -> Row | None:
        return next((row for row in self.policies if row.policy == policy), None)

    def saving(self, policy: str, baseline: str) -> Interval:
        for pair in self.versus:
            if (pair.policy, pair.baseline) == (policy, baseline):
                return pair.saving
            if (pair.policy, pair.baseline) == (baseline, policy):
                return pair.saving.reversed()
        return Interval()


class Provenance(msgspec.Struct, frozen=True):
    """run.json: where the result comes from."""

    experiment: str = ""
    title: str = ""
    question: str = ""
    command: str = ""
    commit: str = ""
    dirty: bool = False
    scenario: str = ""
    scenario_sha256: str = ""
    experiment_sha256: str = ""
    seeds: list[int] = []
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}
    durations_s: dict[str, float] = {}
    started_at: str = ""
    policies: dict[str, str] = {}


class Results(NamedTuple):
    run: Provenance
    groups: list[Evaluation]  # what is pooled over all traffic comes first
    tables: dict[str, pd.DataFrame]
    baseline: Row
    best: Row | None  # the cheapest tuned or learned policy over all traffic


TABLES: Final = {
    "timeline": "policy hour arrival_rate replicas_ready replicas_starting latency_p95_s queue_length usd slo_s",
    "learning_curve": "steps validation_usd",
    "trials": "policy trial usd best_usd",
    "acceptance": "line asked measured low high met",
}
WORDS: Final = {"policy", "line", "asked", "met", "best"}  # columns that are not numbers
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]|[\ud800-\udfff]")  # what no SVG may hold


def read(folder: Path) -> Results:
    """All that a results folder holds."""
    run = _json(folder / "run.json", Provenance)
    groups: list[Evaluation] = _json(folder / "evaluation.json", list[Evaluation])
    if not groups or not all(group.policies for group in groups):
        raise ReportError(f"{folder / 'evaluation.json'}: no policies; run `pilotage evaluate` or `study` first")
    pooled = next((group for group in groups if group.name == "all"), groups[-1])
    groups = [pooled, *(group for group in groups if group is not pooled)]
    contenders = [row for row in pooled.policies if not row.foresees] or pooled.policies
    baseline = pooled.row("hpa") or contenders[0]
    others = [row for row in contenders if row is not baseline]
    best = min([row for row in others if row.improved] or others, key=lambda row: row.usd_mean, default=None)
    tables = {name: _table(folder / f"{name}.csv", columns.split()) for name, columns in TABLES.items()}
    return Results(run, groups, {k: v for k, v in tables.items() if len(v)}, baseline, best)


def _json(path: Path, kind: Any) -> Any:
    try:
        text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", path.read_text(encoding="utf-8"))
        return msgspec.convert(json.loads(text, parse_constant=lambda _: None), kind)
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}; give a folder of `pilotage study`") from None
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not as `pilotage study` writes it: {error}") from None


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """An optional CSV file; empty if it is absent or has no rows."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        return pd.DataFrame()
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from None
    if missing := [name for name in columns if name not in table]:
        raise ReportError(f"{path}: lacks the columns {', '.join(missing)}")
    for name in table.columns:
        if name in WORDS:
            table[name] = table[name].str.replace(_CONTROL, "\N{REPLACEMENT CHARACTER}", regex=True)
        else:
            table[name] = pd.to_numeric(table[name], errors="coerce")
    return table


# --- how numbers are written -------------------------------------------------------------------------------
MINUS, NONE, THIN, TIMES = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{NARROW NO-BREAK SPACE}", "\N{MULTIPLICATION SIGN}"


def _fixed(value: float | None, decimals: int) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:,.{decimals}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.lstrip("-")


def _decimals(value: float | None) -> int:
    """Of a dollar amount: whole dollars from 1000, cents from 1, and three digits below."""
    size = abs(value or 0.0)
    return 0 if size >= 1000 else 2 if size >= 1 or not size else min(6, 2 - math.floor(math.log10(size)))


def money(value: float | None, like: float | None = None) -> str:
    text = _fixed(value, _decimals(value if like is None else like))
    return text if text == NONE else f"{MINUS}${text[1:]}" if text.startswith(MINUS) else f"${text}"


def percent(value: float | None, decimals: int = 1) -> str:
    return NONE if value is None else f"{_fixed(100 * value, decimals)}{THIN}%"


def attained(value: float | None) -> str:
    """A share, rounded down, with enough digits to tell it from all: 99.92 %, 99.9968 %."""
    if value is None or value >= 1:
        return NONE if value is None else f"100{THIN}%"
    decimals = min(4, max(2, 1 - math.floor(math.log10(100 * (1 - value)))))
    scaled = math.floor(value * 10 ** (decimals + 2) + 1e-6) / 10**decimals
    return f"{scaled:.{decimals}f}{THIN}%"


def latency(value_ms: float | None) -> str:
    seconds = value_ms is not None and value_ms >= 10_000
    return NONE if value_ms is None else f"{value_ms / 1e3:.1f} s" if seconds else f"{value_ms:,.0f} ms"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def ranges(seeds: Sequence[int]) -> str:
    """1, 2, 3, 7 -> 1-3, 7."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed - runs[-1][-1] == 1:
            runs[-1] = [runs[-1][0], seed]
        else:
            runs.append([seed])
    return ", ".join(NONE.join(str(end) for end in run) for run in runs)


def brackets(interval: Interval | None, write: Callable[[float], str]) -> str:
    """[low, high], empty if unknown."""
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return f"[{write(interval.low)}, {write(interval.high)}]"


def per_window(hours: float) -> str:
    return f"{hours:g}-hour window" if hours else "window"


def asked(text: str) -> tuple[str, Callable[[float], str]]:
    """The wording of an acceptance line; what a study asks of a saving ("low >= 0.1") is in per cent."""
    if found := re.fullmatch(r"(low|mean|high) >= (-?[\d.e-]+)", text):
        end = {"low": "lower end of the saving's interval", "mean": "saving", "high": "upper end"}[found[1]]
        return f"{end} at least {percent(float(found[2]), 0)}", percent
    return text, lambda value: f"{value:.4g}"


def worse(group: Evaluation, policy: str) -> list[tuple[Row, str, list[str]]]:
    """(rival, verdict on cost, what is worse) for each contender that `policy` does not beat in everything."""
    mine, found = group.row(policy), []
    for rival in group.ranked if mine else ():
        if rival.foresees or rival.policy == policy:
            continue
        assert mine is not None
        saving, notes = group.saving(policy, rival.policy), []
        more = None if saving.mean is None else Interval(-saving.mean, -(saving.high or 0), -(saving.low or 0))
        if more and more.mean is not None and more.mean > 0:
            span = brackets(more, lambda v: _fixed(100 * v, 1)) if saving.low is not None else ""
            notes.append(f"cost {percent(more.mean)} higher {span}".rstrip())
        sides: list[tuple[str, float, float, Callable[[float], str]]] = [
            ("requests in time", -mine.slo_attainment, -rival.slo_attainment, lambda v: attained(-v))
        ]
        for k in ("p95", "p99"):
            sides.append((k, mine.latency_ms.get(k) or 0.0, rival.latency_ms.get(k) or 0.0, latency))
        sides.append(("dropped requests", mine.dropped, rival.dropped, lambda v: f"{v:,.0f}"))
        sides.append(("node-hours", mine.node_hours, rival.node_hours, lambda v: f"{v:,.1f}"))
        notes += [
            f"{what} {write(a)} against {write(b)}" for what, a, b, write in sides if a > b and write(a) != write(b)
        ]
        if notes:
            found.append((rival, saving.verdict, notes))
    return found
