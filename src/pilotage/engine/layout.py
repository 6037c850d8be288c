"""How a scenario becomes numbers: the structured arrays that the kernel reads and writes.

One row is one service in one world; rows of a world are adjacent. Copying the arrays copies the world.
"""

from __future__ import annotations

from typing import Final

import numpy as np

LATE_BINDING, CLOSED = 0, 1
CENTRAL, ROUND_ROBIN, LEAST_OUTSTANDING, POWER_OF_TWO = 0, 1, 2, 3
ANY_POOL: Final = -1

FORMERS: Final = {"late-binding": LATE_BINDING, "closed": CLOSED}
ROUTINGS: Final = {
    "central": CENTRAL,
    "round-robin": ROUND_ROBIN,
    "least-outstanding": LEAST_OUTSTANDING,
    "power-of-two": POWER_OF_TWO,
}

PARAMETERS: Final = np.dtype(
    [
        ("slo_s", "f8"),
        ("timeout_s", "f8"),
        ("patience_s", "f8"),
        ("abandoning", "f8"),  # probability that patience ends before the timeout
        ("batch_wait_s", "f8"),
        ("queue_limit", "i8"),
        ("batch_limit", "i8"),  # the largest batch the variant can run
        ("former", "i8"),
        ("routing", "i8"),
        ("slots", "i8"),  # batches one replica executes at once
        ("service", "i8"),  # index into the law and table arrays
        ("replica_lo", "i8"),  # the row's replicas are [replica_lo, replica_hi)
        ("replica_hi", "i8"),
        ("slot_lo", "i8"),  # its execution slots and idle ring
        ("slot_hi", "i8"),
        ("event_lo", "i8"),  # its event heap
        ("event_hi", "i8"),
        ("error_share", "f8"),  # 1 - accuracy
        ("initial", "i8"),
        ("seed_demand", "u8"),
        ("seed_noise", "u8"),
        ("seed_patience", "u8"),
        ("seed_route", "u8"),
        ("seed_start", "u8"),
    ],
    align=True,
)

POOL: Final = np.dtype(
    [
        ("usd_per_s", "f8"),
        ("boot_s", "f8"),
        ("max_nodes", "i8"),
        ("min_lifetime_s", "f8"),
        ("granularity_s", "f8"),
        ("minimum_s", "f8"),
        ("network_s", "f8"),
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
    ("timer", "i8"),  # 1 while a timer of this queue is in the event heap
]

ROW: Final = np.dtype(
    [
        *_QUEUE,
        ("arrived", "i8"),  # number of the next request
        ("turn", "i8"),  # round robin
        ("ready", "i8"),  # length of the ready list
        ("idle_first", "i8"),  # ring of idle slots
        ("idle", "i8"),
        ("events", "i8"),  # length of the event heap
        ("free", "i8"),  # first free request slot, -1: none
        ("fresh", "i8"),  # request slots from here on were never used
        ("executing", "i8"),  # requests in execution
        ("busy", "i8"),  # slots in execution
        ("inside", "i8"),  # requests waiting or in execution
        ("pending", "i8"),
        ("pool", "i8"),  # where pending replicas may go
        ("max_batch", "i8"),
        ("ordinal", "i8"),  # number of the next replica
        ("arrival_lo", "i8"),  # unread arrivals are [arrival_lo, arrival_hi)
        ("arrival_hi", "i8"),
        ("request_lo", "i8"),  # request slots are [request_lo, request_hi)
        ("request_hi", "i8"),
    ],
    align=True,
)

GONE, STARTING, READY, DRAINING = 0, 1, 2, 3
REPLICA: Final = np.dtype(
    [
        *_QUEUE,
        ("state", "i8"),
        ("pool", "i8"),
        ("ordinal", "i8"),
        ("ordered_s", "f8"),
        ("ready_s", "f8"),
        ("gone_s", "f8"),
        ("billed_s", "f8"),
        ("lived_s", "f8"),
        ("executing", "i8"),
        ("busy", "i8"),
    ],
    align=True,
)

REQUEST: Final = np.dtype(
    [
        ("time_s", "f8"),
        ("deadline_s", "f8"),
        ("demand", "f8"),
        ("number", "i8"),
        ("next", "i4"),
        ("batch", "i4"),
    ],
    align=True,
)
SLOT: Final = np.dtype([("head", "i8"), ("size", "i8"), ("replica", "i8")], align=True)
EVENT: Final = np.dtype([("time_s", "f8"), ("key", "i8")], align=True)

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
        ("max_batch", "i8"),
        ("wrong", "f8"),
        ("node_usd", "f8"),
        ("node_s", "f8"),
        ("replica_s", "f8"),
    ],
    align=True,
)
COUNTS: Final = (
    "seconds",
    "arrived",
    "served",
    "late",
    "rejected",
    "timed_out",
    "abandoned",
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

# what a policy orders for one row; max_batch 0 and pool ANY_POOL leave what is in force
ORDER: Final = np.dtype([("order", "i8"), ("release", "i8"), ("max_batch", "i8"), ("pool", "i8")], align=True)
