"""An exported policy as a policy: the measurements through its table, the decisions within its limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pilotage.control.guard import Check, Guard
from pilotage.control.intake import Intake, Measured
from pilotage.control.policy import (
    INDEX,
    Alone,
    Controller,
    Decision,
    Observation,
    Policy,
    Situation,
    Together,
)

_COUNTS = [INDEX[name] for name in ("replicas_ready", "replicas_starting", "replicas_pending")]


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
        self._guard = bundled.guard
        self._checks = [Check(bundled.guard, s) for s in situations]
        self._limits = np.array([bundled.guard.limits(s) for s in situations])

    @property
    def counts(self) -> Counter[str]:
        return sum((check.interventions for check in self._checks), self._intake.counts)

    def decide(self, seen: Sequence[Observation]) -> list[Decision]:
        values, notes, changed, held = self._intake(np.stack([one.values for one in seen]))
        if changed:
            seen = list(seen)
            for row in changed:
                seen[row] = replace(seen[row], values=values[row])
        if self._together is not None:
            decisions = list(self._together.decide(seen))
        else:
            decisions = [one.decide(s) for one, s in zip(self._each, seen, strict=True)]
        for row in self._doubtful(decisions, values):
            decisions[row] = self._checks[row](seen[row], decisions[row])
        for row, what in notes.items():
            if row in held:
                decisions[row] = Decision(reason=f"held: {'; '.join(what)}")
            else:
                decisions[row] = replace(decisions[row], reason="; ".join([decisions[row].reason, *what]))
        return decisions

    def _doubtful(self, decisions: Sequence[Decision], values: np.ndarray) -> list[int]:
        """The services whose decisions the guard must look at one by one: all but those that it would leave alone."""
        if self._guard.required or len(decisions) == 1:
            return list(range(len(decisions)))
        try:
            order, release = np.array([(d.order, d.release) for d in decisions], np.int64).T
        except (TypeError, ValueError, OverflowError):
            return list(range(len(decisions)))
        current = values[:, _COUNTS].sum(axis=1)
        known = np.nan_to_num(current, nan=0.0).astype(np.int64)
        allowed = self._guard.clamp(order, release, known, self._limits)
        other = (
            (allowed[0] != order) | (allowed[1] != release) | (order < 0) | (release < 0) | np.isnan(current)
        )
        other |= [d.variant is not None or d.pool is not None for d in decisions]
        rows: list[int] = np.flatnonzero(other).tolist()
        return rows
