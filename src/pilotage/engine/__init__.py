"""The compiled simulator: requests one by one, from control tick to control tick, many worlds per call.

Here belongs what happens between two decisions. Not here: what exists (`world`), what a number means in dollars
(`metrics`), who decides (`control`). Compiled code knows only numbers: `layout` says how a scenario becomes
numbers, `numbers` makes them, `randomness` draws, `traffic` draws arrivals, `queues` holds what queues of
requests are made of, `central`, `bound` and `router` serve the three kinds of them, `services` takes one
service through a tick, `placement` holds the rules that choose a node (`scoring` what they are made of,
`pricing` the learned ones), `allocation` shows them candidates and does what they choose, `stowing` replays packing
problems with them, `nodes` keeps nodes and their bills, `replicas` takes decisions in, and `kernel` puts these
together. `cluster` shows a world with the same `read`/`apply` face as a live one. LLM services are served by kernels of
their own: `llm_layout` says what they are in numbers, `blocks` keeps the KV cache, `batching` runs iterations, `llm`
routes, `llm_ticks` takes one service through a tick and `llm_rows` all of them; `serving` is one of them by itself.

Semantics, which the plain-Python reference in `tests/traces` repeats event by event:

*Time.* A tick covers [t, t + tick_s). Services interact only at ticks. Within a tick, a service's replica events
(death of its node, crash, readiness, in this order, then by replica number) cut its time into segments in which
its replicas stay the same. At one instant replica events come first, then completions, then the starts that
these or the tick's decision allow; then arrivals, one by one, each followed by what is due in the queue it
joins, also if that is because a wait ends at this very instant; at last, what is due in other queues because a
wait ends. Where ticks and segments begin makes no difference to this order, but nothing starts before the
segment it starts in.

A tick does, in this order: (1) nodes that went during the last tick are removed; (2) per service the decision:
pool, variant and batch limit, release, order; (3) nodes whose notice has come are cordoned; (4) one step of a
rollout; (5) nodes that have been empty for long enough are removed, and pending replicas are placed; (6) per
service a sweep of the dead at the head of every queue, and the tick's requests; (7) the bills.

*Requests.* Number k of a service draws all it needs from counters: demand, patience, routing choice and, if it
heads a batch, the batch's noise are functions of (seed, service, stream, k). So two policies meet identical
requests (common random numbers), and a run can be copied by copying arrays. A request is rejected when as many
as `queue_limit` wait in the queue it would join. It dies when its timeout or its client's patience is over and
its service has not started; it is noticed, and counts as waiting until then, when it is at the head of a queue
of which a batch is to start, when a batch is taken that would hold it, at a tick (there, not in a batch that is
still open), or when it is routed from the door.

*Queues.* Central routing has one queue; otherwise every replica has one, and the central one is the door at
which requests wait while no replica is ready, to be routed one by one, in order, when one is. Round robin goes
through the replicas in the order in which they became ready. Least outstanding takes the first, in this order,
of those that have fewest requests, executing or waiting. Power of two choices draws two, and takes the first
unless the second has fewer. Ray Serve's router has rules of its own (`router`): a replica takes a limited number,
and the rest waits in the router.

*Batches.* Late binding: a queue is due when `max_batch` wait or `batch_wait_ms` have passed since the request at
its head arrived. When it is due and a slot is free, the dead at its head are swept; if it is still due, the slot
takes up to `max_batch` living requests. Closed: a batch closes at `max_batch` requests or `batch_wait_ms` after
its first entered the queue, and waits in line whole; of a closed batch the living are served. Limit and wait are
the service's until a decision sets others, which hold at once, also for what waits already. A central queue
gives work to the slot that has been free for longest, the lowest number among equals; a replica uses the slot
that has been free for longest, too. The time of a batch is the law's, times the noise of its first request,
times the pace of its replica: the slowness of its node, and the interference of the replicas that were on the
node after the tick's placement. To the law's time is added what idling costs, of every execution slot by itself:
`extra_ms` times how cold it is, 1 when the replica becomes ready; 1 minus that falls by exp(-t / `cooling_ms`) while
the slot is free for t, and itself by exp(-t / `warming_ms`) while it executes for t. A batch comes upon a stall with
probability `per_s` (s + `mean_ms` (1 - exp(-t / `mean_ms`))), where it takes s without and the slot was free for t, and
waits for its end: exponential, and a draw of its first request, as the noise is.

*Nodes.* A pool opens nodes as replicas need them. The n-th node opened in a world draws from counters its boot
time, whether it comes at all (if not, it dies when it should be up, and costs nothing), whether it is slow, and
when it crashes or is interrupted; it dies at the earliest of these and of the next outage of its zone. A dying
node takes its replicas with it. A spot interruption gives notice: at the first tick after it the replicas drain
(those that are starting go) and no more are placed there. With `at_notice = "replace-first"` those that serve are
leaving instead: they go on serving, are shown as draining and released by no decision, and at this and every later tick
those drain, the next to be taken first, that are more than their service's pending and starting replicas, or whose
node is taken before `grace_s` have passed from the next tick on; one that crashes does not start again.

*Replicas.* An order is pending until it is placed. Placement takes the services in the order of the scenario,
one replica each, round after round, until nothing fits; or, with rules that score pairs (`placement.PAIRWISE`),
again and again the service whose next replica has the highest score of all, the first among equals. The
candidates for a replica are the nodes, in the order in which they were opened, and one new node for every pool
and zone with room; only those it may go to and fits on are shown to the rule, which gives each a score, and the
highest wins, the first among equals. A replica takes its share of the node at once, and the lowest number that
is free in its service; when the node is up it pulls the image and loads the weights, or loads from the cache,
then serves. The cache of a variant is there from the time at which the first replica of it on the node was to
serve, also if that was released before. A row holds at most 2 max_replicas + 8 replicas at once, the draining
ones included; further orders stay pending. A release takes pending orders first, then replicas that are
starting, then ready ones, in each group the youngest first, sparing those on nodes younger than the pool's
`min_lifetime_s`. A released replica takes no new requests, finishes what it has, and goes. `initial_replicas`
are placed like an order at the start of the run, but are ready at once, on nodes that are up, with everything
cached; those that find no node stay pending.

*Losses.* A replica that dies or gets a notice is ordered anew at once, as Kubernetes' controllers do:
it is pending from then on, and placed at the next tick; one that was draining or leaving is not. A replica that crashes
starts again on its node, from the cache. Its requests, executing and waiting, are lost, or go back in their
order of number: to the head of the central queue (closed batches of up to `max_batch`, if batches close there)
or, while no other replica is ready, of the door; else through the router, one by one, to replicas that do not
die at the same time.

*LLM services.* A request is a sequence of tokens; `batching` says how replicas serve, and plain Python in
`tests/traces/reference_llm.py` repeats it bit for bit. Replicas are those of any service: they serve from readiness on,
with an empty cache; when they drain they finish what they have; when they die, what they had starts again from nothing,
in order of arrival and with the next routing, or is lost. While no replica is ready, requests wait at the door in order
of arrival. Latency is the time to first token; a request is counted when its last token is there, as late if it missed
any objective, and at the end of a run as overdue if its first token was, or is, too late.

*Variants.* A switch replaces the replicas of other variants by new ones, at most a quarter of the service's
replicas (rounded up, at least one) at a time: a replacement is ordered beside them, and when there are more
ready replicas than the service is to have, one of the old is released, the youngest first (once there are none,
one of the new). Monitors do not count what is in excess: first pending replicas, then starting ones, then ready
ones.

*Money.* A node is billed as `pools` says. What a node costs in a tick is shared by the replicas that were on it
after placement, in proportion to their dominant shares; while it is empty, by the service for which it was
opened.

*The end.* Requests that are unfinished when a run ends are in flight; those that have died by then are dropped,
those older than their objective are overdue, which costs what being late costs.

Approximations a user should know: batches that one replica executes together do not slow each other down;
services meet only at ticks; clients do not retry; the pace of an LLM replica changes at ticks only, and the blocks of
a prompt that is handed over are free at once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numba
import platformdirs

import pilotage.metrics

# Numba looks only at the outermost function's file when it decides whether compiled code is stale. A cache
# folder named after all sources that end up in the kernels cannot serve code from before an edit. The kernels of LLM
# services have a folder of their own (`llm_layout.compiled`): the others do without them.
_names = (
    "allocation",
    "bound",
    "central",
    "kernel",
    "layout",
    "nodes",
    "placement",
    "pricing",
    "queues",
    "randomness",
    "relaxation",
    "replicas",
    "router",
    "scoring",
    "services",
    "stowing",
    "traffic",
)
_llm_names = ("batching", "blocks", "llm", "llm_layout", "llm_ticks")


def _cache_folder(names: tuple[str, ...]) -> str:
    sources = [*(Path(__file__).with_name(f"{name}.py") for name in names), Path(pilotage.metrics.__file__)]
    digest = hashlib.sha256(b"\0".join(p.read_bytes() for p in sources) + numba.__version__.encode())
    return str(Path(platformdirs.user_cache_dir("pilotage")) / "kernels" / digest.hexdigest()[:16])


LLM_CACHE = _cache_folder(_names + _llm_names)
numba.config.CACHE_DIR = _cache_folder(_names)
