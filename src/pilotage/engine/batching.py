"""Iterations of one LLM replica: who takes part, how long it lasts, what it leaves behind.

The rules are those of Vidur's schedulers, which follow vLLM 0.x (prefill first) and Sarathi-Serve (chunked prefill):
microsoft/vidur `vidur/scheduler/replica_scheduler/{vllm,sarathi}_replica_scheduler.py`, `vidur/entities/request.py`.
Where they can wait for ever they are given work that they can do: what never fits is rejected at the door.

A replica has a time, `now_s`, at which no iteration is in flight, or one that ends at `end_s`. An iteration starts
only before the time to which the replica is brought: what arrives at that very time is seen by it.
"""

from __future__ import annotations

import math

import numpy as np

from pilotage.engine.blocks import admit, blocks_for, fits, give_back, take
from pilotage.engine.llm_layout import (
    CHUNKED,
    DECODE,
    DONE,
    HANDED_OVER,
    PREFILL,
    RUNNING,
    SENT,
    SERVED,
    TOO_LARGE,
    TOO_LONG,
    WAITING,
    compiled,
)
from pilotage.engine.queues import bucket
from pilotage.engine.randomness import hot


# --- the queue ---------------------------------------------------------------------------------------------
@compiled
def rejection(f, k, q):
    """Why replica k would never be able to serve sequence q, even alone; 0 if it would."""
    e = f.engines[k]
    longest = q["prompt"] if f.server["role"] == PREFILL else q["total"] - 1
    if f.server["scheduler"] != CHUNKED and longest > f.server["max_tokens"]:
        return TOO_LONG
    if blocks_for(longest, f.server["block_tokens"]) > e["kv_blocks"] - max(e["watermark"], 1):
        return TOO_LARGE
    return 0


@compiled
def push(f, k, i):
    """Puts sequence i at the end of the queue of replica k."""
    e = f.engines[k]
    if e["queued"] > 0:
        f.sequences[e["tail"]]["next"] = i
    else:
        e["head"] = i
    e["tail"] = i
    e["queued"] += 1
    q = f.sequences[i]
    q["state"], q["replica"] = WAITING, k
    e["quiet_s"] = q["here_s"]
    e["queued_blocks"] += blocks_for(q["target"], f.server["block_tokens"])


@compiled
def pop(f, k):
    e = f.engines[k]
    i = e["head"]
    e["head"] = f.sequences[i]["next"]
    e["queued"] -= 1
    e["queued_blocks"] -= blocks_for(f.sequences[i]["target"], f.server["block_tokens"])
    f.sequences[i]["state"] = RUNNING
    return i


@compiled
def restart(f, k, i):
    """Preemption by recompute: sequence i loses its blocks, and goes to the front of the queue."""
    q, e = f.sequences[i], f.engines[k]
    give_back(f, k, q)
    rewind(f, q)
    q["restarts"] += 1
    e["restarts"] += 1
    if e["queued"] == 0:
        e["tail"] = i
    q["next"] = e["head"]
    e["head"] = i
    e["queued"] += 1
    e["queued_blocks"] += blocks_for(q["target"], f.server["block_tokens"])
    q["state"] = WAITING


@compiled
def rewind(f, q):
    """What sequence q has produced becomes part of the prompt that is to be processed anew."""
    if q["complete"] or f.server["vidur"]:
        q["target"] = q["processed"]
    q["processed"], q["complete"] = 0, 0


@compiled
def waits(f, k):
    """Whether the head of the queue of replica k has arrived."""
    e = f.engines[k]
    return e["queued"] > 0 and f.sequences[e["head"]]["here_s"] <= e["now_s"]


# --- what makes an iteration --------------------------------------------------------------------------------
@hot
def add(f, k, i, tokens):
    e = f.engines[k]
    f.batch[k, e["flying"]] = i
    f.scheduled[k, e["flying"]] = tokens
    e["flying"] += 1


@compiled
def admit_head(f, k, found):
    """Takes the head of the queue of replica k in, with the prefix blocks that it finds there."""
    i = pop(f, k)
    q = f.sequences[i]
    admit(f, k, q, found)
    q["processed"] = found * f.server["span"] * f.server["block_tokens"]
    return i


@compiled
def take_over(f, k):
    """Takes in what comes with its KV blocks from a prefill replica; it only decodes."""
    e = f.engines[k]
    while waits(f, k) and e["holders"] < f.server["max_batch"]:
        q = f.sequences[e["head"]]
        needed = blocks_for(q["target"], f.server["block_tokens"])
        if not q["complete"] or e["free"] - needed < e["watermark"]:
            return
        i = pop(f, k)
        admit(f, k, q, 0)
        append(f, k, i)


@hot
def append(f, k, i):
    e = f.engines[k]
    f.running[k, e["running"]] = i
    e["running"] += 1
    e["sorted"] = 0


@compiled
def sort(f, k):
    """Puts what runs in order of arrival; what has been added is at the end, so there is little to move."""
    e = f.engines[k]
    if e["sorted"] == 0:
        for j in range(1, e["running"]):
            i = f.running[k, j]
            arrival_s = f.sequences[i]["arrival_s"]
            at = j - 1
            while at >= 0 and f.sequences[f.running[k, at]]["arrival_s"] > arrival_s:
                f.running[k, at + 1] = f.running[k, at]
                at -= 1
            f.running[k, at + 1] = i
        e["sorted"] = 1


@compiled
def decode_all(f, k):
    """All that runs and is prefilled decodes a token, if there is a block for it; what is still to be prefilled is set
    aside. Returns how many are."""
    e, per = f.engines[k], f.server["block_tokens"]
    wanted, aside = 0, 0
    for j in range(e["running"]):
        q = f.sequences[f.running[k, j]]
        wanted += q["complete"] and q["processed"] > q["blocks"] * per
    if e["free"] - wanted < 1:
        return decode_short(f, k)
    members = 0
    for j in range(e["running"]):
        i = f.running[k, j]
        q = f.sequences[i]
        if q["complete"]:
            q["blocks"] += q["processed"] > q["blocks"] * per
            f.batch[k, members], f.scheduled[k, members] = i, 1
            members += 1
        else:
            f.aside[aside] = i
            aside += 1
    take(f, k, wanted)
    e["flying"], e["running"] = members, 0
    return aside


@compiled
def decode_short(f, k):
    """`decode_all` where blocks are short: the last ones may lose their place to the first."""
    e, per, aside, j = f.engines[k], f.server["block_tokens"], 0, 0
    while j < e["running"]:
        i = f.running[k, j]
        q = f.sequences[i]
        j += 1
        if q["complete"] == 0:
            f.aside[aside] = i
            aside += 1
            continue
        while e["free"] < 1 and e["running"] > j:
            e["running"] -= 1
            restart(f, k, f.running[k, e["running"]])
        if e["free"] < 1:
            restart(f, k, i)
            break
        if q["processed"] > q["blocks"] * per:
            take(f, k, 1)
            q["blocks"] += 1
        add(f, k, i, 1)
    e["running"] = 0
    return aside


@compiled
def form_prefill_first(f, k):
    """A batch of prefills if one is possible, of decodes otherwise."""
    e, server = f.engines[k], f.server
    longest = 0
    while waits(f, k) and not f.sequences[e["head"]]["complete"]:
        fit, found = fits(f, k, f.sequences[e["head"]])
        new = f.sequences[e["head"]]["target"] - found * server["span"] * server["block_tokens"]
        longest = max(longest, new)
        if not fit or (e["flying"] + 1) * longest > server["max_tokens"]:
            break
        if e["holders"] >= server["max_batch"] or e["flying"] >= server["max_batch"]:
            break
        add(f, k, admit_head(f, k, found), new)
    if e["flying"] > 0:
        return
    sort(f, k)
    decode_all(f, k)


@compiled
def form_chunked(f, k):
    """All decodes, then the prefills that go on, then new ones, as far as the tokens of an iteration go."""
    e, server, block = f.engines[k], f.server, f.server["block_tokens"]
    aside = decode_all(f, k)
    budget = server["chunk"] - e["flying"]
    e["sorted"] = 0
    for j in range(aside):
        i = f.aside[j]
        q = f.sequences[i]
        tokens = max(0, min(q["target"] - q["processed"], budget))
        if tokens == 0:
            append(f, k, i)
        else:
            add(f, k, i, tokens)
            budget -= tokens
    sort(f, k)
    while waits(f, k) and budget > 0 and not f.sequences[e["head"]]["complete"]:
        if e["holders"] >= server["max_batch"] or e["flying"] >= server["max_batch"]:
            break
        fit, found = fits(f, k, f.sequences[e["head"]])
        if not fit:
            break
        new = f.sequences[e["head"]]["target"] - found * server["span"] * block
        tokens = min(new, budget)
        add(f, k, admit_head(f, k, found), tokens)
        budget -= tokens


@hot
def seconds(law, prefill, sequences, context, square, cross):
    """The law of an iteration, from left to right; see `world.servers.IterationLaw`."""
    return (
        law["base"]
        + law["prefill"] * prefill
        + law["sequence"] * sequences
        + law["context"] * context
        + law["square"] * square
        + law["cross"] * cross
    )


@compiled
def start(f, k):
    """Forms an iteration at `now_s`, and sets when it ends. Returns whether there is one."""
    e = f.engines[k]
    e["flying"] = 0
    if f.server["role"] == DECODE:
        take_over(f, k)
    if f.server["scheduler"] == CHUNKED:
        form_chunked(f, k)
    else:
        form_prefill_first(f, k)
    if e["flying"] == 0:
        return False
    prefill, sequences, context, square, cross = 0.0, 0.0, 0.0, 0.0, 0.0
    for j in range(e["flying"]):
        q, tokens = f.sequences[f.batch[k, j]], np.float64(f.scheduled[k, j])
        context += q["processed"]
        if q["complete"]:
            sequences += 1.0
        else:
            prefill += tokens
            square += tokens * tokens
            cross += tokens * q["processed"]
    if prefill > 0:
        lasts_s = seconds(e["law"], prefill, sequences, context, square, cross)
    else:
        lasts_s = seconds(e["decode_law"], 0.0, sequences, context, 0.0, 0.0)
    lasts_s *= e["pace"]
    e["end_s"] = e["now_s"] + lasts_s
    e["iterations"] += 1
    e["members"] += e["flying"]
    e["busy_s"] += lasts_s
    if prefill > 0:
        e["quiet_s"] = e["end_s"]
    return True


# --- what an iteration leaves behind -------------------------------------------------------------------------
@compiled
def complete(f, k):
    """The end of the iteration in flight: tokens, and the sequences that are through."""
    e = f.engines[k]
    now, members = e["end_s"], e["flying"]
    e["now_s"], e["flying"] = now, 0
    for j in range(members):
        i, tokens = f.batch[k, j], f.scheduled[k, j]
        q = f.sequences[i]
        q["processed"] += tokens
        token = q["complete"]
        if not q["complete"]:
            e["prefilled"] += tokens
            if q["processed"] == q["target"]:
                q["complete"], token = 1, 1
                q["processed"] += 1
        if token:
            e["produced"] += 1
            emit(f, q, now)
        if q["processed"] == q["total"]:
            leave(f, k, i, SERVED)
        elif q["complete"] and f.server["role"] == PREFILL:
            q["here_s"] = now + (f.server["transfer_s"] + f.server["transfer_s_per_token"] * q["target"])
            leave(f, k, i, HANDED_OVER)
        else:
            f.running[k, e["running"]] = i
            e["running"] += 1
    e["sorted"] = 0


@hot
def emit(f, q, now):
    """Sequence q has a token; the gap to the one before is an inter-token latency."""
    if math.isnan(q["first_s"]):
        q["first_s"] = now
    else:
        f.itl[bucket(now - q["last_s"])] += 1
    q["last_s"] = now


@compiled
def leave(f, k, i, state):
    q = f.sequences[i]
    give_back(f, k, q)
    q["state"] = state
    f.done[f.desk[DONE]] = i
    f.desk[DONE] += 1
    if f.server["concurrency"] > 0:
        send_next(f, k, q["last_s"])


@compiled
def send_next(f, k, now):
    """A client of a closed loop sends the next request that can be served."""
    while f.desk[SENT] < f.sequences.shape[0]:
        i = f.desk[SENT]
        q = f.sequences[i]
        q["arrival_s"], q["here_s"] = now, now
        f.desk[SENT] += 1
        why = rejection(f, k, q)
        if why == 0:
            push(f, k, i)
            return
        q["state"] = why


# --- many iterations at once --------------------------------------------------------------------------------
@compiled
def decode_on(f, k, until):
    """Advances replica k by whole iterations that are all alike: the same sequences decode, none ends before the last,
    none is preempted, none comes. The sums are those of one iteration after another, so that results are the same bits.
    Only time and context change between them; sequences are looked at before and after. Returns whether any are."""
    e, per = f.engines[k], f.server["block_tokens"]
    members = e["running"]
    if members == 0:
        return False
    comes_s = math.inf  # when one comes that may be admitted
    if e["queued"] > 0:
        head = f.sequences[e["head"]]
        if head["here_s"] > e["now_s"]:
            comes_s = head["here_s"]
        elif not blocked(f, k, head, members):
            return False
    if f.server["scheduler"] != CHUNKED:
        sort(f, k)
    # wants[j]: sequences that want a block first in iteration j, and again every `per` iterations from there
    wants = f.aside
    wants[: per + 1] = 0
    context, count = 0, 1 << 40
    for j in range(members):
        q = f.sequences[f.running[k, j]]
        if q["complete"] == 0:
            return False
        context += q["processed"]
        count = min(count, q["total"] - q["processed"])
        wants[max(0, q["blocks"] * per - q["processed"] + 1)] += 1
    law, pace, free = e["decode_law"], e["pace"], e["free"]
    fixed_s, per_token_s = law["base"] + law["prefill"] * 0.0 + law["sequence"] * members, law["context"]
    now, first_s, done, phase = e["now_s"], 0.0, 0, 0
    gap_bucket, gaps, busy_s, lasts_s = -1, 0, e["busy_s"], 0.0
    while done < count and now < comes_s:
        taken = wants[phase]
        if phase == 0 and done >= per:
            taken += wants[per]
        if free - taken < 1:  # so that none is preempted, in whatever order they come
            break
        lasts_s = (fixed_s + per_token_s * np.float64(context)) * pace
        after = now + lasts_s
        if after > until:
            break
        free -= taken
        if done == 0:
            first_s = after
        else:
            b = bucket(after - now)
            if b != gap_bucket:
                if gaps > 0:
                    f.itl[gap_bucket] += gaps * members
                gap_bucket, gaps = b, 0
            gaps += 1
        busy_s += lasts_s
        now = after
        context += members
        done += 1
        phase += 1
        if phase == per:
            phase = 0
    # iterations get longer, so that nobody is through before, unless one comes; the rest is for rounding
    e["quiet_s"] = min(now + (count - done) * lasts_s * (1 - 1e-9), comes_s)
    if done == 0:
        return False
    if gaps > 0:
        f.itl[gap_bucket] += gaps * members
    take(f, k, e["free"] - free)
    e["now_s"], e["busy_s"] = now, busy_s
    e["iterations"] += done
    e["members"] += done * members
    e["produced"] += done * members
    kept = 0
    for j in range(members):
        i = f.running[k, j]
        q = f.sequences[i]
        first = max(0, q["blocks"] * per - q["processed"] + 1)
        if done > first:
            q["blocks"] += (done - 1 - first) // per + 1
        q["processed"] += done
        emit(f, q, first_s)
        q["last_s"] = now
        if q["processed"] == q["total"]:
            leave(f, k, i, SERVED)
        else:
            f.running[k, kept] = i
            kept += 1
    e["running"] = kept
    return True


@compiled
def blocked(f, k, head, members):
    """Whether the head of the queue stays where it is while those that run only decode."""
    e, server = f.engines[k], f.server
    if e["holders"] >= server["max_batch"]:
        return True
    if server["scheduler"] == CHUNKED and members >= server["chunk"]:
        return not (server["role"] == DECODE and head["complete"])
    fit, _ = fits(f, k, head)
    return not fit


@compiled
def bring(f, k, until):
    """Brings replica k to `until`: iterations that end by then are over, and none has started then or later."""
    e = f.engines[k]
    while True:
        if e["flying"] > 0:
            if e["end_s"] > until:
                return
            complete(f, k)
        if e["running"] == 0:
            if e["queued"] == 0:
                return
            e["now_s"] = max(e["now_s"], f.sequences[e["head"]]["here_s"])
        if e["now_s"] >= until:
            return
        if f.server["stepwise"] == 0 and decode_on(f, k, until):
            continue
        if not start(f, k):
            return
