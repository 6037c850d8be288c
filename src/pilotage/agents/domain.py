"""Services and traffic at random: what a policy is trained on that is to work where it has never been.

Every draw is one deployed model: its law, objective, start-up, price and what a missed request costs, over the ranges
in which batch servers are found. Traffic is sized by its busy minutes, as teams size capacity: `sized` scales a source
so that its 99.9th percentile minute needs so many replicas.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from pilotage.control.policy import Situation
from pilotage.scenario import Scenario
from pilotage.world.arrivals import (
    Diurnal,
    FlashCrowds,
    Mmpp,
    MmppState,
    Poisson,
    Scale,
    Segment,
    Source,
    Splice,
    Traffic,
)
from pilotage.world.servers import Affine

BUSY: float = 0.999


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def service_at_random(rng: np.random.Generator, shape: Scenario) -> Scenario:
    """The one-service scenario `shape` with another model, other hardware and other economics.

    A missed replica's worth of requests costs 20 to 600 times the replica; start-up takes 15 s to 5 minutes.
    """
    service, pool = shape.services[0], shape.pools[0]
    variant = service.variants[0]
    capacity_rps = log_uniform(rng, 4, 60)  # at full batches
    max_batch = int(rng.choice([n for n in (1, 4, 8, 16, 32) if n <= 2 * capacity_rps]))
    full_s = max_batch / capacity_rps
    fixed = float(rng.uniform(0.1, 0.9)) if max_batch > 1 else 1.0
    law = Affine(
        base_ms=1e3 * full_s * fixed,
        per_item_ms=1e3 * full_s * (1 - fixed) / max_batch,
        noise_cv=float(rng.uniform(0, 0.3)),
    )
    price = log_uniform(rng, 0.2, 5.0)
    missed_usd = log_uniform(rng, 20, 600) * price / 3600 / capacity_rps
    start_up_s = log_uniform(rng, 15, 300)
    booting = float(rng.uniform(0.3, 0.9))
    return shape.replace(
        pools=(
            pool.replace(
                price_usd_per_hour=price, boot_s=start_up_s * booting, boot_cv=float(rng.uniform(0, 0.2))
            ),
        ),
        services=(
            service.replace(
                slo_ms=1e3 * full_s * log_uniform(rng, 1.2, 8),
                economics=service.economics.replace(late_usd=missed_usd, dropped_usd=missed_usd),
                server=service.server.replace(
                    max_batch=max_batch, request_timeout_s=max(5.0, 8 * full_s), batch_wait_ms=10.0
                ),
                variants=(
                    variant.replace(
                        latency={pool.name: law},
                        load_s=start_up_s * (1 - booting),
                        load_cv=float(rng.uniform(0, 0.2)),
                    ),
                ),
            ),
        ),
    )


def capacity_rps(shape: Scenario) -> float:
    """Requests per second that one replica of a one-service scenario serves."""
    one = Situation(shape.services[0], shape.pool_by_name, shape.tick_s, np.zeros(0))
    return one.capacity_rps()


@lru_cache(maxsize=64)
def busy_rps(source: Source, data: Path | None, from_s: float, to_s: float) -> float:
    """The rate of a source's 99.9th percentile minute between two times on its clock, in requests per second."""
    stream = np.random.default_rng(0)
    drawn = source.begin(lambda name: np.random.default_rng(stream.integers(2**32)), from_s, to_s, data)
    edges = np.arange(from_s, to_s + 1, 60.0)
    counts = np.histogram(drawn.until(to_s), edges)[0]
    return max(float(np.quantile(counts, BUSY)) / 60, 1e-6)


def sized(source: Traffic, busy: float, replicas: float, capacity: float) -> Traffic:
    """The source, scaled so that a rate of `busy` requests/s needs so many replicas of a capacity in requests/s."""
    return Scale(source=source, factor=replicas * capacity / busy)


def traffic_at_random(rng: np.random.Generator, kind: str, busy_rps: float, lasts_s: float) -> Traffic:
    """Synthetic traffic of a kind (diurnal, flash, on-off, timers) whose busy minutes have about a given rate."""
    if kind in ("diurnal", "flash"):
        amplitude, noise_cv = float(rng.uniform(0, 0.9)), float(rng.uniform(0, 0.4))
        crowds = None
        peak = (1 + amplitude) * (1 + 2 * noise_cv)
        if kind == "flash":
            magnitude = log_uniform(rng, 0.5, 6)
            crowds = FlashCrowds(
                per_day=log_uniform(rng, 4, 48),
                magnitude=magnitude,
                magnitude_cv=0.4,
                ramp_s=log_uniform(rng, 30, 600),
                hold_s=log_uniform(rng, 60, 900),
                decay_s=log_uniform(rng, 60, 600),
            )
            peak *= 1 + magnitude
        return Diurnal(
            rate_rps=busy_rps / peak,
            day_amplitude=amplitude,
            peak_hour=float(rng.uniform(0, 24)),
            weekend_factor=float(rng.uniform(0.5, 1.2)),
            noise_cv=noise_cv,
            noise_correlation_s=log_uniform(rng, 60, 3600),
            crowds=crowds,
            cv=float(rng.choice([1.0, 1.0, 2.0])),
        )
    base_rps = float(rng.choice([1e-3, 0.05, 0.2])) * busy_rps
    if kind == "on-off":
        on_s = log_uniform(rng, 120, 3600)
        states = (
            MmppState(rate_rps=busy_rps, mean_dwell_s=on_s),
            MmppState(rate_rps=base_rps, mean_dwell_s=on_s * log_uniform(rng, 0.5, 6)),
        )
        return Mmpp(states=states)
    if kind == "timers":
        period_s = 60.0 * float(rng.choice([5, 10, 15, 20, 30, 60, 12, 45]))
        burst_s = min(log_uniform(rng, 30, 600), 0.6 * period_s)
        phase_s = float(rng.uniform(0, period_s))
        segments = [Segment(source=Poisson(rate_rps=base_rps), duration_s=phase_s + 1)]
        total_s = phase_s + 1
        while total_s < lasts_s:
            height = busy_rps * float(rng.uniform(0.7, 1.0)) if rng.random() < 0.9 else base_rps
            segments.append(Segment(source=Poisson(rate_rps=height), duration_s=burst_s))
            segments.append(Segment(source=Poisson(rate_rps=base_rps), duration_s=period_s - burst_s))
            total_s += period_s
        return Splice(segments=tuple(segments))
    raise ValueError(f"traffic kind {kind!r} does not exist; valid: diurnal, flash, on-off, timers")
