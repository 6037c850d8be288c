"""Pools: target environments made of nodes of one kind."""

from __future__ import annotations

from pilotage.world.spec import Name, NonNegative, PositiveCount, Spec


class Pool(Spec, frozen=True, kw_only=True):
    """Nodes of one kind. A node carries one replica and is paid for from order to removal.

    A node that was ordered boots for `boot_s` (log-normal with coefficient of variation `boot_cv`), then the
    replica's model loads. A replica younger than `min_lifetime_s` is not released. The bill of a node is its
    life, at least `billing_minimum_s`, rounded up to whole `billing_granularity_s` (0: exact time).
    `network_ms` is added to the latency of every request served here.
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
