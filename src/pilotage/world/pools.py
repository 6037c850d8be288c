"""Pools: target environments made of nodes of one kind, and how nodes come, fail and go."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from pilotage.world.faults import Spot
from pilotage.world.spec import Name, NonNegative, PositiveCount, Probability, Spec, SpecError

RESOURCES: Final = ("cpu", "memory_gib", "gpus", "gpu_memory_gib")


class Resources(Spec, frozen=True, kw_only=True):
    """What a node has, or a replica needs: CPU cores, memory, GPUs (a share of one is allowed), GPU memory.

    The GPUs of a node are one amount, and so is their memory: where a share must not straddle two GPUs, give
    the pool nodes with one.
    """

    cpu: NonNegative = 0.0
    memory_gib: NonNegative = 0.0
    gpus: NonNegative = 0.0
    gpu_memory_gib: NonNegative = 0.0

    def __post_init__(self) -> None:
        if not any(self.vector):
            raise SpecError(
                f"all resources are 0; give at least one of {', '.join(RESOURCES)}, or none at all"
            )

    @property
    def vector(self) -> tuple[float, ...]:
        """The amounts in the order of RESOURCES."""
        return tuple(getattr(self, name) for name in RESOURCES)

    def shortfall(self, node: Resources) -> list[str]:
        """The resources of which a node has less than these, in words."""
        both = zip(RESOURCES, self.vector, node.vector, strict=True)
        return [f"{has:g} of {need:g} {name}" for name, need, has in both if need > has]

    def copies_on(self, node: Resources) -> int:
        """How many times these fit on an empty node."""
        both = zip(self.vector, node.vector, strict=True)
        return min(int(has / need + 1e-9) for need, has in both if need > 0)


class Pool(Spec, frozen=True, kw_only=True):
    """Nodes of one kind, opened when a replica needs one and paid for from order to removal.

    `node` says what a node has; without it, or for a variant that does not say what it needs, a node carries
    one replica. A node that was ordered boots for `boot_s` (log-normal with coefficient of variation
    `boot_cv`); with probability `provisioning_failure` it turns out then that it never comes, and it is not
    billed. `max_nodes` is the limit over all `zones`. A node that has been empty for `idle_removal_s` is
    removed. A replica whose node is younger than `min_lifetime_s` is not released. The bill of a node is its
    life, at least `billing_minimum_s`, rounded up to whole `billing_granularity_s` (0: exact time).
    `network_ms` is added to the latency of every request served here.

    A node crashes at a rate of `crashes_per_hour`; a share `slow_share` of the nodes serves batches
    `slow_factor` times as slowly. `spot` nodes are interrupted besides.
    """

    name: Name
    price_usd_per_hour: NonNegative
    boot_s: NonNegative = 0.0
    boot_cv: NonNegative = 0.0
    max_nodes: PositiveCount = 100
    min_lifetime_s: NonNegative = 0.0
    billing_granularity_s: NonNegative = 0.0
    billing_minimum_s: NonNegative = 0.0
    network_ms: NonNegative = 0.0
    node: Resources | None = None
    zones: Annotated[tuple[Name, ...], Meta(min_length=1)] = ("local",)
    idle_removal_s: NonNegative = 0.0
    provisioning_failure: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    crashes_per_hour: NonNegative = 0.0
    slow_share: Probability = 0.0
    slow_factor: Annotated[float, Meta(ge=1, le=100)] = 1.0
    spot: Spot | None = None

    def __post_init__(self) -> None:
        if len(set(self.zones)) < len(self.zones):
            raise SpecError(f"zones {', '.join(self.zones)}: a zone is named twice; names must differ")
        if self.spot:
            self.spot.market.check_zones(self.zones)
