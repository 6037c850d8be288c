"""Where a service runs and how it batches, chosen by a network: pool, variant, batch limit and batch wait, or, of an
LLM service, the tokens of an iteration.

A `Configuration` is one such choice. `features` describes all that a service may have, in numbers that do not depend
on the service: rents relative to the cheapest, times relative to the objective, loads in replicas. A network scores
each by itself, so that one network serves services with any number of pools and variants; the least score is chosen.
Servers that batch and LLM servers have a network each, trained on what configurations cost in the engine
(`agents.configuring`). How many replicas there are, another policy decides, to which the service looks as if it had
nothing but what was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.control.foresight import Anticipate, Foresight
from pilotage.control.network import Forward, Network
from pilotage.control.policy import Controller, Decision, Observation, Pace, Policy, Situation
from pilotage.control.scaling import Predictive
from pilotage.world.faults import Hazard
from pilotage.world.llm import Objectives, waits_s
from pilotage.world.servers import BatchServer, IterationLaw
from pilotage.world.services import Service
from pilotage.world.spec import SpecError, decode, read_json
from pilotage.world.tokens import MAX_TOKENS

WAITS: Final = (0.0, 0.1)  # of the objective; what the service has is a candidate, too
LLM_LIMITS: Final = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the batch limit of an LLM service
LLM_CHUNKS: Final = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # of the tokens of an iteration that it has
_RECENT_S: Final = 3600.0
_LIMIT: Final = 8.0

FEATURES: Final = (
    "as_deployed",  # 1: the first pool and variant, with the batches that the service has
    "rent",  # log of the rent of what one request needs at full batches, relative to the cheapest candidate
    "rent_whole",  # log of the rent of as many whole replicas as the load needs, relative to the cheapest candidate
    "rent_one",  # log of the price, relative to the cheapest pool
    "replicas",  # log of 1 + the load in replicas
    "rounding",
    "full",  # log of a full batch, its wait and the network, relative to the objective
    "alone",  # the same of a batch of one
    "typical",  # the same of a batch as large as the load makes it
    "wait",  # relative to the objective
    "filling",  # log of the time in which a batch fills, relative to the objective
    "limit",  # log of the batch limit
    "limit_share",  # log of it, relative to the largest
    "stake",  # log of what a replica's worth of requests costs if missed, relative to the replica
    "errors",  # wrong answers per dollar of rent, relative to the most accurate variant: log of 1 +
    "start_up",  # log of minutes
    "spot",
    "interrupted",  # share of the time that interruptions cost: log of 1 + hundredths
    "failing",  # probability that an order is not met
    "noise",
    "peak",  # log of the busiest tick of the last hour, relative to its mean
    "trend",  # log of the last five minutes, relative to the hour
    "closed",  # 1: batches close at the wait, whether or not a replica is free
)
# of LLM services; a full batch is the largest that prefills keep up with, a typical one as large as the load makes it
LLM_FEATURES: Final = (
    "as_deployed",
    "rent",
    "rent_whole",
    "rent_one",
    "replicas",
    "rounding",
    "limit",
    "limit_share",
    "stake",
    "errors",
    "start_up",
    "spot",
    "interrupted",
    "failing",
    "peak",
    "trend",
    "full",  # log of the time to the first token at a full batch, relative to its objective
    "alone",
    "typical",
    "token_full",  # log of an iteration that only decodes, relative to the objective for the time per token
    "token_alone",
    "token_typical",
    "mixed_full",  # log of an iteration whose tokens are used up by decodes and prefills, relative to the same
    "mixed_alone",
    "mixed_typical",
    "supply_full",  # log of the requests prefilled by such an iteration, relative to those that end in it
    "supply_typical",
    "memory",  # log of the KV cache, relative to what a batch at the limit takes
    "chunk",  # log of the tokens of an iteration, relative to a prompt
    "chunk_share",  # log of them, relative to what the service has
    "prompt",  # log of a prompt, relative to an output
)


class Configuration(NamedTuple):
    """Where new replicas go, the build that runs, and how it batches."""

    pool: str
    variant: str
    max_batch: int
    batch_wait_s: float
    chunk_tokens: int | None = None  # None: as it is


def deployed(situation: Situation) -> Configuration:
    """What the service has when nobody chooses: its first pool and variant."""
    service = situation.service
    return Configuration(
        service.pools[0],
        service.variants[0].name,
        service.server.max_batch,
        service.server.batch_wait_ms / 1e3,
        service.llm.chunk_tokens if service.llm and service.llm.scheduler == "chunked" else None,
    )


def candidates(situation: Situation) -> list[Configuration]:
    """All that a service may have, as it is deployed first: quarters of the batch limit down to 1, and `WAITS`; of an
    LLM service, `LLM_LIMITS` and `LLM_CHUNKS`."""
    service, first = situation.service, deployed(situation)
    largest = service.server.max_batch
    batches: list[tuple[int, float, int | None]]
    if service.llm is not None:
        limits = sorted({max(1, round(share * largest)) for share in LLM_LIMITS})
        chunks: list[int | None] = [None]
        if first.chunk_tokens is not None:
            several = {round(share * first.chunk_tokens) for share in LLM_CHUNKS}
            chunks = sorted(np.clip(list(several), 1, MAX_TOKENS).tolist())
        batches = [(limit, 0.0, chunk) for limit in limits for chunk in chunks]
    else:
        limits = sorted({1, *(max(1, largest >> k) for k in range(0, largest.bit_length(), 2))})
        waits = sorted({first.batch_wait_s, *(share * service.slo_s for share in WAITS)})
        # one that is full at once never waits
        batches = [(limit, w, None) for limit in limits for w in (waits if limit > 1 else waits[:1])]
    places = [(p, v.name) for p in service.pools for v in service.variants if p in v.latency]
    found = [Configuration(pool, name, *batch) for pool, name in places for batch in batches]
    return list(dict.fromkeys([first, *found]))


def as_if(situation: Situation, chosen: Configuration, history_rps: np.ndarray | None = None) -> Situation:
    """The situation of a service that has nothing but one configuration."""
    service, llm = situation.service, situation.service.llm
    if llm is None:
        server = service.server.replace(max_batch=chosen.max_batch, batch_wait_ms=1e3 * chosen.batch_wait_s)
    else:
        chunk = llm.chunk_tokens if chosen.chunk_tokens is None else chosen.chunk_tokens
        llm, server = llm.replace(max_batch=chosen.max_batch, chunk_tokens=chunk), BatchServer()
    one = service.replace(
        pools=(chosen.pool,),
        variants=tuple(v for v in service.variants if v.name == chosen.variant),
        server=server,
        llm=llm,
    )
    return replace(
        situation, service=one, history_rps=situation.history_rps if history_rps is None else history_rps
    )


def features(situation: Situation, options: Sequence[Configuration]) -> np.ndarray:
    """FEATURES of some candidates, float64 of shape (candidates, len(FEATURES)); LLM_FEATURES of an LLM service's.

    The load is that of the situation's history; without any, what one replica as it is deployed can serve.
    """
    service, tick_s = situation.service, situation.tick_s
    past = situation.history_rps[-max(1, round(_RECENT_S / tick_s)) :]
    hour = float(past.mean()) if len(past) else situation.capacity_rps()
    recent = float(past[-max(1, round(300 / tick_s)) :].mean()) if len(past) else hour
    load = max(recent, hour, 1e-6)
    by_name = {variant.name: variant for variant in service.variants}
    missed_usd = (service.economics.late_usd + service.economics.dropped_usd) / 2
    outside_s, _ = service.server.overhead_law()
    flying, slo_s = service.server.batches_in_flight, service.slo_s
    best = max(by_name[one.variant].accuracy for one in options)
    prices = {one.pool: max(situation.pools[one.pool].price_usd_per_hour, 1e-6) for one in options}
    rents, rows, first = [], [], deployed(situation)
    for one in options:
        pool, variant, price = situation.pools[one.pool], by_name[one.variant], prices[one.pool]
        alone = as_if(situation, one)
        times_s = alone.batch_times_s()[: _supplied(alone.service)]
        sizes = np.arange(1, len(times_s) + 1)
        capacity = float(np.max(sizes / times_s)) * flying
        count = max(1.0, math.ceil(1.2 * load / capacity))
        enough = sizes / times_s * flying >= load / count
        by_load = int(sizes[np.argmax(enough)]) if enough.any() else len(sizes)
        usual = int(np.clip(max(by_load, round(1 + load * one.batch_wait_s)), 1, len(sizes)))
        away_s = outside_s + pool.network_ms / 1e3
        fill_s = (one.max_batch - 1) / load
        started_s = min(one.batch_wait_s, fill_s)
        start_up_s = pool.boot_s / (1 - pool.provisioning_failure) + variant.start_up_s
        market = pool.spot.market if pool.spot else None
        lost = market.per_hour * start_up_s / 3600 if isinstance(market, Hazard) else 0.0
        wrong_usd = service.economics.error_usd * (best - variant.accuracy) * capacity * 3600
        rents.append((price / capacity, price * count))
        rows.append(
            {
                "as_deployed": float(one == first),
                "rent_one": math.log(price / min(prices.values())),
                "replicas": math.log1p(load / capacity),
                "rounding": math.ceil(load / capacity) - load / capacity,
                "full": math.log((times_s[-1] + one.batch_wait_s + away_s) / slo_s),
                "alone": math.log((times_s[0] + away_s) / slo_s),
                "typical": math.log((times_s[usual - 1] + started_s + away_s) / slo_s),
                "wait": one.batch_wait_s / slo_s,
                "filling": math.log(max(fill_s, 1e-4 * slo_s) / slo_s),
                "limit": math.log(one.max_batch),
                "limit_share": math.log(one.max_batch / service.server.max_batch),
                "stake": math.log(max(missed_usd * capacity * 3600, 1e-6) / price),
                "errors": math.log1p(max(wrong_usd, 0.0) / price),
                "start_up": math.log(max(start_up_s, 1.0) / 60),
                "spot": float(pool.spot is not None),
                "interrupted": math.log1p(100 * lost),
                "failing": pool.provisioning_failure,
                "noise": variant.latency[one.pool].noise_cv,
                "peak": math.log(max(float(past.max()) if len(past) else load, load) / load),
                "trend": math.log(max(recent, 1e-3 * load) / max(hour, 1e-3 * load)),
                "closed": float(service.server.former == "closed"),
            }
            | (_iterations(alone.service, usual, len(sizes)) if service.llm else {})
        )
        if one.chunk_tokens is not None:
            rows[-1]["chunk_share"] = math.log(one.chunk_tokens / (first.chunk_tokens or 1))
    per_request, whole = np.log(np.array(rents)).T
    for row, rent, rent_whole in zip(rows, per_request - per_request.min(), whole - whole.min(), strict=True):
        row |= {"rent": float(rent), "rent_whole": float(rent_whole)}
    names = names_of(service)
    return np.clip(np.array([[row[name] for name in names] for row in rows]), -_LIMIT, _LIMIT)


def names_of(service: Service) -> tuple[str, ...]:
    """The features of a service's candidates."""
    return FEATURES if service.llm is None else LLM_FEATURES


def _supplied(service: Service) -> int:
    """The largest batch; of an LLM service, that is kept supplied: of its tokens, an iteration must leave enough for
    prefills to take the place of what ends."""
    llm = service.llm
    if llm is None or service.tokens is None or llm.scheduler != "chunked" or llm.role != "unified":
        return service.server.max_batch
    prompt, output = service.tokens.means
    return max(1, min(service.server.max_batch, int(llm.chunk_tokens * output / (prompt + output))))


def _iterations(service: Service, usual: int, full: int) -> dict[str, float]:
    """What only LLM services have, of one with a single pool and variant."""
    llm, tokens = service.llm, service.tokens
    law = service.variants[0].latency[service.pools[0]]
    assert llm is not None
    assert tokens is not None
    assert isinstance(law, IterationLaw)
    (prompt, output), (_, tpot_s, _) = tokens.means, llm.objectives.seconds
    chunk = llm.chunk_tokens if llm.scheduler == "chunked" else llm.max_tokens
    first_s = waits_s(llm.replace(objectives=Objectives()), law, tokens.means, full)
    held = prompt + output / 2  # of the KV cache, by a request half-way

    def log(x: float) -> float:
        return math.log(max(x, 1e-6))

    found = {
        "memory": log((law.kv_blocks or llm.blocks) * llm.block_tokens / (service.server.max_batch * held)),
        "chunk": log(chunk / prompt),
        "chunk_share": 0.0,
        "prompt": log(prompt / output),
    }
    for name, n in (("alone", 1), ("typical", usual), ("full", full)):
        prefill = max(chunk - n, 1)
        mixed_s = law.seconds(prefill, n, n * held, prefill * min(prefill, prompt))
        found[name] = log(first_s[n - 1] / service.slo_s)
        found[f"token_{name}"] = log((law.decode or law).seconds(0, n, n * held, 0) / tpot_s)
        found[f"mixed_{name}"] = log(mixed_s / tpot_s)
        found[f"supply_{name}"] = log(prefill / prompt * output / n)
    return found


@cache
def _learned() -> Foresight:
    path = Path(__file__).with_name("learned.json")
    found: Foresight = decode(read_json(path, "the shipped policy"), Foresight, str(path))
    return found


class Configured(Policy, frozen=True, kw_only=True, tag="configured"):
    """Pool, variant, batch limit and wait (of an LLM service: the tokens of an iteration) by a network's score, the
    number of replicas by another policy.

    Pool and variant are chosen when the run begins. A service that has replicas by then is rolled over to the variant;
    its pool counts for new replicas. The rest is chosen anew every `period_min`, from the load by then. `network`
    chooses for servers that batch, `llm_network` for LLM services; without one, a service stays as it is deployed.
    Batch limit and tokens are multiplied by `limit_scale` and `chunk_scale`, which adapts a trained network to one
    service by a search over two numbers. Without `replicas`, these are decided by the `learned` policy that comes with
    the package.
    """

    network: Network | None = None
    llm_network: Network | None = None
    replicas: Foresight | Anticipate | Predictive | None = None
    period_min: Annotated[float, Meta(ge=1, le=1440)] = 30.0
    limit_scale: Annotated[float, Meta(ge=0.25, le=4, extra={"log": True})] = 1.0
    chunk_scale: Annotated[float, Meta(ge=0.25, le=4, extra={"log": True})] = 1.0

    def __post_init__(self) -> None:
        for network, names in ((self.network, FEATURES), (self.llm_network, LLM_FEATURES)):
            if network is not None:
                network.must_map(len(names), 1)
                if network.memory is not None:
                    raise SpecError("the network of a configuration has a memory; valid: one without")

    def choose(self, situation: Situation, options: Sequence[Configuration]) -> Configuration:
        """The one of some candidates with the least score, the first among equals."""
        network = self.network if situation.service.llm is None else self.llm_network
        if network is None:
            return deployed(situation)
        known = candidates(situation)  # features are relative to all of them
        scores = dict(zip(known, Forward(network)(features(situation, known))[:, 0].tolist(), strict=True))
        return min(options, key=scores.__getitem__)

    def adapted(self, situation: Situation, chosen: Configuration) -> Configuration:
        """A choice with its batch limit and tokens scaled, within what the service may have."""
        limit, tokens = round(self.limit_scale * chosen.max_batch), chosen.chunk_tokens
        if tokens is not None:
            tokens = int(np.clip(round(self.chunk_scale * tokens), 1, MAX_TOKENS))
        limit = int(np.clip(limit, 1, situation.service.server.max_batch))
        return chosen._replace(max_batch=limit, chunk_tokens=tokens)

    def begin(self, situation: Situation) -> Controller:
        return _Configured(self, situation)


class _Configured:
    def __init__(self, policy: Configured, situation: Situation) -> None:
        self._policy, self._situation = policy, situation
        self._past = situation.history_rps.tolist()
        self._pace = Pace(60 * policy.period_min, situation.tick_s)
        self._options = candidates(situation)
        self._first = True
        self._take(policy.choose(situation, self._options))
        self._options = [o for o in self._options if o[:2] == self._chosen[:2]]

    def _take(self, chosen: Configuration) -> None:
        self._chosen, self._wanted = chosen, self._policy.adapted(self._situation, chosen)
        replicas = self._policy.replicas or _learned()
        self._replicas = replicas.begin(as_if(self._situation, self._wanted, np.array(self._past)))

    def decide(self, seen: Observation) -> Decision:
        rate = seen["arrival_rate"]
        if not self._first:  # the first observation is older than the run; the history has it
            self._past.append(rate if rate == rate else (self._past[-1] if self._past else 0.0))
        if self._pace.due(seen.now_s) and not self._first:
            now = replace(self._situation, history_rps=np.array(self._past))
            if (better := self._policy.choose(now, self._options)) != self._chosen:
                self._take(better)
        self._first = False
        pool, variant, limit, wait_s, tokens = self._wanted
        within = f"within {1e3 * wait_s:.0f} ms" if tokens is None else f"and {tokens} tokens"
        wanted = self._replicas.decide(seen)
        return msgspec.structs.replace(
            wanted,
            pool=pool,
            variant=variant,
            max_batch=limit,
            batch_wait_s=wait_s,
            chunk_tokens=tokens,
            reason=f"{wanted.reason}; {variant} on {pool}, batches of {limit} {within}",
        )
