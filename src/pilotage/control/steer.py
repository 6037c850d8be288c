"""The loop: read, decide, apply, wait. Evaluation, rehearsal and production run this one."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from pilotage.control.decisions import Decisions
from pilotage.control.guard import Check, Guard
from pilotage.control.policy import Controller, Decision, Observation, Policy, Situation


class Steerable(Protocol):
    """Anything with services that can be observed and scaled: a simulated cluster or a live one."""

    def read(self) -> Sequence[Observation]: ...

    def apply(self, decisions: Sequence[Decision]) -> None: ...

    def wait(self) -> None: ...


class Decides(Protocol):
    """What says one decision per observation of a cluster."""

    def decide(self, seen: Sequence[Observation]) -> Sequence[Decision]: ...


Record = Callable[[int, Sequence[Observation], Sequence[Decision]], None]
_Ask = Callable[[Sequence[Observation]], Sequence[Decision]]
# whose it is, and for each of them a decision or why there is none
_Answer = tuple[list[int], Sequence[Decision | Exception]]


class Helm:
    """The controllers of all services, one policy per service, behind a guard if there is one.

    Services that share a policy are asked together where the policy can do that. With `within_s` whoever has not
    decided by then has failed for this tick; one that hangs is asked again once it has come back. `fleet` and
    `changed_s` are the guard's (see `Check`).
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        situations: Sequence[Situation],
        guard: Guard | None = None,
        *,
        within_s: float | None = None,
        fleet: int | None = None,
        changed_s: Sequence[float] | None = None,
    ) -> None:
        self.check = Check(guard, situations, fleet=fleet, changed_s=changed_s) if guard else None
        self._within_s = within_s
        self._asked: list[tuple[list[int], _Ask]] = []
        self._hanging: dict[int, threading.Thread] = {}
        rows: dict[int, list[int]] = {}
        for row, policy in enumerate(policies):
            rows.setdefault(id(policy), []).append(row)
        for mine in rows.values():
            policy = policies[mine[0]]
            together = policy.begin_together([situations[row] for row in mine])
            if together is not None:
                self._asked.append((mine, together.decide))
            else:
                self._asked += [([row], _alone(policy.begin(situations[row]))) for row in mine]

    def decide(self, seen: Sequence[Observation]) -> Sequence[Decision]:
        """One decision per observation; without a guard, what a policy raises is raised."""
        wanted = self._wanted(seen)
        if self.check is not None:
            return self.check(seen, wanted)
        if isinstance(wanted, Decisions):
            return wanted
        for one in wanted:
            if isinstance(one, Exception):
                raise one
        return [one for one in wanted if isinstance(one, Decision)]

    def _wanted(self, seen: Sequence[Observation]) -> Sequence[Decision | Exception]:
        """What the controllers say, or raise, or have not said in time, one per observation."""
        answers = self._answers(seen)
        if len(answers) == 1 and len(answers[0][0]) == len(seen):
            return answers[0][1]  # in arrays, if it is said in arrays
        late = TimeoutError(f"no decision within {self._within_s} s")
        found = {row: one for mine, said in answers for row, one in zip(mine, said, strict=True)}
        return [found.get(row, late) for row in range(len(seen))]

    def _answers(self, seen: Sequence[Observation]) -> list[_Answer]:
        """What the controllers say, or raise; who is late says nothing."""
        if self._within_s is None:
            questions = _Questions(self._asked, range(len(self._asked)), seen)
            questions.run()
            return questions.answers
        self._hanging = {k: thread for k, thread in self._hanging.items() if thread.is_alive()}
        questions = _Questions(
            self._asked, [k for k in range(len(self._asked)) if k not in self._hanging], seen
        )
        thread = threading.Thread(target=questions.run, name="policies", daemon=True)
        thread.start()
        thread.join(self._within_s)
        if thread.is_alive():
            questions.given_up = True
            self._hanging[questions.at] = thread
        return list(questions.answers)


class _Questions:
    """Asks controllers one after another, until it is given up; `at` is whom it asks."""

    def __init__(
        self, asked: Sequence[tuple[list[int], _Ask]], which: Sequence[int], seen: Sequence[Observation]
    ) -> None:
        self._asked, self._which, self._seen = asked, which, seen
        self.answers: list[_Answer] = []
        self.at, self.given_up = -1, False

    def run(self) -> None:
        for k in self._which:
            if self.given_up:
                return
            self.at, (mine, ask) = k, self._asked[k]
            said: Sequence[Decision | Exception]
            try:
                said = ask(self._seen if len(mine) == len(self._seen) else [self._seen[row] for row in mine])
                if len(said) != len(mine):
                    raise ValueError(f"{len(said)} decisions for {len(mine)} services")
            except Exception as error:
                said = [error] * len(mine)
            self.answers.append((mine, said))


def _alone(controller: Controller) -> _Ask:
    return lambda seen: [controller.decide(seen[0])]


def steer(
    cluster: Steerable,
    helm: Decides,
    ticks: int | None,
    record: Record | None = None,
    going: Callable[[], bool] = lambda: True,
) -> None:
    """Runs `ticks` control ticks (None: for ever), or fewer: none is begun once `going()` says so.

    `record(tick, observations, decisions)` is called after each. The helm decides for every observation, in the
    cluster's order.
    """
    for tick in itertools.count() if ticks is None else range(ticks):
        if not going():
            return
        seen = cluster.read()
        decisions = helm.decide(seen)
        cluster.apply(decisions)
        cluster.wait()
        if record is not None:
            record(tick, seen, decisions)
