"""One LLM service of a fleet through one tick: `services` for replicas that batch continuously.

What happens to replicas is the same: their events cut the tick into segments, those that drain finish what they have,
those that die are ordered anew. What they do is `batching`. Requests that a dead replica had start again from nothing,
in their order of arrival, or are lost.
"""

from __future__ import annotations

import math

from pilotage.engine.batching import bring
from pilotage.engine.kernel import context
from pilotage.engine.layout import DRAINING, GONE, STARTING
from pilotage.engine.layout import READY as SERVES
from pilotage.engine.llm import enter
from pilotage.engine.llm_layout import (
    COMING,
    DECODE,
    DONE,
    DOOR,
    DOOR_HEAD,
    DOOR_TAIL,
    HANDED_OVER,
    LOST,
    NEXT,
    READY,
    SERVED,
    TOO_LARGE,
    TOO_LONG,
    compiled,
)
from pilotage.engine.queues import (
    HIGHEST,
    IN_SECOND,
    LOWEST,
    SECOND,
    bucket,
    count_arrivals,
    upto,
    widen,
)
from pilotage.engine.services import (
    CRASH,
    DEATH,
    NOTHING,
    READINESS,
    crash,
    die,
    flush,
    get_ready,
    next_event,
    show_desired,
    vanish,
)
from pilotage.metrics import BUCKETS


@compiled
def tick(r, f, builds, coming, m, s, arrivals, requests, histogram, t0, until):
    """Row r from t0 to `until`; `coming` lists the sequences that arrive, in order. Those that have left are in
    `f.done` afterwards."""
    c = context(r, 0, m, s, arrivals, requests, t0)
    c.scratch[LOWEST], c.scratch[HIGHEST], c.scratch[SECOND], c.scratch[IN_SECOND] = BUCKETS, -1, -1, 0
    f.desk[DONE], f.desk[NEXT] = 0, 0
    for k in range(c.row["span"]):
        replica = c.replicas[k]
        replica["waiting"] = 0  # it has told `replicas.drain` whether the replica is idle
        if replica["state"] >= SERVES and f.engines[k]["stamp"] != replica["ordinal"]:
            renew(c, f, builds, k, t0)
        f.engines[k]["pace"] = replica["pace"]
    count(c, f, -1, t0)
    now = t0
    while True:
        at_s, kind, k = next_event(c, until)
        if at_s > now:
            segment(c, f, coming, now, at_s)
            now = at_s
        if kind != NOTHING and c.replicas[k]["state"] == GONE:
            continue
        if kind == DEATH:
            die(c, k, now, until)
            scatter(c, f, k, now)
        elif kind == CRASH:
            crash(c, k, now, until)
            scatter(c, f, k, now)
        elif kind == READINESS:
            get_ready(c, k, now, until)
            renew(c, f, builds, k, now)
            open_door(c, f, now)
        else:
            break
    count(c, f, 1, until)
    close_books(c, f, histogram, until)


@compiled
def renew(c, f, builds, k, now):
    """Replica k has a new engine, with an empty cache. What its place has counted so far is kept."""
    e, replica = f.engines[k], c.replicas[k]
    build = builds[replica["variant"], replica["pool"]]
    copy_law(e["law"], build["law"])
    copy_law(e["decode_law"], build["decode_law"])
    e["stamp"], e["pace"] = replica["ordinal"], replica["pace"]
    e["kv_blocks"], e["free"], e["watermark"] = build["kv_blocks"], build["kv_blocks"], build["watermark"]
    e["now_s"], e["end_s"], e["quiet_s"] = now, now, now
    e["flying"], e["running"], e["queued"], e["queued_blocks"], e["holders"] = 0, 0, 0, 0, 0
    e["idle"], e["oldest"], e["newest"] = 0, -1, -1
    for i in range(f.cache.shape[1]):
        f.cache[k, i]["holders"] = -1


@compiled
def copy_law(to, law):
    to["base"], to["prefill"], to["sequence"] = law["base"], law["prefill"], law["sequence"]
    to["context"], to["square"], to["cross"] = law["context"], law["square"], law["cross"]


@compiled
def segment(c, f, coming, now, end):
    """The segment [now, end): requests, iterations, then who has drained."""
    lo = c.row["arrival_lo"]
    hi = upto(c.arrivals, lo, c.row["arrival_hi"], 0.0, end)
    count_arrivals(c, lo, hi)
    for _ in range(hi - lo):
        f.desk[NEXT] += 1
        arrive(c, f, coming[f.desk[NEXT] - 1])
    for k in range(c.row["span"]):
        if c.replicas[k]["state"] >= SERVES:
            bring(f, k, end)
    for k in range(c.row["span"]):
        e = f.engines[k]
        if c.replicas[k]["state"] == DRAINING and e["queued"] + e["running"] + e["flying"] == 0:
            vanish(c, k, max(e["now_s"], now), c.t0 + c.tick["seconds"])


@compiled
def arrive(c, f, i):
    """Sequence i is here: it is routed, or waits at the door while no replica is ready."""
    if c.row["ready"] == 0:
        wait_outside(f, i)
        return
    f.desk[READY] = c.row["ready"]
    enter(f, i)
    q = f.sequences[i]
    if q["state"] == TOO_LONG or q["state"] == TOO_LARGE:
        c.tick["rejected"] += 1
        c.tick["inside_s"] += q["here_s"] - c.t0
        f.done[f.desk[DONE]] = i
        f.desk[DONE] += 1


@compiled
def wait_outside(f, i):
    """Puts sequence i in its place at the door, by arrival."""
    before, after = -1, f.desk[DOOR_HEAD]
    arrival_s = f.sequences[i]["arrival_s"]
    if f.desk[DOOR] > 0 and f.sequences[f.desk[DOOR_TAIL]]["arrival_s"] <= arrival_s:
        before = f.desk[DOOR_TAIL]
    else:
        for _ in range(f.desk[DOOR]):
            if f.sequences[after]["arrival_s"] > arrival_s:
                break
            before, after = after, f.sequences[after]["next"]
        f.sequences[i]["next"] = after
    if f.desk[DOOR] == 0 or before == f.desk[DOOR_TAIL]:
        f.desk[DOOR_TAIL] = i
    if before < 0:
        f.desk[DOOR_HEAD] = i
    else:
        f.sequences[before]["next"] = i
    f.desk[DOOR] += 1
    f.sequences[i]["state"], f.sequences[i]["replica"] = COMING, -1


@compiled
def open_door(c, f, now):
    """Routes what waits at the door."""
    while f.desk[DOOR] > 0 and c.row["ready"] > 0:
        i = f.desk[DOOR_HEAD]
        f.desk[DOOR_HEAD] = f.sequences[i]["next"]
        f.desk[DOOR] -= 1
        f.sequences[i]["here_s"] = now
        arrive(c, f, i)


@compiled
def scatter(c, f, k, now):
    """What becomes of the sequences of replica k, which has died."""
    e = f.engines[k]
    if e["flying"] > 0:
        e["busy_s"] -= e["end_s"] - now
    for j in range(e["flying"]):
        forget(c, f, f.batch[k, j], now)
    for j in range(e["running"]):
        forget(c, f, f.running[k, j], now)
    i = e["head"]
    for _ in range(e["queued"]):
        following = f.sequences[i]["next"]
        forget(c, f, i, now)
        i = following
    e["flying"], e["running"], e["queued"], e["queued_blocks"], e["holders"] = 0, 0, 0, 0, 0
    e["free"], e["idle"] = e["kv_blocks"], 0
    open_door(c, f, now)


@compiled
def forget(c, f, i, now):
    q = f.sequences[i]
    for j in range(q["ids"] if f.server["span"] > 0 else 0):
        f.holds[q["hold_lo"] + j] = 0
    q["blocks"], q["held"], q["processed"], q["complete"], q["target"] = -1, 0, 0, 0, q["prompt"]
    q["first_s"], q["last_s"] = math.nan, math.nan
    if c.param["retry"]:
        wait_outside(f, i)
        return
    c.tick["lost"] += 1
    c.tick["inside_s"] += now - c.t0
    q["state"] = LOST
    f.done[f.desk[DONE]] = i
    f.desk[DONE] += 1


# --- books ---------------------------------------------------------------------------------------------------
@compiled
def count(c, f, sign, now):
    """Adds what the engines have counted to the tick's counters, or takes it off; an iteration counts as busy in full
    when it starts, and what lies beyond `now` does not belong to this tick."""
    tick = c.tick
    for k in range(f.engines.shape[0]):
        e = f.engines[k]
        tick["prompt_tokens"] += sign * e["prefilled"]
        tick["output_tokens"] += sign * e["produced"]
        tick["queried_tokens"] += sign * e["queried"]
        tick["hit_tokens"] += sign * e["hit"]
        tick["preempted"] += sign * e["restarts"]
        tick["batches"] += sign * e["iterations"]
        tick["batched"] += sign * e["members"]
        tick["busy_s"] += sign * (e["busy_s"] - (e["end_s"] - now if e["flying"] > 0 else 0.0))


@compiled
def close_books(c, f, histogram, until):
    """What a monitor would see now, and the requests that are through. Latency is that of the first token; of replicas
    that only decode, the time per token after it, transfer and queues included."""
    row, tick, decodes = c.row, c.tick, f.server["role"] == DECODE
    least_s, most_s = math.inf, 0.0
    for j in range(f.desk[DONE]):
        q = f.sequences[f.done[j]]
        if q["state"] != SERVED and q["state"] != HANDED_OVER:
            continue
        replica = c.replicas[q["replica"]]
        network_s = c.pools[replica["pool"]]["network_s"]
        ttft_s, later = q["first_s"] - q["arrival_s"] + network_s, q["total"] - q["prompt"] - 1
        if q["state"] == HANDED_OVER:
            later = 0
        tpot_s = (q["last_s"] - q["first_s"]) / later if later > 0 else 0.0
        e2el_s = q["last_s"] - q["arrival_s"] + network_s
        latency_s = tpot_s if decodes else ttft_s
        good = latency_s <= c.param["slo_s"] and tpot_s <= f.server["tpot_s"] and e2el_s <= f.server["e2el_s"]
        tick["late"] += not good
        tick["served"] += 1
        tick["latency_s"] += latency_s
        tick["tpot_s"] += tpot_s
        tick["tpots"] += later > 0
        tick["inside_s"] += q["last_s"] - c.t0
        tick["wrong"] += c.variants[replica["variant"]]["error_share"]
        c.scratch[bucket(latency_s)] += 1
        least_s, most_s = min(least_s, latency_s), max(most_s, latency_s)
    if tick["served"] > 0:
        widen(c, least_s, most_s)
    waiting, executing = f.desk[DOOR], 0
    for k in range(row["span"]):
        state, e = c.replicas[k]["state"], f.engines[k]
        if state == STARTING:
            tick["starting"] += 1
        elif state >= SERVES:
            tick["ready"] += state == SERVES
            tick["draining"] += state != SERVES
            waiting += e["queued"]
            executing += e["running"] + e["flying"]
            if state == SERVES:
                tick["kv_used"] += e["kv_blocks"] - e["free"]
                tick["kv_blocks"] += e["kv_blocks"]
    show_desired(row, tick)
    tick["waiting"], tick["executing"] = waiting, executing
    tick["inside_s"] += (waiting + executing) * (until - c.t0)
    tick["max_batch"] = row["max_batch"]
    tick["latency_p95_s"] = flush(histogram, c.scratch, tick["served"])
