"""The compiled inner loop. It knows only numbers; `layout` names them and the package docstring says what
they mean. `rows[r]`, `params[r]`, `ticks[r]`, `hists[r]` belong to row r; replicas, their execution slots and
ready lists lie in [replica_lo, replica_hi) of theirs; requests and arrivals in slices of their own.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from pilotage.engine.layout import (
    CENTRAL,
    CLOSED,
    DRAINING,
    GONE,
    LATE_BINDING,
    LEAST_OUTSTANDING,
    READY,
    ROUND_ROBIN,
    STARTING,
)
from pilotage.metrics import BUCKET_BITS, BUCKET_MIDPOINTS_S, BUCKETS, LOWEST_OCTAVE

compiled = njit(cache=True, nogil=True, error_model="numpy")
hot = njit(cache=True, nogil=True, error_model="numpy", forceinline=True)  # called per request or batch

# event kinds, in the order in which events of the same time happen; a key is kind << 40 | number
COMPLETION, READINESS, ARRIVAL, TIMER = 0, 1, 2, 3
_KIND = 40
_NUMBER = (1 << _KIND) - 1
_LOWEST = 2.0**LOWEST_OCTAVE
_ROUNDING = 1e-9  # ticks of 0.1 s do not add up to whole seconds exactly; nobody is billed for that


# --- randomness by counter ---------------------------------------------------------------------------------
@hot
def draw(seed, number):
    """The number-th 64-bit draw of the SplitMix64 generator (Steele, Lea & Flood 2014) started at `seed`."""
    z = seed + np.uint64(0x9E3779B97F4A7C15) * (np.uint64(number) + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@hot
def uniform(seed, number):
    return np.float64(draw(seed, number) >> np.uint64(11)) * 2.0**-53


@hot
def from_table(table, u):
    """Quantile at probability u of a table made by `world.servers.quantile_table`."""
    cells = table.shape[0] // 2
    x = u * cells
    k = int(x)
    if k == cells - 1:
        x = (x - k) * cells
        j = int(x)
        k += j
        x -= j
    else:
        x -= k
    return table[k] + (table[k + 1] - table[k]) * x


@hot
def bucket(latency_s):
    """`metrics.bucket_of`: exponent and leading mantissa bits of a double are a log-linear bucket as they are."""
    bits = np.float64(max(latency_s, _LOWEST)).view(np.int64) >> (52 - BUCKET_BITS)
    return min(bits - ((1023 + LOWEST_OCTAVE) << BUCKET_BITS), BUCKETS - 1)


# --- the event heap: a binary heap on (time, key) ----------------------------------------------------------
@hot
def push(heap, row, time_s, key):
    i = row["events"]
    row["events"] = i + 1
    while i > 0:
        parent = (i - 1) >> 1
        t = heap[parent]["time_s"]
        if t < time_s or (t == time_s and heap[parent]["key"] <= key):
            break
        heap[i]["time_s"] = t
        heap[i]["key"] = heap[parent]["key"]
        i = parent
    heap[i]["time_s"] = time_s
    heap[i]["key"] = key


@hot
def drop_top(heap, row):
    n = row["events"] - 1
    row["events"] = n
    time_s, key = heap[n]["time_s"], heap[n]["key"]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= n:
            break
        t, k = heap[child]["time_s"], heap[child]["key"]
        if child + 1 < n:
            t2, k2 = heap[child + 1]["time_s"], heap[child + 1]["key"]
            if t2 < t or (t2 == t and k2 < k):
                child, t, k = child + 1, t2, k2
        if time_s < t or (time_s == t and key <= k):
            break
        heap[i]["time_s"], heap[i]["key"] = t, k
        i = child
    heap[i]["time_s"], heap[i]["key"] = time_s, key


# --- queues of requests ------------------------------------------------------------------------------------
@hot
def leave(row, requests, i):
    """Gives request slot i back."""
    requests[i]["next"] = row["free"]
    row["free"] = i


@hot
def pop(queue, requests):
    i = queue["head"]
    queue["head"] = requests[i]["next"]
    queue["waiting"] -= 1
    if queue["head"] < 0:
        queue["tail"] = -1
    return i


@compiled
def bury(row, param, tick, requests, i, t0, now):
    """Counts request i, which died waiting, and gives its slot back."""
    if requests[i]["time_s"] + param["timeout_s"] <= requests[i]["deadline_s"]:
        tick["timed_out"] += 1
    else:
        tick["abandoned"] += 1
    tick["inside_s"] += now - t0
    row["inside"] -= 1
    leave(row, requests, i)


@hot
def sweep(queue, row, param, tick, requests, t0, now):
    """Removes the dead at the head of a queue. In a closed former's open batch they stay until it closes."""
    while queue["head"] >= 0 and requests[queue["head"]]["deadline_s"] < now:
        lining = param["former"] == CLOSED and queue["closed"] + queue["forming"] > 0
        if lining and queue["closed"] == 0:
            return
        i = pop(queue, requests)
        if lining:
            size = requests[i]["batch"] - 1
            if size > 0:
                requests[queue["head"]]["batch"] = size
            else:
                queue["closed"] -= 1
        bury(row, param, tick, requests, i, t0, now)


@compiled
def close_batch(queue, requests):
    requests[queue["forming_head"]]["batch"] = queue["forming"]
    queue["closed"] += 1
    queue["forming"] = 0


@compiled
def form(queue, row, param, requests, heap, number, now):
    """Closes the open batch if it is full or old enough; keeps a timer set while one is open."""
    if queue["forming"] == 0:
        return
    due_s = queue["forming_since_s"] + param["batch_wait_s"]
    if queue["forming"] >= row["max_batch"] or due_s <= now:
        close_batch(queue, requests)
    elif queue["timer"] == 0:
        queue["timer"] = 1
        push(heap, row, due_s, (TIMER << _KIND) | number)


@hot
def enqueue(queue, row, param, requests, heap, number, i, now):
    requests[i]["next"] = -1
    if queue["tail"] >= 0:
        requests[queue["tail"]]["next"] = i
    else:
        queue["head"] = i
    queue["tail"] = i
    queue["waiting"] += 1


@compiled
def join_batch(queue, row, param, requests, heap, number, i, now):
    """Puts request i, just enqueued, into the open batch of a closed former."""
    if queue["forming"] == 0:
        queue["forming_head"] = i
        queue["forming_since_s"] = now
    queue["forming"] += 1
    form(queue, row, param, requests, heap, number, now)


# --- execution ---------------------------------------------------------------------------------------------
@hot
def start(queue, row, param, tick, requests, heap, replica, slots, laws, noises, e, size, t0, now):
    """Starts a batch of up to `size` living requests on execution slot e; returns whether there were any."""
    head, last, n, demand = -1, -1, 0, 0.0
    limit = size
    while queue["head"] >= 0 and limit > 0:
        i = pop(queue, requests)
        if requests[i]["deadline_s"] < now:
            bury(row, param, tick, requests, i, t0, now)
            if param["former"] == CLOSED:  # a closed batch is not topped up
                limit -= 1
            continue
        if n == 0:
            head = i
        else:
            requests[last]["next"] = i
        last = i
        n += 1
        limit -= 1
        demand += requests[i]["demand"]
    if n == 0:
        return False
    requests[last]["next"] = -1
    law = laws[param["service"], replica["pool"]]
    seconds = law[0, n] + law[1, n] * (demand / n)
    noise = noises[param["service"], replica["pool"]]
    if noise[0] != 1.0:
        seconds *= from_table(noise, uniform(param["seed_noise"], requests[head]["number"]))
    slots[e]["head"] = head
    slots[e]["size"] = n
    push(heap, row, now + seconds, (COMPLETION << _KIND) | e)
    replica["busy"] += 1
    replica["executing"] += n
    row["busy"] += 1
    row["executing"] += n
    tick["batches"] += 1
    tick["batched"] += n
    tick["busy_s"] -= now - t0
    return True


@hot
def wait_for_work(row, idle, e):
    """Puts slot e at the end of the ring of idle slots."""
    k = row["idle_first"] + row["idle"]
    idle[k if k < idle.shape[0] else k - idle.shape[0]] = e
    row["idle"] += 1


@hot
def dispatch_central(row, param, tick, requests, heap, replicas, slots, idle, laws, noises, t0, now):
    """Gives due batches of the central queue to idle slots, the one idle for longest first."""
    late = param["former"] == LATE_BINDING
    while row["idle"] > 0:
        size = row["max_batch"]
        if late:
            sweep(row, row, param, tick, requests, t0, now)
            if row["waiting"] == 0:
                return
            due_s = requests[row["head"]]["time_s"] + param["batch_wait_s"]
            if row["waiting"] < size and due_s > now:
                if row["timer"] == 0:
                    row["timer"] = 1
                    push(heap, row, due_s, TIMER << _KIND)
                return
        else:
            if row["closed"] == 0:
                return
            size = requests[row["head"]]["batch"]
            row["closed"] -= 1
        e = idle[row["idle_first"]]
        replica = replicas[slots[e]["replica"]]
        if start(row, row, param, tick, requests, heap, replica, slots, laws, noises, e, size, t0, now):
            row["idle_first"] = row["idle_first"] + 1 if row["idle_first"] + 1 < idle.shape[0] else 0
            row["idle"] -= 1


@compiled
def dispatch_bound(row, param, tick, requests, heap, replicas, k, slots, laws, noises, t0, now):
    """Gives due batches of replica k's own queue to its free slots, the lowest first."""
    replica = replicas[k]
    late = param["former"] == LATE_BINDING
    while replica["busy"] < param["slots"]:
        size = row["max_batch"]
        if late:
            sweep(replica, row, param, tick, requests, t0, now)
            if replica["waiting"] == 0:
                return
            due_s = requests[replica["head"]]["time_s"] + param["batch_wait_s"]
            if replica["waiting"] < size and due_s > now:
                if replica["timer"] == 0:
                    replica["timer"] = 1
                    push(heap, row, due_s, (TIMER << _KIND) | (k + 1))
                return
        else:
            if replica["closed"] == 0:
                return
            size = requests[replica["head"]]["batch"]
            replica["closed"] -= 1
        e = k * param["slots"]
        while slots[e]["size"] > 0:
            e += 1
        start(replica, row, param, tick, requests, heap, replica, slots, laws, noises, e, size, t0, now)


@hot
def route(row, param, replicas, ready, number):
    """The replica that request `number` is bound to; `ready` lists the ready ones, longest ready first."""
    m = row["ready"]
    if param["routing"] == ROUND_ROBIN:
        k = ready[row["turn"] % m]
        row["turn"] += 1
        return k
    if param["routing"] == LEAST_OUTSTANDING:
        best, least = ready[0], replicas[ready[0]]["waiting"] + replicas[ready[0]]["executing"]
        for j in range(1, m):
            load = replicas[ready[j]]["waiting"] + replicas[ready[j]]["executing"]
            if load < least:
                best, least = ready[j], load
        return best
    if m == 1:
        return ready[0]
    bits = draw(param["seed_route"], number)
    first = np.int64(((bits >> np.uint64(32)) * np.uint64(m)) >> np.uint64(32))
    second = np.int64(((bits & np.uint64(0xFFFFFFFF)) * np.uint64(m - 1)) >> np.uint64(32))
    if second >= first:
        second += 1
    a, b = ready[first], ready[second]
    if replicas[b]["waiting"] + replicas[b]["executing"] < replicas[a]["waiting"] + replicas[a]["executing"]:
        return b
    return a


@compiled
def bind(row, param, tick, requests, heap, replicas, ready, slots, laws, noises, i, t0, now):
    """Routes request i to a replica; returns False if that replica's queue is full."""
    k = route(row, param, replicas, ready, requests[i]["number"])
    replica = replicas[k]
    if replica["waiting"] >= param["queue_limit"]:
        return False
    enqueue(replica, row, param, requests, heap, k + 1, i, now)
    if param["former"] == CLOSED:
        join_batch(replica, row, param, requests, heap, k + 1, i, now)
    dispatch_bound(row, param, tick, requests, heap, replicas, k, slots, laws, noises, t0, now)
    return True


@compiled
def vanish(row, param, pools, used, tick, replica, now, until):
    """A replica goes: its node is free from the next tick on."""
    if replica["state"] != STARTING:
        tick["ready_s"] -= (until - now) * param["slots"]
    replica["state"] = GONE
    replica["gone_s"] = now
    used[replica["pool"]] -= 1
    bill(pools[replica["pool"]], tick, replica, now)


@compiled
def bill(pool, tick, replica, end_s):
    """Brings a node's bill up to `end_s`: its life, at least the minimum, in whole granules."""
    life = end_s - replica["ordered_s"]
    billed = max(life, pool["minimum_s"])
    if pool["granularity_s"] > 0:
        billed = math.ceil(billed / pool["granularity_s"] - _ROUNDING) * pool["granularity_s"]
    tick["replica_s"] += life - replica["lived_s"]
    tick["node_s"] += billed - replica["billed_s"]
    tick["node_usd"] += (billed - replica["billed_s"]) * pool["usd_per_s"]
    replica["lived_s"] = life
    replica["billed_s"] = billed


@hot
def arrive(row, param, demands, requests, now):
    """Takes a request slot and draws what the request will need."""
    i = row["free"]
    if i >= 0:
        row["free"] = requests[i]["next"]
    else:
        i = row["fresh"]
        row["fresh"] = i + 1
    number = row["arrived"]
    row["arrived"] = number + 1
    q = requests[i]
    q["time_s"] = now
    q["number"] = number
    deadline = now + param["timeout_s"]
    u = uniform(param["seed_patience"], number) if param["abandoning"] > 0 else 1.0
    if u < param["abandoning"]:  # patience may end before the timeout; most need no logarithm
        deadline = min(deadline, now - math.log1p(-u) * param["patience_s"])
    q["deadline_s"] = deadline
    table = demands[param["service"]]
    q["demand"] = 1.0 if table[0] == 1.0 else from_table(table, uniform(param["seed_demand"], number))
    return i


@compiled
def simulate_row(
    row, param, tick, hist, replicas, slots, heap, ready, idle, requests, arrivals,
    pools, used, laws, noises, demands, scratch, t0, until,
):  # fmt: skip
    """One service through [t0, until). Returns nothing; everything is in the arrays."""
    central = param["routing"] == CENTRAL
    closed = param["former"] == CLOSED
    nslots = param["slots"]
    lowest, highest = BUCKETS, -1
    second, in_second = -1, 0
    times = arrivals
    a, a_end = row["arrival_lo"], row["arrival_hi"]
    next_arrival = times[a] if a < a_end and times[a] < until else math.inf
    slo_s = param["slo_s"]
    while True:
        if row["events"] > 0:
            event_s, key = heap[0]["time_s"], heap[0]["key"]
        else:
            event_s, key = math.inf, 0
        if next_arrival < event_s or (next_arrival == event_s and key >> _KIND > ARRIVAL):
            now = next_arrival
            if now == math.inf:
                break
            a += 1
            next_arrival = times[a] if a < a_end and times[a] < until else math.inf
            tick["arrived"] += 1
            s = int(now - t0)
            if s != second:
                tick["peak_second"] = max(tick["peak_second"], in_second)
                second, in_second = s, 0
            in_second += 1
            i = arrive(row, param, demands, requests, now)
            if central or row["ready"] == 0:
                full = row["waiting"] >= param["queue_limit"]
                if not full:
                    row["inside"] += 1
                    tick["inside_s"] -= now - t0
                    enqueue(row, row, param, requests, heap, 0, i, now)
                    if central:
                        if closed:
                            join_batch(row, row, param, requests, heap, 0, i, now)
                        if row["idle"] > 0:
                            dispatch_central(
                                row, param, tick, requests, heap, replicas, slots, idle, laws, noises, t0, now
                            )
            else:
                row["inside"] += 1
                tick["inside_s"] -= now - t0
                full = not bind(
                    row, param, tick, requests, heap, replicas, ready, slots, laws, noises, i, t0, now
                )
                if full:
                    row["inside"] -= 1
                    tick["inside_s"] += now - t0
            if full:
                tick["rejected"] += 1
                leave(row, requests, i)
            continue
        if event_s >= until:
            break
        now = event_s
        drop_top(heap, row)
        kind, number = key >> _KIND, key & _NUMBER
        if kind == COMPLETION:
            e = number
            k = slots[e]["replica"]
            replica = replicas[k]
            n = slots[e]["size"]
            i = slots[e]["head"]
            slots[e]["size"] = 0
            network_s = pools[replica["pool"]]["network_s"]
            for _ in range(n):
                latency = now - requests[i]["time_s"] + network_s
                tick["latency_s"] += latency
                if latency > slo_s:
                    tick["late"] += 1
                b = bucket(latency)
                scratch[b] += 1
                lowest = min(lowest, b)
                highest = max(highest, b)
                following = requests[i]["next"]
                leave(row, requests, i)
                i = following
            tick["served"] += n
            tick["wrong"] += n * param["error_share"]
            tick["inside_s"] += n * (now - t0)
            tick["busy_s"] += now - t0
            row["inside"] -= n
            row["executing"] -= n
            row["busy"] -= 1
            replica["executing"] -= n
            replica["busy"] -= 1
            if central:
                if replica["state"] == READY:
                    wait_for_work(row, idle, e)
                    if row["waiting"] > 0:
                        dispatch_central(
                            row, param, tick, requests, heap, replicas, slots, idle, laws, noises, t0, now
                        )
                elif replica["busy"] == 0:
                    vanish(row, param, pools, used, tick, replica, now, until)
            else:
                dispatch_bound(row, param, tick, requests, heap, replicas, k, slots, laws, noises, t0, now)
                if replica["state"] == DRAINING and replica["busy"] == 0 and replica["waiting"] == 0:
                    vanish(row, param, pools, used, tick, replica, now, until)
        elif kind == READINESS:
            k = number
            replicas[k]["state"] = READY
            tick["ready_s"] += (until - now) * nslots
            ready[row["ready"]] = k
            row["ready"] += 1
            if central:
                for j in range(nslots):
                    wait_for_work(row, idle, k * nslots + j)
                dispatch_central(
                    row, param, tick, requests, heap, replicas, slots, idle, laws, noises, t0, now
                )
            else:
                open_door(row, param, tick, requests, heap, replicas, ready, slots, laws, noises, t0, now)
        else:
            if number == 0:
                row["timer"] = 0
                if closed:
                    form(row, row, param, requests, heap, 0, now)
                dispatch_central(
                    row, param, tick, requests, heap, replicas, slots, idle, laws, noises, t0, now
                )
            else:
                k = number - 1
                replica = replicas[k]
                replica["timer"] = 0
                if closed:
                    form(replica, row, param, requests, heap, number, now)
                dispatch_bound(row, param, tick, requests, heap, replicas, k, slots, laws, noises, t0, now)
                if replica["state"] == DRAINING and replica["busy"] == 0 and replica["waiting"] == 0:
                    vanish(row, param, pools, used, tick, replica, now, until)
    tick["peak_second"] = max(tick["peak_second"], in_second)
    row["arrival_lo"] = a
    tick["latency_p95_s"] = flush(hist, scratch, lowest, highest, tick["served"])


@compiled
def open_door(row, param, tick, requests, heap, replicas, ready, slots, laws, noises, t0, now):
    """The first replica is ready: binds the requests that wait at the door, in order. There is room for all
    of them, because the door has the same limit as the replica's empty queue."""
    while row["waiting"] > 0:
        sweep(row, row, param, tick, requests, t0, now)
        if row["waiting"] == 0:
            return
        i = pop(row, requests)
        bind(row, param, tick, requests, heap, replicas, ready, slots, laws, noises, i, t0, now)


@compiled
def flush(hist, scratch, lowest, highest, served):
    """Moves a tick's histogram into the run's; returns the tick's 95th percentile, NaN if nothing finished."""
    p95, seen, rank = math.nan, 0, math.ceil(0.95 * served)
    for b in range(lowest, highest + 1):
        n = scratch[b]
        if n > 0:
            if seen < rank <= seen + n:
                p95 = BUCKET_MIDPOINTS_S[b]
            seen += n
            hist[b] += n
            scratch[b] = 0
    return p95


# --- decisions ---------------------------------------------------------------------------------------------
@compiled
def youngest(replicas, pools, state, now):
    """The most recently ordered replica in `state` that may be released, or -1."""
    best, ordinal = -1, -1
    for k in range(replicas.shape[0]):
        r = replicas[k]
        old_enough = now - r["ordered_s"] >= pools[r["pool"]]["min_lifetime_s"] - _ROUNDING
        if r["state"] == state and old_enough and r["ordinal"] > ordinal:
            best, ordinal = k, r["ordinal"]
    return best


@compiled
def release(row, param, tick, replicas, pools, used, ready, idle, count, now, until):
    """Releases up to `count` replicas: pending, starting, ready, in each group the youngest first."""
    taken = min(count, row["pending"])
    row["pending"] -= taken
    left = count - taken
    while left > 0:
        k = youngest(replicas, pools, STARTING, now)
        if k < 0:
            break
        vanish(row, param, pools, used, tick, replicas[k], now, until)
        left -= 1
    central = param["routing"] == CENTRAL
    while left > 0:
        k = youngest(replicas, pools, READY, now)
        if k < 0:
            break
        left -= 1
        r = replicas[k]
        n = 0
        for j in range(row["ready"]):
            if ready[j] != k:
                ready[n] = ready[j]
                n += 1
        row["ready"] = n
        if central:
            n = 0
            size = idle.shape[0]
            for j in range(row["idle"]):
                e = idle[(row["idle_first"] + j) % size]
                if e // param["slots"] != k:
                    idle[(row["idle_first"] + n) % size] = e
                    n += 1
            row["idle"] = n
        r["state"] = DRAINING
        if r["busy"] == 0 and r["waiting"] == 0:
            vanish(row, param, pools, used, tick, r, now, until)


@compiled
def first_free(allowed, pools, used):
    """The first of the allowed pools that has a free node, or -1."""
    for p in allowed:
        if p >= 0 and used[p] < pools[p]["max_nodes"]:
            return p
    return -1


@compiled
def place(row, param, replicas, pools, used, allowed, boots, loads, now):
    """Gives one pending replica a node; returns whether one was free."""
    p = -1
    if row["pool"] >= 0:
        if used[row["pool"]] < pools[row["pool"]]["max_nodes"]:
            p = row["pool"]
    else:
        p = first_free(allowed, pools, used)
    if p < 0:
        return False
    for k in range(replicas.shape[0]):
        if replicas[k]["state"] == GONE:
            break
    else:
        return False
    settle(row, replicas[k], p, now)
    r = replicas[k]
    used[p] += 1
    row["pending"] -= 1
    boot_s = pools[p]["boot_s"] * from_table(boots[p], uniform(param["seed_start"], 2 * r["ordinal"]))
    load = loads[param["service"]]
    load_s = load[0] * from_table(load[1:], uniform(param["seed_start"], 2 * r["ordinal"] + 1))
    r["ready_s"] = now + boot_s + load_s
    r["state"] = STARTING
    return True


@compiled
def settle(row, r, p, now):
    r["head"], r["tail"] = -1, -1
    r["waiting"], r["closed"], r["forming"] = 0, 0, 0  # a timer of the slot's former owner may be pending
    r["pool"] = p
    r["ordinal"] = row["ordinal"]
    row["ordinal"] += 1
    r["ordered_s"] = now
    r["ready_s"] = now
    r["gone_s"] = math.inf
    r["billed_s"], r["lived_s"] = 0.0, 0.0
    r["executing"], r["busy"] = 0, 0


# --- a world -----------------------------------------------------------------------------------------------
@compiled
def begin(lo, hi, rows, params, replicas, slots, ready, idle, used, pools, allowed):
    """Puts worlds [lo, hi) at their start: queues empty, the initial replicas ready as far as nodes go."""
    services = allowed.shape[0]
    for w in range(lo, hi):
        used[w, :] = 0
        for s in range(services):
            row, param = rows[w * services + s], params[w * services + s]
            row["head"], row["tail"], row["free"] = -1, -1, -1
            row["waiting"], row["closed"], row["forming"], row["timer"] = 0, 0, 0, 0
            row["arrived"], row["turn"], row["ready"], row["idle_first"], row["idle"] = 0, 0, 0, 0, 0
            row["events"], row["fresh"], row["executing"], row["busy"], row["inside"] = 0, 0, 0, 0, 0
            row["pending"], row["pool"], row["max_batch"], row["ordinal"] = 0, -1, param["batch_limit"], 0
            for e in range(param["slot_lo"], param["slot_hi"]):
                slots[e]["size"] = 0
                slots[e]["replica"] = (e - param["slot_lo"]) // param["slots"]
            for k in range(param["replica_lo"], param["replica_hi"]):
                replicas[k]["state"] = GONE
                replicas[k]["timer"] = 0
            for k in range(param["initial"]):
                p = first_free(allowed[s], pools, used[w])
                if p < 0:
                    row["pending"] += param["initial"] - k
                    break
                used[w, p] += 1
                r = replicas[param["replica_lo"] + k]
                settle(row, r, p, 0.0)
                r["state"] = READY
                ready[param["replica_lo"] + k] = k
                row["ready"] += 1
                if param["routing"] == CENTRAL:
                    for j in range(param["slots"]):
                        idle[param["slot_lo"] + row["idle"]] = k * param["slots"] + j
                        row["idle"] += 1


@compiled
def short_of_requests(lo, hi, rows, arrivals, until, services):
    """The first row of worlds [lo, hi) whose request slots might not do until `until`, or -1."""
    for w in range(lo, hi):
        for r in range(w * services, (w + 1) * services):
            row = rows[r]
            coming = np.searchsorted(arrivals[row["arrival_lo"] : row["arrival_hi"]], until[w])
            if row["inside"] + coming > row["request_hi"] - row["request_lo"]:
                return r
    return -1


@compiled
def decide(row, param, tick, order, replicas, pools, used, ready, idle, allowed, now, until):
    """Takes in a decision: the release now, the order as pending replicas, the batch limit.

    A pool in which the service may not run is ignored.
    """
    for p in allowed:
        if p >= 0 and p == order["pool"]:
            row["pool"] = p
    if order["max_batch"] > 0:
        row["max_batch"] = min(order["max_batch"], param["batch_limit"])
    if order["release"] > 0:
        release(row, param, tick, replicas, pools, used, ready, idle, order["release"], now, until)
    if order["order"] > 0:
        row["pending"] += order["order"]


@compiled
def refresh(row, param, tick, requests, heap, replicas, slots, idle, pools, used, laws, noises, now, until):
    """At a tick: sweeps the dead at the heads of queues, and starts what the new batch limit makes due."""
    closed = param["former"] == CLOSED
    sweep(row, row, param, tick, requests, now, now)
    if param["routing"] == CENTRAL:
        if closed:
            form(row, row, param, requests, heap, 0, now)
        dispatch_central(row, param, tick, requests, heap, replicas, slots, idle, laws, noises, now, now)
        return
    for k in range(replicas.shape[0]):
        r = replicas[k]
        if r["waiting"] > 0 and (r["state"] == READY or r["state"] == DRAINING):
            sweep(r, row, param, tick, requests, now, now)
            if closed:
                form(r, row, param, requests, heap, k + 1, now)
            dispatch_bound(row, param, tick, requests, heap, replicas, k, slots, laws, noises, now, now)
            if r["state"] == DRAINING and r["busy"] == 0 and r["waiting"] == 0:
                vanish(row, param, pools, used, tick, r, now, until)


@compiled
def settle_accounts(row, param, tick, replicas, pools, t0, until):
    """Closes a tick's books: time integrals, bills, and what a monitor would see now."""
    tick["inside_s"] += row["inside"] * (until - t0)
    tick["busy_s"] += row["busy"] * (until - t0)
    for k in range(replicas.shape[0]):
        r = replicas[k]
        if r["state"] == GONE:
            continue
        bill(pools[r["pool"]], tick, r, until)
        if r["state"] == STARTING:
            tick["starting"] += 1
        elif r["state"] == READY:
            tick["ready"] += 1
        else:
            tick["draining"] += 1
    tick["pending"] = row["pending"]
    tick["executing"] = row["executing"]
    tick["waiting"] = row["inside"] - row["executing"]
    tick["max_batch"] = row["max_batch"]


@compiled
def advance(
    lo, hi, active, clock, tick_s, rows, params, replicas, slots, heap, ready, idle, requests, arrivals,
    pools, used, laws, noises, demands, boots, loads, allowed, orders, ticks, totals, blank, hists, scratch,
):  # fmt: skip
    """One tick of the active worlds in [lo, hi): decisions at `clock[w]`, then all up to `clock[w] + tick_s`."""
    services = allowed.shape[0]
    for w in range(lo, hi):
        if not active[w]:
            continue
        t0 = clock[w]
        until = t0 + tick_s
        base = w * services
        for r in range(base, base + services):
            param = params[r]
            mine = replicas[param["replica_lo"] : param["replica_hi"]]
            tick = ticks[r]
            ticks[r] = blank[0]
            tick["seconds"] = tick_s
            for k in range(mine.shape[0]):
                if mine[k]["state"] == READY or mine[k]["state"] == DRAINING:
                    tick["ready_s"] += tick_s * param["slots"]
            decide(
                rows[r], param, tick, orders[r], mine, pools, used[w],
                ready[param["replica_lo"] : param["replica_hi"]], idle[param["slot_lo"] : param["slot_hi"]],
                allowed[r - base], t0, until,
            )  # fmt: skip
        placed = True
        while placed:
            placed = False
            for r in range(base, base + services):
                if rows[r]["pending"] > 0:
                    param = params[r]
                    mine = replicas[param["replica_lo"] : param["replica_hi"]]
                    s = r - base
                    placed |= place(rows[r], param, mine, pools, used[w], allowed[s], boots, loads, t0)
        for r in range(base, base + services):
            row, param, tick = rows[r], params[r], ticks[r]
            lo_k, hi_k = param["replica_lo"], param["replica_hi"]
            mine = replicas[lo_k:hi_k]
            my_slots = slots[param["slot_lo"] : param["slot_hi"]]
            my_idle = idle[param["slot_lo"] : param["slot_hi"]]
            my_heap = heap[param["event_lo"] : param["event_hi"]]
            mine_q = requests[row["request_lo"] : row["request_hi"]]
            refresh(
                row,
                param,
                tick,
                mine_q,
                my_heap,
                mine,
                my_slots,
                my_idle,
                pools,
                used[w],
                laws,
                noises,
                t0,
                until,
            )
            for k in range(mine.shape[0]):
                if mine[k]["state"] == STARTING and mine[k]["ready_s"] < until:
                    push(my_heap, row, mine[k]["ready_s"], (READINESS << _KIND) | k)
            simulate_row(
                row, param, tick, hists[r], mine, my_slots, my_heap, ready[lo_k:hi_k], my_idle, mine_q, arrivals,
                pools, used[w], laws, noises, demands, scratch, t0, until,
            )  # fmt: skip
            settle_accounts(row, param, tick, mine, pools, t0, until)
            accumulate(totals[r], tick)
        clock[w] = until


@compiled
def accumulate(total, tick):
    total["seconds"] += tick["seconds"]
    total["arrived"] += tick["arrived"]
    total["served"] += tick["served"]
    total["late"] += tick["late"]
    total["rejected"] += tick["rejected"]
    total["timed_out"] += tick["timed_out"]
    total["abandoned"] += tick["abandoned"]
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
def finish(lo, hi, clock, rows, params, replicas, slots, requests, ticks, totals, services):
    """The end of a run: counts the dead as dropped and the requests older than their objective as overdue."""
    for w in range(lo, hi):
        now = clock[w]
        for r in range(w * services, (w + 1) * services):
            row, param, tick = rows[r], params[r], ticks[r]
            timed_out, abandoned = tick["timed_out"], tick["abandoned"]
            mine_q = requests[row["request_lo"] : row["request_hi"]]
            count_unfinished(row, param, tick, mine_q, row["head"], True, now)
            for k in range(param["replica_lo"], param["replica_hi"]):
                if replicas[k]["state"] != GONE:
                    count_unfinished(row, param, tick, mine_q, replicas[k]["head"], True, now)
            for e in range(param["slot_lo"], param["slot_hi"]):
                if slots[e]["size"] > 0:
                    count_unfinished(row, param, tick, mine_q, slots[e]["head"], False, now)
            totals[r]["timed_out"] += tick["timed_out"] - timed_out
            totals[r]["abandoned"] += tick["abandoned"] - abandoned
            totals[r]["overdue"] += tick["overdue"]


@compiled
def count_unfinished(row, param, tick, requests, i, waiting, now):
    while i >= 0:
        q = requests[i]
        if waiting and q["deadline_s"] < now:
            if q["time_s"] + param["timeout_s"] <= q["deadline_s"]:
                tick["timed_out"] += 1
            else:
                tick["abandoned"] += 1
            tick["waiting"] -= 1
        elif now - q["time_s"] > param["slo_s"]:
            tick["overdue"] += 1
        i = q["next"]
