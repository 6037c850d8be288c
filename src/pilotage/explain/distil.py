"""A small tree that does what a larger policy does: VIPER (Bastani, Pu & Solar-Lezama, NeurIPS 2018).

Trees steer, the teacher says what it would have done, and CART trees are fitted to what all have seen so far (one tree
for both, replicas and batch limit), states weighted by how much the choice matters in them: by the gap between the best
and the worst of the alternatives' expected dollars, and some mean gaps for good measure, as in most states it hardly
matters what is done, and yet a tree that does otherwise there is soon in states of its own. How many is tried out
(`_EVEN`). The gap is measured by rollouts (`dollars.weigh`) in some states and carried over to the others by a
regression forest. Of the trees of all rounds the one that costs least on validation worlds is kept, or one that costs
hardly more and agrees with the teacher more often there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from sklearn.ensemble import RandomForestRegressor
from sklearn.tree import DecisionTreeClassifier

from pilotage.control.guard import Guard
from pilotage.control.learned import Learned
from pilotage.control.policy import Decision, Policy
from pilotage.control.scaling import Predictive
from pilotage.control.tree import Node, Tree
from pilotage.engine.cluster import World, recorded
from pilotage.engine.run import simulate
from pilotage.evaluate import ratio_interval
from pilotage.explain.choice import Recording, record
from pilotage.explain.dollars import weigh
from pilotage.explain.sight import questions_of
from pilotage.scenario import Scenario

_EVEN: Final = (4.0, 1e6)  # mean gaps that are added to every state's; the last is plain imitation
_PER_RUN: Final = 12  # states of a run in which the gap is measured, where there are runs enough
_LEAST: Final = 5  # states in a leaf
_HARDLY: Final = 0.002  # share of the cost


class Settings(NamedTuple):
    """How a tree is grown; `gap_states` is in how many states the gap is measured, with so many `futures`."""

    rounds: int = 4
    gap_states: int = 120
    futures: int = 8
    seed: int = 0


class Lesson(NamedTuple):
    """What a teacher does in states: questions (rows, inputs), what it decides, and how much that matters."""

    asked: np.ndarray
    decided: list[tuple[int, int | None]]
    gap: np.ndarray

    def __add__(self, other: Any) -> Lesson:
        return Lesson(
            np.concatenate([self.asked, other.asked]),
            self.decided + other.decided,
            np.r_[self.gap, other.gap],
        )


def base_of(teacher: Policy) -> Predictive | None:
    """The rule that the tree may ask about: the one that the teacher corrects."""
    base = teacher.base if isinstance(teacher, Learned) else teacher
    return base if isinstance(base, Predictive) else None


def grow(
    teacher: Policy,
    scenario: Scenario,
    training: Sequence[World],
    validation: Sequence[World],
    leaves: Sequence[int] = (31,),
    settings: Settings = Settings(),  # noqa: B008  (frozen)
    say: Callable[[str], None] = lambda _: None,
) -> dict[int, Tree]:
    """The best tree of at most so many leaves, for each number of leaves. `scenario` has one service."""
    base = base_of(teacher)
    training, validation = recorded(scenario, training), recorded(scenario, validation)
    runs = record(teacher, scenario, training)
    gap_of = _gaps(teacher, scenario, runs, base, settings)
    lesson = _lesson(runs, base, gap_of, lambda run: run.decided)
    tried: dict[int, list[tuple[float, Tree]]] = {most: [] for most in leaves}
    for number in range(settings.rounds):
        for most in sorted(leaves):
            grown = [_fit(lesson, most, even, base, settings.seed) for even in _EVEN]
            for tree in grown:
                usd = float(np.mean([run.total_usd for run in _run(tree, scenario, validation)]))
                say(f"round {number + 1}/{settings.rounds}: {tree.leaves} leaves cost {usd:.3f} $")
                tried[most].append((usd, tree))
        if number + 1 < settings.rounds:  # the largest trees steer
            for tree in grown:
                seen = record(tree, scenario, training, adviser=teacher)
                lesson += _lesson(seen, base, gap_of, lambda run: run.advised)

    def best(tried: Sequence[tuple[float, Tree]]) -> Tree:
        least = min(usd for usd, _ in tried)
        alike = [tree for usd, tree in tried if usd <= least * (1 + _HARDLY)]
        return max(alike, key=lambda tree: _agreement(record(tree, scenario, validation, adviser=teacher)))

    return {most: best(found) for most, found in tried.items()}


def _agreement(runs: Sequence[Recording]) -> float:
    """How often as many replicas were ordered or released as was advised."""
    pairs = [pair for run in runs for pair in zip(run.decided, run.advised, strict=True)]
    return float(np.mean([_change(a) == _change(b) for a, b in pairs]))


def _run(policy: Policy, scenario: Scenario, worlds: Sequence[World]) -> list[Any]:
    return simulate(scenario, [policy] * len(worlds), worlds, guard=Guard())


def _lesson(
    runs: Sequence[Recording],
    base: Predictive | None,
    gap_of: Callable[[np.ndarray], np.ndarray],
    says: Callable[[Recording], list[Decision]],
) -> Lesson:
    asked = np.concatenate(questions_of(base, runs))
    decided = [(d.order - d.release, d.max_batch) for run in runs for d in says(run)]
    return Lesson(asked, decided, gap_of(asked))


def _gaps(
    teacher: Policy,
    scenario: Scenario,
    runs: Sequence[Recording],
    base: Predictive | None,
    settings: Settings,
) -> Callable[[np.ndarray], np.ndarray]:
    """How many dollars the choice is worth in a state, from rollouts in some."""
    if settings.gap_states == 0:
        return lambda asked: np.ones(len(asked))
    rng, ahead = np.random.default_rng([settings.seed, 1]), round(600.0 / scenario.tick_s)
    runs = runs[: -(-settings.gap_states // _PER_RUN)]
    each = -(-settings.gap_states // len(runs))
    asked, gaps = [], []
    for run, questions in zip(runs, questions_of(base, runs), strict=True):
        last = max(1, len(run.seen) - ahead)
        ticks = rng.choice(np.arange(last), min(each, last), replace=False).tolist()
        for found in weigh(scenario, teacher, run.world, ticks, futures=settings.futures, seed=settings.seed):
            means = found.totals.mean(axis=1)
            asked.append(questions[found.tick])
            gaps.append(means.max() - means.min())
    forest = RandomForestRegressor(100, min_samples_leaf=5, random_state=settings.seed, n_jobs=1)
    forest.fit(np.array(asked), np.array(gaps))
    return forest.predict


def _fit(lesson: Lesson, leaves: int, even: float, base: Predictive | None, seed: int) -> Tree:
    wanted = np.array([(change, max_batch or 0) for change, max_batch in lesson.decided])
    cart = DecisionTreeClassifier(max_leaf_nodes=max(2, leaves), min_samples_leaf=_LEAST, random_state=seed)
    cart.fit(lesson.asked, wanted, sample_weight=lesson.gap + even * lesson.gap.mean() + 1e-12)
    grown = cart.tree_
    names = Tree(nodes=(Node(),), base=base).inputs
    nodes = []
    for k in range(grown.node_count):
        if grown.children_left[k] < 0:
            change, max_batch = (
                int(kinds[int(np.argmax(grown.value[k, of, : len(kinds)]))])
                for of, kinds in enumerate(cart.classes_)
            )
            nodes.append(Node(change=change, max_batch=max_batch or None))
        else:
            nodes.append(
                Node(
                    input=names[grown.feature[k]], at_most=float(grown.threshold[k]),
                    then=int(grown.children_left[k]), otherwise=int(grown.children_right[k]),
                )
            )  # fmt: skip
    return _pruned(Tree(nodes=tuple(nodes), base=base))


def _pruned(tree: Tree) -> Tree:
    """The tree without questions whose answers lead to the same, its nodes numbered from the root on."""

    def same(k: int) -> Node | None:
        node = tree.nodes[k]
        if node.input is None:
            return node
        below, above = same(node.then), same(node.otherwise)
        return below if below is not None and below == above else None

    nodes: list[Node] = []

    def put(k: int) -> int:
        at, leaf = len(nodes), same(k)
        node = tree.nodes[k] if leaf is None else leaf
        nodes.append(node)
        if leaf is None:
            nodes[at] = node.replace(then=put(node.then), otherwise=put(node.otherwise))
        return at

    put(0)
    found: Tree = tree.replace(nodes=tuple(nodes))
    return found


def judge(
    tree: Tree, teacher: Policy, reference: Policy, scenario: Scenario, worlds: Sequence[World]
) -> dict[str, Any]:
    """The tree beside its teacher on unseen worlds.

    `agreement` is how often both decide alike (replicas and batch limit) in the states that the tree visits,
    `agreement_within_one` the same but for one request in the batch limit; `agreement_teachers_states` in those that
    the teacher visits, `agreement_replicas` there on the replicas alone, and `agreement_acting` on the replicas where
    the teacher changes them, which is in a share `share_acting` of states.
    `return_ratio` is how much of the teacher's saving over the reference policy the tree has, `cost_ratio` what the
    tree costs over what the teacher costs, each with the interval over worlds.
    """
    worlds = recorded(scenario, worlds)
    visits = record(tree, scenario, worlds, adviser=teacher), record(teacher, scenario, worlds, adviser=tree)
    usd = {name: np.array([run.total_usd for run in _run(policy, scenario, worlds)])
           for name, policy in (("tree", tree), ("teacher", teacher), ("reference", reference))}  # fmt: skip
    own = [(a, b) for run in visits[0] for a, b in zip(run.decided, run.advised, strict=True)]
    theirs = [(b, a) for run in visits[1] for a, b in zip(run.decided, run.advised, strict=True)]
    acting = np.array([_change(teachers) != 0 for _, teachers in theirs])
    replicas = np.array([_change(trees) == _change(teachers) for trees, teachers in theirs])
    return {
        "leaves": tree.leaves,
        "agreement": float(np.mean([_key(a) == _key(b) for a, b in own])),
        "agreement_within_one": float(np.mean([_nearly(a, b) for a, b in own])),
        "agreement_teachers_states": float(np.mean([_key(a) == _key(b) for a, b in theirs])),
        "agreement_replicas": float(replicas.mean()),
        "agreement_acting": float(replicas[acting].mean()) if acting.any() else 1.0,
        "share_acting": float(acting.mean()),
        "return_ratio": ratio_interval(usd["reference"] - usd["tree"], usd["reference"] - usd["teacher"]),
        "cost_ratio": ratio_interval(usd["tree"], usd["teacher"]),
        "usd": {name: float(values.mean()) for name, values in usd.items()},
    }


def _change(decision: Decision) -> int:
    return decision.order - decision.release


def _nearly(a: Decision, b: Decision) -> bool:
    limits = a.max_batch, b.max_batch
    near = limits[0] == limits[1] if None in limits else abs(limits[0] - limits[1]) <= 1  # type: ignore[operator]
    return near and _change(a) == _change(b)


def _key(decision: Decision) -> tuple[int, int | None]:
    return _change(decision), decision.max_batch
