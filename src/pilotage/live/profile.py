"""A model's latency law, measured: time against batch size, load time, memory, with intervals.

Batches of all sizes are run in random order, round after round, so that a drift of the machine falls on all alike,
after a warm-up that ends when times have come to rest. What stands far beyond the median (OUTLIER robust standard
deviations) is counted, and left out of means: it is the machine's, not the model's. What requests come upon at a server
(one that has been idle, one that stalls) is measured under load (`openloop`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from scipy.optimize import nnls

from pilotage.live.openloop import (
    MOST_FAILED,
    OUTLIER,
    RESAMPLES,
    SHARES,
    Load,
    Served,
    enough,
    fit_served,
    measure_loads,
)
from pilotage.live.profiled import Measured, ProfileError, ThrottledError
from pilotage.world.pools import Resources
from pilotage.world.servers import Affine, LatencyLaw, Table, Variant

REST: Final = (
    0.05  # warm-up ends when the median of a window differs by no more than that from the window before
)
WINDOW: Final = 15
AFFINE_WITHIN: Final = 0.05  # a worse misfit at any batch size calls for a table
MOST_THROTTLED: Final = 0.2
UNORDERED: Final = 0.2  # of the answers, beyond which a server is not one that takes requests in order


@dataclass(frozen=True, slots=True)
class Point:
    """Times of batches of one size, in milliseconds; the interval of the mean is a 95 % bootstrap over batches."""

    batch: int
    times_ms: np.ndarray
    mean_ms: float
    low_ms: float
    high_ms: float
    cv: float
    outliers: float  # share


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured of a model, and the law that was fitted to it.

    `base_ms` and `per_item_ms` are (value, low, high) of the affine law, which `law` is unless it misfits by more than
    AFFINE_WITHIN at some size; `misfit` is the affine law's largest relative error.
    """

    name: str
    points: Sequence[Point]
    law: LatencyLaw
    base_ms: tuple[float, float, float]
    per_item_ms: tuple[float, float, float]
    misfit: float
    load_s: float | None
    load_cv: float
    memory_gib: float | None
    overhead_ms: float
    slots: int
    notes: Sequence[str]
    loads: dict[float, list[Load]] = field(default_factory=dict)  # those that the law was fitted to, by rate
    held_out: dict[float, list[Load]] = field(default_factory=dict)  # those that it was not fitted to

    def variant(self, pool: str, accuracy: float = 1.0) -> Variant:
        """The variant of a scenario, with this law on one pool."""
        needs = None if self.memory_gib is None else Resources(cpu=1.0, memory_gib=round(self.memory_gib, 3))
        return Variant(
            name=self.name,
            accuracy=accuracy,
            load_s=round(self.load_s or 0.0, 4),
            load_cv=round(self.load_cv, 4) if self.load_s else 0.0,
            resources=needs,
            latency={pool: self.law},
        )


class _Patience:
    """Runs batches, waits when a target throttles, and gives up on one that fails or throttles too often."""

    def __init__(self, target: Measured) -> None:
        self.target = target
        self.asked = self.throttled = self.failed = 0
        self.last = ""

    def once(self, rows: int) -> float | None:
        """Seconds of one batch, or None if it was refused or failed."""
        self.asked += 1
        began = time.perf_counter()
        try:
            self.target.infer(rows)
            return time.perf_counter() - began
        except ThrottledError as refused:
            self.throttled += 1
            time.sleep(refused.after_s)
        except ProfileError as error:
            self.failed += 1
            self.last = str(error)
        if self.asked >= 10 and self.failed > MOST_FAILED * self.asked:
            raise ProfileError(f"{self.failed} of {self.asked} requests failed; the last: {self.last}")
        if self.asked >= 10 and self.throttled > MOST_THROTTLED * self.asked:
            raise ProfileError(
                f"the target throttles: {self.throttled} of {self.asked} requests, sent one at a time, were refused; "
                "lift its limit for the measurement"
            )
        return None


def warm_up(run: Callable[[int], float | None], rows: int, at_most_s: float) -> int:
    """Runs batches until their times have come to rest; how many. ProfileError if they do not within `at_most_s`."""
    began, count, medians = time.perf_counter(), 0, []
    while True:
        times = [t for _ in range(WINDOW) if (t := run(rows)) is not None]
        count += WINDOW
        if times:
            medians.append(float(np.median(times)))
        if len(medians) > 1 and abs(medians[-1] / medians[-2] - 1) <= REST:
            return count
        if time.perf_counter() - began > at_most_s:
            shown = ", ".join(f"{1e3 * m:.3g}" for m in medians[-4:]) or "none"
            raise ProfileError(
                f"still warming up after {at_most_s:g} s: medians of {WINDOW} batches of {rows} were {shown} ms; give "
                "it longer (--warm-up-s), or a quieter machine"
            )


def batch_sizes(largest: int) -> list[int]:
    """Powers of two up to the largest, and some between."""
    sizes = {1, largest, *(2**k for k in range(largest.bit_length()) if 2**k <= largest)}
    sizes |= {3 * 2**k for k in range(largest.bit_length()) if 3 * 2**k <= largest}
    return sorted(sizes)


def measure_batches(
    target: Measured, *, max_batch: int, seconds: float, seed: int = 0, warm_up_s: float = 30.0
) -> tuple[list[Point], list[str]]:
    """Times against batch size, and notes on what went wrong on the way; takes about `seconds` after the warm-up."""
    sizes = batch_sizes(max_batch if target.batches else 1)
    notes = [] if target.batches or max_batch == 1 else ["takes one row at a time: measured at batches of 1"]
    rng, patience = np.random.default_rng(seed), _Patience(target)
    warm_up(patience.once, sizes[0], warm_up_s)
    warm_up(patience.once, sizes[-1], warm_up_s)
    found: dict[int, list[float]] = {n: [] for n in sizes}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, found.values())) < 10:
        for n in rng.permutation(sizes).tolist():
            if (took := patience.once(n)) is not None:
                found[n].append(took)
        if time.perf_counter() > end + 10 * seconds:
            raise ProfileError(
                f"fewer than 10 batches of some size within {11 * seconds:g} s; give more --seconds"
            )
    if patience.throttled:
        notes.append(f"throttled {patience.throttled} of {patience.asked} requests")
    if patience.failed:
        notes.append(f"{patience.failed} of {patience.asked} requests failed; the last: {patience.last}")
    return [point_of(n, 1e3 * np.array(times), rng) for n, times in found.items()], notes


def point_of(batch: int, times_ms: np.ndarray, rng: np.random.Generator) -> Point:
    """Statistics of the times of one batch size."""
    kept = without_outliers(times_ms)
    means = kept[rng.integers(0, len(kept), (RESAMPLES, len(kept)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Point(
        batch=batch,
        times_ms=times_ms,
        mean_ms=float(kept.mean()),
        low_ms=float(low),
        high_ms=float(high),
        cv=float(kept.std(ddof=1) / kept.mean()) if len(kept) > 1 else 0.0,
        outliers=1 - len(kept) / len(times_ms),
    )


def without_outliers(times_ms: np.ndarray) -> np.ndarray:
    """The times that are no more than OUTLIER robust standard deviations above the median."""
    median = np.median(times_ms)
    spread = max(1.4826 * float(np.median(np.abs(times_ms - median))), 0.01 * float(median))
    kept: np.ndarray = times_ms[times_ms <= median + OUTLIER * spread]
    return kept


def _affine(batches: np.ndarray, means_ms: np.ndarray) -> np.ndarray:
    """base and per item, neither negative, of least squared relative error; shape (2,)."""
    rows = np.stack([np.ones_like(means_ms), batches], axis=1) / means_ms[:, None]
    solution: np.ndarray = nnls(rows, np.ones(len(means_ms)))[0]
    return solution


def fit_law(
    points: Sequence[Point], seed: int = 0
) -> tuple[LatencyLaw, tuple[float, float, float], tuple[float, float, float], float]:
    """The law, the affine law's base and per-item time with 95 % intervals, and its largest relative error."""
    rng = np.random.default_rng(seed)
    batches, means = np.array([float(p.batch) for p in points]), np.array([p.mean_ms for p in points])
    noise_cv = float(np.median([p.cv for p in points]))
    if len(points) == 1:
        only = points[0]
        value = (only.mean_ms, only.low_ms, only.high_ms)
        return Affine(base_ms=only.mean_ms, per_item_ms=0.0, noise_cv=noise_cv), value, (0.0, 0.0, 0.0), 0.0
    base, per_item = _affine(batches, means)
    kept = [without_outliers(p.times_ms) for p in points]
    drawn = np.array(
        [_affine(batches, np.array([rng.choice(k, len(k)).mean() for k in kept])) for _ in range(RESAMPLES)]
    )
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    misfit = float(np.max(np.abs((base + per_item * batches) / means - 1)))
    law: LatencyLaw = Affine(base_ms=float(base), per_item_ms=float(per_item), noise_cv=min(noise_cv, 3.0))
    if misfit > AFFINE_WITHIN:
        every = np.interp(np.arange(1, int(batches[-1]) + 1), batches, means)
        law = Table(batch_ms=tuple(round(float(t), 4) for t in every), noise_cv=min(noise_cv, 3.0))
    return (
        law,
        (float(base), float(low[0]), float(high[0])),
        (float(per_item), float(low[1]), float(high[1])),
        misfit,
    )


def saturate(target: Measured, *, seconds: float, outstanding: int = 4) -> float:
    """Requests/s of one row of a server that has always several outstanding, so that it is never idle."""
    done, lock, end = [0], threading.Lock(), time.perf_counter() + seconds

    def busy() -> None:
        patience = _Patience(target)
        while time.perf_counter() < end:
            if patience.once(1) is not None:
                with lock:
                    done[0] += 1

    began = time.perf_counter()
    with ThreadPoolExecutor(outstanding) as pool:
        for future in [pool.submit(busy) for _ in range(outstanding)]:
            future.result()
    return max(1, done[0]) / (time.perf_counter() - began)


def under_load(law: LatencyLaw, served: Served) -> LatencyLaw:
    """A law fitted to batches back to back, moved so that a batch of one takes what it takes under load, and with what
    was seen there of idling and of chance."""
    varied = {"noise_cv": min(served.noise_cv, 3.0), "idle": served.idle, "stalls": served.stalls}
    warm_ms = served.warm_ms[0]
    if isinstance(law, Affine):
        per_item = min(law.per_item_ms, warm_ms)
        return law.replace(base_ms=warm_ms - per_item, per_item_ms=per_item, **varied)
    assert isinstance(law, Table)
    moved = (max(1e-3, t + warm_ms - law.batch_ms[0]) for t in law.batch_ms)
    return law.replace(batch_ms=tuple(round(t, 4) for t in moved), **varied)


def load_times(target: Measured, times: int = 5) -> tuple[float | None, float]:
    """Mean and coefficient of variation of the load time in seconds; None where the target cannot be told to load."""
    found = []
    for _ in range(times):
        if (took := target.load()) is None:
            return None, 0.0
        found.append(took)
    mean = float(np.mean(found))
    return mean, float(np.std(found, ddof=1) / mean) if times > 1 else 0.0


def memory_gib(path: str, rows: int, threads: int) -> float | None:
    """Largest resident memory, in GiB, of a fresh process that loads a model file and runs its largest batch."""
    code = (
        "import pathlib, re, resource, sys; from pilotage.live.profiled import open_model; "
        "open_model(sys.argv[1], threads=int(sys.argv[3])).infer(int(sys.argv[2])); "
        # the first, where there is one: into the second Linux counts what the parent had when it forked
        "status = pathlib.Path('/proc/self/status'); print("
        "re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1] if status.exists() "
        "else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, path, str(rows), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)  # noqa: S603  (our own code)
    return int(done.stdout) / 2**20 if done.returncode == 0 else None


def pin(cpu: int | None) -> str:
    """Pins this process to one CPU, where the system allows it; a note if it does not."""
    if cpu is None:
        return ""
    try:
        os.sched_setaffinity(0, {cpu})
    except (AttributeError, OSError, ValueError) as error:
        return f"not pinned to CPU {cpu}: {error}"
    return ""


def profile(
    target: Measured,
    path: str,
    *,
    max_batch: int = 16,
    seconds: float = 10.0,
    threads: int = 1,
    seed: int = 0,
    warm_up_s: float = 30.0,
    held_out: Sequence[float] = (),
    held_out_s: float = 0.0,
    step: Callable[[str], Any] = lambda _: None,
) -> Profile:
    """Everything that is measured of a model; `path` is where it was opened from.

    `held_out` are shares of a server's capacity at which it is also loaded, for `held_out_s` each and in turns with the
    loads that the law is fitted to, but which the fit does not see.
    """
    remote = path.startswith(("http://", "https://"))
    step("batches")
    points, notes = measure_batches(
        target, max_batch=max_batch, seconds=seconds, seed=seed, warm_up_s=warm_up_s
    )
    law, base, per_item, misfit = fit_law(points, seed)
    overhead, slots, capacity_rps, loads, kept = 0.0, 1, 0.0, {}, {}
    if remote:
        step("capacity")
        capacity_rps = saturate(target, seconds=max(2.0, seconds / 5))
        at_once = capacity_rps * points[0].mean_ms / 1e3
        slots = round(at_once) if at_once >= 2 else 1  # of what is below 2, a part is time on the way
        if slots == 1:
            step("open loops")
            overhead = max(0.0, points[0].mean_ms - 1e3 / capacity_rps)
            served = Served((points[0].mean_ms - overhead,) * 3, None, overhead, law.noise_cv, None, 0.0)
            if enough(capacity_rps, 2 * seconds):
                fitted = {share * capacity_rps: 2 * seconds / len(SHARES) for share in SHARES}
                others = {share * capacity_rps: held_out_s for share in held_out}
                loads = measure_loads(target, others | fitted, seed=seed)
                kept = {rate: loads.pop(rate) for rate in set(others) - set(fitted)}
                served = fit_served([load for each in loads.values() for load in each], seed)
            else:
                notes.append("too slow for what idling adds to be measured in this time: give more --seconds")
            law, overhead = under_load(law, served), served.overhead_ms
            base = (
                max(0.0, served.warm_ms[0] - per_item[0]),
                max(0.0, served.warm_ms[1] - per_item[2]),
                max(0.0, served.warm_ms[2] - per_item[1]),
            )
            if served.unordered > UNORDERED:
                notes.append(
                    f"{100 * served.unordered:.2g} % of the answers came out of order: not one server with a queue, "
                    "and what it takes for one request is not to be seen from outside"
                )
        else:
            notes.append("serves several requests at once: what idling adds, and stalls, are not measured")
        notes.append("memory of a server is not seen from outside: give resources yourself")
    step("load time")
    load_s, load_cv = load_times(target, 1 if remote else 5)
    if load_s is None:
        notes.append("the server has no model repository API: give load_s yourself")
    step("memory")
    gib = None if remote else memory_gib(path, points[-1].batch, threads)
    if (share := max(p.outliers for p in points)) > 0.02:
        notes.append(
            f"up to {100 * share:.2g} % of the batches of a size are outliers, and left out: the machine is busy"
        )
    return Profile(
        target.name, points, law, base, per_item, misfit, load_s, load_cv, gib, overhead, slots, notes, loads, kept
    )  # fmt: skip
