"""What it costs to know the rate of arrivals, but not the sample: a reference between the clairvoyant and policies.

No forecaster can know more than the rate. So what lies between this reference and the clairvoyant schedule no forecast
can save; what lies above it, a better forecast may. It is no bound: the plan is made beforehand, and somebody who knew
the rate and reacted to what comes, too, might do a little better.

**What the rate is.** Everything that a traffic model draws before it draws arrivals: the states of `mmpp`, the noise
and crowds of `diurnal`, the segments of a `splice`. Of recorded traffic it is what was recorded: of `counts` the count
of every interval, times its scale, with arrivals at random within the interval. A trace of counts per second therefore
tells nearly the sample, one of counts per minute tells how many come in every minute, and not when; neither is the
rate of some process that the counts were drawn from, which nobody knows. A `trace` of arrivals is its own sample,
unless it is scaled.

**The plan.** Other samples of the same rate are drawn, with other requests and nodes, too. What would have been missed
with every count of replicas (`agents.hindsight`) is averaged over half of them; the plan is the sequence of counts that
costs least on average, ordered one start-up ahead. What a sum of ticks does not know, the backlog of fewer replicas,
is hedged by weighing what is missed up or down. Of these plans, and of the best constant count, the one is carried out
that costs least in the engine on the other half: it is chosen on samples that it was not made for, and judged on one
that it has never seen (sample average approximation: Shapiro, Dentcheva & Ruszczynski, Lectures on Stochastic
Programming, 2009, ch. 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from pilotage.agents.hindsight import Table, look_back
from pilotage.control.guard import Guard
from pilotage.control.scaling import Schedule
from pilotage.engine.cluster import Recorded, World, stream
from pilotage.engine.relaxation import cheapest
from pilotage.engine.run import simulate
from pilotage.scenario import Scenario
from pilotage.world.arrivals import RATE_STREAMS, Traffic
from pilotage.world.spec import SpecError

SAMPLES: Final = 16
_WEIGHTS: Final = (0.5, 1.0, 2.0, 4.0)  # of what is missed


def same_rate(scenario: Scenario, world: World, seeds: Sequence[int]) -> list[World]:
    """The world's window with its rate, and with arrivals, requests and nodes of other seeds; without a history.

    Raises SpecError where the world's arrivals have been drawn already: of those no rate is known.
    """
    sources = world.traffic or tuple(service.traffic for service in scenario.services)
    start_s = scenario.start_h * 3600 if world.start_s is None else world.start_s
    out = []
    for seed in seeds:
        drawn = []
        for service, source in zip(scenario.services, sources, strict=True):
            if isinstance(source, Recorded):
                raise SpecError(
                    f"traffic of service {service.name!r} has been drawn; valid: a source that has a rate"
                )
            drawn.append(_drawn(scenario, source, f"{service.name}/traffic", (world.seed, seed), start_s))
        out.append(World(seed, start_s, tuple(drawn)))
    return out


def _drawn(
    scenario: Scenario, source: Traffic, name: str, seeds: tuple[int, int], start_s: float
) -> Recorded:
    """Arrivals of a window; the rate is that of the first seed, the sample that of the second."""

    def streams(part: str) -> np.random.Generator:
        return stream(seeds[part.rpartition("/")[2] not in RATE_STREAMS], f"{name}/{part}")

    end_s = start_s + scenario.ticks * scenario.tick_s
    begin_s = max(0.0, start_s - scenario.history_h * 3600)  # a rate is drawn from where its run begins
    arrivals = source.begin(streams, begin_s, end_s, Path(scenario.data) if scenario.data else None)
    arrivals.until(start_s)
    return Recorded(arrivals.until(end_s))


def rate_known(
    scenario: Scenario, world: World, *, guard: Guard | None = None, samples: int = SAMPLES, threads: int = 1
) -> Schedule:
    """What somebody would do in a world of one service who knows its rate; run it to see what it costs."""
    if samples < 2:
        raise ValueError(
            f"samples {samples}: a plan is made on one half and chosen on the other; valid: >= 2"
        )
    seeds = np.random.default_rng([world.seed, samples]).integers(2**31, size=samples).tolist()
    drawn = same_rate(scenario, world, seeds)
    scenario = scenario.replace(history_h=0.0)
    made_on, chosen_on = drawn[: samples // 2], drawn[samples // 2 :]
    plans = list(dict.fromkeys(plans_on(look_back(scenario, made_on, threads=threads))))
    runs = simulate(
        scenario,
        [plan for plan in plans for _ in chosen_on],
        chosen_on * len(plans),
        guard=guard,
        threads=threads,
    )
    usd = np.array([run.total_usd for run in runs]).reshape(len(plans), -1).mean(axis=1)
    return plans[int(np.argmin(usd))]


def plans_on(table: Table) -> list[Schedule]:
    """Plans that cost least on average over the table's windows, which are those of one service in one place."""
    missed_usd = table.missed_usd.mean(axis=0, dtype=np.float64)
    low, price_usd, lead = int(table.low[0]), float(table.price_usd[0]), int(table.lead[0])
    start = min(max(int(table.start[0]), low), missed_usd.shape[1] - 1)
    missed_usd[:lead, start:] = missed_usd[:lead, [start]]  # what is ordered now is not ready before
    rent_usd = price_usd * np.arange(missed_usd.shape[1])
    plans = []
    for weight in _WEIGHTS:
        cost_usd = weight * missed_usd + rent_usd
        _, serving = cheapest(np.ascontiguousarray(cost_usd[:, low:]), price_usd * lead, start - low)
        ahead = np.r_[serving + low, np.full(lead, serving[-1] + low)]
        held = np.lib.stride_tricks.sliding_window_view(ahead, lead + 1).max(axis=1)
        plans.append(Schedule(targets=tuple(held.tolist())))
    constant = low + int(np.argmin((missed_usd + rent_usd).sum(axis=0)[low:]))
    return [*plans, Schedule(targets=(constant,))]
