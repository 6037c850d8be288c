"""When a model is retrained: rules on what is known of a version's errors.

Time runs in batches. Before batch t a policy sees (`Seen`) the errors of the deployed version on the batches since it
was trained, as far as their labels have come, and beside them the errors of a *probe*: a small model that is fitted
anew for every batch, in milliseconds, on the newest labels. The probe errs more than the real model, but it is never
stale, so it tells a hard batch from a version that has lost touch (the reactive learner of Bach & Maloof, Paired
learners for concept drift, ICDM 2008). What was recorded before the deployment is its `Past`: errors of earlier
versions on later batches, if they were kept running in the shadow. A policy answers whether to retrain now; the next
batch is then served by the new version. `control.learned_retraining` is the policy that was learned. Rules and their
sources: CARA-T, CARA-CT and CARA-P: Mahadevan & Mathioudakis, Cost-aware retraining for machine learning, 2024; ski
rental: Karlin et al., Algorithmica 3, 1988; forecast quantile: after Regol et al., When to retrain a machine learning
model, ICML 2025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Annotated, Final, Protocol

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.world.spec import Spec, SpecError

_LOG: Final = {"log": True}
_NONE: Final = np.zeros(0, np.int64)


class Stakes(Spec, frozen=True, kw_only=True):
    """What a retraining costs, in wrong answers (`price`), and what is at stake.

    A batch has `batch_size` labelled answers, whose labels come `label_delay` batches late; `batches` is how long the
    deployment lasts.
    """

    price: Annotated[float, Meta(gt=0)]
    batch_size: Annotated[int, Meta(ge=1)]
    batches: Annotated[int, Meta(ge=1)]
    label_delay: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.label_delay >= self.batches:
            raise SpecError(
                f"label_delay {self.label_delay} is not shorter than the deployment of {self.batches} batches; "
                f"valid: below {self.batches}"
            )


class Past(msgspec.Struct, frozen=True):
    """Errors of earlier versions on the batches before the deployment: int array (batches, batches), [s, t] for t >=
    s.

    `probe` are the probe's on the same batches, shape (batches,), or (0,) if none ran. Without any past, both are
    empty.
    """

    errors: np.ndarray
    probe: np.ndarray = _NONE


NO_PAST: Final = Past(np.zeros((0, 0), np.int64))


class Seen(msgspec.Struct, frozen=True):
    """What is known before a batch.

    `errors` are the deployed version's on its first batches, as far as labels have come (one less per batch of
    delay), and `probe` the probe's on the same ones, or empty if none runs. `age` is how many batches the version has
    served, `left` how many are to come. `drift` are scores, from 0 to 1, of how far the inputs of those batches have
    moved, known at once, or empty. `load` is the cluster's arrival rate over its mean of the last day (NaN: unknown).
    """

    errors: np.ndarray
    age: int
    left: int
    probe: np.ndarray = _NONE
    drift: np.ndarray = _NONE
    load: float = math.nan


class Retrainer(Protocol):
    """A retraining policy in one deployment."""

    def decide(self, seen: Seen) -> bool:
        """Whether to retrain before the next batch."""
        ...


class Retraining(Spec, frozen=True, kw_only=True, tag_field="kind"):
    """A retraining policy."""

    @property
    def makes_room(self) -> bool:
        """Whether serving gives up a replica for a training job that finds no node."""
        return False

    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        raise NotImplementedError


class _Rule:
    """A rule that remembers nothing."""

    def __init__(self, policy: _Ruled, stakes: Stakes) -> None:
        self._policy, self._stakes = policy, stakes

    def decide(self, seen: Seen) -> bool:
        return seen.age > 0 and len(seen.errors) > 0 and self._policy.says(seen, self._stakes)


class _Ruled(Retraining, frozen=True, kw_only=True):
    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        return _Rule(self, stakes)

    def says(self, seen: Seen, stakes: Stakes) -> bool:
        raise NotImplementedError


class Never(_Ruled, frozen=True, kw_only=True, tag="never"):
    def says(self, seen: Seen, stakes: Stakes) -> bool:
        return False


class Periodic(Retraining, frozen=True, kw_only=True, tag="periodic"):
    """Every so many batches (CARA-P), whatever the labels say; 1 is always."""

    every_batches: Annotated[int, Meta(ge=1, le=1000, extra=_LOG)] = 10

    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        return _Clock(self.every_batches)


class _Clock:
    def __init__(self, every_batches: int) -> None:
        self._every_batches = every_batches

    def decide(self, seen: Seen) -> bool:
        return seen.age >= self._every_batches


class ErrorThreshold(_Ruled, frozen=True, kw_only=True, tag="error-threshold"):
    """When the last batch's error rate exceeds a fixed one: what a static alert does."""

    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.2

    def says(self, seen: Seen, stakes: Stakes) -> bool:
        return bool(seen.errors[-1] > self.threshold * stakes.batch_size)


class InputDrift(Retraining, frozen=True, kw_only=True, tag="input-drift"):
    """When the mean of the last batches' input-drift scores exceeds a threshold; needs no labels."""

    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.2
    window_batches: Annotated[int, Meta(ge=1, le=100, extra=_LOG)] = 3

    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        return _InputDrift(self)


class _InputDrift:
    def __init__(self, policy: InputDrift) -> None:
        self._policy = policy

    def decide(self, seen: Seen) -> bool:
        recent = seen.drift[-self._policy.window_batches :]
        return len(recent) > 0 and bool(recent.mean() > self._policy.threshold)


class CaraT(_Ruled, frozen=True, kw_only=True, tag="cara-t"):
    """When the last batch's error rate exceeds the first one's by a threshold."""

    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.05

    def says(self, seen: Seen, stakes: Stakes) -> bool:
        beyond = seen.errors[-1] - seen.errors[0]
        return len(seen.errors) > 1 and bool(beyond >= self.threshold * stakes.batch_size)


class CaraCt(_Ruled, frozen=True, kw_only=True, tag="cara-ct"):
    """When the sum of such differences exceeds a threshold, in batches of wrong answers."""

    threshold: Annotated[float, Meta(ge=0, le=100)] = 0.2

    def says(self, seen: Seen, stakes: Stakes) -> bool:
        beyond = (seen.errors - seen.errors[0]).sum()
        return len(seen.errors) > 1 and bool(beyond >= self.threshold * stakes.batch_size)


class SkiRental(_Ruled, frozen=True, kw_only=True, tag="ski-rental"):
    """When the errors beyond the first batch's have cost `factor` retrainings; `positive`: beyond the best batch's,
    and counted only where positive."""

    factor: Annotated[float, Meta(ge=0.1, le=10, extra=_LOG)] = 1.0
    positive: bool = False

    def says(self, seen: Seen, stakes: Stakes) -> bool:
        least = seen.errors.min() if self.positive else seen.errors[0]
        beyond = np.maximum(seen.errors - least, 0 if self.positive else -math.inf)
        return bool(beyond.sum() >= self.factor * stakes.price)


class FreshSki(Retraining, frozen=True, kw_only=True, tag="fresh-ski"):
    """The same beyond a moving average (weight 0.3) of the first batches of all versions so far."""

    factor: Annotated[float, Meta(ge=0.1, le=10, extra=_LOG)] = 0.5

    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        return _FreshSki(self, stakes)


class _FreshSki:
    def __init__(self, policy: FreshSki, stakes: Stakes) -> None:
        self._least, self._fresh, self._own = policy.factor * stakes.price, math.nan, math.nan

    def decide(self, seen: Seen) -> bool:
        if seen.age == 0 or len(seen.errors) == 0:
            self._own = math.nan if seen.age == 0 else self._own
            return False
        if math.isnan(self._own):
            self._own = float(seen.errors[0])
            self._fresh = self._own if math.isnan(self._fresh) else 0.7 * self._fresh + 0.3 * self._own
        if float((seen.errors - self._fresh).sum()) >= self._least:
            self._own = math.nan
            return True
        return False


class Paired(Retraining, frozen=True, kw_only=True, tag="paired"):
    """When the last batches' errors beyond what a fresh version would make, kept up for `horizon_batches` or to the
    end, cost `factor` retrainings. What a fresh version would make is the probe's errors times a ratio, which is
    learned from the past and from every version's first batch; without a probe, the mean of those."""

    window_batches: Annotated[int, Meta(ge=1, le=100, extra=_LOG)] = 8
    horizon_batches: Annotated[int, Meta(ge=1, le=1000, extra=_LOG)] = 20
    factor: Annotated[float, Meta(ge=0.1, le=10, extra=_LOG)] = 2.0

    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        return _Paired(self, stakes, past)


class _Paired:
    def __init__(self, policy: Paired, stakes: Stakes, past: Past) -> None:
        self._policy, self._stakes = policy, stakes
        self._fresh, self._beyond, self._new = *level_of(past), True

    def decide(self, seen: Seen) -> bool:
        self._new = self._new or seen.age == 0
        if seen.age == 0 or len(seen.errors) == 0:
            return False
        probe = seen.probe if len(seen.probe) else np.ones(len(seen.errors))
        if self._new:
            self._fresh, self._beyond = learn_level(self._fresh, self._beyond, seen.errors[0], probe[0])
            self._new = False
        recent = slice(-self._policy.window_batches, None)
        excess = (seen.errors - ratio_of(self._fresh, self._beyond) * probe)[recent]
        lasting = min(seen.left, self._policy.horizon_batches) * excess.sum() / (len(excess) + 1)
        self._new = bool(lasting >= self._policy.factor * self._stakes.price)
        return self._new


class ForecastQuantile(Retraining, frozen=True, kw_only=True, tag="forecast-quantile"):
    """When a retraining pays with probability `confidence`, by a Gaussian forecast of what is lost with age (UPF).

    How much more a version errs at an age than a fresh one, and how surely, is the past's mean and standard deviation
    over versions; the deployed version is held to be off its age's mean by as much as its last three batches were.
    Without a past it never retrains.
    """

    confidence: Annotated[float, Meta(gt=0, lt=1)] = 0.5

    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        return _Forecast(self, stakes, past)


class _Forecast:
    def __init__(self, policy: ForecastQuantile, stakes: Stakes, past: Past) -> None:
        self._stakes, self._z = stakes, NormalDist().inv_cdf(policy.confidence)
        n = len(past.errors)
        fresh = np.diag(past.errors)
        lost = [np.diag(past.errors, age) - fresh[age:] for age in range(max(1, n - 2))] if n else []
        self._fresh = float(fresh.mean()) if n else math.nan
        self._mean = np.array([own.mean() for own in lost])
        self._spread = np.array([own.std() for own in lost])

    def decide(self, seen: Seen) -> bool:
        if seen.age == 0 or len(seen.errors) == 0 or len(self._mean) < 2:
            return False
        oldest = len(self._mean) - 1
        recent = np.arange(max(0, len(seen.errors) - 3), len(seen.errors))
        off = float((seen.errors[recent] - self._fresh - self._mean[np.minimum(recent, oldest)]).mean())
        ahead = np.arange(seen.left)
        old, new = np.minimum(seen.age + ahead, oldest), np.minimum(ahead, oldest)
        saved = float((self._mean[old] + off - self._mean[new]).sum())
        # one version's deviations at neighbouring ages go together: their spreads add, not their variances
        unsure = float(np.hypot(self._spread[old].mean(), self._spread[new].mean()) * math.sqrt(seen.left))
        return bool(saved - self._z * unsure > self._stakes.price)


# --- what a fresh version would err, by the probe --------------------------------------------------------------
def level_of(past: Past) -> tuple[float, float]:
    """Fresh versions' errors and the probe's (1 per batch without one) in the past, worth ten batches at most."""
    n = len(past.errors)
    if n == 0:
        return 0.0, 0.0
    worth = min(n, 10) / n
    probed = float(past.probe.sum()) if len(past.probe) else float(n)
    return float(np.trace(past.errors)) * worth, probed * worth


def learn_level(fresh: float, probed: float, own: float, probe: float) -> tuple[float, float]:
    """The same after one more version's first batch; older ones are forgotten by a tenth each."""
    return 0.9 * fresh + own, 0.9 * probed + probe


def ratio_of(fresh: float, probed: float) -> float:
    """How many errors of a fresh version go with one of the probe's."""
    return fresh / max(probed, 0.5)


def retrained_at(
    policy: Retraining, errors: np.ndarray, stakes: Stakes, past: Past = NO_PAST, probe: np.ndarray = _NONE
) -> list[int]:
    """The batches before which a policy retrains, on a matrix of errors [version, batch] of the deployment's length.

    `probe` are the probe's errors on the same batches, or empty.
    """
    retrainer, deployed, when = policy.begin(stakes, past), 0, []
    for t in range(stakes.batches):
        known = slice(deployed, max(t - stakes.label_delay, deployed))
        seen = Seen(errors[deployed, known], t - deployed, stakes.batches - t, probe[known])
        if retrainer.decide(seen) and t > deployed:
            deployed = t
            when.append(t)
    return when


def cost_of(errors: np.ndarray, price: float, when: Sequence[int]) -> float:
    """Wrong answers plus the price of retrainings before the batches in `when`."""
    deployed, cost = 0, price * len(when)
    for t in range(errors.shape[1]):
        deployed = t if t in when else deployed
        cost += float(errors[deployed, t])
    return cost
