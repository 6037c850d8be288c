"""Replicas of a world at ticks: decisions taken in, notices, rollouts, and how fast replicas are."""

from __future__ import annotations

import math

from pilotage.engine.layout import DRAINING, GONE, LEAVING, READY, RESOURCE_COUNT, STARTING
from pilotage.engine.nodes import NODE_SPAN, ROUNDING, detach
from pilotage.engine.randomness import compiled, quantile

_RATE_S = 60.0  # over which arrivals are averaged; shorter, and chance looks like load


@compiled
def leave_now(f, s, k, now, until):
    """A replica that has nothing to do goes at the tick itself."""
    param, tick = f.params[s], f.ticks[s]
    r = f.replicas[param["replica_lo"] + k]
    tick["replica_s"] -= until - now
    if r["state"] != STARTING:
        tick["ready_s"] -= (until - now) * param["slots"]
    r["state"] = GONE
    r["gone_s"] = now
    detach(f, r, f.variants[r["variant"]], now)
    r["node"] = -1


@compiled
def stop_serving(f, s, k):
    row, param = f.rows[s], f.params[s]
    ready = f.ready[param["replica_lo"] : param["replica_hi"]]
    n = 0
    for j in range(row["ready"]):
        if ready[j] != k:
            ready[n] = ready[j]
            n += 1
    row["ready"] = n


@compiled
def is_idle(f, s, k):
    lo, per = f.params[s]["slot_lo"], f.params[s]["slots"]
    busy = 0
    for e in range(lo + k * per, lo + (k + 1) * per):
        busy += f.slots[e]["size"] > 0
    return busy == 0


@compiled
def drain(f, s, k, now, until):
    """Takes replica k out of service; it goes when it has finished what it has."""
    r = f.replicas[f.params[s]["replica_lo"] + k]
    if r["state"] == READY or r["state"] == LEAVING:
        stop_serving(f, s, k)
        r["state"] = DRAINING
        r["gone_s"] = now
    if r["state"] == STARTING or (r["waiting"] == 0 and is_idle(f, s, k)):
        leave_now(f, s, k, now, until)


@compiled
def open_books(f, s, tick_s):
    """The integrals of a tick over the replicas there are, as if nothing changed; changes correct them."""
    tick, param = f.ticks[s], f.params[s]
    tick["seconds"] = tick_s
    for k in range(f.rows[s]["span"]):
        state = f.replicas[param["replica_lo"] + k]["state"]
        if state != GONE:
            tick["replica_s"] += tick_s
        if state >= READY:
            tick["ready_s"] += tick_s * param["slots"]


@compiled
def follow_rate(row, rate_rps, tick_s):
    """Takes the arrivals of a tick into a row's smoothed rate, which placement rules see."""
    if row["rate_rps"] < 0:
        row["rate_rps"] = rate_rps
    row["rate_rps"] += (rate_rps - row["rate_rps"]) * min(tick_s / _RATE_S, 1.0)


# --- decisions ---------------------------------------------------------------------------------------------
@compiled
def decide(f, s, order, now, until):
    """Takes in the decision for service s. What it may not have (a pool, a variant) is ignored."""
    row, param = f.rows[s], f.params[s]
    if order["pool"] >= 0 and f.preference[s, order["pool"]] >= 0:
        row["pool"] = order["pool"]
    if 0 <= order["variant"] < param["variant_hi"] - param["variant_lo"]:
        row["variant"] = param["variant_lo"] + order["variant"]
    if order["max_batch"] > 0:
        row["max_batch"] = min(order["max_batch"], param["batch_limit"])
    if order["batch_wait_s"] >= 0:
        row["batch_wait_s"] = order["batch_wait_s"]
    left = max(order["release"], 0)
    taken = min(left, row["pending"])
    row["pending"] -= taken
    left -= taken
    for state in (STARTING, READY):
        while left > 0:
            k = youngest(f, s, state, -1, now)
            if k < 0:
                break
            drain(f, s, k, now, until)
            left -= 1
    row["pending"] += max(order["order"], 0)


@compiled
def youngest(f, s, state, spared, now):
    """The replica of service s last placed, in `state` and not of variant `spared`, that may be released; or -1."""
    row, param = f.rows[s], f.params[s]
    best, ordinal = -1, -1
    for k in range(row["span"]):
        r = f.replicas[param["replica_lo"] + k]
        if r["state"] == state and r["ordinal"] > ordinal and r["variant"] != spared:
            age_s = now - f.nodes[r["node"]]["ordered_s"]
            if age_s >= f.pools[r["pool"]]["min_lifetime_s"] - ROUNDING:
                best, ordinal = k, r["ordinal"]
    return best


@compiled
def act_on_notices(f, now, until):
    """Cordons the nodes that were told to go; their replicas are ordered anew, and drain at once or in time."""
    any_told = False
    for n in range(f.summary[NODE_SPAN]):
        node = f.nodes[n]
        if node["state"] == READY and node["notice_s"] <= now:
            node["state"] = DRAINING
        any_told |= node["state"] == DRAINING
    if not any_told:
        return
    for s in range(f.rows.shape[0]):
        for k in range(f.rows[s]["span"]):
            r = f.replicas[f.params[s]["replica_lo"] + k]
            serving = r["state"] == STARTING or r["state"] == READY
            if serving and f.nodes[r["node"]]["state"] == DRAINING:
                f.rows[s]["pending"] += 1
                f.ticks[s]["failed"] += 1
                if r["state"] == READY and f.pools[r["pool"]]["replace_first"]:
                    r["state"] = LEAVING
                else:
                    drain(f, s, k, now, until)
        let_go(f, s, now, until)


@compiled
def let_go(f, s, now, until):
    """Drains the leaving replicas that are more than those to come, and those whose time is up, the first first."""
    coming, leaving = f.rows[s]["pending"], 0
    for k in range(f.rows[s]["span"]):
        state = f.replicas[f.params[s]["replica_lo"] + k]["state"]
        coming += state == STARTING
        leaving += state == LEAVING
    while leaving > 0:
        first, least_s = -1, math.inf
        for k in range(f.rows[s]["span"]):
            r = f.replicas[f.params[s]["replica_lo"] + k]
            if r["state"] == LEAVING:
                pool = f.pools[r["pool"]]
                last_s = f.nodes[r["node"]]["notice_s"] + pool["notice_s"] - pool["grace_s"]
                if last_s < least_s:
                    first, least_s = k, last_s
        if leaving <= coming and least_s >= until:
            return
        drain(f, s, first, now, until)
        leaving -= 1


@compiled
def roll_out(f, s, now, until):
    """One step towards all replicas being of the variant in force: orders replacements, releases the replaced."""
    row, param = f.rows[s], f.params[s]
    total, ready, old = row["pending"], 0, 0
    for k in range(row["span"]):
        r = f.replicas[param["replica_lo"] + k]
        if r["state"] == STARTING or r["state"] == READY:
            total += 1
            ready += r["state"] == READY
            old += r["variant"] != row["variant"]
    row["replacing"] = min(row["replacing"], total)
    if old == 0 and row["replacing"] == 0:
        return
    desired = total - row["replacing"]
    while row["replacing"] > 0 and ready > desired:
        k = youngest(f, s, READY, row["variant"] if old > 0 else -1, now)
        if k < 0:
            break
        drain(f, s, k, now, until)
        ready -= 1
        old -= 1
        row["replacing"] -= 1
    surge = max((desired + 3) // 4, 1)
    more = min(old, surge) - row["replacing"]
    if more > 0:
        row["replacing"] += more
        row["pending"] += more


# --- new replicas ------------------------------------------------------------------------------------------
@compiled
def settle(f, s, k, n, now):
    """Puts a new replica into slot k of service s, on node n."""
    row, param, node = f.rows[s], f.params[s], f.nodes[n]
    pool, v = f.pools[node["pool"]], row["variant"]
    variant = f.variants[v]
    row["span"] = max(row["span"], k + 1)
    r = f.replicas[param["replica_lo"] + k]
    number = 4 * row["ordinal"]
    r["ordinal"] = row["ordinal"]
    row["ordinal"] += 1
    r["waiting"], r["closed"], r["forming"], r["lives"], r["able_s"] = 0, 0, 0, 0, 0.0
    r["state"] = STARTING
    r["node"], r["pool"], r["variant"] = n, node["pool"], v
    load_s = variant["load_s"] * quantile(f.tables, variant["load_table"], param["seed_start"], number + 1)
    if f.cached[n, v] <= now:
        start_s = load_s * variant["warm_share"]
    else:
        start_s = load_s + variant["pull_s"] * quantile(
            f.tables, variant["pull_table"], param["seed_start"], number
        )
    f.ticks[s]["replica_s"] += f.ticks[s]["seconds"]
    r["ordered_s"] = now
    r["ready_s"] = max(now, node["up_s"]) + start_s
    f.cached[n, v] = min(f.cached[n, v], r["ready_s"])  # from when on another starts from the cache
    r["crash_s"], r["death_s"], r["gone_s"] = math.inf, node["death_s"], math.inf
    r["pace"] = node["pace"]
    r["cached"], r["answered_s"], r["told"] = 0, 0.0, 0
    node["replicas"] += 1
    whole = variant["whole"] or pool["whole"]
    r["share"] = 1.0 if whole else 0.0
    for j in range(RESOURCE_COUNT):
        if whole:
            node["free"][j] = 0.0
        else:
            node["free"][j] -= variant["needs"][j]
            if variant["needs"][j] > 0:
                r["share"] = max(r["share"], variant["needs"][j] / pool["has"][j])


@compiled
def set_paces(f):
    """How much slower replicas are than the law says: their node's slowness, and their neighbours'."""
    for s in range(f.rows.shape[0]):
        for k in range(f.rows[s]["span"]):
            r = f.replicas[f.params[s]["replica_lo"] + k]
            if r["state"] == GONE:
                continue
            node = f.nodes[r["node"]]
            r["pace"] = node["pace"]
            if node["replicas"] > 1:
                r["pace"] *= slowdown_by_neighbours(f, s, k, r["node"])


@compiled
def slowdown_by_neighbours(f, s, k, n):
    factor = 1.0
    for other in range(f.rows.shape[0]):
        if f.slowdown[s, other] != 1.0:
            for j in range(f.rows[other]["span"]):
                r = f.replicas[f.params[other]["replica_lo"] + j]
                if r["state"] != GONE and r["node"] == n and not (other == s and j == k):
                    factor *= f.slowdown[s, other]
    return factor
