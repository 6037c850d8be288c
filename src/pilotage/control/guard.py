"""The guard around every policy: bounds, rate limits, hold on missing data, never an exception.

Learned, tuned and heuristic policies run behind the same guard, in training, evaluation and production. In training,
where many worlds run in step, it is `Guard.clamp` alone: bounds (that of a service's dollars among them) and rates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta
from msgspec.structs import replace

from pilotage.control.decisions import Decisions, amounts_of
from pilotage.control.hpa import Hpa
from pilotage.control.policy import (
    INDEX,
    Controller,
    Decision,
    Observation,
    Situation,
    ages_of,
    columns_of,
    counts_of,
    times_of,
    values_of,
)
from pilotage.world.spec import Count, NonNegative, Positive, PositiveCount, Spec, SpecError, closest
from pilotage.world.tokens import MAX_TOKENS

_ABSURD = 1_000_000


class Range(Spec, frozen=True, kw_only=True):
    """What a feature was in training, in the feature's unit."""

    feature: str
    low: float
    high: float

    def __post_init__(self) -> None:
        _check_feature(self.feature)
        if not -math.inf < self.low <= self.high < math.inf:
            raise SpecError(f"range of {self.feature}: {self.low} to {self.high}; valid: low <= high, finite")


class Guard(Spec, frozen=True, kw_only=True):
    """Limits on what any policy may order.

    Replica bounds of None are the service's own. `max_order` and `max_release` limit the replicas ordered or
    released per tick. Nothing is ordered (released) within `order_cooldown_s` (`release_cooldown_s`) of the last change
    of a service's count. `max_usd_per_hour` bounds what each service's replicas cost at their shares of full nodes in
    its dearest pool, `max_total_usd_per_hour` what all services cost: what is there stays, orders are cut.

    A decision is held (nothing changes) while one of the `required` features is missing or older than `stale_after_s`,
    and, unless `fallback` is given, which then decides instead, when the policy fails or is late, when what it orders
    is no sensible number, and when an input is outside its range by more than `outside` times the range's width. While
    `hold` is set or the file `hold_file` exists nothing changes at all, not even for the bounds' sake.
    """

    min_replicas: Count | None = None
    max_replicas: PositiveCount | None = None
    max_order: PositiveCount | None = None
    max_release: PositiveCount | None = None
    order_cooldown_s: NonNegative = 0.0
    release_cooldown_s: NonNegative = 0.0
    max_usd_per_hour: Positive | None = None
    max_total_usd_per_hour: Positive | None = None
    required: tuple[str, ...] = ()
    stale_after_s: NonNegative = 300.0
    ranges: tuple[Range, ...] = ()
    outside: Annotated[float, Meta(ge=0, le=10)] = 0.1
    fallback: Hpa | None = None
    hold: bool = False
    hold_file: str | None = None

    def __post_init__(self) -> None:
        for name in self.required:
            _check_feature(name)

    def limits(self, situation: Situation) -> tuple[int, int]:
        """Fewest and most replicas of a service."""
        service = situation.service
        low = service.min_replicas if self.min_replicas is None else self.min_replicas
        high = service.max_replicas if self.max_replicas is None else self.max_replicas
        if low > high:
            raise SpecError(
                f"guard: min_replicas {low} exceeds max_replicas {high} of service {service.name!r}"
            )
        if self.max_usd_per_hour is not None:
            price = situation.replica_usd_per_hour
            high = min(high, int(self.max_usd_per_hour / price + 1e-9)) if price > 0 else high
            if low > high:
                raise SpecError(
                    f"guard: max_usd_per_hour {self.max_usd_per_hour:g} buys {high} replicas of service "
                    f"{service.name!r} at {price:g} each; valid: enough for its min_replicas {low}"
                )
        return low, high

    def stopped(self) -> str | None:
        """Why everything is held, or None. A file that cannot be looked for counts as one that is there."""
        if self.hold:
            return "hold is set"
        if self.hold_file is None:
            return None
        try:
            Path(self.hold_file).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return f"hold_file cannot be looked for ({error.strerror})"
        return "hold_file is there"

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
        return Guarded(Check(self, [situation]), inner)


class Guarded:
    """A controller behind a guard."""

    def __init__(self, check: Check, inner: Controller) -> None:
        self.check, self._inner = check, inner

    def decide(self, seen: Observation) -> Decision:
        wanted: Decision | Exception
        try:
            wanted = self._inner.decide(seen)
        except Exception as error:  # whatever a policy does, the service goes on
            wanted = error
        return self.check([seen], [wanted])[0]


class Check:
    """What a guard makes of the decisions for some services; `interventions` counts why they were changed or held.

    So many services at a time as `fleet` says (None: all) share the ceiling on their total. `changed_s` says when the
    count of each last changed, where that is known from before.
    """

    def __init__(
        self,
        guard: Guard,
        situations: Sequence[Situation],
        *,
        fleet: int | None = None,
        changed_s: Sequence[float] | None = None,
    ) -> None:
        n = len(situations)
        self._guard, self._fleet = guard, fleet or n
        self._limits = np.array([guard.limits(s) for s in situations], np.int64).reshape(n, 2)
        self._pools = [frozenset(s.service.pools) for s in situations]
        self._variants = [frozenset(variant.name for variant in s.service.variants) for s in situations]
        # a batch that waits beyond the objective makes its first request late
        self._longest_s = [max(s.service.slo_s, s.service.server.batch_wait_ms / 1e3) for s in situations]
        servers = [s.service.llm for s in situations]
        self._chunked = [server is not None and server.scheduler == "chunked" for server in servers]
        self._usd = np.array([s.replica_usd_per_hour for s in situations])
        self._fallbacks = [guard.fallback.begin(s) for s in situations] if guard.fallback else None
        self._known = np.full(n, np.nan)  # replicas, as last counted
        self._most = self._limits[:, 1].astype(float)  # that there can be
        self._changed_s = np.full(n, -np.inf) if changed_s is None else np.array(changed_s, float)
        self.interventions: Counter[str] = Counter()
        ceiling = guard.max_total_usd_per_hour
        if ceiling is not None and n:
            least = float((self._limits[:, 0] * self._usd).reshape(-1, self._fleet).sum(axis=1).max())
            if least > ceiling + 1e-9:
                raise SpecError(
                    f"guard: max_total_usd_per_hour {ceiling:g} is less than what the fewest replicas cost; "
                    f"valid: at least {least:g}"
                )

    def __call__(
        self, seen: Sequence[Observation], wanted: Sequence[Decision | Exception]
    ) -> Sequence[Decision]:
        """What is done in the place of what the policies want, or failed to want; one per service."""
        now_s = times_of(seen)
        counts = counts_of(seen)
        counted = np.isfinite(counts)
        changed = counted & ~np.isnan(self._known) & (counts != self._known)
        self._changed_s[changed] = now_s[changed]
        self._known[counted] = self._most[counted] = counts[counted]
        advice = self._advice(seen, counted)
        stopped = self._guard.stopped()
        if stopped is not None:
            return [self._held(f"everything: {stopped}") for _ in seen]
        missing = self._missing(seen, counted)
        wrong = self._faults(wanted) | self._doubts(seen) | missing
        counts = np.where(counted, counts, 0).astype(np.int64)
        if isinstance(wanted, Decisions) and not wrong:
            return self._limited(wanted, counts, counted, now_s)
        chosen = [
            want
            if isinstance(want, Decision) and k not in wrong
            else self._held(wrong[k])
            if k in missing
            else self._instead(wrong[k], advice[k])
            for k, want in enumerate(wanted)
        ]
        return self._limited(chosen, counts, counted, now_s)

    # --- what is wrong -----------------------------------------------------------------------------------------
    def _missing(self, seen: Sequence[Observation], counted: np.ndarray) -> dict[int, str]:
        """Why rows are held for lack of data."""
        found = dict.fromkeys(np.flatnonzero(~counted).tolist(), "replica counts are missing")
        if self._guard.required:
            values = values_of(seen)
            ages_s = ages_of(seen)
            for name in reversed(self._guard.required):  # the first that is missing is named
                at = INDEX[name]
                bad = ~np.isfinite(values[:, at]) | (ages_s[:, at] > self._guard.stale_after_s)
                found |= dict.fromkeys(np.flatnonzero(bad).tolist(), f"{name} is missing or stale")
        return found

    def _doubts(self, seen: Sequence[Observation]) -> dict[int, str]:
        """Why rows are unlike what the policy knows. What is missing is not outside."""
        found: dict[int, str] = {}
        for known in self._guard.ranges:
            slack = self._guard.outside * (known.high - known.low)
            column = columns_of(seen, [INDEX[known.feature]])[:, 0]
            outside = np.flatnonzero((column < known.low - slack) | (column > known.high + slack))
            for k in outside.tolist():
                found[k] = (
                    f"inputs outside the policy's range: {known.feature} of {column[k]:g}; known from "
                    f"{known.low:g} to {known.high:g}"
                )
        return found

    def _faults(self, wanted: Sequence[Decision | Exception]) -> dict[int, str]:
        """What is wrong with decisions as such, by row."""
        suspect: Iterable[int] = range(len(wanted))
        if isinstance(wanted, Decisions):
            amounts = np.stack([wanted.order, wanted.release])
            suspect = np.flatnonzero(((amounts < 0) | (amounts > _ABSURD)).any(axis=0)).tolist()
        return {k: why for k in suspect if (why := self._fault(k, wanted[k]))}

    def _fault(self, k: int, wanted: Decision | Exception) -> str | None:
        """What is wrong with a decision as such."""
        if isinstance(wanted, Exception):
            return f"policy failed: {type(wanted).__name__}: {wanted}"
        if wanted.variant is not None and wanted.variant not in self._variants[k]:
            return f"variant is not one of the service's: {wanted.variant!r}"
        if wanted.pool is not None and wanted.pool not in self._pools[k]:
            return f"pool is not one the service may use: {wanted.pool!r}"
        order, release, batch = wanted.order, wanted.release, wanted.max_batch or 0
        plain = type(order) is type(release) is type(batch) is int
        if not (plain and 0 <= order <= _ABSURD and 0 <= release <= _ABSURD and 0 <= batch <= _ABSURD):
            for what, count in (("order", order), ("release", release), ("max_batch", batch)):
                if not (isinstance(count, int | np.integer) and 0 <= count <= _ABSURD):
                    return f"{what} is not a sensible number: {count!r}"
        wait_s = wanted.batch_wait_s
        if wait_s is not None and not 0 <= wait_s <= self._longest_s[k]:
            return f"batch_wait_s is not within 0 and {self._longest_s[k]:g}: {wait_s!r}"
        tokens = wanted.chunk_tokens
        if tokens is not None and not self._chunked[k]:
            return "chunk_tokens belongs to an LLM service whose scheduler is chunked, which this one is not"
        if tokens is not None and not (isinstance(tokens, int | np.integer) and 1 <= tokens <= MAX_TOKENS):
            return f"chunk_tokens is not a whole number within 1 and {MAX_TOKENS}: {tokens!r}"
        return None

    # --- what is done about it ---------------------------------------------------------------------------------
    def _advice(self, seen: Sequence[Observation], counted: np.ndarray) -> list[Decision | None]:
        """What the fallback would do. It is asked at every tick, so that it knows the past when it is needed."""
        if self._fallbacks is None:
            return [None] * len(seen)
        return [
            fallback.decide(one) if known else None
            for fallback, one, known in zip(self._fallbacks, seen, counted.tolist(), strict=True)
        ]

    def _held(self, why: str) -> Decision:
        self.interventions[why.partition(":")[0]] += 1
        return Decision(reason=f"held: {why}")

    def _instead(self, why: str, advice: Decision | None) -> Decision:
        if advice is None:
            return self._held(why)
        self.interventions[why.partition(":")[0]] += 1
        return replace(advice, reason=f"fallback, {advice.reason}: {why}")

    def _limited(
        self, chosen: Sequence[Decision], current: np.ndarray, counted: np.ndarray, now_s: np.ndarray
    ) -> Sequence[Decision]:
        """The decisions within all limits; the bounds hold also where a policy does not decide."""
        guard = self._guard
        order, release = amounts_of(chosen)
        since_s = now_s - self._changed_s
        order[since_s < guard.order_cooldown_s] = 0
        release[since_s < guard.release_cooldown_s] = 0
        order, release = guard.clamp(order, release, current, self._limits)
        order, release = np.where(counted, order, 0), np.where(counted, release, 0)
        if guard.max_total_usd_per_hour is not None:
            order = self._affordable(order, release, guard.max_total_usd_per_hour)
        self._most = np.maximum(self._most, self._most + order - release)
        if isinstance(chosen, Decisions):
            changed = (order != chosen.order) | (release != chosen.release)
            if not changed.any():
                return chosen
            self.interventions["limited"] += int(changed.sum())
            return Decisions(
                order, release, lambda k: chosen.why(k) + ("; limited by guard" if changed[k] else "")
            )
        return [
            one
            if o == one.order and r == one.release and type(one.order) is type(one.release) is int
            else self._changed(one, o, r)
            for one, o, r in zip(chosen, order.tolist(), release.tolist(), strict=True)
        ]

    def _changed(self, one: Decision, order: int, release: int) -> Decision:
        if one.reason.startswith("held: ") or (order, release) == (one.order, one.release):
            return replace(one, order=order, release=release)
        self.interventions["limited"] += 1
        return replace(one, order=order, release=release, reason=f"{one.reason}; limited by guard")

    def _affordable(self, order: np.ndarray, release: np.ndarray, ceiling: float) -> np.ndarray:
        """Orders that keep each fleet's bill under the ceiling: those for the fewest replicas, and of what then is left
        the same share of every other order, rounded down.

        A service that cannot be counted costs what it did when it could be, with all that was ordered since; if it
        never could be, all that it may. What is released pays for orders of the same service only: of others it is not
        known yet whether it will go.
        """
        replaced = np.minimum(order, release)
        kept = self._most - replaced
        needed = np.maximum(np.clip(self._limits[:, 0] - kept, 0, order), replaced)
        shape = (-1, self._fleet)
        left = ceiling - ((kept + needed) * self._usd).reshape(shape).sum(axis=1)
        asked = ((order - needed) * self._usd).reshape(shape).sum(axis=1)
        share = np.clip(np.divide(left, asked, out=np.ones_like(left), where=asked > 0), 0, 1)
        granted = np.floor((order - needed) * np.repeat(share, self._fleet) + 1e-9)
        return (needed + granted).astype(np.int64)


def _check_feature(name: str) -> None:
    if name not in INDEX:
        raise SpecError(f"guard: feature {name!r} does not exist; {closest(name, INDEX)}")
