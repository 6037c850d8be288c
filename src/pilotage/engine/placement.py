"""Which node a replica goes to: compiled rules of one signature, and the choice among candidates.

A rule maps a candidate (a `layout.CANDIDATE` record) and a weight vector to a score: the highest wins, the
first among equals; minus infinity refuses. It is shown only candidates on which the replica may be placed
and fits (the mask), so that a learned scorer needs to know nothing of feasibility. Candidates are the
nodes, in the order in which they were opened, then new nodes in the service's order of pools. A new node is
chosen only where no existing one fits, and then the first, unless a rule says otherwise. A resource of
which a node `has` 0 is ignored.

*Kubernetes.* `least-allocated`, `most-allocated` and `balanced` are the scores 0 to 100 of NodeResourcesFit
(LeastAllocated, MostAllocated) and NodeResourcesBalancedAllocation, in upstream's integers (milli-cores,
bytes): kubernetes/kubernetes, pkg/scheduler/framework/plugins/noderesources, `least_allocated.go`,
`most_allocated.go`, `balanced_allocation.go`, `resource_allocation.go`. Weights are those of the resources,
in the order of `world.pools.RESOURCES`; without any, CPU and memory count 1 and nothing else does
(pkg/scheduler/apis/config/v1, `defaults.go`), so that by default GPUs are not looked at. GPUs and their
memory are extended resources, which count only for a replica that needs them. `balanced` is as of version
1.36, which scores how much the replica changes the balance (pull request 135573); until 1.35 the balance
with it was the score. Two things are ours: a node with neither CPU nor memory, which Kubernetes does not
know, is scored by what it has; and what a replica does not need counts as 0, where upstream assumes 100
milli-cores and 200 MiB (not in `balanced`).

`spread` puts zones first and nodes second, the topologies of PodTopologySpread's system defaults
(pkg/scheduler/framework/plugins/podtopologyspread); upstream adds them up, weighted.

`kubernetes` adds up `least-allocated` and `balanced`, which both weigh 1 in the default profile; the rest of
that profile needs more than a candidate shows (PodTopologySpread and ImageLocality are scaled by the best and
the worst candidate) or does not apply.

*Learned rules.* `linear` scores by weights times `features`. `learned-placement` is minus an expected cost: the
weights, which `agents.placing` learns, times `terms`, each in dollars per hour; and it chooses the best of all
pairs of a pending replica and a candidate, so that its scores also say who goes first (`PAIRWISE`), where the
other rules take the services in turn. Any function compiled with `@rule` can be passed where a rule is wanted,
and gets its parameters as the weights.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import from_dtype, int64, njit, types, void

from pilotage.engine.layout import CANDIDATE, RESOURCE_COUNT

Candidate = from_dtype(CANDIDATE)
SIGNATURE = types.float64(Candidate, types.float64[::1])
RULE = types.FunctionType(SIGNATURE)
rule = njit(SIGNATURE, cache=True, nogil=True, error_model="numpy")

_part = njit(cache=True, nogil=True, error_model="numpy")
_NEW: Final = 1e9  # existing nodes come before new ones
_NATIVE: Final = 2  # the first so many resources are native ones of Kubernetes
_UNITS: Final = (1000.0, 2.0**30, 1000.0, 2.0**30)  # milli-cores, bytes, thousandths of a GPU, bytes
_MAX: Final = 100  # MaxNodeScore upstream
_PLACE: Final = 2**12  # of one number that says several in order of importance, which a float64 holds exactly
_BUSY, _STEEP = 0.9, 10.0  # the load at which half of the requests suffer, and how sudden that is
_EACH: Final = (1.0,) * RESOURCE_COUNT

# what `features` gives, in this order; all within [-1, 1]
FEATURES: Final = (
    "new",  # 1: the node would have to be opened
    "preference",  # 0: the service's first pool, 1/2: its second, 2/3: its third, ...
    "need_cpu",  # share of the node that the replica takes; 0 where it is not modelled
    "need_memory",
    "need_gpu",
    "need_gpu_memory",
    "left_cpu",  # share of the node that is free after it; 0 where it is not modelled
    "left_memory",
    "left_gpu",
    "left_gpu_memory",
    "left_least",  # the least of these, over what is modelled
    "imbalance",  # standard deviation of the shares in use, with the replica
    "imbalance_change",  # this less the one without it
    "alignment",  # cosine of the angle between what is needed and what is free, as shares
    "price",  # log10 of dollars per hour, thirds: -1 is 0.001, 1 is 1000
    "spot",
    "interruption",  # share of a spot node's time that goes into starting again
    "readiness",  # log10 of the seconds until the replica would serve, quarters: 1 is 10,000
    "batch_time",  # log10 of the seconds of a full batch, quarters: -1 is 0.1 ms
    "occupancy",  # replicas on the node: 0, 1/2, 2/3, ...
    "siblings",  # share of these that are of the same service
    "skew",  # how many more replicas of the service its zone has than the emptiest: 0, 1/2, 2/3, ...
)


@_part
def _share(amount: float, whole: float) -> float:
    """amount / whole within [0, 1]; 0 of what is not modelled."""
    return min(max(amount / whole, 0.0), 1.0) if whole > 0 else 0.0


# what `terms` gives, in this order: dollars per hour, so that other money or other hours change no order of scores.
# rent: the price of the node; stake: what requests cost that the replica would have served; what a replica is worth:
# the rent of the share that it takes, where that is cheapest
TERMS: Final = (
    "rent_new",  # of a node that would have to be opened
    "rent_share",  # times the largest share of the node that the replica takes
    "rent_share_squared",
    "rent_left",  # times the share of the node that stays free, mean over the resources
    "rent_left_squared",  # times the mean of the squared shares
    "rent_unfilled",  # times the least free share, once all that is pending and fits is there, too
    "rent_unfilled_new",  # the same, of a node that would have to be opened
    "rent_amortized",  # of such a node, times the replica's part of what all of these are worth
    "rent_wasted",  # of such a node, less what all of these are worth
    "rent_above_worth",  # for the replica's largest share, less what it is worth
    "rent_imbalance",  # times the standard deviation of the shares in use
    "rent_alone",  # less, the more replicas are on the node
    "rent_siblings",  # times the share of these that are of the same service
    "rent_preference",  # 0 in the service's first pool, half in its second, ...
    "rent_scarcity",  # of a new node, more, the fewer the pool can still open
    "rent_spot",
    "stake",
    "stake_interrupted",  # times the share of the time for which an interrupted node is being replaced
    "stake_interrupted_few",  # the same, less, the more replicas the service has
    "stake_interrupted_together",  # the same, times the share of the service's replicas that are on spot nodes
    "stake_short_interrupted",  # of the whole service, times that share and the shortage without the replica
    "stake_short_failing",  # of the whole service, times the hours lost to such an order and the present shortage
    "stake_short_start",  # the same, times the hours until the replica would serve
    "stake_failing",  # times the hours lost to an order that is not met
    "stake_start",  # times the hours until the replica would serve
    "stake_slowed",  # times the share of its work that neighbours cost
    "stake_slowing",  # of the neighbours, times the share of their work that it costs
    "stake_zone",  # times the share of the replicas that its zone has beyond the emptiest
    "stake_node",  # times the share of the replicas that are on the node
    "stake_scarcity",  # less, the more nodes the pool can still open
)


# --- what Kubernetes computes -------------------------------------------------------------------------------
@_part
def _units(amount: float, j: int) -> int:
    """An amount of resource j in the unit in which Kubernetes counts it."""
    return math.floor(amount * _UNITS[j] + 0.5)


@_part
def _weight(candidate: np.void, weights: Any, j: int) -> int:
    """How much resource j counts in a score, 0 if it does not."""
    has = candidate["has"]
    if _units(has[j], j) <= 0 or (j >= _NATIVE and candidate["needs"][j] <= 0):
        return 0
    if len(weights) > 0:
        return int(weights[j]) if j < len(weights) else 0
    return 1 if j < _NATIVE or (has[0] <= 0 and has[1] <= 0) else 0


@_part
def _fraction(candidate: np.void, j: int, placed: int) -> float:
    """The share of resource j in use, with the replica (`placed` 1) or without it (0), at most 1."""
    capacity = _units(candidate["has"][j], j)
    used = capacity - _units(candidate["free"][j], j) + placed * _units(candidate["needs"][j], j)
    return min(used / capacity, 1.0)


@_part
def _deviation(candidate: np.void, weights: Any, placed: int) -> float:
    """Population standard deviation of the shares in use, with the replica or without it."""
    count, total, first, last = 0, 0.0, 0.0, 0.0
    for j in range(RESOURCE_COUNT):
        if _weight(candidate, weights, j) > 0:
            last = _fraction(candidate, j, placed)
            first = last if count == 0 else first
            count += 1
            total += last
    if count < 2:
        return 0.0
    if count == 2:  # the same number, but rounded as upstream rounds it
        return abs((first - last) / 2)
    squares = 0.0
    for j in range(RESOURCE_COUNT):
        if _weight(candidate, weights, j) > 0:
            squares += (_fraction(candidate, j, placed) - total / count) ** 2
    return math.sqrt(squares / count)


@_part
def _allocation(candidate: np.void, weights: np.ndarray, free: int) -> int:
    """Percent of the node in use with the replica, or (`free` 1) left by it: a weighted mean of resources."""
    total, weight_sum = 0, 0
    for j in range(RESOURCE_COUNT):
        weight = _weight(candidate, weights, j)
        if weight > 0:
            capacity = _units(candidate["has"][j], j)
            left = max(_units(candidate["free"][j], j) - _units(candidate["needs"][j], j), 0)
            total += weight * ((left if free else capacity - left) * _MAX // capacity)
            weight_sum += weight
    return total // weight_sum if weight_sum > 0 else 0


@_part
def _residual(candidate: np.void) -> float:
    """Sum over the resources of the squared share of the node that the replica would leave free."""
    total = 0.0
    for j in range(RESOURCE_COUNT):
        if candidate["has"][j] > 0:
            total += _share(candidate["free"][j] - candidate["needs"][j], candidate["has"][j]) ** 2
    return total


# --- rules ------------------------------------------------------------------------------------------------
@rule
def first_fit(candidate: np.void, weights: np.ndarray) -> float:
    """The node opened first."""
    return -_NEW if candidate["node"] < 0 else 0.0


@rule
def best_fit(candidate: np.void, weights: np.ndarray) -> float:
    """The node that is left fullest: least squared free shares (norm-based greedy, Panigrahy et al. 2011)."""
    return -_NEW if candidate["node"] < 0 else -_residual(candidate)


@rule
def least_allocated(candidate: np.void, weights: np.ndarray) -> float:
    """Percent of the node that stays free: spreads load. Weights: of the resources."""
    return -_NEW if candidate["node"] < 0 else float(_allocation(candidate, weights, 1))


@rule
def most_allocated(candidate: np.void, weights: np.ndarray) -> float:
    """Percent of the node in use: packs. Weights: of the resources."""
    return -_NEW if candidate["node"] < 0 else float(_allocation(candidate, weights, 0))


@rule
def balanced(candidate: np.void, weights: np.ndarray) -> float:
    """75 if the balance of shares in use stays as it is, up to 100 if the replica mends it, down to 50.

    The balance is 100 (1 - standard deviation of the shares in use). A replica that needs none of the
    resources scores 0 everywhere. Weights: upstream allows 1 only; here, resources with a positive one count.
    """
    if candidate["node"] < 0:
        return -_NEW
    needed = False
    for j in range(RESOURCE_COUNT):
        needed = needed or (_weight(candidate, weights, j) > 0 and candidate["needs"][j] > 0)
    if not needed:
        return 0.0
    after = int((1 - _deviation(candidate, weights, 1)) * _MAX)
    before = int((1 - _deviation(candidate, weights, 0)) * _MAX)
    return float(_MAX // 2 + (_MAX // 2 + after - before) // 2)


@rule
def kubernetes(candidate: np.void, weights: np.ndarray) -> float:
    """What NodeResourcesFit and NodeResourcesBalancedAllocation add up to by default. Weights: of the resources."""
    if candidate["node"] < 0:
        return -_NEW
    return least_allocated(candidate, weights) + balanced(candidate, weights)


@rule
def cheapest(candidate: np.void, weights: np.ndarray) -> float:
    """The fewest dollars more: an existing node costs nothing more, a new one its price per hour of service.

    Where nodes are interrupted at a rate of l per hour, and a replacement serves r hours after its order,
    1 + l r hours are paid for every hour of service. Weights: none, or one, the dollars that an interruption
    costs besides. Among existing nodes, the one that is left fullest.
    """
    if candidate["node"] >= 0:
        return 1 / (1 + _residual(candidate))
    per_hour = candidate["interruptions_per_hour"]
    usd = candidate["usd_per_hour"] * (1 + per_hour * candidate["ready_in_s"] / 3600)
    if len(weights) > 0:
        usd += per_hour * weights[0]
    return -usd


@rule
def spread(candidate: np.void, weights: np.ndarray) -> float:
    """The zone with fewest replicas of the service, on a new node if need be; there an existing node before a
    new one, then the node with fewest of them, then the least allocated."""
    skew = max(candidate["in_zone"] - candidate["in_emptiest_zone"], 0)
    if candidate["node"] < 0:
        return -float((2 * skew + 1) * _PLACE * _PLACE)
    siblings = min(candidate["siblings"], _PLACE - 1)
    return -float((2 * skew * _PLACE + siblings) * _PLACE + _MAX - _allocation(candidate, weights, 1))


# --- learned rules ----------------------------------------------------------------------------------------
@_part
def _logarithm(value: float, least: float, most: float) -> float:
    """log10 of a value that is kept within bounds, divided by that of the upper bound."""
    return math.log10(min(max(value, least), most)) / math.log10(most)


@_part
def _vector(candidate: np.void) -> tuple[float, ...]:
    """The features as a tuple, which needs no memory."""
    has, free, needs = candidate["has"], candidate["free"], candidate["needs"]
    least, dot, need_squares, free_squares = 1.0, 0.0, 0.0, 0.0
    for j in range(RESOURCE_COUNT):
        if has[j] > 0:
            least = min(least, _share(free[j] - needs[j], has[j]))
            dot += needs[j] / has[j] * (free[j] / has[j])
            need_squares += (needs[j] / has[j]) ** 2
            free_squares += (free[j] / has[j]) ** 2
    lengths = math.sqrt(need_squares * free_squares)
    deviation = _deviation(candidate, _EACH, 1)
    lost = candidate["interruptions_per_hour"] * candidate["ready_in_s"] / 3600
    skew = max(candidate["in_zone"] - candidate["in_emptiest_zone"], 0)
    return (
        1.0 if candidate["node"] < 0 else 0.0,
        candidate["preference"] / (1.0 + candidate["preference"]),
        _share(needs[0], has[0]),
        _share(needs[1], has[1]),
        _share(needs[2], has[2]),
        _share(needs[3], has[3]),
        _share(free[0] - needs[0], has[0]),
        _share(free[1] - needs[1], has[1]),
        _share(free[2] - needs[2], has[2]),
        _share(free[3] - needs[3], has[3]),
        least,
        deviation,
        deviation - _deviation(candidate, _EACH, 0),
        min(dot / lengths, 1.0) if lengths > 0 else 0.0,
        _logarithm(candidate["usd_per_hour"], 1e-3, 1e3),
        1.0 if candidate["spot"] != 0 else 0.0,
        lost / (1 + lost),
        _logarithm(candidate["ready_in_s"], 1e-4, 1e4),
        _logarithm(candidate["batch_s"], 1e-4, 1e4),
        candidate["replicas"] / (1.0 + candidate["replicas"]),
        candidate["siblings"] / max(candidate["replicas"], 1.0),
        skew / (1.0 + skew),
    )


@njit(void(Candidate, types.float64[::1]), cache=True, nogil=True, error_model="numpy")
def features(candidate: np.void, out: np.ndarray) -> None:
    """Writes FEATURES of a candidate into `out`, shape (len(FEATURES),); of a shorter one, the first.

    They are shares, or logarithms: another unit of money or time shifts those of all candidates by the same
    amount, which no difference between scores of a linear rule shows.
    """
    vector = _vector(candidate)
    for i in range(min(len(vector), len(out))):
        out[i] = vector[i]


@rule
def linear(candidate: np.void, weights: np.ndarray) -> float:
    """Weights times features, in the order of FEATURES; weights that are not given are 0."""
    vector = _vector(candidate)
    score = 0.0
    for i in range(min(len(vector), len(weights))):
        score += weights[i] * vector[i]
    return score


@_part
def _shortage(needed: float, count: float) -> float:
    """The share of a service's requests that suffer with `count` replicas for a load that keeps `needed` busy.

    A queue grows without end from a load of 1 on, and a little earlier as batches are not all full and load is never
    even: hence half at 0.9, with a slope that a few minutes' fluctuations of the load give it.
    """
    return 1 / (1 + (_BUSY * max(count, 0.0) / needed) ** _STEEP) if needed > 0 else 0.0


@_part
def _costs(candidate: np.void) -> tuple[float, ...]:
    """The terms as a tuple, which needs no memory."""
    has, free, needs = candidate["has"], candidate["free"], candidate["needs"]
    share, least, left, squares, modelled = 0.0, 1.0, 0.0, 0.0, 0
    for j in range(RESOURCE_COUNT):
        if has[j] > 0:
            after = _share(free[j] - needs[j], has[j])
            share = max(share, _share(needs[j], has[j]))
            least = min(least, after)
            left += after
            squares += after**2
            modelled += 1
    if modelled > 0:
        left /= modelled
        squares /= modelled
    else:  # a node that says nothing of what it has carries one replica
        share, least = 1.0, 0.0
    rent, stake = candidate["usd_per_hour"], candidate["missed_usd_per_hour"]
    worth, filled = candidate["worth_usd_per_hour"], candidate["filled_usd_per_hour"]
    new = 1.0 if candidate["node"] < 0 else 0.0
    unfilled = min(max(candidate["unfilled"], 0.0), least)
    start_h = candidate["ready_in_s"] / 3600
    lost = candidate["interruptions_per_hour"] * candidate["recovery_s"] / 3600
    lost /= 1 + lost
    down = stake * lost
    serving = candidate["serving"] + 1.0
    needed = candidate["needed"]
    others = candidate["serving"] + candidate["pending"] - 1.0 - lost * candidate["on_spot"]
    short_h = stake * needed * _shortage(needed, candidate["serving"]) * start_h
    skew = max(candidate["in_zone"] - candidate["in_emptiest_zone"], 0)
    return (
        rent * new,
        rent * share,
        rent * share**2,
        rent * left,
        rent * squares,
        rent * unfilled,
        rent * unfilled * new,
        rent * new * (worth / filled if filled > 0 else 1.0),
        new * (rent - filled),
        rent * share - worth,
        rent * _deviation(candidate, _EACH, 1),
        rent / (1.0 + candidate["replicas"]),
        rent * candidate["siblings"] / max(candidate["replicas"], 1.0),
        rent * candidate["preference"] / (1.0 + candidate["preference"]),
        rent * new / (1.0 + max(candidate["room"], 0)),
        rent * (1.0 if candidate["spot"] != 0 else 0.0),
        stake,
        down,
        down / serving,
        down * candidate["on_spot"] / serving,
        down * needed * _shortage(needed, others),
        short_h * candidate["failing"],
        short_h,
        stake * start_h * candidate["failing"],
        stake * start_h,
        stake * (1 - 1 / max(candidate["slowdown"], 1.0)),
        candidate["harm_usd_per_hour"],
        stake * skew / serving,
        stake * candidate["siblings"] / serving,
        stake / (1.0 + max(candidate["room"], 0)),
    )


@njit(void(Candidate, types.float64[::1]), cache=True, nogil=True, error_model="numpy")
def terms(candidate: np.void, out: np.ndarray) -> None:
    """Writes TERMS of a candidate into `out`, shape (len(TERMS),), in dollars per hour; of a shorter one, the first."""
    vector = _costs(candidate)
    for i in range(min(len(vector), len(out))):
        out[i] = vector[i]


@rule
def learned_placement(candidate: np.void, weights: np.ndarray) -> float:
    """Minus weights times terms, in the order of TERMS; weights that are not given are 0."""
    vector = _costs(candidate)
    cost = 0.0
    for i in range(min(len(vector), len(weights))):
        cost += weights[i] * vector[i]
    return -cost


RULES: Final = {
    "first-fit": first_fit,
    "best-fit": best_fit,
    "least-allocated": least_allocated,
    "most-allocated": most_allocated,
    "balanced": balanced,
    "kubernetes": kubernetes,
    "cheapest": cheapest,
    "spread": spread,
    "linear": linear,
    "learned-placement": learned_placement,
}
PAIRWISE: Final = ("learned-placement",)  # choose among pairs of a replica and a candidate
# how many weights a rule can be given
WEIGHTS: Final = {
    "first-fit": (0,),
    "best-fit": (0,),
    "least-allocated": (0, RESOURCE_COUNT),
    "most-allocated": (0, RESOURCE_COUNT),
    "balanced": (0, RESOURCE_COUNT),
    "kubernetes": (0, RESOURCE_COUNT),
    "cheapest": (0, 1),
    "spread": (0, RESOURCE_COUNT),
    "linear": (len(FEATURES),),
    "learned-placement": (len(TERMS),),
}


@njit(int64(RULE, Candidate[::1], types.float64[::1]), cache=True, nogil=True, error_model="numpy")
def choose(rule: Any, candidates: np.ndarray, weights: np.ndarray) -> int:
    """The number of the candidate that a rule scores highest, the first among equals; -1: it refuses all."""
    best, chosen = -math.inf, -1
    for i in range(candidates.shape[0]):
        score = rule(candidates[i], weights)
        if score > best:
            best, chosen = score, i
    return chosen
