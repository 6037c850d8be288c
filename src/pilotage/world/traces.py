"""Reads recorded traffic: one column of numbers from a text, CSV or Parquet file below the data directory.

Files are text (one number a line), CSV with a header (either may be gzip-compressed), or Parquet. Everything
that does not make sense raises SpecError with file and line.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final, TextIO

import numpy as np

from pilotage.world.spec import SpecError, closest

TEXT: Final = (".txt", ".txt.gz")
TABLE: Final = (".csv", ".csv.gz")
PARQUET: Final = (".parquet",)
MAX_COUNT: Final = 1e8  # per interval


def find(path: str, data: Path | None) -> Path:
    """The file at `path` below the data directory; nothing outside that directory is ever read."""
    if data is None:
        raise SpecError(
            f"trace {path!r} needs --data DIR or PILOTAGE_DATA: the directory that holds recorded traffic"
        )
    if not data.is_dir():
        raise SpecError(
            f"data directory {str(data)!r} does not exist, and trace {path!r} is read from it; "
            "give an existing one with --data DIR or PILOTAGE_DATA"
        )
    if Path(path).is_absolute() or not (data / path).resolve().is_relative_to(data.resolve()):
        raise SpecError(
            f"trace {path!r} lies outside the data directory {str(data)!r}; give a path relative to it"
        )
    file = (data / path).resolve()
    if not file.is_file():
        near = sorted(p.name for p in file.parent.iterdir()) if file.parent.is_dir() else []
        hint = closest(file.name, near) if near else f"there is no directory {str(file.parent)!r}"
        raise SpecError(f"trace {path!r} is absent from the data directory {str(data)!r}; {hint}")
    if not file.name.endswith(TEXT + TABLE + PARQUET):
        raise SpecError(f"trace {path!r}: unknown format; valid: {', '.join(TEXT + TABLE + PARQUET)}")
    return file


def counts_of(path: str, data: Path | None, column: str | None) -> np.ndarray:
    """Counts per interval, as read-only int64. A table with one column needs no `column`."""
    return _counts(*_version(find(path, data)), column)


def times_of(path: str, data: Path | None, column: str, sort: bool, duplicates: str) -> np.ndarray:
    """Sorted times in seconds since the first, read-only; for `sort` and `duplicates` see `Trace`."""
    return _times(*_version(find(path, data)), None if path.endswith(TEXT) else column, sort, duplicates)


def lists_of(path: str, data: Path | None, column: str) -> list[np.ndarray]:
    """Lists of whole numbers from 0 on, joined by semicolons, one list a row, as int64."""
    return _lists(*_version(find(path, data)), column)


def _version(file: Path) -> tuple[Path, int, int]:
    """What a cached column depends on."""
    stat = file.stat()
    return file, stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=8)
def _counts(file: Path, mtime_ns: int, size: int, column: str | None) -> np.ndarray:
    values = _column(file, column)
    bad = np.flatnonzero((values < 0) | (values != np.floor(values)) | (values > MAX_COUNT))
    if len(bad):
        raise SpecError(
            f"{_place(file, bad[0])}: count {values[bad[0]]:g}; valid: whole numbers from 0 to {MAX_COUNT:g}"
        )
    return _shared(values.astype(np.int64))


@lru_cache(maxsize=8)
def _times(
    file: Path, mtime_ns: int, size: int, column: str | None, sort: bool, duplicates: str
) -> np.ndarray:
    times = _column(file, column)
    gaps = np.diff(times)
    if not sort and len(back := np.flatnonzero(gaps < 0)):
        raise SpecError(
            f"{_place(file, back[0] + 1)}: unsorted: {times[back[0] + 1]} s follows {times[back[0]]} s; "
            "sort the file, or give sort = true"
        )
    if sort:
        times = np.sort(times)
        gaps = np.diff(times)
    if not np.any(gaps):
        raise SpecError(f"{file}: only one time, {times[0]} s; give at least two, to know how long it lasts")
    same = np.flatnonzero(gaps == 0)
    if len(same) and duplicates == "refuse":
        where = file if sort else _place(file, same[0] + 1)
        raise SpecError(
            f"{where}: duplicate time {times[same[0]]} s, the first of {len(same)}; "
            "valid: distinct times, or duplicates = 'keep' or 'spread'"
        )
    if duplicates == "spread":
        first = np.concatenate([[True], gaps > 0])
        group = np.cumsum(first) - 1
        rank = np.arange(len(times)) - np.flatnonzero(first)[group]
        times = times + gaps[gaps > 0].min() * rank / np.bincount(group)[group]
    return _shared(times - times[0])


@lru_cache(maxsize=2)
def _lists(file: Path, mtime_ns: int, size: int, column: str) -> list[np.ndarray]:
    if not file.name.endswith(TABLE):
        raise SpecError(f"{file}: lists are read from tables only; valid: {', '.join(TABLE)}")
    found = []
    try:
        with _opened(file) as lines:
            index = _index(file, [name.strip() for name in next(csv.reader(lines), [])], column)
        for number, row in _rows(file):
            cell = row[index] if index < len(row) else ""
            parts = cell.split(";") if cell else []
            if not all(part.isdecimal() and len(part) < 19 for part in parts):
                raise SpecError(f"{file}:{number}: {cell[:40]!r}; valid: whole numbers joined by semicolons")
            found.append(np.array(parts, dtype=np.int64))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SpecError(f"{file}: cannot be read ({error}); give an intact file") from None
    return found


def _shared(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False  # the cache gives the same array to every run
    return values


def _column(file: Path, column: str | None) -> np.ndarray:
    """One column of finite numbers, at least one."""
    try:
        values = _parquet(file, column) if file.suffix == ".parquet" else _text(file, column)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SpecError(f"{file}: cannot be read ({error}); give an intact file") from None
    if len(values) == 0:
        raise SpecError(f"{file}: empty trace; give a file with at least one row")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise SpecError(f"{_place(file, bad[0])}: {values[bad[0]]} is not a finite number; give numbers only")
    return values


def _text(file: Path, column: str | None) -> np.ndarray:
    table = file.name.endswith(TABLE)
    index = 0
    if table:
        with _opened(file) as lines:
            header = next(csv.reader(lines), [])
        index = _index(file, [name.strip() for name in header], column)
    elif column is not None:
        raise SpecError(
            f"{file}: column {column!r} of a text file, which has none; leave `column` out or give a .csv"
        )
    if next(_rows(file), None) is None:
        return np.zeros(0)
    try:
        return np.loadtxt(
            file, delimiter=",", quotechar='"', comments=None, skiprows=int(table), usecols=index, ndmin=1
        )
    except ValueError as error:
        for number, row in _rows(file):
            cell = row[index] if index < len(row) else ""
            try:
                float(cell)
            except ValueError:
                raise SpecError(
                    f"{file}:{number}: {cell!r} is not a number; give one number a line"
                ) from None
        raise SpecError(f"{file}: not a table of numbers ({error})") from None


def _index(file: Path, header: list[str], column: str | None) -> int:
    if not header:
        raise SpecError(f"{file}: empty trace; give a header and at least one row")
    if column is None and len(header) > 1:
        raise SpecError(f"{file}: which column? give `column`; valid: {', '.join(header)}")
    if column is not None and column not in header:
        raise SpecError(f"{file}: no column {column!r}; valid: {', '.join(header)}")
    return 0 if column is None else header.index(column)


def _parquet(file: Path, column: str | None) -> np.ndarray:
    import pandas  # slow to import, and needed for this format only

    try:
        table = pandas.read_parquet(file)
        values = table.iloc[:, _index(file, list(table.columns), column)]
        return np.array(values.to_numpy(dtype=np.float64))
    except ImportError:
        raise SpecError(
            f"{file}: Parquet needs pyarrow (pip install pyarrow); or give the trace as .csv or .csv.gz"
        ) from None
    except SpecError:
        raise
    except (TypeError, ValueError) as error:
        raise SpecError(f"{file}: not a Parquet column of numbers ({error})") from None


def _opened(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8", newline="")
    return file.open(encoding="utf-8", newline="")


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells of the data rows, as `numpy.loadtxt` counts them: blank lines do not count."""
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and not (number == 1 and file.name.endswith(TABLE)):
                yield number, next(csv.reader([line.strip()]))


def _place(file: Path, index: int) -> str:
    if file.suffix == ".parquet":
        return f"{file}: row {index}"
    number = next((number for k, (number, _) in enumerate(_rows(file)) if k == index), index)
    return f"{file}:{number}"
