"""A service: a deployed model with its traffic, objective, economics, builds and limits."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from pilotage.world.arrivals import Traffic
from pilotage.world.lifecycle import Lifecycle
from pilotage.world.pools import Pool
from pilotage.world.servers import BatchServer, Constant, RequestDemand, Variant
from pilotage.world.spec import Count, Name, NonNegative, Positive, PositiveCount, Spec, SpecError


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

    def __post_init__(self) -> None:
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
