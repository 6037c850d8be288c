"""One LLM service on its replicas, compiled: routing, and bringing all replicas to a time."""

from __future__ import annotations

import math

from pilotage.engine.batching import bring, push, rejection, send_next
from pilotage.engine.blocks import blocks_for, hits
from pilotage.engine.llm_layout import LEAST_OUTSTANDING, READY, ROUND_ROBIN, TURN, compiled


@compiled
def route(f, q):
    """The replica for sequence q: the next one; the first of those with the fewest sequences; or the first of those
    where the blocks that are to be prefilled, weighted, and the blocks in use are fewest, as NVIDIA Dynamo's router
    has it (ai-dynamo/dynamo `lib/llm/src/kv_router/scheduler.rs`)."""
    if f.server["routing"] == ROUND_ROBIN:
        f.desk[TURN] += 1
        return f.ready[(f.desk[TURN] - 1) % f.desk[READY]]
    best, least = f.ready[0], math.inf
    for place in range(f.desk[READY]):
        k = f.ready[place]
        e = f.engines[k]
        if f.server["routing"] == LEAST_OUTSTANDING:
            cost = 1.0 * (e["queued"] + e["running"] + e["flying"])
        else:
            found, _ = hits(f, k, q)
            new = blocks_for(q["target"], f.server["block_tokens"]) - found * f.server["span"]
            cost = f.server["overlap"] * (new + e["queued_blocks"]) + (e["kv_blocks"] - e["free"])
        if cost < least:
            best, least = k, cost
    return best


@compiled
def enter(f, i):
    """Routes sequence i at the time it is here; one that can never be served is rejected."""
    q = f.sequences[i]
    now, routing = q["here_s"], f.server["routing"]
    if routing != ROUND_ROBIN:
        for place in range(f.desk[READY]):
            e = f.engines[f.ready[place]]
            unchanged = e["flying"] > 0 and e["end_s"] > now
            if not unchanged and not (routing == LEAST_OUTSTANDING and e["quiet_s"] > now):
                bring(f, f.ready[place], now)
    k = route(f, q)
    why = rejection(f, k, q)
    if why > 0:
        q["state"] = why
    else:
        push(f, k, i)


@compiled
def serve(f, lo, hi, until):
    """Sequences [lo, hi), in order of the time they are here, and then all replicas to `until`."""
    for i in range(lo, hi):
        enter(f, i)
    for k in range(f.engines.shape[0]):
        bring(f, k, until)


@compiled
def serve_clients(f):
    """All sequences in a closed loop: every client sends its next request when it has the answer to the one before."""
    for k in range(1):  # a variable: a constant would have everything compiled a second time
        for _ in range(f.server["concurrency"]):
            send_next(f, k, 0.0)
        bring(f, k, math.inf)
