"""How queues of requests are served between two replica events: admission, batches, completions.

There is no event list. A queue is advanced to a time: `due` says when it acts next, given the slot that is free
first, and it acts until then. A completion is accounted when its slot is used again, when a router looks, or at
the end of the segment. So a request costs what it needs, however many replicas and services there are. The central
queue of a late-binding former, which most servers have, gets a loop of its own whose state stays in registers.

A request is its place among the row's arrivals; queues and batches are lists linked through `requests`.
`Context` bundles what belongs to one row (service in a world): records are written in place.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from pilotage.engine.layout import CLOSED, LATE_BINDING, LEAST_OUTSTANDING, POWER_OF_TWO, READY, ROUND_ROBIN
from pilotage.engine.randomness import compiled, draw, from_table, hot, quantile, uniform
from pilotage.metrics import BUCKET_BITS, BUCKETS, LOWEST_OCTAVE

Context = namedtuple(
    "Context",
    "row param tick arrivals requests slots replicas ready tree trees laws times tables variants pools scratch "
    "router messages t0",
)
LOWEST, HIGHEST, SECOND, IN_SECOND = BUCKETS, BUCKETS + 1, BUCKETS + 2, BUCKETS + 3  # after the histogram
_LOWEST_S = 2.0**LOWEST_OCTAVE


@hot
def bucket(latency_s):
    """`metrics.bucket_of`: exponent and leading mantissa bits of a double are a log-linear bucket as they are."""
    bits = np.float64(max(latency_s, _LOWEST_S)).view(np.int64) >> (52 - BUCKET_BITS)
    return min(bits - ((1023 + LOWEST_OCTAVE) << BUCKET_BITS), BUCKETS - 1)


# --- requests in queues ------------------------------------------------------------------------------------
@hot
def patience_s(param, number):
    """How long request `number` waits before its client leaves; infinite for most: they need no logarithm."""
    if param["abandoning"] > 0:
        u = uniform(param["seed_patience"], number)
        if u < param["abandoning"]:
            return -math.log1p(-u) * param["patience_s"]
    return math.inf


@hot
def is_dead(c, i, now):
    """Whether request i has waited longer than its timeout or its client's patience."""
    waited_s = now - c.arrivals[i]
    param = c.param
    if waited_s > param["timeout_s"]:
        return True
    if param["abandoning"] > 0:
        u = uniform(param["seed_patience"], c.row["first_number"] + i)
        # -log(1 - u) >= u: nearly all are told alive without a logarithm
        if u < param["abandoning"] and u * param["patience_s"] < waited_s:
            return -math.log1p(-u) * param["patience_s"] < waited_s
    return False


@compiled
def bury(tick, param, number, now, t0):
    """Counts a request that died waiting."""
    if param["timeout_s"] <= patience_s(param, number):
        tick["timed_out"] += 1
    else:
        tick["abandoned"] += 1
    tick["inside_s"] += now - t0


@hot
def append(c, queue, i):
    """Puts request i at the end of a queue."""
    if queue["waiting"] > 0:
        c.requests[queue["tail"]]["next"] = i
    else:
        queue["head"] = i
    queue["tail"] = i
    queue["waiting"] += 1


@hot
def pop(c, queue):
    i = queue["head"]
    queue["head"] = c.requests[i]["next"]
    queue["waiting"] -= 1
    return i


@compiled
def sweep(c, queue, now):
    """Removes the dead at the head of a queue. In a closed former's open batch they stay until it closes."""
    while queue["waiting"] > 0 and is_dead(c, queue["head"], now):
        in_line = c.param["former"] == CLOSED and queue["closed"] + queue["forming"] > 0
        if in_line and queue["closed"] == 0:
            return
        size = c.requests[queue["head"]]["batch"] if in_line else 0
        i = pop(c, queue)
        if in_line:
            if size > 1:
                c.requests[queue["head"]]["batch"] = size - 1
            else:
                queue["closed"] -= 1
        bury(c.tick, c.param, c.row["first_number"] + i, now, c.t0)


@hot
def close(c, queue, now):
    """Closes the open batch of a closed former."""
    if queue["closed"] == 0:
        queue["able_s"] = now
    c.requests[queue["forming_head"]]["batch"] = queue["forming"]
    queue["closed"] += 1
    queue["forming"] = 0


@hot
def admit(c, queue, i, now):
    """Puts request i into a queue from which batches are taken."""
    append(c, queue, i)
    if c.param["former"] == LATE_BINDING:
        waited = c.arrivals[queue["head"]] + c.param["batch_wait_s"] <= now
        if queue["waiting"] == c.row["max_batch"] or waited:
            queue["able_s"] = now
    else:
        if queue["forming"] == 0:
            queue["forming_head"] = i
            queue["forming_since_s"] = now
        queue["forming"] += 1
        waited = queue["forming_since_s"] + c.param["batch_wait_s"] <= now
        if queue["forming"] >= c.row["max_batch"] or waited:
            close(c, queue, now)


# --- batches -----------------------------------------------------------------------------------------------
@hot
def due(c, queue, free_s, now):
    """When a queue acts next: (time, whether arrivals at that very time come first).

    `free_s` is when the slot that is free first is free; nothing happens before `now`. Acting means starting a
    batch, or closing one.
    """
    able_s = max(free_s, now)
    if c.param["former"] == LATE_BINDING:
        if queue["waiting"] == 0:
            return math.inf, False
        if queue["waiting"] >= c.row["max_batch"]:
            return max(able_s, queue["able_s"]), False
        over_s = c.arrivals[queue["head"]] + c.param["batch_wait_s"]
        if over_s < able_s:
            return able_s, False
        return over_s, over_s > max(free_s, queue["able_s"])
    start_s = max(able_s, queue["able_s"]) if queue["closed"] > 0 else math.inf
    if queue["forming"] > 0:
        full = queue["forming"] >= c.row["max_batch"]
        over_s = now if full else queue["forming_since_s"] + c.param["batch_wait_s"]
        if over_s < start_s:
            return max(over_s, now), over_s >= now and not full
    return start_s, False


@hot
def act(c, queue, e, free_s, now):
    """What is due at `now`: buries the dead at the head, closes a batch, or starts one on slot e, free at free_s.

    Returns whether one started.
    """
    if c.param["former"] == LATE_BINDING:
        if is_dead(c, queue["head"], now):
            sweep(c, queue, now)
            return False
        return start(c, queue, e, c.row["max_batch"], now)
    if queue["closed"] == 0 or free_s > now:
        close(c, queue, now)
        return False
    size = c.requests[queue["head"]]["batch"]
    queue["closed"] -= 1
    return start(c, queue, e, size, now)


@hot
def start(c, queue, e, size, now):
    """Starts a batch of up to `size` living requests on slot e; returns whether there were any."""
    retire(c, e)
    head, last, n, demand = -1, -1, 0, 0.0
    closed = c.param["former"] == CLOSED
    while queue["waiting"] > 0 and size > 0:
        i = pop(c, queue)
        if is_dead(c, i, now):
            bury(c.tick, c.param, c.row["first_number"] + i, now, c.t0)
            if closed:  # a closed batch is not topped up
                size -= 1
            continue
        if n == 0:
            head = i
        else:
            c.requests[last]["next"] = i
        last = i
        n += 1
        size -= 1
        demand += demand_of(c, i)
    if n == 0:
        return False
    seconds = duration_s(c, e, n, demand, head)
    c.slots[e]["head"] = head
    c.slots[e]["size"] = n
    c.slots[e]["free_s"] = now + seconds
    c.tick["batches"] += 1
    c.tick["batched"] += n
    c.tick["busy_s"] += seconds
    return True


@hot
def demand_of(c, i):
    if c.param["demand"] < 0:
        return 1.0
    u = uniform(c.param["seed_demand"], c.row["first_number"] + i)
    return from_table(c.tables[c.param["demand"]], u)


@hot
def duration_s(c, e, n, demand, head):
    """How long a batch of n requests takes on slot e: the law's time, the noise of its first request, the pace."""
    replica = c.replicas[c.slots[e]["replica"]]
    law = c.laws[replica["variant"], replica["pool"]]
    at = law["offset"] + 2 * n
    seconds = (c.times[at] + c.times[at + 1] * demand) * replica["pace"]
    if law["noise"] >= 0:
        number = c.row["first_number"] + head
        seconds *= from_table(c.tables[law["noise"]], uniform(c.param["seed_noise"], number))
    return seconds


@hot
def record(c, i, n, end_s, replica, linked):
    """Puts the latencies of a batch of n requests from i on, complete at end_s, into the tick's histogram.

    The requests are `linked`, or follow each other. Returns how many were late, the sum of the latencies, the
    least and the greatest, in seconds.
    """
    arrivals, requests, scratch, slo_s = c.arrivals, c.requests, c.scratch, c.param["slo_s"]
    network_s = c.pools[replica["pool"]]["network_s"]
    late, latencies_s = 0, 0.0
    most, least = 0.0, math.inf
    overhead_s, routed = c.param["overhead_s"], c.messages.shape[0] > 0
    for _ in range(n):
        latency_s = end_s - arrivals[i] + network_s
        if overhead_s > 0:
            number = c.row["first_number"] + i
            latency_s += overhead_s * quantile(
                c.tables, c.param["overhead_table"], c.param["seed_noise"] + np.uint64(1), number
            )
        if routed:
            c.messages[i]["latency_s"] = latency_s
        latencies_s += latency_s
        late += latency_s > slo_s
        most, least = max(most, latency_s), min(least, latency_s)
        scratch[bucket(latency_s)] += 1
        i = requests[i]["next"] if linked else i + 1
    return late, latencies_s, least, most


@hot
def widen(c, least_s, most_s):
    """The stretch of the tick's histogram that is in use."""
    c.scratch[LOWEST] = min(c.scratch[LOWEST], bucket(least_s))
    c.scratch[HIGHEST] = max(c.scratch[HIGHEST], bucket(most_s))


@hot
def retire(c, e):
    """Accounts the batch that slot e has completed, if any; the caller knows that its time has come."""
    slot, tick = c.slots[e], c.tick
    n = slot["size"]
    if n > 0:
        replica = c.replicas[slot["replica"]]
        late, latencies_s, least_s, most_s = record(c, slot["head"], n, slot["free_s"], replica, True)
        widen(c, least_s, most_s)
        if c.messages.shape[0] > 0:
            tell(c, replica, slot["head"], n, slot["free_s"])
        slot["size"] = 0
        tick["late"] += late
        tick["latency_s"] += latencies_s
        tick["served"] += n
        tick["wrong"] += n * c.variants[replica["variant"]]["error_share"]
        tick["inside_s"] += n * (slot["free_s"] - c.t0)


@compiled
def tell(c, replica, i, n, done_s):
    """Puts a completed batch, which request i heads, where the router will hear of it: in order of completion."""
    message = c.messages[i]
    message["done_s"], message["size"] = done_s, n
    before, after = -1, replica["told_head"]
    if replica["told"] > 0 and c.messages[replica["told_tail"]]["done_s"] <= done_s:
        before = replica["told_tail"]
    else:
        for _ in range(replica["told"]):
            if c.messages[after]["done_s"] > done_s:
                break
            before, after = after, c.messages[after]["told_next"]
        message["told_next"] = after
    if before < 0:
        replica["told_head"] = i
    else:
        c.messages[before]["told_next"] = i
    if replica["told"] == 0 or before == replica["told_tail"]:
        replica["told_tail"] = i
    replica["told"] += 1


@hot
def hear_of_deaths(c, replica, count):
    """The router hears at once of requests that died waiting at a replica."""
    if c.messages.shape[0] > 0:
        replica["cached"] = max(replica["cached"] - count, 0)


# --- arrivals ----------------------------------------------------------------------------------------------
@hot
def upto(arrivals, lo, hi, t0, at_s):
    """The first of the sorted arrivals in [lo, hi) that is not before `at_s` after t0; it is near, so we gallop."""
    step = 1
    while lo + step < hi and arrivals[lo + step] - t0 < at_s:
        step *= 2
    at_most = min(lo + step, hi)
    while lo < at_most:
        middle = (lo + at_most) >> 1
        if arrivals[middle] - t0 < at_s:
            lo = middle + 1
        else:
            at_most = middle
    return lo


@compiled
def count_arrivals(c, lo, hi):
    """The arrivals [lo, hi) of a segment: their number, their time in the tick, and the busiest second.

    A second may be cut by a replica event: what came before the cut is kept in the scratch.
    """
    arrivals, t0 = c.arrivals, c.t0
    # four sums, for additions that wait for each other take longer than all else here
    first_s, second_s, third_s, fourth_s = 0.0, 0.0, 0.0, 0.0
    for i in range(lo, hi - 3, 4):
        first_s += arrivals[i] - t0
        second_s += arrivals[i + 1] - t0
        third_s += arrivals[i + 2] - t0
        fourth_s += arrivals[i + 3] - t0
    for i in range(hi - (hi - lo) % 4, hi):
        first_s += arrivals[i] - t0
    second, in_second, peak = c.scratch[SECOND], c.scratch[IN_SECOND], c.tick["peak_second"]
    i = lo
    while i < hi:
        now_second = int(arrivals[i] - t0)
        following = upto(arrivals, i, hi, t0, now_second + 1)
        if now_second != second:
            second, in_second = now_second, 0
        in_second += following - i
        peak = max(peak, in_second)
        i = following
    c.tick["peak_second"] = peak
    c.scratch[SECOND], c.scratch[IN_SECOND] = second, in_second
    c.tick["inside_s"] -= (first_s + second_s) + (third_s + fourth_s)
    c.tick["arrived"] += hi - lo
    c.row["arrival_lo"] = hi


@hot
def reject(c, now):
    c.tick["rejected"] += 1
    c.tick["inside_s"] += now - c.t0


# --- the central queue -------------------------------------------------------------------------------------
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
    limit, size, wait_s = c.param["queue_limit"], row["max_batch"], c.param["batch_wait_s"]
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
        seconds = duration_s(c, e, m, demand, first)
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


# --- queues of replicas ------------------------------------------------------------------------------------
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
