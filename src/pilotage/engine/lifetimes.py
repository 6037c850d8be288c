"""Deployments followed batch by batch, compiled: what a sequence of retrainings costs, and what it could have cost.

A `Stream` is one deployment whose every possible version is known (see `world.drift`), so that both branches of every
decision to retrain can be followed to the end.
"""

from __future__ import annotations

import math
import types
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numba import njit

from pilotage.control import learned_retraining as control
from pilotage.control import retraining as rules
from pilotage.control.retraining import Past, Stakes, level_of


def _compiled(function: Any, **callees: Any) -> Any:
    """A function of `control`, which must not depend on a compiler, compiled."""
    return njit(types.FunctionType(function.__code__, function.__globals__ | callees, function.__name__))


_squashed, _lost_at = _compiled(control._squashed), _compiled(control._lost_at)
_learn_level, _ratio_of = _compiled(rules.learn_level), _compiled(rules.ratio_of)
features_of = _compiled(control.features_of, _squashed=_squashed, _lost_at=_lost_at)


@njit(cache=True)
def oracle(errors: np.ndarray, price: float) -> tuple[float, np.ndarray]:
    """The least cost of any sequence of retrainings, from a version of batch 0 that is free, and what is left to pay.

    The second is V[s, t]: the least cost of batches t and later if the version of batch s is deployed; shape
    (batches, batches + 1).
    """
    n = errors.shape[1]
    left = np.zeros((n, n + 1))
    for t in range(n - 1, -1, -1):
        fresh = price + errors[t, t] + left[t, t + 1]
        for s in range(t + 1):
            left[s, t] = errors[s, t] + left[s, t + 1]
            if s < t:
                left[s, t] = min(left[s, t], fresh)
    return left[0, 0], left


@njit(cache=True)
def says(x, mean, scale, clip, first, first_bias, second, second_bias, last, last_bias):
    """The network's output for one row of features."""
    z = first_bias.copy()
    for i in range(x.shape[0]):
        value = min(max((x[i] - mean[i]) / scale[i], -clip), clip)
        for j in range(z.shape[0]):
            z[j] += first[j, i] * value
    out, y = last_bias[0], np.tanh(z)
    for j in range(second.shape[0]):
        total = second_bias[j]
        for i in range(y.shape[0]):
            total += second[j, i] * y[i]
        out += last[0, j] * math.tanh(total)
    return out


# a deployment on its way: version deployed, fresh versions' errors and the probe's (see `retraining.learn_level`),
# whether the version is new, what the last retraining brought, the excess before it, retrainings
DEPLOYED, FRESH, BEYOND, NEW, GAIN, BEFORE, RETRAINED = range(7)
STATE: Final = 7


@njit
def look(errors, probe, delay, state, t):
    """What is known before batch t: errors of the version deployed, the probe's, and their ratio; updates the
    state."""
    deployed = int(state[DEPLOYED])
    known = max(t - delay, deployed)
    seen, probes = errors[deployed, deployed:known], probe[deployed:known]
    ratio = _ratio_of(state[FRESH], state[BEYOND])
    if t > deployed and seen.shape[0] > 0 and state[NEW] > 0:
        state[FRESH], state[BEYOND] = _learn_level(state[FRESH], state[BEYOND], seen[0], probes[0])
        ratio = _ratio_of(state[FRESH], state[BEYOND])
        state[GAIN] = 0.0 if math.isnan(state[BEFORE]) else state[BEFORE] - (seen[0] - ratio * probes[0])
        state[NEW] = 0.0
    return seen, probes, ratio


@njit
def renew(seen, probes, ratio, state, t):
    """A retraining before batch t, in the state."""
    total, count = 0.0, 0
    for k in range(max(0, seen.shape[0] - 3), seen.shape[0]):
        total += seen[k] - ratio * probes[k]
        count += 1
    state[BEFORE] = total / count if count > 0 else math.nan
    state[NEW], state[DEPLOYED] = 1.0, t
    state[RETRAINED] += 1


@njit
def follow(errors, probe, probed, price, batch_size, delay, summary, net, begin, out, states, rows, explore):
    """What a policy costs from the state `begin` on.

    Where `rows` is not empty, features of every state that is visited go there, and the state, after its batch, into
    `states`; `explore` are draws that turn decisions.
    """
    n, cost, recorded, state = errors.shape[1], 0.0, 0, begin.copy()
    for t in range(n):
        age = t - int(state[DEPLOYED])
        seen, probes, ratio = look(errors, probe, delay, state, t)
        now = False
        if age > 0 and seen.shape[0] > 0:
            features_of(
                seen, probes, probed, ratio, age, n - t, state[GAIN], int(state[RETRAINED]), price, batch_size,
                delay, summary, out,
            )  # fmt: skip
            now = says(out, *net) > 0
            if rows.shape[0] > 0:
                rows[recorded] = out
                states[recorded, 0], states[recorded, 1:] = t, state
                recorded += 1
                if explore[t] < 0.05:
                    now = not now
        if now:
            renew(seen, probes, ratio, state, t)
            cost += price
        cost += errors[int(state[DEPLOYED]), t]
    return cost, recorded


@njit
def advance(
    actions,
    errors,
    probe,
    facts,
    summary,
    begin,
    draws,
    which,
    at,
    states,
    seen_by_agent,
    rewards,
    ended,
    final,
):
    """One decision of many deployments, and batches up to the next; the environment's step (see `retraining_env`).

    Deployments that end put what was seen last into `final` and go on with the stream that `draws` says, as do those
    with `which` below 0.
    """
    out = np.zeros(seen_by_agent.shape[1])
    for k in range(which.shape[0]):
        fresh = which[k] < 0
        while True:
            if fresh:
                which[k], at[k] = draws[k], 0
                states[k] = begin[which[k]]
            j, state = which[k], states[k]
            n, probed, price, size, delay, typical = facts[j]
            mine, probes_all, t = errors[j, : int(n), : int(n)], probe[j], at[k]
            cost = 0.0
            if not fresh and actions[k] == 1:
                seen, probes, ratio = look(mine, probes_all, int(delay), state, t)
                renew(seen, probes, ratio, state, t)
                cost += price
            while True:  # until something is known of the version deployed
                cost += mine[int(state[DEPLOYED]), t] - mine[t, t]
                t += 1
                if t >= n or t - int(delay) > int(state[DEPLOYED]):
                    break
            at[k] = t
            if not fresh:
                rewards[k] = -cost / typical
            if t < n:
                seen, probes, ratio = look(mine, probes_all, int(delay), state, t)
                features_of(
                    seen, probes, probed, ratio, t - int(state[DEPLOYED]), int(n) - t, state[GAIN],
                    int(state[RETRAINED]), price, size, int(delay), summary[j], out,
                )  # fmt: skip
                seen_by_agent[k] = out
                break
            if not fresh:
                ended[k] = True
                final[k] = seen_by_agent[k]
            fresh = True
            draws[k] = (draws[k] + 1) % facts.shape[0]  # if even the next has nothing to decide


@njit
def visit(errors, probe, probed, price, batch_size, delay, summary, net, begin, left, explore, rows, gains):
    """Follows the policy once: the features of every state on the way, and what retraining there saves if everything
    after it is decided by the oracle, whose costs are `left`."""
    out, states = np.zeros(rows.shape[1]), np.zeros((errors.shape[1], 1 + begin.shape[0]))
    known = (errors, probe, probed, price, batch_size, delay, summary, net)
    _, count = follow(*known, begin, out, states, rows, explore)
    for k in range(count):
        t, s = int(states[k, 0]), int(states[k, 1 + DEPLOYED])
        gains[k] = errors[s, t] + left[s, t + 1] - (price + errors[t, t] + left[t, t + 1])
    return count


@dataclass(frozen=True, slots=True)
class Stream:
    """One deployment: errors [version, batch], the probe's (1 per batch if none runs), what is at stake, what its
    past says, the state it begins in, and the past itself, with ones for a probe if none ran."""

    errors: np.ndarray
    probe: np.ndarray
    probed: bool
    stakes: Stakes
    summary: np.ndarray
    begin: np.ndarray
    oracle_usd: float
    past: Past

    @classmethod
    def of(
        cls,
        errors: np.ndarray,
        probe: np.ndarray,
        begin: int,
        price: float,
        batch_size: int,
        label_delay: int = 0,
    ) -> Stream:
        """The part of a matrix from batch `begin` on, with what came before as the past; `probe` may be empty."""
        own = np.ascontiguousarray(errors[begin:, begin:]).astype(float)
        stakes = Stakes(price=price, batch_size=batch_size, batches=len(own), label_delay=label_delay)
        probes = probe.astype(float) if len(probe) else np.ones(len(errors))
        summary = control.summary_of(errors[:begin, :begin], probes[:begin], batch_size, price)
        past = Past(errors[:begin, :begin], probes[:begin])
        state = np.array([0.0, *level_of(past), 1.0, 0.0, math.nan, 0.0])
        return cls(
            own, probes[begin:], bool(len(probe)), stakes, summary, state, float(oracle(own, price)[0]), past
        )

    @property
    def known(self) -> tuple[Any, ...]:
        """As compiled code takes it."""
        s = self.stakes
        return (
            self.errors,
            self.probe,
            float(self.probed),
            s.price,
            s.batch_size,
            s.label_delay,
            self.summary,
        )
