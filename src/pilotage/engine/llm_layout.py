"""What LLM servers are in numbers: the structured arrays that the kernels in `blocks`, `batching` and `llm` work on.

A sequence is a request at an LLM server. An engine is one replica's inference engine: a queue of sequences, the list
of those that run, at most one iteration in flight, and a number of KV blocks.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np

from pilotage.engine import LLM_CACHE


def compiled(function: Callable[..., Any]) -> Any:
    """`randomness.compiled` for the kernels of LLM services, whose compiled code is kept apart."""
    folder = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = LLM_CACHE
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy", _nrt=False)(function)
    finally:
        numba.config.CACHE_DIR = folder


PREFILL_FIRST, CHUNKED = 0, 1
ROUND_ROBIN, LEAST_OUTSTANDING, KV_AWARE = 0, 1, 2
SCHEDULERS: Final = {"prefill-first": PREFILL_FIRST, "chunked": CHUNKED}
ROUTINGS: Final = {
    "round-robin": ROUND_ROBIN,
    "least-outstanding": LEAST_OUTSTANDING,
    "kv-aware": KV_AWARE,
}

# what becomes of a sequence
COMING, WAITING, RUNNING, SERVED, HANDED_OVER = 0, 1, 2, 3, 4
TOO_LONG, TOO_LARGE = 5, 6  # rejected: beyond the token limit of an iteration; larger than the KV cache
LOST, UNUSED = 7, 8  # with its replica; no sequence at all
REJECTIONS: Final = {TOO_LONG: "longer than max_tokens", TOO_LARGE: "larger than the KV cache"}

# seconds of an iteration: base + prefill p + sequence d + context k + square s + cross x, from left to right
LAW: Final = np.dtype(
    [(name, "f8") for name in ("base", "prefill", "sequence", "context", "square", "cross")], align=True
)

SERVER: Final = np.dtype(
    [
        ("scheduler", "i8"),
        ("routing", "i8"),
        ("max_batch", "i8"),  # sequences that hold blocks, and so the largest batch
        ("max_tokens", "i8"),  # prefill-first: padded tokens of a prefill batch
        ("chunk", "i8"),  # chunked: tokens of an iteration
        ("block_tokens", "i8"),
        ("span", "i8"),  # KV blocks of one block of a trace's prefix; 0: no prefix is reused
        ("vidur", "i8"),  # 1: a restarted sequence forgets the part of its prompt that it had not come to
        ("role", "i8"),
        ("concurrency", "i8"),  # clients that send their next request when they have the answer; 0: open loop
        ("stepwise", "i8"),  # 1: every iteration by itself, for tests
        ("ttft_s", "f8"),  # objectives
        ("tpot_s", "f8"),
        ("e2el_s", "f8"),
        ("transfer_s", "f8"),  # of a prompt's KV blocks to another replica: per request
        ("transfer_s_per_token", "f8"),
        ("overlap", "f8"),  # weight of a block to prefill against one in use, in KV-aware routing
    ],
    align=True,
)
UNIFIED, PREFILL, DECODE = 0, 1, 2  # roles: all of a request, its prefill only, all that follows

SEQUENCE: Final = np.dtype(
    [
        ("arrival_s", "f8"),
        ("here_s", "f8"),  # when it is at this server: the arrival, or the end of a transfer
        ("first_s", "f8"),  # of the first token; NaN: none yet
        ("last_s", "f8"),  # of the latest token
        ("id_lo", "i8"),  # its prefix blocks are ids[id_lo:id_lo + ids]
        ("hold_lo", "i8"),  # and holds[hold_lo:hold_lo + ids] says of which it is a holder
        ("ids", "i4"),
        ("prompt", "i4"),
        ("total", "i4"),  # prompt and output tokens
        ("target", "i4"),  # tokens that its prefill is to process
        ("processed", "i4"),
        ("blocks", "i4"),  # -1: holds none
        ("held", "i4"),  # prefix blocks of which it is a holder
        ("complete", "i4"),  # 1: its prefill is
        ("restarts", "i4"),
        ("cached", "i4"),  # prompt tokens that it found in the cache, in all its prefills
        ("state", "i4"),
        ("replica", "i4"),
        ("next", "i4"),
    ],
    align=True,
)

ENGINE: Final = np.dtype(
    [
        ("law", LAW),  # of iterations with a prefill
        ("decode_law", LAW),  # of the others
        ("kv_blocks", "i8"),
        ("watermark", "i8"),  # blocks
        ("now_s", "f8"),  # until when it has been brought
        ("end_s", "f8"),  # of the iteration in flight
        ("quiet_s", "f8"),  # before which nobody is through, unless one more comes
        ("flying", "i8"),  # sequences in it; 0: none is
        ("free", "i8"),  # blocks, those included that hold a prefix nobody uses
        ("idle", "i8"),  # prefix blocks that nobody uses
        ("oldest", "i4"),  # of these, the least recently used
        ("newest", "i4"),
        ("running", "i8"),
        ("sorted", "i8"),  # 1: `running` is in order of arrival
        ("holders", "i8"),
        ("head", "i8"),  # of its queue
        ("tail", "i8"),
        ("queued", "i8"),
        ("queued_blocks", "i8"),  # that the prompts in its queue will take
        ("stamp", "i8"),  # ordinal of the replica whose engine this is; -1: nobody's yet
        ("iterations", "i8"),
        ("members", "i8"),  # sequences in all of them
        ("busy_s", "f8"),
        ("prefilled", "i8"),  # tokens
        ("produced", "i8"),
        ("queried", "i8"),  # prompt tokens looked up in the prefix cache
        ("hit", "i8"),
        ("restarts", "i8"),
        ("pace", "f8"),
    ],
    align=True,
)

# [variant, pool]: what a replica there is like
BUILD: Final = np.dtype(
    [("law", LAW), ("decode_law", LAW), ("kv_blocks", "i8"), ("watermark", "i8")], align=True
)

# a prefix block in one replica's cache: how many hold it (-1: it is not there), and its neighbours in order of use
PREFIX: Final = np.dtype([("holders", "i4"), ("older", "i4"), ("newer", "i4")], align=True)

# Everything of one LLM service; axes: engines (N), sequences (S), prefix ids in all prompts (I), distinct ones (U).
# `running`, `batch` and `scheduled` have shape (N, max_batch), `aside` at least max_batch and block_tokens + 1,
# `cache` (N, U), `itl` (BUCKETS,), `ready` (N,): the engines that get requests. `done` (S,) lists the sequences that
# have left, and `desk` (8,) counts.
Fleet = namedtuple(
    "Fleet", "server sequences engines running batch scheduled aside ids holds cache itl ready done desk"
)
# of `desk`: round robin; engines in `ready`; requests sent in a closed loop; sequences in `done`; the queue at the
# door while no engine is ready; the next sequence to come
TURN, READY, SENT, DONE, DOOR_HEAD, DOOR_TAIL, DOOR, NEXT = range(8)
