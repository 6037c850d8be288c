"""Both branches of every decision to retrain, followed to the end: the compiled half of `agents.retraining`."""

from __future__ import annotations

import math
import types
from typing import Any

import numpy as np
from numba import njit

from pilotage.control import retraining as control


def _compiled(function: Any, **callees: Any) -> Any:
    """A function of `control`, which must not depend on a compiler, compiled."""
    return njit(types.FunctionType(function.__code__, function.__globals__ | callees, function.__name__))


_squashed, _lost_at = _compiled(control._squashed), _compiled(control._lost_at)
_features_of = _compiled(control.features_of, _squashed=_squashed, _lost_at=_lost_at)


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


@njit
def follow(errors, price, batch_size, delay, summary, net, t, state, forced, out, advantages, rows, explore):
    """The cost of batches t and later, from `state`: deployed, fresh, own, gain, before, retrained.

    `forced` is the decision before batch t (-1: the policy's). Where `rows` is not empty, features of every state that
    is visited go there, with their number in `advantages[0, 0]`; `explore` are draws that turn decisions.
    """
    n, cost, recorded = errors.shape[1], 0.0, 0
    deployed, fresh, own, gain, before, retrained = state
    while t < n:
        age, known = t - int(deployed), max(t - delay, int(deployed))
        seen = errors[int(deployed), int(deployed) : known]
        now = False
        if age > 0 and seen.shape[0] > 0:
            if math.isnan(own):
                own = seen[0]
                fresh = own if math.isnan(fresh) else 0.7 * fresh + 0.3 * own
                gain = 0.0 if math.isnan(before) else before - own
            if forced >= 0:
                now = forced == 1
            else:
                _features_of(
                    seen, age, n - t, fresh, gain, int(retrained), price, batch_size, delay, summary, out
                )
                now = says(out, *net) > 0
            if rows.shape[0] > 0:
                rows[recorded] = out
                here = np.array([deployed, fresh, own, gain, before, retrained])
                advantages[recorded, 0], advantages[recorded, 1:] = t, here
                recorded += 1
                if explore[t] < 0.05:
                    now = not now
        forced = -1
        if now:
            total, count = 0.0, 0
            for k in range(max(0, seen.shape[0] - 3), seen.shape[0]):
                total += seen[k]
                count += 1
            before, own = total / count, math.nan
            retrained += 1
            deployed = t
            cost += price
        cost += errors[int(deployed), t]
        t += 1
    return cost, recorded


@njit
def visit(errors, price, batch_size, delay, summary, net, left, by_plan, explore, rows, gains):
    """Follows the policy once, and from every state on the way both branches: features and advantages of retraining."""
    n = errors.shape[1]
    out, nothing, states = np.zeros(rows.shape[1]), np.zeros((0, rows.shape[1])), np.zeros((n, 7))
    begin = np.array(
        [0.0, math.nan if summary[0] < 0 else summary[0] * batch_size, math.nan, 0.0, math.nan, 0.0]
    )
    _, count = follow(
        errors, price, batch_size, delay, summary, net, 0, begin, -1, out, states, rows, explore
    )
    for k in range(count):
        t, state = int(states[k, 0]), states[k, 1:]
        if by_plan:
            s = int(state[0])
            gains[k] = errors[s, t] + left[s, t + 1] - (price + errors[t, t] + left[t, t + 1])
        else:
            keep, _ = follow(
                errors, price, batch_size, delay, summary, net, t, state, 0, out, states, nothing, explore
            )
            renew, _ = follow(
                errors, price, batch_size, delay, summary, net, t, state, 1, out, states, nothing, explore
            )
            gains[k] = keep - renew
    return count
