"""What queues of requests and batches are made of: admission, formers, batches, completions, counting.

There is no event list. A queue is advanced to a time: `due` says when it acts next, given the slot that is free
first, and it acts until then. A completion is accounted when its slot is used again, when a router looks, or at
the end of the segment. So a request costs what it needs, however many replicas and services there are. `central`
advances one queue for all replicas in this way, `bound` the queues of replicas, `router` those behind Ray Serve's.

A request is its place among the row's arrivals; queues and batches are lists linked through `requests`.
`Context` bundles what belongs to one row (service in a world): records are written in place.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from pilotage.engine.layout import CLOSED, LATE_BINDING
from pilotage.engine.randomness import compiled, from_table, hot, quantile, uniform
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
        waited = c.arrivals[queue["head"]] + c.row["batch_wait_s"] <= now
        if queue["waiting"] == c.row["max_batch"] or waited:
            queue["able_s"] = now
    else:
        if queue["forming"] == 0:
            queue["forming_head"] = i
            queue["forming_since_s"] = now
        queue["forming"] += 1
        waited = queue["forming_since_s"] + c.row["batch_wait_s"] <= now
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
        over_s = c.arrivals[queue["head"]] + c.row["batch_wait_s"]
        if over_s < able_s:
            return able_s, False
        return over_s, over_s > max(free_s, queue["able_s"])
    start_s = max(able_s, queue["able_s"]) if queue["closed"] > 0 else math.inf
    if queue["forming"] > 0:
        full = queue["forming"] >= c.row["max_batch"]
        over_s = now if full else queue["forming_since_s"] + c.row["batch_wait_s"]
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
    seconds = duration_s(c, e, n, demand, head, now)
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
def duration_s(c, e, n, demand, head, now):
    """How long a batch of n requests takes that starts now on slot e.

    The law's time, longer if the slot is cold, the pace, the noise of its first request, the stall that it comes upon.
    The slot is left as warm as it will be when the batch is complete.
    """
    slot = c.slots[e]
    replica = c.replicas[slot["replica"]]
    law = c.laws[replica["variant"], replica["pool"]]
    at = law["offset"] + 2 * n
    seconds = c.times[at] + c.times[at + 1] * demand
    cold = 0.0
    if law["idle_s"] > 0:
        cold = 1 - (1 - slot["cold"]) * math.exp((slot["free_s"] - now) / law["cooling_s"])
        seconds += law["idle_s"] * cold
    seconds *= replica["pace"]
    if law["noise"] >= 0:
        number = c.row["first_number"] + head
        seconds *= from_table(c.tables[law["noise"]], uniform(c.param["seed_noise"], number))
    if law["stalls_per_s"] > 0:
        idle = 1 - math.exp((slot["free_s"] - now) / law["stall_s"])
        hit = law["stalls_per_s"] * (seconds + law["stall_s"] * idle)
        u = uniform(c.param["seed_noise"] + np.uint64(2), c.row["first_number"] + head)
        if u < hit:
            seconds -= law["stall_s"] * math.log(max(u, 1e-12) / hit)
    if law["idle_s"] > 0:
        slot["cold"] = cold * math.exp(-seconds / law["warming_s"])
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
