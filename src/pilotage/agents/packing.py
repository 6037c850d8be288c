"""The cheapest placement there is, for small instances: the bar that placement rules are measured against.

Replicas come and go at known times; each stays on the node where it is put. A node is paid for while it
carries at least one replica. `optimum` knows the future and proves its result; `replay` gives the same
replicas to a rule, one by one in order of start, so that its dollars over the optimum's are at least 1. All
else that costs money or time in a cluster (boot, loading, billing granules, idleness, faults) is left out of
both: only placement differs.

*The programme.* The unknowns are lives of nodes: a pool and a set of replicas that one of its nodes can
carry, never more at a time than fits, without a break from the first start to the last end. With z[l] = 1
for the lives that are chosen, by HiGHS (Huangfu & Hall 2018) through SciPy:

    minimise    sum of price[l] (end[l] - start[l]) z[l]
    subject to  sum of z[l] over the lives that have r             >= 1             for every replica r,
                sum of z[l] over the lives of p that go on at t    <= max_nodes[p]  for every pool p, start t.

A replica that is in two lives is taken out of one, which costs nothing more. A node that would be empty in
between counts as two, one after the other, which is what removal at once comes to. Lives are sets, and nodes
have no numbers, so there is no symmetry among nodes to break; against replicas assigned to numbered nodes,
the same optima came out a hundred times faster. Of lives with the same start and end only the largest are
needed, and none on a pool where another without limit is no dearer and can have it too. All lives are listed
beforehand, which keeps instances small: some 20 replicas that overlap much, more that overlap less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple

import numpy as np
from msgspec import Meta
from numba import config
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from pilotage.engine.layout import CANDIDATE
from pilotage.engine.placement import PAIRWISE, RULES, SIGNATURE, WEIGHTS
from pilotage.engine.stowing import stow
from pilotage.world.pools import Pool, Resources
from pilotage.world.spec import Name, NonNegative, Positive, Spec, SpecError, closest

_ROUNDING = 1e-9
_MOST: Final = 100_000  # lives of nodes, which take some ten seconds to list
_BILLING: Final = ("min_lifetime_s", "billing_granularity_s", "billing_minimum_s", "idle_removal_s", "spot")


class Replica(Spec, frozen=True, kw_only=True):
    """Lives in [start_s, end_s) on a node of its `pools`, in order of preference, and `zones` (None: all)."""

    needs: Resources
    start_s: NonNegative = 0.0
    end_s: Positive
    service: Name = "service"
    pools: Annotated[tuple[Name, ...], Meta(min_length=1)] | None = None
    zones: Annotated[tuple[Name, ...], Meta(min_length=1)] | None = None


class Instance(Spec, frozen=True, kw_only=True):
    """What is to be placed, and where. Of pools, `node`, price, `max_nodes` and `zones` count."""

    pools: Annotated[tuple[Pool, ...], Meta(min_length=1)]
    replicas: Annotated[tuple[Replica, ...], Meta(min_length=1)]

    def __post_init__(self) -> None:
        if not self.pools or not self.replicas:
            raise SpecError("an instance has no pools or no replicas; give at least one of each")
        names = [pool.name for pool in self.pools]
        for pool in self.pools:
            if names.count(pool.name) > 1:
                raise SpecError(
                    f"pool name {pool.name!r} is used {names.count(pool.name)} times; names must differ"
                )
            if pool.node is None:
                raise SpecError(
                    f"pool {pool.name!r} says no `node`; say what a node has, or nothing can be packed"
                )
            for name in _BILLING:
                if getattr(pool, name):
                    raise SpecError(
                        f"pool {pool.name!r} sets {name}; leave it out, a node is paid while it is in use"
                    )
        for r, replica in enumerate(self.replicas):
            self._check(r, replica, names)

    def _check(self, r: int, replica: Replica, names: list[str]) -> None:
        where = f"replica {r} ({replica.service})"
        if not replica.start_s < replica.end_s < math.inf:
            raise SpecError(
                f"{where} lives from {replica.start_s:g} to {replica.end_s:g} s; end_s must be later"
            )
        for name in replica.pools or ():
            if name not in names:
                raise SpecError(f"{where} wants pool {name!r}; {closest(name, names)}")
        zones = {zone for pool in self.pools for zone in pool.zones}
        for zone in replica.zones or ():
            if zone not in zones:
                raise SpecError(f"{where} wants zone {zone!r}; {closest(zone, zones)}")
        if not any(True for p in self.allowed(r) for _ in self.zones_of(r, p)):
            why = "; ".join(self._obstacle(r, p) for p in range(len(names)))
            raise SpecError(
                f"{where} fits nowhere: {why}; valid: a pool and zone of its own with nodes as large"
            )

    def _obstacle(self, r: int, p: int) -> str:
        replica, pool = self.replicas[r], self.pools[p]
        if replica.pools is not None and pool.name not in replica.pools:
            return f"{pool.name!r} is none of its pools"
        if pool.node and (short := replica.needs.shortfall(pool.node)):
            return f"a node of {pool.name!r} has {', '.join(short)} that it needs"
        return f"{pool.name!r} is in none of its zones"

    def allowed(self, r: int) -> Iterator[int]:
        """The pools whose nodes are large enough for replica r, in its order of preference."""
        replica = self.replicas[r]
        names = [pool.name for pool in self.pools]
        for p in range(len(names)) if replica.pools is None else map(names.index, replica.pools):
            node = self.pools[p].node
            if node and not replica.needs.shortfall(node):
                yield p

    def zones_of(self, r: int, p: int) -> Iterator[str]:
        """The zones of pool p to which replica r may go."""
        zones = self.replicas[r].zones
        return (zone for zone in self.pools[p].zones if zones is None or zone in zones)


@dataclass(frozen=True, slots=True)
class Packing:
    """What a placement costs; `nodes` are (pool, zone), `where` has the node of every replica, or -1."""

    usd: float
    nodes: tuple[tuple[str, str], ...]
    where: tuple[int, ...]

    @property
    def unplaced(self) -> int:
        """How many replicas found no place when they started; only without any can dollars be compared."""
        return self.where.count(-1)


@dataclass(frozen=True, slots=True)
class Optimum(Packing):
    """The cheapest packing found; none costs less than `lower_usd`."""

    lower_usd: float

    @property
    def gap(self) -> float:
        """The share of the dollars that might still be saved; 0 if the packing is proven optimal."""
        return max(1 - self.lower_usd / self.usd, 0.0) if self.usd > 0 else 0.0


# --- the rule ---------------------------------------------------------------------------------------------
def replay(
    instance: Instance,
    rule: str | Callable,
    weights: Sequence[float] | np.ndarray = (),
    *,
    jointly: bool | None = None,
) -> Packing:
    """The instance placed online by a rule: a name in `placement.RULES`, or a function made by `@rule`.

    Replicas that start at the same time are placed in their order or, `jointly`, the best pair of a replica and a node
    first (None: as the rule does in the engine). Raises SpecError for a rule or weights that do not exist.
    """
    return Online(instance).packing(rule, weights, jointly)


class Online:
    """An instance in the arrays that `engine.stowing` takes, for many rules."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        replicas, numbers = instance.replicas, _Numbers(instance)
        self._order = sorted(range(len(replicas)), key=lambda r: replicas[r].start_s)
        names = [pool.name for pool in instance.pools]
        preference = np.full((len(replicas), len(names)), -1)
        for row, r in zip(preference, self._order, strict=True):
            for p in instance.allowed(r):
                row[p] = (replicas[r].pools or names).index(names[p])
        zones = np.full((len(names), len(numbers.zones)), -1)
        for row, pool in zip(zones, instance.pools, strict=True):
            row[: len(pool.zones)] = [numbers.zones.index(zone) for zone in pool.zones]
        self._zones = numbers.zones
        self._arrays = (
            np.ascontiguousarray(numbers.needs[self._order]),
            np.array([replicas[r].start_s for r in self._order], float),
            np.array([replicas[r].end_s for r in self._order], float),
            np.array([numbers.services.index(replicas[r].service) for r in self._order]),
            preference,
            np.array(
                [
                    [replicas[r].zones is None or z in (replicas[r].zones or ()) for z in numbers.zones]
                    for r in self._order
                ],
                np.int64,
            ),
            np.ascontiguousarray(numbers.has),
            np.array([pool.price_usd_per_hour for pool in instance.pools], float),
            np.array([pool.max_nodes for pool in instance.pools]),
            zones,
        )

    def packing(
        self, rule: str | Callable, weights: Sequence[float] | np.ndarray = (), jointly: bool | None = None
    ) -> Packing:
        """See `replay`."""
        compiled, vector = _compiled(rule, weights)
        pairs = rule in PAIRWISE if jointly is None else jointly
        where = np.full(len(self._order), -1)
        opened = np.full((len(where), 2), -1)
        usd = stow(compiled, vector, pairs, np.zeros(1, CANDIDATE), *self._arrays, where, opened)
        found = np.empty_like(where)
        found[self._order] = where
        nodes = tuple((self._instance.pools[p].name, self._zones[z]) for p, z in opened[opened[:, 0] >= 0])
        return Packing(usd, nodes, tuple(found.tolist()))


def _compiled(rule: str | Callable, weights: Sequence[float] | np.ndarray) -> tuple[Callable, np.ndarray]:
    try:
        vector = np.ascontiguousarray(weights, dtype=np.float64)
    except (TypeError, ValueError):
        vector = np.array(np.nan)
    if vector.ndim != 1 or not np.isfinite(vector).all():
        raise SpecError(f"weights of a placement rule are {weights!r}; give a list of finite numbers")
    if not isinstance(rule, str):
        if not ((config.DISABLE_JIT and callable(rule)) or SIGNATURE.args in getattr(rule, "signatures", ())):
            raise SpecError(
                f"placement rule {rule!r} is not compiled; put @pilotage.engine.placement.rule above it"
            )
        return rule, vector
    if rule not in RULES:
        raise SpecError(f"placement rule {rule!r} does not exist; {closest(rule, RULES)}")
    if len(vector) not in WEIGHTS[rule]:
        counts = " or ".join(map(str, WEIGHTS[rule]))
        raise SpecError(f"placement rule {rule!r} takes {counts} weights, and was given {len(vector)}")
    return RULES[rule], vector


class _Numbers:
    """An instance in numbers: `needs` has shape (replicas, resources), `has` (pools, resources)."""

    def __init__(self, instance: Instance) -> None:
        self.needs = np.array([replica.needs.vector for replica in instance.replicas], float)
        self.has = np.array([pool.node.vector for pool in instance.pools if pool.node], float)
        self.zones = sorted({zone for pool in instance.pools for zone in pool.zones})
        self.services = sorted({replica.service for replica in instance.replicas})


# --- the optimum ------------------------------------------------------------------------------------------
class _Life(NamedTuple):
    """A node's life: its pool and zone, and the replicas that it carries without a break."""

    pool: int
    zone: str
    replicas: tuple[int, ...]
    start_s: float
    end_s: float


def optimum(instance: Instance, time_limit_s: float = 60.0) -> Optimum:
    """The cheapest packing, or the best that was found when HiGHS has had its time, with its gap."""
    if not time_limit_s > 0:
        raise SpecError(f"time_limit_s is {time_limit_s}; give a positive number of seconds")
    lives = list(_lives(instance))
    usd = np.array([_usd(instance, life.pool, life.start_s, life.end_s) for life in lives])
    # HiGHS stops at an absolute gap of 1e-6, which must mean little
    scale = 1e3 / usd.max() if usd.max() > 0 else 1.0
    result = milp(
        usd * scale,
        integrality=np.ones(len(lives)),
        bounds=Bounds(0, 1),
        constraints=[_each_is_placed(instance, lives), *_limits(instance, lives)],
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )
    if result.status == 2:
        pools = " and ".join(f"{pool.max_nodes} of {pool.name!r}" for pool in instance.pools)
        raise SpecError(f"the replicas do not fit on {pools} at a time; raise max_nodes")
    if result.x is None:
        raise TimeoutError(f"no packing in {time_limit_s:g} s ({result.message}); allow more time")
    packing = _packing(instance, [life for life, x in zip(lives, result.x, strict=True) if x > 0.5])
    if result.status == 0:
        return Optimum(packing.usd, packing.nodes, packing.where, packing.usd)
    lower_usd = max((result.mip_dual_bound or 0.0) / scale, 0.0)
    return Optimum(packing.usd, packing.nodes, packing.where, min(lower_usd, packing.usd))


def _lives(instance: Instance) -> Iterator[_Life]:
    """The lives that nodes can have, without those that another is as good as."""
    replicas, numbers = instance.replicas, _Numbers(instance)
    order, peak = sorted(range(len(replicas)), key=lambda r: replicas[r].start_s), _peak(instance)
    start_s = np.array([replicas[r].start_s for r in order])
    end_s = np.array([replicas[r].end_s for r in order])
    needs = numbers.needs[order]
    times = np.unique(start_s)[:, None]
    alive = (start_s <= times) & (times < end_s)
    known: set[tuple[int, ...]] = set()  # lives that a pool which is no dearer, and without limit, can have
    count = 0
    for p in sorted(range(len(instance.pools)), key=lambda p: instance.pools[p].price_usd_per_hour):
        has, unlimited = numbers.has[p] + _ROUNDING, instance.pools[p].max_nodes >= peak
        zones = [set(instance.zones_of(r, p)) if p in instance.allowed(r) else set() for r in order]
        stack: list[tuple[tuple[int, ...], np.ndarray, set[str]]]
        stack = [((i,), needs[i] * alive[:, i, None], zones[i]) for i in range(len(order)) if zones[i]]
        while stack:
            members, used, common = stack.pop()
            count += 1
            if count > _MOST:
                raise SpecError(
                    f"{len(order)} replicas can share nodes in more than {_MOST} ways, too many for an exact "
                    "optimum; give fewer replicas, or some that overlap less"
                )
            begin_s, until_s = start_s[members[0]], end_s[list(members)].max()
            fits = ((used[:, None] + needs <= has).all(axis=2) | ~alive).all(axis=0)
            fits &= [bool(common & other) for other in zones]
            fits[list(members)] = False
            if members not in known and not (fits & (start_s >= begin_s) & (end_s <= until_s)).any():
                zone = next(zone for zone in instance.pools[p].zones if zone in common)
                yield _Life(p, zone, tuple(order[i] for i in members), begin_s, until_s)
            if unlimited:
                known.add(members)
            for i in np.flatnonzero(fits & (start_s < until_s)):
                if i > members[-1]:
                    stack.append(((*members, int(i)), used + needs[i] * alive[:, i, None], common & zones[i]))


def _each_is_placed(instance: Instance, lives: list[_Life]) -> LinearConstraint:
    rows = [r for life in lives for r in life.replicas]
    columns = [n for n, life in enumerate(lives) for _ in life.replicas]
    shape = (len(instance.replicas), len(lives))
    return LinearConstraint(csr_array((np.ones(len(rows)), (rows, columns)), shape=shape), 1, np.inf)


def _limits(instance: Instance, lives: list[_Life]) -> Iterator[LinearConstraint]:
    """No pool has more nodes than it may, whenever one can open."""
    peak = _peak(instance)
    starts, ends = np.array([life.start_s for life in lives]), np.array([life.end_s for life in lives])
    for p, pool in enumerate(instance.pools):
        times = np.unique([life.start_s for life in lives if life.pool == p])[:, None]
        there = (starts <= times) & (times < ends) & [life.pool == p for life in lives]
        if len(times) and pool.max_nodes < peak:
            yield LinearConstraint(csr_array(there.astype(float)), -np.inf, pool.max_nodes)


def _peak(instance: Instance) -> int:
    """How many replicas live at a time at most; no pool can be of use with more nodes."""
    replicas = instance.replicas
    return max(sum(q.start_s <= r.start_s < q.end_s for q in replicas) for r in replicas)


def _packing(instance: Instance, lives: list[_Life]) -> Packing:
    """The lives without replicas that an earlier one has; a node that would be empty in between is two."""
    usd, where = 0.0, [-1] * len(instance.replicas)
    nodes: list[tuple[str, str]] = []
    for life in lives:
        until_s = -math.inf
        for r in life.replicas:
            replica = instance.replicas[r]
            if where[r] < 0:
                if replica.start_s >= until_s:
                    until_s = replica.start_s
                    nodes.append((instance.pools[life.pool].name, life.zone))
                where[r] = len(nodes) - 1
                usd += _usd(instance, life.pool, until_s, max(replica.end_s, until_s))
                until_s = max(replica.end_s, until_s)
    return Packing(usd, tuple(nodes), tuple(where))


def _usd(instance: Instance, p: int, start_s: float, end_s: float) -> float:
    return (end_s - start_s) * instance.pools[p].price_usd_per_hour / 3600
