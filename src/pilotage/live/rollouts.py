"""A rollout: a challenger beside the champion, judged interval by interval, until it goes out or back by itself.

The ledger is its memory. The alias `challenger` says that a rollout is under way, and the entry that moved it by which
terms; every interval's counts are an entry with the verdict on them; the end is a promotion or rollback with all of it
as evidence, after which the alias is withdrawn. A process that dies in between leaves nothing half done for long:
`step` and `resume` first read what is there, and every change may be repeated. One that comes in beside another is
refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal

import msgspec
import numpy as np

from pilotage.control.canary import Arm, Evidence
from pilotage.control.rollout import AnyRule, AnySchedule, begun
from pilotage.live.entries import Actor, Entry, Record
from pilotage.live.registries import CHALLENGER, CHAMPION, Version
from pilotage.live.targets import Traffic
from pilotage.live.versions import RefusedError, Versions
from pilotage.world.spec import Count, Probability, Spec, SpecError

STEP: Final = "canary"  # the kind of an interval's entry
_COUNTS: Final = ("requests", "errors", "slow", "labelled", "wrong")


class Terms(Spec, frozen=True, kw_only=True):
    """By what a rollout is judged, and how much traffic it gets (None: as the rule says, or in fixed steps)."""

    rule: AnyRule
    schedule: AnySchedule | None = None


class Progress(Spec, frozen=True, kw_only=True):
    """Where a rollout stands. `outcome` is *promote* or *abort* once it is decided; `share` is the challenger's."""

    challenger: str
    champion: str | None
    intervals: Count
    outcome: Literal["continue", "promote", "abort", "wait"]
    share: Probability
    reason: str
    over: bool = False


class Rollout:
    """The rollouts of one service. `traffic` sends requests to the challenger (None: somebody else reads `share`);
    `actor` is who is named in the ledger, by default the rule; `wait_s` is how long another process may be at work."""

    def __init__(
        self, versions: Versions, service: str, traffic: Traffic | None = None, actor: Actor | None = None,
        wait_s: float = 10.0,
    ) -> None:  # fmt: skip
        self._versions, self._service, self._traffic, self._actor = versions, service, traffic, actor
        self._wait_s = wait_s

    def begin(self, version: str, terms: Terms, reason: str = "a new version is tried") -> Progress:
        """Makes a version the challenger; if it is that already, goes on by the terms it was begun with.

        A version that serves already is on probation: if it turns out bad, the one before comes back. RefusedError
        while another version is on trial, and for versions that are unknown or retired.
        """
        with self._alone():
            begin = self._begin()
            if begin is not None and begin.new_version != version:
                raise RefusedError(
                    f"{self._service}: version {begin.new_version} is on trial; end that first"
                )
            if begin is None:
                if CHALLENGER in self._versions.registry.aliases(self._service):
                    self._withdraw(self._who(terms), "was set without terms to judge it by", {})
                about = {"rollout": msgspec.to_builtins(terms), "champion": self._champion(version)}
                self._versions.promote(
                    self._service, version, actor=self._who(terms), reason=reason, alias=CHALLENGER, decision=about
                )  # fmt: skip
            return self._go_on(*self._known())

    def step(self, seen: Evidence, interval: int | None = None) -> Progress:
        """Takes the counts of one more interval and acts on the verdict. `interval` is its number, from 0 (None: the
        next); one that was taken before changes nothing. SpecError if no rollout is under way, or one is left out,
        ValueError for counts that cannot be."""
        seen.check()
        with self._alone():
            begin, steps = self._known()
            if interval is not None and interval > len(steps):
                raise SpecError(
                    f"{self._service}: interval {interval} came before {len(steps)}, the next one"
                )
            if not _decided(steps) and interval in (None, len(steps)):
                judge, weights, _ = self._replayed(begin, steps)
                verdict = judge.judge(seen)
                share = float(weights.weight(seen))
                steps.append(self._record(begin, verdict.outcome, verdict.reason, share, _plain(seen)))
            return self._go_on(begin, steps)

    def decide(self, outcome: Literal["promote", "abort"], actor: Actor, reason: str) -> Progress:
        """Ends a rollout by somebody's decision; SpecError if none is under way."""
        with self._alone():
            begin, steps = self._known()
            if not _decided(steps):
                steps.append(self._record(begin, outcome, reason, 0.0, {}, actor))
            return self._go_on(begin, steps)

    def resume(self) -> Progress | None:
        """What a process does first that may have died here before; None if no rollout is under way."""
        with self._alone():
            begin = self._begin()
            return None if begin is None else self._go_on(begin, self._steps(begin))

    def follow(self, measured: Iterable[Evidence]) -> Progress | None:
        """Steps through measurements until the end of the rollout, or of these."""
        progress = self.resume()
        for seen in measured:
            if progress is None or progress.over:
                break
            progress = self.step(seen)
        return progress

    # --- what is known -----------------------------------------------------------------------------------------
    def _begin(self) -> Entry | None:
        """The intent by which the rollout under way was begun."""
        self._versions.reconcile(self._service)
        self._versions.reconcile(self._service, CHALLENGER)
        move = self._versions.ledger.entries(self._service, moves_of=CHALLENGER, last=1)
        if not move or move[0].new_version is None or move[0].of is None:
            return None
        begin = self._versions.ledger.entry(move[0].of)
        return begin if "rollout" in begin.decision else None

    def _known(self) -> tuple[Entry, list[Entry]]:
        """The intent of the rollout under way, and its intervals."""
        begin = self._begin()
        if begin is None:
            raise SpecError(f"{self._service}: no rollout is under way; begin one")
        return begin, self._steps(begin)

    def _steps(self, begin: Entry) -> list[Entry]:
        later = self._versions.ledger.entries(self._service, since=begin.time)
        return [e for e in later if e.kind == STEP and e.subject.get("rollout") == begin.seq]

    @staticmethod
    def _replayed(begin: Entry, steps: list[Entry]) -> tuple[Any, Any, float]:
        """Judge and schedule after all intervals, and the challenger's share."""
        terms = msgspec.convert(begin.decision["rollout"], Terms)
        judge, weights = begun(terms.rule, terms.schedule)
        share = float(weights.weight(None))
        for entry in steps:
            if entry.evidence:
                seen = _read(entry.evidence)
                judge.step(seen)
                share = float(weights.weight(seen))
        return judge, weights, share

    def _champion(self, version: str) -> str | None:
        """What a version is judged against: the champion, or the one before if it is that itself."""
        champion = self._versions.registry.aliases(self._service).get(CHAMPION)
        if champion != version:
            return champion
        before = self._versions.earlier(self._service)
        if not before:
            raise SpecError(
                f"{self._service}: version {version} serves, and there is none before it to judge it by"
            )
        return before[-1]

    def _who(self, terms: Terms) -> Actor:
        return self._actor or Actor(kind="rule", name=str(terms.rule.__struct_config__.tag))

    # --- what is done ------------------------------------------------------------------------------------------
    def _record(
        self,
        begin: Entry,
        outcome: str,
        reason: str,
        share: float,
        evidence: dict[str, Any],
        by: Actor | None = None,
    ) -> Entry:
        return self._versions.ledger.append(
            Record(
                kind=STEP, outcome="observed", service=self._service, actor=by or begin.actor, reason=reason,
                expected_version=begin.decision["champion"], new_version=begin.new_version,
                subject={"rollout": begin.seq}, decision={"outcome": outcome, "share": share}, evidence=evidence,
            )
        )[0]  # fmt: skip

    def _go_on(self, begin: Entry, steps: list[Entry]) -> Progress:
        """Lets the world be as the ledger says it should."""
        _, _, share = self._replayed(begin, steps)
        last = steps[-1] if steps else None
        progress = Progress(
            challenger=str(begin.new_version), champion=begin.decision["champion"],
            intervals=sum(bool(e.evidence) for e in steps),
            outcome=last.decision["outcome"] if last else "continue", share=share,
            reason=last.reason if last else "begun",
        )  # fmt: skip
        if last is None or not _decided(steps):
            self._send(progress.challenger, share)
            return progress
        evidence = _summary(begin, steps)
        reason = self._ended(progress, last, evidence)
        self._withdraw(last.actor, reason, evidence)
        return progress.replace(share=0.0, reason=reason, over=True)

    def _ended(self, progress: Progress, last: Entry, evidence: dict[str, Any]) -> str:
        """Promotes the challenger or takes it back; says why."""
        versions, reason = self._versions, last.reason
        serves = versions.registry.aliases(self._service).get(CHAMPION)
        if progress.outcome == "abort":
            self._send(None, 0.0)
            if serves == progress.challenger:
                versions.rollback(
                    self._service, progress.champion, actor=last.actor, reason=reason, evidence=evidence
                )
            return reason
        if serves != progress.challenger:
            try:
                versions.promote(
                    self._service, progress.challenger, actor=last.actor, reason=reason,
                    expected=progress.champion, evidence=evidence,
                )  # fmt: skip
            except RefusedError as error:  # by the bias gate, or somebody else was faster
                reason = str(error)[:1900]
        self._send(None, 0.0)
        return reason

    def _withdraw(self, actor: Actor, reason: str, evidence: dict[str, Any]) -> None:
        self._versions.withdraw(self._service, CHALLENGER, actor=actor, reason=reason, evidence=evidence)

    def _send(self, challenger: str | None, share: float) -> None:
        if self._traffic is not None:
            version: Version | None = None
            if challenger is not None:
                version = self._versions.registry.version(self._service, challenger)
            self._traffic.split(self._service, version, share)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            with self._versions.ledger.alone(f"rollout of {self._service}", self._wait_s):
                yield
        except TimeoutError as error:
            raise RefusedError(f"{self._service}: another process steers its rollout: {error}") from None


def _decided(steps: list[Entry]) -> bool:
    return bool(steps) and steps[-1].decision["outcome"] in ("promote", "abort")


def _plain(seen: Evidence) -> dict[str, Any]:
    """One interval as JSON: what is not 0."""
    out: dict[str, Any] = {}
    for who in ("champion", "canary"):
        arm = getattr(seen, who)
        part: dict[str, Any] = {name: int(getattr(arm, name)) for name in _COUNTS if int(getattr(arm, name))}
        if arm.usd:
            part["usd"] = float(arm.usd)
        if arm.latency is not None:
            part["latency"] = np.asarray(arm.latency).tolist()
        out[who] = part
    return out


def _read(evidence: dict[str, Any]) -> Evidence:
    arms = []
    for who in ("champion", "canary"):
        part = {"requests": 0, **evidence[who]}
        if "latency" in part:
            part["latency"] = np.array(part["latency"])
        arms.append(Arm(**part))
    return Evidence(*arms)


def _summary(begin: Entry, steps: list[Entry]) -> dict[str, Any]:
    """What a rollout has shown, for the entry that ends it: totals by arm, and where each interval is to be found."""
    totals = {
        who: {name: sum(e.evidence[who].get(name, 0) for e in steps if e.evidence) for name in _COUNTS}
        for who in ("champion", "canary")
    }
    return {
        "rollout": begin.id, "intervals": sum(bool(e.evidence) for e in steps), "totals": totals,
        "entries": [steps[0].id, steps[-1].id], "outcome": steps[-1].decision["outcome"], "reason": steps[-1].reason,
    }  # fmt: skip
