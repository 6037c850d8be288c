"""The one definition of every number that is reported or rewarded: latency, attainment, and dollars.

The engine counts events and the live monitors read counters; what those counts mean is said here and
nowhere else. Everything works on plain numbers and arrays, so that compiled code may use the constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

# --- latency histogram -------------------------------------------------------------------------------------
# Log-linear buckets, 2**BUCKET_BITS to an octave, from 2**LOWEST_OCTAVE seconds up. A bucket is read at its
# midpoint, so that a quantile is wrong by at most half a bucket: 1 / (2 * 64) = 0.8 % just above a power of
# two, 0.4 % just below the next. Histograms of equal shape are merged by adding them.
BUCKET_BITS: Final = 6
LOWEST_OCTAVE: Final = -14  # 61 microseconds; anything faster counts as this fast
OCTAVES: Final = 34  # up to 2**20 s, twelve days; anything slower counts as this slow
BUCKETS: Final = OCTAVES << BUCKET_BITS

_index = np.arange(BUCKETS)
_octave = 2.0 ** (LOWEST_OCTAVE + (_index >> BUCKET_BITS))
BUCKET_MIDPOINTS_S: Final = _octave * (1 + ((_index & ((1 << BUCKET_BITS) - 1)) + 0.5) / (1 << BUCKET_BITS))
BUCKET_MIDPOINTS_S.setflags(write=False)

# --- the five items every dollar belongs to ----------------------------------------------------------------
ITEMS: Final = ("nodes", "late", "dropped", "errors", "retraining")


def bucket_of(latency_s: np.ndarray) -> np.ndarray:
    """The bucket each latency falls into (seconds, any shape)."""
    mantissa, exponent = np.frexp(np.maximum(latency_s, 2.0**LOWEST_OCTAVE))
    within = ((mantissa * 2 - 1) * (1 << BUCKET_BITS)).astype(np.int64)
    return np.minimum(((exponent - 1 - LOWEST_OCTAVE) << BUCKET_BITS) + within, BUCKETS - 1)


def quantiles_s(histogram: np.ndarray, probabilities: tuple[float, ...]) -> np.ndarray:
    """Latency quantiles in seconds from histograms of shape (..., BUCKETS); NaN where a histogram is empty.

    The p-quantile of N latencies is the `ceil(p N)`-th smallest (inverse of the empirical distribution
    function). The error is at most 0.8 %, by the width of the buckets. Shape: (..., len(probabilities)).
    """
    cumulative = np.cumsum(histogram, axis=-1)
    total = cumulative[..., -1:]
    out = np.empty((*histogram.shape[:-1], len(probabilities)))
    for k, p in enumerate(probabilities):
        rank = np.maximum(np.ceil(p * total), 1)
        out[..., k] = BUCKET_MIDPOINTS_S[np.minimum((cumulative < rank).sum(axis=-1), BUCKETS - 1)]
    return np.where(total > 0, out, np.nan)


def attainment(on_time: float, finished: float) -> float:
    """Share of the finished requests (served, rejected, timed out, abandoned) that were served in time.

    A service that had no request met its objective: 1.
    """
    return on_time / finished if finished else 1.0


def tpot_s(ttft_s: np.ndarray, e2el_s: np.ndarray, output_tokens: np.ndarray) -> np.ndarray:
    """Time per output token after the first of each request, in seconds, as `vllm bench serve` computes it
    (vllm-project/vllm `vllm/benchmarks/serve.py`): NaN for an output of one token, which has none."""
    later = output_tokens - 1
    return np.divide(e2el_s - ttft_s, later, out=np.full(np.shape(ttft_s), np.nan), where=later > 0)


def is_good(
    ttft_s: np.ndarray, tpot: np.ndarray, e2el_s: np.ndarray, objectives_s: tuple[float, float, float]
) -> np.ndarray:
    """Whether requests met all of the objectives for TTFT, TPOT and E2EL (seconds; infinite: none), which is what
    vLLM's goodput counts: without a TPOT a request meets that one, an unanswered one (NaN) meets none."""
    ttft, each, e2el = objectives_s
    with np.errstate(invalid="ignore"):
        return (ttft_s <= ttft) & (np.nan_to_num(tpot, nan=0.0) <= each) & (e2el_s <= e2el)


def jain_index(values: np.ndarray) -> np.ndarray:
    """Fairness among the services along the last axis (Jain, Chiu & Hawe 1984): 1 if all get the same, 1/n if one gets
    everything; 1 where nobody gets anything."""
    total, squares = values.sum(axis=-1), (values**2).sum(axis=-1)
    return np.divide(total**2, values.shape[-1] * squares, out=np.ones_like(total, float), where=squares > 0)


def dollars(
    node_usd: np.ndarray | float,
    late: np.ndarray | float,
    dropped: np.ndarray | float,
    wrong: np.ndarray | float,
    retraining_usd: np.ndarray | float,
    prices: Mapping[str, np.ndarray | float],
) -> np.ndarray:
    """The itemised bill, in the order of ITEMS along the last axis; the total is its sum.

    `late`: requests served after their objective, or older than it when the run ended. `dropped`: rejected,
    timed out or abandoned. `wrong`: expected wrong answers among the served. `prices` has `late_usd`,
    `dropped_usd` and `error_usd` per request.
    """
    return np.stack(
        np.broadcast_arrays(
            node_usd,
            late * prices["late_usd"],
            dropped * prices["dropped_usd"],
            wrong * prices["error_usd"],
            retraining_usd,
        ),
        axis=-1,
    )
