"""Recordings of observations: written while a monitor reads, and replayed as a monitor.

A recording has one row per service and time: `now_s`, `service`, a column per feature that is known, and
`<feature>_age_s` where a value was not fresh (`age_s`: of all that have none of their own). It is JSON lines (what
`Recorder` writes), CSV with a header, or Parquet, by its suffix. Rows of one time stand together, and times do not
decrease.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from pilotage.control.policy import FEATURES, INDEX
from pilotage.live.monitors import MonitorError, Reading
from pilotage.live.promql import Subject
from pilotage.world.spec import Spec, SpecError

SUFFIXES: Final = (".jsonl", ".csv", ".parquet")
_AGE: Final = "_age_s"


class Recording(Spec, frozen=True, kw_only=True, tag_field="kind", tag="recording"):
    """Observations that were recorded in a file; services are found by their label."""

    path: str

    def begin(self, subjects: Sequence[Subject]) -> Replay:
        if not Path(self.path).is_file():
            raise SpecError(f"recording {self.path}: there is no such file")
        if Path(self.path).suffix not in SUFFIXES:
            raise SpecError(f"recording {self.path}: not a known format; valid: {', '.join(SUFFIXES)}")
        return Replay(Path(self.path), subjects)


class Replay:
    """Shows one time of a recording after the other, as fast as it is read."""

    replays = True

    def __init__(self, path: Path, subjects: Sequence[Subject]) -> None:
        self._path, self._n = path, len(subjects)
        self._at = {one.label: row for row, one in enumerate(subjects)}
        self._times = itertools.groupby(self._numbered(), key=lambda row: row[1])
        self._last_s = -math.inf

    def read(self) -> Reading | None:
        found = next(self._times, None)
        if found is None:
            return None
        now_s, rows = found
        if now_s < self._last_s:
            raise MonitorError(f"{self._path}: time goes back from {self._last_s:g} to {now_s:g}")
        self._last_s = now_s
        reading = Reading.nothing(now_s, self._n)
        for place, _, row in rows:
            k = self._at.get(str(row.get("service")))
            if k is not None:
                self._put(reading, k, row, place)
        return reading

    def history_rps(self, ticks: int, tick_s: float) -> np.ndarray:
        """None: what was before the recording is not known."""
        return np.zeros((self._n, 0))

    def _numbered(self) -> Iterator[tuple[int, float, dict[str, Any]]]:
        for place, row in enumerate(_rows(self._path), 1):
            now_s = _number(row.get("now_s"), self._path, place, "now_s")
            if not math.isfinite(now_s):
                raise MonitorError(
                    f"{self._path}: row {place}: now_s {now_s}; valid: a finite number of seconds"
                )
            yield place, now_s, row

    def _put(self, reading: Reading, k: int, row: dict[str, Any], place: int) -> None:
        common_s = _number(row.get("age_s", 0.0), self._path, place, "age_s")
        for name, at in INDEX.items():
            value = _number(row.get(name), self._path, place, name)
            if math.isfinite(value):
                reading.values[k, at] = value
                own = row.get(name + _AGE)
                reading.age_s[k, at] = (
                    common_s if own in (None, "") else _number(own, self._path, place, name + _AGE)
                )


class Recorder:
    """Appends readings to a file of JSON lines."""

    def __init__(self, path: Path | str, labels: Sequence[str]) -> None:
        self._path, self._labels = Path(path), labels
        if self._path.suffix != ".jsonl":
            raise SpecError(f"record {self._path}: valid: a file with the suffix .jsonl")

    def write(self, reading: Reading) -> None:
        """Raises OSError where it cannot be written."""
        lines = []
        for label, values, ages in zip(
            self._labels, reading.values.tolist(), reading.age_s.tolist(), strict=True
        ):
            row: dict[str, Any] = {"now_s": reading.now_s, "service": label}
            for feature, value, age_s in zip(FEATURES, values, ages, strict=True):
                if math.isfinite(value):
                    row[feature.name] = value
                    if age_s > 0:
                        row[feature.name + _AGE] = age_s
            lines.append(msgspec.json.encode(row))
        with self._path.open("ab") as file:
            file.write(b"\n".join(lines) + b"\n")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            yield from csv.DictReader(file)
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise SpecError(f"recording {path} needs pyarrow: pip install pyarrow") from None
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(4096):
            yield from batch.to_pylist()
    else:
        with path.open("rb") as lines:
            for place, line in enumerate(lines, 1):
                try:
                    yield msgspec.json.decode(line, type=dict[str, Any])
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise MonitorError(f"{path}: line {place}: not a JSON object: {error}") from None


def _number(value: Any, path: Path, place: int, what: str) -> float:
    """A cell as a number; NaN where it is empty."""
    try:
        return math.nan if value is None or value == "" else float(value)
    except (TypeError, ValueError):
        raise MonitorError(f"{path}: row {place}: {what} of {value!r} is not a number") from None
