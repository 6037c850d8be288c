"""The loop: read, decide, apply, wait. Evaluation, rehearsal and production run this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pilotage.control.guard import Check, Guard
from pilotage.control.policy import Controller, Decision, Observation, Policy, Situation, Together


class Steerable(Protocol):
    """Anything with services that can be observed and scaled: a simulated cluster or a live one."""

    def read(self) -> Sequence[Observation]: ...

    def apply(self, decisions: Sequence[Decision]) -> None: ...

    def wait(self) -> None: ...


class Decides(Protocol):
    """What says one decision per observation of a cluster."""

    def decide(self, seen: Sequence[Observation]) -> Sequence[Decision]: ...


Record = Callable[[int, Sequence[Observation], Sequence[Decision]], None]


class Helm:
    """The controllers of all services, one policy per service, behind a guard if there is one.

    Services that share a policy are asked together where the policy can do that.
    """

    def __init__(
        self, policies: Sequence[Policy], situations: Sequence[Situation], guard: Guard | None = None
    ) -> None:
        self._together: list[tuple[list[int], Together]] = []
        self._alone: dict[int, Controller] = {}
        self._checks = [Check(guard, situation) if guard else None for situation in situations]
        rows: dict[int, list[int]] = {}
        for row, policy in enumerate(policies):
            rows.setdefault(id(policy), []).append(row)
        for mine in rows.values():
            policy = policies[mine[0]]
            together = policy.begin_together([situations[row] for row in mine])
            if together is not None:
                self._together.append((mine, together))
            else:
                self._alone |= {row: policy.begin(situations[row]) for row in mine}

    def decide(self, seen: Sequence[Observation]) -> list[Decision]:
        """One decision per observation; without a guard, what a policy raises is raised."""
        found: dict[int, Decision | Exception] = {}
        for mine, together in self._together:
            try:
                found |= dict(zip(mine, together.decide([seen[row] for row in mine]), strict=True))
            except Exception as error:
                found |= dict.fromkeys(mine, error)
        for row, controller in self._alone.items():
            try:
                found[row] = controller.decide(seen[row])
            except Exception as error:
                found[row] = error
        return [self._checked(seen[row], found[row], check) for row, check in enumerate(self._checks)]

    @staticmethod
    def _checked(seen: Observation, wanted: Decision | Exception, check: Check | None) -> Decision:
        if isinstance(wanted, Exception):
            if check is None:
                raise wanted
            return check.failed(seen, wanted)
        return wanted if check is None else check(seen, wanted)


def steer(cluster: Steerable, helm: Decides, ticks: int, record: Record | None = None) -> None:
    """Runs `ticks` control ticks; `record(tick, observations, decisions)` is called after each.

    The helm decides for every observation, in the cluster's order.
    """
    for tick in range(ticks):
        seen = cluster.read()
        decisions = helm.decide(seen)
        cluster.apply(decisions)
        cluster.wait()
        if record is not None:
            record(tick, seen, decisions)
