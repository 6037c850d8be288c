"""The append-only record of every decision, chained by hashes, so that a change of the past is found.

A ledger is a folder. `ledger.jsonl` holds one line per entry, `{"hash": h, "prev_hash": p, "record": r}`, where r is
JSON with sorted keys and no spaces, p is the hash of the entry before (64 zeros at first), and
h = SHA-256(p as hexadecimal text, then the bytes of r). Lines are appended under a lock and synchronised to disk;
corrections are new entries. `head.json` holds the number of entries, their size and the last hash, so that a ledger
that was cut short is found. `index.db` is derived from the lines, and is rebuilt where it is missing, stale or broken.

What verification proves: nobody has changed, removed, swapped, doubled or cut lines without also rewriting every later
line and the head. Who can write the whole folder can do just that, and an empty folder proves nothing: against that,
keep heads elsewhere and give them to `verify` as anchors. Registries do so: each version carries the hash of the entry
that made it or moved an alias to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import asdict, force_setattr

from pilotage.live.entries import (
    MAX_RECORD_BYTES,
    NOTHING,
    Entry,
    Head,
    LedgerError,
    Record,
    ends_at,
    entry_of,
    line_of,
    read,
    utc,
)
from pilotage.live.index import Index
from pilotage.live.secrets import suspect, texts_and_names, without_secrets
from pilotage.world.spec import Spec, SpecError


class Verification(Spec, frozen=True, kw_only=True):
    """What verification found: `problem` is None for an intact ledger, else says what is wrong at which entry."""

    entries: int
    head: str
    problem: str | None = None
    notes: tuple[str, ...] = ()


class Ledger:
    """A ledger in a folder, which is made with the first entry. Safe for many threads and processes of one host."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._lines, self._head = self.folder / "ledger.jsonl", self.folder / "head.json"
        self._index = Index(self._lines)
        # texts in which the last append found nothing: a result says again what its intent has said
        self._harmless: set[str] = set()

    # --- writing ---------------------------------------------------------------------------------------------
    def append(self, *records: Record, indexed: bool = True) -> list[Entry]:
        """Adds entries; when this returns they are on disk.

        Secrets are blotted out first. Raises SpecError for a record that is too large, LedgerError where the ledger
        does not continue its head (it was cut or changed). Not `indexed`: the index catches up later.
        """
        clean = self._without_secrets(records)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / "append.lock"), self._lines.open("a+b", buffering=0) as file:
            head = self._caught_up(file)
            entries, lines, last = [], [], head.hash
            now, monotonic_s = max(utc(datetime.now(UTC)), head.time), round(time.monotonic(), 6)
            for seq, record in enumerate(clean, head.entries):
                entry = Entry(**asdict(record), seq=seq, time=now, monotonic_s=monotonic_s)
                raw = _encode(entry)
                if len(raw) > MAX_RECORD_BYTES:
                    raise SpecError(
                        f"ledger entry {entry.kind!r} of {entry.service!r}: {len(raw)} bytes; valid: at most "
                        f"{MAX_RECORD_BYTES}; record a digest of what is large"
                    )
                last, line = line_of(last, raw)
                lines.append(line)
                force_setattr(entry, "hash", last)  # nobody has seen it yet
                entries.append(entry)
            data = b"".join(lines)
            try:
                _write(file, data)
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), head.size)  # what was never acknowledged
                raise
            with contextlib.suppress(OSError):  # the lines are on disk: the next append catches up with them
                self._keep(
                    Head(entries=head.entries + len(lines), size=head.size + len(data), hash=last, time=now)
                )
        if indexed:
            with contextlib.suppress(sqlite3.Error):  # a convenience: the next query catches up
                self.catch_up()
        return entries

    def _without_secrets(self, records: Sequence[Record]) -> Sequence[Record]:
        texts, names = texts_and_names(records)
        if not suspect(texts - self._harmless, names):
            self._harmless = texts
            return records
        return [_blotted(one) if suspect(*texts_and_names([one])) else one for one in records]

    def catch_up(self) -> None:
        """Brings the index up to date; raises sqlite3.Error where it cannot be written."""
        self._index.catch_up()

    @contextlib.contextmanager
    def alone(self, service: str, within_s: float = 10.0) -> Iterator[None]:
        """Holds what only one writer per service may hold; raises TimeoutError while another does.

        The kernel takes it back from a process that dies, so whoever gets it knows that an intent without a result
        is nobody's work in progress.
        """
        name = hashlib.sha256(service.encode()).hexdigest()[:32]  # never a path made of what somebody named
        (self.folder / "writers").mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / "writers" / f"{name}.lock", within_s):
            yield

    def _keep(self, head: Head) -> None:
        part = self._head.with_suffix(".part")
        with part.open("wb") as file:
            file.write(msgspec.json.encode(head) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        begins = not self._head.exists()
        part.replace(self._head)
        if not begins:  # either head will do: from the older one the next append catches up
            return
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @property
    def name(self) -> str:
        """What tells this ledger from others: the start of its first hash; empty while it has no entry."""
        try:
            with self._lines.open("rb") as file:
                return entry_of(file.readline()).hash[:12]
        except FileNotFoundError:
            return ""

    def head(self) -> Head:
        """The head as it was last kept."""
        try:
            return msgspec.json.decode(self._head.read_bytes(), type=Head)
        except FileNotFoundError:
            return Head()
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise LedgerError(
                f"{self._head}: not a head of a ledger: {error}; see `pilotage history --verify`"
            ) from None

    def _caught_up(self, file: Any) -> Head:
        """The head after all complete lines; a line that a crash left incomplete is cut off.

        A crash between a line and its head leaves complete lines after the head, which are checked and kept.
        """
        size = os.fstat(file.fileno()).st_size
        if size == 0 and not self._head.exists():
            self._keep(Head())
        head = self.head()
        if not self._head.exists() or size < head.size or not ends_at(file, head):
            raise LedgerError(
                f"{self._lines}: does not end as {self._head.name} says ({head.entries} entries, {head.size} bytes); "
                "it was cut or changed; see `pilotage history --verify`, and restore a copy"
            )
        if size == head.size:
            return head
        rest = os.pread(file.fileno(), size - head.size, head.size)
        whole = rest[: rest.rfind(b"\n") + 1]
        for line in whole.splitlines():
            problem, skeleton, digest = read(line, head.hash, head.entries)
            if problem or skeleton is None:
                raise LedgerError(f"{self._lines}: entry {head.entries}: {problem}")
            head = Head(
                entries=head.entries + 1, size=head.size + len(line) + 1, hash=digest, time=skeleton.time
            )
        if len(whole) < len(rest):
            os.ftruncate(file.fileno(), head.size)
        self._keep(head)
        return head

    # --- verification ----------------------------------------------------------------------------------------
    def verify(self, anchors: Iterable[str] = ()) -> Verification:
        """Reads every line. `anchors` are `seq:hash` of entries (as `Entry.id`) that were kept elsewhere."""
        wanted: dict[int, set[str]] = {}
        for anchor in anchors:
            number, _, digest = anchor.partition(":")
            if not (number.isdecimal() and re.fullmatch("[0-9a-f]{64}", digest)):
                raise SpecError(
                    f"anchor {anchor!r}: not an entry of a ledger; valid: NUMBER:HASH, as 12:9f86d0..."
                )
            wanted.setdefault(int(number), set()).add(digest)
        seq, digest, time_, size = 0, NOTHING, "", 0
        notes: list[str] = []
        unsettled: set[int] = set()
        kept = None

        def found(problem: str) -> Verification:
            return Verification(entries=seq, head=digest, problem=f"entry {seq}: {problem}")

        try:
            head = self.head()
        except LedgerError as error:
            return found(str(error))
        try:
            file = self._lines.open("rb")
        except FileNotFoundError:
            file = None
        with file or contextlib.nullcontext(()) as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    notes.append(
                        f"an append after entry {seq - 1} was interrupted; the next append cuts it off"
                    )
                    break
                problem, skeleton, digest_ = read(line[:-1], digest, seq)
                if problem or skeleton is None:
                    return found(problem)
                if skeleton.time < time_:
                    return found(f"its time {skeleton.time} is before that of the entry before, {time_}")
                if skeleton.of is not None:
                    if skeleton.of not in unsettled:
                        return found(f"it settles entry {skeleton.of}, which is no open intent")
                    unsettled.discard(skeleton.of)
                elif skeleton.outcome == "intent":
                    unsettled.add(seq)
                if seq in wanted and wanted.pop(seq) != {digest_}:
                    return found("its hash is not the one that was kept elsewhere")
                digest, time_, size, seq = digest_, skeleton.time, size + len(line), seq + 1
                if seq == head.entries:
                    kept = (size, digest)
        if head.entries > seq:
            return found(
                f"the ledger ends here, but {self._head.name} says that it has {head.entries} entries"
            )
        if head.entries and kept != (head.size, head.hash):
            return found(f"{self._head.name} is of another ledger (hash {head.hash[:12]}...)")
        if seq and not self._head.exists():
            return found(f"{self._head.name} is missing, without which a cut cannot be told")
        if wanted:
            return found(f"the ledger ends here, but entry {min(wanted)} was kept elsewhere")
        if seq > head.entries:
            notes.append(f"{seq - head.entries} entries after the head: their writer was interrupted")
        notes += [f"entry {of} is an intent without a result" for of in sorted(unsettled)]
        return Verification(entries=seq, head=digest, notes=tuple(notes))

    # --- queries ---------------------------------------------------------------------------------------------
    def entries(
        self,
        service: str | None = None,
        *,
        since: str | None = None,
        until: str | None = None,
        last: int | None = None,
        moves_of: str | None = None,
    ) -> list[Entry]:
        """Entries in order, of one service, from a time to a time (both included, as `utc` writes them), the last so
        many of them.

        `moves_of`: only those by which this alias came to point elsewhere (they name it, and are applied or observed).
        """
        conditions, values = ["1"], []
        for condition, value in (
            ("service = ?", service),
            ("time >= ?", since),
            ("time <= ?", until),
            ("moved = ?", moves_of),
        ):
            if value is not None:
                conditions.append(condition)
                values.append(value)
        where = " AND ".join(conditions)
        query = f"SELECT start, length FROM entries WHERE {where} ORDER BY time DESC, seq DESC LIMIT ?"  # noqa: S608
        return self._index.fetch(query, (*values, -1 if last is None else last))[::-1]

    def entry(self, seq: int) -> Entry:
        found = self._index.fetch("SELECT start, length FROM entries WHERE seq = ?", (seq,))
        if not found:
            raise SpecError(f"{self._lines}: has no entry {seq}")
        return found[0]

    def settlement(self, intent: Entry) -> Entry | None:
        """The result of an intent, if it has one."""
        found = self._index.fetch("SELECT start, length FROM entries WHERE settles = ?", (intent.seq,))
        return found[0] if found else None

    def last_intent(self, service: str, until: str | None = None) -> Entry | None:
        """The last intent of a service, up to a time."""
        last = self._index.fetch(
            "SELECT start, length FROM entries WHERE service = ? AND outcome = 'intent' AND time <= ? "
            "ORDER BY time DESC, seq DESC LIMIT 1",
            (service, until or "~"),  # after every time
        )
        return last[0] if last else None

    def open_intents(self) -> list[Entry]:
        """The intents, of all services, that have no result."""
        return self._index.fetch(
            "SELECT start, length FROM entries AS one WHERE outcome = 'intent' AND NOT EXISTS "
            "(SELECT 1 FROM entries WHERE settles = one.seq) ORDER BY seq",
            (),
        )

    def unsettled(self, service: str) -> Entry | None:
        """The intent of a service that has no result: a writer died, or its registry did not answer."""
        last = self.last_intent(service)
        return last if last is not None and self.settlement(last) is None else None


_encode = msgspec.json.Encoder(order="sorted").encode


def _blotted(record: Record) -> Record:
    before = msgspec.to_builtins(record)
    after = without_secrets(before)
    return record if after == before else msgspec.convert(after, Record)


def _write(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


@contextlib.contextmanager
def _locked(path: Path, within_s: float = 60.0) -> Iterator[None]:
    with path.open("ab") as file:
        deadline = time.monotonic() + within_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{path}: held by another process for more than {within_s:g} s"
                    ) from None
                time.sleep(0.002)
        yield
