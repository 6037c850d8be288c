"""Learning where replicas go: the prices of `learned-placement`, by evolution on total dollars.

What is learned is decision-focused: weights are judged by what placements cost in the end, not by how well a model
predicts anything. Two kinds of problems pull at them. On packing problems (`agents.packing`), small enough for the
exact optimum, the loss is the logarithm of dollars over the optimum's. In fleets (`agents.fleets`), run by the engine
with spot markets, failed orders, neighbours and late requests, it is the logarithm of all dollars over those of
Kubernetes' scores on the same requests. Fleets are driven by orders that a scaling policy gave once, so that a run is
nothing but compiled code; the policies differ from fleet to fleet.

The search is CMA-ES (Hansen, The CMA Evolution Strategy: A Tutorial, arXiv:1604.00772; the package `cmaes`), each
generation on problems of its own, the same for all of its candidates. It starts from a cautious rule, in units in
which every weight matters about as much. The mean of the search is judged on validation problems every so often, and
the best is kept.

It goes in two steps, for the terms fall into two groups. How well replicas fill nodes is learned on packing problems
alone (`GEOMETRY`); then, with these held, what is at stake and on which market, in fleets alone (`STAKES`). Each step
is then free of the other's noise, and what was learned of packing cannot be lost.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec
import numpy as np
from cmaes import CMA

from pilotage.agents.fleets import fleet_at_random, instance_at_random
from pilotage.agents.packing import Online, optimum
from pilotage.control.guard import Guard
from pilotage.control.hpa import Hpa
from pilotage.control.placing import LearnedPlacement
from pilotage.control.policy import Policy
from pilotage.control.scaling import Predictive, Staffing
from pilotage.control.steer import Helm, steer
from pilotage.engine.cluster import Cluster, World, recorded
from pilotage.engine.placement import TERMS
from pilotage.engine.run import bill
from pilotage.scenario import Placement, Scenario
from pilotage.world.faults import AtNotice
from pilotage.world.spec import SpecError

BASELINE: Final = "kubernetes"
RULE: Final = "learned-placement"
SCALERS: Final[tuple[Policy, ...]] = (Hpa(), Staffing(), Predictive(), Staffing(rule="little"))
_CLIP: Final = 2.0  # no fleet counts for more than a factor of 7
# where the search starts, and the unit of each weight: a stake is some hundred times a rent
PRIOR: Final = {
    "rent_new": 1.0,
    "rent_left_squared": 0.3,
    "rent_unfilled_new": 0.5,
    "rent_amortized": 0.5,
    "stake_interrupted": 0.03,
    "stake_short_interrupted": 0.1,
    "stake_short_failing": 0.3,
    "stake_start": 0.01,
    "stake_failing": 0.03,
    "stake_slowed": 0.05,
    "stake_slowing": 0.05,
    "stake_zone": 0.0005,
    "stake_node": 0.0005,
}
GEOMETRY: Final = (
    "rent_new", "rent_share", "rent_share_squared", "rent_left", "rent_left_squared", "rent_unfilled",
    "rent_unfilled_new", "rent_amortized", "rent_wasted", "rent_above_worth", "rent_imbalance", "rent_alone",
)  # fmt: skip
STAKES: Final = ("rent_spot", *(name for name in TERMS if name.startswith("stake")))
# of the first group, whose scores have no scale of their own; with it a rent counts about once
GEOMETRY_NORM: Final = 2.5
UNITS: Final = {
    "stake": 0.003,
    "rent_spot": 0.3,
    "stake_interrupted": 0.05,
    "stake_interrupted_few": 0.1,
    "stake_interrupted_together": 0.1,
    "stake_short_interrupted": 0.15,
    "stake_short_failing": 0.3,
    "stake_short_start": 0.1,
    "stake_failing": 0.05,
    "stake_start": 0.03,
    "stake_slowed": 0.05,
    "stake_slowing": 0.05,
    "stake_zone": 0.003,
    "stake_node": 0.003,
    "stake_scarcity": 0.003,
}


Losses = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # of candidates, on problems drawn by chance


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to train; `fleet_hours` is the length of a fleet's run, of which each has `fleet_worlds`."""

    instances: int = 200  # packing problems, half of them dynamic
    fleets: int = 72
    validation_instances: int = 100
    validation_fleets: int = 36
    generations_packing: int = 120
    generations: int = 12
    population: int = 16
    fleet_population: int = 12
    instances_per_generation: int = 80
    fleets_per_generation: int = 18
    fleet_hours: float = 3.0
    fleet_worlds: int = 2  # what a run of spot nodes costs is chance: a few interruptions that come together
    static_weight: float = 4.0  # no rule that cannot see the future reaches the optimum of a dynamic problem
    step_packing: float = 1.0
    step: float = 0.5
    evaluations: int = 4
    at_notice: AtNotice = "replace-first"
    seed: int = 0


def vector(named: dict[str, float], default: float = 0.0) -> np.ndarray:
    """Numbers by term as an array in the order of TERMS."""
    return np.array([named.get(name, default) for name in TERMS])


# --- problems -----------------------------------------------------------------------------------------------
class Packed:
    """A packing problem and the dollars of its optimum."""

    def __init__(self, rng: np.random.Generator, dynamic: bool) -> None:
        while True:
            instance = instance_at_random(rng, dynamic)
            try:
                best = optimum(instance, time_limit_s=20.0)
            except (SpecError, TimeoutError):  # too many ways to share nodes: another one
                continue
            self.online, self.dynamic, self.optimum_usd = Online(instance), dynamic, best.usd
            return

    def loss(self, weights: np.ndarray, rule: str = RULE) -> float:
        """Logarithm of dollars over the optimum's."""
        return math.log(self.online.packing(rule, weights).usd / self.optimum_usd)


class Fleet:
    """A fleet, its requests, and the orders that a scaling policy gave once; what placements of them cost.

    The baseline drains at once at a spot notice; `at_notice` is what the learned rule does then.
    """

    def __init__(
        self, scenario: Scenario, scaler: Policy, worlds: Sequence[World], at_notice: AtNotice = "drain"
    ) -> None:
        self.scenario = scenario.replace(placement=Placement(rule=BASELINE, at_notice="drain"))
        self.worlds = recorded(self.scenario, worlds)
        base = Cluster(self.scenario, self.worlds)
        rows = [(w, s) for w in range(len(worlds)) for s in range(len(scenario.services))]
        helm = Helm([scaler] * len(rows), [base.situation(*row) for row in rows], Guard())
        self._orders: list[np.ndarray] = []
        steer(base, helm, scenario.ticks, lambda *_: self._orders.append(base.decisions.copy()))
        base.finish()
        self.baseline_usd = self._usd(base)
        learned = Placement(rule=RULE, weights=tuple(vector(PRIOR).tolist()), at_notice=at_notice)
        self._cluster = Cluster(self.scenario.replace(placement=learned), self.worlds)

    def _usd(self, cluster: Cluster) -> np.ndarray:
        usd: np.ndarray = bill(cluster.totals, self.scenario).sum(axis=(1, 2))
        return usd

    def usd(self, weights: np.ndarray) -> np.ndarray:
        """Dollars of each world; shape (worlds,)."""
        cluster = self._cluster
        cluster.weights[:] = weights
        cluster.restart(range(len(self.worlds)), self.worlds)
        for orders in self._orders:
            cluster.advance(orders)
        cluster.finish()
        return self._usd(cluster)

    def loss(self, weights: np.ndarray) -> float:
        """Logarithm of dollars over those of Kubernetes' scores, within bounds."""
        ratio = self.usd(weights).sum() / max(self.baseline_usd.sum(), 1e-9)
        return float(np.clip(math.log(max(ratio, 1e-9)), -_CLIP, _CLIP))


def fleets(
    seed: int, count: int, hours: float, worlds: int = 1, at_notice: AtNotice = "drain"
) -> list[Fleet]:
    """Fleets at random, each with a scaling policy of its own and as many runs as asked for."""
    found = []
    for k in range(count):
        rng = np.random.default_rng([seed, k])
        scenario = fleet_at_random(rng, hours)
        runs = [World(int(seed)) for seed in rng.integers(2**31, size=worlds)]
        found.append(Fleet(scenario, SCALERS[k % len(SCALERS)], runs, at_notice))
    return found


def packed(seed: int, count: int) -> list[Packed]:
    """Packing problems at random, every other one dynamic."""
    return [Packed(np.random.default_rng([seed, k]), dynamic=k % 2 == 1) for k in range(count)]


# --- the search ---------------------------------------------------------------------------------------------
def search(
    start: np.ndarray, step: float, generations: int, population: int, seed: int,
    losses: Callable[[np.ndarray], np.ndarray],
) -> Iterator[np.ndarray]:  # fmt: skip
    """CMA-ES from `start` on a noisy loss of candidates, shape (population, n); its mean after each generation."""
    evolution = CMA(mean=start.astype(float), sigma=step, population_size=population, seed=seed)
    for _ in range(generations):
        asked = np.array([evolution.ask() for _ in range(population)])
        evolution.tell(list(zip(asked, losses(asked).tolist(), strict=True)))
        yield evolution.mean.copy()


def train(
    settings: Settings, progress: Callable[[str], None] | None = None
) -> tuple[LearnedPlacement, list[dict[str, Any]]]:
    """Learns weights; returns the best on validation, and the learning curve, one record per validation.

    The same settings give the same weights, whatever the number of cores.
    """
    say = progress or (lambda _: None)
    seed = settings.seed
    learn = packed(10 * seed + 1, settings.instances)
    judged = packed(10 * seed + 2, settings.validation_instances)
    say(f"{len(learn) + len(judged)} packing problems")
    learn_fleets, judged_fleets = (
        fleets(10 * seed + k, count, settings.fleet_hours, settings.fleet_worlds, settings.at_notice)
        for k, count in ((3, settings.fleets), (4, settings.validation_fleets))
    )
    say(f"{len(learn_fleets) + len(judged_fleets)} fleets")
    curve: list[dict[str, Any]] = []
    units, packed_terms, staked = vector(UNITS, 1.0), np.isin(TERMS, GEOMETRY), np.isin(TERMS, STAKES)

    def judge(weights: np.ndarray, step: str, generation: int) -> float:
        static, dynamic = (
            float(np.mean([p.loss(weights) for p in judged if p.dynamic == d])) for d in (False, True)
        )
        cost = None
        if step == "fleets":
            cost = float(np.mean(list(pool.map(lambda fleet: fleet.loss(weights), judged_fleets))))
        figures = {
            "static_over_optimum": math.exp(static),
            "dynamic_over_optimum": math.exp(dynamic),
            "fleets_over_kubernetes": "" if cost is None else math.exp(cost),
        }
        curve.append({"step": step, "generation": generation} | figures)
        say(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in curve[-1].items()))
        return settings.static_weight * static + dynamic if cost is None else cost

    def of_packing(asked: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        picked = rng.choice(len(learn), settings.instances_per_generation, replace=False)
        importance = [1.0 if learn[k].dynamic else settings.static_weight for k in picked]
        losses = [[learn[k].loss(weights) for k in picked] for weights in asked]
        return np.average(losses, axis=1, weights=importance)

    def of_fleets(asked: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        picked: list[int] = rng.choice(
            len(learn_fleets), settings.fleets_per_generation, replace=False
        ).tolist()
        losses = pool.map(lambda k: [learn_fleets[k].loss(weights) for weights in asked], picked)
        return np.mean(list(losses), axis=0)

    rng, best = np.random.default_rng(seed), vector(PRIOR)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for step, free, losses, generations, population, sigma in (
            ("packing", packed_terms, of_packing, settings.generations_packing, settings.population,
             settings.step_packing),
            ("fleets", staked, of_fleets, settings.generations, settings.fleet_population, settings.step),
        ):  # fmt: skip
            held, least = best.copy(), judge(best, step, 0)

            def whole(x: np.ndarray, held: np.ndarray = held, free: np.ndarray = free) -> np.ndarray:
                weights: np.ndarray = held.copy()
                weights[free] = x * units[free]
                return weights

            def cost(asked: np.ndarray, losses: Losses = losses, whole: Callable = whole) -> np.ndarray:
                return losses(np.array([whole(x) for x in asked]), rng)

            means = search(held[free] / units[free], sigma, generations, population, seed, cost)
            for g, mean in enumerate(means, 1):
                if g % max(1, generations // settings.evaluations) == 0 or g == generations:
                    weights = whole(mean)
                    if (loss := judge(weights, step, g)) < least:
                        best, least = weights, loss
            if step == "packing":
                best[free] *= GEOMETRY_NORM / np.linalg.norm(best[free])
    rounded = tuple(float(f"{x:.5g}") for x in best)
    figures = {"validation_loss": float(f"{least:.5g}"), "seed": float(seed)}
    placement = LearnedPlacement(terms=TERMS, weights=rounded, at_notice=settings.at_notice, trained=figures)
    return placement, curve
