"""An exported policy as a policy: the measurements through its table, the decisions within its limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from msgspec.structs import replace

from pilotage.control.guard import Check, Guard
from pilotage.control.intake import Intake, Measured
from pilotage.control.policy import (
    Alone,
    Controller,
    Decision,
    Observation,
    Policy,
    Situation,
    Together,
    values_of,
)


class Bundled(Policy, frozen=True, kw_only=True, tag="bundle"):
    """A policy with the table of observations and the guard that it was handed over with."""

    policy: Policy
    observation: tuple[Measured, ...]
    guard: Guard

    def period_s(self) -> float | None:
        return self.policy.period_s()

    def begin(self, situation: Situation) -> Controller:
        return Alone(Handed(self, [situation]))

    def begin_together(self, situations: Sequence[Situation]) -> Together:
        return Handed(self, situations)


class Handed:
    """An exported policy in one run of some services. `counts` says how often which measurement was bad, and how often
    the guard changed or held a decision."""

    def __init__(self, bundled: Bundled, situations: Sequence[Situation]) -> None:
        self._together = bundled.policy.begin_together(situations)
        self._each = [] if self._together else [bundled.policy.begin(s) for s in situations]
        self._intake = Intake(bundled.observation, len(situations))
        self._check = Check(bundled.guard, situations)

    @property
    def counts(self) -> Counter[str]:
        return self._check.interventions + self._intake.counts

    def decide(self, seen: Sequence[Observation]) -> list[Decision]:
        values, notes, changed, held = self._intake(values_of(seen))
        if changed:
            seen = list(seen)
            for row in changed:
                seen[row] = Observation(seen[row].now_s, values[row], seen[row].age_s)
        if self._together is not None:
            decisions = list(self._together.decide(seen))
        else:
            decisions = [one.decide(s) for one, s in zip(self._each, seen, strict=True)]
        decisions = list(self._check(seen, decisions))
        for row, what in notes.items():
            if row in held:
                decisions[row] = Decision(reason=f"held: {'; '.join(what)}")
            else:
                decisions[row] = replace(decisions[row], reason="; ".join([decisions[row].reason, *what]))
        return decisions
