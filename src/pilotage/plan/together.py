"""Several models on shared pools: each one's good deployments, and the combination whose nodes cost least."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pilotage.control.guard import Guard
from pilotage.control.scaling import Schedule
from pilotage.engine.cluster import World, recorded
from pilotage.engine.run import simulate
from pilotage.live.manifests import Platform
from pilotage.plan.advice import OTHER_SEED, Refusal, Step, advise, loaded, policy_of, row_of, settings
from pilotage.plan.requirements import Model, Requirements
from pilotage.plan.search import Search
from pilotage.plan.trials import RUNS, TICK_S, Outcome, Trials, digest, surely_below
from pilotage.scenario import Placement, Scenario
from pilotage.world.pools import Pool

KEPT: Final = 4  # deployments of a model that are combined with those of the others
SIMULATED: Final = 12  # combinations that are simulated, in the order of their packed cost
COMBINED: Final = (
    100_000  # combinations that are packed; beyond that fewer deployments of each model are combined
)
Combination = tuple[Outcome, ...]


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """One deployment per model, and what they cost on nodes that they share."""

    models: Sequence[Model]
    chosen: Combination
    usd_per_hour: float
    apart_usd_per_hour: float
    scenario: Scenario
    manifests: Sequence[list[dict[str, Any]]]
    verified: Sequence[dict[str, Any]]
    sensitivity: Sequence[dict[str, Any]]
    packed: int
    simulated: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "models": [
                {"model": model.name, "choice": row_of(outcome, model), "verified": row}
                for model, outcome, row in zip(self.models, self.chosen, self.verified, strict=True)
            ],
            "usd_per_hour": self.usd_per_hour,
            "apart_usd_per_hour": self.apart_usd_per_hour,
            "sensitivity": list(self.sensitivity),
            "combinations": self.packed,
            "simulated": self.simulated,
        }


def plan_together(
    asked: Requirements,
    *,
    platform: Platform = "kubernetes",
    seed: int = 0,
    alternatives: bool = True,
    step: Step = lambda _: None,
) -> FleetPlan | Refusal:
    """The cheapest combination of deployments of all models, or what the first model that has none would have to relax.

    Every model is searched by itself for the KEPT deployments that take the dearest share of nodes least; their
    combinations are packed first-fit decreasing, and simulated together from the cheapest on, until one meets every
    model's objective. Models with a rhythm are packed at their mean number of replicas. Without `alternatives` nothing
    is said of sensitivity.
    """
    horizon = max(asked.horizon_s(model) for model in asked.models)
    same: Requirements = asked.replace(horizon_h=horizon / 3600)
    all_trials = [Trials(same, model, platform=platform, seed=seed) for model in asked.models]
    found = _cheapest(same, all_trials, seed, step=step)
    if isinstance(found, Model):
        refused = advise(asked, found, platform=platform, seed=seed, alternatives=False)
        assert isinstance(refused, Refusal)
        return refused
    if found.combination is None:
        return Refusal(
            asked.models[0],
            [
                (
                    "combinations that fit on the shared pools, or meet all objectives on them: none",
                    found.packed,
                )
            ],
            [{"constraint": "max_nodes", "what": "give the shared pools more nodes", "usd_per_hour": None}],
        )
    combination = found.combination
    step("verifying")
    again, _ = _run(same, all_trials, combination, seed + OTHER_SEED)
    scalings = [settings(t, o) for t, o in zip(all_trials, combination, strict=True)]
    return FleetPlan(
        models=asked.models,
        chosen=combination,
        usd_per_hour=found.usd_per_hour,
        apart_usd_per_hour=sum(
            t.outcome(o.configuration, o.size).usd_per_hour
            for t, o in zip(all_trials, combination, strict=True)
        ),
        scenario=_scenario(same, all_trials, combination),
        manifests=[_manifests(t, o, s) for t, o, s in zip(all_trials, combination, scalings, strict=True)],
        verified=[
            {
                "in_time": 1 - float(o.missed.mean()),
                "p99_ms": o.p99_ms,
                "meets": bool(o.missed.mean() <= 1 - m.attainment),
            }
            for o, m in zip(again, asked.models, strict=True)
        ],
        sensitivity=_sensitivity(same, all_trials, found, combination, seed, step) if alternatives else [],
        packed=found.packed,
        simulated=found.simulated,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """The cheapest combination (None: none fits or meets all objectives), and how many were packed and simulated."""

    combination: Combination | None
    usd_per_hour: float
    packed: int
    simulated: int


def _cheapest(
    asked: Requirements,
    all_trials: Sequence[Trials],
    seed: int,
    *,
    pools: Collection[str] | None = None,
    price: Mapping[str, float] | None = None,
    step: Step = lambda _: None,
) -> _Found | Model:
    """The cheapest combination on some pools (None: all) at multiples of their prices; or a model that has no
    deployment there."""
    price = price or {}
    kept = []
    for trials in all_trials:
        model = trials.model
        step(f"{model.name}: searching")
        search = Search(
            trials, min_accuracy=model.min_accuracy, keep=KEPT, shared=True, pools=pools, price=price
        )
        if not search.run().best:
            return model
        kept.append(search.best)
    while math.prod(map(len, kept)) > COMBINED:
        longest = max(kept, key=len)
        longest.pop()
    step("packing")
    asked = _priced(asked, price)
    packed = sorted(
        (
            (_packed_usd(asked, combination, all_trials), k, combination)
            for k, combination in enumerate(itertools.product(*kept))
        ),
        key=lambda row: row[:2],
    )
    packed = [row for row in packed if math.isfinite(row[0])]
    best: Combination | None = None
    cheapest_usd, simulated = math.inf, 0
    for usd, _, combination in packed[:SIMULATED]:
        if usd >= cheapest_usd * (1 - 1e-9):
            break
        step(f"simulating combination {simulated + 1}")
        outcomes, spent = _run(asked, all_trials, combination, seed)
        simulated += 1
        meets = all(
            surely_below(o.missed, 1 - t.model.attainment) for o, t in zip(outcomes, all_trials, strict=True)
        )
        if meets and spent < cheapest_usd:
            best, cheapest_usd = combination, spent
    return _Found(best, cheapest_usd, len(packed), simulated)


def _sensitivity(
    asked: Requirements,
    all_trials: Sequence[Trials],
    now: _Found,
    chosen: Combination,
    seed: int,
    step: Step,
) -> list[dict[str, Any]]:
    """What the plan comes to, and what would be chosen, with half as much load again of all models, without spot, and
    at a higher price of the pool on which most is spent."""
    rows: list[dict[str, Any]] = []

    def row(question: str, found: _Found | Model, stays: str = "") -> None:
        usd: float | None = None
        if isinstance(found, Model):
            plan = f"nothing satisfies {found.name}"
        elif found.combination is None:
            plan = "no combination fits, or meets all objectives"
        else:
            plan, usd = _told(all_trials, found.combination, chosen), found.usd_per_hour
        rows.append({"what_if": question, "plan": plan, "usd_per_hour": usd, "stays": stays})

    step("what if: load + 50 %")
    more = [Trials(asked, loaded(t.model, 1.5), platform=t.platform, seed=seed) for t in all_trials]
    outcomes, usd = _run(asked, more, chosen, seed)
    worst = max(
        zip(outcomes, more, strict=True), key=lambda pair: pair[0].missed.mean() + pair[1].model.attainment
    )
    kept = 100 * (1 - float(worst[0].missed.mean()))
    stays = f"as it is, {kept:.4g} % of {worst[1].model.name} would be in time at {usd:.4g} $/h"
    row("load + 50 %", _cheapest(asked, more, seed), stays)
    spent: dict[str, float] = {}
    for trials, outcome in zip(all_trials, chosen, strict=True):
        c = outcome.configuration
        share = trials.fixed_usd(c, math.ceil(outcome.replicas - 1e-6), shared=True)
        spent[c.pool] = spent.get(c.pool, 0.0) + share
    step("what if: spot gone")
    if any(asked.pool_by_name[name].spot for name in spent):
        on_demand = [pool.name for pool in asked.pools if pool.spot is None]
        row("spot gone", _cheapest(asked, all_trials, seed, pools=on_demand))
    else:
        row("spot gone", now, "not on spot")
    step("what if: prices")
    dearest = max(spent, key=lambda name: spent[name])
    _, usd = _run(_priced(asked, {dearest: 1.2}), all_trials, chosen, seed)
    found = _cheapest(asked, all_trials, seed, price={dearest: 1.2})
    row(f"price of {dearest} + 20 %", found, f"as it is, {usd:.4g} $/h")
    return rows


def _priced(asked: Requirements, price: Mapping[str, float]) -> Requirements:
    """The same at multiples of the prices of pools."""
    pools = tuple(
        pool.replace(price_usd_per_hour=pool.price_usd_per_hour * price.get(pool.name, 1.0))
        for pool in asked.pools
    )
    changed: Requirements = asked.replace(pools=pools)
    return changed


def _told(all_trials: Sequence[Trials], combination: Combination, chosen: Combination) -> str:
    """The deployments that are not the chosen ones, in words."""
    parts = []
    for trials, o, before in zip(all_trials, combination, chosen, strict=True):
        c = o.configuration
        if (c, o.size) == (before.configuration, before.size):
            continue
        size = f"{o.size:g} replicas" if trials.model.steady else f"utilisation {o.size:g}"
        parts.append(f"{trials.model.name}: {c.variant} on {c.pool}, batches of {c.max_batch}, {size}")
    return "; ".join(parts) or "the same"


def _manifests(trials: Trials, outcome: Outcome, scaling: Any) -> list[dict[str, Any]]:
    from pilotage.live.manifests import manifests

    service = trials.service(outcome.configuration, scaling.min_replicas)
    return manifests(service, service.variants[0], trials.model.artifact, scaling)


def _packed_usd(asked: Requirements, combination: Combination, all_trials: Sequence[Trials]) -> float:
    """Dollars per hour of the nodes that first-fit decreasing needs; infinite where a pool has too few."""
    items: dict[str, list[tuple[np.ndarray, int]]] = {}
    pools: dict[str, Pool] = {}
    for k, (outcome, trials) in enumerate(zip(combination, all_trials, strict=True)):
        c = outcome.configuration
        pool, needs = asked.pool_by_name[c.pool], trials.variant(c).resources
        pools[c.pool] = pool
        if pool.node is None or needs is None:
            share = np.ones(4)
        else:
            has = np.array(pool.node.vector)
            share = np.divide(needs.vector, has, out=np.zeros(4), where=has > 0)
        items.setdefault(c.pool, []).extend([(share, k)] * max(1, round(outcome.replicas)))
    total = 0.0
    for name, replicas in items.items():
        nodes: list[tuple[np.ndarray, list[int]]] = []
        for share, k in sorted(replicas, key=lambda item: -item[0].max()):
            limit = all_trials[k].model.max_per_node or len(replicas)
            for used, owners in nodes:
                if (used + share <= 1 + 1e-9).all() and owners.count(k) < limit:
                    used += share
                    owners.append(k)
                    break
            else:
                nodes.append((share.copy(), [k]))
        if len(nodes) > pools[name].max_nodes:
            return math.inf
        total += len(nodes) * pools[name].price_usd_per_hour
    return total


def _scenario(asked: Requirements, all_trials: Sequence[Trials], combination: Combination) -> Scenario:
    services = []
    for trials, outcome in zip(all_trials, combination, strict=True):
        c = outcome.configuration
        initial = (
            int(outcome.size) if trials.model.steady else trials.start(c, trials.autoscaling(c, outcome.size))
        )
        services.append(trials.service(c, initial))
    used = {outcome.configuration.pool for outcome in combination}
    return Scenario(
        title=asked.title or "models planned together",
        pools=tuple(pool for pool in asked.pools if pool.name in used),
        services=tuple(services),
        tick_s=TICK_S,
        horizon_h=math.ceil((asked.horizon_h or 1.0) * 3600 / TICK_S) * TICK_S / 3600,
        start_h=asked.start_h,
        placement=Placement(rule="best-fit"),
    )


def _run(
    asked: Requirements, all_trials: Sequence[Trials], combination: Combination, seed: int
) -> tuple[list[Outcome], float]:
    """All models together: the outcome of each, and dollars per hour of all nodes."""
    scenario = _scenario(asked, all_trials, combination)
    policies = [
        Schedule(targets=(int(o.size),))
        if t.model.steady
        else policy_of(t.autoscaling(o.configuration, o.size))
        for t, o in zip(all_trials, combination, strict=True)
    ]
    worlds = recorded(scenario, [World(seed + k) for k in range(RUNS)])
    runs = simulate(scenario, [policies] * RUNS, worlds, guard=Guard(), threads=min(2, os.cpu_count() or 1))
    hours = scenario.ticks * scenario.tick_s / 3600
    outcomes = [
        digest(runs, k, o.configuration, o.size, o.accuracy, 3600 * hours) for k, o in enumerate(combination)
    ]
    usd = float(np.mean([run.totals["node_usd"].sum() for run in runs])) / hours
    return outcomes, usd
