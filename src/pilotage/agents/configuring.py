"""Learning where a service runs and how it batches, from what configurations cost in the engine.

Deployments at random have one to four kinds of nodes, spot markets among them, and one to three variants. The engine
runs the same policy of replicas on the same requests with each of some candidates (`priced`), so what a choice would
have cost is known and not predicted. The network of `control.configuring` gives every candidate a score; the loss is
the expected logarithm of cost over the cheapest candidate's, if choices were drawn by a softmax of scores: training
makes good decisions, not good forecasts (smart predict-then-optimise, Elmachtoub & Grigas, Management Science 68, 2022,
with the softmax in place of their surrogate).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import torch

from pilotage.agents.domain import log_uniform, traffic_at_random
from pilotage.control.configuring import (
    Configuration,
    as_if,
    candidates,
    features,
    names_of,
)
from pilotage.control.network import Network
from pilotage.control.policy import Policy, Situation
from pilotage.engine.cluster import Cluster, Recorded, World, recorded
from pilotage.engine.run import bill, simulate
from pilotage.scenario import Scenario
from pilotage.world.arrivals import Traffic
from pilotage.world.faults import Hazard, Spot
from pilotage.world.llm import LLMServer, Objectives, shipped_profiles
from pilotage.world.pools import Pool
from pilotage.world.servers import Affine, BatchServer, IterationLaw, LatencyLaw, Variant
from pilotage.world.services import Economics, Service
from pilotage.world.tokens import RandomTokens

ROWS = 160  # services that are simulated at once, which bounds memory
_WORST = 2.0  # no candidate counts for more than so much, as a logarithm of cost over the cheapest


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to train; the defaults are those of the shipped network."""

    services: int = 120
    validation: int = 30
    candidates: int = 12  # of a service that are priced, the deployed one among them
    hours: float = 1.0
    hidden: tuple[int, ...] = (48, 48)
    epochs: int = 400
    services_per_batch: int = 40
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    seed: int = 0


def deployment_at_random(rng: np.random.Generator, hours: float, tick_s: float = 15.0) -> Scenario:
    """One service with kinds of nodes of unequal speed and price, spot markets among them, and variants of its model.

    Like `domain.service_at_random`, a missed replica's worth of requests costs 20 to 600 times the replica; a wrong
    answer a hundredth of a missed request up to as much. As it is deployed, it has its most accurate variant on one of
    the kinds on demand, with a batch limit and wait by chance.
    """
    capacity_rps, price = log_uniform(rng, 2, 15), log_uniform(rng, 0.2, 5.0)
    max_batch = int(rng.choice([1, 4, 8, 16, 32]))
    full_s = max_batch / capacity_rps
    pools, laws = [], []
    for k in range(int(rng.integers(1, 4))):
        speed = log_uniform(rng, 0.5, 4) if k else 1.0
        fixed = float(rng.uniform(0.1, 0.9)) if max_batch > 1 else 1.0
        pool = Pool(
            name=f"nodes-{k}",
            price_usd_per_hour=price * speed ** float(rng.uniform(0.5, 1.3)),
            boot_s=log_uniform(rng, 10, 150),
            boot_cv=0.1,
            network_ms=float(rng.choice([0, 0, 5, 40])),
        )
        law = Affine(
            base_ms=1e3 * full_s * fixed / speed,
            per_item_ms=1e3 * full_s * (1 - fixed) / max_batch / speed,
            noise_cv=float(rng.uniform(0, 0.3)),
        )
        pools.append(pool)
        laws.append(law)
        if rng.random() < 0.35:
            pools.append(
                pool.replace(
                    name=f"spot-{k}",
                    price_usd_per_hour=pool.price_usd_per_hour * float(rng.uniform(0.3, 0.6)),
                    provisioning_failure=float(rng.choice([0, 1])) * float(rng.uniform(0.02, 0.3)),
                    spot=Spot(market=Hazard(per_hour=log_uniform(rng, 0.02, 0.5))),
                )
            )
            laws.append(law)
    load_s, variants, faster, accuracy = log_uniform(rng, 5, 150), [], 1.0, 0.95
    for k in range(int(rng.integers(1, 4))):
        variants.append(
            Variant(
                name=f"variant-{k}",
                accuracy=accuracy,
                load_s=load_s / faster,
                load_cv=0.1,
                latency={pool.name: _faster(law, faster) for pool, law in zip(pools, laws, strict=True)},
            )
        )
        faster *= float(rng.uniform(1.2, 2.5))
        accuracy -= float(rng.uniform(0.002, 0.03))
    replicas = log_uniform(rng, 0.7, 8)
    slo_s = full_s * log_uniform(rng, 1.2, 8)
    missed_usd = log_uniform(rng, 20, 600) * price / 3600 / capacity_rps
    kind = str(rng.choice(["diurnal", "diurnal", "flash", "on-off"]))
    on_demand = [pool.name for pool in pools if pool.spot is None]
    first = str(rng.choice(on_demand))
    service = Service(
        name="service",
        slo_ms=1e3 * slo_s,
        pools=(first, *(pool.name for pool in pools if pool.name != first)),
        max_replicas=40,
        initial_replicas=max(1, round(replicas)),
        economics=Economics(
            late_usd=missed_usd, dropped_usd=missed_usd, error_usd=missed_usd * log_uniform(rng, 0.01, 1)
        ),
        server=BatchServer(
            max_batch=max_batch,
            batch_wait_ms=float(rng.choice([0.0, 10.0, 1e3 * slo_s * rng.uniform(0, 0.3)])),
            request_timeout_s=max(5.0, 8 * full_s),
            queue_limit=1000,
        ),
        traffic=traffic_at_random(rng, kind, replicas * capacity_rps, (hours + 40) * 3600),
        variants=tuple(variants),
    )
    return Scenario(
        title="a deployment at random", name="deployment", pools=tuple(pools), services=(service,),
        horizon_h=hours, tick_s=tick_s, start_h=30.0, history_h=1.0,
    )  # fmt: skip


def llm_deployment_at_random(rng: np.random.Generator, hours: float, tick_s: float = 15.0) -> Scenario:
    """The same for an LLM service: one of the profiles that come with the package, on nodes and in variants as above;
    half of the time on the first kind and of the first variant only, so that batches are all there is to choose.

    Its limits are chance, too: KV cache for a third to three times a full batch, 512 to 8192 tokens an iteration. The
    first token may take 2 to 60 times as long as it takes alone, a later one 1.2 to 12 times; a missed replica's worth
    of requests costs 3 to 300 times the replica.
    """
    shape = deployment_at_random(rng, hours, tick_s)
    service = shape.services[0]
    profiles = shipped_profiles()
    law = profiles[str(rng.choice(sorted(profiles)))].law
    prompt, output = log_uniform(rng, 150, 4000), log_uniform(rng, 30, 500)
    max_batch, chunk = int(rng.choice([16, 32, 64, 128, 256])), int(rng.choice([512, 1024, 2048, 4096, 8192]))
    held = prompt + output / 2
    step_s = (law.decode or law).seconds(0, 1, held, 0)
    alone_s = 2 * step_s + law.seconds(prompt, 0, 0, prompt * min(prompt, chunk))
    if rng.random() < 0.5:
        service = service.replace(pools=service.pools[:1], variants=service.variants[:1])
    first = service.variants[0].latency[service.pools[0]]
    variants = tuple(
        variant.replace(
            latency={k: _paced(law, _alone_ms(v) / _alone_ms(first)) for k, v in variant.latency.items()}
        )
        for variant in service.variants
    )
    service = service.replace(
        slo_ms=1e3 * alone_s * log_uniform(rng, 2, 60),
        variants=variants,
        server=BatchServer(),
        llm=LLMServer(
            max_batch=max_batch,
            chunk_tokens=chunk,
            kv_blocks=round(max_batch * held / 16 * log_uniform(rng, 1 / 3, 3)) + 1000,
            objectives=Objectives(tpot_ms=1e3 * step_s * log_uniform(rng, 1.2, 12)),
        ),
        tokens=RandomTokens(
            prompt_mean=prompt, prompt_cv=float(rng.uniform(0.3, 1.2)), output_mean=output,
            output_cv=float(rng.uniform(0.3, 1.0)), max_tokens=16_000,
        ),
    )  # fmt: skip
    capacity_rps = Situation(service, shape.pool_by_name, tick_s, np.zeros(0)).capacity_rps()
    price = shape.pool_by_name[service.pools[0]].price_usd_per_hour
    missed_usd = log_uniform(rng, 3, 300) * price / 3600 / capacity_rps
    replicas, kind = log_uniform(rng, 0.7, 6), str(rng.choice(["diurnal", "diurnal", "flash", "on-off"]))
    service = service.replace(
        initial_replicas=max(1, round(replicas)),
        traffic=traffic_at_random(rng, kind, replicas * capacity_rps, (hours + 40) * 3600),
        economics=Economics(
            late_usd=missed_usd, dropped_usd=missed_usd, error_usd=missed_usd * log_uniform(rng, 0.01, 1)
        ),
    )
    return shape.replace(services=(service,))


def _alone_ms(law: LatencyLaw) -> float:
    assert isinstance(law, Affine)
    return law.base_ms + law.per_item_ms


def _paced(law: IterationLaw, factor: float) -> IterationLaw:
    """An iteration law whose iterations take `factor` times as long."""
    terms = ("base_s", "prefill_s", "sequence_s", "context_s", "square_s", "cross_s")
    decode = None if law.decode is None else _paced(law.decode, factor)
    return law.replace(decode=decode, **{name: factor * getattr(law, name) for name in terms})


def _faster(law: LatencyLaw, factor: float) -> LatencyLaw:
    assert isinstance(law, Affine)
    return law.replace(base_ms=law.base_ms / factor, per_item_ms=law.per_item_ms / factor)


@dataclass(frozen=True, slots=True)
class Priced:
    """A deployment, candidates of it, and what each cost; shapes (candidates, len(FEATURES)) and (candidates,)."""

    scenario: Scenario
    situation: Situation
    world: World
    options: tuple[Configuration, ...]
    features: np.ndarray
    usd: np.ndarray


def priced(
    scenarios: Sequence[Scenario],
    policy: Policy,
    seed: int,
    *,
    most: int | None = None,
    warm_up_h: float = 0.0,
    kept: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Priced]:
    """What candidates cost under one policy of replicas, on the same requests: as deployed, and `most` - 1 others.

    Each scenario has one service; all have the same length. The replicas that the load needs are there at the start;
    what the first `warm_up_h` cost does not count. With a file `kept`, dollars are written there as they are found, and
    an interrupted run goes on; it holds for the same arguments only.
    """
    asked: list[tuple[Scenario, Situation, World, list[Configuration], np.ndarray]] = []
    for k, scenario in enumerate(scenarios):
        rng = np.random.default_rng([seed, k])
        world = recorded(scenario, [World(int(rng.integers(2**31)))])[0]
        situation = Cluster(scenario, [world]).situation(0, 0)
        options = candidates(situation)
        seen = features(situation, options)  # relative to all of them
        if most is not None and len(options) > most:
            others = rng.choice(np.arange(1, len(options)), most - 1, replace=False)
            picked = [0, *sorted(others.tolist())]
            options, seen = [options[j] for j in picked], seen[picked]
        asked.append((scenario, situation, world, options, seen))
    found: list[float] = json.loads(kept.read_text()) if kept and kept.is_file() else []
    rows = [(k, option) for k, one in enumerate(asked) for option in one[3]]
    for lo in range(len(found), len(rows), ROWS):
        found += _run([(asked[k][1], asked[k][2], option) for k, option in rows[lo : lo + ROWS]],
                      scenarios[0], policy, warm_up_h)  # fmt: skip
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(".part")
            part.write_text(json.dumps(found))
            part.replace(kept)
        progress(len(found))
    usd = iter(found)
    return [
        Priced(scenario, situation, world, tuple(options), seen, np.array([next(usd) for _ in options]))
        for scenario, situation, world, options, seen in asked
    ]


def _run(
    rows: Sequence[tuple[Situation, World, Configuration]], shape: Scenario, policy: Policy, warm_up_h: float
) -> list[float]:
    """Dollars of every row: its service with nothing but its configuration, all in one world."""
    pools, services = [], []
    traffic: list[Traffic | Recorded] = []
    for k, (situation, world, option) in enumerate(rows):
        one = as_if(situation, option)
        past = one.history_rps
        load = max(float(past[-20:].mean()), float(past.mean())) if len(past) else one.capacity_rps()
        start = math.ceil(1.2 * load / one.capacity_rps())
        variant = one.service.variants[0]
        pools.append(
            situation.pools[option.pool].replace(name=f"pool-{k}", max_nodes=one.service.max_replicas)
        )
        services.append(
            one.service.replace(
                name=f"service-{k}",
                pools=(f"pool-{k}",),
                variants=(variant.replace(latency={f"pool-{k}": variant.latency[option.pool]}),),
                initial_replicas=int(np.clip(start, one.service.min_replicas, one.service.max_replicas)),
            )
        )
        assert world.traffic is not None
        traffic += world.traffic
    together = shape.replace(name="candidates", pools=tuple(pools), services=tuple(services))
    world = World(0, rows[0][1].start_s, tuple(traffic))
    run = simulate(together, [policy], [world], keep_timeline=True)[0]
    assert run.timeline is not None
    counted = run.timeline[round(warm_up_h * 3600 / together.tick_s) :]
    usd: list[float] = bill(counted, together).sum(axis=(0, 2)).tolist()
    return usd


class _Scorer(torch.nn.Module):
    def __init__(self, mean: np.ndarray, scale: np.ndarray, hidden: Sequence[int]) -> None:
        super().__init__()
        self.mean, self.scale, self.clip = torch.tensor(mean).float(), torch.tensor(scale).float(), 4.0
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairwise([len(mean), *hidden, 1]))
        torch.nn.init.zeros_(self.layers[-1].weight)
        torch.nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.clamp((x - self.mean) / self.scale, -self.clip, self.clip)
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)[..., 0]

    def network(self) -> Network:
        def plain(values: torch.Tensor) -> tuple[float, ...]:
            return tuple(float(f"{v:.6g}") for v in values.detach().tolist())

        return Network(
            mean=plain(self.mean),
            scale=plain(self.scale),
            clip=self.clip,
            weights=tuple(tuple(map(plain, m.weight)) for m in self.layers),
            biases=tuple(plain(m.bias) for m in self.layers),
        )


def regrets(table: Sequence[Priced]) -> np.ndarray:
    """Logarithm of cost over the cheapest candidate's; (services, most candidates), infinite beyond a service's."""
    out = np.full((len(table), max(len(one.usd) for one in table)), np.inf)
    for row, one in zip(out, table, strict=True):
        row[: len(one.usd)] = np.log(np.maximum(one.usd, 1e-9) / max(one.usd.min(), 1e-9))
    return out


def train(
    table: Sequence[Priced],
    validation: Sequence[Priced],
    settings: Settings,
    *,
    progress: Callable[[int, float], None] = lambda *_: None,
) -> tuple[Network, list[float]]:
    """The network that does best on `validation`, and the mean regret there after every tenth epoch.

    Regret is the logarithm of what the choice cost over the cheapest candidate. The same settings give the same
    network.
    """
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    known = np.concatenate([one.features for one in table])
    scorer = _Scorer(known.mean(axis=0), known.std(axis=0) + 0.05, settings.hidden)
    x, cost = _padded(table)
    checked, truth = _padded(validation)
    optimiser = torch.optim.AdamW(
        scorer.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    best, curve = scorer.network(), []
    for epoch in range(settings.epochs + 1):
        if epoch % 10 == 0:
            with torch.no_grad():
                chosen = scorer(checked).masked_fill(truth.isinf(), torch.inf).argmin(dim=1)
            curve.append(float(truth[torch.arange(len(truth)), chosen].mean()))
            if curve[-1] <= min(curve):
                best = scorer.network()
            progress(epoch, curve[-1])
        order = rng.permutation(len(table))
        for lo in range(0, len(order), settings.services_per_batch):
            part = torch.from_numpy(np.sort(order[lo : lo + settings.services_per_batch]))
            share = torch.softmax((-scorer(x[part])).masked_fill(cost[part].isinf(), -torch.inf), dim=1)
            loss = (share * cost[part].clamp(max=_WORST)).sum(dim=1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return best, curve


def _padded(table: Sequence[Priced]) -> tuple[torch.Tensor, torch.Tensor]:
    cost = regrets(table)
    x = np.zeros((*cost.shape, table[0].features.shape[1]))
    for row, one in zip(x, table, strict=True):
        row[: len(one.features)] = one.features
    return torch.from_numpy(x).float(), torch.from_numpy(cost).float()


def rule_of_thumb(situation: Situation, options: Sequence[Configuration]) -> Configuration:
    """The candidate with the least rent per request among those whose full batch, its wait and the network take half of
    the objective at most, wrong answers priced in; where none does, the fastest of them."""
    names = {name: k for k, name in enumerate(names_of(situation.service))}
    seen = features(situation, options)
    rent = seen[:, names["rent"]] + seen[:, names["errors"]]
    fits = seen[:, names["full"]] <= math.log(0.5)
    if not fits.any():
        return options[int(np.argmin(seen[:, names["full"]]))]
    return options[int(np.argmin(np.where(fits, rent, np.inf)))]
