"""When a model is retrained: rules, and a learned policy, on what is known of a version's errors.

Time runs in batches. Before batch t a policy sees the errors of the deployed version on the batches since it was
trained, as far as their labels have come, and what was recorded before it took over (`Past`: the errors of earlier
versions on later batches, if they were kept running in the shadow). It answers whether to retrain now. The next batch
is then served by the new version. Rules and their sources: Mahadevan & Mathioudakis 2024 (CARA-T, CARA-CT, CARA-P);
ski rental: Karlin et al., Algorithmica 3, 1988.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Final, Protocol

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.control.network import Forward, Network
from pilotage.world.spec import Spec, SpecError

_LOG: Final = {"log": True}
AGES: Final = (1, 2, 4, 8, 16)  # batches after training at which the past tells how much was lost

FEATURES: Final = (
    "price",  # log of the cost of a retraining in batches of wrong answers
    "left",  # log of the batches that are still to come
    "age",  # log of the batches since the version was trained
    "seen",  # log of those whose labels have come
    "label_delay",
    "noise",  # log of the standard error that a batch's error rate has by chance
    "level",  # fresh versions' typical error rate, log
    "last",  # excess over a fresh version: last batch, means of 3 and of 10 batches, in standard errors
    "recent_3",
    "recent_10",
    "excess",  # sum of the excess since training, over the price of a retraining
    "excess_own",  # the same over the version's own first batch
    "rise",  # second half of what was seen less the first, in standard errors
    "at_stake",  # mean excess of 3 batches times the batches left, over the price
    "at_stake_10",
    "retrained",  # log of retrainings so far
    "gain",  # what the last retraining brought at once, in standard errors
    *(f"past_{age}" for age in AGES),  # mean excess of versions of that age in the past, in standard errors
    "past_worth",  # what the past says of the excess to come, over the price
    "past_noise",  # spread of fresh versions' error rates beyond chance
    "past_best",  # what the best interval would have saved in the past, per batch, over the price
)


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
    """Errors of earlier versions on the batches before the deployment: int array (batches, batches), [s, t] for t >= s.

    Without any, shape (0, 0).
    """

    errors: np.ndarray


NO_PAST: Final = Past(np.zeros((0, 0), np.int64))


class Retrainer(Protocol):
    """A retraining policy in one deployment."""

    def decide(self, errors: np.ndarray, age: int, left: int) -> bool:
        """Whether to retrain before the next batch.

        `errors` are the deployed version's on its first batches, as far as labels have come (one less per batch of
        delay); `age` is how many batches it has served, `left` how many are to come.
        """
        ...


class Retraining(Spec, frozen=True, kw_only=True, tag_field="kind"):
    """A retraining policy."""

    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        raise NotImplementedError


class _Rule:
    """A rule on the errors alone."""

    def __init__(self, policy: _Ruled, stakes: Stakes) -> None:
        self._policy, self._stakes = policy, stakes

    def decide(self, errors: np.ndarray, age: int, left: int) -> bool:
        return age > 0 and self._policy.says(errors, age, self._stakes)


class _Ruled(Retraining, frozen=True, kw_only=True):
    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        return _Rule(self, stakes)

    def says(self, errors: np.ndarray, age: int, stakes: Stakes) -> bool:
        raise NotImplementedError


class Never(_Ruled, frozen=True, kw_only=True, tag="never"):
    def says(self, errors: np.ndarray, age: int, stakes: Stakes) -> bool:
        return False


class Periodic(_Ruled, frozen=True, kw_only=True, tag="periodic"):
    """Every so many batches (CARA-P); 1 is always."""

    every_batches: Annotated[int, Meta(ge=1, le=1000, extra=_LOG)] = 10

    def says(self, errors: np.ndarray, age: int, stakes: Stakes) -> bool:
        return age >= self.every_batches


class CaraT(_Ruled, frozen=True, kw_only=True, tag="cara-t"):
    """When the last batch's error rate exceeds the first one's by a threshold."""

    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.05

    def says(self, errors: np.ndarray, age: int, stakes: Stakes) -> bool:
        return len(errors) > 1 and bool(errors[-1] - errors[0] >= self.threshold * stakes.batch_size)


class CaraCt(_Ruled, frozen=True, kw_only=True, tag="cara-ct"):
    """When the sum of such differences exceeds a threshold, in batches of wrong answers."""

    threshold: Annotated[float, Meta(ge=0, le=100)] = 0.2

    def says(self, errors: np.ndarray, age: int, stakes: Stakes) -> bool:
        return len(errors) > 1 and bool((errors - errors[0]).sum() >= self.threshold * stakes.batch_size)


class SkiRental(_Ruled, frozen=True, kw_only=True, tag="ski-rental"):
    """When the errors beyond the first batch's have cost `factor` retrainings; `positive`: beyond the best batch's,
    and counted only where positive."""

    factor: Annotated[float, Meta(ge=0.1, le=10, extra=_LOG)] = 1.0
    positive: bool = False

    def says(self, errors: np.ndarray, age: int, stakes: Stakes) -> bool:
        if len(errors) == 0:
            return False
        beyond = np.maximum(errors - errors.min(), 0) if self.positive else errors - errors[0]
        return bool(beyond.sum() >= self.factor * stakes.price)


class FreshSki(Retraining, frozen=True, kw_only=True, tag="fresh-ski"):
    """The same beyond a moving average (weight 0.3) of the first batches of all versions so far."""

    factor: Annotated[float, Meta(ge=0.1, le=10, extra=_LOG)] = 0.5

    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        return _FreshSki(self, stakes)


class _FreshSki:
    def __init__(self, policy: FreshSki, stakes: Stakes) -> None:
        self._least, self._fresh, self._own = policy.factor * stakes.price, math.nan, math.nan

    def decide(self, errors: np.ndarray, age: int, left: int) -> bool:
        if age == 0 or len(errors) == 0:
            self._own = math.nan if age == 0 else self._own
            return False
        if math.isnan(self._own):
            self._own = float(errors[0])
            self._fresh = self._own if math.isnan(self._fresh) else 0.7 * self._fresh + 0.3 * self._own
        if float((errors - self._fresh).sum()) >= self._least:
            self._own = math.nan
            return True
        return False


# --- the learned policy --------------------------------------------------------------------------------------
def summary_of(past: np.ndarray, batch_size: int, price: float) -> np.ndarray:
    """What the past says: fresh versions' error rate, its spread, what the best interval saves, excess by age.

    Compiled for training, too; shape (3 + len(AGES),).
    """
    n = past.shape[0]
    out = np.zeros(3 + 5)
    if n == 0:
        out[0] = -1.0
        return out
    fresh = 0.0
    for t in range(n):
        fresh += past[t, t]
    fresh /= n
    square = 0.0
    for t in range(1, n):
        square += (past[t, t] - past[t - 1, t - 1]) ** 2 / 2
    rate = max(fresh / batch_size, 0.5 / batch_size)
    chance = batch_size * rate * (1 - min(rate, 0.99))
    spread = math.sqrt(max(square / max(n - 1, 1), 1e-12) / chance)
    out[0], out[1] = fresh / batch_size, math.log(max(spread, 0.1))
    age = 1
    for k in range(5):
        total, count = 0.0, 0
        for t in range(age, n):
            total += past[t - age, t] - past[t, t]
            count += 1
        if count > 0:
            out[3 + k] = total / count
        elif k > 0:
            out[3 + k] = out[2 + k]
        age *= 2
    never = 0.0
    for t in range(n):
        never += past[0, t]
    best = never
    for every in range(1, n):
        cost, s = 0.0, 0
        for t in range(n):
            if t > 0 and t % every == 0:
                s = t
                cost += price
            cost += past[s, t]
        best = min(best, cost)
    out[2] = (never - best) / n
    return out


def features_of(
    errors: np.ndarray, age: int, left: int, fresh: float, gain: float, retrained: int,
    price: float, batch_size: int, label_delay: int, summary: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    """Writes FEATURES into `out`. `fresh` is fresh versions' typical number of errors, `gain` what the last retraining
    brought in errors (0: none yet). Compiled for training, too."""
    seen = errors.shape[0]
    rate = min(max(fresh / batch_size, 0.5 / batch_size), 0.99)
    chance = math.sqrt(batch_size * rate * (1 - rate))
    total, last, three, ten, own = 0.0, 0.0, 0.0, 0.0, 0.0
    for k in range(seen):
        beyond = errors[k] - fresh
        total += beyond
        own += errors[k] - errors[0]
        if k >= seen - 3:
            three += beyond / min(3, seen)
        if k >= seen - 10:
            ten += beyond / min(10, seen)
        last = beyond
    half = seen // 2
    early, late = 0.0, 0.0
    for k in range(half):
        early += errors[k]
        late += errors[seen - 1 - k]
    rise = (late - early) / half if half > 0 else 0.0
    # what the past says that this version would lose more than a fresh one would, from here on
    worth = 0.0
    for ahead in range(min(left, 64)):
        worth += _lost_at(age + ahead, summary) - _lost_at(ahead, summary)
    out[0] = math.log(price / batch_size)
    out[1] = math.log1p(left)
    out[2] = math.log1p(age)
    out[3] = math.log1p(seen)
    out[4] = label_delay
    out[5] = math.log(chance / batch_size)
    out[6] = math.log(rate)
    out[7] = _squashed(last / chance)
    out[8] = _squashed(three / chance)
    out[9] = _squashed(ten / chance)
    out[10] = _squashed(total / price)
    out[11] = _squashed(own / price)
    out[12] = _squashed(rise / chance)
    out[13] = _squashed(three * left / price)
    out[14] = _squashed(ten * left / price)
    out[15] = math.log1p(retrained)
    out[16] = _squashed(gain / chance)
    for k in range(5):
        out[17 + k] = _squashed(summary[3 + k] / chance)
    out[22] = _squashed(worth / price)
    out[23] = summary[1]
    out[24] = _squashed(summary[2] * left / price)


def _squashed(x: float) -> float:
    return math.copysign(math.log1p(abs(x)), x)


def _lost_at(age: int, summary: np.ndarray) -> float:
    """The past's mean excess at an age, by interpolation between AGES; beyond them it stays."""
    if age <= 0:
        return 0.0
    k, low = 0, 1
    while k < 4 and low * 2 <= age:
        low *= 2
        k += 1
    if k == 4:
        return float(summary[7])
    share = (age - low) / low
    return float(summary[3 + k] * (1 - share) + summary[4 + k] * share)


class LearnedRetraining(Retraining, frozen=True, kw_only=True, tag="learned-retraining"):
    """A network that says, of FEATURES, whether a retraining saves more than it costs: yes above 0."""

    network: Network

    def __post_init__(self) -> None:
        self.network.must_map(len(FEATURES), 1)

    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        return _Learned(self, stakes, past)


class _Learned:
    def __init__(self, policy: LearnedRetraining, stakes: Stakes, past: Past) -> None:
        self._forward, self._stakes = Forward(policy.network), stakes
        self._summary = summary_of(np.asarray(past.errors), stakes.batch_size, stakes.price)
        known = self._summary[0]
        self._fresh = known * stakes.batch_size if known >= 0 else math.nan
        self._own, self._gain, self._before, self._retrained = math.nan, 0.0, math.nan, 0
        self._out = np.zeros(len(FEATURES))

    def decide(self, errors: np.ndarray, age: int, left: int) -> bool:
        if age == 0 or len(errors) == 0:
            return False
        if math.isnan(self._own):
            self._own = float(errors[0])
            self._fresh = self._own if math.isnan(self._fresh) else 0.7 * self._fresh + 0.3 * self._own
            self._gain = 0.0 if math.isnan(self._before) else self._before - self._own
        features_of(
            np.asarray(errors), age, left, self._fresh, self._gain, self._retrained, self._stakes.price,
            self._stakes.batch_size, self._stakes.label_delay, self._summary, self._out,
        )  # fmt: skip
        if float(self._forward(self._out[None])[0, 0]) <= 0:
            return False
        self._before, self._own = float(np.mean(errors[-3:])), math.nan
        self._retrained += 1
        return True


def retrained_at(policy: Retraining, errors: np.ndarray, stakes: Stakes, past: Past = NO_PAST) -> list[int]:
    """The batches before which a policy retrains, on a matrix of errors [version, batch] of the deployment's length."""
    retrainer, deployed, when = policy.begin(stakes, past), 0, []
    for t in range(stakes.batches):
        known = max(t - stakes.label_delay, deployed)
        if (
            retrainer.decide(errors[deployed, deployed:known], t - deployed, stakes.batches - t)
            and t > deployed
        ):
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
