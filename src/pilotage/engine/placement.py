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
from numba import int64, njit, types

from pilotage.engine.layout import RESOURCE_COUNT
from pilotage.engine.pricing import FEATURES, TERMS, features, learned_placement, linear, terms
from pilotage.engine.scoring import (
    MAX,
    RULE,
    SIGNATURE,
    Candidate,
    allocation,
    deviation,
    residual,
    rule,
    weight,
)

__all__ = [
    "FEATURES", "PAIRWISE", "RULE", "RULES", "SIGNATURE", "TERMS", "WEIGHTS", "Candidate", "choose", "features",
    "linear", "rule", "terms",
]  # fmt: skip

_NEW: Final = 1e9  # existing nodes come before new ones
_PLACE: Final = 2**12  # of one number that says several in order of importance, which a float64 holds exactly


# --- rules ------------------------------------------------------------------------------------------------
@rule
def first_fit(candidate: np.void, weights: np.ndarray) -> float:
    """The node opened first."""
    return -_NEW if candidate["node"] < 0 else 0.0


@rule
def best_fit(candidate: np.void, weights: np.ndarray) -> float:
    """The node that is left fullest: least squared free shares (norm-based greedy, Panigrahy et al. 2011)."""
    return -_NEW if candidate["node"] < 0 else -residual(candidate)


@rule
def least_allocated(candidate: np.void, weights: np.ndarray) -> float:
    """Percent of the node that stays free: spreads load. Weights: of the resources."""
    return -_NEW if candidate["node"] < 0 else float(allocation(candidate, weights, 1))


@rule
def most_allocated(candidate: np.void, weights: np.ndarray) -> float:
    """Percent of the node in use: packs. Weights: of the resources."""
    return -_NEW if candidate["node"] < 0 else float(allocation(candidate, weights, 0))


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
        needed = needed or (weight(candidate, weights, j) > 0 and candidate["needs"][j] > 0)
    if not needed:
        return 0.0
    after = int((1 - deviation(candidate, weights, 1)) * MAX)
    before = int((1 - deviation(candidate, weights, 0)) * MAX)
    return float(MAX // 2 + (MAX // 2 + after - before) // 2)


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
        return 1 / (1 + residual(candidate))
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
    return -float((2 * skew * _PLACE + siblings) * _PLACE + MAX - allocation(candidate, weights, 1))


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
