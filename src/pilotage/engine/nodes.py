"""Nodes of a world: how they come and go, and their bills.

All of this happens at ticks, one world at a time, as what `replicas` and `allocation` do; `Fleet` bundles the arrays
of one world.
"""

from __future__ import annotations

import math
from collections import namedtuple

from pilotage.engine.layout import GONE, READY, RESOURCE_COUNT
from pilotage.engine.randomness import compiled, hot, quantile, uniform, waiting_time

Fleet = namedtuple(
    "Fleet",
    "rows params ticks replicas ready slots nodes summary in_zone cached closures candidate preference zone_ok "
    "slowdown pools zones variants laws times tables seed",
)
NODES_OPENED, NODE_SPAN = 0, 1  # summary: the ordinal of the next node, and the slots that were ever used;
POOL_NODES = 2  # from here on, nodes per pool
ROUNDING = 1e-9  # ticks of 0.1 s do not add up to whole seconds exactly; nobody is billed for that
NODE_DRAWS = 8  # draws of one node: boot, failure, slowness, crash, interruption


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
        billed_s = math.ceil(billed_s / pool["granularity_s"] - ROUNDING) * pool["granularity_s"]
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
