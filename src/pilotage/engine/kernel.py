"""One tick of many worlds: `world` phases that see all services of a world, and service phases that see one.

The entry points of compiled code. They know only numbers; `layout` names them and the package's docstring says
what they mean.
"""

from __future__ import annotations

from numba import boolean, float64, int64, njit, typeof, void

from pilotage.engine import allocation, nodes, replicas, services
from pilotage.engine.layout import EMPTY_NUMBERS, EMPTY_STATE, GONE, RAY_SERVE
from pilotage.engine.nodes import Fleet
from pilotage.engine.placement import RULE
from pilotage.engine.queues import Context, is_dead, patience_s
from pilotage.engine.randomness import compiled
from pilotage.engine.router import move_messages, oldest_known, queue_transit, reset

# a record cannot be returned, so that what makes a `Context` must not be a function of its own
inlined = njit(inline="always")

# A placement rule is passed as a function of a declared type: only so does a kernel that takes it get cached.
_state, _numbers = typeof(EMPTY_STATE), typeof(EMPTY_NUMBERS)
_books = (boolean[::1], float64[::1], float64, _state, _numbers)
_rule = (RULE, float64[::1], boolean)  # and whether it chooses among the replicas of all services, too


def entry(*signature):
    """Compiles a function that takes a placement rule."""
    return njit(void(*signature), cache=True, nogil=True, error_model="numpy", _nrt=False)


@compiled
def fleet(world, m, s):
    """What concerns world `world`, of the state `m` of all worlds and the numbers `s` of the scenario."""
    count = s.preference.shape[0]
    lo, hi = world * count, (world + 1) * count
    return Fleet(
        m.rows[lo:hi], m.params[lo:hi], m.ticks[lo:hi], m.replicas, m.ready, m.slots, m.nodes[world],
        m.summary[world], m.in_zone[world], m.cached[world], m.closures[world], m.candidate[world : world + 1],
        s.preference, s.zone_ok, s.slowdown, s.pools, s.zones, s.variants, s.laws, s.times, s.tables, m.seeds[world],
    )  # fmt: skip


@inlined
def context(r, thread, m, s, arrivals, requests, t0):
    """What concerns row r."""
    row, param = m.rows[r], m.params[r]
    lo, hi = param["replica_lo"], param["replica_hi"]
    slot_lo, slot_hi = param["slot_lo"], param["slot_hi"]
    routed = param["router_hi"] - param["router_lo"]
    return Context(
        row, param, m.ticks[r], arrivals[row["storage_lo"] : row["storage_hi"]],
        requests[row["storage_lo"] : row["storage_hi"]], m.slots[slot_lo:slot_hi], m.replicas[lo:hi],
        m.ready[lo:hi], m.tree[param["winner_lo"] : param["winner_hi"]],
        m.trees[:, param["tree_lo"] : param["tree_hi"]], s.laws, s.times, s.tables, s.variants, s.pools,
        m.scratch[thread], m.routers[param["router_lo"]],
        m.messages[routed * row["storage_lo"] : routed * row["storage_hi"]], t0,
    )  # fmt: skip


@entry(int64, int64, _state, _numbers, *_rule)
def begin(lo, hi, m, s, rule, weights, jointly):
    """Puts worlds [lo, hi) at their start: queues empty, the initial replicas ready as far as nodes go."""
    count = s.preference.shape[0]
    for w in range(lo, hi):
        m.summary[w, :] = 0
        for n in range(m.nodes.shape[1]):
            m.nodes[w, n]["state"] = GONE
        for r in range(w * count, (w + 1) * count):
            row, param = m.rows[r], m.params[r]
            row["waiting"], row["closed"], row["forming"], row["able_s"] = 0, 0, 0, 0.0
            row["turn"], row["ready"], row["span"], row["pending"], row["replacing"] = 0, 0, 0, 0, 0
            row["arrival_lo"], row["arrival_hi"], row["first_number"] = 0, 0, 0
            row["pool"], row["variant"], row["max_batch"] = -1, param["variant_lo"], param["batch_limit"]
            row["batch_wait_s"] = param["batch_wait_s"]
            row["ordinal"], row["rate_rps"] = 0, -1.0
            if param["router_hi"] > param["router_lo"]:
                reset(m.routers[param["router_lo"]])
            for k in range(param["replica_lo"], param["replica_hi"]):
                m.replicas[k]["state"], m.replicas[k]["node"] = GONE, -1
            for e in range(param["slot_lo"], param["slot_hi"]):
                m.slots[e]["size"], m.slots[e]["replica"] = 0, (e - param["slot_lo"]) // param["slots"]
        allocation.start_initial(fleet(w, m, s), rule, weights, jointly)


@compiled
def compact(which, m, s, arrivals, requests):
    """Moves what is left of rows' arrivals to the front of their storage: from the oldest request inside on."""
    for r in which:
        c = context(r, 0, m, s, arrivals, requests, 0.0)
        row = c.row
        oldest = oldest_in_list(c, row["head"], row["waiting"], row["arrival_lo"])
        for k in range(row["span"]):
            oldest = oldest_in_list(c, c.replicas[k]["head"], c.replicas[k]["waiting"], oldest)
            for e in range(k * c.param["slots"], (k + 1) * c.param["slots"]):
                oldest = oldest_in_list(c, c.slots[e]["head"], c.slots[e]["size"], oldest)
        if c.param["routing"] == RAY_SERVE:
            oldest = oldest_known(c, oldest)
        if oldest > 0:
            if c.param["routing"] == RAY_SERVE:
                move_messages(c, oldest)
            move(c, oldest)


@compiled
def move(c, by):
    """Moves the arrivals of a row, and all that refers to them, `by` places to the front."""
    row = c.row
    for i in range(by, row["arrival_hi"]):
        c.arrivals[i - by] = c.arrivals[i]
        c.requests[i - by]["next"] = c.requests[i]["next"] - by
        c.requests[i - by]["batch"] = c.requests[i]["batch"]
    row["arrival_lo"] -= by
    row["arrival_hi"] -= by
    row["first_number"] += by
    row["head"] -= by
    row["tail"] -= by
    row["forming_head"] -= by
    for k in range(row["span"]):
        replica = c.replicas[k]
        replica["head"] -= by
        replica["tail"] -= by
        replica["forming_head"] -= by
        for e in range(k * c.param["slots"], (k + 1) * c.param["slots"]):
            c.slots[e]["head"] -= by


@compiled
def oldest_in_list(c, i, count, oldest):
    for _ in range(count):
        oldest = min(oldest, i)
        i = c.requests[i]["next"]
    return oldest


@compiled
def decide(active, clock, tick_s, m, s, orders, blank):
    """The part of a tick in which the services of a world meet: decisions, notices, rollouts.

    Returns whether replicas are to be placed; if not, the tick may be served.
    """
    count = s.preference.shape[0]
    any_pending = False
    for w in range(clock.shape[0]):
        if not active[w]:
            continue
        now = clock[w]
        until = now + tick_s
        f = fleet(w, m, s)
        for service in range(count):
            m.ticks[w * count + service] = blank[0]
            replicas.open_books(f, service, tick_s)
        nodes.clear(f, now)
        pending = 0
        for service in range(count):
            replicas.decide(f, service, orders[w * count + service], now, until)
        replicas.act_on_notices(f, now, until)
        for service in range(count):
            replicas.roll_out(f, service, now, until)
            pending += f.rows[service]["pending"]
        nodes.clear(f, now)
        any_pending |= pending > 0
    if not any_pending:
        set_paces(active, m, s)
    return any_pending


@compiled
def set_paces(active, m, s):
    if s.slowdown.shape[0] > 0:
        for w in range(active.shape[0]):
            if active[w]:
                replicas.set_paces(fleet(w, m, s))


@entry(*_books, *_rule)
def place(active, clock, tick_s, m, s, rule, weights, jointly):
    """Gives pending replicas nodes. By itself, for to hand over a rule takes longer than a whole tick."""
    for w in range(clock.shape[0]):
        if active[w]:
            allocation.place_all(fleet(w, m, s), rule, weights, jointly, clock[w])
    set_paces(active, m, s)


@compiled
def serve(lo, hi, thread, active, clock, tick_s, m, s, arrivals, requests, histograms):
    """The part of a tick in which services are by themselves: rows [lo, hi)."""
    count = s.preference.shape[0]
    for r in range(lo, hi):
        if active[r // count]:
            t0 = clock[r // count]
            c = context(r, thread, m, s, arrivals, requests, t0)
            services.run(c, t0 + tick_s)
            services.close_books(c, histograms[r], t0 + tick_s)


@compiled
def settle(active, clock, tick_s, m, s, totals):
    """The end of a tick: nodes are billed, counters added up, time goes on."""
    count = s.preference.shape[0]
    for w in range(clock.shape[0]):
        if active[w]:
            nodes.bill_nodes(fleet(w, m, s), clock[w] + tick_s)
            for r in range(w * count, (w + 1) * count):
                accumulate(totals[r], m.ticks[r])
                replicas.follow_rate(m.rows[r], m.ticks[r]["arrived"] / tick_s, tick_s)
            clock[w] += tick_s


@compiled
def accumulate(total, tick):
    total["seconds"] += tick["seconds"]
    total["arrived"] += tick["arrived"]
    total["served"] += tick["served"]
    total["late"] += tick["late"]
    total["rejected"] += tick["rejected"]
    total["timed_out"] += tick["timed_out"]
    total["abandoned"] += tick["abandoned"]
    total["lost"] += tick["lost"]
    total["failed"] += tick["failed"]
    total["latency_s"] += tick["latency_s"]
    total["inside_s"] += tick["inside_s"]
    total["busy_s"] += tick["busy_s"]
    total["ready_s"] += tick["ready_s"]
    total["batches"] += tick["batches"]
    total["batched"] += tick["batched"]
    total["wrong"] += tick["wrong"]
    total["node_usd"] += tick["node_usd"]
    total["node_s"] += tick["node_s"]
    total["replica_s"] += tick["replica_s"]


@compiled
def finish(lo, hi, clock, m, s, arrivals, requests, totals):
    """The end of a run: counts the dead as dropped and the requests older than their objective as overdue."""
    count = s.preference.shape[0]
    for r in range(lo * count, hi * count):
        c = context(r, 0, m, s, arrivals, requests, clock[r // count])
        timed_out, abandoned = c.tick["timed_out"], c.tick["abandoned"]
        if c.param["routing"] == RAY_SERVE:
            queue_transit(c)
        count_unfinished(c, c.row["head"], c.row["waiting"], True)
        for k in range(c.row["span"]):
            count_unfinished(c, c.replicas[k]["head"], c.replicas[k]["waiting"], True)
            for e in range(k * c.param["slots"], (k + 1) * c.param["slots"]):
                count_unfinished(c, c.slots[e]["head"], c.slots[e]["size"], False)
        totals[r]["timed_out"] += c.tick["timed_out"] - timed_out
        totals[r]["abandoned"] += c.tick["abandoned"] - abandoned
        totals[r]["overdue"] += c.tick["overdue"]


@compiled
def count_unfinished(c, i, count, waiting):
    for _ in range(count):
        if waiting and is_dead(c, i, c.t0):
            if c.param["timeout_s"] <= patience_s(c.param, c.row["first_number"] + i):
                c.tick["timed_out"] += 1
            else:
                c.tick["abandoned"] += 1
            c.tick["waiting"] -= 1
        elif c.t0 - c.arrivals[i] > c.param["slo_s"]:
            c.tick["overdue"] += 1
        i = c.requests[i]["next"]


@compiled
def complete(active, clock, tick_s, m, s, arrivals, requests, histograms, totals):
    """The rest of a tick, once replicas are placed, on one thread."""
    serve(0, m.rows.shape[0], 0, active, clock, tick_s, m, s, arrivals, requests, histograms)
    settle(active, clock, tick_s, m, s, totals)


@compiled
def advance(active, clock, tick_s, m, s, arrivals, requests, orders, blank, histograms, totals):
    """One tick of all active worlds on one thread, unless replicas are to be placed first: then returns True."""
    if decide(active, clock, tick_s, m, s, orders, blank):
        return True
    complete(active, clock, tick_s, m, s, arrivals, requests, histograms, totals)
    return False
