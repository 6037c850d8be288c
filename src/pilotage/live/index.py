"""The index of a ledger by time, service and alias: derived from its lines, made anew where it is stale or broken."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from pilotage.live.entries import Entry, Head, ends_at, entry_of


class Index:
    """The index beside a file of lines; in memory where nothing can be written there."""

    def __init__(self, lines: Path) -> None:
        self._lines = lines

    def catch_up(self) -> None:
        """Reads the lines that it does not have yet."""
        with self._open():
            pass

    def fetch(self, query: str, values: Sequence[Any]) -> list[Entry]:
        if not self._lines.exists():
            return []
        with self._open() as index, self._lines.open("rb") as file:
            places = index.execute(query, values).fetchall()
            return [entry_of(os.pread(file.fileno(), length, start)) for start, length in places]

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The index, up to date with the lines."""
        writable = os.access(self._lines.parent, os.W_OK)
        path = self._lines.parent / "index.db"
        for attempt in (1, 2):
            index = sqlite3.connect(path if writable else ":memory:", timeout=30)
            try:
                self._catch_up(index)
            except sqlite3.OperationalError:
                index.close()
                raise
            except sqlite3.DatabaseError:  # broken: it is derived, so make it anew
                index.close()
                path.unlink(missing_ok=True)
                if attempt == 2:
                    raise
            else:
                break
        try:
            yield index
        finally:
            index.close()

    def _catch_up(self, index: sqlite3.Connection) -> None:
        with index, self._lines.open("rb") as file:
            if self._is_current(index, file)[0]:
                return
            index.execute("PRAGMA synchronous = OFF")  # what a crash loses is read again
            index.execute("BEGIN IMMEDIATE")
            for table in _TABLES:
                index.execute(table)
            current, (seq, size, digest) = self._is_current(index, file)
            if current:  # another process was faster
                return
            if not ends_at(file, Head(entries=seq, size=size, hash=digest)):
                index.execute("DELETE FROM entries")
                seq, size, digest = 0, 0, ""
            start = file.seek(size)
            rows = []
            for line in file:
                if not line.endswith(b"\n"):
                    break
                entry = entry_of(line)
                moved = entry.alias if entry.outcome in ("applied", "observed") else None
                rows.append(
                    (seq, entry.time, entry.service, entry.outcome, moved, entry.of, start, len(line))
                )
                start, seq, digest = start + len(line), seq + 1, entry.hash
                if len(rows) == 10_000:
                    index.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
                    rows = []
            index.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            index.execute("DELETE FROM upto")
            index.execute("INSERT INTO upto VALUES (?, ?, ?)", (seq, start, digest))

    @staticmethod
    def _is_current(index: sqlite3.Connection, file: BinaryIO) -> tuple[bool, tuple[int, int, str]]:
        """Whether the index has all lines, and up to where it goes."""
        if index.execute("SELECT 1 FROM sqlite_master WHERE name = 'upto'").fetchone() is None:
            return False, (0, 0, "")
        seq, size, digest = index.execute("SELECT entries, size, hash FROM upto").fetchone() or (0, 0, "")
        whole = os.fstat(file.fileno()).st_size == size > 0
        return whole and ends_at(file, Head(entries=seq, size=size, hash=digest)), (seq, size, digest)


_TABLES: Final = (
    "CREATE TABLE IF NOT EXISTS upto (entries INTEGER, size INTEGER, hash TEXT)",
    """CREATE TABLE IF NOT EXISTS entries (
        seq INTEGER PRIMARY KEY, time TEXT, service TEXT, outcome TEXT, moved TEXT, settles INTEGER,
        start INTEGER, length INTEGER)""",
    "CREATE INDEX IF NOT EXISTS by_time ON entries (time)",
    "CREATE INDEX IF NOT EXISTS by_service ON entries (service, time)",
    "CREATE INDEX IF NOT EXISTS by_move ON entries (service, moved, time) WHERE moved IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS by_intent ON entries (service, time) WHERE outcome = 'intent'",
    "CREATE INDEX IF NOT EXISTS by_settled ON entries (settles) WHERE settles IS NOT NULL",
)
