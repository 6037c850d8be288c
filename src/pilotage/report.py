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
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from pilotage import figures, measurements
from pilotage.figures import Drawing, inline, looks
from pilotage.measurements import (
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
    _write(page, _render(results, pictures))
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


def asked(text: str) -> tuple[str, Callable[[float], str]]:
    """The wording of an acceptance line; what a study asks of a saving ("low >= 0.1") is a share of the cost."""
    found = re.fullmatch(r"(low|mean|high) >= (-?\d+(?:\.\d+)?)", text)
    if not found:
        return text, lambda value: f"{value:.4g}" if value == value else NONE
    end = {"low": "saving, lower end of its interval,", "mean": "saving", "high": "saving, upper end,"}[
        found[1]
    ]
    return f"{end} at least {percent(float(found[2]), 0)}", percent


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

    @property
    def worse(self) -> list[str]:
        """Everything measured in which the rival is better, as far as the written digits show it."""
        mine, rival, notes = self.mine, self.rival, []
        share = self.saving.mean
        if share is not None and share < 0:
            low, high = (None if v is None else -v for v in (self.saving.high, self.saving.low))
            notes.append(f"cost {percent(-share)} higher {_span(Interval(-share, low, high))}".rstrip())
        sides: list[tuple[str, float, float, Callable[[float], str]]] = [
            ("requests in time", -mine.slo_attainment, -rival.slo_attainment, lambda v: attained(-v)),
            ("p95", mine.latency_ms.get("p95") or 0.0, rival.latency_ms.get("p95") or 0.0, latency),
            ("p99", mine.latency_ms.get("p99") or 0.0, rival.latency_ms.get("p99") or 0.0, latency),
            ("dropped requests", mine.dropped, rival.dropped, lambda v: f"{v:,.0f}"),
            ("node-hours", mine.node_hours, rival.node_hours, lambda v: f"{v:,.1f}"),
        ]
        notes += [
            f"{what} {put(a)} against {put(b)}" for what, a, b, put in sides if a > b and put(a) != put(b)
        ]
        return notes


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


def _render(results: Results, pictures: Pictures) -> str:
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
        "asked": asked,
        "ranges": measurements.ranges,
        "script_hash": _script_hash,
    }
    template = environment.from_string(
        files("pilotage").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    contenders = [row for row in results.groups[0].ranked if not row.foresees]
    rivals = [row for row in contenders if not results.best or row.policy != results.best.policy]
    rivals.sort(key=lambda row: row.policy != results.baseline.policy)
    pairs = [against(results, group, row.policy) for group in results.groups for row in rivals]
    return template.render(
        run=results.run,
        groups=results.groups,
        pooled=results.groups[0],
        baseline=results.baseline,
        best=results.best,
        choices=sum(row.improved for row in contenders),
        headline=against(results, results.groups[0], results.baseline.policy),
        by_group=[v for group in results.groups if (v := against(results, group, results.baseline.policy))],
        worse=[(pair, pair.worse) for pair in pairs if pair and pair.worse],
        compared=[pair for pair in pairs if pair],
        acceptance=results.tables["acceptance"].to_dict("records") if "acceptance" in results.tables else [],
        pictures=pictures,
        show=lambda drawing, width: Markup(inline(getattr(drawing, width), f"{drawing.name}-{width}")),  # noqa: S704
        span=_span,
        at=_strip_scale(results),
        ink={policy: figures.VARIABLES[look.ink] for policy, look in looks(results).items()}.__getitem__,
        times=TIMES,
    )
