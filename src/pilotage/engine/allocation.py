"""Which node a replica gets: what a placement rule is shown, the pair that it likes best, and new nodes."""

from __future__ import annotations

import math

import numpy as np

from pilotage.engine.layout import GONE, READY, RESOURCE_COUNT, STARTING
from pilotage.engine.nodes import NODE_DRAWS, NODE_SPAN, POOL_NODES, ROUNDING, is_closed, open_node, set_fate
from pilotage.engine.randomness import compiled, hot, waiting_time
from pilotage.engine.replicas import settle


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
        short += variant["needs"][j] > node["free"][j] + ROUNDING
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
            short += variant["needs"][j] > f.pools[p]["has"][j] + ROUNDING
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
            if share <= 1 + ROUNDING:
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
                and needs[0] <= left_0 + ROUNDING
                and needs[1] <= left_1 + ROUNDING
                and needs[2] <= left_2 + ROUNDING
                and needs[3] <= left_3 + ROUNDING
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
