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
    end, piece, piece_end = cumulative[cumulative.shape[0] - 1], -1, -np.inf
    total, count, slope = 0.0, 0, 0.0
    for i in range(gaps.shape[0]):
        total += gaps[i]
        at = start + total
        ahead[i] = at
        if at >= end:
            continue
        if at >= piece_end:  # a division per piece, not per request
            piece += 1
            while cumulative[piece + 1] <= at:
                piece += 1
            piece_end = cumulative[piece + 1]
            slope = (edges[piece + 1] - edges[piece]) / (piece_end - cumulative[piece])
        times[i] = min(slope * (at - cumulative[piece]) + edges[piece], last_s)
        count = i + 1
    return ahead, times[:count]


arrivals.carry = carry
