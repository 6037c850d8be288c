"""What a ledger consists of: records, numbered entries, and the lines in which they stand (see `ledger`)."""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime, timedelta
from io import FileIO
from typing import Annotated, Any, BinaryIO, Final, Literal

import msgspec
from msgspec import Meta

from pilotage.world.spec import Spec

SCHEMA: Final = 1
MAX_RECORD_BYTES: Final = 64 * 1024  # larger is payload, which belongs elsewhere; its digest belongs here
NOTHING: Final = "0" * 64  # the hash before the first entry
_HASH, _PREV, _RECORD, _END = b'{"hash":"', b'","prev_hash":"', b'","record":', b"}"
_PREV_AT, _RECORD_AT = 9 + 64, 9 + 64 + 15 + 64
_BODY_AT: Final = _RECORD_AT + len(_RECORD)

Outcome = Literal["intent", "applied", "failed", "refused", "abandoned", "observed", "kept", "proposed"]


def utc(time: datetime) -> str:
    """A time with a zone as ledgers write it: such texts sort as their times do."""
    return time.astimezone(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


class Actor(Spec, frozen=True, kw_only=True, omit_defaults=True):
    """Who or what decided: a person, a rule or a policy (with its version and the digest of its weights)."""

    kind: Literal["human", "rule", "policy", "unknown"]
    name: Annotated[str, Meta(min_length=1)]
    version: str | None = None
    digest: str | None = None
    approver: str | None = None


class Record(Spec, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One event. `outcome` is *intent* before the world is touched, and what came of it in a later entry whose `of`
    is the intent's number; *observed* is what somebody else did, *kept* a decision to change nothing, *proposed* one
    that was not meant to be carried out. `reverts` is the entry that this one takes back.

    The groups `subject` (run, data, environment), `decision` (alternatives, costs), `evidence`, `economics`,
    `response` (the registry's answer, its latency) and `fairness` are free JSON objects without payload or secrets. One
    that is written often may be a struct instead, which is read back as what it was written as: a JSON object.
    """

    kind: Annotated[str, Meta(min_length=1, max_length=40)]
    outcome: Outcome
    service: Annotated[str, Meta(min_length=1, max_length=250)]
    actor: Actor
    reason: Annotated[str, Meta(min_length=1, max_length=2000)]
    alias: str | None = None
    expected_version: str | None = None
    new_version: str | None = None
    artifact_digest: str | None = None
    of: int | None = None
    reverts: int | None = None
    subject: dict[str, Any] = msgspec.field(default_factory=dict)
    decision: dict[str, Any] = msgspec.field(default_factory=dict)
    evidence: dict[str, Any] = msgspec.field(default_factory=dict)
    economics: dict[str, Any] = msgspec.field(default_factory=dict)
    response: dict[str, Any] = msgspec.field(default_factory=dict)
    fairness: dict[str, Any] = msgspec.field(default_factory=dict)


class Entry(Record, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A record with its number (from 0), its time in UTC, the host's monotonic clock, and its hash.

    Times never decrease: where the clock was set back, the time of the entry before stands.
    """

    seq: int
    time: str
    monotonic_s: float
    schema: int = SCHEMA
    hash: str = ""

    @property
    def id(self) -> str:
        """What a registry keeps of this entry."""
        return f"{self.seq}:{self.hash}"

    @property
    def fence(self) -> int:
        """A number that grows with every writer, also from one ledger to its successor: microseconds since 1970."""
        since = datetime.fromisoformat(self.time) - datetime(1970, 1, 1, tzinfo=UTC)
        return since // timedelta(microseconds=1)


class Head(Spec, frozen=True, kw_only=True):
    """Where a ledger ends: number of entries, size in bytes, last hash and time."""

    entries: int = 0
    size: int = 0
    hash: str = NOTHING
    time: str = ""


class LedgerError(Exception):
    """A ledger that is not what it was: the message says where."""


class Skeleton(msgspec.Struct):
    """What verification reads of an entry."""

    seq: int
    time: str
    outcome: str
    schema: int = SCHEMA
    of: int | None = None


# --- lines ---------------------------------------------------------------------------------------------------
_decode_skeleton = msgspec.json.Decoder(Skeleton).decode


def chained(prev: str, raw: bytes) -> str:
    return hashlib.sha256(prev.encode() + raw).hexdigest()


def read(line: bytes, prev: str, seq: int) -> tuple[str, Skeleton | None, str]:
    """A line without its end, checked against the entry before: (problem or "", entry, hash)."""
    if not (
        line.startswith(_HASH)
        and line[_PREV_AT : _PREV_AT + 15] == _PREV
        and line[_RECORD_AT:_BODY_AT] == _RECORD
        and line.endswith(_END)
    ):
        return "not a line of a ledger", None, ""
    if line[_PREV_AT + 15 : _RECORD_AT] != prev.encode():
        return "it does not follow the entry before: an entry was changed, moved, added or removed", None, ""
    raw = line[_BODY_AT:-1]
    digest = chained(prev, raw)
    if line[9:_PREV_AT] != digest.encode():
        return "its hash is not that of its record: it was changed", None, ""
    try:
        skeleton = _decode_skeleton(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return f"not a record: {error}", None, ""
    if skeleton.seq != seq:
        return f"it has number {skeleton.seq}", None, ""
    if skeleton.schema != SCHEMA:
        return f"its schema {skeleton.schema} is unknown; valid: {SCHEMA}", None, ""
    return "", skeleton, digest


def entry_of(line: bytes) -> Entry:
    """The entry in a line; LedgerError where there is none. The hash is not checked."""
    try:
        entry = msgspec.json.decode(line.rstrip(b"\n")[_BODY_AT:-1], type=Entry)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LedgerError(
            f"a line of the ledger is no entry: {error}; see `pilotage history --verify`"
        ) from None
    return msgspec.structs.replace(entry, hash=line[9:_PREV_AT].decode())


def line_of(prev: str, raw: bytes) -> tuple[str, bytes]:
    """The hash and the line of an encoded record after the entry whose hash is `prev`."""
    digest = chained(prev, raw)
    return digest, b"".join((_HASH, digest.encode(), _PREV, prev.encode(), _RECORD, raw, _END, b"\n"))


def ends_at(file: BinaryIO | FileIO, head: Head) -> bool:
    """Whether the line that ends where the head says is the head's."""
    if head.size == 0:
        return head.entries == 0
    start = max(0, head.size - MAX_RECORD_BYTES - _BODY_AT - 2)
    before = os.pread(file.fileno(), head.size - start, start)
    line = before[:-1].rpartition(b"\n")[2]
    return before.endswith(b"\n") and line[9:_PREV_AT] == head.hash.encode()
