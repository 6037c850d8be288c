"""The learned retraining policy: what it looks at, and a network that says whether a retraining pays.

The functions on arrays are plain Python; training compiles the very same ones.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from pilotage.control.network import Network
from pilotage.control.retraining import (
    NO_PAST,
    Past,
    Retrainer,
    Retraining,
    Seen,
    Stakes,
    learn_level,
    level_of,
    ratio_of,
)

AGES: Final = (1, 2, 4, 8, 16)  # batches after training at which the past tells how much was lost

# excess: errors beyond what a fresh version would make, which is the probe's errors times a ratio, or a mean
FEATURES: Final = (
    "price",  # log of the cost of a retraining in batches of wrong answers
    "left",  # log of the batches that are still to come
    "age",  # log of the batches since the version was trained
    "seen",  # log of those whose labels have come
    "label_delay",
    "noise",  # log of the standard error that a batch's error rate has by chance
    "level",  # fresh versions' typical error rate, log
    "probed",  # 1 if a probe runs
    "last",  # excess: last batch, means of 3 and of 10 batches, in standard errors
    "recent_3",
    "recent_10",
    "excess",  # sum of the excess since training, over the price of a retraining
    "excess_own",  # the same over the version's own first batch
    "evidence",  # the same in standard errors of a sum
    "surge",  # the largest sum of the excess over a stretch that ends now, over the price
    "rise",  # second half of what was seen less the first, in standard errors
    "at_stake",  # mean excess of 3 batches times the batches left, over the price
    "at_stake_10",
    "at_stake_all",
    "retrained",  # log of retrainings so far
    "gain",  # what the last retraining brought at once, in standard errors
    *(f"past_{age}" for age in AGES),  # mean excess of versions of that age in the past, in standard errors
    "past_worth",  # what the past says of the excess to come, over the price
    "past_noise",  # spread of fresh versions' errors about what is expected of them, over chance
    "past_best",  # what the best interval would have saved in the past, per batch, over the price
)


def summary_of(past: np.ndarray, probe: np.ndarray, batch_size: int, price: float) -> np.ndarray:
    """What the past says: spread of fresh versions' errors, log; what the best interval saves a batch; excess by age.

    `probe` is 1 per batch if none ran. Shape (2 + len(AGES),).
    """
    n = past.shape[0]
    out = np.zeros(2 + 5)
    if n == 0:
        return out
    fresh, probed = 0.0, 0.0
    for t in range(n):
        fresh += past[t, t]
        probed += probe[t]
    ratio, square = fresh / max(probed, 0.5), 0.0
    for t in range(n):
        square += (past[t, t] - ratio * probe[t]) ** 2
    rate = min(max(fresh / n / batch_size, 0.5 / batch_size), 0.99)
    out[0] = math.log(max(math.sqrt(square / n / (batch_size * rate * (1 - rate))), 0.1))
    age = 1
    for k in range(5):
        total, count = 0.0, 0
        for t in range(age, n):
            total += past[t - age, t] - past[t, t]
            count += 1
        if count > 0:
            out[2 + k] = total / count
        elif k > 0:
            out[2 + k] = out[1 + k]
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
    out[1] = (never - best) / n
    return out


def features_of(
    errors: np.ndarray, probe: np.ndarray, probed: float, ratio: float, age: int, left: int, gain: float,
    retrained: int, price: float, batch_size: int, label_delay: int, summary: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    """Writes FEATURES into `out`. A fresh version makes `ratio` errors for one of the probe's (`probe` is 1 per batch
    if none runs, and `probed` 0); `gain` is what the last retraining brought in errors (0: none yet)."""
    seen = errors.shape[0]
    total, last, three, ten, own, surge, expected = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    half, early, late = seen // 2, 0.0, 0.0
    for k in range(seen):
        fresh = ratio * probe[k]
        last = errors[k] - fresh
        expected += fresh / seen
        total += last
        own += errors[k] - errors[0]
        surge = max(surge + last, 0.0)
        if k >= seen - 3:
            three += last / min(3, seen)
        if k >= seen - 10:
            ten += last / min(10, seen)
        if k < half:
            early += last
        if k >= seen - half:
            late += last
    rate = min(max(expected / batch_size, 0.5 / batch_size), 0.99)
    chance = math.sqrt(batch_size * rate * (1 - rate))
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
    out[7] = probed
    out[8] = _squashed(last / chance)
    out[9] = _squashed(three / chance)
    out[10] = _squashed(ten / chance)
    out[11] = _squashed(total / price)
    out[12] = _squashed(own / price)
    out[13] = _squashed(total / (chance * math.sqrt(seen)))
    out[14] = _squashed(surge / price)
    out[15] = _squashed((late - early) / max(half, 1) / chance)
    out[16] = _squashed(three * left / price)
    out[17] = _squashed(ten * left / price)
    out[18] = _squashed(total / seen * left / price)
    out[19] = math.log1p(retrained)
    out[20] = _squashed(gain / chance)
    for k in range(5):
        out[21 + k] = _squashed(summary[2 + k] / chance)
    out[26] = _squashed(worth / price)
    out[27] = summary[0]
    out[28] = _squashed(summary[1] * left / price)


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
        return float(summary[6])
    share = (age - low) / low
    return float(summary[2 + k] * (1 - share) + summary[3 + k] * share)


class LearnedRetraining(Retraining, frozen=True, kw_only=True, tag="learned-retraining"):
    """A network that says, of FEATURES, whether a retraining saves more than it costs: yes above 0."""

    network: Network

    def __post_init__(self) -> None:
        self.network.must_map(len(FEATURES), 1)

    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        return _Learned(self, stakes, past)


class _Learned:
    def __init__(self, policy: LearnedRetraining, stakes: Stakes, past: Past) -> None:
        self._forward, self._stakes = policy.network.forward(), stakes
        n = len(past.errors)
        probe = past.probe if len(past.probe) else np.ones(n)
        self._summary = summary_of(np.asarray(past.errors), probe, stakes.batch_size, stakes.price)
        self._fresh, self._beyond = level_of(past)
        self._new, self._gain, self._before, self._retrained = True, 0.0, math.nan, 0
        self._out = np.zeros(len(FEATURES))

    def look(self, seen: Seen) -> np.ndarray:
        """What the network is shown of a version with labels; shape (len(FEATURES),), overwritten by the next look."""
        probed = len(seen.probe) > 0
        probe = seen.probe if probed else np.ones(len(seen.errors))
        if self._new:
            own = float(seen.errors[0])
            self._fresh, self._beyond = learn_level(self._fresh, self._beyond, own, float(probe[0]))
            ratio = ratio_of(self._fresh, self._beyond)
            self._gain = 0.0 if math.isnan(self._before) else self._before - (own - ratio * float(probe[0]))
            self._new = False
        features_of(
            np.asarray(seen.errors), probe, float(probed), ratio_of(self._fresh, self._beyond), seen.age, seen.left,
            self._gain, self._retrained, self._stakes.price, self._stakes.batch_size, self._stakes.label_delay,
            self._summary, self._out,
        )  # fmt: skip
        return self._out

    def decide(self, seen: Seen) -> bool:
        if seen.age == 0 or len(seen.errors) == 0:
            return False
        if float(self._forward(self.look(seen)[None])[0, 0]) <= 0:
            return False
        probe = seen.probe if len(seen.probe) else np.ones(len(seen.errors))
        ratio = ratio_of(self._fresh, self._beyond)
        self._before, self._new = float(np.mean((seen.errors - ratio * probe)[-3:])), True
        self._retrained += 1
        return True
