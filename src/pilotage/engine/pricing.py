"""The learned rules: what they see of a candidate, as numbers, and their scores.

`linear` scores by weights times `features`. `learned-placement` is minus an expected cost: weights, which
`agents.placing` learns, times `terms`, each in dollars per hour.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import njit, types, void

from pilotage.engine.layout import RESOURCE_COUNT
from pilotage.engine.scoring import EACH, Candidate, deviation, part, portion, rule

_BUSY, _STEEP = 0.9, 10.0  # the load at which half of the requests suffer, and how sudden that is

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


@part
def _logarithm(value: float, least: float, most: float) -> float:
    """log10 of a value that is kept within bounds, divided by that of the upper bound."""
    return math.log10(min(max(value, least), most)) / math.log10(most)


@part
def _vector(candidate: np.void) -> tuple[float, ...]:
    """The features as a tuple, which needs no memory."""
    has, free, needs = candidate["has"], candidate["free"], candidate["needs"]
    least, dot, need_squares, free_squares = 1.0, 0.0, 0.0, 0.0
    for j in range(RESOURCE_COUNT):
        if has[j] > 0:
            least = min(least, portion(free[j] - needs[j], has[j]))
            dot += needs[j] / has[j] * (free[j] / has[j])
            need_squares += (needs[j] / has[j]) ** 2
            free_squares += (free[j] / has[j]) ** 2
    lengths = math.sqrt(need_squares * free_squares)
    uneven = deviation(candidate, EACH, 1)
    lost = candidate["interruptions_per_hour"] * candidate["ready_in_s"] / 3600
    skew = max(candidate["in_zone"] - candidate["in_emptiest_zone"], 0)
    return (
        1.0 if candidate["node"] < 0 else 0.0,
        candidate["preference"] / (1.0 + candidate["preference"]),
        portion(needs[0], has[0]),
        portion(needs[1], has[1]),
        portion(needs[2], has[2]),
        portion(needs[3], has[3]),
        portion(free[0] - needs[0], has[0]),
        portion(free[1] - needs[1], has[1]),
        portion(free[2] - needs[2], has[2]),
        portion(free[3] - needs[3], has[3]),
        least,
        uneven,
        uneven - deviation(candidate, EACH, 0),
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


@part
def _shortage(needed: float, count: float) -> float:
    """The share of a service's requests that suffer with `count` replicas for a load that keeps `needed` busy.

    A queue grows without end from a load of 1 on, and a little earlier as batches are not all full and load is never
    even: hence half at 0.9, with a slope that a few minutes' fluctuations of the load give it.
    """
    return 1 / (1 + (_BUSY * max(count, 0.0) / needed) ** _STEEP) if needed > 0 else 0.0


@part
def _costs(candidate: np.void) -> tuple[float, ...]:
    """The terms as a tuple, which needs no memory."""
    has, free, needs = candidate["has"], candidate["free"], candidate["needs"]
    share, least, left, squares, modelled = 0.0, 1.0, 0.0, 0.0, 0
    for j in range(RESOURCE_COUNT):
        if has[j] > 0:
            after = portion(free[j] - needs[j], has[j])
            share = max(share, portion(needs[j], has[j]))
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
        rent * deviation(candidate, EACH, 1),
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
