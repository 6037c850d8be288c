"""The figures of explanations: which inputs matter (beeswarm), how (dependence), and the tree."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from pilotage.control.tree import Tree
from pilotage.explain.attribution import Attribution
from pilotage.figures import DESK_IN, HALF_IN, INKS, PHONE_IN, Drawing, draw

_MOST = 12
_RAMP = LinearSegmentedColormap.from_list("ramp", [INKS["sky"], INKS["slate"], INKS["red"]])


def _order(explained: Sequence[Attribution], most: int) -> list[int]:
    size = np.mean([np.abs(one.phi) for one in explained], axis=0)
    return [k for k in np.argsort(-size, kind="stable")[:most].tolist() if size[k] > 0]


def _named(text: str, width: int = 28) -> str:
    return textwrap.fill(text.replace("_", " "), width)


def beeswarm(explained: Sequence[Attribution], title: str) -> Drawing:
    """A point per state and input: how far it moved the choice, coloured by its rank among the states."""
    players, unit, names = _order(explained, _MOST), explained[0].choice.unit, explained[0].choice.names
    phi = np.array([one.phi for one in explained])
    shown = np.array([one.choice.shown[0] for one in explained])
    alt = f"{title}. Mean size of contributions in {unit}: " + ", ".join(
        f"{names[k].replace('_', ' ')} {np.abs(phi[:, k]).mean():.3g}" for k in players
    )

    def paint(width: float) -> Figure:
        figure = Figure((width, 1.1 + 0.42 * max(1, len(players))), layout="constrained")
        axes = figure.subplots()
        for row, k in enumerate(players):
            x = phi[:, k]
            rank = np.argsort(np.argsort(np.nan_to_num(shown[:, k]), kind="stable")) / max(1, len(x) - 1)
            axes.scatter(x, row + _spread(x), s=11, c=rank, cmap=_RAMP, vmin=0, vmax=1, linewidths=0)
        axes.axvline(0, color=INKS["muted"], linewidth=0.8)
        axes.set_yticks(
            range(len(players)), [_named(names[k], 30 if width > PHONE_IN else 16) for k in players]
        )
        axes.set_ylim(len(players) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_title(title if width > PHONE_IN else textwrap.fill(title, 34))
        axes.set_xlabel(f"contribution, {unit}   (blue: low value, red: high)")
        return figure

    return draw("beeswarm", alt, DESK_IN * 0.8, paint)


def _spread(x: np.ndarray) -> np.ndarray:
    """Vertical places that keep points of like value apart, within a third of a row."""
    if np.ptp(x) == 0:
        return np.linspace(-0.3, 0.3, len(x))
    cells = np.floor((x - x.min()) / np.ptp(x) * 40).astype(int)
    out, most = np.zeros(len(x)), np.bincount(cells).max()
    for cell in np.unique(cells):
        members = np.flatnonzero(cells == cell)
        side = np.where(np.arange(len(members)) % 2 == 0, 1, -1) * ((np.arange(len(members)) + 1) // 2)
        out[members] = side / max(most, 8) * 0.66
    return out


def dependence(explained: Sequence[Attribution], title: str) -> Drawing:
    """The contribution of the four inputs that matter most, against their value."""
    first = explained[0].choice
    players = [k for k in _order(explained, 8) if np.isfinite(first.shown[:, k]).all()][:4]
    phi = np.array([one.phi for one in explained])
    shown = np.array([one.choice.shown[0] for one in explained])
    alt = f"{title}. " + "; ".join(
        f"{first.names[k].replace('_', ' ')} from {shown[:, k].min():.3g} to {shown[:, k].max():.3g}: contribution "
        f"from {phi[:, k].min():.3g} to {phi[:, k].max():.3g}"
        for k in players
    )

    def paint(width: float) -> Figure:
        count = max(1, len(players))
        across = min(count, 2 if width > PHONE_IN else 1)
        down = -(-count // across)
        figure = Figure((width, 0.4 + 2.3 * down), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False)
        for axes in panels.flat[len(players) :]:
            axes.set_visible(False)
        for axes, k in zip(panels.flat, players, strict=False):
            axes.scatter(shown[:, k], phi[:, k], s=14, color=INKS["blue"], linewidths=0, alpha=0.75)
            axes.axhline(0, color=INKS["muted"], linewidth=0.8)
            axes.set_title(_named(first.names[k], 40))
            axes.set_xlabel(first.units[k] or "standard deviations from the middle")
        for row in panels:
            row[0].set_ylabel(f"contribution, {first.unit}")
        return figure

    return draw("dependence", alt, DESK_IN * 0.8, paint)


def tree(policy: Tree, title: str) -> Drawing:
    """The questions from left to right, yes above no; leaves say what is done."""
    place: dict[int, tuple[float, float]] = {}
    rows = [0]

    def put(k: int, depth: int) -> float:
        node = policy.nodes[k]
        if node.input is None:
            y = float(rows[0])
            rows[0] += 1
        else:
            y = (put(node.then, depth + 1) + put(node.otherwise, depth + 1)) / 2
        place[k] = (float(depth), y)
        return y

    put(0, 0)
    depth = int(max(x for x, _ in place.values()))
    alt = f"{title}: a tree of {policy.leaves} leaves, {depth} questions deep. Its first question: " + (
        f"{policy.nodes[0].input} at most {policy.nodes[0].at_most:.3g}."
        if policy.nodes[0].input
        else "none."
    )

    def paint(width: float) -> Figure:
        per_level, per_row = (1.75, 0.3) if width > PHONE_IN else (1.3, 0.3)
        figure = Figure((max(width, per_level * (depth + 1)), 0.6 + per_row * rows[0]), layout="constrained")
        axes = figure.subplots()
        for k, (x, y) in place.items():
            node = policy.nodes[k]
            if node.input is None:
                text = "keep" if node.change == 0 else f"{node.change:+d}"
                if node.max_batch is not None:
                    text += f", batch {node.max_batch}"
                ink = INKS["muted"] if node.change == 0 else INKS["red" if node.change > 0 else "blue"]
                axes.text(x + 0.05, y, text, va="center", color=ink, fontweight="bold", fontsize=8.5)
                continue
            for child, ink in ((node.then, INKS["teal"]), (node.otherwise, INKS["orange"])):
                cx, cy = place[child]
                axes.plot([x, x + 0.5, cx], [y, cy, cy], color=ink, linewidth=1.0, zorder=1)
            label = f"{_named(node.input, 19)}\n≤ {node.at_most:.3g}?"
            box = {"facecolor": INKS["paper"], "edgecolor": "none", "pad": 0.6}
            axes.text(x, y, label, va="center", ha="left", fontsize=7.5, bbox=box, zorder=2, linespacing=1.0)
        axes.set(xlim=(-0.05, depth + 0.8), ylim=(rows[0] - 0.3, -0.7))
        axes.axis("off")
        axes.set_title(f"{title}   (green: yes, orange: no)" if width > PHONE_IN else title)
        return figure

    return draw("tree", alt, HALF_IN, paint)


def curve(rows: Sequence[dict[str, float]], title: str) -> Drawing:
    """Leaves against agreement and return ratio."""
    leaves = [row["leaves"] for row in rows]
    alt = f"{title}. " + "; ".join(
        f"{row['leaves']:.0f} leaves: agreement {row['agreement']:.3f}, return ratio {row['return_ratio']:.3f}"
        for row in rows
    )

    def paint(width: float) -> Figure:
        figure = Figure((width, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.plot(leaves, [row["agreement"] for row in rows], "o-", color=INKS["blue"], label="agreement")
        low = [row["return_ratio_low"] for row in rows]
        high = [row["return_ratio_high"] for row in rows]
        axes.fill_between(leaves, low, high, color=INKS["orange"], alpha=0.2, linewidth=0)
        axes.plot(
            leaves, [row["return_ratio"] for row in rows], "s--", color=INKS["orange"], label="return ratio"
        )
        axes.axhline(1.0, color=INKS["muted"], linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel("leaves")
        axes.legend(loc="lower right")
        return figure

    return draw("leaves", alt, HALF_IN, paint)
