"""Ray Serve's router: power of two choices on its own count, and what becomes of requests that find no room.

Origin: ray-project/ray `python/ray/serve/_private/{request_router,router,replica}.py`, read in release 2.60 and
checked against logs of a real router; `experiments/fidelity/ray_serve` compares the two. A replica takes at most
`max_ongoing_requests`. As long as every request finds room, the router is power of two choices, and costs nothing.

*Pending.* A request that finds no room waits in the router, in order of number. At most `max_tasks` tasks
(`tasks_per_replica` a replica) poll. A task takes the oldest request that no task has for its *own*, and gives
whatever room it finds to the *oldest of all*; it goes on at once until its own is sent, and then takes the next.
Without room it asks the two replicas how many they have, tries `tries_at_once` times more, and then waits
`backoff`, doubled up to a maximum. Room that becomes free wakes nobody. A task whose own request another has
sent is cancelled, and counts until the loop gets to that request.

*The loop.* The router does one thing at a time, in the order in which things became ready: requests to send,
answers, arrivals, tasks (at equal times in this order). Its count of a replica moves only with those: a request
sent is one more, an answer tells the count, completions are heard of when the loop next looks at the replica,
as of the time at which that became ready. A request that a replica refuses comes back in its order of number.

This is what makes Ray's router collapse when replicas are full. Tasks send several requests before the first has
been counted; what is refused comes back ahead of the requests that tasks own, and every poll, half a second
apart, serves one of those.

A request is in one place at a time: the queue (`Context.row`), a line of messages (to be sent, on its way, refused
and on its way back), or a replica. Messages are linked through `Context.messages`, parallel to the requests.
"""

from __future__ import annotations

import math

import numpy as np

from pilotage.engine.bound import bring, catch_up, outstanding, pair, two_of
from pilotage.engine.layout import LEAVING, READY
from pilotage.engine.queues import admit, append, bury, count_arrivals, is_dead, pop, reject, upto
from pilotage.engine.randomness import compiled, draw, hot, normal, uniform

SENDS, HITS, ANSWERS = 0, 1, 2  # lines of messages: to be sent, on the way, and answered
HIT, SEND, ANSWER, ARRIVAL, TASK, NOTHING = 0, 1, 2, 3, 4, 5  # what comes next
OWNED = 1  # in `batch` of a pending request: a task has it


@compiled
def reset(router):
    router["busy_s"], router["seen"], router["transit"], router["draws"], router["tasks"] = 0.0, 0, 0, 0, 0
    for line in range(3):
        router["lines"][line]["count"] = 0


@compiled
def serve_routed(c, now, end):
    """The segment [now, end) of a service with Ray Serve's router."""
    since, router = now, c.router
    lo = c.row["arrival_lo"]
    hi = upto(c.arrivals, lo, c.row["arrival_hi"], 0.0, end)
    while True:
        while router["seen"] < hi and is_calm(c):
            at_s = max(c.arrivals[router["seen"]], router["busy_s"])
            if at_s >= end or not go_straight(c, router["seen"], since, at_s):
                break
            router["seen"] += 1
        kind, at_s, j = next_thing(c, hi)
        if at_s >= end:
            break
        if kind == HIT:
            hit(c, at_s, since)
        elif kind == SEND:
            send(c, at_s, since)
        elif kind == ANSWER:
            answer(c, at_s, since)
        elif kind == ARRIVAL:
            wait(c, router["seen"], at_s)
            router["seen"] += 1
        else:
            poll(c, j, at_s, since)
    count_arrivals(c, lo, hi)
    for k in range(c.row["span"]):
        if c.replicas[k]["state"] >= READY:
            bring(c, k, since, end)


@compiled
def next_thing(c, hi):
    """What happens next, when, and which task's turn it is. What replicas do comes before what the loop does."""
    router, lines = c.router, c.router["lines"]
    kind, ready_s, which = NOTHING, math.inf, -1
    if lines[SENDS]["count"] > 0:
        kind, ready_s = SEND, c.messages[lines[SENDS]["head"]]["ready_s"]
    if lines[ANSWERS]["count"] > 0 and c.messages[lines[ANSWERS]["head"]]["ready_s"] < ready_s:
        kind, ready_s = ANSWER, c.messages[lines[ANSWERS]["head"]]["ready_s"]
    if router["seen"] < hi and c.arrivals[router["seen"]] < ready_s:
        kind, ready_s = ARRIVAL, c.arrivals[router["seen"]]
    for j in range(router["tasks"]):
        if router["task"][j]["wake_s"] < ready_s:
            kind, ready_s, which = TASK, router["task"][j]["wake_s"], j
    at_s = max(ready_s, router["busy_s"])
    if lines[HITS]["count"] > 0 and c.messages[lines[HITS]["head"]]["ready_s"] <= at_s:
        kind, at_s = HIT, c.messages[lines[HITS]["head"]]["ready_s"]
    return kind, at_s, which


# --- what the router knows of replicas ---------------------------------------------------------------------
@hot
def look(c, k, ready_s, since, now):
    """Brings replica k to `now`, and hears of what it completed until `ready_s`."""
    replica = c.replicas[k]
    catch_up(c, k, since, now, True)
    while replica["told"] > 0:
        message = c.messages[replica["told_head"]]
        if message["done_s"] > ready_s:
            break
        replica["cached"] = max(replica["cached"] - message["size"], 0)
        replica["told_head"] = message["told_next"]
        replica["told"] -= 1


@hot
def takes_work(replica):
    return replica["state"] == READY or replica["state"] == LEAVING


@hot
def is_there(c, message):
    """Whether the replica that a message is for, or from, still takes requests."""
    replica = c.replicas[message["replica"]]
    return takes_work(replica) and replica["ordinal"] == message["ordinal"]


@compiled
def random_bits(c):
    c.router["draws"] += np.uint64(1)
    return draw(c.param["seed_route"] + np.uint64(1), c.router["draws"])


@compiled
def random_share(c):
    c.router["draws"] += np.uint64(1)
    return uniform(c.param["seed_route"] + np.uint64(1), c.router["draws"])


@compiled
def hop_s(c):
    """How long a message is on its way."""
    c.router["draws"] += np.uint64(2)
    z = normal(c.param["seed_route"] + np.uint64(1), c.router["draws"] - np.uint64(1))
    return c.param["hop_s"] * math.exp(c.param["hop_spread"] * z)


# --- messages ----------------------------------------------------------------------------------------------
@hot
def push(c, which, i):
    line = c.router["lines"][which]
    if line["count"] > 0:
        c.messages[line["tail"]]["next"] = i
    else:
        line["head"] = i
    line["tail"] = i
    line["count"] += 1


@hot
def shift(c, which):
    line = c.router["lines"][which]
    i = line["head"]
    line["head"] = c.messages[i]["next"]
    line["count"] -= 1
    return i


@compiled
def push_answer(c, i):
    """Puts an answer behind those that are there no later."""
    line = c.router["lines"][ANSWERS]
    ready_s = c.messages[i]["ready_s"]
    if line["count"] == 0 or c.messages[line["tail"]]["ready_s"] <= ready_s:
        push(c, ANSWERS, i)
        return
    before, after = -1, line["head"]
    while c.messages[after]["ready_s"] <= ready_s:
        before, after = after, c.messages[after]["next"]
    c.messages[i]["next"] = after
    if before < 0:
        line["head"] = i
    else:
        c.messages[before]["next"] = i
    line["count"] += 1


@compiled
def send(c, now, since):
    """The loop sends the next request. If another task than its owner found the room, that task ends now."""
    i = shift(c, SENDS)
    message, router = c.messages[i], c.router
    for j in range(router["tasks"]):
        if router["task"][j]["own"] == i:
            end_task(c, j)
            start_tasks(c, now)
            break
    if not is_there(c, message):
        come_back(c, i)
        start_tasks(c, now)
        return
    replica = c.replicas[message["replica"]]
    look(c, message["replica"], message["ready_s"], since, now)
    replica["cached"] += 1
    router["busy_s"] = now + c.param["send_s"]
    message["ready_s"] = router["busy_s"] + c.param["hop_s"]
    push(c, HITS, i)


@compiled
def hit(c, now, since):
    """A request reaches its replica, which takes or refuses it."""
    i = shift(c, HITS)
    message = c.messages[i]
    k = message["replica"]
    replica = c.replicas[k]
    if not is_there(c, message):
        come_back(c, i)
        start_tasks(c, now)
        return
    catch_up(c, k, since, now, True)
    message["refused"] = outstanding(c, k) >= c.param["max_ongoing_requests"]
    if not message["refused"]:
        admit(c, replica, i, now)
        c.router["transit"] -= 1
    message["count"] = outstanding(c, k)
    replica["answered_s"] = max(replica["answered_s"], now) + c.param["reject_s"]
    message["ready_s"] = replica["answered_s"] + hop_s(c)
    push_answer(c, i)


@compiled
def answer(c, now, since):
    i = shift(c, ANSWERS)
    message = c.messages[i]
    if is_there(c, message):
        look(c, message["replica"], message["ready_s"], since, now)
        c.replicas[message["replica"]]["cached"] = message["count"]
    c.router["busy_s"] = now + c.param["answer_s"]
    if message["refused"]:
        come_back(c, i)
        start_tasks(c, now)


# --- requests ----------------------------------------------------------------------------------------------
@hot
def is_calm(c):
    """Whether the loop has nothing to do but to wait for requests."""
    router = c.router
    under_way = router["transit"] + router["tasks"] + router["lines"][ANSWERS]["count"] + c.row["waiting"]
    return under_way == 0 and c.row["ready"] > 0


@hot
def go_straight(c, i, since, now):
    """Sends request i to the one of two replicas that has fewer requests, unless both are full.

    Returns False, too, if the replica has no room although the router believes so.
    """
    first, second = pair(c, c.row["first_number"] + i)
    look(c, c.ready[first], c.arrivals[i], since, now)
    look(c, c.ready[second], c.arrivals[i], since, now)
    k = fewer(c, c.ready[first], c.ready[second])
    if max(c.replicas[k]["cached"], outstanding(c, k)) >= c.param["max_ongoing_requests"]:
        return False
    admit(c, c.replicas[k], i, now)
    c.replicas[k]["cached"] += 1
    return True


@hot
def fewer(c, first, second):
    """The replica that the router believes to have fewer requests; the first of equals."""
    return second if c.replicas[second]["cached"] < c.replicas[first]["cached"] else first


@compiled
def wait(c, i, now):
    """A request that finds no room waits in the router."""
    if c.row["waiting"] >= c.param["queue_limit"]:
        reject(c, now)
        return
    append(c, c.row, i)
    c.requests[i]["batch"] = 0
    start_tasks(c, now)


@compiled
def come_back(c, i):
    """Puts a request that was under way back among the pending."""
    c.router["transit"] -= 1
    insert(c, i)


@compiled
def insert(c, i):
    """Puts a request among the pending, which are in order of number."""
    row = c.row
    if row["waiting"] == 0 or row["tail"] < i:
        append(c, row, i)
    else:
        before, after = -1, row["head"]
        while after < i:
            before, after = after, c.requests[after]["next"]
        c.requests[i]["next"] = after
        if before < 0:
            row["head"] = i
        else:
            c.requests[before]["next"] = i
        row["waiting"] += 1
    c.requests[i]["batch"] = 0


@compiled
def sweep_pending(c, now):
    """Removes the dead at the head of the queue; a task that had one for its own looks for another."""
    row = c.row
    while row["waiting"] > 0 and is_dead(c, row["head"], now):
        i = pop(c, row)
        bury(c.tick, c.param, row["first_number"] + i, now, c.t0)
        for j in range(c.router["tasks"]):
            if c.router["task"][j]["own"] == i:
                c.router["task"][j]["own"] = -1


# --- tasks -------------------------------------------------------------------------------------------------
@compiled
def most_tasks(c):
    most = min(c.param["max_tasks"], c.param["tasks_per_replica"] * c.row["ready"])
    return min(most, c.row["waiting"])


@compiled
def unowned(c):
    """The oldest pending request that no task has for its own; -1 if there is none."""
    i = c.row["head"]
    for _ in range(c.row["waiting"]):
        if c.requests[i]["batch"] != OWNED:
            return i
        i = c.requests[i]["next"]
    return -1


@compiled
def start_tasks(c, now):
    """Starts as many tasks as there may be; they run behind all that is ready."""
    router, most = c.router, most_tasks(c)
    if router["tasks"] >= most or unowned(c) < 0:
        return
    while router["tasks"] < most:
        task = router["task"][router["tasks"]]
        task["wake_s"], task["own"], task["tries"], task["attempt"] = now, -1, 0, 0
        task["first"], task["second"] = -1, -1
        router["tasks"] += 1


@compiled
def end_task(c, j):
    """Removes a task; those that are left stay in the order in which they started."""
    tasks = c.router["task"]
    c.router["tasks"] -= 1
    for at in range(j, c.router["tasks"]):
        tasks[at] = tasks[at + 1]


@compiled
def poll(c, j, now, since):
    """Task j runs until it has to wait, or to ask, or has nothing left to do."""
    router, task = c.router, c.router["task"][j]
    ready_s = task["wake_s"]
    asked = task["first"] >= 0
    sweep_pending(c, now)
    while True:
        if task["own"] < 0:
            own = unowned(c) if router["tasks"] <= most_tasks(c) else -1
            if own < 0:
                end_task(c, j)
                break
            c.requests[own]["batch"] = OWNED
            task["own"], task["tries"], task["attempt"] = own, 0, 0
        if asked:
            k = hear_answers(c, task, ready_s, since, now)
            asked = False
        elif c.row["ready"] == 0:
            k = -1
        else:
            k = choose(c, task, ready_s, since, now)
            if task["first"] >= 0:
                break
        if k >= 0 and send_oldest(c, j, k, now):
            continue
        task["tries"] += 1
        if task["tries"] > c.param["tries_at_once"]:
            backoff_s = min(c.param["backoff_s"] * 2.0 ** task["attempt"], c.param["max_backoff_s"])
            task["wake_s"] = now + backoff_s + c.param["timer_s"] * random_share(c)
            task["attempt"] += 1
            break
    router["busy_s"] = now
    start_tasks(c, now)


@compiled
def choose(c, task, ready_s, since, now):
    """The replica with room that a task finds; if there is none (-1), it has asked the replicas.

    Of two of which one is full by the router's count, the full one's count is brought up to date.
    """
    first, second = two_of(c.row["ready"], random_bits(c))
    first, second = c.ready[first], c.ready[second]
    look(c, first, ready_s, since, now)
    look(c, second, ready_s, since, now)
    k = fewer(c, first, second)
    if c.replicas[k]["cached"] >= c.param["max_ongoing_requests"]:
        task["first"], task["second"] = first, second
        way_s = hop_s(c) + hop_s(c)
        if second != first:
            way_s = max(way_s, hop_s(c) + hop_s(c))
        task["wake_s"] = now + way_s
        return -1
    other = first + second - k
    if c.replicas[other]["cached"] >= c.param["max_ongoing_requests"]:
        c.replicas[other]["cached"] = outstanding(c, other)
    return k


@compiled
def hear_answers(c, task, ready_s, since, now):
    """The replica with room among those that a task has asked, or -1."""
    best, least = -1, c.param["max_ongoing_requests"]
    for k in (task["first"], task["second"]):
        if not takes_work(c.replicas[k]):
            continue
        look(c, k, ready_s, since, now)
        count = outstanding(c, k)
        c.replicas[k]["cached"] = count
        if count < least:
            best, least = k, count
    task["first"], task["second"] = -1, -1
    return best


@compiled
def send_oldest(c, j, k, now):
    """Task j gives the room of replica k to the oldest request; returns whether that was its own."""
    router = c.router
    i = pop(c, c.row)
    message = c.messages[i]
    message["ready_s"], message["replica"], message["ordinal"] = now, k, c.replicas[k]["ordinal"]
    router["transit"] += 1
    push(c, SENDS, i)
    if router["task"][j]["own"] == i:
        router["task"][j]["own"] = -1
        return True
    for other in range(router["tasks"]):
        task = router["task"][other]
        if task["own"] == i:
            task["wake_s"], task["first"], task["second"] = math.inf, -1, -1
    return False


# --- deaths, books and storage -----------------------------------------------------------------------------
@compiled
def forget(c, k, first, now):
    """Replica k is down: what is on its way there comes back, and its answers will not be heard.

    `first` heads the list of its own requests that come back, too; -1: none.
    """
    replica = c.replicas[k]
    replica["cached"], replica["answered_s"], replica["told"] = 0, 0.0, 0
    for which in (SENDS, HITS, ANSWERS):
        for _ in range(c.router["lines"][which]["count"]):
            i = shift(c, which)
            message = c.messages[i]
            if message["replica"] != k or message["ordinal"] != replica["ordinal"]:
                push(c, which, i)
            elif which != ANSWERS or message["refused"]:
                disown(c, i)
                come_back(c, i)
    while first >= 0:
        following = c.requests[first]["next"]
        insert(c, first)
        first = following
    start_tasks(c, now)


@compiled
def disown(c, i):
    """A request that comes back before it was sent: the task that was cancelled for it ends."""
    for j in range(c.router["tasks"]):
        if c.router["task"][j]["own"] == i:
            end_task(c, j)
            return


@compiled
def in_transit(c):
    """Requests that are neither pending nor at a replica: under way, or not looked at yet."""
    return c.router["transit"] + c.row["arrival_lo"] - c.router["seen"]


@compiled
def queue_transit(c):
    """At the end of a run, puts all requests that are in transit into the queue."""
    for which in (SENDS, HITS, ANSWERS):
        for _ in range(c.router["lines"][which]["count"]):
            i = shift(c, which)
            if which != ANSWERS or c.messages[i]["refused"]:
                come_back(c, i)
    while c.router["seen"] < c.row["arrival_lo"]:
        append(c, c.row, c.router["seen"])
        c.router["seen"] += 1


@compiled
def oldest_known(c, oldest):
    """The oldest request that something refers to."""
    oldest = min(oldest, c.router["seen"])
    for which in range(3):
        i = c.router["lines"][which]["head"]
        for _ in range(c.router["lines"][which]["count"]):
            oldest, i = min(oldest, i), c.messages[i]["next"]
    for k in range(c.row["span"]):
        i = c.replicas[k]["told_head"]
        for _ in range(c.replicas[k]["told"]):
            oldest, i = min(oldest, i), c.messages[i]["told_next"]
    return oldest


@compiled
def move_messages(c, by):
    """Moves messages and all that refers to requests `by` places to the front."""
    for i in range(by, c.row["arrival_hi"]):
        c.messages[i - by] = c.messages[i]
        c.messages[i - by]["next"] -= by
        c.messages[i - by]["told_next"] -= by
    c.router["seen"] -= by
    for which in range(3):
        c.router["lines"][which]["head"] -= by
        c.router["lines"][which]["tail"] -= by
    for j in range(c.router["tasks"]):
        if c.router["task"][j]["own"] >= 0:
            c.router["task"][j]["own"] -= by
    for k in range(c.row["span"]):
        c.replicas[k]["told_head"] -= by
        c.replicas[k]["told_tail"] -= by
