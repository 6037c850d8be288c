"""What every placement rule promises, and what a user's own rule may count on."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import get_args, get_type_hints

import numpy as np
import pytest

from pilotage.agents.packing import Instance, Replica, replay
from pilotage.engine.layout import CANDIDATE, RESOURCE_COUNT
from pilotage.engine.placement import FEATURES, RULES, WEIGHTS, choose, features, linear, rule
from pilotage.scenario import Placement
from pilotage.world.pools import RESOURCES, Pool, Resources


def candidates_of(seed: int) -> np.ndarray:
    """Candidates for one replica, existing nodes first, as the engine would show them: everything fits."""
    rng = np.random.default_rng(seed)
    existing, new = rng.integers(0, 7), rng.integers(1, 4)
    records = np.zeros(existing + new, CANDIDATE)
    n, old = len(records), np.arange(existing + new) < existing
    modelled, needed = rng.random((2, RESOURCE_COUNT)) < 0.7
    needs = modelled * needed * rng.uniform(0.01, 4, RESOURCE_COUNT)
    records["node"] = np.where(old, np.arange(n), -1)
    records["pool"] = records["preference"] = rng.integers(0, 3, n)
    records["zone"], records["in_emptiest_zone"] = rng.integers(0, 3, n), rng.integers(0, 6)
    records["in_zone"] = records["in_emptiest_zone"] + rng.integers(0, 4, n)
    records["has"] = modelled * (needs + rng.choice([0, 0.01, 1, 30], (n, RESOURCE_COUNT)))
    spare = records["has"] - needs
    records["free"] = np.where(old[:, None], needs + spare * rng.random((n, RESOURCE_COUNT)), records["has"])
    records["needs"] = needs
    records["usd_per_hour"] = rng.choice([0, 0.01, 1, 50], n)
    records["spot"] = rng.integers(0, 2, n)
    records["interruptions_per_hour"] = records["spot"] * rng.choice([0, 0.1, 10], n)
    records["ready_in_s"], records["batch_s"] = rng.choice([0, 1, 3600], n), rng.choice([0, 0.001, 1], n)
    records["replicas"] = old * rng.integers(0, 20, n)
    records["siblings"] = np.minimum(records["replicas"], rng.integers(0, 20, n))
    return records


SETS = [candidates_of(seed) for seed in range(200)]


def vectors(name: str) -> list[np.ndarray]:
    """Weights to try: none where that is allowed, and as many as there can be."""
    rng = np.random.default_rng(7)
    return [rng.uniform(0, 3, size=count) for count in WEIGHTS[name]]


def test_scenarios_name_rules_that_there_are():
    names = get_args(get_type_hints(Placement)["rule"])
    assert set(names) == set(RULES) == set(WEIGHTS)


@pytest.mark.parametrize("name", RULES)
class TestRule:
    def test_is_a_number_or_refuses(self, name):
        for weights in vectors(name):
            for candidate in np.concatenate(SETS):
                score = RULES[name](candidate, weights)
                assert isinstance(score, float)
                assert score < math.inf
                assert not math.isnan(score)

    def test_is_pure_and_deterministic(self, name):
        for weights in vectors(name):
            candidates = np.concatenate(SETS)
            before, given_weights = candidates.tobytes(), weights.tobytes()
            first = [RULES[name](candidate, weights) for candidate in candidates]
            again = [RULES[name](candidate, weights) for candidate in candidates[::-1]][::-1]
            alone = [RULES[name](candidate.copy(), weights) for candidate in candidates]
            assert first == again == alone
            assert candidates.tobytes() == before
            assert weights.tobytes() == given_weights

    @pytest.mark.parametrize("rotated", [0, 1])
    def test_the_first_best_of_what_is_shown_is_chosen(self, name, rotated):
        for weights in vectors(name):
            for candidates in SETS:
                shown = np.roll(np.repeat(candidates, 2), rotated)
                scores = [RULES[name](candidate, weights) for candidate in shown]
                assert choose(RULES[name], shown, weights) == int(np.argmax(scores))
                assert choose(RULES[name], shown[:0], weights) == -1

    def test_ignores_what_nodes_do_not_model(self, name):
        for weights in vectors(name):
            for candidates in SETS:
                needier = candidates.copy()
                needier["needs"] = np.where(candidates["has"] > 0, candidates["needs"], 7)
                for candidate, other in zip(candidates, needier, strict=True):
                    assert RULES[name](candidate, weights) == RULES[name](other, weights)

    def test_opens_the_first_of_equal_new_nodes(self, name):
        for candidates in SETS:
            for weights in vectors(name):
                assert choose(RULES[name], np.repeat(candidates[-1:], 3), weights) == 0


@pytest.mark.parametrize(
    "name", sorted(set(RULES) - {"linear", "learned-placement"})
)  # whose weights say what comes first
def test_existing_nodes_come_before_new_ones(name):
    for candidates in SETS:
        shown = candidates.copy()
        if name == "spread":
            shown["in_zone"] = shown["in_emptiest_zone"]  # it opens nodes in emptier zones only
        for weights in vectors(name):
            new = shown[choose(RULES[name], shown, weights)]["node"] < 0
            assert new == (shown["node"] < 0).all()


def test_rules_say_the_same_without_the_compiler(tmp_path):
    candidates = np.concatenate(SETS[:40])
    path = tmp_path / "candidates.npy"
    np.save(path, candidates)
    program = f"""
import json
import numpy as np
from pilotage.engine.layout import CANDIDATE
from pilotage.engine.placement import FEATURES, RULES, choose, features, rule
candidates = np.load({str(path)!r}).view(CANDIDATE)
weights = json.loads(input())
scores = {{name: [float(r(c, np.array(weights[name]))) for c in candidates] for name, r in RULES.items()}}
chosen = {{name: int(choose(r, candidates, np.array(weights[name]))) for name, r in RULES.items()}}
out = np.zeros(len(FEATURES))
features(candidates[0], out)

@rule
def own(candidate, weights):
    return candidate["node"] + weights[0]

print(json.dumps([scores, chosen, list(out), float(own(candidates[0], np.ones(1)))]))
"""
    weights = {name: vectors(name)[-1].tolist() for name in RULES}
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program],
        input=json.dumps(weights),
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    scores, chosen, out, own = json.loads(result.stdout)
    for name, compiled in RULES.items():
        vector = np.array(weights[name])
        assert scores[name] == pytest.approx([compiled(c, vector) for c in candidates], rel=1e-12, abs=1e-12)
        assert chosen[name] == choose(compiled, candidates, vector)
    assert out == pytest.approx(table(candidates[:1])[0].tolist(), rel=1e-12, abs=1e-12)
    assert own == candidates[0]["node"] + 1


# --- features and the linear rule ---------------------------------------------------------------------------
def table(candidates: np.ndarray) -> np.ndarray:
    rows = np.full((len(candidates), len(FEATURES)), np.nan)
    for candidate, row in zip(candidates, rows, strict=True):
        features(candidate, row)
    return rows


def test_features_are_finite_and_within_one():
    assert (np.abs(table(np.concatenate(SETS))) <= 1).all()


def test_linear_is_weights_times_features():
    candidates = np.concatenate(SETS)
    weights = np.random.default_rng(5).normal(size=len(FEATURES))
    scores = [linear(candidate, weights) for candidate in candidates]
    assert scores == pytest.approx((table(candidates) @ weights).tolist(), abs=1e-12)


def test_features_are_named_in_order():
    assert len(set(FEATURES)) == len(FEATURES)
    shares = [name for name in FEATURES if name.startswith("need_")]
    assert shares == [f"need_{name.removesuffix('_gib').replace('gpus', 'gpu')}" for name in RESOURCES]
    record = np.zeros(1, CANDIDATE)[0]
    record["node"], record["preference"], record["spot"] = 4, 1, 1
    record["has"], record["free"], record["needs"] = (8, 16, 2, 0), (6, 4, 1, 0), (2, 4, 0.5, 0)
    record["usd_per_hour"], record["ready_in_s"], record["batch_s"] = 10.0, 100.0, 0.01
    record["interruptions_per_hour"] = 12.0
    record["replicas"], record["siblings"], record["in_zone"], record["in_emptiest_zone"] = 3, 1, 4, 2
    values = dict(zip(FEATURES, table(np.array([record]))[0], strict=True))
    left = np.array([4 / 8, 0, 0.5 / 2])  # in use before: 2/8, 12/16, 1/2
    need, free = np.array([2 / 8, 4 / 16, 0.5 / 2]), np.array([6 / 8, 4 / 16, 1 / 2])
    assert values == pytest.approx(
        {
            "new": 0,
            "preference": 1 / 2,
            "need_cpu": 2 / 8,
            "need_memory": 4 / 16,
            "need_gpu": 0.5 / 2,
            "need_gpu_memory": 0,
            "left_cpu": 4 / 8,
            "left_memory": 0,
            "left_gpu": 0.5 / 2,
            "left_gpu_memory": 0,
            "left_least": 0,
            "imbalance": left.std(),
            "imbalance_change": left.std() - free.std(),
            "alignment": need @ free / np.linalg.norm(need) / np.linalg.norm(free),
            "price": 1 / 3,
            "spot": 1,
            "interruption": 0.25,  # 12 an hour, 100 s each: a third of an hour's service
            "readiness": 2 / 4,
            "batch_time": -2 / 4,
            "occupancy": 3 / 4,
            "siblings": 1 / 3,
            "skew": 2 / 3,
        }
    )


@pytest.mark.parametrize("field", ["usd_per_hour", "batch_s"])
def test_another_unit_shifts_all_candidates_alike(field):
    candidates = np.concatenate(SETS)
    candidates[field] = np.clip(candidates[field], 0.01, 10)  # away from the bounds
    before = table(candidates)
    candidates[field] *= 3
    shift = table(candidates) - before
    assert np.allclose(shift, shift[0], atol=1e-12)
    assert shift.max() > 0


def test_a_short_vector_is_filled_as_far_as_it_goes():
    out = np.full(3, np.nan)
    features(np.zeros(1, CANDIDATE)[0], out[:2])
    assert np.isfinite(out[:2]).all()
    assert np.isnan(out[2])


# --- a user's own rule --------------------------------------------------------------------------------------
@rule
def cramped(candidate, weights):
    """Refuses spot, and nodes with fewer CPU cores free than it is told; else the smallest node."""
    if candidate["spot"] != 0 or candidate["free"][0] < weights[0]:
        return -math.inf
    return -candidate["has"][0]


def test_own_rules_compile_and_are_usable():
    candidates = np.zeros(3, CANDIDATE)
    candidates["spot"] = [1, 0, 0]
    candidates["has"][:, 0] = candidates["free"][:, 0] = [2, 8, 4]
    assert choose(cramped, candidates, np.array([1.0])) == 2
    assert choose(cramped, candidates, np.array([5.0])) == 1
    assert choose(cramped, candidates, np.array([9.0])) == -1


def test_own_rules_can_refuse_all_and_the_replica_stays_unplaced():
    node = Resources(cpu=8)
    pools = (Pool(name="p", price_usd_per_hour=3600.0, node=node),)
    replicas = tuple(Replica(needs=Resources(cpu=4), start_s=i, end_s=3 + i) for i in range(2))
    instance = Instance(pools=pools, replicas=replicas)
    together, apart = replay(instance, cramped, [2.0]), replay(instance, cramped, [5.0])
    assert (together.usd, together.where) == (4, (0, 0))
    assert (apart.usd, apart.where) == (6, (0, 1))
    nowhere = replay(instance, cramped, [9.0])
    assert (nowhere.usd, nowhere.where, nowhere.unplaced) == (0, (-1, -1), 2)
