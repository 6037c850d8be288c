"""What two levels would have cost, and in which direction: the compiled half of `agents.hindsight`.

A run is a table of what is missed in dollars, `missed_usd[tick, replicas]`, a price per replica and tick, and a lead: a
replica serves if it has been held for `lead` ticks. The youngest is released first, so that as many serve as were held
at the least of the last `lead + 1` ticks. Fractions of replicas are priced linearly between whole ones.
"""

from __future__ import annotations

import numpy as np
from numba import njit

compiled = njit(cache=True, nogil=True, error_model="numpy")

STAYED, ORDERED, RELEASED = 0, 1, 2


@compiled
def follow(order_to, keep_to, missed_usd, start, price_usd, lead, held, why, least_at):
    """The cost of holding clip(held before, order_to, keep_to) at every tick; shape (runs,).

    `order_to` and `keep_to` have shape (runs, ticks), `missed_usd` (runs, ticks, replicas), the rest (runs,). Fills
    `held`, `why` (which level it came from) and `least_at` (the tick that limits who serves), of shape (runs, ticks).
    """
    cost = np.zeros(order_to.shape[0])
    top = missed_usd.shape[2] - 1
    for r in range(order_to.shape[0]):
        count = start[r]
        for k in range(order_to.shape[1]):
            why[r, k] = STAYED
            if count > keep_to[r, k]:
                count, why[r, k] = keep_to[r, k], RELEASED
            if count < order_to[r, k]:
                count, why[r, k] = order_to[r, k], ORDERED
            held[r, k] = count
            least_at[r, k] = k
            for j in range(max(0, k - lead[r]), k):
                if held[r, j] < held[r, least_at[r, k]]:
                    least_at[r, k] = j
            serving = min(held[r, least_at[r, k]], top)
            n = min(int(serving), top - 1)
            share = serving - n
            cost[r] += price_usd[r] * count
            cost[r] += missed_usd[r, k, n] * (1 - share) + missed_usd[r, k, n + 1] * share
    return cost


@compiled
def trace_back(weight, missed_usd, price_usd, held, why, least_at, by_order, by_keep):
    """The derivative of sum(weight * cost) by both levels, of shape (runs, ticks) each."""
    top = missed_usd.shape[2] - 1
    by_held = np.empty(held.shape[1])
    for r in range(held.shape[0]):
        by_held[:] = price_usd[r]
        for k in range(held.shape[1]):
            at = least_at[r, k]
            if held[r, at] < top:
                n = int(held[r, at])
                by_held[at] += missed_usd[r, k, n + 1] - missed_usd[r, k, n]
        total = 0.0
        for k in range(held.shape[1] - 1, -1, -1):
            total += by_held[k] * weight[r]
            by_order[r, k] = total if why[r, k] == ORDERED else 0.0
            by_keep[r, k] = total if why[r, k] == RELEASED else 0.0
            if why[r, k] != STAYED:
                total = 0.0


@compiled
def least(missed_usd, price_usd, lead, low):
    """The least cost of any sequence of at least `low` whole replicas known beforehand; shape (runs,)."""
    runs, ticks, levels = missed_usd.shape
    out = np.empty(runs)
    value, fresh = np.empty(levels), np.empty(levels)
    for r in range(runs):
        step = price_usd[r] * lead[r]
        value[:] = 0.0
        for k in range(ticks - 1, -1, -1):
            # from n now to any level afterwards: down for nothing, up for the time it takes to start
            best = np.inf
            for n in range(low[r], levels):
                best = min(best, value[n])
                fresh[n] = best
            best = np.inf
            for n in range(levels - 1, low[r] - 1, -1):
                best = min(best, value[n] + step * n)
                fresh[n] = min(fresh[n], best - step * n)
            for n in range(low[r], levels):
                value[n] = fresh[n] + missed_usd[r, k, n] + price_usd[r] * n
        out[r] = value[low[r] :].min()
    return out
