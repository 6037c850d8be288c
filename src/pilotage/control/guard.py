"""The guard around every policy: bounds, rate limits, hold on missing data, never an exception.

Learned, tuned and heuristic policies run behind the same guard, in training, evaluation and production.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from pilotage.control.policy import Controller, Decision, Observation, Situation
from pilotage.world.spec import Count, Name, NonNegative, PositiveCount, Spec, SpecError

_ABSURD = 1_000_000


class Guard(Spec, frozen=True, kw_only=True):
    """Limits on what any policy may order.

    Replica bounds of None are the service's own. `max_order` and `max_release` limit the replicas ordered or
    released per tick. A decision is held (nothing changes) while one of the `required` features is missing or
    older than `stale_after_s`, when the policy fails, and when what it orders is not a sensible number.
    """

    min_replicas: Count | None = None
    max_replicas: PositiveCount | None = None
    max_order: PositiveCount | None = None
    max_release: PositiveCount | None = None
    required: tuple[Name, ...] = ()
    stale_after_s: NonNegative = 300.0

    def limits(self, situation: Situation) -> tuple[int, int]:
        """Fewest and most replicas of a service."""
        service = situation.service
        low = service.min_replicas if self.min_replicas is None else self.min_replicas
        high = service.max_replicas if self.max_replicas is None else self.max_replicas
        if low > high:
            raise SpecError(
                f"guard: min_replicas {low} exceeds max_replicas {high} of service {service.name!r}"
            )
        return low, high

    def clamp(
        self, order: np.ndarray, release: np.ndarray, current: np.ndarray, limits: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Orders and releases after rate limits and bounds, in that order; shapes (rows,), `limits` (rows, 2).

        Bounds win over rate limits and over the policy: a service outside its bounds is brought back.
        """
        if self.max_order is not None:
            order = np.minimum(order, self.max_order)
        if self.max_release is not None:
            release = np.minimum(release, self.max_release)
        # releasing first what is not kept, then ordering: both act at once, so what counts is the outcome
        outcome = np.clip(current + order - release, limits[:, 0], limits[:, 1])
        release = np.minimum(np.minimum(release, current), np.maximum(0, current + order - outcome))
        release = np.maximum(release, current - outcome)
        order = outcome - (current - release)
        return order, release

    def begin(self, inner: Controller, situation: Situation) -> Guarded:
        """The controller behind this guard, for one run."""
        return Guarded(Check(self, situation), inner)


class Guarded:
    """A controller behind a guard."""

    def __init__(self, check: Check, inner: Controller) -> None:
        self.check, self._inner = check, inner

    def decide(self, seen: Observation) -> Decision:
        try:
            wanted = self._inner.decide(seen)
        except Exception as error:  # whatever a policy does, the service goes on
            return self.check.failed(seen, error)
        return self.check(seen, wanted)


class Check:
    """What a guard makes of one service's decisions; `interventions` counts why they were changed or held."""

    def __init__(self, guard: Guard, situation: Situation) -> None:
        self._guard = guard
        self._limits = np.array([guard.limits(situation)])
        self._pools = situation.service.pools
        self._variants = [variant.name for variant in situation.service.variants]
        server = (
            situation.service.server
        )  # a batch that waits beyond the objective makes its first request late
        self._longest_s = max(situation.service.slo_s, server.batch_wait_ms / 1e3)
        self.interventions: Counter[str] = Counter()

    def failed(self, seen: Observation, error: Exception) -> Decision:
        """The decision in place of one that the policy failed to make."""
        return self._hold(seen, f"policy failed: {type(error).__name__}: {error}")

    def __call__(self, seen: Observation, wanted: Decision) -> Decision:
        for name in self._guard.required:
            if seen[name] != seen[name] or seen.age(name) > self._guard.stale_after_s:
                return self._hold(seen, f"{name} is missing or stale")
        if not seen.counted:
            return self._hold(seen, "replica counts are missing")
        if wanted.variant is not None and wanted.variant not in self._variants:
            return self._hold(seen, f"variant {wanted.variant!r} is not one of the service's")
        if wanted.pool is not None and wanted.pool not in self._pools:
            return self._hold(seen, f"pool {wanted.pool!r} is not one the service may use")
        for what, count in (("order", wanted.order), ("release", wanted.release)):
            if not (isinstance(count, int | np.integer) and 0 <= count <= _ABSURD):
                return self._hold(seen, f"{what} of {count!r} is not a sensible number")
        wait_s = wanted.batch_wait_s
        if wait_s is not None and not 0 <= wait_s <= self._longest_s:
            return self._hold(seen, f"batch_wait_s of {wait_s!r} is not within 0 and {self._longest_s:g}")
        order, release = self._clamp(wanted.order, wanted.release, seen)
        if (order, release) == (wanted.order, wanted.release):
            return wanted
        self.interventions["limited"] += 1
        return replace(wanted, order=order, release=release, reason=f"{wanted.reason}; limited by guard")

    def _clamp(self, order: int, release: int, seen: Observation) -> tuple[int, int]:
        a, b = self._guard.clamp(
            np.array([order]), np.array([release]), np.array([seen.replicas]), self._limits
        )
        return int(a[0]), int(b[0])

    def _hold(self, seen: Observation, why: str) -> Decision:
        """Nothing changes, except that the bounds still hold where the count is known."""
        self.interventions[why.partition(":")[0]] += 1
        order, release = self._clamp(0, 0, seen) if seen.counted else (0, 0)
        return Decision(order, release, reason=f"held: {why}")
