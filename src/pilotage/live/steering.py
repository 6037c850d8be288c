"""Steering a live fleet: the face of a simulated cluster on real monitors and targets, for `control.steer`.

At each tick: read the monitor and the target's counts, decide behind the guard, write down what is intended, scale, and
write down what came of it. The target's counts say how many replicas are ordered, the monitor how many are ready: what
was ordered a moment ago and is not yet seen by the monitor is not ordered twice, nor is it by a process that takes over
from one that died. Orders name counts, so that they may be repeated.

Whatever fails is safe: what is unknown is held, a ledger that cannot be written means that nothing is changed, a new
configuration that is invalid is refused. The loop goes on until it is stopped or loses its lease.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import msgspec
import numpy as np

from pilotage.control.guard import Check
from pilotage.control.policy import INDEX, Decision, Observation, Observations, counts_of, values_of
from pilotage.control.steer import Helm
from pilotage.live.advice import Answers
from pilotage.live.clock import Clock
from pilotage.live.entries import Entry, Record
from pilotage.live.journal import Journal, JournalError, Story, result, settled
from pilotage.live.lease import Lease, LeaseError
from pilotage.live.ledger import Ledger
from pilotage.live.monitors import MONDAY_S, Monitor, MonitorError, Reading
from pilotage.live.recordings import Recorder
from pilotage.live.status import Log, Status
from pilotage.live.steer_config import Setup
from pilotage.live.targets import DryRunTarget, Scaled, ScaleOrder, TargetError
from pilotage.world.spec import SpecError

_READY, _STARTING, _PENDING = (INDEX[f"replicas_{what}"] for what in ("ready", "starting", "pending"))
_SHOWN = 20  # changes of one tick in the log


class Steering:
    """A live fleet that can be observed and scaled, and the helm that decides for it."""

    def __init__(
        self,
        setup: Setup,
        *,
        log: Log,
        reload: Callable[[], Setup] | None = None,
        lease: Lease | None = None,
        answers: Answers | None = None,
        clock: Clock | None = None,
        monitor: Monitor | None = None,
        target: Scaled | None = None,
    ) -> None:
        self.setup, self._log, self._reload, self._lease, self._answers = setup, log, reload, lease, answers
        self.status = Status(setup.config.mode, healthy_within_s=max(60.0, 4 * setup.tick_s))
        self.stop, self.reload_asked = threading.Event(), threading.Event()
        self.lost: LeaseError | None = None
        self._clock, self._run, self._tick = clock or Clock(), uuid.uuid4().hex[:12], 0
        self.journal = Journal(Ledger(setup.ledger))
        self._open: dict[str, Entry] = self.journal.unsettled()
        self._monitor = monitor or setup.monitor()
        self._target = target or setup.begin_target(lease)
        self._coming: Reading | None = None
        self._last_repeated: dict[str, str] = {}
        self._print = self._looked = setup.fingerprint()
        self._equip()
        changed_s = [self._last_change_s(name) for name in setup.names] if self._cools() else None
        self._helm = Helm(
            setup.policies,
            setup.situations(self._history()),
            setup.config.guard,
            within_s=setup.config.decide_within_s,
            changed_s=changed_s,
        )
        self._next_s = time.monotonic()

    def _equip(self) -> None:
        """What hangs on the setup."""
        setup = self.setup
        self._usd = np.array([s.replica_usd_per_hour for s in setup.situations()])
        self._story = Story(setup.names, setup.actors, self._usd)
        self._in_force: list[dict[str, int | str]] = [{} for _ in setup.names]
        self._seen_counts: Counter[str] = Counter()
        record = setup.config.record
        folder = setup.files[0].parent
        labels = [one.label for one in setup.subjects]
        self._recorder = Recorder(folder / record, labels) if record else None
        self.status.mode = setup.config.mode
        self.status.replicas = {}

    def _cools(self) -> bool:
        guard = self.setup.config.guard
        return guard.order_cooldown_s > 0 or guard.release_cooldown_s > 0

    def _last_change_s(self, service: str) -> float:
        """When a process before this one last changed a service."""
        last = self.journal.ledger.last_intent(service)
        return -math.inf if last is None else datetime.fromisoformat(last.time).timestamp() - MONDAY_S

    def _history(self) -> list[np.ndarray]:
        """Past arrival rates of every service, from the first that is known; gaps hold what was before them."""
        try:
            found = self._monitor.history_rps(self.setup.history_ticks, self.setup.tick_s)
        except MonitorError as error:
            self._fault("history", str(error))
            found = np.zeros((len(self.setup.services), 0))
        out = []
        for row in found:
            known = np.flatnonzero(~np.isnan(row))
            past = row[known[0] :] if len(known) else row[:0]
            last = np.maximum.accumulate(np.where(np.isnan(past), 0, np.arange(len(past))))
            out.append(past[last])
        return out

    # --- read --------------------------------------------------------------------------------------------------
    def going(self) -> bool:
        """Whether there is another tick."""
        if self.stop.is_set():
            return False
        if self._monitor.replays:
            try:
                self._coming = self._monitor.read()
            except MonitorError as error:
                self._fault("monitor", str(error))
                self._coming = None
            return self._coming is not None
        return True

    def read(self) -> Observations:
        self._began_s = time.perf_counter()
        self._tick += 1
        self._reload_if_changed()
        reading = self._reading()
        if self._recorder is not None:
            try:
                self._recorder.write(reading)
            except OSError as error:
                self._fault("record", f"observations cannot be recorded: {error.strerror}")
        return Observations(np.full(len(reading.values), reading.now_s), reading.values, reading.age_s)

    def _reading(self) -> Reading:
        """What the monitor sees, with the target's counts; nothing, where nothing can be read."""
        if self._monitor.replays:
            assert self._coming is not None
            return self._coming
        counts = self._counts()
        try:
            found = self._monitor.read()
        except MonitorError as error:
            self._fault("monitor", str(error))
            found = None
        except Exception as error:  # a monitor that has a bug must not stop the loop
            self._fault("monitor", f"{type(error).__name__}: {error}")
            found = None
        self._settle(counts)
        shape = (len(self.setup.services), len(INDEX))
        if found is not None and not (
            found.values.shape == found.age_s.shape == shape and math.isfinite(found.now_s)
        ):
            self._fault("monitor", "what it answered makes no sense")
            found = None
        if found is None:
            return Reading.nothing(self._clock.now(time.time() - MONDAY_S), len(self.setup.services))
        values, age_s = found.values.copy(), found.age_s.copy()
        self._count(values, age_s, counts)
        return Reading(self._clock.now(float(found.now_s)), values, age_s)

    def _counts(self) -> Mapping[str, int] | None:
        """Replicas ordered, by service; None where the target does not say."""
        try:
            counts = self._target.counts(self.setup.names)
            return {name: int(n) for name, n in counts.items() if int(n) >= 0}
        except TargetError as error:
            self._fault("target", str(error))
        except Exception as error:
            self._fault("target", f"{type(error).__name__}: {error}")
        return None

    def _count(self, values: np.ndarray, age_s: np.ndarray, counts: Mapping[str, int] | None) -> None:
        """Puts the target's counts into what the monitor saw: ready as seen, the rest is pending and starting."""
        ready = values[:, _READY]
        ordered = np.array(
            [math.nan if counts is None else counts.get(n, math.nan) for n in self.setup.names]
        )
        if isinstance(
            self._target, DryRunTarget
        ):  # it changes nothing, so that what is there is what is seen
            unseen = np.nan_to_num(values[:, [_STARTING, _PENDING]]).sum(axis=1)
            ordered = np.where(np.isnan(ready), ordered, ready + unseen)
            ready = np.where(np.isnan(ready), ordered, ready)
        with np.errstate(invalid="ignore"):
            values[:, _READY] = np.minimum(np.round(ready), ordered)
            pending = np.clip(np.nan_to_num(values[:, _PENDING]), 0, ordered - values[:, _READY])
            values[:, _PENDING] = np.round(pending)
            values[:, _STARTING] = ordered - values[:, _READY] - values[:, _PENDING]
        age_s[:, _STARTING] = age_s[:, _PENDING] = age_s[:, _READY]

    def _settle(self, counts: Mapping[str, int] | None) -> None:
        """Says what became of the intents of a process that died, as soon as the target can be asked."""
        if self._open and counts is not None:
            self._note([settled(intent, counts.get(name)) for name, intent in self._open.items()])
            self._log("settled", services=list(self._open)[:_SHOWN], intents=len(self._open))
            self._open = {}

    # --- decide ------------------------------------------------------------------------------------------------
    def decide(self, seen: Sequence[Observation]) -> list[Decision]:
        self._seen = seen
        try:
            decisions = list(self._helm.decide(seen))
        except Exception as error:  # what the guard could not make safe
            self._fault("helm", f"{type(error).__name__}: {error}")
            return [Decision(reason=f"held: the helm failed: {type(error).__name__}")] * len(seen)
        check = self._helm.check
        if check is not None:
            self.status.interventions.update(check.interventions - self._seen_counts)
            self._seen_counts = check.interventions.copy()
        return decisions

    # --- apply -------------------------------------------------------------------------------------------------
    def apply(self, decisions: Sequence[Decision]) -> None:
        try:
            self._apply(decisions)
        except Exception as error:  # what was intended and has no result is settled at the next tick
            self._fault("apply", f"{type(error).__name__}: {error}")

    def _apply(self, decisions: Sequence[Decision]) -> None:
        seen, mode = self._seen, self.setup.config.mode
        values = values_of(seen)
        counts = counts_of(seen)
        counted = np.isfinite(counts)
        current: list[int] = np.where(counted, counts, 0).astype(int).tolist()
        wanted = [n + one.order - one.release for n, one in zip(current, decisions, strict=True)]
        settings = [self._settings(k, one) for k, one in enumerate(decisions)]
        changes = [
            k
            for k, (known, one) in enumerate(zip(counted.tolist(), decisions, strict=True))
            if known and (one.order or one.release or settings[k])
        ]
        outcomes = ["kept"] * len(seen)
        for k in changes:
            outcomes[k] = "proposed"
        tick = f"{self._run}:{self._tick}"

        def tell(responses: Mapping[int, str]) -> list[Record]:
            return self._story.tell(tick, mode, seen, values, decisions, current, wanted, outcomes, responses)

        acts, responses = bool(changes) and mode != "shadow", {}
        if (
            acts
            and mode == "advise"
            and not self._approved(tick, changes, current, wanted, decisions, settings)
        ):
            acts, responses = False, dict.fromkeys(changes, "nobody said yes in time")
        if acts and not self._holds():
            acts, responses = False, dict.fromkeys(changes, "the lease was lost")
            for k in changes:
                outcomes[k] = "refused"
        if acts:
            for k in changes:
                outcomes[k] = "intent"
            self._act(changes, tell({}), wanted, decisions, settings, outcomes)
        else:
            self._note(tell(responses))
        self._account(current, wanted, counted, outcomes, decisions)

    def _settings(self, k: int, one: Decision) -> dict[str, int | str]:
        """What a decision wants other than it is, besides counts."""
        found: dict[str, int | str] = {}
        in_force = self._in_force[k]
        if one.max_batch and one.max_batch != in_force.get("max_batch", self._seen[k]["max_batch"]):
            found["max_batch"] = int(one.max_batch)
        if one.variant is not None and one.variant != in_force.get("variant"):
            found["variant"] = one.variant
        return found

    def _act(
        self,
        changes: Sequence[int],
        records: Sequence[Record],
        wanted: Sequence[int],
        decisions: Sequence[Decision],
        settings: Sequence[Mapping[str, int | str]],
        outcomes: list[str],
    ) -> None:
        """Carries out changes between two entries: what is intended, and what came of it."""
        others = [record for k, record in enumerate(records) if outcomes[k] == "kept"]
        try:
            intents = self.journal.intend([records[k] for k in changes])
        except JournalError as error:
            self._fault("ledger", str(error))
            for k in changes:
                outcomes[k] = "refused"
            why = "nothing is changed while it cannot be written down"
            refused = [_with(records[k], outcome="refused", response={"target": why}) for k in changes]
            self._note([*others, *refused])
            return
        self._open |= {intent.service: intent for intent in intents}
        orders = [
            ScaleOrder(
                service=self.setup.names[k],
                replicas=wanted[k],
                pool=decisions[k].pool if decisions[k].order else None,
                **settings[k],  # type: ignore[arg-type]
            )
            for k in changes
        ]
        said = self._scale(orders)
        done = []
        for k, order, intent, answer in zip(changes, orders, intents, said, strict=True):
            failed = isinstance(answer, Exception)
            outcomes[k] = "failed" if failed else "applied"
            if not failed:
                for name in ("max_batch", "variant"):
                    if (value := getattr(order, name)) is not None:
                        self._in_force[k][name] = value
            done.append(result(intent, outcomes[k], str(answer)))
        failures = [str(answer) for answer in said if isinstance(answer, Exception)]
        if failures:
            more = f" (and {len(failures) - 1} more orders)" if failures[1:] else ""
            self._fault("target", failures[0] + more)
        self._note([*done, *others])
        for intent in intents:
            self._open.pop(intent.service, None)

    def _scale(self, orders: Sequence[ScaleOrder]) -> Sequence[str | Exception]:
        try:
            said = self._target.scale(orders)
            if len(said) == len(orders):
                return said
            error: Exception = TargetError(f"the target answered {len(said)} of {len(orders)} orders")
        except Exception as raised:
            error = raised
        return [error] * len(orders)

    def _approved(
        self,
        tick: str,
        changes: Sequence[int],
        current: Sequence[int],
        wanted: Sequence[int],
        decisions: Sequence[Decision],
        settings: Sequence[Mapping[str, int | str]],
    ) -> bool:
        lines = [
            f"{self.setup.names[k]}: replicas {current[k]} -> {wanted[k]}"
            + "".join(f", {name} -> {value}" for name, value in settings[k].items())
            + f" ({(wanted[k] - current[k]) * self._usd[k]:+.2f} USD/h): {decisions[k].reason}"
            for k in changes
        ]
        if self._answers is None:
            return False
        self._log("advice", advice=tick, changes=lines[:_SHOWN], more=max(0, len(lines) - _SHOWN) or None)
        return self._answers.ask(tick, lines, self.setup.tick_s, self.stop)

    def _note(self, records: Sequence[Record]) -> None:
        problem = self.journal.note(records)
        self.status.waiting = self.journal.waiting
        if problem is not None:
            self._fault("ledger", problem)

    def _account(
        self,
        current: Sequence[int],
        wanted: Sequence[int],
        counted: np.ndarray,
        outcomes: Sequence[str],
        decisions: Sequence[Decision],
    ) -> None:
        """Metrics and logs of the tick."""
        status, hours, names = self.status, self.setup.tick_s / 3600, self.setup.names
        for what, counts in (("actual", current), ("wanted", wanted)):
            status.usd[what] += float(np.sum(np.array(counts) * self._usd)) * hours
        now, then = (np.where(counted, counts, math.nan).tolist() for counts in (current, wanted))
        status.replicas = dict(zip(names, zip(now, then, strict=True), strict=True))
        tally = Counter(outcomes)
        status.outcomes.update(tally)
        seconds = time.perf_counter() - self._began_s
        status.ticked(seconds)
        for k in [k for k, outcome in enumerate(outcomes) if outcome != "kept"][:_SHOWN]:
            self._log(
                "decision", tick=self._tick, service=names[k], outcome=outcomes[k], replicas=current[k],
                wanted=wanted[k], usd_per_hour=round((wanted[k] - current[k]) * float(self._usd[k]), 4),
                reason=decisions[k].reason,
            )  # fmt: skip
        held = sum(one.reason.startswith("held: ") for one in decisions)
        usd = {what: round(dollars, 4) for what, dollars in status.usd.items()}
        self._log(
            "tick", tick=self._tick, mode=status.mode, seconds=round(seconds, 4), outcomes=dict(tally),
            held=held, usd=usd,
        )  # fmt: skip

    # --- wait --------------------------------------------------------------------------------------------------
    def wait(self) -> None:
        """The rest of the tick: the lease, the index, and sleep until the next is due. Lost time is not made up for."""
        if self._lease is not None:
            self._holds(self._lease.renew)
        if self._monitor.replays:
            return
        self.journal.catch_up()
        self._next_s = max(self._next_s + self.setup.tick_s, time.monotonic())
        while not self.stop.is_set():
            left_s = self._next_s - time.monotonic()
            if left_s <= 0 or self.stop.wait(min(left_s, 1.0)):
                return
            if self._holds() and self.reload_asked.is_set():
                self._reload_if_changed()

    def _holds(self, ask: Callable[[], None] | None = None) -> bool:
        """Whether this still is the one writer; if not, it stops."""
        if self._lease is not None and self.lost is None:
            try:
                (ask or self._lease.check)()
            except LeaseError as error:
                self._fault("lease", str(error))
                self.lost = error
                self.stop.set()
        return self.lost is None

    # --- change ------------------------------------------------------------------------------------------------
    def _reload_if_changed(self) -> None:
        """Takes over a configuration that was changed, or asked to be read again, if it is valid."""
        if self._reload is None:
            return
        seen = self.setup.fingerprint()
        if not self.reload_asked.is_set() and (seen == self._print or seen != self._looked):
            self._looked = seen  # what has changed since the last look may still be being written
            return
        self._print = seen
        self.reload_asked.clear()
        try:
            new = self._reload()
            for name in ("ledger", "listen", "lease"):
                if getattr(new.config, name) != getattr(self.setup.config, name):
                    raise SpecError(f"{name} cannot change while it runs; start anew")
            there, here = new.config.target, self.setup.config.target
            if new.config.lease and any(there.get(name) != here.get(name) for name in ("url", "namespace")):
                raise SpecError("target: the cluster cannot change while its lease is held; start anew")
            self._take_over(new)
        except Exception as error:
            self._fault("reload", f"refused, what ran goes on: {error}")
            return
        self._print = new.fingerprint()
        self._log("reloaded", mode=new.config.mode, services=len(new.services))

    def _take_over(self, new: Setup) -> None:
        """Puts a new setup in the place of the old, whole or not at all. Policies keep what they remember if neither
        they nor their services have changed."""
        old = self.setup
        same_services = (new.services, new.pools, new.tick_s, new.subjects) == (
            old.services, old.pools, old.tick_s, old.subjects,
        )  # fmt: skip
        self.setup = new
        before = self._monitor, self._target, self._helm
        try:
            if new.config.monitor != old.config.monitor or new.subjects != old.subjects:
                self._monitor = new.monitor()
            if new.target != old.target:
                self._target = new.begin_target(self._lease)
            within_s = new.config.decide_within_s
            if same_services and new.policies == old.policies and within_s == old.config.decide_within_s:
                check: Check | None = Check(new.config.guard, new.situations())
            else:
                self._helm = Helm(
                    new.policies, new.situations(self._history()), new.config.guard, within_s=within_s
                )
                check = self._helm.check
            self._equip()
        except Exception:
            self.setup = old
            self._monitor, self._target, self._helm = before
            raise
        if new.config.guard != old.config.guard:  # what it remembers goes with the guard that remembers
            self._helm.check = check

    def _fault(self, part: str, why: str) -> None:
        """Counts a fault and logs it; one that repeats itself is logged once until it changes."""
        self.status.errors[part] += 1
        if self._last_repeated.get(part) != why:
            self._last_repeated[part] = why
            self._log("fault", level="warning", part=part, why=why, tick=self._tick)


def _with(record: Record, **changes: object) -> Record:
    return msgspec.structs.replace(record, **changes)
