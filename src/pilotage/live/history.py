"""What a Prometheus remembers of a service: counters and gauges over a span, as arrays of one value per step.

Counters are fetched series by series and differenced here, so that a reset, a replica that comes or goes, or one that
changes its name loses nothing: a value below the last one starts at zero, and so does a series that appears. What is
missing is NaN in gauges, and falls into the step in which a counter comes back. A metric of more than MOST_SERIES
series is refused: a recording rule should sum it first.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Final
from urllib.parse import urlencode

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.live.wire import MAX_ANSWER_BYTES, Request, Wire, WireError, clean
from pilotage.world.spec import Spec, SpecError

MOST_POINTS: Final = 10_000  # of one answer; Prometheus refuses more than 11 000
MOST_SERIES: Final = 5_000


class HistoryError(Exception):
    """The history cannot be read, or does not hold what is needed; the message says what, and what would."""


@dataclass(frozen=True, slots=True)
class Series:
    """One series: its labels, and its value at each of the points in time, NaN where there is none."""

    labels: dict[str, str]
    values: np.ndarray


class Prometheus(Spec, frozen=True, kw_only=True):
    """A server, and the span of history that is read: `start` and `end` in ISO 8601 (UTC where they name no zone)."""

    url: Annotated[str, Meta(pattern=r"^https?://[^/]+")]
    start: str
    end: str
    step_s: Annotated[float, Meta(ge=1, le=3600)] = 60.0
    timeout_s: Annotated[float, Meta(gt=0, le=600)] = (
        120.0  # of one question: as long as Prometheus gives itself
    )

    def __post_init__(self) -> None:
        if self.end_s - self.start_s < 2 * self.step_s:
            raise SpecError(
                f"history from {self.start} to {self.end} has fewer than two steps of {self.step_s:g} s"
            )

    @property
    def start_s(self) -> float:
        return _unix_s(self.start)

    @property
    def end_s(self) -> float:
        return _unix_s(self.end)

    @property
    def times_s(self) -> np.ndarray:
        """Unix times of the points."""
        return self.start_s + self.step_s * np.arange(
            int((self.end_s - self.start_s) / self.step_s + 1e-9) + 1
        )

    def range(self, query: str) -> list[Series]:
        """The series of a query at all points in time, in pieces that the server accepts."""
        times = self.times_s
        found: dict[tuple[tuple[str, str], ...], np.ndarray] = {}
        for lo in range(0, len(times), MOST_POINTS):
            piece = times[lo : lo + MOST_POINTS]
            for row in self._ask(query, float(piece[0]), float(piece[-1])):
                key = tuple(sorted(row.metric.items()))
                if key not in found:
                    if len(found) >= MOST_SERIES:
                        raise HistoryError(
                            f"{query}: more than {MOST_SERIES} series; sum them in a recording rule, by service and le"
                        )
                    found[key] = np.full(len(times), np.nan)
                when_s, what = self._points(
                    query, bytes(row.values)
                ).T  # none, where it has native histograms
                found[key][np.rint((when_s - self.start_s) / self.step_s).astype(int)] = what
        return [Series(dict(key), values) for key, values in found.items()]

    def _points(self, query: str, values: bytes) -> np.ndarray:
        """Unix times and values from a list of pairs, all at once: there are millions; shape (points, 2)."""
        text = values.translate(None, b'[]" \n').decode()
        try:
            numbers = np.fromstring(text, sep=",") if text else np.zeros(0)
            return numbers.reshape(values.count(b"[") - 1, 2)
        except ValueError:
            raise HistoryError(
                f"{self.url}: {query}: {values[:80]!r} is no list of times and values"
            ) from None

    def _ask(self, query: str, start_s: float, end_s: float) -> list[_Row]:
        form = {"query": query, "start": start_s, "end": end_s, "step": self.step_s}
        where = f"{self.url}: {query}"
        path = "/api/v1/query_range"
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Connection": "close"}
        try:
            answer = Wire(self.url).exchange(
                Request("POST", path, urlencode(form).encode(), headers, self.timeout_s, MAX_ANSWER_BYTES)
            )
            if answer.status != 200:
                said = clean(answer.text[:300].decode(errors="replace"), None)
                raise HistoryError(f"{where}: HTTP {answer.status}: {said}")
            found = msgspec.json.decode(answer.text, type=_Answer)
        except (WireError, ValueError) as error:
            raise HistoryError(f"{where}: {clean(str(error), None)}") from None
        if found.data is None:
            raise HistoryError(f"{where}: {clean(found.error, None) or 'no success'}")
        return found.data.result


class _Row(msgspec.Struct):
    """A series of an answer, with [Unix time, "value"] of every point that there is, as JSON."""

    metric: dict[str, str]
    values: msgspec.Raw = msgspec.Raw(b"[]")


class _Data(msgspec.Struct):
    result: list[_Row]


class _Answer(msgspec.Struct):
    status: str
    data: _Data | None = None
    error: str = ""


def _unix_s(text: str) -> float:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise SpecError(f"{text!r} is not a time of ISO 8601, as 2026-11-20T00:00:00Z") from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def increases(values: np.ndarray) -> np.ndarray:
    """What a counter grew by within each step; shape (points - 1,). Resets and gaps as the module says."""
    known = np.flatnonzero(np.isfinite(values))
    out = np.zeros(len(values) - 1)
    if not len(known):
        return out
    seen = values[known]
    grown = np.diff(seen)
    grown = np.where(grown < 0, seen[1:], grown)
    out[known[1:] - 1] = grown
    if known[0] > 0:  # it appeared within the span, and counters start at zero
        out[known[0] - 1] = seen[0]
    return out


@dataclass(frozen=True, slots=True)
class Recording:
    """One service's history: of each step what was counted (n,), at each point what was there (n + 1,).

    `buckets` counts answers by latency, shape (n, len(edges_s) + 1): up to each edge, and beyond the last. Of start-ups
    there are a number, the mean and the coefficient of variation (NaN if there were none). `missing_share` of the
    points had no replica count.
    """

    service: str
    step_s: float
    arrived: np.ndarray
    served: np.ndarray
    dropped: np.ndarray
    edges_s: np.ndarray
    buckets: np.ndarray
    batches: np.ndarray
    batched: np.ndarray
    busy_s: np.ndarray
    ready: np.ndarray
    wanted: np.ndarray
    start_ups: int
    start_up_mean_s: float
    start_up_cv: float
    missing_share: float


def read(source: Prometheus, service: str) -> Recording:
    """The history of a service, by the names of `control.policy.FEATURES`. HistoryError lists all that is missing."""
    at = f'service="{_label(service)}"'
    deployed = f'deployment="{_label(service)}"'
    missing: list[str] = []

    def series(metric: str, label: str = at) -> list[Series]:
        found = source.range(f"{metric}{{{label}}}")
        if not found:
            missing.append(f"{metric}{{{label}}}")
        return found

    steps = len(source.times_s) - 1

    def counted(metric: str, label: str = at) -> np.ndarray:
        return np.sum([increases(s.values) for s in series(metric, label)] or [np.zeros(steps)], axis=0)

    arrived = counted("requests_total")
    answers = series("responses_total")
    served = _sum([increases(s.values) for s in answers if s.labels.get("outcome") == "served"], steps)
    dropped = _sum([increases(s.values) for s in answers if s.labels.get("outcome") != "served"], steps)
    edges, buckets = _histogram(series("latency_seconds_bucket"), steps)
    batches, batched = counted("batch_requests_count"), counted("batch_requests_sum")
    busy = counted("busy_seconds_total")
    ready = _gauge(series("kube_deployment_status_replicas_ready", deployed), steps)
    wanted = _gauge(series("kube_deployment_spec_replicas", deployed), steps)
    if missing:
        raise HistoryError(
            f"service {service!r}: {source.url} has none of: {', '.join(missing)} from {source.start} to {source.end}; "
            "without them no fit is made: export them, or give the span in which they were"
        )
    started = source.range(f"replica_startup_seconds_bucket{{{at}}}")
    start_edges, start_counts = _histogram(started, steps) if started else (np.zeros(0), np.zeros((steps, 1)))
    sums = source.range(f"replica_startup_seconds_sum{{{at}}}")
    total_s = float(_sum([increases(s.values) for s in sums], steps).sum())
    count, mean, cv = _start_ups(start_edges, start_counts.sum(axis=0), total_s)
    gaps = float(np.mean(~np.isfinite(ready)))
    return Recording(
        service, source.step_s, arrived, served, dropped, edges, buckets, batches, batched, busy,
        _held(ready), _held(wanted), count, mean, cv, gaps,
    )  # fmt: skip


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _sum(rows: list[np.ndarray], steps: int) -> np.ndarray:
    total: np.ndarray = np.sum(rows or [np.zeros(steps)], axis=0)
    return total


def _gauge(found: list[Series], steps: int) -> np.ndarray:
    """The sum over series that exist at a point; NaN where none does."""
    if not found:
        return np.full(steps + 1, np.nan)
    values = np.array([s.values for s in found])
    total: np.ndarray = np.where(np.isfinite(values).any(axis=0), np.nansum(values, axis=0), np.nan)
    return total


def _held(values: np.ndarray) -> np.ndarray:
    """Gaps filled with the last value known (the first, before it)."""
    known = np.isfinite(values)
    if not known.any():
        return np.zeros_like(values)
    last = np.maximum.accumulate(np.where(known, np.arange(len(values)), -1))
    return values[np.where(last < 0, int(np.argmax(known)), last)]


def _histogram(found: list[Series], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges in seconds, and counts per step and bucket, shape (steps, edges + 1)."""
    by_edge: dict[float, np.ndarray] = {}
    for s in found:
        edge = float(s.labels.get("le", "nan"))
        by_edge[edge] = by_edge.get(edge, 0.0) + increases(s.values)
    edges = np.array(sorted(edge for edge in by_edge if np.isfinite(edge)))
    whole = by_edge.get(np.inf, np.zeros(steps))
    cumulative = np.stack([*(by_edge[edge] for edge in edges), whole], axis=1)
    return edges, np.maximum(np.diff(cumulative, axis=1, prepend=0.0), 0.0)


def _start_ups(edges_s: np.ndarray, counts: np.ndarray, total_s: float) -> tuple[int, float, float]:
    """How many start-ups were seen, their mean and coefficient of variation, by the middles of the buckets."""
    n = round(float(counts.sum()))
    if n == 0:
        return 0, float("nan"), float("nan")
    middles = np.append((np.append(0.0, edges_s[:-1]) + edges_s) / 2, edges_s[-1] if len(edges_s) else 0.0)
    mean = total_s / n if total_s else float((counts * middles).sum() / n)
    spread = float((counts * (middles - mean) ** 2).sum() / n)
    return n, mean, float(np.sqrt(spread) / mean) if mean else 0.0


def quantile_s(edges_s: np.ndarray, counts: np.ndarray, p: float) -> float:
    """As Prometheus' `histogram_quantile`: linear within the bucket; NaN where nothing was counted."""
    total = counts.sum()
    if total <= 0:
        return float("nan")
    rank, so_far = p * total, np.cumsum(counts)
    k = int(np.searchsorted(so_far, rank))
    if k >= len(edges_s):
        return float(edges_s[-1])
    low = edges_s[k - 1] if k else 0.0
    before = so_far[k - 1] if k else 0.0
    return float(low + (edges_s[k] - low) * (rank - before) / max(counts[k], 1e-12))
