"""The loop: read, decide, apply, wait. Evaluation, rehearsal and production run this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pilotage.control.policy import Controller, Decision, Observation


class Steerable(Protocol):
    """Anything with services that can be observed and scaled: a simulated cluster or a live one."""

    def read(self) -> Sequence[Observation]: ...

    def apply(self, decisions: Sequence[Decision]) -> None: ...

    def wait(self) -> None: ...


Record = Callable[[int, Sequence[Observation], Sequence[Decision]], None]


def steer(
    cluster: Steerable, controllers: Sequence[Controller], ticks: int, record: Record | None = None
) -> None:
    """Runs `ticks` control ticks; `record(tick, observations, decisions)` is called after each.

    There is one controller per observation, in the cluster's order.
    """
    for tick in range(ticks):
        seen = cluster.read()
        decisions = [
            controller.decide(observation) for controller, observation in zip(controllers, seen, strict=True)
        ]
        cluster.apply(decisions)
        cluster.wait()
        if record is not None:
            record(tick, seen, decisions)
