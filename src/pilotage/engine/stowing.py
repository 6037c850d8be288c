"""Replicas that come and go at known times, placed online by a rule: what `agents.packing` measures rules with.

Nothing but placement happens here: a node is paid while it carries a replica, and every replica serves at once. What
a rule is shown is what the engine shows it (`allocation.assess`), with nothing at stake.
"""

from __future__ import annotations

import math

import numpy as np
from numba import boolean, float64, int64, njit

from pilotage.engine.layout import RESOURCE_COUNT
from pilotage.engine.placement import RULE, Candidate

_ROUNDING = 1e-9
_grid = int64[:, ::1]
_part = njit(cache=True, nogil=True, error_model="numpy")


@_part
def _fits(needs, free):
    short = 0
    for j in range(RESOURCE_COUNT):
        short += needs[j] > free[j] + _ROUNDING
    return short == 0


@_part
def _worth(needs, preference, has, usd_per_hour):
    """Dollars per hour of the largest share of a node that a replica takes, in the pool where that is least."""
    least = math.inf
    for p in range(len(usd_per_hour)):
        if preference[p] >= 0:
            share = 0.0
            for j in range(RESOURCE_COUNT):
                if needs[j] > 0:
                    share = max(share, needs[j] / has[p, j])
            least = min(least, share * usd_per_hour[p])
    return least if least < math.inf else 0.0


@_part
def _fill(c, needs, worth, waiting, preference, zone_ok, p, zone, r):
    """Describes the candidate's node with replica r and, in their order, all waiting ones that fit."""
    left = c["free"] - c["needs"]
    c["worth_usd_per_hour"] = c["filled_usd_per_hour"] = worth[r]
    for q in range(len(waiting)):
        if waiting[q] and q != r and preference[q, p] >= 0 and zone_ok[q, zone] and _fits(needs[q], left):
            left = left - needs[q]
            c["filled_usd_per_hour"] += worth[q]
    c["unfilled"] = 1.0
    for j in range(RESOURCE_COUNT):
        if c["has"][j] > 0:
            c["unfilled"] = min(c["unfilled"], max(left[j] / c["has"][j], 0.0))


@njit(
    float64(
        RULE, float64[::1], boolean, Candidate[::1], float64[:, ::1], float64[::1], float64[::1], int64[::1],
        _grid, _grid, float64[:, ::1], float64[::1], int64[::1], _grid, int64[::1], _grid,
    ),
    cache=True,
    nogil=True,
    error_model="numpy",
)  # fmt: skip
def stow(
    rule, weights, jointly, candidate, needs, start_s, end_s, service,
    preference, zone_ok, has, usd_per_hour, max_nodes, zones, where, opened,
):  # fmt: skip
    """Places R replicas on nodes of P pools; returns dollars.

    `needs` (R, resources), `start_s`, `end_s`, `service` (R,) are in order of start; `preference` (R, P) is the place
    of a pool in a replica's list, -1 where it may not go; `zone_ok` (R, Z); `has` (P, resources); `zones` (P, Z) has a
    pool's zones in its order, then -1; `candidate` is room for one record. Writes the node of each replica, or -1, into
    `where` (R,), and (pool, zone) of each node into `opened` (R, 2). Replicas that start together are placed pair by
    pair if `jointly`, else in their order.
    """
    count, pools = preference.shape
    c, total_usd, nodes = candidate[0], 0.0, 0
    free, began_s = np.zeros((count, RESOURCE_COUNT)), np.zeros(count)
    inside, alive = (
        np.zeros(count, np.int64),
        np.zeros(count, np.bool_),
    )  # replicas of a node; whether it is there
    placed, waiting = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    siblings, in_zone = np.zeros(count, np.int64), np.zeros(zone_ok.shape[1], np.int64)
    used, worth = np.zeros(pools, np.int64), np.zeros(count)
    for r in range(count):
        worth[r] = _worth(needs[r], preference[r], has, usd_per_hour)
    lo = 0
    while lo < count:
        now = start_s[lo]
        for r in range(lo):
            if placed[r] and end_s[r] <= now:
                placed[r] = False
                n = where[r]
                inside[n] -= 1
                free[n] += needs[r]
                if inside[n] == 0:
                    last = 0.0
                    for q in range(lo):
                        if where[q] == n:
                            last = max(last, end_s[q])
                    total_usd += (last - began_s[n]) * usd_per_hour[opened[n, 0]] / 3600
                    alive[n] = False
                    used[opened[n, 0]] -= 1
        hi = lo + 1
        while hi < count and start_s[hi] == now:
            hi += 1
        waiting[:] = False
        waiting[lo:hi] = True
        for turn in range(lo, hi):
            best, best_r, best_n, best_p, best_zone = -math.inf, -1, -1, -1, -1
            for r in range(lo, hi) if jointly else range(turn, turn + 1):
                if not waiting[r]:
                    continue
                siblings[:] = 0
                in_zone[:] = 0
                serving = 0
                for q in range(hi):
                    if placed[q] and service[q] == service[r]:
                        siblings[where[q]] += 1
                        in_zone[opened[where[q], 1]] += 1
                        serving += 1
                c["service"], c["serving"], c["slowdown"] = service[r], serving, 1.0
                c["needs"] = needs[r]
                emptiest = -1
                for scored in range(2):  # first the emptiest zone of those with a candidate, then the scores
                    for n in range(nodes):
                        p, zone = opened[n]
                        if (
                            alive[n]
                            and preference[r, p] >= 0
                            and zone_ok[r, zone]
                            and _fits(needs[r], free[n])
                        ):
                            if scored == 0:
                                emptiest = in_zone[zone] if emptiest < 0 else min(emptiest, in_zone[zone])
                                continue
                            c["node"], c["pool"], c["zone"], c["preference"] = n, p, zone, preference[r, p]
                            c["has"], c["free"] = has[p], free[n]
                            c["usd_per_hour"], c["room"] = usd_per_hour[p], max_nodes[p] - used[p]
                            c["replicas"], c["siblings"] = inside[n], siblings[n]
                            c["in_zone"], c["in_emptiest_zone"] = in_zone[zone], emptiest
                            _fill(c, needs, worth, waiting, preference, zone_ok, p, zone, r)
                            score = rule(c, weights)
                            if score > best:
                                best, best_r, best_n = score, r, n
                    for preferred in range(pools):
                        for p in range(pools):
                            if preference[r, p] != preferred or used[p] >= max_nodes[p]:
                                continue
                            for zone in zones[p]:
                                if zone < 0 or not zone_ok[r, zone]:
                                    continue
                                if scored == 0:
                                    emptiest = in_zone[zone] if emptiest < 0 else min(emptiest, in_zone[zone])
                                    continue
                                c["node"], c["pool"], c["zone"], c["preference"] = -1, p, zone, preferred
                                c["has"], c["free"] = has[p], has[p]
                                c["usd_per_hour"], c["room"] = usd_per_hour[p], max_nodes[p] - used[p]
                                c["replicas"], c["siblings"] = 0, 0
                                c["in_zone"], c["in_emptiest_zone"] = in_zone[zone], emptiest
                                _fill(c, needs, worth, waiting, preference, zone_ok, p, zone, r)
                                score = rule(c, weights)
                                if score > best:
                                    best, best_r, best_n, best_p, best_zone = score, r, -1, p, zone
            if best_r < 0:
                continue
            if best_n < 0:
                best_n = nodes
                nodes += 1
                opened[best_n, 0], opened[best_n, 1] = best_p, best_zone
                free[best_n], began_s[best_n], alive[best_n] = has[best_p], now, True
                used[best_p] += 1
            free[best_n] -= needs[best_r]
            inside[best_n] += 1
            where[best_r], placed[best_r], waiting[best_r] = best_n, True, False
        lo = hi
    for n in range(nodes):
        if alive[n]:
            last = 0.0
            for q in range(count):
                if where[q] == n:
                    last = max(last, end_s[q])
            total_usd += (last - began_s[n]) * usd_per_hour[opened[n, 0]] / 3600
    return total_usd
