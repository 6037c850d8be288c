"""A service: a deployed model with its traffic, objective, economics, builds and limits."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.world.arrivals import Handover, Traffic
from pilotage.world.lifecycle import Lifecycle
from pilotage.world.llm import LLMServer, batch_times_s, waits_s
from pilotage.world.pools import Pool
from pilotage.world.servers import BatchServer, Constant, IterationLaw, LatencyLaw, RequestDemand, Variant
from pilotage.world.spec import Count, Name, NonNegative, Positive, PositiveCount, Spec, SpecError
from pilotage.world.tokens import RequestTokens


class Economics(Spec, frozen=True, kw_only=True):
    """What a request costs when it goes wrong, in dollars: late, dropped, or answered wrongly."""

    late_usd: NonNegative = 0.0
    dropped_usd: NonNegative = 0.0
    error_usd: NonNegative = 0.0


class Service(Spec, frozen=True, kw_only=True):
    """A deployed model. `pools` lists where it may run, in order of preference; the first variant is live at
    the start, and a policy may switch to another. `zones` (None: all) and `max_per_node` bound where its
    replicas go.

    A request is late when its latency exceeds `slo_ms`. What executes or waits on a replica that dies is
    served anew from the start (`on_failure` *retry*) or *lost*. A replica's process crashes at a rate of
    `crashes_per_hour` and is restarted on its node. `lifecycle` says how the model decays (None: it does not).

    With `llm`, an LLM service, `tokens` says how long its requests are, and latency laws are those of iterations. Its
    latency is the time to first token, and `slo_ms` the objective for that; a request is late when it misses this one
    or another of `llm.objectives`. Of a decode service, latency is the time per token after the first, and `slo_ms`
    the objective for that; its traffic is a `Handover`. An LLM service has no `server` of its own (that is set to one
    with its `max_batch`), no `demand` and, as yet, no `lifecycle`, no queue limit and no impatient clients.
    """

    name: Name
    traffic: Traffic
    slo_ms: Positive
    pools: Annotated[tuple[Name, ...], Meta(min_length=1)]
    variants: Annotated[tuple[Variant, ...], Meta(min_length=1)]
    server: BatchServer = BatchServer()
    economics: Economics = Economics()
    demand: RequestDemand = Constant()
    min_replicas: Count = 1
    max_replicas: PositiveCount = 100
    initial_replicas: Count = 1
    zones: Annotated[tuple[Name, ...], Meta(min_length=1)] | None = None
    max_per_node: PositiveCount | None = None
    on_failure: Literal["retry", "lost"] = "retry"
    crashes_per_hour: NonNegative = 0.0
    lifecycle: Lifecycle | None = None
    llm: LLMServer | None = None
    tokens: RequestTokens | None = None

    def __post_init__(self) -> None:
        self._check_llm()
        if self.min_replicas > self.max_replicas:
            raise SpecError(f"min_replicas {self.min_replicas} exceeds max_replicas {self.max_replicas}")
        if self.initial_replicas > self.max_replicas:
            raise SpecError(
                f"initial_replicas {self.initial_replicas} exceeds max_replicas {self.max_replicas}"
            )
        for what, given in (("pools", self.pools), ("zones", self.zones or ())):
            if len(set(given)) < len(given):
                raise SpecError(f"{what} {', '.join(given)}: one is named twice; names must differ")
        names = [variant.name for variant in self.variants]
        for name in names:
            if names.count(name) > 1:
                raise SpecError(f"variant name {name!r} is used {names.count(name)} times; names must differ")
        for pool in self.pools:
            if pool not in self.variants[0].latency:
                raise SpecError(
                    f"variant {self.variants[0].name!r} has no latency law for pool {pool!r}; "
                    f"it has laws for: {', '.join(self.variants[0].latency)}"
                )
        for variant in self.variants:
            if not set(self.pools) & set(variant.latency):
                raise SpecError(
                    f"variant {variant.name!r} has no latency law for any of the service's pools; "
                    f"give one for at least one of: {', '.join(self.pools)}"
                )

    @property
    def slo_s(self) -> float:
        return self.slo_ms / 1e3

    def replicas_on_node(self, variant: Variant, pool: Pool) -> int:
        """How many replicas of a variant one empty node of a pool takes."""
        if pool.node is None or variant.resources is None:
            return 1
        fitting = variant.resources.copies_on(pool.node)
        return fitting if self.max_per_node is None else min(fitting, self.max_per_node)

    def _check_llm(self) -> None:
        """What belongs to an LLM service stands in one, and what does not, does not."""
        laws = [law for variant in self.variants for law in variant.latency.values()]
        if isinstance(self.traffic, Handover) != (self.llm is not None and self.llm.role == "decode"):
            raise SpecError(
                "traffic of kind 'handover' and llm.role 'decode' belong together; give both or none"
            )
        if self.llm is None:
            if self.tokens is not None:
                raise SpecError("tokens are given without llm; they belong to an LLM service")
            if any(isinstance(law, IterationLaw) for law in laws):
                raise SpecError(
                    "a latency law is of kind 'iteration', which belongs to an LLM service; give llm"
                )
            return
        if self.tokens is None:
            raise SpecError("llm is given without tokens: how long are its requests?")
        if not all(isinstance(law, IterationLaw) for law in laws):
            raise SpecError("an LLM service has latency laws of kind 'iteration' only")
        if self.lifecycle is not None or self.demand != Constant():
            raise SpecError(
                "an LLM service has no demand (its requests have tokens) and, as yet, no lifecycle"
            )
        unasked = {"unified": ("ttft",), "prefill": ("ttft", "tpot", "e2el"), "decode": ("ttft", "tpot")}
        for name in unasked[self.llm.role]:
            if getattr(self.llm.objectives, f"{name}_ms") is not None:
                raise SpecError(
                    f"objectives.{name}_ms: a {self.llm.role} service has slo_ms for its own objective; leave it out"
                )
        if self.llm.vidur:
            raise SpecError("vidur repeats a quirk of a simulator, which no fleet has; leave it out")
        server = BatchServer(max_batch=min(self.llm.max_batch, 1024))
        if self.server not in (BatchServer(), server):
            raise SpecError("server is given beside llm; an LLM service has no other server")
        msgspec.structs.force_setattr(self, "server", server)

    def batch_times_s(self, law: LatencyLaw) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a batch of n requests, the fixed part and the part in proportion to their demand, for n from 0 to
        the largest batch; of an LLM service, the time in which n requests at once are through."""
        if self.llm is not None and self.tokens is not None and isinstance(law, IterationLaw):
            times = batch_times_s(self.llm, law, self.tokens.means, self.server.max_batch)
            return times, np.zeros_like(times)
        return law.batch_times_s(self.server.max_batch)

    def waits_s(self, law: LatencyLaw) -> np.ndarray:
        """Seconds that a request may have to wait for its answer at a replica that takes n at once, for n from 1 to
        the largest batch: for the batch in flight and its own; of an LLM service, what `world.llm.waits_s` says."""
        if self.llm is not None and self.tokens is not None and isinstance(law, IterationLaw):
            return waits_s(self.llm, law, self.tokens.means, self.server.max_batch)
        fixed, variable = self.batch_times_s(law)
        times: np.ndarray = (fixed + variable)[1:]
        return 2 * times
