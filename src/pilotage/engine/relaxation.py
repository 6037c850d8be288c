"""Least possible numbers of missed requests, for the clairvoyant bound (`agents.bound` has the proof)."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from pilotage.engine.randomness import from_table, uniform

compiled = njit(cache=True, nogil=True, error_model="numpy")

_ROUNDING = 1e-9  # work adds up in another order here than in the engine; a tie must not count as missed


@compiled
def demands_of(table, seed, count):
    """Demands of requests 0..count-1, as the engine draws them."""
    out = np.ones(count)
    if table[0] != 1.0:
        for k in range(count):
            out[k] = from_table(table, uniform(seed, k))
    return out


@compiled
def least_work(demand, fixed, variable, noise):
    """For each request, the least time of one execution slot it can cost: its share of the best batch."""
    out = np.full(demand.shape[0], math.inf)
    for n in range(1, fixed.shape[0]):
        for i in range(demand.shape[0]):
            out[i] = min(out[i], noise * (fixed[n] + variable[n] * demand[i]) / n)
    return out


@compiled
def least_missed(arrival_s, work_s, slo_s, speed, start_s, most, completion):
    """The least number of requests that miss their objective on one fluid server of `speed`, idle at `start_s`.

    `completion[j]` is the earliest time at which all work can be done if j requests were given up so far;
    taking requests in order of arrival is optimal, because deadlines have that order too. Returns `most + 1`
    as soon as more than `most` must be given up.
    """
    completion[0] = start_s
    top = 0  # largest number given up that is reachable
    low = 0  # smallest number given up that is feasible
    for i in range(arrival_s.shape[0]):
        r = arrival_s[i]
        p = work_s[i] / speed
        d = r + slo_s
        if top < most:
            top += 1
            completion[top] = math.inf
        for j in range(top, low - 1, -1):
            done = max(completion[j], r) + p
            if done > d + _ROUNDING:
                done = math.inf
            if j > low:
                done = min(done, completion[j - 1])
            completion[j] = done
        while low <= top and completion[low] == math.inf:
            low += 1
        if low > top:
            return most + 1
    return low


@compiled
def missed_table(arrival_s, work_s, slo_s, edges_s, due_s, speeds, most):
    """`least_missed` of the requests of each interval at each speed (ascending); shape (intervals, speeds).

    Requests that arrive from `due_s` on may end the run in flight, at no cost, and are left out. Entries are
    at most `most + 1`, which stands for "more than `most`". A speed of 0 misses everything.
    """
    out = np.zeros((edges_s.shape[0] - 1, speeds.shape[0]), np.int64)
    completion = np.empty(most + 2)
    for k in range(edges_s.shape[0] - 1):
        lo = np.searchsorted(arrival_s, edges_s[k])
        hi = np.searchsorted(arrival_s, min(edges_s[k + 1], due_s))
        if hi <= lo:
            continue
        work, largest = np.sum(work_s[lo:hi]), np.max(work_s[lo:hi])
        for j in range(speeds.shape[0] - 1, -1, -1):
            # all that is not missed fits into the interval and one objective more
            excess = work - speeds[j] * (edges_s[k + 1] - edges_s[k] + slo_s)
            if excess > (most + 1) * largest + _ROUNDING:
                out[k, j] = most + 1
            elif speeds[j] <= 0:
                out[k, j] = min(hi - lo, most + 1)
            elif j + 1 < speeds.shape[0] and out[k, j + 1] > most:
                out[k, j] = most + 1
            else:
                out[k, j] = least_missed(
                    arrival_s[lo:hi], work_s[lo:hi], slo_s, speeds[j], edges_s[k], most, completion
                )
    return out
