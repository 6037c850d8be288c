"""A plan for one model: what to deploy, why, what else there is, and what would change it; or what asks too much."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pilotage.live.manifests import Autoscaling, Platform, manifests
from pilotage.plan.requirements import Model, Requirements
from pilotage.plan.search import Search, Verdict, pareto
from pilotage.plan.trials import Outcome, Trials, policy_of
from pilotage.world.arrivals import Gamma, Poisson, Scale
from pilotage.world.services import Service
from pilotage.world.spec import SpecError

Step = Callable[[str], None]

OTHER_SEED: Final = 500_000  # apart from the seeds on which a plan is chosen
MARGIN: Final = 1.1  # requests in a replica above what a fixed number has, before an autoscaler adds one
TIGHTER: Final = (0.5, 0.75)  # shares of the objective, and
STRICTER: Final = 2  # steps of accuracy, or of an autoscaler's utilisation, for the table of alternatives
LOOSER: Final = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
FEWEST_INTERRUPTIONS: Final = 10  # seen in simulation, before a plan on spot nodes can be judged


@dataclass(frozen=True, slots=True)
class Plan:
    """What to deploy for a model, and what there is to know about it."""

    model: Model
    environment: str
    chosen: Outcome
    service: Service
    scaling: Autoscaling
    reason: str
    runners_up: Sequence[Verdict]
    pareto: Sequence[Outcome]
    sensitivity: Sequence[dict[str, Any]]
    verified: dict[str, Any]
    notes: Sequence[str]
    rate_rps: float

    def manifests(self, platform: Platform | None = None) -> list[dict[str, Any]]:
        """What to apply on a platform (None: the one it was made for)."""
        scaling = self.scaling if platform is None else self.scaling.replace(platform=platform)
        return manifests(self.service, self.service.variants[0], self.model.artifact, scaling)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the runs, for JSON."""
        return {
            "model": self.model.name,
            "rate_rps": self.rate_rps,
            "slo_ms": self.model.slo_ms,
            "attainment": self.model.attainment,
            "environment": self.environment,
            "choice": row_of(self.chosen, self.model),
            "autoscaling": {name: getattr(self.scaling, name) for name in self.scaling.__struct_fields__},
            "reason": self.reason,
            "runners_up": [
                {
                    "pool": v.configuration.pool, "variant": v.configuration.variant,
                    "max_batch": v.configuration.max_batch, "batch_wait_ms": v.configuration.batch_wait_ms,
                    "usd_per_hour": v.outcome.usd_per_hour if v.outcome else None, "why_not": v.reason,
                }
                for v in self.runners_up
            ],
            "pareto": [row_of(outcome, self.model) for outcome in self.pareto],
            "sensitivity": list(self.sensitivity),
            "verified": self.verified,
            "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing satisfies what a model asks: what stands in the way how often, and what relaxing it would cost."""

    model: Model
    obstacles: Sequence[tuple[str, int]]
    relaxations: Sequence[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "choice": None,
            "obstacles": [{"why": why, "configurations": n} for why, n in self.obstacles],
            "relaxations": list(self.relaxations),
        }

    def __str__(self) -> str:
        lines = [f"nothing satisfies what model {self.model.name!r} asks"]
        lines += [f"  {n} configurations: {why}" for why, n in self.obstacles[:5]]
        lines += [f"  {row['constraint']}: {row['what']}" for row in self.relaxations]
        return "\n".join(lines)


def row_of(outcome: Outcome, model: Model) -> dict[str, Any]:
    """An outcome as a row of a table."""
    c = outcome.configuration
    return {
        "pool": c.pool,
        "variant": c.variant,
        "max_batch": c.max_batch,
        "batch_wait_ms": c.batch_wait_ms,
        "replicas": int(outcome.size) if model.steady else round(outcome.replicas, 2),
        "target_utilization": None if model.steady else outcome.size,
        "usd_per_hour": outcome.usd_per_hour,
        "p99_ms": outcome.p99_ms,
        "in_time": 1 - float(outcome.missed.mean()),
        "accuracy": outcome.accuracy,
    }


def advise(
    asked: Requirements,
    model: Model,
    *,
    platform: Platform = "kubernetes",
    seed: int = 0,
    alternatives: bool = True,
    step: Step = lambda _: None,
) -> Plan | Refusal:
    """The cheapest deployment of a model that meets what it asks, on a platform, or why there is none.

    Without `alternatives` the Pareto table has only what the search met, and nothing is said of sensitivity.
    """
    if model.slo_ms is None or model.traffic is None:
        raise SpecError(f"model {model.name!r} has no load or no objective; give --rate and --slo-ms")
    trials = Trials(asked, model, platform=platform, seed=seed)
    if not trials.configurations():
        raise SpecError(
            f"model {model.name!r}: no variant has a latency law for, and fits on, one of the pools it may run in "
            f"({', '.join(asked.allowed(model))})"
        )
    step(f"{model.name}: searching {len(trials.configurations())} configurations")
    search = Search(trials, min_accuracy=model.min_accuracy).run()
    if not search.best:
        step(f"{model.name}: nothing satisfies it; relaxing")
        return Refusal(model, _obstacles(search), _relaxations(asked, model, platform, seed))
    step(f"{model.name}: verifying")
    chosen, scaling, verified = _verified(asked, model, trials, search.best[0], seed)
    others = _alternatives(trials, search) if alternatives else []
    sensitivity = []
    if alternatives:
        step(f"{model.name}: what if")
        sensitivity = _sensitivity(asked, model, trials, chosen, seed)
    return Plan(
        model=model,
        environment=asked.environment_of(chosen.configuration.pool),
        chosen=chosen,
        service=trials.service(chosen.configuration, scaling.min_replicas),
        scaling=scaling,
        reason=_reason(model, trials, search, chosen),
        runners_up=_runners_up(search, chosen),
        pareto=pareto(
            [chosen, *others, *(o for o in trials.known.values() if search.meets(o) and _sound(o, model))]
        ),
        sensitivity=sensitivity,
        verified=verified,
        notes=_notes(asked, trials, chosen),
        rate_rps=trials.rate_rps,
    )


def _sound(outcome: Outcome, model: Model) -> bool:
    return outcome.accuracy >= model.min_accuracy


# --- verification ------------------------------------------------------------------------------------------
def settings(trials: Trials, chosen: Outcome) -> Autoscaling:
    """Settings of the platform's autoscaler for a deployment that was chosen.

    A fixed number of replicas is the lower bound, which carries the load that was asked; the upper bound carries twice
    as much, and more replicas come when a replica holds clearly more requests than it does at that load.
    """
    c, model = chosen.configuration, trials.model
    if not model.steady:
        return trials.autoscaling(c, chosen.size)
    fewest = int(chosen.size)
    return Autoscaling(
        platform=trials.platform,
        min_replicas=fewest,
        max_replicas=max(fewest, min(2 * fewest, trials.most(c))),
        target_concurrency=max(0.05, round(MARGIN * chosen.concurrency, 3)),
    )


def _verified(
    asked: Requirements, model: Model, trials: Trials, chosen: Outcome, seed: int
) -> tuple[Outcome, Autoscaling, dict[str, Any]]:
    """The deployment that also meets the objective on other runs, with the next sizes if need be; and what other runs
    say of it under the platform's autoscaler."""
    fresh = Trials(asked, model, platform=trials.platform, seed=seed + OTHER_SEED, longer=1.5)
    c, sizes = chosen.configuration, trials.sizes(chosen.configuration)
    for size in sizes[sizes.index(chosen.size) : sizes.index(chosen.size) + 3]:
        chosen = trials.outcome(c, size)
        again = fresh.outcome(c, size)
        if float(again.missed.mean()) <= 1 - model.attainment:
            break
    scaling = settings(trials, chosen)
    again = fresh.run(c, chosen.size, policy_of(scaling), fresh.start(c, scaling))
    verified = {
        "usd_per_hour": again.usd_per_hour,
        "p99_ms": again.p99_ms,
        "in_time": 1 - float(again.missed.mean()),
        "replicas": again.replicas,
        "meets": bool(float(again.missed.mean()) <= 1 - model.attainment),
    }
    return chosen, scaling, verified


def _notes(asked: Requirements, trials: Trials, chosen: Outcome) -> list[str]:
    pool = asked.pool_by_name[chosen.configuration.pool]
    notes = []
    if pool.spot:
        per_hour = pool.spot.market.interruptions_per_hour(None)
        seen = per_hour * chosen.node_hours
        if seen < FEWEST_INTERRUPTIONS:
            notes.append(
                f"{pool.name} is spot: only about {seen:.1f} interruptions fell into the runs; give a longer horizon_h "
                "to judge them"
            )
    return notes


# --- why ---------------------------------------------------------------------------------------------------
def _reason(model: Model, trials: Trials, search: Search, chosen: Outcome) -> str:
    c, floor = chosen.configuration, trials.floor_usd(chosen.configuration)
    rivals = [v for v in search.verdicts if v.configuration != c and v.outcome]
    cheaper = sum(v.floor_usd < chosen.usd_per_hour and v.outcome is None for v in search.verdicts)
    text = (
        f"cheapest of {len(search.verdicts)} configurations that serves {100 * model.attainment:g} % within "
        f"{model.slo_ms:g} ms: {chosen.usd_per_hour:.4g} $/h, where full batches at no wait would cost "
        f"{floor:.4g} $/h there"
    )
    if rivals:
        best = min(rivals, key=lambda v: search.cost(v.outcome) if v.outcome else math.inf)
        assert best.outcome is not None
        text += (
            f"; next {best.configuration.variant} on {best.configuration.pool}, batches of "
            f"{best.configuration.max_batch}: {search.cost(best.outcome):.4g} $/h"
        )
    if cheaper:
        text += f"; {cheaper} that might have been cheaper miss the objective"
    return text


def _runners_up(search: Search, chosen: Outcome) -> list[Verdict]:
    """The best of every other pool and variant, and the best other batch of the chosen: why they lost."""

    def rank(v: Verdict) -> tuple[bool, float]:
        return (v.outcome is None, search.cost(v.outcome) if v.outcome else v.floor_usd)

    best: dict[tuple[str, str], Verdict] = {}
    for v in sorted(search.verdicts, key=rank):
        if v.configuration != chosen.configuration:
            best.setdefault((v.configuration.pool, v.configuration.variant), v)
    out = []
    for v in sorted(best.values(), key=rank):
        why = v.reason
        if not why and v.outcome:
            why = f"meets the objective at {search.cost(v.outcome):.4g} $/h"
        out.append(Verdict(v.configuration, v.floor_usd, v.outcome, why))
    return out


def _alternatives(trials: Trials, search: Search) -> list[Outcome]:
    """The cheapest at tighter objectives and at higher accuracy, as far as there are any, and an autoscaler that leaves
    more room."""
    model, chosen, found = trials.model, search.best[0], []
    higher = sorted({v.accuracy for v in model.variants if v.accuracy > chosen.accuracy})[:STRICTER]
    for share in TIGHTER:
        if chosen.p99_ms > 1e3 * share * trials.slo_s:
            found += Search(trials, slo_s=share * trials.slo_s, min_accuracy=model.min_accuracy).run().best
    for accuracy in higher:
        found += Search(trials, min_accuracy=accuracy).run().best
    if not model.steady:
        c, sizes = chosen.configuration, trials.sizes(chosen.configuration)
        roomier = sizes[sizes.index(chosen.size) + 1 :][:STRICTER]
        found += [o for o in (trials.outcome(c, size) for size in roomier) if search.meets(o)]
    return found


def _sensitivity(
    asked: Requirements, model: Model, trials: Trials, chosen: Outcome, seed: int
) -> list[dict[str, Any]]:
    """What the plan costs, and what would be chosen, with half as much load again, without spot, at other prices."""
    c = chosen.configuration
    rows: list[dict[str, Any]] = []

    def row(question: str, best: Sequence[Outcome], factor: float = 1.0, stays: str = "") -> None:
        if not best:
            rows.append(
                {"what_if": question, "plan": "nothing satisfies it", "usd_per_hour": None, "stays": stays}
            )
            return
        o = best[0]
        size = f"{o.size:g} replicas" if model.steady else f"utilisation {o.size:g}"
        plan = f"{o.configuration.variant} on {o.configuration.pool}, batches of {o.configuration.max_batch}, {size}"
        rows.append(
            {"what_if": question, "plan": plan, "usd_per_hour": o.usd_per_hour * factor, "stays": stays}
        )

    more = Trials(asked, loaded(model, 1.5), platform=trials.platform, seed=seed)
    again = more.outcome(c, chosen.size)
    kept = 100 * (1 - float(again.missed.mean()))
    stays = f"as it is, {kept:.4g} % would be in time" + (
        "" if model.steady else f" at {again.usd_per_hour:.4g} $/h"
    )
    row("load + 50 %", Search(more, min_accuracy=model.min_accuracy).run().best, stays=stays)
    on_demand = [p for p in asked.allowed(model) if asked.pool_by_name[p].spot is None]
    if asked.pool_by_name[c.pool].spot:
        row("spot gone", Search(trials, pools=on_demand, min_accuracy=model.min_accuracy).run().best)
    else:
        row("spot gone", [chosen], stays="not on spot")
    dearer = Search(trials, price={c.pool: 1.2}, min_accuracy=model.min_accuracy).run().best
    factor = 1.2 if dearer and dearer[0].configuration.pool == c.pool else 1.0
    stays = f"as it is, {1.2 * chosen.usd_per_hour:.4g} $/h"
    row(f"price of {c.pool} + 20 %", dearer, factor, stays)
    return rows


def loaded(model: Model, factor: float) -> Model:
    """The model with its traffic at a multiple of its rate."""
    traffic = model.traffic
    assert traffic is not None
    if isinstance(traffic, (Poisson, Gamma)):
        traffic = traffic.replace(rate_rps=traffic.rate_rps * factor)
    else:
        traffic = Scale(source=traffic, factor=factor)
    changed: Model = model.replace(traffic=traffic)
    return changed


# --- what to relax -----------------------------------------------------------------------------------------
def _obstacles(search: Search) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for v in search.verdicts:
        counts[v.reason] = counts.get(v.reason, 0) + 1
    return sorted(counts.items(), key=lambda pair: -pair[1])


def _relaxations(asked: Requirements, model: Model, platform: Platform, seed: int) -> list[dict[str, Any]]:
    """Every constraint by itself: how far it must give, and what that would cost."""
    assert model.slo_ms is not None
    accuracies = sorted({v.accuracy for v in model.variants if v.accuracy < model.min_accuracy}, reverse=True)
    roomy = asked.replace(pools=tuple(p.replace(max_nodes=10 * p.max_nodes) for p in asked.pools))
    ways: list[tuple[str, list[tuple[str, Requirements, Model]]]] = [
        (
            "slo_ms",
            [
                (f"{slo_ms:g} instead of {model.slo_ms:g}", asked, model.replace(slo_ms=slo_ms))
                for slo_ms in (share * model.slo_ms for share in LOOSER)
            ],
        ),
        (
            "attainment",
            [
                (f"{a:g} instead of {model.attainment:g}", asked, model.replace(attainment=a))
                for a in (0.99, 0.95, 0.9)
                if a < model.attainment
            ],
        ),
        (
            "min_accuracy",
            [(f"{a:g} instead of {model.min_accuracy:g}", asked, model.replace(min_accuracy=a)) for a in accuracies],
        ),
        ("usd_per_hour", [("no budget", asked, model.replace(usd_per_hour=None))] if model.usd_per_hour else []),
        ("environments", [("any", asked, model.replace(environments=None))] if model.environments else []),
        (
            "max_replicas and max_nodes",
            [("ten times as many", roomy, model.replace(max_replicas=10 * model.max_replicas))],
        ),
    ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for constraint, steps in ways:
        for what, others, changed in steps:
            best = (
                Search(
                    Trials(others, changed, platform=platform, seed=seed), min_accuracy=changed.min_accuracy
                )
                .run()
                .best
            )
            if best:
                o = best[0]
                where = f"{o.configuration.variant} on {o.configuration.pool} at {o.usd_per_hour:.4g} $/h"
                rows.append(
                    {"constraint": constraint, "what": f"{what}: {where}", "usd_per_hour": o.usd_per_hour}
                )
                break
        else:
            if steps:
                rows.append(
                    {"constraint": constraint, "what": f"not even {steps[-1][0]} helps", "usd_per_hour": None}
                )
    return rows
