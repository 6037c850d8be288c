"""What holds for every explanation, and explanations that the checks must refuse."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.control.foresight import READOUT, Foresight
from pilotage.control.hpa import Hpa
from pilotage.control.learned import ACTIONS, OBSERVATIONS, Learned, policy_from
from pilotage.control.network import Memory, Network
from pilotage.control.outlook import INPUTS
from pilotage.control.policy import FEATURES, INDEX, Decision, Observation
from pilotage.control.scaling import Predictive
from pilotage.control.tree import Node, Tree
from pilotage.engine.cluster import Cluster, World, recorded
from pilotage.explain.attribution import attribute
from pilotage.explain.choice import Remembering, Replay, State, Vector, memory_of, record, visited
from pilotage.explain.distil import Settings, grow, judge
from pilotage.explain.dollars import split, weigh
from pilotage.explain.sight import chosen, sight_of
from pilotage.explain.trust import TAU, Relearned, _tau, check
from pilotage.scenario import load
from pilotage.world.spec import SpecError, decode


def explained(read, players=4, states=16, background=24, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(background, players))
    choices = [
        Vector(
            read,
            np.concatenate([rng.normal(size=(1, players)), base]),
            {f"x{k}": [k] for k in range(players)},
            "replicas",
            {},
        )
        for _ in range(states)
    ]
    return [attribute(choice) for choice in choices]


def network(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(4, 8)), 0.3 * rng.normal(size=8)
    return lambda x: np.tanh(x @ first) @ second + x @ np.array([4.0, 2.0, 1.0, 0.0])


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=8, deadline=None)
def test_contributions_of_any_policy_sum_to_the_choice_less_the_usual_one(seed, whole):
    plain = network(seed)
    read = (lambda x: np.round(plain(x))) if whole else plain
    for one in explained(read, states=2, seed=seed):
        assert one.phi.sum() == pytest.approx(one.outcome - one.usual, abs=1e-9)


def failed(checks):
    return {one.name for one in checks if not one.passed}


def test_explanations_of_a_network_pass():
    checks = check(explained(network(1)), range(4))
    assert not failed(checks)
    assert json.loads(msgspec.json.encode(checks))[0]["name"] == "additivity"


def test_a_policy_that_rolls_dice_is_refused():
    rng = np.random.default_rng(5)
    some = explained(lambda x: x[:, 0] + rng.normal(size=len(x)))
    assert "additivity" in failed(check(some, range(4)))


def test_the_order_of_equals_says_nothing_and_that_of_others_must_last():
    rng = np.random.default_rng(7)
    near = np.array([1.0, 0.30, 0.31, 0.05])
    tau, pairs = _tau(*(near + 0.05 * rng.normal(size=(30, 4)) for _ in range(2)))
    assert (tau, pairs) == (1.0, 5)
    turned = near[[1, 0, 2, 3]] + 0.05 * rng.normal(size=(30, 4))
    tau, pairs = _tau(near + 0.05 * rng.normal(size=(30, 4)), turned)
    assert pairs == 6
    assert tau < TAU
    assert _tau(np.ones((5, 3)), np.ones((5, 3))) == (1.0, 0)

    # a background of two kinds of states, in whose halves different inputs matter
    values = np.concatenate([np.tile([1.0, 1.0], (1, 1)), np.tile([[0.0, 1.0], [1.0, 0.0]], (1, 1))])
    some = [
        attribute(Vector(lambda x: x[:, 0] * 2 + x[:, 1], values + 0.01 * k, {"a": [0], "b": [1]}, "", {}))
        for k in range(12)
    ]
    assert "stability over backgrounds" in failed(check(some, [0, 1]))


def test_a_single_input_has_no_order_to_beat():
    some = explained(lambda x: x[:, 0])
    checks = {one.name: one for one in check(some, [0])}
    assert not failed(checks.values())
    assert checks["deletion"].measured is None
    assert "single order" in checks["insertion"].note


def test_states_in_which_a_policy_acts_are_half_of_what_is_explained():
    runs = record(Predictive(), SCENARIO, [World(3), World(4)])
    acting = sum(bool(State(run, tick).change) for run in runs for tick in range(30, len(run.seen)))
    some = visited(runs, 12, 30, acting=True)
    assert len(some) == 12
    assert sum(bool(state.change) for state in some) >= min(acting, 6) > 0


def test_a_choice_that_remembers_is_asked_once_but_for_the_check_that_it_answers_alike() -> None:
    asked, rng = [], np.random.default_rng(6)

    class Dear(Remembering):
        names, units, unit = ("a", "b"), ("", ""), "replicas"
        shown = rng.normal(size=(5, 2))

        def ask(self, picks, blend=1.0):
            asked.append(len(picks))
            return self.shown[picks[:, 0], 0] + blend + dice * rng.normal(size=len(picks))

    for dice in (0.0, 1.0):
        asked.clear()
        choice = Dear()
        picks = np.array([[0, 1], [2, 1], [0, 1]])
        first = choice.outcome(picks)
        assert asked.pop() == 2
        np.testing.assert_array_equal(choice.outcome(picks), first)
        assert not asked
        assert choice.outcome(picks, 0.5)[0] != first[0]
        some = [attribute(Dear()) for _ in range(4)]
        assert ("additivity" in failed(check(some, [0, 1]))) == bool(dice)


def test_an_explanation_of_something_else_is_refused():
    """The right sums, given to the wrong inputs."""
    wrong = [one._replace(phi=np.roll(one.phi, 1)) for one in explained(lambda x: 3 * x[:, 0] + x[:, 1])]
    assert {"infidelity", "deletion", "insertion"} <= failed(check(wrong, range(4)))


def test_an_input_that_was_taken_not_to_matter_and_does_is_noticed():
    some = explained(lambda x: x[:, 0] + 2 * x[:, 1])
    blind = [one._replace(phi=one.phi * [1, 0, 1, 1]) for one in some]
    assert "additivity" in failed(check(blind, [0, 2, 3]))


def test_what_random_weights_explain_as_well_is_refused():
    some = explained(network(1))
    own = [one.choice for one in some]
    assert "random weights" in failed(check(some, range(4), relearned=Relearned(own, lambda seed: own)))


def test_a_policy_that_always_does_the_same_has_nothing_to_explain():
    (only,) = check(explained(lambda x: np.full(len(x), 4.0)), range(4))
    assert only.passed
    assert "nothing to explain" in only.note


# --- choices are the policies' own decisions ------------------------------------------------------------------
SCENARIO = load("quickstart").replace(horizon_h=0.35)


def random_foresight(seed=0):
    rng = np.random.default_rng(seed)
    n = len(INPUTS)
    return Foresight(
        network=Network(
            mean=(0.0,) * n, scale=(1.0,) * n, clip=5.0,
            weights=(tuple(map(tuple, (0.1 * rng.normal(size=(READOUT, n))).tolist())),),
            biases=(tuple((0.1 * rng.normal(size=READOUT)).tolist()),),
        )
    )  # fmt: skip


def test_what_a_network_wants_is_what_its_policy_decides():
    policy = random_foresight()
    runs = record(policy, SCENARIO, [World(1), World(2)])
    sight = sight_of(policy)
    states = [State(run, tick) for run in runs for tick in range(0, len(run.seen), 3)]
    wanted = np.ceil(sight.read(sight.of(states)) - 0.5)
    for state, count in zip(states, wanted.tolist(), strict=True):
        low, high = state.run.situation.service.min_replicas, state.run.situation.service.max_replicas
        assert np.clip(count, low, high) == state.seen.replicas + state.change


@pytest.mark.parametrize("policy", [Hpa(), Predictive()], ids=["hpa", "predictive"])
def test_a_replay_repeats_the_decision_and_swaps_whole_states(policy):
    runs = record(policy, SCENARIO, [World(3), World(4)])
    states = visited(runs, 6, 30)
    ticks, repeated = memory_of(policy, states)
    assert repeated >= 0.95
    replay = Replay(policy, states[0], states[1:], ticks)
    whole = replay.outcome(np.repeat(np.arange(len(states))[:, None], len(replay.names), axis=1))
    alone = [
        Replay(policy, state, [], ticks).outcome(np.zeros((1, len(replay.names)), int))[0] for state in states
    ]
    np.testing.assert_array_equal(whole, alone)
    with pytest.raises(SpecError, match="needs as many before it"):
        Replay(policy, State(runs[0], 3), [], ticks)


def test_a_network_with_a_memory_is_replayed():
    rng = np.random.default_rng(2)
    n, units = len(OBSERVATIONS), 3
    memory = Memory(
        inputs=rng.normal(0, 0.5, (4 * units, n)).tolist(),
        recurrent=rng.normal(0, 0.5, (4 * units, units)).tolist(),
        bias=(0.0,) * 4 * units,
    )
    weights = rng.normal(0, 1.0, (len(ACTIONS), units)).tolist()
    policy = Learned(
        base=Predictive(),
        network=Network(mean=(0.0,) * n, scale=(1.0,) * n, clip=5.0, weights=(weights,),
                        biases=((0.0,) * len(ACTIONS),), memory=memory),
    )  # fmt: skip
    assert sight_of(policy) is None
    states = visited(record(policy, SCENARIO, [World(3), World(4)]), 16, 60)
    ticks, repeated = memory_of(policy, states)
    assert repeated >= 0.9
    choice = chosen(policy, states[0], states[1:], ticks)
    assert (
        choice.outcome(np.zeros((1, len(choice.names)), int))[0] == states[0].seen.replicas + states[0].change
    )


# --- dollars --------------------------------------------------------------------------------------------------
def test_the_split_sums_to_the_total_and_what_was_decided_is_the_first():
    (found,) = weigh(SCENARIO, Predictive(), World(5), [40], futures=6, horizon_s=120.0)
    np.testing.assert_allclose(found.usd.sum(axis=-1), found.totals)
    parts = split(found.usd[0])
    items = [name for name in parts if name != "total"]
    assert sum(parts[name]["mean"] for name in items) == pytest.approx(parts["total"]["mean"])
    assert [d.order - d.release - (found.options[0].order - found.options[0].release) for d in found.options] == [
        0, -1, 1,
    ]  # fmt: skip


def test_one_replica_more_costs_its_node():
    """Of a policy that never changes anything, in a scenario without load to speak of: the price, from the order on."""
    static = policy_from("static:replicas=4")
    (found,) = weigh(SCENARIO, static, World(6), [40], futures=4, horizon_s=150.0)
    more = split(found.usd[2] - found.usd[0])["nodes"]
    # the policy releases it again at the next tick: one tick of 15 s at 1.2 $/h
    assert more["mean"] == pytest.approx(15 * 1.2 / 3600, rel=1e-6)


# --- trees ----------------------------------------------------------------------------------------------------
def test_a_tree_asks_and_answers():
    tree = Tree(
        nodes=(
            Node(input="utilization", at_most=0.5, then=1, otherwise=2),
            Node(change=-2),
            Node(change=1, max_batch=4),
        )
    )
    assert decode({"kind": "tree", "nodes": [{"change": 1}]}, Tree, "here").leaves == 1
    assert tree.leaves == 2
    cluster = Cluster(SCENARIO, recorded(SCENARIO, [World(0)]))
    values = np.zeros(len(FEATURES))
    values[INDEX["replicas_ready"]] = 1
    low = Observation(0.0, values, np.zeros(len(FEATURES)))
    high = Observation(
        0.0, np.where(np.arange(len(FEATURES)) == INDEX["utilization"], 0.9, values), low.age_s
    )
    controller = tree.begin(cluster.situation(0, 0))
    assert controller.decide(low) == Decision(release=1, reason="leaf 1")  # no more than there are
    assert controller.decide(high) == Decision(order=1, max_batch=4, reason="leaf 2")


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ([{"input": "weather", "then": 1, "otherwise": 2}, {}, {}], "does not exist"),
        ([{"input": "hour", "then": 0, "otherwise": 1}, {}], "a later node"),
        ([{"input": "hour", "then": 1, "otherwise": 7}, {}], "a later node"),
        ([{"input": "hour", "at_most": float("nan"), "then": 1, "otherwise": 2}, {}, {}], "finite"),
        ([{"input": "use_need", "then": 1, "otherwise": 2}, {}, {}], "does not exist"),
        ([], "length"),
    ],
)
def test_a_tree_that_makes_no_sense_is_refused(nodes, says):
    with pytest.raises(SpecError, match=says):
        decode({"kind": "tree", "nodes": nodes}, Tree, "here")


def test_a_tree_that_a_tree_teaches_decides_as_it_does():
    teacher = Tree(
        nodes=(
            Node(input="use_last", at_most=0.6, then=1, otherwise=4),
            Node(input="replicas", at_most=2.0, then=2, otherwise=3),
            Node(max_batch=4),
            Node(change=-1, max_batch=8),
            Node(input="use_last", at_most=0.9, then=5, otherwise=6),
            Node(max_batch=8),
            Node(change=1, max_batch=8),
        )
    )
    worlds = [World(k) for k in range(6)]
    plain = Settings(rounds=2, gap_states=0)
    (tree,) = grow(teacher, SCENARIO, worlds[:3], worlds[3:4], [6], plain).values()
    assert tree.leaves <= 6
    found = judge(tree, teacher, policy_from("static:replicas=8"), SCENARIO, worlds[4:])
    assert found["agreement"] > 0.97
    assert found["agreement_acting"] > 0.85
    assert found["return_ratio"]["mean"] == pytest.approx(1.0, abs=0.05)
    (stump,) = grow(teacher, SCENARIO, worlds[:3], worlds[3:4], [2], plain).values()
    assert stump.leaves <= 2
