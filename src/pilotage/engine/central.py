"""One queue for all replicas, between two replica events.

Where nobody is rejected, the queue of a late-binding former is a stretch of the row's arrivals, and batches are found
from their times alone; this is where most requests of most runs are served. All else goes request by request.
"""

from __future__ import annotations

import math

from pilotage.engine.layout import LATE_BINDING
from pilotage.engine.queues import (
    act,
    admit,
    bury,
    count_arrivals,
    demand_of,
    due,
    duration_s,
    is_dead,
    record,
    reject,
    retire,
    upto,
    widen,
)
from pilotage.engine.randomness import compiled, hot


@hot
def enter(tree, leaves, e, time_s):
    """Writes when slot e is free into a tree of winners, whose root is then the slot that is free first.

    A node of the tree holds the earlier of its children, the lower number among equals; there is no branch to
    mispredict on the way to the root.
    """
    i, number = leaves + e, e
    tree[i]["time_s"], tree[i]["number"] = time_s, number
    while i > 1:
        other_s, other = tree[i ^ 1]["time_s"], tree[i ^ 1]["number"]
        loses = (other_s < time_s) | ((other_s == time_s) & (other < number))
        time_s = other_s if loses else time_s
        number = other if loses else number
        i >>= 1
        tree[i]["time_s"], tree[i]["number"] = time_s, number


@compiled
def gather_slots(c, end):
    """Fills the tree with the slots of ready replicas, and retires what they complete before `end`.

    Returns the number of leaves; slots of other replicas are never free.
    """
    per, tree = c.param["slots"], c.tree
    leaves = 1
    while leaves < c.row["span"] * per:
        leaves *= 2
    for i in range(leaves):
        tree[leaves + i]["time_s"], tree[leaves + i]["number"] = math.inf, i
    for j in range(c.row["ready"]):
        for e in range(c.ready[j] * per, (c.ready[j] + 1) * per):
            tree[leaves + e]["time_s"] = c.slots[e]["free_s"]
            if c.slots[e]["free_s"] < end:
                retire(c, e)
    for i in range(leaves - 1, 0, -1):
        winner = 2 * i + (tree[2 * i + 1]["time_s"] < tree[2 * i]["time_s"])
        tree[i]["time_s"], tree[i]["number"] = tree[winner]["time_s"], tree[winner]["number"]
    return leaves


@compiled
def serve_central(c, now, end):
    """The segment [now, end) of a service with one queue for all replicas."""
    row, tree = c.row, c.tree
    leaves = gather_slots(c, end)
    lo = row["arrival_lo"]
    hi = upto(c.arrivals, lo, row["arrival_hi"], 0.0, end)
    a = lo
    if c.param["former"] == LATE_BINDING and row["ready"] > 0 and is_stream(c, lo):
        a, now = serve_stream(c, leaves, now, end, hi)
    free_s = tree[1]["time_s"]
    while True:
        next_s, after = due(c, row, free_s, now)
        if a < hi and (c.arrivals[a] < next_s or (after and c.arrivals[a] == next_s)):
            if row["waiting"] >= c.param["queue_limit"]:
                reject(c, c.arrivals[a])
            else:
                now = c.arrivals[a]
                admit(c, row, a, now)
            a += 1
            continue
        if next_s >= end:
            break
        now = next_s
        e = tree[1]["number"]
        if act(c, row, e, free_s, now):
            enter(tree, leaves, e, c.slots[e]["free_s"])
            free_s = tree[1]["time_s"]
    count_arrivals(c, lo, hi)


@hot
def is_stream(c, lo):
    """Whether those that wait are the last that came: then the queue is a stretch of the row's arrivals."""
    row = c.row
    whole = row["waiting"] == 0 or (row["tail"] == lo - 1 and row["waiting"] == lo - row["head"])
    return whole and row["max_batch"] <= c.param["queue_limit"]


@compiled
def serve_stream(c, leaves, now, end, hi):
    """`serve_central` for late binding as long as nobody is rejected: the queue is [head, arrived), without links.

    So a batch is found from the times of the arrivals alone, and what completes before `end` is accounted at once.
    Returns the first arrival it has not seen to, and the time it has come to.
    """
    row, tick, tree, slots = c.row, c.tick, c.tree, c.slots
    arrivals, requests = c.arrivals, c.requests
    limit, size, wait_s = c.param["queue_limit"], row["max_batch"], row["batch_wait_s"]
    mortal = c.param["timeout_s"] < math.inf or c.param["abandoning"] > 0
    arrived = row["arrival_lo"]
    head = arrived - row["waiting"]
    batches, batched, served, late = 0, 0, 0, 0
    busy_s, latency_s, left_s, wrong, least_s, most_s = 0.0, 0.0, 0.0, 0.0, math.inf, 0.0
    while head < hi:
        came_s = arrivals[head]
        free_s = tree[1]["time_s"]
        start_s = max(free_s, now, came_s)
        over_s = came_s + wait_s
        seen = arrived
        last_s = arrivals[max(arrived - 1, head)]
        in_wait = over_s >= start_s and over_s > max(free_s, last_s)
        arrived = max(arrived, head + 1)
        if in_wait and head + size <= hi and is_full_before(arrivals, head, size, over_s):
            start_s = max(start_s, arrivals[head + size - 1])
            arrived = max(arrived, head + size)
        elif in_wait:
            start_s = over_s
        while arrived < hi and arrivals[arrived] < start_s:
            arrived += 1
        # one that comes at the very end of the wait is taken, too
        if in_wait and start_s == over_s and arrived < min(hi, head + size) and arrivals[arrived] == over_s:
            arrived += arrivals[arrived - 1] < over_s
        if start_s >= end:
            arrived = hi
        if arrived - head > limit:  # somebody is rejected
            arrived = seen
            break
        if start_s >= end:
            break
        now = start_s
        if mortal and is_dead(c, head, now):
            while head < arrived and is_dead(c, head, now):
                bury(tick, c.param, row["first_number"] + head, now, c.t0)
                head += 1
            continue
        e = tree[1]["number"]
        first, last, taken, m, demand = head, head, 1, 1, demand_of(c, head)
        while m < size and head + taken < arrived:
            i = head + taken
            taken += 1
            if mortal and is_dead(c, i, now):
                bury(tick, c.param, row["first_number"] + i, now, c.t0)
                if m == taken - 1:  # the first that has died: from here on the batch is linked
                    link(requests, first, m)
                continue
            if m < taken - 1:
                requests[last]["next"] = i
            last = i
            m += 1
            demand += demand_of(c, i)
        head += taken
        seconds = duration_s(c, e, m, demand, first, now)
        free_s = now + seconds
        slots[e]["free_s"] = free_s
        batches += 1
        batched += m
        busy_s += seconds
        if free_s < end:
            replica = c.replicas[slots[e]["replica"]]
            if m == taken:
                more_late, more_s, least, most = record(c, first, m, free_s, replica, False)
            else:
                more_late, more_s, least, most = record(c, first, m, free_s, replica, True)
            late += more_late
            latency_s += more_s
            least_s, most_s = min(least_s, least), max(most_s, most)
            served += m
            left_s += m * (free_s - c.t0)
            wrong += m * c.variants[replica["variant"]]["error_share"]
        else:
            if m == taken:
                link(requests, first, m)
            slots[e]["head"] = first
            slots[e]["size"] = m
        enter(tree, leaves, e, free_s)
    else:
        arrived = hi
    tick["batches"] += batches
    tick["batched"] += batched
    tick["served"] += served
    tick["late"] += late
    tick["busy_s"] += busy_s
    tick["latency_s"] += latency_s
    tick["inside_s"] += left_s
    tick["wrong"] += wrong
    if served > 0:
        widen(c, least_s, most_s)
    row["waiting"] = arrived - head
    row["head"], row["tail"] = head, arrived - 1
    link(requests, head, arrived - head)
    return arrived, now


@hot
def is_full_before(arrivals, head, size, over_s):
    """Whether a batch is complete before the wait of its first request is over, or with one that comes just then."""
    last_s = arrivals[head + size - 1]
    return last_s < over_s or (last_s == over_s and arrivals[max(head + size - 2, 0)] < over_s)


@hot
def link(requests, first, count):
    """Makes a list of `count` requests that follow each other."""
    for i in range(first, first + count):
        requests[i]["next"] = i + 1
