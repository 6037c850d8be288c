"""Version control: every change of a registry goes through the ledger, and the ledger knows what was live when.

A change is written down as an intent, made, read back, and written down as done (or failed). One writer per service is
at work at a time; each has a fencing number, the time of its intent. Before a move the registry is compared with the
ledger; where somebody else has moved an alias, that is recorded as an external change. A writer that dies leaves an
intent without a result, which the next one settles by looking at the registry: what happened is finished, in the target
too, and what did not is given up. What is to take the champion's place must pass the bias gate; the way back is open.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from pilotage.control.fairness import FairnessGate
from pilotage.live.compare import GATE, judged, written
from pilotage.live.entries import Actor, Entry, Record
from pilotage.live.ledger import Ledger
from pilotage.live.registries import (
    ADDED,
    CHAMPION,
    MOVED,
    RETIRED,
    MissingError,
    Registry,
    RegistryError,
    UnavailableError,
    Version,
    alias_name,
    service_name,
)
from pilotage.live.secrets import without_secrets
from pilotage.live.targets import Target, TargetError
from pilotage.world.spec import Spec, SpecError

_GROUPS: Final = ("subject", "decision", "evidence", "economics", "fairness")
_OUTSIDE: Final = Actor(kind="unknown", name="outside pilotage")
_SETTLER: Final = Actor(kind="rule", name="settle after restart")


class RefusedError(RegistryError):
    """A change that was not made, because it was decided on something that no longer holds."""


class Live(Spec, frozen=True, kw_only=True):
    """What an alias pointed at: since when, why, by whom, and which ledger entry says so.

    `in_doubt` is a version to which a move had begun and was not yet known to be done at that time: either it or
    `version` was live.
    """

    service: str
    alias: str
    at: str
    version: str | None
    since: str | None = None
    reason: str | None = None
    actor: Actor | None = None
    entry: str | None = None
    in_doubt: str | None = None


class Versions:
    """The versions of services: a ledger, a registry, and the target that runs the champion (None: whoever serves
    follows the alias by itself). `wait_s` is how long a change waits for another writer before it is refused, `gate`
    what a new champion must pass (None: nothing)."""

    def __init__(
        self, ledger: Ledger, registry: Registry, target: Target | None = None, wait_s: float = 10.0,
        gate: FairnessGate | None = GATE,
    ) -> None:  # fmt: skip
        self.ledger, self.registry, self.target, self._wait_s = ledger, registry, target, wait_s
        self.gate = gate

    # --- changes ---------------------------------------------------------------------------------------------
    def add(self, draft: Version, *, actor: Actor, reason: str) -> str:
        """Registers a new version, without the secrets that its texts may hold; returns its number."""
        texts = {
            name: without_secrets(getattr(draft, name))
            for name in ("parameters", "environment", "tags", "artifact")
        }
        draft = msgspec.structs.replace(draft, **texts)
        about = Record(
            kind="register", outcome="intent", service=draft.service, actor=actor, reason=reason,
            artifact_digest=draft.artifact_digest or None,
            subject={
                "code": draft.code, "environment": draft.environment, "parents": draft.parents,
                "data": {one.name: one.digest for one in draft.data},
            },
        )  # fmt: skip
        with self._alone(about):
            self._settle_open(draft.service)
            result = self._change(
                about,
                lambda intent: {"new_version": self.registry.add(draft, self._key(intent))},
            )
            return str(result.new_version)

    def promote(
        self,
        service: str,
        version: str,
        *,
        actor: Actor,
        reason: str,
        alias: str = CHAMPION,
        expected: str | msgspec.UnsetType | None = msgspec.UNSET,
        override: str | None = None,
        **groups: Any,
    ) -> Entry:
        """Points an alias at a version, and makes the target run it if it is the champion.

        `expected` is the version that the decision was made against (None: no alias); not given, it is what the
        ledger says at the call. Where that no longer holds, the change is recorded as refused, and RefusedError is
        raised. So it is where the champion is replaced by what the bias gate refuses, unless `override` says why it
        should be all the same; verdict and override stand in the entry. A move to where the alias is already changes
        nothing. `groups` are groups of `entries.Record`, as
        evidence. Returns the entry that records the result.
        """
        believed = self._points_at(service, alias) if expected is msgspec.UNSET else expected
        about = Record(
            kind="promote", outcome="intent", service=service_name(service), actor=actor, reason=reason,
            alias=alias_name(alias), expected_version=believed, new_version=version, **groups,
        )  # fmt: skip
        return self._move(about, override)

    def rollback(
        self, service: str, to: str | None = None, *, actor: Actor, reason: str, alias: str = CHAMPION, **groups: Any
    ) -> Entry:  # fmt: skip
        """Goes back to the version before the present one, or to any earlier one, in registry and target.

        A second rollback goes further back, not forth again.
        """
        self.reconcile(service, alias)
        now, before = self._points_at(service, alias), self.earlier(service, alias)
        if to is None and not before:
            raise SpecError(
                f"{service}@{alias}: there is no earlier version to go back to; the ledger has seen "
                + (f"only {now}" if now else "none")
            )
        last = self.ledger.entries(service, moves_of=alias, last=1)
        about = Record(
            kind="rollback", outcome="intent", service=service, actor=actor, reason=reason, alias=alias,
            expected_version=now, new_version=to or before[-1], reverts=last[0].seq if last else None,
            **groups,
        )  # fmt: skip
        return self._move(about)

    def withdraw(self, service: str, alias: str, *, actor: Actor, reason: str, **groups: Any) -> Entry:
        """Takes an alias away, that of the champion excepted: a service without one would serve nothing."""
        if alias == CHAMPION:
            raise SpecError(f"{service}@{alias}: is not withdrawn; promote another version, or roll back")
        about = Record(
            kind="withdraw", outcome="intent", service=service_name(service), actor=actor, reason=reason,
            alias=alias_name(alias), expected_version=self._points_at(service, alias), **groups,
        )  # fmt: skip
        return self._move(about)

    def retire(self, service: str, version: str, *, actor: Actor, reason: str) -> Entry:
        """Marks a version that nothing needs; it stays in the registry but cannot be promoted any more."""
        about = Record(
            kind="retire", outcome="intent", service=service_name(service), actor=actor, reason=reason,
            new_version=version,
        )  # fmt: skip
        with self._alone(about):
            self._settle_open(service)
            for alias, at in self.registry.aliases(service).items():
                if version in (at, *self.earlier(service, alias)[-1:]):
                    what = "is" if at == version else "is what a rollback would restore as"
                    raise self._refuse(about, f"version {version} {what} {service}@{alias}")
            self.registry.version(service, version)

            def act(_: Entry) -> dict[str, Any]:
                self.registry.tag(service, version, RETIRED, reason)
                return {}

            return self._change(about, act)

    def reconcile(self, service: str, alias: str = CHAMPION) -> list[Entry]:
        """Brings ledger, registry and target together; returns the entries that were needed for it.

        Settles what a writer left unfinished, records what somebody else changed, and lets the target run what the
        champion points at. To be called at every start and tick.
        """
        first = self.ledger.entries(last=1)
        try:
            with self.ledger.alone(service_name(service), self._wait_s):
                self._settle_open(service)
                version, _ = self._observed(service, alias_name(alias))
                if alias == CHAMPION:
                    self._deploy(service, version)
        except TimeoutError as error:
            raise RefusedError(f"{service}: another writer is at work: {error}") from None
        seen = first[0].seq if first else -1
        return [e for e in self.ledger.entries(service, last=20) if e.seq > seen]

    def _move(self, about: Record, override: str | None = None) -> Entry:
        service, alias, to = about.service, str(about.alias), about.new_version
        with self._alone(about):
            self._settle_open(service)
            now, adopted = self._observed(service, alias)
            if now == to:
                if alias == CHAMPION:
                    self._deploy(service, now)
                for last in self.ledger.entries(service, moves_of=alias, last=1):
                    return last
                raise self._refuse(about, "there is no such alias")
            if adopted and about.expected_version is None:
                about = msgspec.structs.replace(about, expected_version=now)
            if now != about.expected_version:
                raise self._refuse(about, f"it is at version {now}, not {about.expected_version}")
            if to is not None:
                about = self._allowed(about, now, to, override)

            def act(intent: Entry) -> dict[str, Any]:
                self.registry.move(service, alias, now, to, fence=intent.fence, key=self._key(intent))
                if alias != CHAMPION:
                    return {}
                try:
                    return {"target": self._deploy(service, to)}
                except TargetError:
                    self.registry.move(service, alias, to, now, fence=intent.fence, key=self._key(intent))
                    raise

            return self._change(about, act)

    def _allowed(self, about: Record, now: str | None, to: str, override: str | None) -> Record:
        """The move to a version that exists, is not retired, and, where it replaces the champion, passes the bias gate,
        whose verdict is added; RefusedError for others."""
        service, gate = about.service, self.gate
        try:
            candidate = self.registry.version(service, to)
        except MissingError as error:
            known = [v.version for v in self.registry.versions(service) if v.retired is None]
            raise self._refuse(about, f"{error}; valid: {', '.join(known) or 'none'}") from None
        if candidate.retired is not None:
            raise self._refuse(about, f"version {to} is retired: {candidate.retired}")
        if gate is None or now is None or about.kind != "promote" or about.alias != CHAMPION:
            return about
        try:
            verdict = judged(gate, self.registry.version(service, now), candidate)
        except (
            MissingError
        ):  # the champion was deleted: nothing is known that the new one could be worse than
            return about
        fairness = about.fairness | written(gate, verdict)
        if override is not None:
            fairness["override"] = override
        about = msgspec.structs.replace(about, fairness=fairness)
        if gate.refuses(verdict) and override is None:
            raise self._refuse(about, f"bias gate, {verdict.outcome}: {verdict.reason}")
        return about

    def _change(self, about: Record, act: Callable[[Entry], dict[str, Any]]) -> Entry:
        """Intent, act, result. Where the registry does not answer, the intent is settled by looking, if it can be."""
        intent = self.ledger.append(about)[0]
        began = time.monotonic()
        try:
            response = act(intent)
        except UnavailableError as error:
            result = self._settle(intent)
            if result.outcome != "applied":
                raise UnavailableError(f"{error}; it was not done, as the registry says by now") from None
            return result
        except (RegistryError, TargetError, SpecError) as error:
            self._conclude(intent, "failed", intent.actor, response={"error": str(error)})
            raise
        changes = {key: response.pop(key) for key in ("new_version",) if key in response}
        response["latency_s"] = round(time.monotonic() - began, 6)
        return self._conclude(intent, "applied", intent.actor, response=response, **changes)

    def _conclude(self, intent: Entry, outcome: str, actor: Actor, **changes: Any) -> Entry:
        fields = {name: getattr(intent, name) for name in Record.__struct_fields__}
        fields |= {group: {} for group in _GROUPS}  # these stand with the intent
        fields |= {"outcome": outcome, "of": intent.seq, "actor": actor} | changes
        return self.ledger.append(Record(**fields))[0]

    @contextlib.contextmanager
    def _alone(self, about: Record) -> Iterator[None]:
        try:
            with self.ledger.alone(about.service, self._wait_s):
                yield
        except TimeoutError:
            raise self._refuse(
                about, f"another writer was at work for more than {self._wait_s:g} s"
            ) from None

    def _refuse(self, about: Record, why: str) -> RefusedError:
        self.ledger.append(msgspec.structs.replace(about, outcome="refused", response={"refused": why}))
        return RefusedError(f"{about.service}: {about.kind} of version {about.new_version} refused: {why}")

    # --- agreement -------------------------------------------------------------------------------------------
    def _settle_open(self, service: str) -> None:
        intent = self.ledger.unsettled(service)
        if intent is not None:
            self._settle(intent)

    def _settle(self, intent: Entry) -> Entry:
        """The result of an intent whose writer does not know or is dead, from what the registry says."""
        service, response = intent.service, {"settled": "from what the registry says"}
        if intent.kind == "register":
            number = self.registry.added(service, self._key(intent))
            done, changes = number is not None, {"new_version": number}
        elif intent.kind == "retire":
            done, changes = self.registry.version(service, str(intent.new_version)).retired is not None, {}
        else:
            at = self.registry.aliases(service).get(str(intent.alias))
            done, changes = at == intent.new_version, {}
            if intent.alias == CHAMPION:
                response["target"] = self._deploy(service, at)
        return self._conclude(
            intent, "applied" if done else "abandoned", _SETTLER, response=response, **changes
        )

    def _observed(self, service: str, alias: str) -> tuple[str | None, bool]:
        """Where the alias is, and whether the ledger sees it for the first time; a change by others is recorded."""
        last = self.ledger.entries(service, moves_of=alias, last=1)
        believed = last[0].new_version if last else None
        now = self.registry.aliases(service).get(alias)
        if now != believed:
            self.ledger.append(
                Record(
                    kind="external_change", outcome="observed", service=service, actor=_OUTSIDE, alias=alias,
                    expected_version=believed, new_version=now,
                    reason="the registry differs from the ledger" if last else "first seen",
                )
            )  # fmt: skip
        return now, not last

    def _deploy(self, service: str, version: str | None) -> str:
        if self.target is None or version is None:
            return "no target"
        if self.target.running(service) == version:
            return f"runs version {version}"
        return self.target.deploy(service, self.registry.version(service, version))

    # --- questions -------------------------------------------------------------------------------------------
    def _points_at(self, service: str, alias: str) -> str | None:
        last = self.ledger.entries(service, moves_of=alias, last=1)
        return last[0].new_version if last else None

    def earlier(self, service: str, alias: str = CHAMPION) -> list[str]:
        """The versions that rollbacks would restore, the next one last."""
        stack: list[str] = []
        now = None
        for entry in self.ledger.entries(service, moves_of=alias):
            now = entry.new_version
            if now is None:
                continue
            if entry.kind != "promote" and now in stack:
                while stack[-1] != now:
                    stack.pop()
            else:
                stack.append(now)
        return stack[:-1] if stack and stack[-1] == now else stack

    def live_at(self, service: str, at: str, alias: str = CHAMPION) -> Live:
        """What the alias pointed at at a time (as `entries.utc`), and why."""
        move = self.ledger.entries(service_name(service), until=at, moves_of=alias_name(alias), last=1)
        doubt = self.ledger.last_intent(service, at)
        if doubt is not None:
            result = self.ledger.settlement(doubt)
            if doubt.alias != alias or (
                result is not None and (result.time <= at or result.outcome != "applied")
            ):
                doubt = None
        live = Live(
            service=service, alias=alias, at=at, version=None, in_doubt=doubt.new_version if doubt else None
        )
        if not move:
            return live
        found = move[0]
        return msgspec.structs.replace(
            live, version=found.new_version, since=found.time, reason=found.reason, actor=found.actor, entry=found.id
        )  # fmt: skip

    def anchors(self, service: str) -> tuple[list[str], list[str]]:
        """Entries of this ledger that the registry's tags name, to verify it by, and names of other ledgers there."""
        own, others = [], set()
        for version in self.registry.versions(service):
            for name, value in version.tags.items():
                if name == ADDED or name.startswith(MOVED):
                    ledger, _, entry = value.partition(":")
                    if ledger == self.ledger.name:
                        own.append(entry)
                    else:
                        others.add(ledger)
        return own, sorted(others)

    def _key(self, intent: Entry) -> str:
        return f"{self.ledger.name}:{intent.id}"
