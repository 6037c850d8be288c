"""The reference simulator's second part: nodes, faults, placement, rollouts and bills of one world."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pilotage.engine.layout import CANDIDATE
from pilotage.engine.placement import PAIRWISE
from pilotage.world.pools import Pool
from pilotage.world.servers import log_normal_table
from tests.traces.reference import Replica, ServiceRun, exponential, quantile, uniform
from tests.traces.reference_log import count

_ROUNDING = 1e-9  # of times and resources, whose sums are not exact


@dataclass(eq=False)
class Node:
    ordinal: int
    pool: Pool
    zone: str
    owner: ServiceRun  # for whom it was opened
    pace: float
    free: list[float]
    ordered: float
    up: float
    emptied: float  # since when it has been empty
    comes: bool = True
    told: bool = False  # that it is to go, and somebody has looked
    notice: float = math.inf
    death: float = math.inf
    paid_s: float = 0.0
    replicas: list[Replica] = field(default_factory=list)
    cached: dict[tuple[ServiceRun, int], float] = field(default_factory=dict)  # from when on, by variant

    def end(self, until: float) -> float:
        """When it goes; `until` if it is there till then."""
        idle = math.inf if self.replicas else self.emptied + self.pool.idle_removal_s
        return min(until, self.death, idle)

    def pay(self, until: float) -> float:
        """The seconds that are added to its bill."""
        paid, pool = self.paid_s, self.pool
        if self.comes:
            self.paid_s = max(self.end(until) - self.ordered, pool.billing_minimum_s)
            if pool.billing_granularity_s:
                granules = math.ceil(self.paid_s / pool.billing_granularity_s - _ROUNDING)
                self.paid_s = granules * pool.billing_granularity_s
        return self.paid_s - paid


def is_whole(run: ServiceRun, variant: int, pool: Pool) -> bool:
    """Whether a replica has a node of the pool for itself."""
    return pool.node is None or run.service.variants[variant].resources is None


def needs(run: ServiceRun, variant: int, pool: Pool) -> tuple[float, ...]:
    """What a replica takes of a node."""
    return has(pool) if is_whole(run, variant, pool) else run.service.variants[variant].resources.vector


def has(pool: Pool) -> tuple[float, ...]:
    return pool.node.vector if pool.node else (0.0,) * 4


def dominant_share(replica: Replica) -> float:
    run, pool = replica.run, replica.node.pool
    if is_whole(run, replica.variant, pool):
        return 1.0
    return max(a / b for a, b in zip(needs(run, replica.variant, pool), has(pool), strict=True) if a > 0)


def serving_or_starting(run: ServiceRun) -> list[Replica]:
    return [r for r in run.present if r.state in ("starting", "ready")]


class Reference:
    """One world: services that share pools. Orders are the fields of ORDER.

    `rule` maps a CANDIDATE record to a score; `outages` is the generator of random outages.
    """

    def __init__(
        self, scenario: Any, arrivals: list[list[float]], seeds: list[dict[str, int]], seed_nodes: int,
        outages: np.random.Generator, rule: Any,
    ) -> None:  # fmt: skip
        self.scenario, self.now, self.rule, self.seed = scenario, 0.0, rule, seed_nodes
        self.pools, self.opened = scenario.pools, 0
        self.nodes: list[Node] = []  # in the order in which they were opened
        self.zones = list(dict.fromkeys(zone for pool in self.pools for zone in pool.zones))
        self.data = Path(scenario.data) if scenario.data else None
        self.shut = self.closures(outages)
        self.runs = [ServiceRun(*one) for one in zip(scenario.services, arrivals, seeds, strict=True)]
        self.rates: dict[ServiceRun, float] = {}  # of arrivals, smoothed
        self.costs = {run: [0.0, 0.0] for run in self.runs}  # dollars and seconds of the tick
        self.place()
        for node in self.nodes:
            node.up, node.comes = 0.0, True
            self.draw_fate(node)
        for run in self.runs:
            for replica in run.present:
                replica.node.cached[run, 0] = 0.0
                run.get_ready(replica)

    def advance(self, orders: list[tuple[int, int, int, int, int]]) -> list[dict[str, float]]:
        now, end = self.now, self.now + self.scenario.tick_s
        self.costs = {run: [0.0, 0.0] for run in self.runs}
        self.remove_gone_nodes()
        for run, order in zip(self.runs, orders, strict=True):
            self.decide(run, *order)
        self.act_on_notices()
        for run in self.runs:
            self.roll_out(run)
        self.remove_gone_nodes()
        self.place()
        self.set_paces()
        for run in self.runs:
            run.run(now, end)
        self.now = end
        self.send_bills()
        counts = [
            count(run, now, end)
            | {"seconds": self.scenario.tick_s, "node_usd": self.costs[run][0], "node_s": self.costs[run][1]}
            for run in self.runs
        ]
        for run, counted in zip(self.runs, counts, strict=True):
            rate, gain = counted["arrived"] / self.scenario.tick_s, min(self.scenario.tick_s / 60, 1)
            before = self.rates.get(run, rate)
            self.rates[run] = before + gain * (rate - before)
        return counts

    # --- nodes -----------------------------------------------------------------------------------------------
    def closures(self, outages: np.random.Generator) -> list[tuple[Pool, str, float, float, float]]:
        """Pool and zone, when its nodes are told to go, when they go, and when there are nodes again."""
        scenario, horizon = self.scenario, self.scenario.horizon_h * 3600
        windows = [(o.zone, o.start_h * 3600, (o.start_h + o.duration_h) * 3600) for o in scenario.outages]
        if scenario.random_outages:
            drawn = scenario.random_outages.windows(outages, self.zones, horizon)
            windows += [(zone, *window) for zone in drawn for window in drawn[zone]]
        found = []
        for pool in self.pools:
            for zone in pool.zones:
                found += [(pool, zone, start, start, end) for where, start, end in windows if where == zone]
                if pool.spot:
                    t0, notice = scenario.start_h * 3600, pool.spot.notice_s
                    for start, end in pool.spot.market.closed_s(
                        zone, t0, t0 + horizon, self.data, pool.spot.notice_s
                    ):
                        found.append((pool, zone, start - t0 - notice, start - t0, end - t0))
        return found

    def open_node(self, pool: Pool, zone: str, owner: ServiceRun) -> Node:
        number = 8 * self.opened
        boot = pool.boot_s * quantile(log_normal_table(pool.boot_cv).tolist(), uniform(self.seed, number))
        slow = uniform(self.seed, number + 2) < pool.slow_share
        pace, up = pool.slow_factor if slow else 1.0, self.now + boot
        node = Node(self.opened, pool, zone, owner, pace, list(has(pool)), self.now, up, self.now)
        node.comes = uniform(self.seed, number + 1) >= pool.provisioning_failure
        self.draw_fate(node)
        self.opened += 1
        self.nodes.append(node)
        return node

    def draw_fate(self, node: Node) -> None:
        """When it dies: by a crash, an interruption, the next closure of its zone, or because it never comes."""
        pool, number = node.pool, 8 * node.ordinal
        node.notice = node.death = math.inf
        if pool.crashes_per_hour:
            node.death = node.up + exponential(self.seed, number + 3) / (pool.crashes_per_hour / 3600)
        if pool.spot and pool.spot.market.interruptions_per_hour(self.data):
            per_s = pool.spot.market.interruptions_per_hour(self.data) / 3600
            node.notice = node.up + exponential(self.seed, number + 4) / per_s
            node.death = min(node.death, node.notice + pool.spot.notice_s)
        for where, zone, told, start, end in self.shut:
            if where is pool and zone == node.zone and end > node.ordered:
                node.death = min(node.death, start)
                if told < start:
                    node.notice = min(node.notice, told)
        if not node.comes:
            node.death = min(node.death, node.up)

    def remove_gone_nodes(self) -> None:
        """Those that died during the last tick, and those that have been empty for long enough."""
        there = [n for n in self.nodes if n.end(math.inf) > self.now or (n.replicas and n.death == self.now)]
        for node in self.nodes:
            if node not in there:
                self.charge(node.owner, node.pool, node.pay(self.now))
        self.nodes = there

    def leave(self, replica: Replica) -> None:
        """Gives back what a replica that is gone had of its node."""
        node, run = replica.node, replica.run
        node.replicas.remove(replica)
        node.emptied = max(node.emptied, replica.gone)
        if not node.replicas or is_whole(run, replica.variant, node.pool):
            node.free = list(has(node.pool))
        else:
            both = zip(node.free, needs(run, replica.variant, node.pool), strict=True)
            node.free = [a + b for a, b in both]

    # --- bills -----------------------------------------------------------------------------------------------
    def charge(self, run: ServiceRun, pool: Pool, seconds: float) -> None:
        self.costs[run][0] += seconds * pool.price_usd_per_hour / 3600
        self.costs[run][1] += seconds

    def send_bills(self) -> None:
        """At the end of a tick: to those who were on a node after placement; then those who went leave."""
        sharers = {node: [(r.run, dominant_share(r)) for r in node.replicas] for node in self.nodes}
        for run in self.runs:
            for replica in sorted((r for r in run.replicas if r.state == "gone"), key=lambda r: r.number):
                if replica in replica.node.replicas:
                    self.leave(replica)
        for node, shares in sharers.items():
            seconds, total = node.pay(self.now), sum(share for _, share in shares)
            for run, share in shares or [(node.owner, 1.0)]:
                self.charge(run, node.pool, seconds * (share / total if shares else 1.0))

    # --- decisions -------------------------------------------------------------------------------------------
    def decide(
        self,
        run: ServiceRun,
        order: int,
        release: int,
        max_batch: int,
        pool: int,
        variant: int,
        wait_s: float,
    ) -> None:
        if pool >= 0 and self.pools[pool].name in run.service.pools:
            run.pool = self.pools[pool]
        if 0 <= variant < len(run.service.variants):
            run.variant = variant
        if max_batch > 0:
            run.max_batch = min(max_batch, run.server.max_batch)
        if wait_s >= 0:
            run.wait_s = wait_s
        taken = min(release, run.pending)
        run.pending -= taken
        for state in ("starting", "ready"):
            while taken < release and self.release_youngest(run, state, spared=None):
                taken += 1
        run.pending += order

    def release_youngest(self, run: ServiceRun, state: str, spared: int | None) -> bool:
        """Releases the replica placed last, none of variant `spared` and none on a young node, if there is one."""
        old_enough = [
            r
            for r in run.present
            if r.state == state
            and r.variant != spared
            and self.now - r.node.ordered >= r.node.pool.min_lifetime_s - _ROUNDING
        ]
        if old_enough:
            self.drain(max(old_enough, key=lambda r: r.ordinal))
        return bool(old_enough)

    def drain(self, replica: Replica) -> None:
        replica.run.drain(replica, self.now)
        if replica.state == "gone":
            self.leave(replica)

    def act_on_notices(self) -> None:
        for node in self.nodes:
            node.told = node.told or node.notice <= self.now
        for run in self.runs:
            for replica in serving_or_starting(run):
                if replica.node.told:
                    run.pending += 1
                    run.failures.append(self.now)
                    if replica.state == "ready" and self.scenario.placement.at_notice == "replace-first":
                        replica.state = "leaving"
                    else:
                        self.drain(replica)
            self.let_go(run)

    def let_go(self, run: ServiceRun) -> None:
        """Of the leaving replicas as many stay as are still to come in their place, while their nodes stay."""
        coming = run.pending + sum(r.state == "starting" for r in run.present)
        leaving = sorted(
            (r for r in run.present if r.state == "leaving"),
            key=lambda r: (r.node.notice + r.node.pool.spot.notice_s - r.node.pool.spot.grace_s, r.number),
        )
        for left, replica in zip(range(len(leaving), 0, -1), leaving, strict=True):
            spot = replica.node.pool.spot
            last = replica.node.notice + spot.notice_s - spot.grace_s
            if left > coming or last < self.now + self.scenario.tick_s:
                self.drain(replica)

    def roll_out(self, run: ServiceRun) -> None:
        """A replacement beside every old replica, a few at a time; `replacing` are there beyond what is wanted."""
        there = serving_or_starting(run)
        old = sum(r.variant != run.variant for r in there)
        ready = sum(r.state == "ready" for r in there)
        total = run.pending + len(there)
        run.replacing = min(run.replacing, total)
        wanted = total - run.replacing
        while run.replacing and ready > wanted:
            if not self.release_youngest(run, "ready", spared=run.variant if old > 0 else None):
                break
            run.replacing, ready, old = run.replacing - 1, ready - 1, old - 1
        at_a_time = max(math.ceil(wanted / 4), 1)
        more = max(min(old, at_a_time) - run.replacing, 0)
        run.replacing += more
        run.pending += more

    # --- placement -------------------------------------------------------------------------------------------
    def place(self) -> None:
        """Gives pending replicas nodes until nothing fits: one per service and round, or the best pair of all."""
        if self.scenario.placement.rule in PAIRWISE:
            while choices := [found for run in self.runs if run.pending and (found := self.find(run))]:
                self.put(*max(choices, key=lambda choice: choice[1]))
            return
        while sum([self.place_one(run) for run in self.runs if run.pending]):
            pass

    def place_one(self, run: ServiceRun) -> bool:
        found = self.find(run)
        if found:
            self.put(*found)
        return found is not None

    def find(self, run: ServiceRun) -> tuple | None:
        """Where a rule wants a replica of a service: (run, score, node or None, pool, zone)."""
        if len({r.number for r in run.present}) == 2 * run.service.max_replicas + 8:
            return None
        candidates = [(node, node.pool, node.zone) for node in self.nodes if self.has_room(run, node)]
        by_name = {pool.name: pool for pool in self.pools}
        for pool in (by_name[name] for name in run.service.pools):
            candidates += [(None, pool, zone) for zone in pool.zones if self.can_open(run, pool, zone)]
        if not candidates:
            return None
        least = min(self.in_zone(run, zone) for _, _, zone in candidates)
        scores = [self.score(run, least, *candidate) for candidate in candidates]
        if max(scores) == -math.inf:
            return None
        return run, max(scores), *candidates[scores.index(max(scores))]

    def put(self, run: ServiceRun, _: float, node: Node | None, pool: Pool, zone: str) -> None:
        numbers = {r.number for r in run.present}
        number = next(k for k in range(len(numbers) + 1) if k not in numbers)
        self.settle(run, number, node or self.open_node(pool, zone, run))

    def may_go(self, run: ServiceRun, pool: Pool, zone: str) -> bool:
        return (
            pool.name in run.service.pools
            and run.pool in (None, pool)
            and (run.variant, pool.name) in run.laws
            and (run.service.zones is None or zone in run.service.zones)
        )

    def has_room(self, run: ServiceRun, node: Node) -> bool:
        """Whether one more replica may go to a node, and fits."""
        if node.told or node.death <= self.now or not self.may_go(run, node.pool, node.zone):
            return False
        if self.siblings(run, node) >= (run.service.max_per_node or math.inf):
            return False
        if is_whole(run, run.variant, node.pool):
            return not node.replicas
        both = zip(needs(run, run.variant, node.pool), node.free, strict=True)
        return all(need <= free + _ROUNDING for need, free in both)

    def can_open(self, run: ServiceRun, pool: Pool, zone: str) -> bool:
        shut = any(p is pool and z == zone and told <= self.now < end for p, z, told, _, end in self.shut)
        full = sum(node.pool is pool for node in self.nodes) >= pool.max_nodes
        both = zip(needs(run, run.variant, pool), has(pool), strict=True)
        fits = all(a <= b + _ROUNDING for a, b in both)
        return fits and not shut and not full and self.may_go(run, pool, zone)

    def siblings(self, run: ServiceRun, node: Node) -> int:
        return sum(r.node is node for r in serving_or_starting(run))

    def in_zone(self, run: ServiceRun, zone: str) -> int:
        return sum(r.node.zone == zone for r in serving_or_starting(run))

    def score(self, run: ServiceRun, least: int, node: Node | None, pool: Pool, zone: str) -> float:
        variant, n = run.service.variants[run.variant], run.server.max_batch
        fixed, each, *_ = run.laws[run.variant, pool.name]
        load, _ = run.loads[run.variant]
        warm = node is not None and node.cached.get((run, run.variant), math.inf) <= self.now
        up_s = max(node.up - self.now, 0.0) if node else pool.boot_s
        c = np.zeros((), CANDIDATE)[()]
        c["node"] = self.nodes.index(node) if node else -1
        c["pool"], c["zone"] = self.pools.index(pool), self.zones.index(zone)
        c["preference"], c["service"] = run.service.pools.index(pool.name), self.runs.index(run)
        c["has"], c["free"] = has(pool), node.free if node else has(pool)
        c["needs"] = needs(run, run.variant, pool)
        c["usd_per_hour"], c["spot"] = pool.price_usd_per_hour, pool.spot is not None
        if pool.spot:
            c["interruptions_per_hour"] = pool.spot.market.interruptions_per_hour(self.data)
        c["ready_in_s"] = up_s + (load * variant.warm_load_share if warm else variant.image_pull_s + load)
        expected_orders = 1 / (1 - pool.provisioning_failure)
        c["recovery_s"] = pool.boot_s * expected_orders + variant.image_pull_s + load
        c["batch_s"] = fixed[n] + each[n] * n
        c["needed"] = self.rates.get(run, 0.0) * c["batch_s"] / (n * run.server.batches_in_flight)
        c["replicas"], c["siblings"] = (len(node.replicas), self.siblings(run, node)) if node else (0, 0)
        c["in_zone"], c["in_emptiest_zone"] = self.in_zone(run, zone), least
        present = serving_or_starting(run)
        c["serving"] = len(present)
        c["pending"] = run.pending
        c["on_spot"] = sum(r.node.pool.spot is not None for r in present)
        c["room"] = pool.max_nodes - sum(other.pool is pool for other in self.nodes)
        c["failing"] = 0.0 if node else pool.provisioning_failure
        c["missed_usd_per_hour"] = self.stake(run, run.variant, pool)
        c["slowdown"], slowdown = (
            1.0,
            {(i.service, i.neighbour): i.slowdown for i in self.scenario.interference},
        )
        for neighbour in node.replicas if node else ():
            pair = run.service.name, neighbour.run.service.name
            c["slowdown"] *= slowdown.get(pair, 1.0)
            lost = self.stake(neighbour.run, neighbour.variant, pool)
            c["harm_usd_per_hour"] += lost * (1 - 1 / slowdown.get(pair[::-1], 1.0))
        c["worth_usd_per_hour"] = c["filled_usd_per_hour"] = self.worth(run)
        if not is_whole(run, run.variant, pool):
            left = [a - b for a, b in zip(c["free"], c["needs"], strict=True)]
            for other in self.runs:
                if self.may_go(other, pool, zone) and other.service.variants[other.variant].resources:
                    want = needs(other, other.variant, pool)
                    for _ in range(other.pending - (other is run)):
                        if all(a <= b + _ROUNDING for a, b in zip(want, left, strict=True)):
                            left = [b - a for a, b in zip(want, left, strict=True)]
                            c["filled_usd_per_hour"] += self.worth(other)
            c["unfilled"] = min(
                [1.0, *(max(a / b, 0.0) for a, b in zip(left, has(pool), strict=True) if b > 0)]
            )
        return self.rule(c)

    def worth(self, run: ServiceRun) -> float:
        """Dollars per hour for the largest share of a node that a replica takes, where that is least."""
        found = []
        for pool in self.pools:
            if pool.name in run.service.pools and (run.variant, pool.name) in run.laws:
                share, usd = 1.0, pool.price_usd_per_hour
                if not is_whole(run, run.variant, pool):
                    both = zip(needs(run, run.variant, pool), has(pool), strict=True)
                    share = max([0.0, *((a / b if b > 0 else 2.0) for a, b in both if a > 0)])
                if share <= 1 + _ROUNDING:
                    found.append(share * usd)
        return min(found, default=0.0)

    def stake(self, run: ServiceRun, variant: int, pool: Pool) -> float:
        """Dollars per hour of requests that one replica would serve in full batches."""
        fixed, each, *_ = run.laws[variant, pool.name]
        n, usd = run.server.max_batch, run.service.economics
        batch_s = fixed[n] + each[n] * n
        per_s = n * run.server.batches_in_flight / batch_s if batch_s > 0 else 0.0
        return 3600 * (usd.late_usd + usd.dropped_usd) / 2 * per_s

    def settle(self, run: ServiceRun, number: int, node: Node) -> None:
        """Puts a new replica on a node."""
        variant = run.service.variants[run.variant]
        replica = Replica(number, len(run.replicas), run, node, run.variant, self.now)
        start = run.load_s(replica)
        if node.cached.get((run, run.variant), math.inf) <= self.now:
            start *= variant.warm_load_share
        else:
            luck = uniform(run.seeds["seed_start"], 4 * replica.ordinal)
            pull = variant.image_pull_s * quantile(log_normal_table(variant.image_pull_cv).tolist(), luck)
            start += pull
        replica.ready = max(self.now, node.up) + start
        earlier = node.cached.get((run, run.variant), math.inf)
        node.cached[run, run.variant] = min(earlier, replica.ready)
        if is_whole(run, run.variant, node.pool):
            node.free = [0.0] * 4
        else:
            both = zip(node.free, needs(run, run.variant, node.pool), strict=True)
            node.free = [a - b for a, b in both]
        node.replicas.append(replica)
        run.replicas.append(replica)
        run.pending -= 1

    def set_paces(self) -> None:
        slowdown = {(i.service, i.neighbour): i.slowdown for i in self.scenario.interference}
        for run in self.runs:
            for replica in run.present:
                factor = 1.0
                for other in self.runs:
                    for neighbour in replica.node.replicas:
                        if neighbour is not replica and neighbour.run is other:
                            factor *= slowdown.get((run.service.name, other.service.name), 1.0)
                replica.pace = replica.node.pace * factor
