"""Placement scores against Kubernetes' own figures, and the exact optimum against all packings there are."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numba import config

from pilotage.agents import packing
from pilotage.agents.packing import Instance, Optimum, Packing, Replica, optimum, replay
from pilotage.engine.layout import CANDIDATE
from pilotage.engine.placement import (
    RULES,
    TERMS,
    WEIGHTS,
    balanced,
    cheapest,
    choose,
    least_allocated,
    most_allocated,
)
from pilotage.engine.placement import spread as spread_rule
from pilotage.world.pools import RESOURCES, Pool, Resources
from pilotage.world.spec import SpecError

LEARNED = ("linear", "learned-placement")  # rules that are nothing without weights
UNITS = (1e3, 2**30, 1e3, 2**30)  # Kubernetes counts milli-cores and bytes
DEFAULT = np.zeros(0)


def node(has, used, needs, **more) -> np.void:
    """A candidate in Kubernetes' units: (cpu, memory) or (cpu, memory, an extended resource)."""
    record = np.zeros(1, CANDIDATE)[0]
    for j in range(len(has)):
        record["has"][j] = has[j] / UNITS[j]
        record["free"][j] = (has[j] - used[j]) / UNITS[j]
        record["needs"][j] = needs[j] / UNITS[j]
    for name, value in more.items():
        record[name] = value
    return record


# --- Kubernetes: the formulae, restated ---------------------------------------------------------------------
def counted(has, needs, weights):
    """The resources that count: modelled, weighted, and of extended ones only what is requested."""
    return [j for j in range(len(has)) if has[j] > 0 and weights[j] > 0 and (j < 2 or needs[j] > 0)]


def allocation(has, used, needs, weights, least: bool) -> int:
    """LeastAllocated or MostAllocated: the weighted mean of whole percents, rounded down."""
    total = weight_sum = 0
    for j in counted(has, needs, weights):
        requested = min(used[j] + needs[j], has[j])
        total += weights[j] * ((has[j] - requested if least else requested) * 100 // has[j])
        weight_sum += weights[j]
    return total // weight_sum if weight_sum else 0


def balance(has, requested, needs, weights) -> int:
    """What NodeResourcesBalancedAllocation scored until 1.35: 100 less the standard deviation."""
    shares = [min(requested[j] / has[j], 1.0) for j in counted(has, needs, weights)]
    if len(shares) == 2:
        return int((1 - abs((shares[0] - shares[1]) / 2)) * 100)
    if len(shares) < 2:
        return 100
    mean = sum(shares) / len(shares)
    return int((1 - math.sqrt(sum((s - mean) * (s - mean) for s in shares) / len(shares))) * 100)


def change_of_balance(has, used, needs, weights) -> int:
    """What it scores from 1.36 on."""
    if not any(needs[j] for j in counted(has, needs, weights)):
        return 0
    after = balance(has, [u + n for u, n in zip(used, needs, strict=True)], needs, weights)
    return 50 + (50 + after - balance(has, used, needs, weights)) // 2


# --- Kubernetes: the figures that its unit tests expect -----------------------------------------------------
# has, used, needs, weights (None: the defaults), expected by least_allocated_test.go
LEAST = {
    "nothing requested": ((4000, 10000), (0, 0), (0, 0), None, 100),
    "smaller node": ((4000, 10000), (0, 0), (3000, 5000), None, 37),
    "larger node": ((6000, 10000), (0, 0), (3000, 5000), None, 50),
    "only others, cpu": ((10000, 20000), (6000, 0), (0, 0), None, 70),
    "only others, both": ((10000, 20000), (6000, 5000), (0, 0), None, 57),
    "beside cpu": ((10000, 20000), (3000, 0), (3000, 5000), None, 57),
    "beside both": ((10000, 20000), (3000, 5000), (3000, 5000), None, 45),
    "more memory": ((10000, 50000), (3000, 5000), (3000, 5000), None, 60),
    "over the node": ((4000, 10000), (3000, 0), (3000, 0), None, 50),
    "over the node, memory used": ((4000, 10000), (3000, 5000), (3000, 0), None, 25),
    "nothing on the node": ((0, 0), (0, 0), (0, 0), None, 0),
    "memory twice, smaller": ((4000, 10000), (0, 0), (3000, 5000), (1, 2, 0, 0), 41),
    "memory twice, larger": ((6000, 10000), (0, 0), (3000, 5000), (1, 2, 0, 0), 50),
    "extended, not requested": ((6000, 10000, 4), (0, 0, 0), (3000, 5000, 0), (1, 1, 1, 0), 50),
    "extended, 2 of 4": ((6000, 10000, 4), (0, 0, 0), (3000, 5000, 2), (1, 1, 1, 0), 50),
    "extended, 2 of 10": ((6000, 10000, 10), (0, 0, 0), (3000, 5000, 2), (1, 1, 1, 0), 60),
    "extended, not there": ((6000, 10000, 0), (0, 0, 0), (3000, 4000, 0), (1, 1, 2, 0), 55),
}
# by most_allocated_test.go
MOST = {
    "nothing requested": ((4000, 10000), (0, 0), (0, 0), None, 0),
    "smaller node": ((4000, 10000), (0, 0), (3000, 5000), None, 62),
    "larger node": ((6000, 10000), (0, 0), (3000, 5000), None, 50),
    "only others, cpu": ((10000, 20000), (6000, 0), (0, 0), None, 30),
    "only others, both": ((10000, 20000), (6000, 5000), (0, 0), None, 42),
    "beside cpu": ((10000, 20000), (3000, 0), (3000, 5000), None, 42),
    "beside both": ((10000, 20000), (3000, 5000), (3000, 5000), None, 55),
    "all the cpu": ((5000, 10000), (0, 0), (5000, 9000), None, 95),
    "all the memory": ((10000, 9000), (0, 0), (5000, 9000), None, 75),
    "memory twice, smaller": ((4000, 10000), (0, 0), (3000, 5000), (1, 2, 0, 0), 58),
    "memory twice, larger": ((6000, 10000), (0, 0), (3000, 5000), (1, 2, 0, 0), 50),
    "extended, not requested": ((6000, 10000, 4), (0, 0, 0), (3000, 5000, 0), (1, 1, 1, 0), 50),
    "extended, 2 of 4": ((6000, 10000, 4), (0, 0, 0), (3000, 5000, 2), (1, 1, 1, 0), 50),
    "extended, 2 of 10": ((6000, 10000, 10), (0, 0, 0), (3000, 5000, 2), (1, 1, 1, 0), 40),
    "extended, not there": ((6000, 10000, 0), (0, 0, 0), (3000, 4000, 0), (1, 1, 2, 0), 45),
}
# by balanced_allocation_test.go until 1.35, the balance with the pod; and by hand what 1.36 makes of it with
# the balance without the pod
BALANCED = {
    "smaller node": ((4000, 10000), (0, 0), (3000, 5000), None, 87, 68),  # 100 before
    "larger node": ((6000, 10000), (0, 0), (3000, 5000), None, 100, 75),  # 100 before
    "beside cpu": ((10000, 20000), (3000, 0), (3000, 5000), None, 82, 73),  # 85 before
    "beside both": ((10000, 20000), (3000, 5000), (3000, 5000), None, 95, 74),  # 97 before
    "more memory": ((10000, 50000), (3000, 5000), (3000, 5000), None, 80, 70),  # 90 before
    "at capacity, no memory": ((6000, 10000), (3000, 0), (3000, 0), None, 50, 62),  # 75 before
    "at capacity": ((6000, 10000), (3000, 5000), (3000, 0), None, 75, 62),  # 100 before
    "gpu, 3 in use": ((3500, 40000, 8), (3000, 5000, 3), (0, 0, 1), (1, 1, 1, 0), 70, 75),  # 69 before
    "gpu, none in use": ((3500, 40000, 8), (3000, 5000, 0), (0, 0, 1), (1, 1, 1, 0), 65, 76),  # 62 before
    "gpu, not requested": ((3500, 40000, 8), (0, 0, 0), (3000, 5000, 0), (1, 1, 1, 0), 63, 56),  # 100 before
    "gpu beside cpu": ((3500, 40000, 8), (3000, 0, 0), (0, 0, 1), (1, 1, 1, 0), 62, 76),  # 59 before
}


def weight_vector(weights) -> np.ndarray:
    return DEFAULT if weights is None else np.array(weights, dtype=float)


@pytest.mark.parametrize("case", LEAST.values(), ids=LEAST.keys())
def test_least_allocated_scores_as_kubernetes_does(case):
    has, used, needs, weights, expected = case
    assert allocation(has, used, needs, weights or (1, 1), least=True) == expected
    assert least_allocated(node(has, used, needs), weight_vector(weights)) == expected


@pytest.mark.parametrize("case", MOST.values(), ids=MOST.keys())
def test_most_allocated_scores_as_kubernetes_does(case):
    has, used, needs, weights, expected = case
    assert allocation(has, used, needs, weights or (1, 1), least=False) == expected
    assert most_allocated(node(has, used, needs), weight_vector(weights)) == expected


@pytest.mark.parametrize("case", BALANCED.values(), ids=BALANCED.keys())
def test_balanced_scores_as_kubernetes_does(case):
    has, used, needs, weights, with_pod, expected = case
    requested = [u + n for u, n in zip(used, needs, strict=True)]
    assert balance(has, requested, needs, weights or (1, 1)) == with_pod
    assert change_of_balance(has, used, needs, weights or (1, 1)) == expected
    assert balanced(node(has, used, needs), weight_vector(weights)) == expected


def test_balanced_has_the_ends_that_the_pull_request_names():
    """kubernetes/kubernetes#135573: no change 75, from balanced to its opposite 50, and back 100."""
    assert balanced(node((100, 100), (10, 10), (20, 20)), DEFAULT) == 75
    assert balanced(node((100, 100), (0, 0), (100, 0)), DEFAULT) == 50
    assert balanced(node((100, 100), (100, 0), (0, 100)), DEFAULT) == 100
    assert balanced(node((100, 100), (100, 0), (0, 0)), DEFAULT) == 0  # a best-effort pod is not scored


amounts = st.integers(1, 200_000)


@st.composite
def kubernetes_nodes(draw):
    has = [draw(st.just(0) | amounts) for _ in RESOURCES]
    used = [draw(st.integers(0, h)) for h in has]
    needs = [draw(st.integers(0, h - u)) for h, u in zip(has, used, strict=True)]
    weights = draw(st.none() | st.tuples(*[st.integers(0, 5)] * len(RESOURCES)).filter(any))
    return has, used, needs, weights


@given(kubernetes_nodes())
def test_scores_equal_the_formulae(case):
    has, used, needs, weights = case
    native = has[0] > 0 or has[1] > 0
    counts = weights or ((1, 1, 0, 0) if native else (1, 1, 1, 1))
    record, vector = node(has, used, needs), weight_vector(weights)
    assert least_allocated(record, vector) == allocation(has, used, needs, counts, least=True)
    assert most_allocated(record, vector) == allocation(has, used, needs, counts, least=False)
    assert balanced(record, vector) == change_of_balance(has, used, needs, counts)


# --- the other rules, by hand -------------------------------------------------------------------------------
def pick(rule, candidates, weights=()) -> int:
    return choose(RULES[rule], np.array(candidates, CANDIDATE), np.array(weights, dtype=float))


def test_best_fit_takes_the_node_that_is_left_fullest():
    half, third = node((9, 9), (4, 4), (1, 1), node=0), node((9, 9), (6, 6), (1, 1), node=1)
    lopsided = node((9, 9), (8, 4), (1, 1), node=2)  # leaves 0 and 4/9: 0.198 against 2 (2/9)^2 = 0.099
    new = node((2, 2), (0, 0), (1, 1), node=-1)
    assert pick("best-fit", [half, third, lopsided, new]) == 1
    assert pick("best-fit", [half, lopsided, new]) == 1
    assert pick("best-fit", [new, half]) == 1


def test_cheapest_weighs_the_price_of_spot_with_its_interruptions():
    """0.5 interruptions an hour, each 36 minutes until the next serves: 1.3 hours are paid per hour served."""
    on_demand = node((8,), (0,), (1,), node=-1, usd_per_hour=1.0, ready_in_s=2160.0)
    spot = {"node": -1, "spot": 1, "interruptions_per_hour": 0.5, "ready_in_s": 2160.0}
    fair, dear = (node((8,), (0,), (1,), usd_per_hour=usd, **spot) for usd in (0.76, 0.78))
    assert cheapest(fair, DEFAULT) == pytest.approx(-0.76 * 1.3)
    assert pick("cheapest", [on_demand, dear, fair]) == 2
    assert pick("cheapest", [on_demand, dear]) == 0
    assert pick("cheapest", [on_demand, fair], [0.1]) == 0  # 5 cents an hour for what interruptions do
    existing = node((8,), (4,), (1,), node=3, usd_per_hour=9.0)
    free = node((8,), (0,), (1,), node=-1)
    assert pick("cheapest", [existing, free]) == 0


def test_spread_prefers_zones_then_nodes_then_room():
    def at(number, in_zone, siblings, used):
        return node(
            (8, 8), (used, used), (1, 1), node=number, in_zone=in_zone, siblings=siblings, in_emptiest_zone=1
        )

    full_zone, twin, other, roomy = at(0, 2, 0, 0), at(1, 1, 1, 0), at(2, 1, 0, 4), at(3, 1, 0, 2)
    new, new_in_full_zone = at(-1, 1, 0, 0), at(-1, 2, 0, 0)
    order = [roomy, other, twin, new, full_zone, new_in_full_zone]
    scores = [spread_rule(candidate, DEFAULT) for candidate in order]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


# --- the optimum --------------------------------------------------------------------------------------------
def pool(name="p", cpu=4.0, usd=3600.0, **more) -> Pool:
    return Pool(name=name, price_usd_per_hour=usd, node=Resources(cpu=cpu), **more)


def replica(cpu, start_s=0.0, end_s=1.0, **more) -> Replica:
    return Replica(needs=Resources(cpu=cpu), start_s=start_s, end_s=end_s, **more)


def test_who_will_stay_should_stay_together():
    """The long ones share a node only if the short one goes elsewhere, for one second: 101 against 199.5."""
    instance = Instance(
        pools=(pool(),), replicas=(replica(2, 0, 100), replica(2, 0, 1), replica(2, 0.5, 100))
    )
    best = optimum(instance)
    assert best.usd == pytest.approx(101)
    assert best.where[0] == best.where[2] != best.where[1]
    assert (best.gap, best.lower_usd) == (0, best.usd)
    assert replay(instance, "first-fit").usd == pytest.approx(199.5)


def test_bin_packing():
    """4, 4, 4, 6, 6, 6 on nodes of 10: three nodes do; first fit takes four."""
    instance = Instance(pools=(pool(cpu=10),), replicas=tuple(replica(n) for n in (4, 4, 4, 6, 6, 6)))
    assert optimum(instance).usd == pytest.approx(3)
    assert replay(instance, "first-fit").usd == pytest.approx(4)


def test_one_large_node_may_be_cheaper_than_small_ones_until_its_pool_is_full():
    pools = (pool("small", 2), pool("large", 8, 7200.0, max_nodes=1))
    instance = Instance(pools=pools, replicas=tuple(replica(2) for _ in range(6)))
    best = optimum(instance)
    assert best.usd == pytest.approx(4)  # four on a large one for 2, two on small ones
    assert sorted(name for name, _ in best.nodes) == ["large", "small", "small"]


def test_what_the_cheap_pool_has_no_room_for_goes_to_the_dear_one():
    pools = (pool("cheap", max_nodes=1), pool("dear", usd=7200.0))
    best = optimum(Instance(pools=pools, replicas=(replica(4), replica(4))))
    assert best.usd == pytest.approx(3)
    assert sorted(name for name, _ in best.nodes) == ["cheap", "dear"]


def test_a_node_that_empties_is_gone_and_may_be_followed_by_another():
    instance = Instance(
        pools=(pool(max_nodes=1),), replicas=(replica(4, 0, 1), replica(4, 1, 2), replica(1, 5, 6))
    )
    for found in (optimum(instance), replay(instance, "best-fit")):
        assert found.usd == pytest.approx(3)
        assert len(found.nodes) == 3


def test_zones_are_kept():
    pools = (pool(zones=("a", "b"), max_nodes=2),)
    apart = Instance(pools=pools, replicas=(replica(1, zones=("a",)), replica(1, zones=("b",)), replica(1)))
    assert optimum(apart).usd == pytest.approx(2)
    three = Instance(pools=(pool(max_nodes=1, zones=("a", "b")),), replicas=apart.replicas)
    with pytest.raises(SpecError, match="do not fit on 1 of 'p' at a time; raise max_nodes"):
        optimum(three)


@st.composite
def instances(draw, most_replicas):
    zones = ("a", "b")
    pools = tuple(
        Pool(
            name=name,
            price_usd_per_hour=draw(st.sampled_from([0.0, 1.0, 2.5])),
            node=Resources(cpu=draw(st.integers(3, 8)), memory_gib=draw(st.integers(3, 8))),
            max_nodes=draw(st.integers(1, 4)),
            zones=draw(st.sampled_from([("a",), zones])),
        )
        for name in draw(st.sampled_from([("p",), ("p", "q")]))
    )
    replicas = []
    for _ in range(draw(st.integers(1, most_replicas))):
        start_s = draw(st.integers(0, 6))
        replicas.append(
            Replica(
                needs=Resources(cpu=draw(st.integers(1, 3)), memory_gib=draw(st.integers(0, 3))),
                start_s=start_s,
                end_s=start_s + draw(st.integers(1, 6)),
                service=draw(st.sampled_from(["s", "t"])),
                pools=draw(st.none() | st.just(("p",)) | st.just(tuple(p.name for p in pools)[::-1])),
                zones=draw(st.none() | st.none() | st.just(("a",))),
            )
        )
    return Instance(pools=pools, replicas=tuple(replicas))


def groupings(n: int):
    """All ways to split n things into groups."""
    if n == 0:
        yield []
        return
    for rest in groupings(n - 1):
        yield [*rest, [n - 1]]
        for i in range(len(rest)):
            yield [*rest[:i], [*rest[i], n - 1], *rest[i + 1 :]]


def cost_of(instance: Instance, placed: list[tuple[Pool, str | None, list[int]]]) -> float:
    """Dollars of nodes with these replicas, infinite if anything does not fit: looks at every moment anew."""
    usd, replicas = 0.0, instance.replicas
    moments = sorted({t for q in replicas for t in (q.start_s, q.end_s)})
    for now, then in pairwise(moments):
        alive = [
            (p, zone, [r for r in group if replicas[r].start_s <= now < replicas[r].end_s])
            for p, zone, group in placed
        ]
        for p in instance.pools:
            mine = [(zone, group) for q, zone, group in alive if q is p and group]
            usd += len(mine) * (then - now) * p.price_usd_per_hour / 3600
            fits = all(
                sum(replicas[r].needs.vector[j] for r in group) <= p.node.vector[j] + 1e-9
                for _, group in mine
                for j in range(len(RESOURCES))
            )
            if not fits or len(mine) > p.max_nodes:
                return math.inf
    for p, zone, group in placed:
        for r in group:
            if replicas[r].pools is not None and p.name not in replicas[r].pools:
                return math.inf
            if zone not in p.zones or (replicas[r].zones is not None and zone not in replicas[r].zones):
                return math.inf
    return usd


def brute_force(instance: Instance) -> float:
    best = math.inf
    for groups in groupings(len(instance.replicas)):
        places = [[(p, zone) for p in instance.pools for zone in p.zones]] * len(groups)
        best = min(best, _cheapest_places(instance, groups, places, []))
    return best


def _cheapest_places(instance, groups, places, placed) -> float:
    if len(placed) == len(groups):
        return cost_of(instance, placed)
    group = groups[len(placed)]
    rest = (
        _cheapest_places(instance, groups, places, [*placed, (p, zone, group)])
        for p, zone in places[len(placed)]
    )
    return min(rest, default=math.inf)


def cost_of_packing(instance: Instance, found: Packing) -> float:
    by_name = {p.name: p for p in instance.pools}
    placed = []
    for number, (name, zone) in enumerate(found.nodes):
        placed.append((by_name[name], zone, [r for r, n in enumerate(found.where) if n == number]))
    assert all(group for _, _, group in placed)
    return cost_of(instance, placed)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)
@given(instances(4))
def test_optimum_equals_brute_force(instance):
    expected = brute_force(instance)
    if expected == math.inf:
        with pytest.raises(SpecError, match="raise max_nodes"):
            optimum(instance)
    else:
        assert optimum(instance).usd == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(instances(12), st.lists(st.floats(-3, 3), min_size=len(TERMS), max_size=len(TERMS)))
def test_no_rule_beats_the_optimum_and_nothing_is_overfull(instance, weights):
    try:
        best: Optimum | None = optimum(instance)
    except SpecError:
        best = None
    if best:
        assert best.unplaced == 0
        assert best.gap == 0
        assert cost_of_packing(instance, best) == pytest.approx(best.usd, abs=1e-12)
    for name in RULES:
        found = replay(instance, name, weights[: max(WEIGHTS[name])] if name in LEARNED else ())
        assert cost_of_packing(instance, found) == pytest.approx(found.usd, abs=1e-12)
        if found.unplaced == 0:
            assert best is not None
            assert found.usd >= best.usd - 1e-12


@settings(max_examples=25, deadline=None)
@given(instances(8), st.sampled_from([2.0, 10.0]))
def test_the_optimum_is_in_units_of_its_own(instance, factor):
    """Twice the price, twice the dollars; and slower clocks, too."""
    try:
        usd = optimum(instance).usd
    except SpecError:
        assume(False)
    dearer = tuple(p.replace(price_usd_per_hour=p.price_usd_per_hour * factor) for p in instance.pools)
    slower = tuple(q.replace(start_s=q.start_s * factor, end_s=q.end_s * factor) for q in instance.replicas)
    assert optimum(instance.replace(pools=dearer)).usd == pytest.approx(usd * factor)
    assert optimum(instance.replace(replicas=slower)).usd == pytest.approx(usd * factor)


def busy_hour(n: int, seed: int = 3) -> Instance:
    rng = np.random.default_rng(seed)
    replicas = []
    for start_s in rng.uniform(0, 100, n):
        cpu, memory_gib = rng.uniform(1, 7), rng.uniform(1, 28)
        life_s = rng.uniform(5, 60)
        needs = Resources(cpu=cpu, memory_gib=memory_gib)
        replicas.append(Replica(needs=needs, start_s=start_s, end_s=start_s + life_s))
    pools = (
        Pool(name="small", price_usd_per_hour=1.0, node=Resources(cpu=8, memory_gib=32)),
        Pool(name="large", price_usd_per_hour=1.8, node=Resources(cpu=16, memory_gib=64)),
    )
    return Instance(pools=pools, replicas=tuple(replicas))


def test_at_the_time_limit_the_gap_is_told(monkeypatch):
    proven = optimum(busy_hour(14))
    solve = packing.milp

    def stopped(*args, **more):
        result = solve(*args, **more)
        bound = result.mip_dual_bound * 0.75
        return SimpleNamespace(status=1, x=result.x, mip_dual_bound=bound, message="Time limit reached.")

    monkeypatch.setattr(packing, "milp", stopped)
    hasty = optimum(busy_hour(14))
    assert hasty.usd == proven.usd
    assert hasty.lower_usd == pytest.approx(0.75 * proven.usd)
    assert hasty.gap == pytest.approx(0.25)


def test_at_the_time_limit_there_may_be_nothing(monkeypatch):
    nothing = SimpleNamespace(status=1, x=None, mip_dual_bound=None, message="Time limit reached.")
    monkeypatch.setattr(packing, "milp", lambda *args, **more: nothing)
    with pytest.raises(TimeoutError, match=r"no packing in 60 s .* allow more time"):
        optimum(busy_hour(4))


def test_a_large_instance_is_refused(monkeypatch):
    monkeypatch.setattr(packing, "_MOST", 1000)
    crowd = Instance(pools=(pool(cpu=64),), replicas=tuple(replica(1, i / 100, 10 + i) for i in range(11)))
    with pytest.raises(SpecError, match="11 replicas can share nodes in more than 1000 ways"):
        optimum(crowd)


NODES = (pool(),)
BAD = {
    "no node": ((pool().replace(node=None),), (replica(1),), "says no `node`"),
    "twice the name": ((pool(), pool()), (replica(1),), "used 2 times; names must differ"),
    "granules": ((pool(billing_granularity_s=60.0),), (replica(1),), "sets billing_granularity_s"),
    "too large": (NODES, (replica(5),), "replica 0 .* has 4 of 5 cpu that it needs"),
    "zone of no pool of its": (
        (pool(), pool("q", zones=("x",))),
        (replica(1, pools=("p",), zones=("x",)),),
        "'p' is in none of its zones; 'q' is none of its pools",
    ),
    "backwards": (NODES, (replica(1, 2, 1),), "from 2 to 1 s; end_s must be later"),
    "unknown pool": (NODES, (replica(1, pools=("q",)),), "wants pool 'q'"),
    "unknown zone": (NODES, (replica(1, zones=("x",)),), "wants zone 'x'; valid: local"),
    "nothing": (NODES, (), "at least one of each"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_instances_are_refused(case):
    pools, replicas, message = case
    with pytest.raises(SpecError, match=message):
        Instance(pools=pools, replicas=replicas)


def plain(candidate, weights):
    return 0.0


@pytest.mark.parametrize(
    ("rule", "weights", "message"),
    [
        ("first-fti", (), "did you mean 'first-fit'"),
        ("linear", (1.0,), f"takes {WEIGHTS['linear'][0]} weights, and was given 1"),
        ("first-fit", (1.0,), "takes 0 weights"),
        ("cheapest", (math.nan,), "give a list of finite numbers"),
        ("cheapest", ("x",), "give a list of finite numbers"),
        pytest.param(
            *(plain, (), "is not compiled; put @pilotage.engine.placement.rule above it"),
            marks=pytest.mark.skipif(config.DISABLE_JIT, reason="nothing is compiled"),
        ),
        (3, (), "is not compiled"),
    ],
)
def test_bad_rules_are_refused(rule, weights, message):
    with pytest.raises(SpecError, match=message):
        replay(Instance(pools=NODES, replicas=(replica(1),)), rule, weights)
    with pytest.raises(SpecError, match="positive number of seconds"):
        optimum(Instance(pools=NODES, replicas=(replica(1),)), time_limit_s=0)
