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
def draws_at(table, seed, numbers):
    """The draws of given numbers from a table, as the engine makes them."""
    out = np.empty(numbers.shape[0])
    for k in range(numbers.shape[0]):
        out[k] = from_table(table, uniform(seed, numbers[k]))
    return out


@compiled
def patience_of(seed, count, mean_s):
    """How long the clients of requests 0..count-1 would wait, as the engine draws it."""
    out = np.empty(count)
    for k in range(count):
        out[k] = -math.log1p(-uniform(seed, k)) * mean_s
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
def priced_work(arrival_s, demand, noise, stays, fixed, variable, slo_s, timeout_s):
    """For each request a time such that no batch of a central queue lasts less than the sum over its requests in time.

    Batches are taken in order of arrival, and last the `noise` of their first request times `fixed[n] + variable[n]`
    times the mean demand. Only one that does not `stay` may be missing between the first and the last of a batch.
    `slo_s` is the objective, `timeout_s` the longest wait of one that is served.
    """
    count, most = arrival_s.shape[0], fixed.shape[0] - 1
    each = variable[1:] / np.arange(1, most + 1)
    grows = np.all(np.diff(fixed[1:]) >= 0) and np.all(np.diff(each) >= 0)
    low = np.min(demand) if np.all(stays) else 0.0
    least_each = np.min(each)
    shortest_s = np.min(noise) * _at_least(fixed, each, grows, low, 1, low)
    work_s, before_s = np.zeros(count), np.zeros(count + 1)
    in_time = 0  # the first request that can be in time in a batch with the last
    for last in range(count):
        while arrival_s[in_time] + slo_s + _ROUNDING < arrival_s[last] + shortest_s:
            in_time += 1
        n, total, least_noise, least_s = 0, 0.0, math.inf, math.inf
        first = last
        while first >= 0 and arrival_s[last] - arrival_s[first] <= timeout_s + _ROUNDING:
            size = n + 1
            if stays[first]:
                n, total = size, total + demand[first]
            if size > most:
                break
            least_noise = min(least_noise, noise[first])
            batch_s = noise[first] * _at_least(fixed, each, grows, low, size, total)
            least_s = min(least_s, before_s[max(first, in_time)] + batch_s)
            first -= 1
        before_s[last + 1] = max(least_s, before_s[last]) if stays[last] else before_s[last]
        work_s[last] = before_s[last + 1] - before_s[last]
        if not stays[last]:
            work_s[last] = least_noise * least_each * demand[last]
    return work_s


@compiled
def _at_least(fixed, each, grows, low, n, total):
    """How long a batch takes at least, but for noise, if n of its requests have a `total` demand, others `low` each."""
    out = fixed[n] + each[n - 1] * total
    if not grows:
        for size in range(n + 1, fixed.shape[0]):
            out = min(out, fixed[size] + each[size - 1] * (total + (size - n) * low))
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


@compiled
def cheapest(cost_usd, step_usd, initial):
    """The least cost of any sequence of levels, and the sequence; `cost_usd` has shape (intervals, levels).

    A level costs what the table says, and every level that is gained `step_usd`.
    """
    intervals, levels = cost_usd.shape
    best, fresh = np.empty(levels), np.empty(levels)
    came_from = np.zeros((intervals, levels), np.int32)
    for n in range(levels):
        best[n] = max(n - initial, 0) * step_usd + cost_usd[0, n]
    for k in range(1, intervals):
        at = levels - 1
        for n in range(levels - 1, -1, -1):  # from above for nothing
            at = n if best[n] < best[at] else at
            fresh[n], came_from[k, n] = best[at], at
        at = 0
        for n in range(levels):  # from below for the steps
            at = n if best[n] - step_usd * n < best[at] - step_usd * at else at
            up_usd = best[at] + step_usd * (n - at)
            if up_usd < fresh[n]:
                fresh[n], came_from[k, n] = up_usd, at
        for n in range(levels):
            best[n] = fresh[n] + cost_usd[k, n]
    path = np.zeros(intervals, np.int64)
    path[-1] = np.argmin(best)
    least_usd = best[path[-1]]
    for k in range(intervals - 1, 0, -1):
        path[k - 1] = came_from[k, path[k]]
    return least_usd, path
