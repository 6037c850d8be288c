"""The drawings of a report, from result files to SVG. The same input gives the same bytes.

Every figure is drawn in two widths, for the desk and for the phone, at the same size of type. Only the colours of
`INKS` are used: a page may turn each into a CSS variable (`inline`), so that figures follow light and dark.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from pilotage.measurements import Evaluation, Results, Row, attained, latency, money
from pilotage.metrics import ITEMS

# Okabe and Ito's colours, darkened where white paper asks for it; each is a CSS variable in the page.
INKS: Final = {
    "ink": "#1b1f24",
    "muted": "#57606a",
    "grid": "#d8dee4",
    "paper": "#ffffff",
    "blue": "#0072b2",
    "green": "#00845f",
    "purple": "#a8508a",
    "orange": "#b86e00",
    "sky": "#2b8cc4",
    "red": "#d55e00",
    "slate": "#8ba3b8",
    "amber": "#e69f00",
    "pink": "#cc79a7",
    "teal": "#009e73",
    "steady": "#6b747d",
}
VARIABLES: Final = {ink: name for name, ink in INKS.items()}
ITEM_INKS: Final = dict(zip(ITEMS, ("slate", "amber", "red", "pink", "teal"), strict=True))
STYLE: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pilotage",
    "text.parse_math": False,  # names of policies are text, whatever is in them
    "font.size": 9.5,
    "text.color": INKS["ink"],
    "axes.labelcolor": INKS["muted"],
    "axes.edgecolor": INKS["grid"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INKS["ink"],
    "axes.titleweight": "bold",
    "axes.titlepad": 5,
    "grid.color": INKS["grid"],
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "xtick.color": INKS["grid"],
    "xtick.labelcolor": INKS["muted"],
    "ytick.color": INKS["grid"],
    "ytick.labelcolor": INKS["muted"],
    "ytick.major.size": 0,
    "figure.facecolor": INKS["paper"],
    "savefig.facecolor": INKS["paper"],
}
DESK_IN, HALF_IN, PHONE_IN = 10.2, 5.0, 3.3  # widths; the page shows an inch as 96 px, as type is set for
BINS: Final = 480  # ticks of a longer timeline are put together where it is drawn,
READ_BINS: Final = 6000  # and where a page reads it out


class Look(NamedTuple):
    """How a policy is drawn, in every figure."""

    ink: str
    marker: str
    dash: Any


class Drawing(NamedTuple):
    """A figure with its text alternative; `phone` is for narrow screens."""

    name: str
    alt: str
    desk: str
    phone: str


def looks(results: Results) -> dict[str, Look]:
    """The baseline grey, the best policy blue, the others in turn; never told apart by colour alone."""
    best = results.best.policy if results.best else None
    inks = [INKS[name] for name in ("green", "orange", "purple", "red", "sky")]
    dashes = [(0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (2, 1)), (0, (8, 2, 2, 2)), (0, (1, 1))]
    found, k = {}, 0
    for name, foresees in {row.policy: row.foresees for g in results.groups for row in g.policies}.items():
        if name == results.baseline.policy:
            found[name] = Look(INKS["steady"], "s", "-")
        elif name == best:
            found[name] = Look(INKS["blue"], "o", "-")
        elif foresees:
            found[name] = Look(INKS["ink"], "*", (0, (1, 1.5)))
        else:
            found[name] = Look(inks[k % 5], "^Dv<>PXhdp"[k % 10], dashes[k % 5])
            k += 1
    return found


def short(name: str, most: int = 26) -> str:
    name = " ".join(name.split()).lstrip("_") or "?"  # matplotlib hides labels that begin with _
    return name if len(name) <= most else name[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


# --- from figure to text -----------------------------------------------------------------------------------
def draw(name: str, alt: str, desk_in: float, paint: Callable[[float], Figure]) -> Drawing:
    """Paints a figure in both widths, untouched by the user's matplotlib settings."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"Glyph .* missing"
        )  # the reader's fonts are used, not ours
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        return Drawing(name, alt, *(_svg(paint(width)) for width in (desk_in, PHONE_IN)))


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    shorter = r"(?<![\w.#])(-?\d+\.\d{3,})(?![\w.])"
    return _in_tags(text.getvalue(), lambda tag: re.sub(shorter, lambda n: f"{float(n[1]):.2f}", tag))


def _in_tags(svg: str, change: Callable[[str], str]) -> str:
    """Changes tags and leaves text alone; attributes hold no bare angle bracket."""
    return re.sub(r"<[^<>]*>", lambda tag: change(tag[0]), svg)


def inline(svg: str, prefix: str) -> str:
    """The drawing as part of a page: unique ids, colours as CSS variables, no word of other addresses."""

    def change(tag: str) -> str:
        tag = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{prefix}-", tag.replace("xlink:", ""))
        tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
        return re.sub(
            r"(?<=: )#[0-9a-f]{6}",
            lambda ink: f"var(--{VARIABLES[ink[0]]})" if ink[0] in VARIABLES else ink[0],
            tag,
        )

    body = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', body)
    body = re.sub(
        r"<svg[^>]*>", f'<svg {box[0] if box else ""} aria-hidden="true" focusable="false">', body, count=1
    )
    return _in_tags(re.sub(r"(?s)<style.*?</style>|<!--.*?-->", "", body), change)


# --- the figures -------------------------------------------------------------------------------------------
def cost(group: Evaluation, name: str) -> Drawing:
    """What each policy costs, item by item, with the bound."""
    rows = group.ranked
    alt = "Cost per window by item. " + "; ".join(
        f"{row.name}: {money(row.total_usd.mean)} ("
        + ", ".join(f"{item} {money(row.usd.get(item, 0.0))}" for item in ITEMS if row.usd.get(item))
        + ")"
        for row in rows
    )
    lower = group.bound_usd.lower if group.bound_usd else None
    if lower is not None:
        alt += f". No policy can cost less than {money(lower)}."
    most = max(max(row.total_usd.high or 0, sum(row.usd.values())) for row in rows) or 1.0
    items = [item for item in ITEMS if any(row.usd.get(item) for row in rows)] or [ITEMS[0]]

    def paint(width: float) -> Figure:
        figure = Figure((width, 0.9 + 0.52 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for k, row in enumerate(rows):
            left = 0.0
            for item in items:
                usd = row.usd.get(item, 0.0)
                axes.barh(
                    k, usd, 0.42, left, color=INKS[ITEM_INKS[item]], edgecolor=INKS["paper"], linewidth=0.8
                )
                left += usd
            low, high = row.total_usd.low, row.total_usd.high
            if low is not None and high is not None:
                axes.plot([low, high], [k, k], color=INKS["ink"], linewidth=1, marker="|", markersize=5)
            label: dict[str, Any] = {
                "xytext": (6, 0),
                "textcoords": "offset points",
                "va": "center",
                "fontsize": 9,
            }
            axes.annotate(money(row.total_usd.mean), (max(left, high or 0), k), **label)
            box = {"facecolor": INKS["paper"], "edgecolor": "none", "pad": 0.8}
            axes.text(0, k - 0.3, short(row.name, 40), va="bottom", fontsize=9, bbox=box)
        if lower is not None:
            axes.axvline(lower, color=INKS["ink"], linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set(
            xlim=(0, most * (1.15 if width > PHONE_IN else 1.26)), ylim=(len(rows) - 0.6, -0.75), yticks=[]
        )
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5 if width > PHONE_IN else 4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"${v:,.4g}"))
        keys: list[Any] = [
            matplotlib.patches.Patch(color=INKS[ITEM_INKS[item]], label=item) for item in items
        ]
        if lower is not None:
            dash: dict[str, Any] = {"color": INKS["ink"], "linewidth": 1.2, "linestyle": (0, (4, 2))}
            keys.append(matplotlib.lines.Line2D([], [], label=f"lower bound {money(lower)}", **dash))
        _legend(figure, keys, width)
        return figure

    return draw(name, alt, HALF_IN, paint)


def pareto(group: Evaluation, name: str, looks: dict[str, Look]) -> Drawing:
    """Cost against attainment: up and to the left is better."""
    rows = [row for row in group.ranked if row.total_usd.mean is not None]
    front = front_of(rows)
    alt = "Cost against the share of requests that met the objective. " + "; ".join(
        f"{row.name}: {money(row.total_usd.mean)}, {attained(row.slo_attainment)}" for row in rows
    )
    alt += ". Not beaten in both by another contender: " + ", ".join(row.name for row in front) + "."
    lower = group.bound_usd.lower if group.bound_usd else None

    def paint(width: float) -> Figure:
        figure = Figure((width, max(3.4, 0.9 + 0.52 * len(rows))), layout="constrained")
        axes = figure.subplots()
        points = [(row.usd_mean, nines(row.slo_attainment)) for row in rows]
        edge = [(row.usd_mean, nines(row.slo_attainment)) for row in front]
        halo: dict[str, Any] = {"color": INKS["blue"], "alpha": 0.2, "zorder": 1}
        axes.step(*zip(*edge, strict=True), where="post", linewidth=4, solid_capstyle="butt", **halo)
        axes.plot(*zip(*edge, strict=True), "o", markersize=18, markeredgewidth=0, **halo)
        for row, (x, y) in zip(rows, points, strict=True):
            look = looks[row.policy]
            if row.total_usd.low is not None and row.total_usd.high is not None:
                axes.plot([row.total_usd.low, row.total_usd.high], [y, y], color=look.ink, linewidth=1.2)
            hollow = INKS["paper"] if row.foresees else look.ink
            size = 10 if row.foresees else 7.5
            axes.plot(x, y, look.marker, color=look.ink, markerfacecolor=hollow, markersize=size, zorder=3)
        if lower is not None:
            axes.axvline(lower, color=INKS["ink"], linewidth=1.2, linestyle=(0, (4, 2)))
        low, high = min(y for _, y in points), max(y for _, y in points)
        pad = max(0.12, 0.16 * (high - low))
        axes.set(ylim=(low - pad, high + pad))
        axes.set_title("Requests that met the objective")
        axes.set_xlabel("dollars per window (with 95 % interval)")
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(5 if width > PHONE_IN else 4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"${v:,.4g}"))
        shown = [a for a in ATTAINMENTS if low - pad <= nines(a) <= high + pad]
        shown = shown[:: math.ceil(len(shown) / 7)] or [rows[0].slo_attainment]
        axes.set_yticks([nines(a) for a in shown], [attained(a) for a in shown])
        _place(figure, axes, rows)
        return figure

    return draw(name, alt, HALF_IN, paint)


# where a name may stand beside its point, in points, the likeliest first
SIDES: Final = (
    *((9, -3, "left"), (-9, -3, "right"), (0, 8, "center"), (0, -15, "center")),
    *((9, 8, "left"), (-9, 8, "right"), (9, -15, "left"), (-9, -15, "right")),
    *((0, 20, "center"), (0, -27, "center"), (9, 20, "left"), (9, -27, "left")),
)
ATTAINMENTS: Final = (
    *(0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999),
    *(0.99995, 0.99998, 1.0),
)


def nines(attainment: float) -> float:
    """A scale on which 90, 99 and 99.9 % are equally far apart; all is drawn as 99.999 %."""
    return -math.log10(max(1 - attainment, 1e-5))


def front_of(rows: Sequence[Row]) -> list[Row]:
    """The contenders that no other contender beats in both cost and attainment, cheapest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.usd_mean, -row.slo_attainment)):
        if not row.foresees and (not front or row.slo_attainment > front[-1].slo_attainment):
            front.append(row)
    return front or list(rows[:1])


def _place(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    """Writes a name beside each point where it covers the least of points, intervals and other names."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    frame, taken = axes.get_window_extent(), []
    for row in rows:
        ends = [v for v in (row.total_usd.low, row.usd_mean, row.total_usd.high) if v is not None]
        (a, y), (x, _), (b, _) = axes.transData.transform(
            [(v, nines(row.slo_attainment)) for v in (ends[0], row.usd_mean, ends[-1])]
        )
        taken += [(a, y - 2, b, y + 2), (x - 6, y - 6, x + 6, y + 6)]
    for row in rows:
        at = (row.usd_mean, nines(row.slo_attainment))
        tries: list[tuple[float, int, dict[str, Any], tuple[float, float, float, float]]] = []
        for dx, dy, ha in SIDES:
            style: dict[str, Any] = {
                "xytext": (dx, dy),
                "textcoords": "offset points",
                "ha": ha,
                "fontsize": 9,
            }
            text = axes.annotate(short(row.name), at, annotation_clip=False, **style)
            text.set_in_layout(False)
            a, b, c, d = text.get_window_extent(canvas.get_renderer()).extents
            over = sum(max(0, min(c, r) - max(a, p)) * max(0, min(d, s) - max(b, q)) for p, q, r, s in taken)
            out = max(0, frame.x0 - a) + max(0, c - frame.x1) + max(0, frame.y0 - b) + max(0, d - frame.y1)
            text.remove()
            tries.append((over + 40 * out, len(tries), style, (a, b, c, d)))
        _, _, style, box = min(tries, key=lambda one: one[:2])
        axes.annotate(short(row.name), at, annotation_clip=False, **style).set_in_layout(False)
        taken.append(box)


def timeline(
    table: pd.DataFrame, looks: dict[str, Look], first: Sequence[str]
) -> tuple[Drawing, dict[str, Any]]:
    """One window: traffic, and what up to three policies made of it. Also the numbers, for a page to read out."""
    names = list(dict.fromkeys(table["policy"]))
    totals = table.groupby("policy")["usd"].sum()
    rest = sorted((n for n in names if n not in first), key=lambda n: totals[n])
    names = [*(n for n in first if n in names), *rest][:3]
    series = {name: _thin(table[table["policy"] == name], BINS) for name in names}
    slo_s = float(table["slo_s"].max())
    unit, per = ("s", 1.0) if slo_s >= 5 else ("ms", 1e3)
    traffic = series[names[0]]
    worst = max(float(np.nanmax(s["latency_p95_s"].to_numpy())) for s in series.values())
    alt = (
        f"One window: {traffic['arrival_rate'].min():.0f} to {traffic['arrival_rate'].max():.0f} requests/s. "
        + "; ".join(
            f"{name}: {s['replicas_ready'].min():.0f} to {s['replicas_ready'].max():.0f} replicas, highest p95"
            f" {latency(1e3 * float(s['latency_p95_s'].max()))}, {money(s['total_usd'].iloc[-1])}"
            for name, s in series.items()
        )
    )
    frames: list[dict[str, float]] = []

    def paint(width: float) -> Figure:
        figure = Figure((width, 7.6), layout="constrained")
        panels = figure.subplots(4, 1, sharex=True, height_ratios=[1, 1.5, 1.5, 1.1])
        arrivals, replicas, delays, bills = panels
        arrivals.fill_between(
            traffic["hour"], traffic["arrival_rate"], color=INKS["slate"], alpha=0.55, linewidth=0
        )
        arrivals.set_title("Traffic, requests/s")
        arrivals.set_ylim(bottom=0)
        keys: list[Any] = []
        for name, s in series.items():
            look = looks.get(name, Look(INKS["ink"], "o", "-"))
            line: dict[str, Any] = {"color": look.ink, "linestyle": look.dash, "linewidth": 1.4}
            replicas.step(s["hour"], s["replicas_ready"], where="post", **line)
            ordered = s["replicas_ready"] + s["replicas_starting"]
            shade: dict[str, Any] = {"color": look.ink, "alpha": 0.22, "linewidth": 0, "step": "post"}
            replicas.fill_between(s["hour"], s["replicas_ready"], ordered, **shade)
            delays.plot(s["hour"], per * s["latency_p95_s"], **line)
            bills.plot(s["hour"], s["total_usd"], **line)
            label = f"{short(name)}  {money(s['total_usd'].iloc[-1])}"
            keys.append(matplotlib.lines.Line2D([], [], label=label, **line))
        replicas.set_title("Replicas ready (shaded: starting)")
        replicas.set_ylim(bottom=0)
        delays.set_title(f"95th percentile of latency, {unit}")
        if worst > 4 * slo_s:
            delays.set_yscale("log")
            delays.yaxis.set_minor_formatter(NullFormatter())  # its mathematical text would show as source
        else:
            delays.set_ylim(0, 1.08 * per * max(worst, slo_s))
        delays.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.4g}"))
        delays.axhline(per * slo_s, color=INKS["ink"], linewidth=1, linestyle=(0, (4, 2)))
        note: dict[str, Any] = {
            "xytext": (-2, 3),
            "textcoords": "offset points",
            "ha": "right",
            "fontsize": 9,
        }
        delays.annotate("objective", (traffic["hour"].max(), per * slo_s), **note)
        bills.set_title("Dollars spent so far")
        bills.set_ylim(bottom=0)
        bills.set_xlabel("hours into the window")
        bills.set_xlim(0, traffic["hour"].max())
        bills.xaxis.set_major_locator(MaxNLocator(8 if width > PHONE_IN else 4, steps=[1, 2, 3, 5, 6, 10]))
        for axes in (arrivals, replicas, bills):
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=axes is replicas))
        _legend(figure, keys, width)
        FigureCanvasAgg(figure).draw()
        box = bills.get_position()
        frames.append({"left": box.x0, "right": box.x1, "bottom": box.y0, "top": arrivals.get_position().y1})
        return figure

    drawing = draw("timeline", alt, DESK_IN, paint)
    kept = {
        "replicas_ready": 0,
        "replicas_starting": 0,
        "latency_p95_s": 3,
        "queue_length": 0,
        "total_usd": 2,
    }
    fine = {name: _thin(table[table["policy"] == name], READ_BINS) for name in names}
    traffic = fine[names[0]]
    numbers = {
        "hour": traffic["hour"].round(4).tolist(),
        "arrival_rate": traffic["arrival_rate"].round(1).tolist(),
        "slo_s": slo_s,
        "frames": frames,
        "policies": [
            {
                "name": name,
                "ink": VARIABLES[looks.get(name, Look(INKS["ink"], "o", "-")).ink],
                # the ticks at which something was decided, and what
                "decisions": [[k, text] for k, text in enumerate(s["decision"]) if text],
            }
            | {k: [None if v != v else v for v in s[k].round(d).tolist()] for k, d in kept.items()}
            for name, s in fine.items()
        ],
    }
    return drawing, numbers


def _thin(ticks: pd.DataFrame, bins: int) -> pd.DataFrame:
    """At most so many rows: rates averaged, peaks of latency and queue and all decisions kept, dollars summed up."""
    ticks = ticks.sort_values("hour", kind="stable").reset_index(drop=True)
    ticks["latency_p95_s"] = ticks["latency_p95_s"].where(ticks["latency_p95_s"] > 0)  # nobody was served
    ticks["total_usd"] = ticks["usd"].cumsum()
    if "decision" not in ticks:  # a file from before they were kept
        ticks["decision"] = ""
    if len(ticks) <= bins:
        return ticks
    how: dict[str, Any] = {"arrival_rate": "mean", "latency_p95_s": "max", "queue_length": "max"}
    how["decision"] = lambda texts: "; ".join(filter(None, texts))
    last = ("hour", "replicas_ready", "replicas_starting", "total_usd")
    return ticks.groupby(np.arange(len(ticks)) * bins // len(ticks)).agg(how | dict.fromkeys(last, "last"))


def learning(curve: pd.DataFrame) -> Drawing:
    """Cost on validation traffic while learning, beside what was there before."""
    curve = curve.sort_values("steps", kind="stable", ignore_index=True)
    steps, usd = curve["steps"] / 1000, curve["validation_usd"]
    marks = curve["best"].str.lower() == "true" if "best" in curve else pd.Series(False, curve.index)
    best = int(np.flatnonzero(marks)[-1]) if marks.any() else int(usd.argmin())
    references = [c for c in curve.columns if c.endswith("_usd") and c != "validation_usd"]
    alt = (
        f"Cost on validation traffic over {steps.max():,.0f} thousand steps, from {money(usd.iloc[0])};"
        f" best {money(usd[best])} after {steps[best]:,.0f} thousand"
    ) + "".join(f"; {c.removesuffix('_usd')} {money(curve[c].iloc[-1])}" for c in references)

    def paint(width: float) -> Figure:
        figure = Figure((width, 3.2), layout="constrained")
        axes = figure.subplots()
        if {"low", "high"} <= set(curve):
            axes.fill_between(steps, curve["low"], curve["high"], color=INKS["blue"], alpha=0.18, linewidth=0)
        axes.plot(steps, usd, color=INKS["blue"], marker="o", markersize=4, label="learned")
        star: dict[str, Any] = {"color": INKS["blue"], "markeredgecolor": INKS["paper"], "markersize": 14}
        axes.plot(steps[best], usd[best], "*", label=f"kept: {money(usd[best])}", **star)
        for k, c in enumerate(references):
            dash: dict[str, Any] = {"linestyle": ("--", ":", "-.")[k % 3], "color": INKS["steady"]}
            axes.plot(steps, curve[c], label=c.removesuffix("_usd").replace("_", " "), **dash)
        axes.set_title("Validation, dollars per window")
        axes.set_xlabel("thousand steps")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"${v:,.4g}"))
        _legend(figure, axes.get_legend_handles_labels()[0], width)
        return figure

    return draw("learning_curve", alt, HALF_IN, paint)


def tuning(trials: pd.DataFrame, looks: dict[str, Look]) -> Drawing:
    """Every trial, and the best so far, of each tuned policy."""
    best = trials.groupby("policy", sort=False)["best_usd"].min()
    alt = "Best cost found by tuning: " + "; ".join(f"{n}: {money(float(v))}" for n, v in best.items())
    middle = float(trials["usd"].quantile(0.8))
    bottom = float(trials["best_usd"].min())
    top = middle + 0.4 * (middle - bottom) or 1.0  # a few hopeless trials would flatten all others

    def paint(width: float) -> Figure:
        figure = Figure((width, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, t in trials.groupby("policy", sort=False):
            look = looks.get(str(name), Look(INKS["ink"], "o", "-"))
            inside = t[t["usd"] <= top]
            axes.plot(inside["trial"], inside["usd"], look.marker, color=look.ink, alpha=0.4, markersize=4)
            axes.step(t["trial"], t["best_usd"], where="post", color=look.ink, linestyle=look.dash)
            label = f"{short(str(name))}  {money(float(best[name]))}"
            style = {"marker": look.marker, "linestyle": look.dash, "color": look.ink, "markersize": 5}
            axes.plot([], [], label=label, **style)
        axes.set_ylim(bottom - 0.06 * (top - bottom), top)
        axes.set_title("Training, dollars per window")
        axes.set_xlabel(f"trial{_beyond(int((trials['usd'] > top).sum()))}")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"${v:,.4g}"))
        _legend(figure, axes.get_legend_handles_labels()[0], width)
        return figure

    return draw("tuning", alt, HALF_IN, paint)


def _beyond(count: int) -> str:
    return f" ({count} dearer trials lie above the frame)" if count else ""


def _legend(figure: Figure, keys: Sequence[Any], width: float) -> None:
    sizes = [5.1 * len(key.get_label()) + 36 for key in keys]  # in points, about
    room = 72 * width
    columns = len(keys) if sum(sizes) < room else max(1, int(room / max(sizes)))
    figure.legend(handles=keys, loc="outside upper left", ncols=columns, fontsize=9, columnspacing=1.2)
