"""A scenario in numbers: the arrays that compiled code reads and never writes.

`Numbers.laws` has shape (variants, pools), `preference` (services, pools), `zone_ok` (services, zones), `slowdown`
(services, services) or (0, 0) without interference, `tables` (tables, 2 * TABLE_CELLS).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pilotage.control.placing import shipped
from pilotage.engine.layout import (
    CENTRAL,
    CLOSURE,
    FORMERS,
    LAW,
    LEAST_OUTSTANDING,
    PARAMETERS,
    POOL,
    RAY_SERVE,
    ROUTINGS,
    VARIANT,
    Numbers,
)
from pilotage.engine.placement import PAIRWISE
from pilotage.scenario import Placement, Scenario
from pilotage.world.pools import RESOURCES, Pool
from pilotage.world.servers import TABLE_CELLS, Router, Variant, log_normal_table
from pilotage.world.services import Service
from pilotage.world.spec import SpecError

_UNLIMITED = np.iinfo(np.int64).max


class _Tables:
    """Quantile tables, each kept once; the law that is always 1 is number -1."""

    def __init__(self) -> None:
        self.known: dict[bytes, int] = {}

    def number(self, table: np.ndarray) -> int:
        if (table == 1.0).all():
            return -1
        return self.known.setdefault(table.tobytes(), len(self.known))

    def array(self) -> np.ndarray:
        if not self.known:
            return np.ones((1, 2 * TABLE_CELLS))
        return np.array([np.frombuffer(raw) for raw in self.known])


def zone_names(scenario: Scenario) -> list[str]:
    """Every zone of every pool, in the order in which they are first named."""
    return list(dict.fromkeys(zone for pool in scenario.pools for zone in pool.zones))


def data_path(scenario: Scenario) -> Path | None:
    return Path(scenario.data) if scenario.data else None


def _at_notice(placement: Placement) -> str:
    if placement.at_notice is not None:
        return placement.at_notice
    return shipped().at_notice if placement.rule in PAIRWISE and not placement.weights else "drain"


def encode(scenario: Scenario) -> tuple[Numbers, np.ndarray]:
    """The numbers of a scenario, and the parameters of one world's rows (services), laid out from 0."""
    tables, names = _Tables(), zone_names(scenario)
    zones = np.array([names.index(zone) for pool in scenario.pools for zone in pool.zones])
    ends = np.cumsum([len(pool.zones) for pool in scenario.pools])
    pools = np.zeros(len(scenario.pools), POOL)
    for p, pool in enumerate(scenario.pools):
        _encode_pool(pools[p], pool, tables, data_path(scenario))
        pools[p]["replace_first"] = _at_notice(scenario.placement) == "replace-first"
        pools[p]["zone_lo"], pools[p]["zone_hi"] = ends[p] - len(pool.zones), ends[p]
    pool_names = [pool.name for pool in scenario.pools]
    count = sum(len(service.variants) for service in scenario.services)
    variants, laws, times = np.zeros(count, VARIANT), np.zeros((count, len(pools)), LAW), []
    laws["offset"] = -1
    preference = np.full((len(scenario.services), len(pools)), -1)
    zone_ok = np.zeros((len(scenario.services), len(names)), np.uint8)
    one = np.zeros(len(scenario.services), PARAMETERS)
    v, offset = 0, 0
    for s, service in enumerate(scenario.services):
        one[s] = _parameters(scenario, service, s, tables)
        one[s]["variant_lo"], one[s]["variant_hi"] = v, v + len(service.variants)
        zone_ok[s] = [service.zones is None or zone in service.zones for zone in names]
        for preferred, name in enumerate(service.pools):
            preference[s, pool_names.index(name)] = preferred
        for variant in service.variants:
            _encode_variant(variants[v], variant, tables)
            for name in set(service.pools) & set(variant.latency):
                law = variant.latency[name]
                idle = law.idle.seconds if law.idle else (0.0, 1.0, 1.0)
                stalls = (law.stalls.per_s, law.stalls.mean_ms / 1e3) if law.stalls else (0.0, 1.0)
                noise = tables.number(log_normal_table(law.noise_cv))
                laws[v, pool_names.index(name)] = offset, noise, *idle, *stalls
                fixed, variable = service.batch_times_s(law)
                per_request = variable / np.maximum(np.arange(len(variable)), 1)
                times.append(np.stack([fixed, per_request], axis=1).reshape(-1))
                offset += len(times[-1])
            v += 1
    services = [service.name for service in scenario.services]
    slowdown = np.ones((len(services),) * 2 if scenario.interference else (0, 0))
    for pair in scenario.interference:
        slowdown[services.index(pair.service), services.index(pair.neighbour)] = pair.slowdown
    numbers = Numbers(
        pools, zones, variants, laws, np.concatenate(times), tables.array(), preference, zone_ok, slowdown
    )
    return numbers, one


def side_by_side(scenarios: Sequence[Scenario]) -> tuple[Numbers, np.ndarray]:
    """The numbers of scenarios that differ in nothing but the mean batch times of their variants, with a world of each
    after another in the parameters, laid out from 0. Raises SpecError where they differ in more."""
    found = [encode(scenario) for scenario in scenarios]
    first, one = found[0]
    variants, laws, times, params = [], [], [], []
    for k, (numbers, own) in enumerate(found):
        same = all(
            np.array_equal(getattr(numbers, name), getattr(first, name))
            for name in Numbers._fields
            if name != "times"
        )
        if not (same and len(numbers.times) == len(first.times) and np.array_equal(own, one)):
            raise SpecError(
                f"scenario {k} of those side by side differs from the first in more than batch times; "
                "valid: the same pools, services, variants and noise"
            )
        shifted = numbers.laws.copy()
        shifted["offset"] += np.where(shifted["offset"] >= 0, k * len(first.times), 0)
        own = own.copy()
        for name in ("variant_lo", "variant_hi"):
            own[name] += k * len(first.variants)
        variants.append(numbers.variants)
        laws.append(shifted)
        times.append(numbers.times)
        params.append(own)
    both = {"variants": variants, "laws": laws, "times": times}
    return first._replace(**{k: np.concatenate(v) for k, v in both.items()}), np.concatenate(params)


def lay_out(one: np.ndarray, worlds: int) -> np.ndarray:
    """The parameters of all rows; what one world's `_hi` fields give as sizes becomes slices of the state."""
    params = np.tile(one, worlds)
    for field in ("replica", "slot", "winner", "tree", "router"):
        ends = np.cumsum(params[f"{field}_hi"])
        params[f"{field}_lo"], params[f"{field}_hi"] = np.r_[0, ends[:-1]], ends
    return params


def _encode_pool(record: np.void, pool: Pool, tables: _Tables, data: Path | None) -> None:
    saving = pool.spot.market.saving(data) if pool.spot else 0.0
    record["usd_per_s"] = pool.price_usd_per_hour * (1 - saving) / 3600
    record["boot_s"] = pool.boot_s
    record["boot_table"] = tables.number(log_normal_table(pool.boot_cv))
    record["max_nodes"] = pool.max_nodes
    record["min_lifetime_s"] = pool.min_lifetime_s
    record["granularity_s"] = pool.billing_granularity_s
    record["minimum_s"] = pool.billing_minimum_s
    record["network_s"] = pool.network_ms / 1e3
    record["has"] = pool.node.vector if pool.node else np.zeros(len(RESOURCES))
    record["whole"] = pool.node is None
    record["idle_removal_s"] = pool.idle_removal_s
    record["failing"] = pool.provisioning_failure
    record["crashes_per_s"] = pool.crashes_per_hour / 3600
    record["slow_share"], record["slow_factor"] = pool.slow_share, pool.slow_factor
    if pool.spot:
        record["spot"] = 1
        record["interruptions_per_s"] = pool.spot.market.interruptions_per_hour(data) / 3600
        record["notice_s"], record["grace_s"] = pool.spot.notice_s, pool.spot.grace_s


def _encode_variant(record: np.void, variant: Variant, tables: _Tables) -> None:
    record["needs"] = variant.resources.vector if variant.resources else np.zeros(len(RESOURCES))
    record["whole"] = variant.resources is None
    record["error_share"] = 1 - variant.accuracy
    record["pull_s"] = variant.image_pull_s
    record["pull_table"] = tables.number(log_normal_table(variant.image_pull_cv))
    record["load_s"], table = variant.load_law()
    record["load_table"] = tables.number(table)
    record["warm_share"] = variant.warm_load_share


def _parameters(scenario: Scenario, service: Service, s: int, tables: _Tables) -> np.ndarray:
    """Parameters of one row; the `_hi` fields of its storage hold sizes until they are laid out."""
    server = service.server
    record = np.zeros((), PARAMETERS)
    record["slo_s"] = service.slo_s
    record["timeout_s"] = np.inf if server.request_timeout_s is None else server.request_timeout_s
    record["patience_s"] = np.inf if server.patience_s is None else server.patience_s
    record["abandoning"] = (
        -np.expm1(-record["timeout_s"] / record["patience_s"]) if server.patience_s else 0.0
    )
    record["batch_wait_s"] = server.batch_wait_ms / 1e3
    record["queue_limit"] = _UNLIMITED if server.queue_limit is None else server.queue_limit
    record["batch_limit"] = server.max_batch
    record["former"] = FORMERS[server.former]
    record["routing"] = ROUTINGS[server.routing]
    record["slots"] = server.batches_in_flight
    record["service"] = s
    record["demand"] = tables.number(service.demand.table())
    record["retry"] = service.on_failure == "retry"
    record["crashes_per_s"] = service.crashes_per_hour / 3600
    record["max_per_node"] = _UNLIMITED if service.max_per_node is None else service.max_per_node
    # replicas that drain keep their place, so that a row may hold more than max_replicas for a while
    replicas = min(room(scenario, service), 2 * service.max_replicas + 8)
    record["replica_hi"] = replicas
    record["slot_hi"] = replicas * server.batches_in_flight
    record["winner_hi"] = _tree(int(record["slot_hi"])) if record["routing"] == CENTRAL else 0
    record["tree_hi"] = _tree(replicas) if record["routing"] == LEAST_OUTSTANDING else 0
    record["initial"] = service.initial_replicas
    record["missed_usd"] = (service.economics.late_usd + service.economics.dropped_usd) / 2
    record["overhead_s"], table = server.overhead_law()
    record["overhead_table"] = tables.number(table)
    record["router_hi"] = record["routing"] == RAY_SERVE
    router = server.router or Router()
    for name in router.__struct_fields__:
        value = getattr(router, name)
        if name.endswith("_ms"):
            record[f"{name[:-3]}_s"] = value / 1e3
        else:
            record[name] = value
    return record


def _tree(leaves: int) -> int:
    """The size of a binary tree with so many leaves, or the next power of two."""
    return 2 << max(int(leaves) - 1, 0).bit_length()


def room(scenario: Scenario, service: Service) -> int:
    """No fewer than the replicas that all nodes of the service's pools could carry, draining ones included: those
    are of all variants, and `max_per_node` does not count them."""
    total = 0
    for name in service.pools:
        pool, per_node = scenario.pool_by_name[name], 1
        sharing = [v.resources for v in service.variants if v.resources]
        if pool.node and sharing:
            least = np.min([resources.vector for resources in sharing], axis=0)
            needed = least > 0
            copies = np.array(pool.node.vector)[needed] / least[needed] + 1e-9
            apart = sum(resources.copies_on(pool.node) for resources in sharing)
            per_node = max(int(np.min(copies, initial=apart)), 1)
        total += pool.max_nodes * per_node
    return total


def closures(scenario: Scenario, start_s: float, rng: np.random.Generator) -> np.ndarray:
    """When which pool gives no nodes in which zone and takes back all, during the run that starts at `start_s`
    of the traffic's clock: outages, and what a recorded spot market did. CLOSURE records, in the run's time.
    """
    names, horizon_s = zone_names(scenario), scenario.horizon_h * 3600
    down = [(o.zone, o.start_h * 3600, (o.start_h + o.duration_h) * 3600) for o in scenario.outages]
    if scenario.random_outages:
        for zone, windows in scenario.random_outages.windows(rng, names, horizon_s).items():
            down += [(zone, *window) for window in windows]
    found = []
    for p, pool in enumerate(scenario.pools):
        found += [(p, names.index(zone), begin, end, 0.0) for zone, begin, end in down if zone in pool.zones]
        if pool.spot is None:
            continue
        for zone in pool.zones:
            notice_s = pool.spot.notice_s
            windows = pool.spot.market.closed_s(
                zone, start_s, start_s + horizon_s, data_path(scenario), notice_s
            )
            found += [(p, names.index(zone), a - start_s, b - start_s, notice_s) for a, b in windows]
    return np.array(found, CLOSURE)
