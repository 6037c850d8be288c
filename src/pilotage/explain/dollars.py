"""What a decision is expected to cost, item by item, and what another one would have cost: rollouts in the simulator.

At a tick the world is copied (`engine.fork`) once per alternative and future. In every copy one alternative is carried
out, and the policy goes on from there, with the memory that it has. Future k is the same in all alternatives (common
random numbers): the traffic as it came, drawn again request by request (every request comes a Poisson number of times,
mean 1, within half a second), with demands, service times and start-ups of its own. So an interval is about luck, not
about what the traffic might have done instead: what is answered is what an operator asks afterwards. What it cost is
`metrics.dollars` of the engine's counters, as everywhere (decomposed returns: CrystalBox, Patel et al., AAAI 2024).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from msgspec.structs import replace

from pilotage.control.guard import Guard
from pilotage.control.policy import Decision, Observation, Policy
from pilotage.control.steer import Helm
from pilotage.engine.cluster import Cluster, World, recorded
from pilotage.engine.fork import Futures
from pilotage.engine.run import bill
from pilotage.evaluate import interval
from pilotage.metrics import ITEMS
from pilotage.scenario import Scenario
from pilotage.world.spec import SpecError

_JITTER_S: Final = 0.5
_SEED: Final = 5_000_000  # of the first future; apart from the seeds of runs

Options = Callable[[Observation, Decision], Sequence[Decision]]


class Weighed(NamedTuple):
    """A decision beside its alternatives: `usd` has shape (alternatives, futures, ITEMS), dollars until `horizon_s`
    after the tick; the first alternative is what was decided."""

    tick: int
    seen: Observation
    options: list[Decision]
    usd: np.ndarray
    horizon_s: float

    @property
    def totals(self) -> np.ndarray:
        """Shape (alternatives, futures)."""
        return np.asarray(self.usd.sum(axis=-1))


def split(usd: np.ndarray) -> dict[str, dict[str, float]]:
    """Expected dollars by item and in total, with 95 % intervals over futures; `usd` has shape (futures, ITEMS). Of the
    difference of two alternatives it is how much more one costs, future by future."""
    parts = {item: interval(usd[:, k]) for k, item in enumerate(ITEMS)}
    return parts | {"total": interval(usd.sum(axis=1))}


def changed_by(chosen: Decision, change: int, replicas: int) -> Decision:
    """The decision that orders (or, below 0, releases) so many replicas, and is otherwise the same."""
    return replace(
        chosen, order=max(change, 0), release=min(max(-change, 0), replicas), reason=f"instead: {change:+d}"
    )


def neighbours(seen: Observation, chosen: Decision) -> list[Decision]:
    """What was decided, one replica less, and one more."""
    change = chosen.order - chosen.release
    return [chosen, *(changed_by(chosen, change + d, seen.replicas) for d in (-1, 1))]


def weigh(
    scenario: Scenario,
    policy: Policy,
    world: World,
    ticks: Sequence[int],
    options: Options = neighbours,
    *,
    service: int = 0,
    futures: int = 32,
    horizon_s: float = 600.0,
    seed: int = 0,
    guard: Guard | None = None,
) -> Iterator[Weighed]:
    """The decisions for one service at some ticks of a policy's run, each with its alternatives, in order of time.

    The alternatives are as many at every tick, the first is what was decided. Models do not decay further within the
    horizon, and nothing is retrained by a scaling decision: of a scenario with lifecycles the wrong answers are those
    of the variants' accuracy.
    """
    (world,) = recorded(scenario, [world])
    cluster = Cluster(scenario, [world])
    services, ticks = len(scenario.services), sorted(set(ticks))
    if not ticks or ticks[0] < 0 or ticks[-1] >= scenario.ticks:
        raise SpecError(f"ticks {ticks}: valid: 0 to {scenario.ticks - 1}, at least one")
    ahead = max(1, round(horizon_s / scenario.tick_s))
    times = [cluster.arrivals(0, s) for s in range(services)]
    situations = [cluster.situation(0, s) for s in range(services)]
    count, copies, helm = 0, None, Helm([policy] * services, situations, guard or Guard())
    many: Helm | None = None
    for tick in range(ticks[-1] + 1):
        seen = list(cluster.read())
        decided = helm.decide(seen) if many is None else many.decide(seen * (count * futures))[:services]
        if many is None:
            # how many alternatives there are is known from the first decision; all copies remember the same past
            count = len(options(seen[service], decided[service]))
            rows = count * futures
            many = Helm([policy] * (services * rows), situations * rows, guard or Guard())
            many.decide(seen * rows)
            copies = Futures(
                scenario, [_SEED + 10_000 * seed + k for _ in range(count) for k in range(futures)]
            )
        if tick in ticks:
            assert copies is not None
            found = list(options(seen[service], decided[service]))
            if len(found) != count:
                raise ValueError(
                    f"{len(found)} alternatives at tick {tick}, {count} before; give as many everywhere"
                )
            coming = [
                [
                    _again(times[s], cluster, s, np.random.default_rng([seed, tick, k, s]))
                    for s in range(services)
                ]
                for k in range(futures)
            ]
            into = copies.restart(cluster, 0, coming * count)
            usd = _follow(
                into, _copied(many, policy, situations), decided, found, service, futures, ahead, scenario
            )
            yield Weighed(tick, seen[service], found, usd, ahead * scenario.tick_s)
        cluster.apply(decided)
        cluster.wait()


def _copied(helm: Helm, policy: Policy, situations: Sequence[object]) -> Helm:
    """A copy of all memories; what never changes is shared."""
    return copy.deepcopy(helm, {id(one): one for one in (policy, *situations)})


def _again(times_s: np.ndarray, cluster: Cluster, s: int, rng: np.random.Generator) -> np.ndarray:
    """The arrivals that have not come, drawn again."""
    row, now_s = cluster.rows[s], float(cluster.clock_s[0])
    left = times_s[int(row["first_number"] + row["arrival_lo"]) :]
    drawn = np.repeat(left, rng.poisson(1.0, len(left)))
    return np.sort(np.maximum(drawn + rng.uniform(-_JITTER_S, _JITTER_S, len(drawn)), now_s))


def _follow(
    into: Cluster,
    helm: Helm,
    decided: Sequence[Decision],
    options: Sequence[Decision],
    service: int,
    futures: int,
    ahead: int,
    scenario: Scenario,
) -> np.ndarray:
    """Dollars of every alternative and future; shape (alternatives, futures, ITEMS)."""
    first = []
    for option in options:
        mine = list(decided)
        mine[service] = option
        first += mine * futures
    into.apply(first)
    into.wait()
    for _ in range(ahead - 1):
        into.apply(helm.decide(into.read()))
        into.wait()
    into.finish()
    return bill(into.totals, scenario).sum(axis=1).reshape(len(options), futures, len(ITEMS))
