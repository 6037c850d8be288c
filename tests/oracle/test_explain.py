"""Explanations against theory: Shapley values by enumeration and in closed form, flips that are known."""

from __future__ import annotations

from itertools import combinations
from math import factorial

import numpy as np
import pytest

from pilotage.control.tree import Node, Tree
from pilotage.explain.attribution import Attribution, attribute, relevant
from pilotage.explain.choice import Choice, Vector
from pilotage.explain.models import Row, summary
from pilotage.explain.nearest import nearest
from pilotage.explain.sight import _for_shap

RNG = np.random.default_rng(0)


def vector(read, values, names=None) -> Vector:
    names = names or [f"x{k}" for k in range(values.shape[1])]
    return Vector(read, values, {name: [k] for k, name in enumerate(names)}, "replicas", {})


def by_enumeration(choice: Choice) -> np.ndarray:
    """The formula, term by term."""
    n, b = len(choice.names), choice.background
    worth = {}
    for size in range(n + 1):
        for members in combinations(range(n), size):
            picks = np.repeat(np.arange(1, b + 1)[:, None], n, axis=1)
            picks[:, list(members)] = 0
            worth[members] = choice.outcome(picks).mean()
    phi = np.zeros(n)
    for i in range(n):
        rest = [k for k in range(n) if k != i]
        for size in range(n):
            weight = factorial(size) * factorial(n - size - 1) / factorial(n)
            for members in combinations(rest, size):
                phi[i] += weight * (worth[tuple(sorted((*members, i)))] - worth[members])
    return phi


def twisted(x: np.ndarray) -> np.ndarray:
    return x[:, 0] * x[:, 1] + np.maximum(x[:, 2], x[:, 3]) - np.ceil(x[:, 4]) * (x[:, 0] > 0)


@pytest.mark.parametrize("method", ["exact", "auto"])
def test_shapley_values_are_those_of_the_formula(method: str) -> None:
    choice = vector(twisted, RNG.normal(size=(13, 5)))
    found = attribute(choice, method=method)
    assert found.method == "exact"
    np.testing.assert_allclose(found.phi, by_enumeration(choice), atol=1e-9)


def test_permutations_come_near_and_are_additive() -> None:
    choice = vector(twisted, RNG.normal(size=(13, 5)))
    found = attribute(choice, method="permutation", passes=200)
    np.testing.assert_allclose(found.phi, by_enumeration(choice), atol=0.1)
    assert found.phi.sum() == pytest.approx(found.outcome - found.usual, abs=1e-9)


def test_of_a_linear_policy_they_are_weight_times_distance() -> None:
    weights, values = RNG.normal(size=6), RNG.normal(size=(20, 6))
    found = attribute(vector(lambda x: x @ weights, values))
    np.testing.assert_allclose(found.phi, weights * (values[0] - values[1:].mean(axis=0)), atol=1e-9)


def test_groups_share_out_what_their_members_do() -> None:
    """Of a sum, a group's value is the sum of its members'; group and members agree on what is shown."""
    values = RNG.normal(size=(9, 4))
    read = lambda x: x @ np.array([1.0, -2.0, 0.5, 3.0])  # noqa: E731
    alone = attribute(vector(read, values)).phi
    together = attribute(Vector(read, values, {"a": [0, 2], "b": [1, 3]}, "replicas", {})).phi
    np.testing.assert_allclose(together, [alone[0] + alone[2], alone[1] + alone[3]], atol=1e-9)


def test_the_tree_explainer_agrees_with_exact_values() -> None:
    inputs = Tree(nodes=(Node(),)).inputs
    a, b, c = (inputs.index(name) for name in ("replicas", "latency", "hour"))
    tree = Tree(
        nodes=(
            Node(input="replicas", at_most=3.0, then=1, otherwise=4),
            Node(input="latency", at_most=0.5, then=2, otherwise=3),
            Node(change=0),
            Node(change=2),
            Node(input="hour", at_most=12.0, then=5, otherwise=6),
            Node(change=-1),
            Node(change=1),
        )
    )
    values = np.zeros((25, len(inputs)))
    values[:, a], values[:, b], values[:, c] = RNG.integers(1, 6, 25), RNG.random(25), RNG.uniform(0, 24, 25)
    groups = {name: [k] for k, name in enumerate(inputs)}
    choice = Vector(tree.changes, values, groups, "", {}, tree=_for_shap(tree))
    by_tree = attribute(choice)
    assert by_tree.method == "tree"
    exact = attribute(choice, [a, b, c], method="exact")
    np.testing.assert_allclose(by_tree.phi, exact.phi, atol=1e-6)
    assert set(relevant([choice])) <= {a, b, c}


def test_the_nearest_flip_is_the_threshold() -> None:
    """A policy that orders above 5 requests/s; the state is at 3, the background on both sides."""
    values = np.column_stack([np.r_[3.0, np.linspace(0, 10, 11)], np.r_[0.0, np.ones(11)]])
    choice = vector(lambda x: (x[:, 0] > 5).astype(float), values, ["rate", "unused"])
    flip = nearest(Attribution(choice, np.zeros(2), 0.0, 0.0, ""), [0, 1])
    assert flip is not None
    (moved,) = flip.moved
    assert (moved.input, moved.was) == ("rate", 3.0)
    assert moved.to == pytest.approx(5.0, abs=0.01)
    assert moved.to > 5
    never = vector(lambda x: np.zeros(len(x)), values)
    assert nearest(Attribution(never, np.zeros(2), 0.0, 0.0, ""), [0, 1]) is None


def test_what_matters_in_one_state_alone_is_found_there() -> None:
    """The third input counts above 9 only, where none of the choices but the last ever is, and the fourth never."""
    read = lambda x: x[:, 0] * x[:, 1] + np.maximum(x[:, 2] - 9, 0)  # noqa: E731
    values = RNG.uniform(0, 1, (40, 7, 4))
    values[-1, 3, 2] = 10.0
    choices = [vector(read, one) for one in values]
    assert relevant(choices[:-1]) == [0, 1]
    assert relevant(choices) == [0, 1, 2]
    assert relevant([vector(read, values[-1]), *choices], tries=1) == [0, 1, 2]


def test_a_flip_may_need_two_inputs() -> None:
    values = np.column_stack([np.r_[0.0, 1.0, 1.0, 0.0], np.r_[0.0, 1.0, 1.0, 0.0]])
    choice = vector(lambda x: (x.min(axis=1) > 0.4).astype(float), values)
    flip = nearest(Attribution(choice, np.zeros(2), 0.0, 0.0, ""), [0, 1])
    assert flip is not None
    assert [one.input for one in flip.moved] == ["x0", "x1"]
    assert all(one.to == pytest.approx(0.4, abs=0.01) for one in flip.moved)


def test_a_served_model_is_explained_column_by_column() -> None:
    """A linear model on numbers and a category: sizes as the formula says, nothing for what it does not read."""
    table = {
        "amount": RNG.normal(size=60),
        "country": RNG.choice(["ch", "de"], 60),
        "noise": RNG.normal(size=60),
    }
    predict = lambda t: 2 * np.asarray(t["amount"]) + (np.asarray(t["country"]) == "ch")  # noqa: E731
    sample = {name: column[:10] for name, column in table.items()}
    background = {name: column[10:] for name, column in table.items()}
    found = summary(predict, sample, background)
    order = np.random.default_rng(0).permutation(10)
    np.testing.assert_allclose(
        found["amount"], 2 * np.abs(sample["amount"] - background["amount"].mean())[order], atol=1e-9
    )
    share = (background["country"] == "ch").mean()
    np.testing.assert_allclose(
        found["country"], np.abs((sample["country"] == "ch") - share)[order], atol=1e-9
    )
    np.testing.assert_allclose(found["noise"], 0, atol=1e-12)
    with pytest.raises(ValueError, match="differ"):
        summary(predict, sample, {"amount": table["amount"]})
    with pytest.raises(ValueError, match="not mixed"):
        Row(predict, table).outcome(np.zeros((1, 3), int), 0.5)
