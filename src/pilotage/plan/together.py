"""Several models on shared pools: each one's good deployments, and the combination whose nodes cost least."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pilotage.control.guard import Guard
from pilotage.control.scaling import Schedule
from pilotage.engine.cluster import World, recorded
from pilotage.engine.run import simulate
from pilotage.live.manifests import Platform
from pilotage.plan.advice import OTHER_SEED, Refusal, policy_of, row_of, settings
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
            "combinations": self.packed,
            "simulated": self.simulated,
        }


def plan_together(
    asked: Requirements,
    *,
    platform: Platform = "kubernetes",
    seed: int = 0,
    step: Callable[[str], None] = lambda _: None,
) -> FleetPlan | Refusal:
    """The cheapest combination of deployments of all models, or what the first model that has none would have to relax.

    Every model is searched by itself for the KEPT deployments that take the dearest share of nodes least; their
    combinations are packed first-fit decreasing, and simulated together from the cheapest on, until one meets every
    model's objective. Models with a rhythm are packed at their mean number of replicas.
    """
    from pilotage.plan.advice import advise

    horizon = max(asked.horizon_s(model) for model in asked.models)
    same = asked.replace(horizon_h=horizon / 3600)
    all_trials, kept = [], []
    for model in asked.models:
        step(f"{model.name}: searching")
        trials = Trials(same, model, platform=platform, seed=seed)
        found = Search(trials, min_accuracy=model.min_accuracy, keep=KEPT, shared=True).run().best
        if not found:
            refused = advise(asked, model, platform=platform, seed=seed, alternatives=False)
            assert isinstance(refused, Refusal)
            return refused
        all_trials.append(trials)
        kept.append(found)
    while math.prod(map(len, kept)) > COMBINED:
        longest = max(kept, key=len)
        longest.pop()
    step("packing")
    packed = sorted(
        (
            (_packed_usd(combination, all_trials), k, combination)
            for k, combination in enumerate(itertools.product(*kept))
        ),
        key=lambda row: row[:2],
    )
    packed = [row for row in packed if math.isfinite(row[0])]
    best: tuple[float, Combination, list[Outcome]] | None = None
    simulated = 0
    for usd, _, combination in packed[:SIMULATED]:
        if best is not None and usd >= best[0] * (1 - 1e-9):
            break
        step(f"simulating combination {simulated + 1}")
        outcomes, spent = _run(same, all_trials, combination, seed)
        simulated += 1
        meets = all(
            surely_below(o.missed, 1 - m.attainment) for o, m in zip(outcomes, asked.models, strict=True)
        )
        if meets and (best is None or spent < best[0]):
            best = (spent, combination, outcomes)
    if best is None:
        return Refusal(
            asked.models[0],
            [
                (
                    "combinations that fit on the shared pools, or meet all objectives on them: none",
                    len(packed),
                )
            ],
            [{"constraint": "max_nodes", "what": "give the shared pools more nodes", "usd_per_hour": None}],
        )
    spent, combination, outcomes = best
    step("verifying")
    again, _ = _run(same, all_trials, combination, seed + OTHER_SEED)
    scalings = [settings(t, o) for t, o in zip(all_trials, combination, strict=True)]
    return FleetPlan(
        models=asked.models,
        chosen=combination,
        usd_per_hour=spent,
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
        packed=len(packed),
        simulated=simulated,
    )


def _manifests(trials: Trials, outcome: Outcome, scaling: Any) -> list[dict[str, Any]]:
    from pilotage.live.manifests import manifests

    service = trials.service(outcome.configuration, scaling.min_replicas)
    return manifests(service, service.variants[0], trials.model.artifact, scaling)


def _packed_usd(combination: Combination, all_trials: Sequence[Trials]) -> float:
    """Dollars per hour of the nodes that first-fit decreasing needs; infinite where a pool has too few."""
    items: dict[str, list[tuple[np.ndarray, int]]] = {}
    pools: dict[str, Pool] = {}
    for k, (outcome, trials) in enumerate(zip(combination, all_trials, strict=True)):
        c = outcome.configuration
        pool, needs = trials.pool(c), trials.variant(c).resources
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
