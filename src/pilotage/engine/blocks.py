"""The KV blocks of an LLM replica, and the prefixes that stay in them.

Blocks are a number, not a list: which of them a sequence has makes no difference. A block of a trace's prefix takes
`span` KV blocks. Its holders are the sequences whose prompt begins with it; once it has none it is idle: it counts as
free, and is kept until the room is wanted, the least recently used first, and of one prompt the last block first, as
vLLM's block pool does it (vllm-project/vllm `vllm/v1/core/block_pool.py`, `kv_cache_manager.py`). As there, at least
one token of a prompt is computed. Blocks of outputs are not kept: no trace says whose prompt they become part of.
"""

from __future__ import annotations

from pilotage.engine.llm_layout import compiled


@compiled
def blocks_for(tokens, per_block):
    return (tokens + per_block - 1) // per_block


@compiled
def hits(f, k, q):
    """Of the prompt of sequence q: prefix blocks that replica k has, and how many of these nobody holds."""
    span = f.server["span"]
    if span == 0:
        return 0, 0
    size = span * f.server["block_tokens"]
    most = min(q["ids"], (min(q["prompt"], q["target"]) - 1) // size)
    found, idle = 0, 0
    while found < most:
        holders = f.cache[k, f.ids[q["id_lo"] + found]]["holders"]
        if holders < 0:
            break
        idle += holders == 0
        found += 1
    return found, idle


@compiled
def take(f, k, count):
    """Takes free blocks of replica k; prefixes give way that nobody holds."""
    e = f.engines[k]
    e["free"] -= count
    span = f.server["span"]
    while e["free"] < e["idle"] * span:
        i = e["oldest"]
        unlink(f, k, i)
        f.cache[k, i]["holders"] = -1


@compiled
def unlink(f, k, i):
    """Takes prefix block i off the list of the idle."""
    e, p = f.engines[k], f.cache[k, i]
    older, newer = p["older"], p["newer"]
    if older >= 0:
        f.cache[k, older]["newer"] = newer
    else:
        e["oldest"] = newer
    if newer >= 0:
        f.cache[k, newer]["older"] = older
    else:
        e["newest"] = older
    e["idle"] -= 1


@compiled
def link(f, k, i):
    """Puts prefix block i on the list of the idle, as the most recently used."""
    e, p = f.engines[k], f.cache[k, i]
    p["older"], p["newer"] = e["newest"], -1
    if e["newest"] >= 0:
        f.cache[k, e["newest"]]["newer"] = i
    else:
        e["oldest"] = i
    e["newest"] = i
    e["idle"] += 1


@compiled
def fits(f, k, q):
    """Whether replica k can admit sequence q, and the prefix blocks that q finds there."""
    e = f.engines[k]
    found, idle = hits(f, k, q)
    span = f.server["span"]
    needed = blocks_for(q["target"], f.server["block_tokens"]) - (found - idle) * span
    return e["free"] - needed >= e["watermark"], found


@compiled
def admit(f, k, q, found):
    """Gives sequence q blocks for its whole prompt, of which `found` prefix blocks are there."""
    e, span = f.engines[k], f.server["span"]
    q["blocks"] = blocks_for(q["target"], f.server["block_tokens"])
    q["held"] = 0
    e["holders"] += 1
    if span == 0:
        take(f, k, q["blocks"])
        return
    for j in range(found):
        i = f.ids[q["id_lo"] + j]
        p = f.cache[k, i]
        if p["holders"] == 0:
            unlink(f, k, i)
            e["free"] -= span
        p["holders"] += 1
        f.holds[q["hold_lo"] + j] = 1
    q["held"] = found
    take(f, k, q["blocks"] - found * span)
    size = span * f.server["block_tokens"]
    for j in range(found, min(q["ids"], q["target"] // size, q["prompt"] // size)):
        p = f.cache[k, f.ids[q["id_lo"] + j]]
        if p["holders"] < 0:  # otherwise another has computed it, too, and this one keeps its own
            p["holders"] = 1
            f.holds[q["hold_lo"] + j] = 1
            q["held"] += 1
    q["cached"] += found * size
    if q["restarts"] == 0:
        e["queried"] += q["target"]
        e["hit"] += found * size


@compiled
def give_back(f, k, q):
    """Frees the blocks of sequence q; the prefix blocks of which it was the last holder stay as idle ones."""
    e, span = f.engines[k], f.server["span"]
    e["free"] += q["blocks"] - q["held"] * span
    j = q["ids"] - 1 if q["held"] > 0 else -1
    while j >= 0:
        if f.holds[q["hold_lo"] + j] == 1:
            f.holds[q["hold_lo"] + j] = 0
            i = f.ids[q["id_lo"] + j]
            p = f.cache[k, i]
            p["holders"] -= 1
            if p["holders"] == 0:
                link(f, k, i)
                e["free"] += span
        j -= 1
    q["blocks"], q["held"] = -1, 0
    e["holders"] -= 1
