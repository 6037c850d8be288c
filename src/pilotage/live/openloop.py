"""What an open loop shows of a server: latency under load, and what it takes for a request, cold or warm.

Requests are sent when they are due, whether or not earlier ones are back, and latency counts from when a request was
due: so a server that stalls cannot hide it (coordinated omission; Tene, How not to measure latency, 2013).

Of a server that takes requests one at a time and in order, an open loop also shows what each of them took: it began
when it was due, or when the answer before it was back. A server that has been idle takes longer (cold caches, a
processor asleep), and it takes several requests to be warm again; a loop that sends the next request when the last is
back never sees that. So the law is fitted to these times, at loads from idle to busy.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.optimize import nnls

from pilotage.live.profiled import Measured, ProfileError, ThrottledError
from pilotage.world.servers import Idling, Stalls

OUTLIER: Final = 8.0  # robust standard deviations above the median, or above the law
MOST_FAILED: Final = 0.05  # of the requests, before a target counts as failing
SHARES: Final = (0.1, 0.3, 0.55, 0.8)  # of what the server does when it is never idle: the loads of the fit
STRETCH_S: Final = 1.0
TIMES_MS: Final = np.geomspace(1.0, 500.0, 13)  # in which a server may cool, or warm
WORTH: Final = 0.02  # by so much a term must lessen what is left unexplained
FEWEST: Final = 50  # requests
FEW: Final = 5  # stalls
STALLING: Final = 1.5  # a stall lasts until a request takes less than so many times what it should
RESAMPLES: Final = 400


@dataclass(frozen=True, slots=True)
class Load:
    """What an open loop saw: latency from when each request was due, in seconds, NaN for those that failed."""

    due_s: np.ndarray
    latency_s: np.ndarray
    sent_late_s: np.ndarray
    failed: int
    throttled: int

    def quantile_ms(self, p: float) -> float:
        return (
            1e3 * float(np.nanquantile(self.latency_s, p))
            if np.isfinite(self.latency_s).any()
            else float("nan")
        )

    @property
    def trustworthy(self) -> bool:
        """Whether the generator kept up: it sent 99 % of the requests within a tenth of the median latency, or 1 ms."""
        late = float(np.quantile(self.sent_late_s, 0.99)) if len(self.sent_late_s) else 0.0
        return late <= max(1e-3, 0.1 * float(np.nanmedian(self.latency_s)))

    def services_ms(self) -> tuple[np.ndarray, np.ndarray]:
        """How long a server that takes one at a time, in order, was idle before each request (infinite before the
        first), and what it took for it; in ms, shape (answered,)."""
        answered = np.isfinite(self.latency_s)
        due = self.due_s[answered]
        done = np.sort(due + self.latency_s[answered])
        before = np.r_[-np.inf, done[:-1]]
        began = np.maximum(due, before)
        return 1e3 * (began - before), 1e3 * (done - began)


@dataclass(frozen=True, slots=True)
class Served:
    """What one request takes: `warm_ms` (value, low, high) on a server that is warm, what is added to it by idling, on
    the way, by chance and by stalls. `unordered` is the share answered out of order."""

    warm_ms: tuple[float, float, float]
    idle: Idling | None
    overhead_ms: float
    noise_cv: float
    stalls: Stalls | None
    unordered: float


def open_loop(target: Measured, rate_rps: float, seconds: float, *, seed: int = 0, workers: int = 64) -> Load:
    """Poisson requests of one row at a rate, each sent when it is due."""
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1 / rate_rps, max(1, int(rate_rps * seconds * 1.5) + 20)))
    due = due[due < seconds]
    latency, late = np.full(len(due), np.nan), np.zeros(len(due))
    counts = {"failed": 0, "throttled": 0}
    lock = threading.Lock()
    collects = gc.isenabled()
    gc.disable()  # a collection would stop the generator
    began = time.perf_counter() + 0.05

    def send(k: int) -> None:
        late[k] = time.perf_counter() - began - due[k]
        try:
            target.infer(1)
            latency[k] = time.perf_counter() - began - due[k]
        except ThrottledError:
            with lock:
                counts["throttled"] += 1
        except ProfileError:
            with lock:
                counts["failed"] += 1

    try:
        with ThreadPoolExecutor(workers) as pool:
            for k, at in enumerate(due.tolist()):
                while (left := began + at - time.perf_counter()) > 0:
                    time.sleep(left if left < 0.002 else left - 0.001)
                pool.submit(send, k)
    finally:
        if collects:
            gc.enable()
    return Load(due, latency, np.maximum(late, 0.0), counts["failed"], counts["throttled"])


def enough(capacity_rps: float, seconds: float) -> bool:
    """Whether loads of so many seconds in all hold enough requests for a fit."""
    return capacity_rps * seconds * float(np.mean(SHARES)) >= 2 * FEWEST


def measure_loads(
    target: Measured, seconds_at: dict[float, float], *, seed: int = 0
) -> dict[float, list[Load]]:
    """Open loops at each rate (requests/s) for so many seconds, in stretches of all in random order, round after round,
    so that a drift of the machine falls on all alike.

    Raises ProfileError if more than MOST_FAILED of the requests of a stretch fail or are refused.
    """
    rng = np.random.default_rng(seed)
    rounds = max(2, round(min(seconds_at.values()) / STRETCH_S))
    found: dict[float, list[Load]] = {rate: [] for rate in seconds_at}
    for _ in range(rounds):
        for rate in rng.permutation(list(found)).tolist():
            load = open_loop(target, rate, seconds_at[rate] / rounds, seed=int(rng.integers(1 << 32)))
            found[rate].append(load)
            if (lost := load.failed + load.throttled) > max(1, MOST_FAILED * len(load.due_s)):
                raise ProfileError(
                    f"{lost} of {len(load.due_s)} requests failed or were refused at {rate:.3g} requests/s; the server "
                    "does not bear a load that it bears when asked one request after the other"
                )
    return found


def coldness(
    idle_ms: np.ndarray, took_ms: np.ndarray, cooling_ms: np.ndarray, warming_ms: np.ndarray
) -> np.ndarray:
    """How cold the server was when it began each request (see `Idling`); shape (times, requests)."""
    cold, out = np.ones(len(cooling_ms)), np.empty((len(idle_ms), len(cooling_ms)))
    for k, (idle, took) in enumerate(zip(idle_ms.tolist(), took_ms.tolist(), strict=True)):
        cold = 1 - (1 - cold) * np.exp(-idle / cooling_ms)
        out[k] = cold
        cold = cold * np.exp(-took / warming_ms)
    return out.T


def _regress(terms: np.ndarray, took_ms: np.ndarray, limit_ms: float) -> tuple[np.ndarray, float]:
    """Coefficients, none negative, and the mean absolute error, of which none counts for more than `limit_ms`; what is
    farther above the fit is a stall, and left out."""
    kept = np.ones(len(took_ms))
    # by normal equations, without BLAS, whose threads spin for seconds on a machine that is busy
    for _ in range(4):
        gram = np.einsum("ij,ik,i->jk", terms, terms, kept)
        root = np.linalg.cholesky(gram + 1e-9 * np.trace(gram) * np.eye(len(gram)))
        fit = nnls(root.T, np.linalg.solve(root, np.einsum("ij,i,i->j", terms, took_ms, kept)))[0]
        off_ms = took_ms - np.einsum("ij,j->i", terms, fit)
        kept = (off_ms <= limit_ms).astype(float)
    return fit, float(np.minimum(np.abs(off_ms), limit_ms).mean())


def fit_served(loads: Sequence[Load], seed: int = 0) -> Served:
    """What a server that takes one request at a time takes for each, from open loops; ProfileError if nothing is left.

    Least squares on what the requests took, stalls left out: warm, plus what coldness adds, plus what a request that
    does not wait takes on the way. A term stays only if it explains at least WORTH of what is left without it. The
    interval is a 95 % bootstrap over the loads.
    """
    pairs = [load.services_ms() for load in loads]
    pairs = [(idle, took) for idle, took in pairs if len(took)]
    if sum(len(took) for _, took in pairs) < FEWEST:
        raise ProfileError(
            f"fewer than {FEWEST} requests were answered in the open loops; give more --seconds"
        )
    idle_ms, took_ms = (np.concatenate(column) for column in zip(*pairs, strict=True))
    one, waited_not = np.ones(len(took_ms)), (idle_ms > 0).astype(float)
    middle = float(np.median(took_ms))

    def limit(off_ms: np.ndarray) -> float:
        return OUTLIER * max(1.4826 * float(np.median(np.abs(off_ms - np.median(off_ms)))), 0.01 * middle)

    limit_ms = limit(took_ms)
    cooling, warming = (grid.ravel() for grid in np.meshgrid(TIMES_MS, TIMES_MS))
    cold = np.concatenate([coldness(idle, took, cooling, warming) for idle, took in pairs], axis=1)
    candidates: list[tuple[int, list[np.ndarray]]] = [(-1, [one]), (-1, [one, waited_not])]
    best, chosen, error = candidates[0], np.zeros(1), np.inf
    for candidate in [*candidates, *((k, [one, waited_not, cold[k]]) for k in range(len(cooling)))]:
        fit, off = _regress(np.stack(candidate[1], axis=1), took_ms, limit_ms)
        if off < error * (1 - WORTH if len(fit) > len(chosen) else 1):
            best, chosen, error = candidate, fit, off
    terms = np.stack(best[1], axis=1)
    limit_ms = limit(took_ms - terms @ chosen)
    chosen, _ = _regress(terms, took_ms, limit_ms)
    warm, overhead, extra = (*chosen.tolist(), 0.0, 0.0)[:3]

    own = terms @ chosen - overhead * waited_not
    noise = (took_ms - overhead * waited_not) / own
    stalls, calm = _stalls(noise, own, idle_ms, took_ms, 1 + limit_ms / middle)
    mean = float(noise[calm].mean())
    low, high = _interval(pairs, terms, took_ms, limit_ms, seed)
    return Served(
        warm_ms=(warm * mean, low * mean, high * mean),
        idle=Idling(extra_ms=extra * mean, cooling_ms=float(cooling[best[0]]), warming_ms=float(warming[best[0]]))
        if extra > 0
        else None,
        overhead_ms=overhead,
        noise_cv=float(noise[calm].std() / noise[calm].mean()),
        stalls=stalls,
        unordered=float(np.mean([_unordered(load) for load in loads])),
    )  # fmt: skip


def _stalls(
    noise: np.ndarray, own_ms: np.ndarray, idle_ms: np.ndarray, took_ms: np.ndarray, limit: float
) -> tuple[Stalls | None, np.ndarray]:
    """How often a server stands still, and for how long; and a mask of the requests that come upon no stall.

    A server that stalls is slow for several requests in a row: they are one stall, with the time of all. One that
    begins and ends while the server is idle is not seen, so that not all time counts; of one that a request comes upon
    only the rest is, so that the mean is that of stalls that begin at a busy server, if there are FEW.
    """
    stalled, k = np.zeros(len(noise), bool), 0
    excess_ms: list[float] = []
    whole_ms: list[float] = []
    while k < len(noise):
        if noise[k] > limit:
            first = k
            while k < len(noise) and (noise[k] > STALLING or k == first):
                k += 1
            stalled[first:k] = True
            excess_ms.append(float(((noise[first:k] - 1) * own_ms[first:k]).sum()))
            if idle_ms[first] == 0:
                whole_ms.append(excess_ms[-1])
        else:
            k += 1
    if not excess_ms:
        return None, ~stalled
    mean_ms = float(np.mean(whole_ms if len(whole_ms) >= FEW else excess_ms))
    seen_s = float((took_ms + mean_ms * (1 - np.exp(-idle_ms / mean_ms))).sum()) / 1e3
    per_s = min(len(excess_ms) / seen_s, 199.0 / mean_ms)  # `Stalls` are a fifth of the time at most
    return Stalls(per_s=per_s, mean_ms=mean_ms), ~stalled


def _interval(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    terms: np.ndarray,
    took_ms: np.ndarray,
    limit_ms: float,
    seed: int,
) -> tuple[float, float]:
    """Of the first coefficient: loads are drawn anew, the times in which the server cools and warms are kept."""
    ends = np.cumsum([len(took) for _, took in pairs])
    parts = [np.arange(end - len(took), end) for end, (_, took) in zip(ends, pairs, strict=True)]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES // 4):
        at = np.concatenate([parts[k] for k in rng.integers(0, len(parts), len(parts))])
        drawn.append(_regress(terms[at], took_ms[at], limit_ms)[0][0])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _unordered(load: Load) -> float:
    done = load.due_s + load.latency_s
    return float(np.mean(np.diff(done[np.isfinite(done)]) < 0)) if len(done) > 1 else 0.0
