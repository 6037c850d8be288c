"""One service through one tick: segments between replica events, what replicas' deaths do, and the tick's books."""

from __future__ import annotations

import math

import numpy as np

from pilotage.engine.bound import bind_all, bring, executing, open_door, serve_bound
from pilotage.engine.central import serve_central
from pilotage.engine.layout import CENTRAL, CLOSED, DRAINING, GONE, RAY_SERVE, READY, STARTING
from pilotage.engine.queues import HIGHEST, IN_SECOND, LOWEST, SECOND, hear_of_deaths, sweep
from pilotage.engine.randomness import compiled, quantile, waiting_time
from pilotage.engine.router import forget, in_transit, serve_routed, start_tasks, sweep_pending
from pilotage.metrics import BUCKET_MIDPOINTS_S, BUCKETS

DEATH, CRASH, READINESS, NOTHING = 0, 1, 2, 3  # in the order in which events of the same time happen


@compiled
def run(c, until):
    """Takes a service from `c.t0` to `until`, from one replica event to the next."""
    now = c.t0
    c.scratch[LOWEST], c.scratch[HIGHEST], c.scratch[SECOND], c.scratch[IN_SECOND] = BUCKETS, -1, -1, 0
    carry_over(c, now, 1.0)
    sweep_all(c, now)
    while True:
        at_s, kind, k = next_event(c, until)
        if at_s > now:
            serve(c, now, at_s)
            now = at_s
        if kind != NOTHING and c.replicas[k]["state"] == GONE:
            continue  # it has drained in the meantime
        if kind == DEATH:
            die(c, k, now, until)
        elif kind == CRASH:
            crash(c, k, now, until)
        elif kind == READINESS:
            get_ready(c, k, now, until)
        else:
            return


@compiled
def carry_over(c, now, sign):
    """A batch counts as busy in full when it starts: what lies beyond the end of a tick belongs to the next."""
    for e in range(c.row["span"] * c.param["slots"]):
        if c.slots[e]["size"] > 0:
            c.tick["busy_s"] += sign * (c.slots[e]["free_s"] - now)


@compiled
def next_event(c, until):
    """The next replica event before `until`: (time, kind, replica); at `until` itself there is none."""
    at_s, kind, who = until, NOTHING, -1
    for k in range(c.row["span"]):
        r = c.replicas[k]
        state = r["state"]
        if state == GONE:
            continue
        if r["death_s"] < at_s or (r["death_s"] == at_s < until and kind > DEATH):
            at_s, kind, who = r["death_s"], DEATH, k
        if state == STARTING:
            if r["ready_s"] < at_s:
                at_s, kind, who = r["ready_s"], READINESS, k
        elif r["crash_s"] < at_s or (r["crash_s"] == at_s < until and kind > CRASH):
            at_s, kind, who = r["crash_s"], CRASH, k
    return at_s, kind, who


@compiled
def sweep_all(c, now):
    if c.param["routing"] == RAY_SERVE:
        sweep_pending(c, now)
    else:
        sweep(c, c.row, now)
    if c.param["routing"] != CENTRAL:
        for k in range(c.row["span"]):
            r = c.replicas[k]
            if r["state"] >= READY:
                waiting = r["waiting"]
                sweep(c, r, now)
                hear_of_deaths(c, r, waiting - r["waiting"])
                if r["state"] == DRAINING and r["waiting"] == 0 and executing(c, k) == 0:
                    vanish(c, k, now, c.t0 + c.tick["seconds"])


@compiled
def serve(c, now, end):
    """The segment [now, end): the requests, then the completions before its end, then who has drained."""
    if c.param["routing"] == CENTRAL:
        serve_central(c, now, end)
        for k in range(c.row["span"]):
            bring(c, k, now, end)
    elif c.param["routing"] == RAY_SERVE:
        serve_routed(c, now, end)
    else:
        serve_bound(c, now, end)
    until = c.t0 + c.tick["seconds"]
    for k in range(c.row["span"]):
        r = c.replicas[k]
        if r["state"] == DRAINING and r["waiting"] == 0 and executing(c, k) == 0:
            last_s = max(r["gone_s"], now)
            for e in range(k * c.param["slots"], (k + 1) * c.param["slots"]):
                last_s = max(last_s, c.slots[e]["free_s"])
            vanish(c, k, last_s, until)


@compiled
def vanish(c, k, now, until):
    """Replica k goes; its share of the node is free when the tick's books are closed."""
    r = c.replicas[k]
    if r["state"] != STARTING:
        c.tick["ready_s"] -= (until - now) * c.param["slots"]
    c.tick["replica_s"] -= until - now
    r["state"] = GONE
    r["gone_s"] = now


@compiled
def get_ready(c, k, now, until):
    """Replica k starts to serve."""
    r = c.replicas[k]
    r["state"] = READY
    number = 64 * r["ordinal"] + min(r["lives"], 63)
    r["crash_s"] = now + waiting_time(c.param["seed_start"] + np.uint64(1), number, c.param["crashes_per_s"])
    for e in range(k * c.param["slots"], (k + 1) * c.param["slots"]):
        c.slots[e]["free_s"] = now
        c.slots[e]["size"] = 0
        c.slots[e]["cold"] = 1.0
    c.tick["ready_s"] += (until - now) * c.param["slots"]
    c.ready[c.row["ready"]] = k
    c.row["ready"] += 1
    if c.param["routing"] == RAY_SERVE:
        start_tasks(c, now)
    elif c.param["routing"] != CENTRAL and c.row["waiting"] > 0:
        open_door(c, now)


@compiled
def stop_serving(c, k):
    """Takes replica k off the list of those that get work."""
    n = 0
    for j in range(c.row["ready"]):
        if c.ready[j] != k:
            c.ready[n] = c.ready[j]
            n += 1
    c.row["ready"] = n


@compiled
def die(c, k, now, until):
    """Replica k goes down with its node. It is ordered anew, unless it was to go."""
    r = c.replicas[k]
    if r["state"] < DRAINING:
        c.row["pending"] += 1
    c.tick["failed"] += 1
    vanish(c, k, now, until)
    for other in range(c.row["span"]):  # no request goes to a replica that dies at the same time
        if c.replicas[other]["death_s"] <= now:
            stop_serving(c, other)
    abandon_work(c, k, now)


@compiled
def crash(c, k, now, until):
    """Replica k loses its work, and starts again on its node from the cache, unless it was to go."""
    r = c.replicas[k]
    c.tick["failed"] += 1
    stop_serving(c, k)
    if r["state"] >= DRAINING:
        vanish(c, k, now, until)
    else:
        c.tick["ready_s"] -= (until - now) * c.param["slots"]
        variant = c.variants[r["variant"]]
        load = quantile(c.tables, variant["load_table"], c.param["seed_start"], 4 * r["ordinal"] + 1)
        r["state"] = STARTING
        r["ready_s"] = now + variant["load_s"] * load * variant["warm_share"]
        r["lives"] += 1
    abandon_work(c, k, now)


@compiled
def abandon_work(c, k, now):
    """What becomes of the requests of a replica that died: lost, or served anew."""
    r = c.replicas[k]
    first = -1
    for e in range(k * c.param["slots"], (k + 1) * c.param["slots"]):
        slot = c.slots[e]
        if slot["size"] > 0:
            c.tick["busy_s"] -= slot["free_s"] - now
            first = merge(c, first, slot["head"], slot["size"])
            slot["size"] = 0
    first = merge(c, first, r["head"], r["waiting"])
    r["waiting"], r["closed"], r["forming"] = 0, 0, 0
    if c.param["retry"] == 0:
        while first >= 0:
            following = c.requests[first]["next"]
            c.tick["lost"] += 1
            c.tick["inside_s"] += now - c.t0
            first = following
    if c.param["routing"] == RAY_SERVE:
        forget(c, k, first, now)
    elif first >= 0 and (c.param["routing"] == CENTRAL or c.row["ready"] == 0):
        put_back(c, first)
    elif first >= 0:
        bind_all(c, first, now)


@compiled
def merge(c, first, other, count):
    """Merges `count` linked requests from `other` on into a list in order of number; returns its first."""
    before = -1
    for _ in range(count):
        following = c.requests[other]["next"]
        if before >= 0 and before > other:
            before = -1
        after = first if before < 0 else c.requests[before]["next"]
        while 0 <= after < other:
            before, after = after, c.requests[after]["next"]
        c.requests[other]["next"] = after
        if before < 0:
            first = other
        else:
            c.requests[before]["next"] = other
        before = other
        other = following
    return first


@compiled
def put_back(c, first):
    """Puts a list of requests before the central queue or the door; a closed former takes them as closed batches."""
    row = c.row
    count, last = 0, first
    batching = c.param["former"] == CLOSED and c.param["routing"] == CENTRAL
    i = first
    head = first
    while i >= 0:
        if batching and count % row["max_batch"] == 0:
            head = i
            row["closed"] += 1
            c.requests[head]["batch"] = 0
        if batching:
            c.requests[head]["batch"] += 1
        count += 1
        last = i
        i = c.requests[i]["next"]
    if row["waiting"] > 0:
        c.requests[last]["next"] = row["head"]
    else:
        row["tail"] = last
    row["head"] = first
    row["waiting"] += count


# --- books -------------------------------------------------------------------------------------------------
@compiled
def close_books(c, hist, until):
    """What a monitor would see now, and the tick's latencies."""
    row, tick = c.row, c.tick
    carry_over(c, until, -1.0)
    waiting, in_execution = row["waiting"], 0
    if c.param["routing"] == RAY_SERVE:
        waiting += in_transit(c)
    for k in range(row["span"]):
        state = c.replicas[k]["state"]
        if state != GONE:
            waiting += c.replicas[k]["waiting"]
            in_execution += executing(c, k)
        if state == STARTING:
            tick["starting"] += 1
        elif state == READY:
            tick["ready"] += 1
        elif state != GONE:
            tick["draining"] += 1
    show_desired(row, tick)
    tick["executing"] = in_execution
    tick["waiting"] = waiting
    tick["inside_s"] += (waiting + in_execution) * (until - c.t0)
    tick["max_batch"] = row["max_batch"]
    tick["latency_p95_s"] = flush(hist, c.scratch, tick["served"])


@compiled
def show_desired(row, tick):
    """The replicas that a rollout has in excess are not shown."""
    excess = row["replacing"]
    hidden = min(excess, row["pending"])
    tick["pending"] = row["pending"] - hidden
    excess -= hidden
    hidden = min(excess, tick["starting"])
    tick["starting"] -= hidden
    tick["ready"] -= min(excess - hidden, tick["ready"])


@compiled
def flush(hist, scratch, served):
    """Moves a tick's histogram into the run's; returns the tick's 95th percentile, NaN if nothing finished."""
    p95, seen, rank = math.nan, 0, math.ceil(0.95 * served)
    for b in range(scratch[LOWEST], scratch[HIGHEST] + 1):
        n = scratch[b]
        if n > 0:
            if seen < rank <= seen + n:
                p95 = BUCKET_MIDPOINTS_S[b]
            seen += n
            hist[b] += n
            scratch[b] = 0
    return p95
