"""A service: a deployed model with its traffic, objective, economics, builds and limits."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from pilotage.world.arrivals import Traffic
from pilotage.world.servers import BatchServer, Constant, RequestDemand, Variant
from pilotage.world.spec import Count, Name, NonNegative, Positive, PositiveCount, Spec, SpecError


class Economics(Spec, frozen=True, kw_only=True):
    """What a request costs when it goes wrong, in dollars: late, dropped, or answered wrongly."""

    late_usd: NonNegative = 0.0
    dropped_usd: NonNegative = 0.0
    error_usd: NonNegative = 0.0


class Service(Spec, frozen=True, kw_only=True):
    """A deployed model. `pools` lists where it may run, in order of preference; the first variant is live.

    A request is late when its latency exceeds `slo_ms`.
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

    def __post_init__(self) -> None:
        if self.min_replicas > self.max_replicas:
            raise SpecError(f"min_replicas {self.min_replicas} exceeds max_replicas {self.max_replicas}")
        if self.initial_replicas > self.max_replicas:
            raise SpecError(
                f"initial_replicas {self.initial_replicas} exceeds max_replicas {self.max_replicas}"
            )
        for pool in self.pools:
            if pool not in self.variants[0].latency:
                raise SpecError(
                    f"variant {self.variants[0].name!r} has no latency law for pool {pool!r}; "
                    f"it has laws for: {', '.join(self.variants[0].latency)}"
                )

    @property
    def slo_s(self) -> float:
        return self.slo_ms / 1e3
