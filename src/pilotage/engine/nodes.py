"""Nodes and replicas of a world: decisions taken in, notices, rollouts, placement, and bills.

All of this happens at ticks, one world at a time; `Fleet` bundles the arrays of one world.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from pilotage.engine.layout import DRAINING, GONE, LEAVING, READY, RESOURCE_COUNT, STARTING
from pilotage.engine.randomness import compiled, hot, quantile, uniform, waiting_time

Fleet = namedtuple(
    "Fleet",
    "rows params ticks replicas ready slots nodes summary in_zone cached closures candidate preference zone_ok "
    "slowdown pools zones variants laws times tables seed",
)
NODES_OPENED, NODE_SPAN = 0, 1  # summary: the ordinal of the next node, and the slots that were ever used;
POOL_NODES = 2  # from here on, nodes per pool
_ROUNDING = 1e-9  # ticks of 0.1 s do not add up to whole seconds exactly; nobody is billed for that
_RATE_S = 60.0  # over which arrivals are averaged; shorter, and chance looks like load
NODE_DRAWS = 8  # draws of one node: boot, failure, slowness, crash, interruption


# --- the life of nodes -------------------------------------------------------------------------------------
@compiled
def open_node(f, p, zone, service, now):
    """Orders a node of pool p in a zone; what will happen to it is drawn now. Returns its slot."""
    n = 0
    while f.nodes[n]["state"] != GONE:
        n += 1
    f.summary[NODE_SPAN] = max(f.summary[NODE_SPAN], n + 1)
    number = NODE_DRAWS * f.summary[NODES_OPENED]
    node, pool = f.nodes[n], f.pools[p]
    node["ordinal"] = f.summary[NODES_OPENED]
    f.summary[NODES_OPENED] += 1
    f.summary[POOL_NODES + p] += 1
    f.cached[n, :] = math.inf
    node["state"] = READY
    node["pool"], node["zone"], node["owner"], node["replicas"] = p, zone, service, 0
    for j in range(RESOURCE_COUNT):
        node["free"][j] = pool["has"][j]
    node["ordered_s"] = now
    node["up_s"] = now + pool["boot_s"] * quantile(f.tables, pool["boot_table"], f.seed, number)
    node["empty_s"] = now
    slow = uniform(f.seed, number + 2) < pool["slow_share"]
    node["pace"] = pool["slow_factor"] if slow else 1.0
    node["billed_s"], node["share"], node["cost_usd"], node["cost_s"] = 0.0, 0.0, 0.0, 0.0
    node["failing"] = 0
    set_fate(f, node, number)
    if uniform(f.seed, number + 1) < pool["failing"]:
        node["failing"] = 1
        node["death_s"] = min(node["death_s"], node["up_s"])
    return n


@compiled
def set_fate(f, node, number):
    """When the node is told to go, and when it goes: by a crash, an interruption, or its zone's next closure."""
    pool = f.pools[node["pool"]]
    node["death_s"] = node["up_s"] + waiting_time(f.seed, number + 3, pool["crashes_per_s"])
    node["notice_s"] = node["up_s"] + waiting_time(f.seed, number + 4, pool["interruptions_per_s"])
    node["death_s"] = min(node["death_s"], node["notice_s"] + pool["notice_s"])
    for i in range(f.closures.shape[0]):
        closure = f.closures[i]
        mine = closure["pool"] == node["pool"] and closure["zone"] == node["zone"]
        if mine and closure["end_s"] > node["ordered_s"]:
            node["death_s"] = min(node["death_s"], closure["start_s"])
            if closure["notice_s"] > 0:
                node["notice_s"] = min(node["notice_s"], closure["start_s"] - closure["notice_s"])


@hot
def is_closed(f, p, zone, now):
    for i in range(f.closures.shape[0]):
        closure = f.closures[i]
        here = closure["pool"] == p and closure["zone"] == zone
        if here and closure["start_s"] - closure["notice_s"] <= now < closure["end_s"]:
            return True
    return False


@compiled
def end_s(f, node, until):
    """When a node goes, or `until` if it is there till then: at its death, or after it has been empty for long."""
    end = min(until, node["death_s"])
    if node["replicas"] == 0:
        end = min(end, max(node["empty_s"] + f.pools[node["pool"]]["idle_removal_s"], node["ordered_s"]))
    return end


@compiled
def bill(f, node, until):
    """Brings a node's bill up to `until`: its life, at least the minimum, in whole granules.

    A node that never came is free.
    """
    pool = f.pools[node["pool"]]
    node["cost_usd"], node["cost_s"] = 0.0, 0.0
    if node["failing"]:
        return
    billed_s = max(end_s(f, node, until) - node["ordered_s"], pool["minimum_s"])
    if pool["granularity_s"] > 0:
        billed_s = math.ceil(billed_s / pool["granularity_s"] - _ROUNDING) * pool["granularity_s"]
    node["cost_s"] = billed_s - node["billed_s"]
    node["cost_usd"] = node["cost_s"] * pool["usd_per_s"]
    node["billed_s"] = billed_s


@compiled
def clear(f, now):
    """Removes the nodes that have gone by now. They are billed already, but for one that has not lived at all."""
    for n in range(f.summary[NODE_SPAN]):
        node = f.nodes[n]
        empty = node["replicas"] == 0
        if node["state"] != GONE and (node["death_s"] < now or (empty and end_s(f, node, math.inf) <= now)):
            bill(f, node, now)
            f.ticks[node["owner"]]["node_usd"] += node["cost_usd"]
            f.ticks[node["owner"]]["node_s"] += node["cost_s"]
            node["state"] = GONE
            f.summary[POOL_NODES + node["pool"]] -= 1
    while f.summary[NODE_SPAN] > 0 and f.nodes[f.summary[NODE_SPAN] - 1]["state"] == GONE:
        f.summary[NODE_SPAN] -= 1


@compiled
def detach(f, r, variant, at_s):
    """Gives back what a replica that has gone had of its node."""
    node = f.nodes[r["node"]]
    node["replicas"] -= 1
    node["empty_s"] = max(node["empty_s"], at_s)
    for j in range(RESOURCE_COUNT):
        if node["replicas"] == 0 or variant["whole"]:
            node["free"][j] = f.pools[node["pool"]]["has"][j]  # exactly, whatever rounding there was
        else:
            node["free"][j] += variant["needs"][j]


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
            if age_s >= f.pools[r["pool"]]["min_lifetime_s"] - _ROUNDING:
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


# --- placement ---------------------------------------------------------------------------------------------
@compiled
def place_all(f, rule, weights, jointly, now):
    """Gives pending replicas nodes until nothing fits: one per service and round, or the best pair of all."""
    placed = True
    while placed:
        placed = False
        best, chosen, choice = -math.inf, -1, (-1, -1, -1)
        for s in range(f.rows.shape[0]):
            if f.rows[s]["pending"] > 0 and vacancy(f, s) >= 0:
                score, n, p, zone = find(f, s, rule, weights, now)
                if jointly:
                    if score > best:
                        best, chosen, choice = score, s, (n, p, zone)
                elif score > -math.inf:
                    put(f, s, n, p, zone, now)
                    placed = True
        if chosen >= 0:
            put(f, chosen, choice[0], choice[1], choice[2], now)
            placed = True


@compiled
def vacancy(f, s):
    """The first free replica slot of service s, or -1."""
    row, param = f.rows[s], f.params[s]
    for k in range(row["span"]):
        r = f.replicas[param["replica_lo"] + k]
        if r["state"] == GONE and r["node"] < 0:
            return k
    return row["span"] if row["span"] < param["replica_hi"] - param["replica_lo"] else -1


@hot
def may_go(f, s, p, zone):
    row, param = f.rows[s], f.params[s]
    return (
        f.preference[s, p] >= 0
        and (row["pool"] < 0 or row["pool"] == p)
        and f.laws[row["variant"], p]["offset"] >= 0
        and f.zone_ok[s, zone]
        and param["max_per_node"] > 0
    )


@hot
def fits(f, s, node):
    """Whether one more replica of service s fits on a node that is open."""
    row, pool = f.rows[s], f.pools[node["pool"]]
    variant = f.variants[row["variant"]]
    if node["siblings"] >= f.params[s]["max_per_node"]:
        return False
    if pool["whole"] or variant["whole"]:
        return node["replicas"] == 0
    short = 0
    for j in range(RESOURCE_COUNT):
        short += variant["needs"][j] > node["free"][j] + _ROUNDING
    return short == 0


@compiled
def find(f, s, rule, weights, now):
    """Where the rule scores a replica of service s highest: (score, node, pool, zone), minus infinity if nowhere.

    Node -1 is a new one in the pool and zone.
    """
    best, best_n, best_p, best_zone, ordinal = -math.inf, -1, -1, -1, 0
    describe_service(f, s)
    emptiest = emptiest_zone(f, s, now)
    if emptiest < 0:
        return best, best_n, best_p, best_zone
    for n in range(f.summary[NODE_SPAN]):
        node = f.nodes[n]
        if is_candidate(f, s, node, now):
            score = assess(f, s, n, node["pool"], node["zone"], emptiest, rule, weights, now)
            if score > best or (score == best and best_n >= 0 and node["ordinal"] < ordinal):
                best, best_n, ordinal = score, n, node["ordinal"]
    for preference in range(f.pools.shape[0]):
        for p in range(f.pools.shape[0]):
            if f.preference[s, p] == preference:
                for z in range(f.pools[p]["zone_lo"], f.pools[p]["zone_hi"]):
                    if has_room(f, s, p, f.zones[z], now):
                        score = assess(f, s, -1, p, f.zones[z], emptiest, rule, weights, now)
                        if score > best:
                            best, best_n, best_p, best_zone = score, -1, p, f.zones[z]
    return best, best_n, best_p, best_zone


@compiled
def put(f, s, n, p, zone, now):
    """Puts one pending replica of service s on node n, or on a new one (n < 0) of pool p in a zone."""
    k = vacancy(f, s)
    if n < 0:
        n = open_node(f, p, zone, s, now)
    settle(f, s, k, n, now)
    f.rows[s]["pending"] -= 1


@compiled
def describe_service(f, s):
    """How many replicas service s has in all, on spot nodes, per node and per zone."""
    row, param, c = f.rows[s], f.params[s], f.candidate[0]
    f.in_zone[:] = 0
    c["serving"], c["on_spot"], c["pending"] = 0, 0, row["pending"]
    for n in range(f.summary[NODE_SPAN]):
        f.nodes[n]["siblings"] = 0
    for k in range(row["span"]):
        r = f.replicas[param["replica_lo"] + k]
        if r["state"] == STARTING or r["state"] == READY:
            f.nodes[r["node"]]["siblings"] += 1
            f.in_zone[f.nodes[r["node"]]["zone"]] += 1
            c["serving"] += 1
            c["on_spot"] += f.pools[r["pool"]]["spot"]


@hot
def is_candidate(f, s, node, now):
    return (
        node["state"] == READY
        and node["death_s"] > now
        and may_go(f, s, node["pool"], node["zone"])
        and fits(f, s, node)
    )


@hot
def has_room(f, s, p, zone, now):
    """Whether pool p can open a node in a zone on which a replica of service s fits."""
    room = f.summary[POOL_NODES + p] < f.pools[p]["max_nodes"]
    variant, short = f.variants[f.rows[s]["variant"]], 0
    if not (variant["whole"] or f.pools[p]["whole"]):
        for j in range(RESOURCE_COUNT):
            short += variant["needs"][j] > f.pools[p]["has"][j] + _ROUNDING
    return room and short == 0 and may_go(f, s, p, zone) and not is_closed(f, p, zone, now)


@compiled
def emptiest_zone(f, s, now):
    """The fewest replicas that service s has in a zone with a candidate; -1 if there is no candidate."""
    fewest = -1
    for n in range(f.summary[NODE_SPAN]):
        zone = f.nodes[n]["zone"]
        if (fewest < 0 or f.in_zone[zone] < fewest) and is_candidate(f, s, f.nodes[n], now):
            fewest = f.in_zone[zone]
    for p in range(f.pools.shape[0]):
        for z in range(f.pools[p]["zone_lo"], f.pools[p]["zone_hi"]):
            zone = f.zones[z]
            if (fewest < 0 or f.in_zone[zone] < fewest) and has_room(f, s, p, zone, now):
                fewest = f.in_zone[zone]
    return fewest


@compiled
def assess(f, s, n, p, zone, emptiest, rule, weights, now):
    """The rule's score of node n, or of a new node (n < 0) of pool p in a zone."""
    c, pool = f.candidate[0], f.pools[p]
    v = f.rows[s]["variant"]
    variant = f.variants[v]
    whole = variant["whole"] or pool["whole"]
    c["node"], c["pool"], c["zone"], c["preference"], c["service"] = n, p, zone, f.preference[s, p], s
    for j in range(RESOURCE_COUNT):
        c["has"][j] = pool["has"][j]
        c["free"][j] = pool["has"][j] if n < 0 else f.nodes[n]["free"][j]
        c["needs"][j] = pool["has"][j] if whole else variant["needs"][j]
    c["usd_per_hour"] = pool["usd_per_s"] * 3600
    c["spot"] = pool["spot"]
    c["interruptions_per_hour"] = pool["interruptions_per_s"] * 3600
    warm = n >= 0 and f.cached[n, v] <= now
    up_s = pool["boot_s"] if n < 0 else max(f.nodes[n]["up_s"] - now, 0.0)
    c["ready_in_s"] = up_s + (
        variant["load_s"] * variant["warm_share"] if warm else variant["pull_s"] + variant["load_s"]
    )
    failures = pool["failing"] / (1 - pool["failing"])
    c["recovery_s"] = pool["boot_s"] * (1 + failures) + variant["pull_s"] + variant["load_s"]
    c["batch_s"] = batch_s(f, s, v, p)
    at_once = f.params[s]["batch_limit"] * f.params[s]["slots"]
    c["needed"] = max(f.rows[s]["rate_rps"], 0.0) * c["batch_s"] / at_once
    c["replicas"] = 0 if n < 0 else f.nodes[n]["replicas"]
    c["siblings"] = 0 if n < 0 else f.nodes[n]["siblings"]
    c["in_zone"] = f.in_zone[zone]
    c["in_emptiest_zone"] = emptiest
    c["room"] = pool["max_nodes"] - f.summary[POOL_NODES + p]
    c["failing"] = pool["failing"] if n < 0 else 0.0
    c["missed_usd_per_hour"] = missed_usd_per_hour(f, s, v, p)
    c["slowdown"], c["harm_usd_per_hour"] = 1.0, 0.0
    if n >= 0 and f.slowdown.shape[0] > 0:
        interfere(f, s, n)
    c["worth_usd_per_hour"] = worth_usd_per_hour(f, s)
    c["filled_usd_per_hour"], c["unfilled"] = c["worth_usd_per_hour"], 0.0
    if not whole:
        fill(f, s, p)
    return rule(c, weights)


@hot
def batch_s(f, s, v, p):
    """The seconds of a full batch of variant v of service s on pool p."""
    limit = f.params[s]["batch_limit"]
    at = f.laws[v, p]["offset"] + 2 * limit
    return f.times[at] + f.times[at + 1] * limit


@hot
def missed_usd_per_hour(f, s, v, p):
    """What requests cost that are late or dropped for want of one replica that would serve full batches."""
    param = f.params[s]
    served_s = batch_s(f, s, v, p)
    per_s = param["batch_limit"] * param["slots"] / served_s if served_s > 0 else 0.0
    return 3600 * param["missed_usd"] * per_s


@compiled
def interfere(f, s, n):
    """Describes how a replica of service s and those on node n would slow each other down."""
    c = f.candidate[0]
    for other in range(f.rows.shape[0]):
        if f.slowdown[s, other] != 1.0 or f.slowdown[other, s] != 1.0:
            for k in range(f.rows[other]["span"]):
                r = f.replicas[f.params[other]["replica_lo"] + k]
                if r["state"] != GONE and r["node"] == n:
                    c["slowdown"] *= f.slowdown[s, other]
                    lost = missed_usd_per_hour(f, other, r["variant"], r["pool"])
                    c["harm_usd_per_hour"] += lost * (1 - 1 / f.slowdown[other, s])


@compiled
def worth_usd_per_hour(f, s):
    """The rent of the largest share of a node that a replica of service s takes, in the pool where that is least."""
    v, least = f.rows[s]["variant"], math.inf
    variant = f.variants[v]
    for p in range(f.pools.shape[0]):
        if f.preference[s, p] >= 0 and f.laws[v, p]["offset"] >= 0:
            pool, share = f.pools[p], 0.0
            for j in range(RESOURCE_COUNT):
                if variant["needs"][j] > 0:
                    share = max(share, variant["needs"][j] / pool["has"][j] if pool["has"][j] > 0 else 2.0)
            if variant["whole"] or pool["whole"]:
                share = 1.0
            if share <= 1 + _ROUNDING:
                least = min(least, pool["usd_per_s"] * 3600 * share)
    return least if least < math.inf else 0.0


@compiled
def fill(f, s, p):
    """Describes the candidate's node with one replica of s and, service by service, all pending ones that may go there
    and fit."""
    c = f.candidate[0]
    has, least = c["has"], 1.0
    left_0, left_1 = c["free"][0] - c["needs"][0], c["free"][1] - c["needs"][1]
    left_2, left_3 = c["free"][2] - c["needs"][2], c["free"][3] - c["needs"][3]
    for other in range(f.rows.shape[0]):
        row = f.rows[other]
        variant = f.variants[row["variant"]]
        pending = row["pending"] - (other == s)
        if pending > 0 and may_go(f, other, p, c["zone"]) and not variant["whole"]:
            needs, count = variant["needs"], 0
            while (
                count < pending
                and needs[0] <= left_0 + _ROUNDING
                and needs[1] <= left_1 + _ROUNDING
                and needs[2] <= left_2 + _ROUNDING
                and needs[3] <= left_3 + _ROUNDING
            ):
                left_0, left_1 = left_0 - needs[0], left_1 - needs[1]
                left_2, left_3 = left_2 - needs[2], left_3 - needs[3]
                count += 1
            if count > 0:
                c["filled_usd_per_hour"] += count * worth_usd_per_hour(f, other)
    lefts = (left_0, left_1, left_2, left_3)
    for j in range(RESOURCE_COUNT):
        if has[j] > 0:
            least = min(least, max(lefts[j] / has[j], 0.0))
    c["unfilled"] = least


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
def start_initial(f, rule, weights, jointly):
    """Puts the initial replicas where the rule wants them; they and their nodes are ready at once."""
    for s in range(f.rows.shape[0]):
        f.rows[s]["pending"] = f.params[s]["initial"]
    place_all(f, rule, weights, jointly, 0.0)
    for n in range(f.summary[NODE_SPAN]):
        node = f.nodes[n]
        node["up_s"], node["failing"] = 0.0, 0
        set_fate(f, node, NODE_DRAWS * node["ordinal"])
    for s in range(f.rows.shape[0]):
        row, param = f.rows[s], f.params[s]
        for k in range(row["span"]):
            r = f.replicas[param["replica_lo"] + k]
            r["state"], r["ready_s"], r["death_s"] = READY, 0.0, f.nodes[r["node"]]["death_s"]
            f.cached[r["node"], r["variant"]] = 0.0
            r["crash_s"] = waiting_time(
                param["seed_start"] + np.uint64(1), 64 * r["ordinal"], param["crashes_per_s"]
            )
            f.ready[param["replica_lo"] + k] = k
            row["ready"] += 1
            for e in range(
                param["slot_lo"] + k * param["slots"], param["slot_lo"] + (k + 1) * param["slots"]
            ):
                f.slots[e]["free_s"], f.slots[e]["size"], f.slots[e]["cold"] = 0.0, 0, 1.0


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


# --- bills -------------------------------------------------------------------------------------------------
@compiled
def bill_nodes(f, until):
    """Bills the nodes of a tick to the replicas that were on them, and takes those that have gone off."""
    for n in range(f.summary[NODE_SPAN]):
        f.nodes[n]["share"] = 0.0
    for s in range(f.rows.shape[0]):
        for k in range(f.rows[s]["span"]):
            r = f.replicas[f.params[s]["replica_lo"] + k]
            if r["node"] >= 0:
                f.nodes[r["node"]]["share"] += r["share"]
                if r["state"] == GONE:
                    detach(f, r, f.variants[r["variant"]], r["gone_s"])
    for n in range(f.summary[NODE_SPAN]):
        node = f.nodes[n]
        if node["state"] != GONE:
            bill(f, node, until)
            if node["share"] == 0.0:
                f.ticks[node["owner"]]["node_usd"] += node["cost_usd"]
                f.ticks[node["owner"]]["node_s"] += node["cost_s"]
    for s in range(f.rows.shape[0]):
        row, tick = f.rows[s], f.ticks[s]
        for k in range(row["span"]):
            r = f.replicas[f.params[s]["replica_lo"] + k]
            if r["node"] < 0:
                continue
            node = f.nodes[r["node"]]
            if node["share"] > 0.0:
                tick["node_usd"] += node["cost_usd"] * (r["share"] / node["share"])
                tick["node_s"] += node["cost_s"] * (r["share"] / node["share"])
            if r["state"] == GONE:
                r["node"] = -1
        while row["span"] > 0 and f.replicas[f.params[s]["replica_lo"] + row["span"] - 1]["state"] == GONE:
            row["span"] -= 1
