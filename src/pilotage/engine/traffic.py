"""The compiled twin of `world.arrivals.carry`; importing this module puts it in place."""

from __future__ import annotations

import numpy as np
from numba import float64, njit, types

from pilotage.world import arrivals

_array = float64[::1]


@njit(
    types.UniTuple(_array, 2)(float64, _array, _array, _array, float64),
    cache=True,
    error_model="numpy",
    nogil=True,
)
def carry(start, gaps, cumulative, edges, last_s):
    """See `world.arrivals.carry`; the arithmetic is NumPy's cumsum and interp, in their order."""
    ahead, times = np.empty(gaps.shape[0]), np.empty(gaps.shape[0])
    total, count, piece, last = 0.0, 0, 0, cumulative.shape[0] - 1
    for i in range(gaps.shape[0]):
        total += gaps[i]
        at = start + total
        ahead[i] = at
        if at < cumulative[last]:
            while cumulative[piece + 1] <= at:
                piece += 1
            slope = (edges[piece + 1] - edges[piece]) / (cumulative[piece + 1] - cumulative[piece])
            time_s = slope * (at - cumulative[piece]) + edges[piece]
            times[i] = min(time_s, last_s)
            count = i + 1
    return ahead, times[:count]


arrivals.carry = carry
