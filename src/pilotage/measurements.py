"""Result files, read back: typed and checked; and the one way in which their numbers are written for people.

`run.json` and `evaluation.json` must be there, every other file may be absent. What is unknown (NaN) is None.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import pandas as pd

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
        mean, low, high = (
            None if v is None or v >= 1 else 1 - 1 / (1 - v) for v in msgspec.structs.astuple(self)
        )
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
    def called(self) -> str:
        """As in a sentence."""
        return "default HPA" if self.name == "hpa" else self.name

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
    def title(self) -> str:
        return "all traffic" if self.name == "all" else self.name

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


class Contribution(msgspec.Struct, frozen=True):
    """How far one input moved a choice from the usual one."""

    input: str
    contribution: float
    value: float | None = None
    usual: float | None = None
    unit: str = ""


class Trust(msgspec.Struct, frozen=True):
    """One check of an explanation."""

    name: str
    asked: str
    passed: bool
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def interval(self) -> Interval:
        return Interval(self.measured, self.low, self.high)


class Explanation(msgspec.Struct, frozen=True):
    """explanation.json, as `pilotage explain --out` writes it."""

    policy: str
    env: str
    sentence: str
    outcome: float
    usual: float
    unit: str
    contributions: list[Contribution]
    trust: list[Trust]
    trusted: bool

    @property
    def words(self) -> str:
        """In Markdown, for a bundle's card."""
        largest = "\n".join(f"- {one.input}: {one.contribution:+.3g}" for one in self.contributions[:5])
        failed = ", ".join(one.name for one in self.trust if not one.passed)
        checks = f"It is not to be trusted: {failed} failed." if failed else "Every check of it passes."
        said = f"One decision on `{self.env}`: {self.sentence}"
        return "\n\n".join([said, f"What moved it most, in {self.unit}:", largest, checks])


class Attention(msgspec.Struct, frozen=True):
    """The share of all contributions that each input has in two versions of a model, and how much has moved."""

    inputs: dict[str, tuple[float, float]]
    moved: float


class Versions(msgspec.Struct, frozen=True):
    """comparison.json, what `pilotage compare --json` prints."""

    a: str
    b: str
    attention: Attention | None = None


class Results(NamedTuple):
    run: Provenance
    groups: list[Evaluation]  # what is pooled over all traffic comes first
    tables: dict[str, pd.DataFrame]
    baseline: Row
    best: Row | None  # the cheapest tuned or learned policy over all traffic
    explanation: Explanation | None
    versions: Versions | None


TABLES: Final = {
    "timeline": "policy hour arrival_rate replicas_ready replicas_starting latency_p95_s queue_length usd slo_s",
    "learning_curve": "steps validation_usd",
    "trials": "policy trial usd best_usd",
    "acceptance": "line asked measured low high met",
}
WORDS: Final = {"policy", "line", "asked", "met", "best", "decision"}  # columns that are not numbers
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # what no SVG may hold


def read(folder: Path) -> Results:
    """All that a results folder holds."""
    run = _json(folder / "run.json", Provenance)
    groups: list[Evaluation] = _json(folder / "evaluation.json", list[Evaluation])
    if not groups or not all(group.policies for group in groups):
        raise ReportError(
            f"{folder / 'evaluation.json'}: no policies; run `pilotage evaluate` or `study` first"
        )
    pooled = next((group for group in groups if group.name == "all"), groups[-1])
    groups = [pooled, *(group for group in groups if group is not pooled)]
    contenders = [row for row in pooled.policies if not row.foresees] or pooled.policies
    baseline = pooled.row("hpa") or contenders[0]
    others = [row for row in contenders if row is not baseline]
    best = min([row for row in others if row.improved] or others, key=lambda row: row.usd_mean, default=None)
    tables = {name: read_table(folder, name) for name in TABLES}
    explanation = _json(folder / "explanation.json", Explanation, "explain", absent=True)
    versions = _json(folder / "comparison.json", Versions, "compare", absent=True)
    kept = {k: v for k, v in tables.items() if len(v)}
    return Results(run, groups, kept, baseline, best, explanation, versions)


def read_explanation(path: Path) -> Explanation:
    """What `pilotage explain --out` wrote."""
    found: Explanation = _json(path, Explanation, "explain")
    return found


def _json(path: Path, kind: Any, command: str = "study", *, absent: bool = False) -> Any:
    """A file that a command writes; None if it is not there and may be absent."""
    if absent and not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        return msgspec.convert(_printable(found), kind)
    except OSError as error:
        raise ReportError(
            f"{path}: cannot be read: {error.strerror}; give what `pilotage {command}` writes"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not as `pilotage {command}` writes it: {error}") from None


def _printable(value: Any) -> Any:
    """JSON without the characters that no SVG may hold."""
    if isinstance(value, dict):
        return {_printable(k): _printable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_printable(v) for v in value]
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else value


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """`NAME.csv`, one of TABLES; empty if it is absent or has no rows."""
    path = folder / f"{name}.csv"
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        return pd.DataFrame()
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from None
    if missing := [column for column in TABLES[name].split() if column not in table]:
        raise ReportError(f"{path}: lacks the columns {', '.join(missing)}")
    for column in table.columns:
        if column in WORDS:
            table[column] = table[column].str.replace(_CONTROL, "\N{REPLACEMENT CHARACTER}", regex=True)
        else:
            table[column] = pd.to_numeric(table[column], errors="coerce")
    return table


# --- how numbers are written -------------------------------------------------------------------------------
MINUS, NONE, THIN, TIMES = (
    "\N{MINUS SIGN}",
    "\N{EN DASH}",
    "\N{NARROW NO-BREAK SPACE}",
    "\N{MULTIPLICATION SIGN}",
)


def fixed(value: float | None, decimals: int) -> str:
    """A number with thousands separated and a real minus sign."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:,.{decimals}f}"
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.lstrip("-")


def _decimals(value: float | None) -> int:
    """Of a dollar amount: whole dollars from 1000, cents from 1, and three digits below."""
    size = abs(value or 0.0)
    return 0 if size >= 1000 else 2 if size >= 1 or not size else min(6, 2 - math.floor(math.log10(size)))


def money(value: float | None, like: float | None = None) -> str:
    text = fixed(value, _decimals(value if like is None else like))
    return text if text == NONE else f"{MINUS}${text[1:]}" if text.startswith(MINUS) else f"${text}"


def percent(value: float | None, decimals: int = 1) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{fixed(100 * value, decimals)}{THIN}%"


def attained(value: float | None) -> str:
    """A share with enough digits to tell it from all: 99.92 %, 99.997 %. Only all of them are 100 %."""
    if value is None or value >= 1:
        return NONE if value is None else f"100{THIN}%"
    decimals = min(4, max(2, -math.floor(math.log10(100 * (1 - value)))))
    return f"{min(100 * value, 99.9999):.{decimals}f}{THIN}%"


def latency(value_ms: float | None) -> str:
    seconds = value_ms is not None and value_ms >= 10_000
    return NONE if value_ms is None else f"{value_ms / 1e3:.1f} s" if seconds else f"{value_ms:,.0f} ms"


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
