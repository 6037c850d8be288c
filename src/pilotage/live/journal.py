"""What a steered fleet leaves in the ledger, per service and tick: what was seen, ordered, why, and what came of it.

A change is an intent before the target is touched, and *applied* or *failed* after. A tick without a change is one
entry, *kept*; what is only said and not done is *proposed*. While the ledger cannot be written nothing may be intended;
what has happened meanwhile waits in memory, and is written when that is possible again.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from pilotage.control.policy import INDEX, Decision, Observation, ages_of
from pilotage.live.entries import Actor, Entry, LedgerError, Record
from pilotage.live.ledger import Ledger
from pilotage.world.spec import SpecError

KIND = "scale"
SETTLER = Actor(kind="rule", name="settle after restart")
_EVIDENCE = sorted([*INDEX, "oldest_age_s"])
# what was seen of a service; a struct, because it is made and written at every tick in half the time of a dict
_Evidence = msgspec.defstruct("_Evidence", [(name, float) for name in _EVIDENCE], frozen=True, gc=False)
_AT = [INDEX.get(name, len(INDEX)) for name in _EVIDENCE]
_UNWRITABLE = (OSError, LedgerError, SpecError, TimeoutError)


class JournalError(Exception):
    """The ledger cannot be written."""


class Journal:
    """A ledger, and up to `most` records that it could not yet take; `lost` counts those beyond."""

    def __init__(self, ledger: Ledger, most: int = 100_000) -> None:
        self.ledger, self._most = ledger, most
        self._waiting: deque[Record] = deque()
        self.lost = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def intend(self, records: Sequence[Record]) -> list[Entry]:
        """Writes what is about to be done; raises JournalError where it cannot: then it must not be done."""
        return self._write([*self._all_waiting(), *records])[-len(records) :] if records else []

    def note(self, records: Sequence[Record]) -> str | None:
        """Writes what has happened, now or later; says why not now."""
        try:
            self._write([*self._all_waiting(), *records])
        except JournalError as error:
            room = self._most - len(self._waiting)
            self._waiting.extend(records[:room])
            self.lost += max(0, len(records) - room)
            return str(error)
        return None

    def _all_waiting(self) -> list[Record]:
        gap = []
        if self.lost:
            why = f"{self.lost} entries were lost while the ledger could not be written"
            gap = [Record(kind="gap", outcome="observed", service="fleet", actor=SETTLER, reason=why)]
        return [*self._waiting, *gap]

    def _write(self, records: Sequence[Record]) -> list[Entry]:
        try:
            entries = self.ledger.append(*records, indexed=False)
        except _UNWRITABLE as error:
            raise JournalError(f"the ledger cannot be written: {error}") from None
        self._waiting.clear()
        self.lost = 0
        return entries

    def catch_up(self) -> None:
        """Brings the index up to date, for which there is time between ticks."""
        with contextlib.suppress(sqlite3.Error, OSError, LedgerError):
            self.ledger.catch_up()

    def unsettled(self) -> dict[str, Entry]:
        """The intents without a result, by service: their writer died."""
        return {entry.service: entry for entry in self.ledger.open_intents() if entry.kind == KIND}


def settled(intent: Entry, count: int | None) -> Record:
    """What became of an intent whose writer died, by what the target has now. It is not done again: the next decision
    is taken on what is there."""
    wanted = intent.decision.get("to")
    there = "the target does not know the service" if count is None else f"the target has {count} replicas"
    return Record(
        kind=KIND,
        outcome="applied" if count == wanted else "abandoned",
        service=intent.service,
        actor=SETTLER,
        reason=f"settled after a restart: {there}, intended were {wanted}",
        of=intent.seq,
        subject=intent.subject,
        decision=intent.decision,
    )


class Story:
    """The records of one tick, of services in a fixed order."""

    def __init__(self, names: Sequence[str], actors: Sequence[Actor], usd_per_hour: np.ndarray) -> None:
        self._names, self._actors, self._usd = names, actors, usd_per_hour

    def tell(
        self,
        tick: str,
        mode: str,
        seen: Sequence[Observation],
        values: np.ndarray,
        decisions: Sequence[Decision],
        current: Sequence[int],
        wanted: Sequence[int],
        outcomes: Sequence[str],
        responses: Mapping[int, str],
    ) -> list[Record]:
        """One record per service, with the outcome that is given for it; `values` are those of all that was seen."""
        ages_s = ages_of(seen)
        oldest_s = np.where(np.isfinite(ages_s), ages_s, 0).max(axis=1)  # of what is known
        columns = np.column_stack([values, oldest_s])[:, _AT]
        evidence = np.round(columns, 6).tolist()
        money = np.round(np.stack([current, wanted], axis=1) * self._usd[:, None], 6).tolist()
        subject = {"tick": tick, "mode": mode, "now_s": round(float(seen[0].now_s), 3)}
        out = []
        for k, decision in enumerate(decisions):
            made: dict[str, Any] = {"from": current[k], "to": wanted[k]}
            if decision.max_batch:
                made["max_batch"] = int(decision.max_batch)
            if decision.pool is not None:
                made["pool"] = decision.pool
            if decision.variant is not None:
                made["variant"] = decision.variant
            now_usd, then_usd = money[k]
            out.append(
                Record(
                    kind=KIND,
                    outcome=outcomes[k],  # type: ignore[arg-type]
                    service=self._names[k],
                    actor=self._actors[k],
                    reason=str(decision.reason)[:2000] or "the policy gives no reason",
                    subject=subject,
                    decision=made,
                    evidence=_Evidence(*evidence[k]),  # type: ignore[arg-type]  # what is missing is null
                    economics={"usd_per_hour": now_usd, "wanted_usd_per_hour": then_usd},
                    response={"target": responses[k][:2000]} if k in responses else {},
                )
            )
        return out


def result(intent: Entry, outcome: str, response: str) -> Record:
    """What came of an intent."""
    return Record(
        kind=intent.kind,
        outcome=outcome,  # type: ignore[arg-type]
        service=intent.service,
        actor=intent.actor,
        reason=intent.reason,
        of=intent.seq,
        subject=intent.subject,
        decision=intent.decision,
        response={"target": response[:2000]},
    )
