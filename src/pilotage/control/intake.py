"""What an exported policy makes of bad measurements: its table of observations says so, and every case is told.

A value can be missing (NaN), infinite, impossible (a negative queue), or possible but beyond what was seen when the
policy was judged. The first three are one thing, a value that is not known; the last is known, but new.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Final, Literal, NamedTuple

import numpy as np
from msgspec import Meta

from pilotage.control.policy import FEATURES, INDEX
from pilotage.world.spec import Spec, SpecError, closest

# what is undefined where nothing was answered or nothing is ready: to be missing says something
_OFTEN_UNDEFINED: Final = frozenset(
    {"attainment", "latency_mean", "latency_p95", "utilization", "batch_size"}
)
_COUNTS: Final = frozenset({"replicas_ready", "replicas_starting", "replicas_pending"})


class Measured(Spec, frozen=True, kw_only=True):
    """One row of the table of observations.

    Possible values lie in `low` to `high` (None: no limit); `seen` is the range in the runs that the policy was judged
    on (None: not known). What is not known (`missing`) is accepted as missing, replaced by the last known value
    (accepted as missing before there is one), or no decision is taken on it. What is `beyond` the seen range is
    accepted, clipped to it, or no decision is taken on it. Whatever is done is counted and said in the reason.
    """

    name: Annotated[str, Meta(max_length=64)]
    unit: Annotated[str, Meta(max_length=32)]
    meaning: Annotated[str, Meta(max_length=400)] = ""
    promql: Annotated[str, Meta(max_length=2000)] = ""
    low: float = 0.0
    high: float | None = None
    seen: tuple[float, float] | None = None
    missing: Literal["accept", "last", "hold"] = "last"
    beyond: Literal["accept", "clip", "hold"] = "accept"

    def __post_init__(self) -> None:
        if self.name not in INDEX:
            raise SpecError(f"feature {self.name!r} cannot be measured here; {closest(self.name, INDEX)}")
        if self.unit != FEATURES[INDEX[self.name]].unit:
            raise SpecError(
                f"feature {self.name!r} is in {self.unit!r}; here it is in {FEATURES[INDEX[self.name]].unit!r}"
            )
        low, high = self.seen or (self.low, self.low)
        ends = (self.low, low, high, math.inf if self.high is None else self.high)
        if not all(a <= b for a, b in pairwise(ends)):
            raise SpecError(f"feature {self.name!r}: its ranges must be low <= seen <= high, not {ends}")


def table(seen: dict[str, tuple[float, float]] | None = None) -> tuple[Measured, ...]:
    """The table of observations with what is usual for each feature, and the range that was seen of some."""
    return tuple(
        Measured(
            name=f.name,
            unit=f.unit,
            meaning=f.meaning,
            promql=f.promql,
            high=1.0 if f.name == "attainment" else None,
            seen=(seen or {}).get(f.name),
            missing="accept" if f.name in _OFTEN_UNDEFINED else "hold" if f.name in _COUNTS else "last",
        )
        for f in FEATURES
    )


class Taken(NamedTuple):
    """Values as the policy may see them, of shape (services, len(FEATURES)); by service, what is to be said; the
    services of which a value was changed; and those that must be left as they are now."""

    values: np.ndarray
    notes: dict[int, list[str]]
    changed: set[int]
    held: set[int]


class Intake:
    """The measurements of some services on their way to a policy; `counts` says how often what was done to which."""

    def __init__(self, rows: Sequence[Measured], services: int) -> None:
        self.counts: Counter[str] = Counter()
        self._rows = {INDEX[row.name]: row for row in rows}
        n = len(FEATURES)
        self._low, self._high = np.full(n, -np.inf), np.full(n, np.inf)  # what is possible
        self._seen_low, self._seen_high = self._low.copy(), self._high.copy()
        self._may_miss, self._may_be_new = (
            np.ones(n, bool),
            np.ones(n, bool),
        )  # also what the table does not name
        for k, row in self._rows.items():
            self._low[k], self._high[k] = row.low, np.finfo(float).max if row.high is None else row.high
            self._seen_low[k], self._seen_high[k] = row.seen or (self._low[k], self._high[k])
            self._may_miss[k], self._may_be_new[k] = row.missing == "accept", row.beyond == "accept"
        self._last = np.full((services, n), np.nan)

    def __call__(self, values: np.ndarray) -> Taken:
        known = values == values
        bad = ~((values >= self._seen_low) & (values <= self._seen_high) | self._may_miss & ~known)
        notes: dict[int, list[str]] = {}
        changed: set[int] = set()
        held: set[int] = set()
        if bad.any():
            new = bad & self._may_be_new & (values >= self._low) & (values <= self._high)
            values = values.copy()
            for service, k in np.argwhere(bad & ~new).tolist():
                value, note, hold = self._treat(service, k, float(values[service, k]))
                values[service, k] = value
                changed.add(service)
                notes.setdefault(service, []).append(note)
                if hold:
                    held.add(service)
            for service in np.flatnonzero(new.any(axis=1)).tolist():
                note = self._new(values[service], np.flatnonzero(new[service]).tolist())
                notes.setdefault(service, []).append(note)
            known = values == values
        np.copyto(self._last, values, where=known)
        return Taken(values, notes, changed, held)

    def _new(self, values: np.ndarray, which: list[int]) -> str:
        """The words for values that were never seen, and are used as they are."""
        self.counts.update(f"{self._rows[k].name} beyond: accept" for k in which)
        found = (
            f"{self._rows[k].name} {values[k]:.4g} ({self._seen_low[k]:.4g} to {self._seen_high[k]:.4g})"
            for k in which
        )
        return f"beyond what was seen: {', '.join(found)}"

    def _treat(self, service: int, k: int, value: float) -> tuple[float, str, bool]:
        """What to use in place of a value, the words for it, and whether no decision may be taken."""
        row = self._rows[k]
        if self._low[k] <= value <= self._high[k]:
            low, high = float(self._seen_low[k]), float(self._seen_high[k])
            what = f"{row.name} {value:.4g} is beyond the seen {low:.4g} to {high:.4g}"
            self.counts[f"{row.name} beyond: {row.beyond}"] += 1
            if row.beyond == "clip":
                return min(max(value, low), high), f"{what}: clipped", False
            return value, f"{what}: no decision", True
        kind = "missing" if math.isnan(value) else "infinite" if math.isinf(value) else "impossible"
        self.counts[f"{row.name} is {kind}: {row.missing}"] += 1
        what = f"{row.name} is {kind}" + (f" ({value:.4g})" if kind == "impossible" else "")
        last = float(self._last[service, k])
        if row.missing == "hold":
            return last, f"{what}: no decision", True
        if row.missing == "last" and not math.isnan(last):
            return last, f"{what}: last value {last:.4g} used", False
        return math.nan, f"{what}: left missing", False
