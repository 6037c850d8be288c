"""Queues of replicas, to which requests are bound on arrival: round robin, least outstanding, power of two choices."""

from __future__ import annotations

import numpy as np

from pilotage.engine.layout import LEAST_OUTSTANDING, POWER_OF_TWO, READY, ROUND_ROBIN
from pilotage.engine.queues import (
    act,
    admit,
    append,
    bury,
    count_arrivals,
    due,
    hear_of_deaths,
    is_dead,
    pop,
    reject,
    retire,
    upto,
)
from pilotage.engine.randomness import compiled, draw, hot


@hot
def first_slot(c, k):
    """The slot of replica k that is free first; the lowest among equals."""
    per = c.param["slots"]
    e = k * per
    for j in range(k * per + 1, (k + 1) * per):
        if c.slots[j]["free_s"] < c.slots[e]["free_s"]:
            e = j
    return e


@hot
def executing(c, k):
    """The requests that replica k executes, as far as it has been brought."""
    n = 0
    for e in range(k * c.param["slots"], (k + 1) * c.param["slots"]):
        n += c.slots[e]["size"]
    return n


@hot
def outstanding(c, k):
    return c.replicas[k]["waiting"] + executing(c, k)


@hot
def catch_up(c, k, now, until, arriving):
    """Brings replica k to `until`; if a request arrives then, what has waited till then comes after it."""
    replica = c.replicas[k]
    while replica["waiting"] > 0:
        e = first_slot(c, k)
        free_s = c.slots[e]["free_s"]
        next_s, after = due(c, replica, free_s, now)
        if next_s > until or (next_s == until and (after or not arriving)):
            break
        now = next_s
        waiting = replica["waiting"]
        if act(c, replica, e, free_s, now):
            waiting -= c.slots[e]["size"]
        else:
            replica["gone_s"] = now  # if it drains, this may have been the end of its queue
        hear_of_deaths(c, replica, waiting - replica["waiting"])
    for e in range(k * c.param["slots"], (k + 1) * c.param["slots"]):
        if c.slots[e]["free_s"] < until or (arriving and c.slots[e]["free_s"] == until):
            retire(c, e)


@hot
def pair(c, number):
    """The two places in the ready list that power of two choices draws for request `number`."""
    return two_of(c.row["ready"], draw(c.param["seed_route"], number))


@hot
def two_of(m, bits):
    """Two different numbers below m, in random order, from 64 random bits; of 1, twice the 0."""
    if m == 1:
        return np.int64(0), np.int64(0)
    first = np.int64(((bits >> np.uint64(32)) * np.uint64(m)) >> np.uint64(32))
    second = np.int64(((bits & np.uint64(0xFFFFFFFF)) * np.uint64(m - 1)) >> np.uint64(32))
    return first, second + np.int64(second >= first)


# Least outstanding needs two questions answered at every arrival: which replicas have changed since, and which
# has fewest. Two trees of minima over the places of the ready list answer them in logarithmic time.
CHANGE, FEWEST = 0, 1


@hot
def leaves_of(c):
    """Leaves of a tree: places in the ready list, to the next power of two."""
    leaves = 1
    while leaves < c.row["ready"]:
        leaves *= 2
    return leaves


@hot
def write(c, tree, leaves, place, value):
    t = c.trees[tree]
    i = leaves + place
    t[i] = value
    i >>= 1
    while i > 0:
        t[i] = min(t[2 * i], t[2 * i + 1])
        i >>= 1


@hot
def lowest(c, tree, leaves):
    """The first place with the lowest value."""
    t = c.trees[tree]
    i = 1
    while i < leaves:
        i = 2 * i if t[2 * i] <= t[2 * i + 1] else 2 * i + 1
    return i - leaves


@compiled
def note(c, place, leaves, now):
    """Writes into the trees how many requests a replica has, and when that can next change."""
    k = c.ready[place]
    next_s, after = due(c, c.replicas[k], c.slots[first_slot(c, k)]["free_s"], now)
    if after:
        next_s = np.nextafter(next_s, np.inf)  # what arrives then comes first
    for e in range(k * c.param["slots"], (k + 1) * c.param["slots"]):
        if c.slots[e]["size"] > 0:
            next_s = min(next_s, c.slots[e]["free_s"])
    write(c, CHANGE, leaves, place, next_s)
    write(c, FEWEST, leaves, place, np.float64(outstanding(c, k)))


@compiled
def note_all(c, now):
    leaves = leaves_of(c)
    c.trees[:, : 2 * leaves] = np.inf
    for place in range(c.row["ready"]):
        note(c, place, leaves, now)


@hot
def route(c, number, since, now):
    """The place in the ready list of the replica to which request `number` is bound; it is brought to `now`."""
    row, routing = c.row, c.param["routing"]
    leaves, looks, place, other = 0, 1, 0, 0
    if routing == ROUND_ROBIN:
        place = row["turn"] % row["ready"]
        row["turn"] += 1
    elif routing == POWER_OF_TWO:
        place, other = pair(c, number)
        looks = 2
    else:
        leaves = leaves_of(c)
        looks = 0
    while True:
        if routing == LEAST_OUTSTANDING:
            if c.trees[CHANGE, 1] > now:
                return lowest(c, FEWEST, leaves)
            place = lowest(c, CHANGE, leaves)
        elif looks == 0:
            break
        catch_up(c, c.ready[place], since, now, True)
        if routing == LEAST_OUTSTANDING:
            note(c, place, leaves, since)
        else:
            place, other = other, place
            looks -= 1
    if routing == POWER_OF_TWO:
        return other if outstanding(c, c.ready[other]) < outstanding(c, c.ready[place]) else place
    return other


@hot
def bind(c, i, since, now):
    """Routes request i to a replica; returns False if that replica's queue is full."""
    place = route(c, c.row["first_number"] + i, since, now)
    k = c.ready[place]
    if c.replicas[k]["waiting"] >= c.param["queue_limit"]:
        return False
    admit(c, c.replicas[k], i, now)
    if c.param["routing"] == LEAST_OUTSTANDING:
        note(c, place, leaves_of(c), since)
    return True


@compiled
def bring(c, k, since, end):
    """`catch_up` to the end of a segment."""
    catch_up(c, k, since, end, False)


@compiled
def serve_bound(c, now, end):
    """The segment [now, end) of a service that binds requests to replicas on arrival."""
    row, since = c.row, now
    if c.param["routing"] == LEAST_OUTSTANDING and row["ready"] > 0:
        note_all(c, now)
    lo = row["arrival_lo"]
    hi = upto(c.arrivals, lo, row["arrival_hi"], 0.0, end)
    for i in range(lo, hi):
        now = c.arrivals[i]
        if row["ready"] > 0:
            if not bind(c, i, since, now):
                reject(c, now)
        elif row["waiting"] >= c.param["queue_limit"]:
            reject(c, now)
        else:
            append(c, row, i)
    count_arrivals(c, lo, hi)
    for k in range(row["span"]):
        if c.replicas[k]["state"] >= READY:
            bring(c, k, since, end)


@compiled
def open_door(c, now):
    """A replica is ready: binds the requests that wait at the door, in order."""
    if c.param["routing"] == LEAST_OUTSTANDING:
        note_all(c, now)
    while c.row["waiting"] > 0:
        i = pop(c, c.row)
        if is_dead(c, i, now):
            bury(c.tick, c.param, c.row["first_number"] + i, now, c.t0)
        elif not bind(c, i, now, now):
            reject(c, now)


@compiled
def bind_all(c, i, now):
    """Binds a list of requests that come back, one by one."""
    if c.param["routing"] == LEAST_OUTSTANDING:
        note_all(c, now)
    while i >= 0:
        following = c.requests[i]["next"]
        if not bind(c, i, now, now):
            reject(c, now)
        i = following
