"""A results folder -> figures and one self-contained HTML page. Draws and words; computes no new result.

`run.json` and `evaluation.json` must be there (see `measurements`); every other file adds a section. The page is
`report.html.j2` with everything inlined: it refers to no network, is complete without its script, and everything
that a user may have named is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

import jinja2
import pandas as pd
from markupsafe import Markup

from pilotage import figures, measurements
from pilotage.figures import Drawing, inline, looks
from pilotage.measurements import (
    MINUS,
    NONE,
    TIMES,
    Evaluation,
    Interval,
    ReportError,
    Results,
    Row,
    attained,
    brackets,
    fixed,
    latency,
    money,
    percent,
    read,
    read_table,
)

__all__ = ["ReportError", "draw_figures", "draw_timeline", "write_report"]


def draw_figures(folder: Path) -> list[Path]:
    """Draws `figures/*.svg` of a results folder; returns their paths."""
    return _write_figures(folder, _draw(read(folder)).all())


def draw_timeline(folder: Path) -> Path:
    """Draws `figures/timeline.svg` from `timeline.csv` alone."""
    table = read_table(folder, "timeline")
    if table.empty:
        raise ReportError(f"{folder / 'timeline.csv'}: absent or empty; it holds one row per policy and tick")
    drawing, _ = figures.timeline(table, {}, list(dict.fromkeys(table["policy"])))
    return _write_figures(folder, [drawing])[0]


def write_report(folder: Path) -> Path:
    """Draws the figures and writes `report.html`; returns its path."""
    results = read(folder)
    pictures = _draw(results)
    _write_figures(folder, pictures.all())
    page = folder / "report.html"
    _write(page, _render(results, pictures, fidelity(folder)))
    return page


# --- figures -----------------------------------------------------------------------------------------------
class Pictures(NamedTuple):
    groups: list[list[Drawing]]  # for each group of traffic: cost, and cost against attainment
    timeline: Drawing | None
    ticks: dict[str, Any] | None  # the numbers of the timeline
    learning: list[Drawing]

    def all(self) -> Iterator[Drawing]:
        for group in self.groups:
            yield from group
        yield from [self.timeline] if self.timeline else []
        yield from self.learning


def _draw(results: Results) -> Pictures:
    tables, look = results.tables, looks(results)
    groups: list[list[Drawing]] = []
    used = {""}
    for k, group in enumerate(results.groups):
        slug = re.sub(r"[^a-z0-9]+", "-", group.name.lower()).strip("-")[:40] if k else ""
        tail = "" if not k else f"-{slug}" if slug not in used else f"-{slug}-{k}"
        used.add(slug)
        groups.append([figures.cost(group, f"cost{tail}"), figures.pareto(group, f"pareto{tail}", look)])
    timeline, ticks = None, None
    if "timeline" in tables:
        first = [row.policy for row in (results.baseline, results.best) if row]
        timeline, ticks = figures.timeline(tables["timeline"], look, first)
    learning = [figures.learning(tables["learning_curve"])] if "learning_curve" in tables else []
    learning += [figures.tuning(tables["trials"], look)] if "trials" in tables else []
    return Pictures(groups, timeline, ticks, learning)


def _write_figures(folder: Path, drawings: Iterator[Drawing] | list[Drawing]) -> list[Path]:
    paths = []
    for drawing in drawings:
        paths.append(folder / "figures" / f"{drawing.name}.svg")
        paths[-1].parent.mkdir(exist_ok=True)
        _write(paths[-1], drawing.desk)
    return paths


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        Path(part).chmod(0o644)
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


# --- words -------------------------------------------------------------------------------------------------
def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
    )


def per_window(hours: float) -> str:
    return f"{hours:g}-hour window" if hours else "window"


class Line(NamedTuple):
    """An acceptance line in words."""

    line: str
    asked: str
    measured: str
    span: str
    met: bool


ENDS: Final = {"low": "lower end of the interval", "mean": "mean", "high": "upper end of the interval"}


def acceptance(table: pd.DataFrame) -> list[Line]:
    """What was asked beside what came out; what a study asks of a saving ("low >= 0.1") is in per cent."""
    lines = []
    for row in table.to_dict("records"):
        mean, low, high = (None if pd.isna(row[k]) else float(row[k]) for k in ("measured", "low", "high"))
        asked, measured, span = row["asked"], _plain(mean), brackets(Interval(mean, low, high), _plain)
        if found := re.fullmatch(r"(low|mean|high) >= (-?\d+(?:\.\d+)?)", asked):
            asked = f"saving at least {percent(float(found[2]), 0)} ({ENDS[found[1]]})"
            measured, span = percent(mean), _span(Interval(mean, low, high))
        lines.append(Line(row["line"], asked, measured, span, row["met"].lower() in ("true", "1", "yes")))
    return lines


def fidelity(folder: Path) -> list[tuple[str, list[Line]]]:
    """What measurements of other systems say of the simulator: the results in `fidelity`, beside a results folder."""
    found = [
        (path.parent.name, acceptance(read_table(path.parent, path.stem)))
        for path in sorted(folder.resolve().parent.glob("fidelity/*/acceptance.csv"))
    ]
    return [(name, lines) for name, lines in found if lines]


def _plain(value: float | None) -> str:
    """A number whose unit is not known, to four digits or whole."""
    if value is None:
        return NONE
    return fixed(value, 0) if abs(value) >= 1000 else f"{value:.4g}".replace("-", MINUS)


def _span(share: Interval) -> str:
    """The interval of a share, in per cent."""
    return brackets(share, lambda value: fixed(100 * value, 1))


class Verdict(NamedTuple):
    """One policy against another in one group, in words."""

    group: Evaluation
    mine: Row
    rival: Row
    saving: Interval

    @property
    def kind(self) -> str:
        return self.saving.verdict

    @property
    def usd(self) -> Interval:
        """The relative saving in dollars of the rival's mean."""
        bill = self.rival.total_usd.mean
        scaled = (
            None if v is None or bill is None else v * bill for v in (self.saving.low, self.saving.high)
        )
        mean = None if bill is None or self.mine.total_usd.mean is None else bill - self.mine.total_usd.mean
        return Interval(mean, *scaled)


class Shortfall(NamedTuple):
    """Something in which the best policy is behind other contenders of a group."""

    what: str
    mine: str
    ahead: list[str]


METRICS: Final[dict[str, tuple[Callable[[Row], float | None], Callable[[float], str], int]]] = {
    "requests in time": (lambda row: row.slo_attainment, attained, -1),
    "p95 latency": (lambda row: row.latency_ms.get("p95"), latency, 1),
    "p99 latency": (lambda row: row.latency_ms.get("p99"), latency, 1),
    "dropped requests": (lambda row: row.dropped, lambda value: f"{value:,.0f}", 1),
    "node-hours": (lambda row: row.node_hours, lambda value: f"{value:,.1f}", 1),
}  # how to read it, how to write it, and 1 where less is better


def shortfalls(pairs: list[Verdict]) -> list[Shortfall]:
    """Everything measured in which a policy is behind, as far as the written digits show it."""
    found = []
    ahead = []
    for pair in pairs:
        saving = pair.saving
        if saving.mean is not None and saving.mean < 0:
            low, high = (None if v is None else -v for v in (saving.high, saving.low))
            unclear = "" if saving.verdict == "dearer" else f", {saving.verdict}"
            span = _span(Interval(-saving.mean, low, high))
            ahead.append(f"{pair.rival.called} by {percent(-saving.mean)} {span}".rstrip() + unclear)
    if ahead:
        found.append(Shortfall("total cost", money(pairs[0].mine.total_usd.mean), ahead))
    for what, (value, put, sign) in METRICS.items():
        mine, ahead = value(pairs[0].mine) if pairs else None, []
        for pair in pairs:
            theirs = value(pair.rival)
            if (
                mine is not None
                and theirs is not None
                and sign * (mine - theirs) > 0
                and put(mine) != put(theirs)
            ):
                ahead.append(f"{pair.rival.called} {put(theirs)}")
        if mine is not None and ahead:
            found.append(Shortfall(what, put(mine), ahead))
    return found


def against(results: Results, group: Evaluation, rival: str) -> Verdict | None:
    """The best policy against `rival` in `group`; None if the group lacks one of them."""
    mine = group.row(results.best.policy) if results.best else None
    other = group.row(rival)
    return Verdict(group, mine, other, group.saving(mine.policy, rival)) if mine and other else None


# --- the page ----------------------------------------------------------------------------------------------
def _strip_scale(results: Results) -> Callable[[float], float]:
    """From a saving to its place, in per cent, on a strip as wide as all the report's savings and zero."""
    ends = [
        end
        for group in results.groups
        for row in group.policies
        if not row.foresees
        for interval in [group.saving(row.policy, results.baseline.policy)]
        for end in (interval.low, interval.high, interval.mean)
        if end is not None
    ]
    low, high = max(-1.0, min([0.0, *ends])), max([0.02, *ends])
    pad = 0.08 * (high - low)
    return lambda v: round(100 * (max(v, low) - low + pad) / (high - low + 2 * pad), 2)


def _script_hash(script: str) -> str:
    """For the content security policy: this script and no other."""
    return base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def _render(results: Results, pictures: Pictures, measured: list[tuple[str, list[Line]]]) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "money": money,
        "percent": percent,
        "attained": attained,
        "latency": latency,
        "fixed": fixed,
        "duration": duration,
        "per_window": per_window,
        "ranges": measurements.ranges,
        "script_hash": _script_hash,
    }
    template = environment.from_string(
        files("pilotage").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    contenders = [row for row in results.groups[0].ranked if not row.foresees]
    rivals = [row for row in contenders if not results.best or row.policy != results.best.policy]
    rivals.sort(key=lambda row: row.policy != results.baseline.policy)
    pairs = [[v for row in rivals if (v := against(results, group, row.policy))] for group in results.groups]
    return template.render(
        run=results.run,
        groups=results.groups,
        pooled=results.groups[0],
        baseline=results.baseline,
        best=results.best,
        choices=sum(row.improved for row in contenders),
        headline=against(results, results.groups[0], results.baseline.policy),
        by_group=[v for group in results.groups if (v := against(results, group, results.baseline.policy))],
        worse=[
            (group, found) for group, p in zip(results.groups, pairs, strict=True) if (found := shortfalls(p))
        ],
        compared=any(pairs),
        acceptance=acceptance(results.tables.get("acceptance", pd.DataFrame())),
        fidelity=measured,
        explanation=results.explanation,
        attention=results.versions,
        pictures=pictures,
        show=lambda drawing, width: Markup(inline(getattr(drawing, width), f"{drawing.name}-{width}")),  # noqa: S704
        span=_span,
        plain=_plain,
        around=lambda interval: brackets(interval, _plain),
        at=_strip_scale(results),
        ink={policy: figures.VARIABLES[look.ink] for policy, look in looks(results).items()}.__getitem__,
        times=TIMES,
    )
