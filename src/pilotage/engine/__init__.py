"""The compiled simulator: requests one by one, from control tick to control tick, many worlds per call.

Here belongs what happens between two decisions. Not here: what exists (`world`), what a number means in
dollars (`metrics`), who decides (`control`). `kernel` is compiled and knows only numbers; `layout` says how a
scenario becomes numbers; `cluster` shows a world with the same `read`/`apply` face as a live one.

Semantics, which the plain-Python reference in `tests/traces` repeats event by event:

*Time.* A tick covers [t, t + tick_s). Within a service, events happen in order of (time, kind, number):
completion, readiness, arrival, batch timer; numbers are execution slots, replica slots and queues. Decisions
act at ticks, services interact only there. A tick applies, in this order: all releases; all orders; placement
of pending replicas, one per service and round in the order of the scenario until nothing fits; the new batch
limit; a sweep of the dead at the head of every queue; dispatch. Capacity freed during a tick is placed at
the next.

*Requests.* Number k of a service draws all it needs from counters: demand, patience, routing choice and, if it
heads a batch, the batch's noise are functions of (seed, service, stream, k). So two policies meet identical
requests (common random numbers), and a run can be copied by copying arrays. A request is rejected when as
many as `queue_limit` wait in the queue it would join. It dies when its timeout or its client's patience is
over and its service has not started; it is noticed when a batch former or a sweep reaches it.

*Queues.* Central routing has one queue; otherwise every replica has one, and the central one is the door at
which requests wait while no replica is ready, to be routed one by one, in order, when one is.

*Batches.* Late binding: after the dead at its head are swept, a queue is due when `max_batch` wait or its
oldest has waited `batch_wait_ms`; then a free slot takes up to `max_batch` living requests. Closed: a batch
closes at `max_batch` requests or `batch_wait_ms` after its first entered the queue, and waits in line whole.
A central queue gives work to the slot that has been idle for longest. The time of a batch is the law's,
times the noise of its first request.

*Replicas.* An order is pending until a pool of the service has a free node (listed order, or the pool that
the decision names), then boots and loads, then serves. A row holds at most 2 max_replicas + 8 replicas at once,
the draining ones included; further orders stay pending. A release takes pending orders first, then replicas that
are starting, then ready ones, in each group the youngest first, sparing those younger than the pool's
`min_lifetime_s`. A released replica takes no new requests, finishes what it has, and goes. `initial_replicas`
are ready at the start of the run.

*The end.* Requests that are unfinished when a run ends are in flight; those that have died by then are
dropped, those older than their objective are overdue, which costs what being late costs.

Approximations a user should know: one replica per node; batches that one replica executes together do not
slow each other down; services meet only at ticks; clients do not retry.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numba
import platformdirs

import pilotage.metrics

# Numba looks only at the outermost function's file when it decides whether compiled code is stale. A cache
# folder named after all sources that end up in the kernels cannot serve code from before an edit.
_kernels = [Path(__file__).with_name(f"{name}.py") for name in ("kernel", "layout", "relaxation")]
_sources = [*_kernels, Path(pilotage.metrics.__file__)]
_digest = hashlib.sha256(b"\0".join(p.read_bytes() for p in _sources) + numba.__version__.encode())
numba.config.CACHE_DIR = str(
    Path(platformdirs.user_cache_dir("pilotage")) / "kernels" / _digest.hexdigest()[:16]
)
