"""Random draws by counter, in compiled code: a draw is a function of a seed and a number, and has no state."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

compiled = njit(cache=True, nogil=True, error_model="numpy", _nrt=False)
hot = njit(
    cache=True, nogil=True, error_model="numpy", forceinline=True, _nrt=False
)  # called per request or batch


@hot
def draw(seed, number):
    """The number-th 64-bit draw of the SplitMix64 generator (Steele, Lea & Flood 2014) started at `seed`."""
    z = seed + np.uint64(0x9E3779B97F4A7C15) * (np.uint64(number) + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@hot
def uniform(seed, number):
    return np.float64(draw(seed, number) >> np.uint64(11)) * 2.0**-53


@compiled
def normal(seed, number):
    """A standard normal draw (Box & Muller 1958) from draws `number` and `number + 1`."""
    radius = math.sqrt(-2 * math.log1p(-uniform(seed, number)))
    return radius * math.cos(2 * math.pi * uniform(seed, number + np.uint64(1)))


@hot
def from_table(table, u):
    """Quantile at probability u of a table made by `world.servers.quantile_table`."""
    cells = table.shape[0] // 2
    x = u * cells
    k = int(x)
    if k == cells - 1:
        x = (x - k) * cells
        j = int(x)
        k += j
        x -= j
    else:
        x -= k
    return table[k] + (table[k + 1] - table[k]) * x


@hot
def quantile(tables, which, seed, number):
    """A draw from table `which`; -1 stands for the law that is always 1."""
    return 1.0 if which < 0 else from_table(tables[which], uniform(seed, number))


@compiled
def waiting_time(seed, number, per_s):
    """An exponential draw with the given rate; infinite at rate 0."""
    return -math.log1p(-uniform(seed, number)) / per_s if per_s > 0 else math.inf
