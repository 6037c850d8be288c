"""One writer at a time: who holds the lease may act, everybody else is told who does, or waits.

A lock in the ledger's folder keeps two processes of a host from one ledger; a lease that hosts share
(`kubernetes_lease`) keeps two ledgers from one fleet.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Annotated, Protocol

from msgspec import Meta

from pilotage.world.spec import Name, Positive, PositiveCount, Spec, SpecError


class LeaseError(Exception):
    """The lease is somebody else's, or was taken away."""


class Lease(Protocol):
    """The right to be the one writer."""

    def acquire(self) -> None:
        """Takes it, waits for it, or raises LeaseError that says who has it."""
        ...

    def renew(self) -> None:
        """Says that the holder lives; raises LeaseError if it is the holder no more."""
        ...

    def check(self) -> None:
        """Raises LeaseError unless it certainly is held at this moment; asks nobody, so that it can be called before
        every write."""
        ...

    def release(self) -> None: ...


class SharedLease(Spec, frozen=True, kw_only=True):
    """A lease of the cluster that is steered; the names and defaults of its times are client-go's in other words.

    It is renewed every `retry_s`. Who has not managed to for `renew_within_s` stops, who waits takes over `duration_s`
    after the last renewal that it saw. `namespace`: by default the target's.
    """

    name: Name = "pilotage-steer"
    namespace: (
        Annotated[str, Meta(min_length=1, max_length=63, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")] | None
    ) = None
    duration_s: PositiveCount = 15
    renew_within_s: Positive = 10.0
    retry_s: Positive = 2.0

    def __post_init__(self) -> None:
        if not self.duration_s > self.renew_within_s > 1.2 * self.retry_s:
            raise SpecError(
                f"lease: duration_s {self.duration_s}, renew_within_s {self.renew_within_s:g} and retry_s "
                f"{self.retry_s:g}; valid: each more than the next, the second more than 1.2 times the third"
            )


class Leases:
    """Several leases as one: all of them are held, or none."""

    def __init__(self, *leases: Lease) -> None:
        self._leases, self._held = leases, list[Lease]()

    def acquire(self) -> None:
        try:
            for lease in self._leases:
                lease.acquire()
                self._held.append(lease)
        except BaseException:
            self.release()
            raise

    def renew(self) -> None:
        for lease in self._leases:
            lease.renew()

    def check(self) -> None:
        for lease in self._leases:
            lease.check()

    def release(self) -> None:
        while self._held:
            self._held.pop().release()


class FileLease:
    """A lock on a file of one host, which names its holder and when it last was alive.

    The kernel takes the lock back from a process that dies, and from no other: a holder that was stopped for an hour
    still is the only writer. Holds for one host, and a file system that locks.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def acquire(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = os.read(file, 1000)
            os.close(file)
            raise LeaseError(
                f"{self._path}: another process steers with this ledger ({_holder(said)}); stop that one first"
            ) from None
        self._file = file
        self.renew()

    def check(self) -> None:
        if self._file is None:
            raise LeaseError(f"{self._path}: the lease is not held")
        try:
            there = self._path.stat().st_ino == os.fstat(self._file).st_ino
        except FileNotFoundError:
            there = False
        if not there:  # somebody else could lock a new file of that name
            raise LeaseError(f"{self._path}: the file of the lease was removed or replaced")

    def renew(self) -> None:
        self.check()
        assert self._file is not None
        text = json.dumps(
            {"pid": os.getpid(), "host": socket.gethostname(), "alive_s": round(time.time(), 3)}
        )
        try:
            os.pwrite(self._file, text.ljust(200).encode(), 0)
        except OSError:
            return  # a full disk: the lock is what counts

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)  # which unlocks it
            self._file = None


def _holder(said: bytes) -> str:
    """What the file says of its holder: for people, and not to be relied on."""
    try:
        found = json.loads(said)
        ago_s = time.time() - float(found["alive_s"])
        return f"process {int(found['pid'])} on {str(found['host'])[:64]!r}, alive {ago_s:.0f} s ago"
    except (ValueError, KeyError, TypeError):
        return "it has not said who it is"
