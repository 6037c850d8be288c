"""What every placement rule is made of: its signature, and what Kubernetes computes of a candidate."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import from_dtype, njit, types

from pilotage.engine.layout import CANDIDATE, RESOURCE_COUNT

Candidate = from_dtype(CANDIDATE)
SIGNATURE = types.float64(Candidate, types.float64[::1])
RULE = types.FunctionType(SIGNATURE)
rule = njit(SIGNATURE, cache=True, nogil=True, error_model="numpy")
part = njit(cache=True, nogil=True, error_model="numpy")

MAX: Final = 100  # MaxNodeScore upstream
EACH: Final = (1.0,) * RESOURCE_COUNT
_NATIVE: Final = 2  # the first so many resources are native ones of Kubernetes
_UNITS: Final = (1000.0, 2.0**30, 1000.0, 2.0**30)  # milli-cores, bytes, thousandths of a GPU, bytes


@part
def portion(amount: float, whole: float) -> float:
    """amount / whole within [0, 1]; 0 of what is not modelled."""
    return min(max(amount / whole, 0.0), 1.0) if whole > 0 else 0.0


# --- what Kubernetes computes -------------------------------------------------------------------------------
@part
def _units(amount: float, j: int) -> int:
    """An amount of resource j in the unit in which Kubernetes counts it."""
    return math.floor(amount * _UNITS[j] + 0.5)


@part
def weight(candidate: np.void, weights: Any, j: int) -> int:
    """How much resource j counts in a score, 0 if it does not."""
    has = candidate["has"]
    if _units(has[j], j) <= 0 or (j >= _NATIVE and candidate["needs"][j] <= 0):
        return 0
    if len(weights) > 0:
        return int(weights[j]) if j < len(weights) else 0
    return 1 if j < _NATIVE or (has[0] <= 0 and has[1] <= 0) else 0


@part
def _fraction(candidate: np.void, j: int, placed: int) -> float:
    """The share of resource j in use, with the replica (`placed` 1) or without it (0), at most 1."""
    capacity = _units(candidate["has"][j], j)
    used = capacity - _units(candidate["free"][j], j) + placed * _units(candidate["needs"][j], j)
    return min(used / capacity, 1.0)


@part
def deviation(candidate: np.void, weights: Any, placed: int) -> float:
    """Population standard deviation of the shares in use, with the replica or without it."""
    count, total, first, last = 0, 0.0, 0.0, 0.0
    for j in range(RESOURCE_COUNT):
        if weight(candidate, weights, j) > 0:
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
        if weight(candidate, weights, j) > 0:
            squares += (_fraction(candidate, j, placed) - total / count) ** 2
    return math.sqrt(squares / count)


@part
def allocation(candidate: np.void, weights: np.ndarray, free: int) -> int:
    """Percent of the node in use with the replica, or (`free` 1) left by it: a weighted mean of resources."""
    total, weight_sum = 0, 0
    for j in range(RESOURCE_COUNT):
        counts = weight(candidate, weights, j)
        if counts > 0:
            capacity = _units(candidate["has"][j], j)
            left = max(_units(candidate["free"][j], j) - _units(candidate["needs"][j], j), 0)
            total += counts * ((left if free else capacity - left) * MAX // capacity)
            weight_sum += counts
    return total // weight_sum if weight_sum > 0 else 0


@part
def residual(candidate: np.void) -> float:
    """Sum over the resources of the squared share of the node that the replica would leave free."""
    total = 0.0
    for j in range(RESOURCE_COUNT):
        if candidate["has"][j] > 0:
            total += portion(candidate["free"][j] - candidate["needs"][j], candidate["has"][j]) ** 2
    return total
