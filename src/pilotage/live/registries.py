"""Registries: where versions of models, their lineage and measurements live, and which version an alias points at.

Two members of one protocol: `Folder`, which needs nothing (SQLite in a folder), and `mlflow_server.MlflowServer`. A
registry only stores; who may move what, in which order, and what is written down about it is `versions.Versions`.
Versions are never deleted, only retired by a tag. Text that comes out of a registry is data, and is never run or made
part of a path.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec
from msgspec import Meta

from pilotage.world.spec import Count, Spec, SpecError

CHAMPION: Final = "champion"  # what serves
CHALLENGER: Final = "challenger"  # what is on trial
RETIRED: Final = "pilotage.retired"  # the tag of a version that must not come back; its value says why
ADDED: Final = "pilotage.added"  # the ledger entry that added a version
MOVED: Final = "pilotage.moved"  # the ledger entry that last moved an alias to it

Parameter = str | int | float | bool | None


class RegistryError(Exception):
    """A registry did not do what was asked. Unless it is `UnavailableError`, nothing was changed."""


class UnavailableError(RegistryError):
    """No answer, or none that can be relied on: what was asked may or may not have happened."""


class DeniedError(RegistryError):
    """Not allowed: credentials are missing, wrong, or too weak."""


class MissingError(RegistryError):
    """There is no such model or version."""


class ConflictError(RegistryError):
    """An alias is not where the caller believed it to be, or a later writer has been there."""


class Measure(Spec, frozen=True, kw_only=True, omit_defaults=True):
    """A measured value, on how many examples, and its 95 % interval where it was computed."""

    value: float
    n: Count | None = None
    low: float | None = None
    high: float | None = None


class Data(Spec, frozen=True, kw_only=True, omit_defaults=True):
    """A data set: digest of its contents, number of rows, type by column."""

    name: str
    digest: str
    role: Literal["training", "test", "other"] = "training"
    rows: int | None = None
    columns: dict[str, str] = msgspec.field(default_factory=dict)


class Code(Spec, frozen=True, kw_only=True, omit_defaults=True):
    """A revision, whether files differed from it, and the digest of that difference."""

    revision: str = ""
    dirty: bool = False
    diff_digest: str | None = None


class Paired(Spec, frozen=True, kw_only=True):
    """How a version and the champion of its day answered the same labelled requests: counts by feature and group, as
    `control.fairness.counts_of` gives them. `against` is that champion's number."""

    against: str
    counts: dict[str, dict[str, tuple[Count, ...]]]


class Version(Spec, frozen=True, kw_only=True, omit_defaults=True):
    """A generation of a service's model and where it comes from.

    `version` is what the registry numbers it, empty in a draft; `parents` are versions that it was made from or is to
    replace; `metrics` are overall, `slices` per group (as "sex=1"), `paired` beside the champion; `artifact` says where
    the model is. Metric names that end in `_ms`, `_s` or `_usd` have these units.
    """

    service: str
    version: str = ""
    created: str = ""
    parents: tuple[str, ...] = ()
    code: Code = Code()
    data: tuple[Data, ...] = ()
    parameters: dict[str, Parameter] = msgspec.field(default_factory=dict)
    metrics: dict[str, Measure] = msgspec.field(default_factory=dict)
    slices: dict[str, dict[str, Measure]] = msgspec.field(default_factory=dict)
    paired: Paired | None = None
    environment: dict[str, str] = msgspec.field(default_factory=dict)
    artifact: str = ""
    artifact_digest: str = ""
    tags: dict[str, str] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        service_name(self.service)

    @property
    def retired(self) -> str | None:
        """Why it must not come back, if so."""
        return self.tags.get(RETIRED)

    @property
    def stored(self) -> bytes:
        """What a registry keeps as one piece: all but the number, the time and the tags, which it has itself."""
        return msgspec.json.encode(
            msgspec.structs.replace(self, version="", created="", tags={}), order="sorted"
        )


def service_name(name: str) -> str:
    """The name, or a SpecError if registries could not hold it."""
    if not re.fullmatch(r"[^\x00-\x1f\x7f/:@'\"`%\\]{1,250}", name) or name.strip() != name:
        raise SpecError(
            f"service {name!r}: not a name of a service; valid: 1 to 250 characters, none of / : @ % \\, quotes and "
            "control characters, no space at the ends"
        )
    return name


def alias_name(alias: str) -> str:
    """The alias, or a SpecError if registries could not hold it."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,255}", alias) or re.fullmatch(r"(?i)latest|v\d+", alias):
        raise SpecError(
            f"alias {alias!r}: valid: letters, digits, - and _, but not 'latest' or 'v' and a number, which MLflow "
            "keeps to itself"
        )
    return alias


class Registry(Protocol):
    """What a registry must be able to do. Every write may be repeated; errors are `RegistryError`s."""

    def add(self, draft: Version, key: str) -> str:
        """Stores a draft and returns its number; with a key that was used before, the number it got then."""
        ...

    def added(self, service: str, key: str) -> str | None:
        """The number of the version that was added with a key."""
        ...

    def version(self, service: str, version: str) -> Version: ...

    def versions(self, service: str) -> list[Version]:
        """All versions, in order of their numbers; empty for an unknown service."""
        ...

    def aliases(self, service: str) -> dict[str, str]:
        """The version each alias points at; empty for an unknown service."""
        ...

    def move(
        self, service: str, alias: str, expected: str | None, to: str | None, *, fence: int, key: str
    ) -> None:
        """Points an alias from the `expected` version (None: absent) at another, and reads it back.

        `fence` grows with every writer; a writer with a smaller one than was seen is refused (ConflictError), as is one
        whose expectation is wrong. `key` is kept with the version.
        """
        ...

    def tag(self, service: str, version: str, name: str, value: str) -> None: ...


class Folder(Spec, frozen=True, kw_only=True, tag_field="kind", tag="folder"):
    """The registry that needs no server: SQLite in a folder, which is made with the first version.

    Moving an alias is one transaction, so that compare, fence and write cannot be parted.
    """

    path: Annotated[str, Meta(min_length=1)]

    def add(self, draft: Version, key: str) -> str:
        Path(self.path).mkdir(parents=True, exist_ok=True)
        with self._open() as db:
            known = self._added(db, draft.service, key)
            if known is not None:
                return known
            last = db.execute("SELECT MAX(version) FROM versions WHERE service = ?", (draft.service,))
            number = (last.fetchone()[0] or 0) + 1
            db.execute(
                "INSERT INTO versions VALUES (?, ?, strftime('%Y-%m-%dT%H:%M:%fZ'), ?, ?)",
                (draft.service, number, key, draft.stored),
            )
            for name, value in (draft.tags | {ADDED: key}).items():
                self._tag(db, draft.service, number, name, value)
            return str(number)

    def added(self, service: str, key: str) -> str | None:
        with self._open() as db:
            return self._added(db, service, key)

    def version(self, service: str, version: str) -> Version:
        for found in self._versions(service, version):
            return found
        raise MissingError(f"{self.path}: {service!r} has no version {version!r}")

    def versions(self, service: str) -> list[Version]:
        return self._versions(service, None)

    def aliases(self, service: str) -> dict[str, str]:
        with self._open() as db:
            rows = db.execute(
                "SELECT alias, version FROM aliases WHERE service = ? AND version IS NOT NULL", (service,)
            )
            return {alias: str(version) for alias, version in rows}

    def move(
        self, service: str, alias: str, expected: str | None, to: str | None, *, fence: int, key: str
    ) -> None:
        with self._open() as db:
            row = db.execute(
                "SELECT version, fence FROM aliases WHERE service = ? AND alias = ?", (service, alias)
            ).fetchone()
            now, passed = (None, -1) if row is None else (row[0] and str(row[0]), row[1])
            if passed > fence:
                raise ConflictError(f"{service}@{alias}: writer {passed} came after this one ({fence})")
            if now not in (expected, to):
                raise ConflictError(f"{service}@{alias}: is at version {now}, not {expected}")
            if to is not None:
                number = int(to) if to.isdecimal() else -1
                if not db.execute(
                    "SELECT 1 FROM versions WHERE service = ? AND version = ?", (service, number)
                ).fetchone():
                    raise MissingError(f"{self.path}: {service!r} has no version {to!r}")
                self._tag(db, service, number, f"{MOVED}.{alias}", key)
            db.execute(
                "INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?)",
                (service, alias, None if to is None else int(to), fence),
            )

    def tag(self, service: str, version: str, name: str, value: str) -> None:
        self.version(service, version)
        with self._open() as db:
            self._tag(db, service, int(version), name, value)

    @staticmethod
    def _tag(db: sqlite3.Connection, service: str, version: int, name: str, value: str) -> None:
        db.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?)", (service, version, name, value))

    @staticmethod
    def _added(db: sqlite3.Connection, service: str, key: str) -> str | None:
        row = db.execute(
            "SELECT version FROM versions WHERE service = ? AND key = ?", (service, key)
        ).fetchone()
        return None if row is None else str(row[0])

    def _versions(self, service: str, version: str | None) -> list[Version]:
        one = "" if version is None else " AND version = ?"
        which: tuple[Any, ...] = (service,)
        if version is not None:
            which += (int(version) if version.isdecimal() else -1,)
        with self._open() as db:
            rows = db.execute(
                f"SELECT version, created, body FROM versions WHERE service = ?{one} ORDER BY version",  # noqa: S608
                which,
            ).fetchall()
            tags: dict[int, dict[str, str]] = {}
            query = f"SELECT version, name, value FROM tags WHERE service = ?{one}"  # noqa: S608
            for number, name, value in db.execute(query, which):
                tags.setdefault(number, {})[name] = value
        return [
            msgspec.structs.replace(
                msgspec.json.decode(body, type=Version),
                version=str(number), created=created, tags=tags.get(number, {}),
            )
            for number, created, body in rows
        ]  # fmt: skip

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection within one transaction; an empty one where there is no registry yet."""
        path = Path(self.path)
        try:
            db = sqlite3.connect(path / "registry.db" if path.is_dir() else ":memory:", timeout=10)
        except sqlite3.Error as error:
            raise UnavailableError(f"{self.path}: {error}") from None
        try:
            with db:
                db.execute("PRAGMA synchronous = FULL")
                db.execute("BEGIN IMMEDIATE")
                for table in _TABLES:
                    db.execute(table)
                yield db
        except sqlite3.Error as error:
            raise UnavailableError(f"{self.path}: {error}") from None
        finally:
            db.close()


_TABLES: Final = (
    """CREATE TABLE IF NOT EXISTS versions (
        service TEXT, version INTEGER, created TEXT, key TEXT, body BLOB,
        PRIMARY KEY (service, version), UNIQUE (service, key))""",
    """CREATE TABLE IF NOT EXISTS aliases (
        service TEXT, alias TEXT, version INTEGER, fence INTEGER, PRIMARY KEY (service, alias))""",
    """CREATE TABLE IF NOT EXISTS tags (
        service TEXT, version INTEGER, name TEXT, value TEXT, PRIMARY KEY (service, version, name))""",
)
