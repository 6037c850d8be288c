"""One writer per fleet: a Lease of Kubernetes (`coordination.k8s.io/v1`), held as client-go's leader election holds it.

Whoever wants it reads the record and waits until it has not changed for as long as the record itself says. That is
measured on the waiting host's own clock, from when it saw the record change; the times in a record are for people. So
clocks may be wrong by any amount, but must run at one pace: a holder stops `duration_s - renew_within_s` before anybody
may follow it, which has to cover a drift of that share and a request that is under way. Every write carries the
`resourceVersion` that was read: of two who try at once one is told that it came too late.

The record is renewed by a thread of its own, on a connection of its own, however long a tick takes. Time is that of the
host, asleep or awake: a holder that wakes up late knows that it is none.

Verbs that a role needs: get and update on this one lease; create only where it does not exist yet.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from pilotage.live.endpoint import Answer, Api, Endpoint, said
from pilotage.live.lease import LeaseError, SharedLease
from pilotage.live.targets import TargetError

_RECORD: Final = ("holderIdentity", "leaseDurationSeconds", "acquireTime", "renewTime", "leaseTransitions")
_HOPELESS: Final = frozenset({400, 401, 403, 404, 422})  # trying again does not mend it
_JITTER: Final = 0.2  # of the pause between tries for it
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

Json = dict[str, Any]


def _now_s() -> float:
    return time.clock_gettime(_CLOCK)


class KubernetesLease:
    """The right to write to a fleet, for one process; see `lease.Lease`. `identity` must be this process's alone.

    `tell` hears who is waited for, once per holder, and what goes wrong meanwhile.
    """

    def __init__(
        self,
        spec: SharedLease,
        endpoint: Endpoint,
        namespace: str,
        *,
        identity: str | None = None,
        tell: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.identity = identity or f"{socket.gethostname()}_{uuid.uuid4()}"
        self._spec, self._tell = spec, tell
        self._namespace = spec.namespace or namespace
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{self._namespace}/leases"
        timeout_s = min(endpoint.timeout_s, spec.renew_within_s / 2)
        self._api = Api(endpoint.replace(timeout_s=timeout_s))
        self._name = f"lease {self._namespace}/{spec.name}"
        self._lease: Json = {}  # as it was last seen or written
        self._seen_s = 0.0  # when it was seen to change
        self._until_s: float | None = None  # when it is this process's no more, unless it is renewed
        self._why = "it was not renewed in time"
        self._lost = False
        self._stop = threading.Event()
        self._renewing: threading.Thread | None = None

    # --- what steering asks ----------------------------------------------------------------------------------
    def acquire(self) -> None:
        """Waits until it is this process's; a LeaseError says why it never will be."""
        told = None
        while True:
            try:
                if self._try():
                    break
                wait = f"{self._name} is held by {self._holder!r}; waiting"
            except TargetError as error:
                wait = f"{self._name}: {error}; trying again"
            if wait != told:
                self._tell(wait)
            told = wait
            time.sleep(self._spec.retry_s * (1 + _JITTER * random.random()))  # noqa: S311  (no secret)
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewing.start()

    def renew(self) -> None:
        self.check()

    def check(self) -> None:
        if self._until_s is None:
            raise LeaseError(f"{self._name} is not held")
        if self._lost or _now_s() >= self._until_s:
            self._lost = True  # also if a renewal still comes through
            raise LeaseError(f"{self._name} is lost: {self._why}")

    def release(self) -> None:
        """Gives it back, so that who waits need not wait for its end."""
        self._stop.set()
        if self._renewing is not None:
            self._renewing.join()
        with contextlib.suppress(LeaseError, TargetError):
            self.check()
            self._lost = True
            given = self._lease | {"spec": self._record("", 1, _micro_time())}
            self._write(given, time.monotonic() + self._spec.retry_s)

    # --- the election ----------------------------------------------------------------------------------------
    def _renew(self) -> None:
        while not (self._stop.wait(self._spec.retry_s) or self._lost):
            try:
                if self._try():
                    continue
                self._why = f"somebody else wrote it; its holder is {self._holder!r}"
                self._lost = self._holder != self.identity
            except (LeaseError, TargetError) as error:
                self._why = str(error)
            with contextlib.suppress(LeaseError):
                self.check()

    @property
    def _holder(self) -> str:
        return str(self._spec_of(self._lease).get("holderIdentity") or "")

    def _try(self) -> bool:
        """Takes or renews it, or finds that it is another's. Raises TargetError where the server does not say, and
        LeaseError where it says that this will not do."""
        began_s = _now_s()
        deadline_s = time.monotonic() + self._spec.renew_within_s / 2
        if self._holder == self.identity and self._renewed(began_s, deadline_s):
            return True  # as nobody else has written, there was no need to read
        answer = self._api.ask("GET", f"{self._path}/{self._spec.name}", deadline_s=deadline_s)
        if answer.status == 404:
            fresh = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": self._spec.name, "namespace": self._namespace},
                "spec": self._record(self.identity, self._spec.duration_s, _micro_time())
                | {"leaseTransitions": 0},
            }
            return self._took(self._api.ask("POST", self._path, fresh, deadline_s=deadline_s), began_s)
        self._saw(self._object(answer))
        record = self._spec_of(self._lease)
        valid_until_s = self._seen_s + float(record.get("leaseDurationSeconds") or 0)
        if self._holder not in ("", self.identity) and _now_s() < valid_until_s:
            return False
        return self._renewed(began_s, deadline_s)

    def _renewed(self, began_s: float, deadline_s: float) -> bool:
        now, record = _micro_time(), self._spec_of(self._lease)
        new = self._record(self.identity, self._spec.duration_s, now)
        if self._holder == self.identity:
            new |= {name: record.get(name) for name in ("acquireTime", "leaseTransitions")}
        return self._took(self._write(self._lease | {"spec": new}, deadline_s), began_s)

    def _took(self, answer: Answer, began_s: float) -> bool:
        if answer.status == 409:
            return False
        self._saw(self._object(answer))
        self._until_s = began_s + self._spec.renew_within_s
        return True

    def _write(self, lease: Json, deadline_s: float) -> Answer:
        return self._api.ask("PUT", f"{self._path}/{self._spec.name}", lease, deadline_s=deadline_s)

    def _record(self, holder: str, duration_s: int, now: str) -> Json:
        """What a new holder writes: it counts one change of hands more."""
        before = self._spec_of(self._lease)
        changed = {
            "holderIdentity": holder or None,
            "leaseDurationSeconds": duration_s,
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + (1 if holder else 0),
        }
        return before | changed

    def _saw(self, lease: Json) -> None:
        record, before = self._spec_of(lease), self._spec_of(self._lease)
        if [record.get(name) for name in _RECORD] != [before.get(name) for name in _RECORD]:
            self._seen_s = _now_s()
        self._lease = lease

    @staticmethod
    def _spec_of(lease: Json) -> Json:
        return lease.get("spec") or {}

    def _object(self, answer: Answer) -> Json:
        body, metadata = answer.body, None
        if 200 <= answer.status < 300 and isinstance(body, dict):
            metadata = body.get("metadata")
            if isinstance(metadata, dict) and isinstance(metadata.get("resourceVersion"), str):
                return dict(body)
        why = self._api.clean(f"answered {answer.status}{said(body)}")
        if answer.status in _HOPELESS:
            raise LeaseError(f"{self._name}: {why}; valid: a role with get and update on it, or create")
        raise TargetError(why)


def _micro_time() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
