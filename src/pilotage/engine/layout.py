"""How a scenario becomes numbers: the structured arrays that the kernel reads and writes.

One row is one service in one world; rows of a world are adjacent. Copying the arrays copies the world.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, NamedTuple, get_type_hints

import numpy as np

LATE_BINDING, CLOSED = 0, 1
CENTRAL, ROUND_ROBIN, LEAST_OUTSTANDING, POWER_OF_TWO, RAY_SERVE = 0, 1, 2, 3, 4
ANY_POOL: Final = -1
SAME_VARIANT: Final = -1
SAME_WAIT: Final = -1.0

FORMERS: Final = {"late-binding": LATE_BINDING, "closed": CLOSED}
ROUTINGS: Final = {
    "central": CENTRAL,
    "round-robin": ROUND_ROBIN,
    "least-outstanding": LEAST_OUTSTANDING,
    "power-of-two": POWER_OF_TWO,
    "ray-serve": RAY_SERVE,
}

MOST_TASKS: Final = 64  # of one router
RESOURCE_COUNT: Final = 4  # in the order of `world.pools.RESOURCES`

PARAMETERS: Final = np.dtype(
    [
        ("slo_s", "f8"),
        ("timeout_s", "f8"),
        ("patience_s", "f8"),
        ("abandoning", "f8"),  # probability that patience ends before the timeout
        ("batch_wait_s", "f8"),
        ("queue_limit", "i8"),
        ("batch_limit", "i8"),  # the largest batch the service's variants can run
        ("former", "i8"),
        ("routing", "i8"),
        ("slots", "i8"),  # batches one replica executes at once
        ("service", "i8"),
        ("variant_lo", "i8"),  # its variants are [variant_lo, variant_hi)
        ("variant_hi", "i8"),
        ("demand", "i8"),  # index of a quantile table; -1: always 1
        ("retry", "i8"),  # 1: requests of a dead replica are served anew
        ("crashes_per_s", "f8"),
        ("max_per_node", "i8"),
        ("replica_lo", "i8"),  # the row's replicas are [replica_lo, replica_hi)
        ("replica_hi", "i8"),
        ("slot_lo", "i8"),  # its execution slots
        ("slot_hi", "i8"),
        ("winner_lo", "i8"),  # its tree of slots, if it has one queue for all replicas
        ("winner_hi", "i8"),
        ("tree_lo", "i8"),  # its trees, if it routes to the least outstanding
        ("tree_hi", "i8"),
        ("router_lo", "i8"),  # its router, if it has one
        ("router_hi", "i8"),
        ("initial", "i8"),
        ("missed_usd", "f8"),  # what a request that is late or dropped costs, the mean of both
        ("overhead_s", "f8"),  # of a request on its way, outside the server
        ("overhead_table", "i8"),
        ("max_ongoing_requests", "i8"),  # from here on, of the router
        ("tasks_per_replica", "i8"),
        ("max_tasks", "i8"),
        ("tries_at_once", "i8"),
        ("backoff_s", "f8"),
        ("max_backoff_s", "f8"),
        ("timer_s", "f8"),
        ("send_s", "f8"),
        ("answer_s", "f8"),
        ("reject_s", "f8"),
        ("hop_s", "f8"),
        ("hop_spread", "f8"),
        ("seed_demand", "u8"),
        ("seed_noise", "u8"),
        ("seed_patience", "u8"),
        ("seed_route", "u8"),
        ("seed_start", "u8"),
    ],
    align=True,
)

VARIANT: Final = np.dtype(
    [
        ("needs", "f8", RESOURCE_COUNT),
        ("whole", "i8"),  # 1: takes a node of its own
        ("error_share", "f8"),  # 1 - accuracy
        ("pull_s", "f8"),
        ("pull_table", "i8"),
        ("load_s", "f8"),
        ("load_table", "i8"),
        ("warm_share", "f8"),
    ],
    align=True,
)

# [variant, pool]: a batch of n takes times[offset + 2 n] + times[offset + 2 n + 1] * its demand, in seconds
LAW: Final = np.dtype(
    [
        ("offset", "i8"),  # -1: may not run there
        ("noise", "i8"),
        ("idle_s", "f8"),  # what a batch takes longer on a slot that is cold
        ("cooling_s", "f8"),
        ("warming_s", "f8"),
        ("stalls_per_s", "f8"),
        ("stall_s", "f8"),
    ],
    align=True,
)

POOL: Final = np.dtype(
    [
        ("usd_per_s", "f8"),
        ("boot_s", "f8"),
        ("boot_table", "i8"),
        ("max_nodes", "i8"),
        ("min_lifetime_s", "f8"),
        ("granularity_s", "f8"),
        ("minimum_s", "f8"),
        ("network_s", "f8"),
        ("has", "f8", RESOURCE_COUNT),
        ("whole", "i8"),  # 1: a node carries one replica
        ("zone_lo", "i8"),  # its zones are zones[zone_lo:zone_hi]
        ("zone_hi", "i8"),
        ("idle_removal_s", "f8"),
        ("failing", "f8"),
        ("crashes_per_s", "f8"),
        ("slow_share", "f8"),
        ("slow_factor", "f8"),
        ("interruptions_per_s", "f8"),
        ("notice_s", "f8"),
        ("spot", "i8"),
        ("grace_s", "f8"),
        ("replace_first", "i8"),  # 1: told to go, its replicas serve until those ordered for them are ready
    ],
    align=True,
)

# times at which a pool's nodes in a zone are taken away, and none are given
CLOSURE: Final = np.dtype(
    [("pool", "i8"), ("zone", "i8"), ("start_s", "f8"), ("end_s", "f8"), ("notice_s", "f8")], align=True
)

NODE: Final = np.dtype(
    [
        ("state", "i8"),  # GONE, READY (from its order on) or DRAINING (cordoned)
        ("pool", "i8"),
        ("zone", "i8"),
        ("ordinal", "i8"),  # the how manieth node of the world
        ("owner", "i8"),  # the service for which it was opened
        ("replicas", "i8"),
        ("free", "f8", RESOURCE_COUNT),
        ("ordered_s", "f8"),
        ("up_s", "f8"),
        ("notice_s", "f8"),
        ("death_s", "f8"),
        ("failing", "i8"),  # 1: its death is that it never came
        ("empty_s", "f8"),  # since when it has been empty
        ("pace", "f8"),
        ("billed_s", "f8"),
        ("share", "f8"),  # sum of the shares of its replicas
        ("cost_usd", "f8"),  # of the last tick
        ("cost_s", "f8"),
        ("siblings", "i8"),  # replicas of the service that is being placed
    ],
    align=True,
)

# what a placement rule sees of one node that a replica could go to
CANDIDATE: Final = np.dtype(
    [
        ("node", "i8"),  # -1: a new one
        ("pool", "i8"),
        ("zone", "i8"),
        ("preference", "i8"),  # place of the pool in the service's list, from 0
        ("has", "f8", RESOURCE_COUNT),  # what the node has (0: not modelled)
        ("free", "f8", RESOURCE_COUNT),  # of which is free, before this replica
        ("needs", "f8", RESOURCE_COUNT),  # what the replica takes
        ("usd_per_hour", "f8"),
        ("spot", "i8"),
        ("interruptions_per_hour", "f8"),
        ("ready_in_s", "f8"),  # expected time until the replica serves: boot, pull, load
        ("recovery_s", "f8"),  # of one that replaces it on a new node, failed orders included
        ("batch_s", "f8"),  # time of a full batch there
        ("replicas", "i8"),  # on the node
        ("siblings", "i8"),  # of the same service on the node
        ("in_zone", "i8"),  # of the same service in the node's zone
        ("in_emptiest_zone", "i8"),  # in the zone, of those with a candidate, that has fewest
        ("service", "i8"),
        ("serving", "i8"),  # replicas of the service that are starting or ready
        ("on_spot", "i8"),  # of these, on spot nodes
        ("pending", "i8"),  # replicas of the service that wait for a node, this one among them
        ("needed", "f8"),  # replicas that the recent requests would keep busy there, in full batches
        ("room", "i8"),  # nodes that the pool may still open
        ("failing", "f8"),  # probability that a new node never comes
        ("missed_usd_per_hour", "f8"),  # what an hour of requests costs that the replica would have served
        ("slowdown", "f8"),  # of its batches, by its neighbours
        ("harm_usd_per_hour", "f8"),  # what the neighbours would have served, but for the slowdown by it
        ("worth_usd_per_hour", "f8"),  # rent of the share that the replica takes where that is cheapest
        (
            "filled_usd_per_hour",
            "f8",
        ),  # the same of it and of all that is pending and fits on the node besides
        ("unfilled", "f8"),  # least free share of the node with all of these
    ],
    align=True,
)

# a queue of requests: the door or central queue of a row, or the queue of a replica
_QUEUE: Final = [
    ("head", "i8"),
    ("tail", "i8"),
    ("waiting", "i8"),
    ("closed", "i8"),  # closed batches in line
    ("forming", "i8"),  # requests in the open batch
    ("forming_head", "i8"),
    ("forming_since_s", "f8"),
    ("able_s", "f8"),  # since when a batch has been complete: enough wait, or one is closed
]

ROW: Final = np.dtype(
    [
        *_QUEUE,
        ("turn", "i8"),  # round robin
        ("ready", "i8"),  # length of the ready list
        ("span", "i8"),  # replicas from here on are gone
        ("pending", "i8"),
        ("replacing", "i8"),  # replicas in excess while a variant is rolled out
        ("pool", "i8"),  # where pending replicas may go
        ("variant", "i8"),  # the variant of new replicas
        ("max_batch", "i8"),
        ("batch_wait_s", "f8"),
        ("ordinal", "i8"),  # number of the next replica
        ("rate_rps", "f8"),  # of arrivals, over about a minute; -1: none is known yet
        ("storage_lo", "i8"),  # its arrivals and requests are [storage_lo, storage_hi)
        ("storage_hi", "i8"),
        ("arrival_lo", "i8"),  # of these, from storage_lo on, [arrival_lo, arrival_hi) have not come yet
        ("arrival_hi", "i8"),
        ("first_number", "i8"),  # the request in place i is number first_number + i
    ],
    align=True,
)

GONE, STARTING, READY, DRAINING, LEAVING = 0, 1, 2, 3, 4  # leaving: serves, but not for long
REPLICA: Final = np.dtype(
    [
        *_QUEUE,
        ("state", "i8"),
        ("node", "i8"),
        ("pool", "i8"),
        ("variant", "i8"),
        ("ordinal", "i8"),
        ("lives", "i8"),  # starts, of which all but the first follow a crash
        ("ordered_s", "f8"),
        ("ready_s", "f8"),
        ("crash_s", "f8"),
        ("death_s", "f8"),  # of its node
        ("gone_s", "f8"),
        ("pace", "f8"),
        ("share", "f8"),  # dominant share of the node
        ("cached", "i8"),  # what its router believes that it has in hand
        ("answered_s", "f8"),  # when it has dealt with what the router sent
        (
            "told_head",
            "i8",
        ),  # batches whose completion the router has not heard of, each by its first request
        ("told_tail", "i8"),
        ("told", "i8"),
    ],
    align=True,
)

# parallel to the arrivals: the next in its queue or batch, and the size of the closed batch that it heads
REQUEST: Final = np.dtype([("next", "i4"), ("batch", "i4")], align=True)

# parallel to the requests of services with a router: one on its way to a replica, the answer, what became of it
MESSAGE: Final = np.dtype(
    [
        ("ready_s", "f8"),  # when it is there
        ("done_s", "f8"),  # when the batch that the request heads is complete
        ("latency_s", "f8"),  # of the request, once it is served
        ("next", "i4"),
        ("replica", "i4"),
        ("ordinal", "i4"),  # of that replica
        ("count", "i4"),  # what the replica had in hand
        ("refused", "i4"),
        ("size", "i4"),  # of the batch that the request heads
        ("told_next", "i4"),
    ],
    align=True,
)
LINE: Final = np.dtype([("head", "i8"), ("tail", "i8"), ("count", "i8")], align=True)
TASK: Final = np.dtype(
    [
        ("wake_s", "f8"),  # infinite: cancelled
        ("own", "i8"),  # the request that it is to place; -1: none yet
        ("tries", "i8"),
        ("attempt", "i8"),
        ("first", "i8"),  # the replicas that it has asked; -1: none
        ("second", "i8"),
    ],
    align=True,
)
ROUTER: Final = np.dtype(
    [
        ("busy_s", "f8"),  # its loop has work until then
        ("seen", "i8"),  # arrivals from here on have not been looked at
        ("transit", "i8"),  # requests that are neither in its queue nor in a replica's
        ("draws", "u8"),
        ("tasks", "i8"),
        ("lines", LINE, 3),
        ("task", TASK, MOST_TASKS),
    ],
    align=True,
)
EVENT: Final = np.dtype([("time_s", "f8"), ("number", "i8")], align=True)
SLOT: Final = np.dtype(
    [
        ("free_s", "f8"),
        ("head", "i8"),
        ("size", "i8"),
        ("replica", "i8"),
        ("cold", "f8"),  # at free_s, from 0 to 1
    ],
    align=True,
)

# what one service did during one tick; `control.policy.FEATURES` is computed from these
TICK: Final = np.dtype(
    [
        ("seconds", "f8"),
        ("arrived", "i8"),
        ("served", "i8"),
        ("late", "i8"),
        ("rejected", "i8"),
        ("timed_out", "i8"),
        ("abandoned", "i8"),
        ("lost", "i8"),
        ("overdue", "i8"),
        ("latency_s", "f8"),
        ("latency_p95_s", "f8"),
        ("peak_second", "i8"),
        ("waiting", "i8"),
        ("executing", "i8"),
        ("inside_s", "f8"),
        ("busy_s", "f8"),
        ("ready_s", "f8"),
        ("batches", "i8"),
        ("batched", "i8"),
        ("ready", "i8"),
        ("starting", "i8"),
        ("pending", "i8"),
        ("draining", "i8"),
        ("failed", "i8"),  # replicas that died, crashed or were interrupted
        ("max_batch", "i8"),
        ("wrong", "f8"),
        ("node_usd", "f8"),
        ("node_s", "f8"),
        ("replica_s", "f8"),
        # of LLM services; their latency is the time to first token
        ("prompt_tokens", "i8"),  # processed
        ("output_tokens", "i8"),  # produced
        ("queried_tokens", "i8"),  # of prompts, looked up in the prefix cache
        ("hit_tokens", "i8"),
        ("preempted", "i8"),
        ("tpot_s", "f8"),  # sum over the served that have one
        ("tpots", "i8"),
        ("kv_used", "i8"),  # blocks of ready replicas at the tick
        ("kv_blocks", "i8"),
    ],
    align=True,
)
TOKEN_COUNTS: Final = (
    "prompt_tokens",
    "output_tokens",
    "queried_tokens",
    "hit_tokens",
    "preempted",
    "tpot_s",
    "tpots",
)
COUNTS: Final = (
    "seconds",
    "arrived",
    "served",
    "late",
    "rejected",
    "timed_out",
    "abandoned",
    "lost",
    "overdue",
    "latency_s",
    "inside_s",
    "busy_s",
    "ready_s",
    "batches",
    "batched",
    "wrong",
    "node_usd",
    "node_s",
    "replica_s",
)

# what a policy orders for one row; max_batch 0, pool ANY_POOL, variant SAME_VARIANT, batch_wait_s SAME_WAIT and
# chunk_tokens 0 leave what is in force
ORDER: Final = np.dtype(
    [
        ("order", "i8"), ("release", "i8"), ("max_batch", "i8"), ("pool", "i8"), ("variant", "i8"),
        ("batch_wait_s", "f8"), ("chunk_tokens", "i8"),
    ],
    align=True,
)  # fmt: skip


# --- the arrays that the kernel's entry points take, each with its type and number of axes ------------------------
class State(NamedTuple):
    """What compiled code writes; the first axis of those with more than one, but `trees` and `scratch`, is worlds."""

    rows: Annotated[np.ndarray, ROW, 1]
    params: Annotated[np.ndarray, PARAMETERS, 1]
    ticks: Annotated[np.ndarray, TICK, 1]
    replicas: Annotated[np.ndarray, REPLICA, 1]
    ready: Annotated[np.ndarray, "i8", 1]
    slots: Annotated[np.ndarray, SLOT, 1]
    tree: Annotated[np.ndarray, EVENT, 1]
    trees: Annotated[np.ndarray, "f8", 2]
    scratch: Annotated[np.ndarray, "i8", 2]
    nodes: Annotated[np.ndarray, NODE, 2]
    summary: Annotated[np.ndarray, "i8", 2]
    in_zone: Annotated[np.ndarray, "i8", 2]
    cached: Annotated[np.ndarray, "f8", 3]
    closures: Annotated[np.ndarray, CLOSURE, 2]
    candidate: Annotated[np.ndarray, CANDIDATE, 1]
    seeds: Annotated[np.ndarray, "u8", 1]
    routers: Annotated[np.ndarray, ROUTER, 1]
    messages: Annotated[np.ndarray, MESSAGE, 1]


class Numbers(NamedTuple):
    """What compiled code only reads: a scenario in numbers; see `numbers`."""

    pools: Annotated[np.ndarray, POOL, 1]
    zones: Annotated[np.ndarray, "i8", 1]
    variants: Annotated[np.ndarray, VARIANT, 1]
    laws: Annotated[np.ndarray, LAW, 2]
    times: Annotated[np.ndarray, "f8", 1]
    tables: Annotated[np.ndarray, "f8", 2]
    preference: Annotated[np.ndarray, "i8", 2]
    zone_ok: Annotated[np.ndarray, "u1", 2]
    slowdown: Annotated[np.ndarray, "f8", 2]


def _empty(kind: Any) -> Any:
    """The arrays of a bundle, of the right types and without content: what a kernel's signature is read from."""
    hints = get_type_hints(kind, include_extras=True)
    return kind(*(np.zeros((0,) * hint.__metadata__[1], hint.__metadata__[0]) for hint in hints.values()))


EMPTY_STATE: Final = _empty(State)
EMPTY_NUMBERS: Final = _empty(Numbers)
