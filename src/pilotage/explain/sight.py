"""What policies look at, where that is a vector of numbers: networks and trees, as functions of their own inputs.

Networks see loads relative to a scale; here they are taken in replicas, and the network's inputs are made from them
again, so that a plot shows loads, and exchanging one does not change the others behind its back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from pilotage.control.foresight import Anticipate, Foresight
from pilotage.control.guard import Guard
from pilotage.control.learned import (
    HEADROOM,
    LEVEL_HEADROOM,
    LEVEL_OBSERVATIONS,
    OBSERVATIONS,
    Learned,
    corrections,
)
from pilotage.control.network import Forward, Network
from pilotage.control.outlook import INPUTS, REFERENCES, Outlook
from pilotage.control.policy import Policy
from pilotage.control.scaling import Predictive
from pilotage.control.tree import Questions, Tree
from pilotage.explain.choice import Choice, Recording, Replay, State, Vector
from pilotage.explain.trust import Relearned

_LIMIT: Final = 8.0  # of the outlook's inputs
Read = Callable[[np.ndarray], np.ndarray]
# what is a load or a count in replicas, seen relative to a scale
_IN_REPLICAS: Final = frozenset(
    (*REFERENCES, "replicas", "ready", "load", "load_peak", "load_fast", "load_slow", "peak_1min", "peak_5min",
     "peak_30min", "lag_30min", "lag_60min", "lag_90min", "lag_120min", "lag_day", "forecast", "order_level",
     "keep_level")
)  # fmt: skip


class Sight:
    """How a policy's choice follows from a vector.

    `vectors` gives that of every tick of runs of one length, shape (runs, ticks, columns); `read` the outcome, of shape
    (rows, columns) to (rows,). `base` is the same of the policy without what was learned, and `fresh` with random
    weights from a seed (None: nothing was learned). `label` makes decisions of outcomes.
    """

    def __init__(
        self,
        names: Sequence[str],
        vectors: Callable[[Sequence[Recording]], np.ndarray],
        read: Read,
        *,
        base: Read | None = None,
        fresh: Callable[[int], Read] | None = None,
        label: Callable[[np.ndarray], np.ndarray] | None = None,
        unit: str = "replicas",
        tree: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.names, self.read, self.base, self.fresh = tuple(names), read, base, fresh
        self._vectors, self._label, self._unit, self._tree = vectors, label, unit, tree
        self._known: dict[int, tuple[Recording, np.ndarray]] = {}

    def of(self, states: Sequence[State]) -> np.ndarray:
        """The vectors of states, shape (states, columns)."""
        fresh = {id(s.run.seen): s.run for s in states if id(s.run.seen) not in self._known}
        for length in {len(run.seen) for run in fresh.values()}:
            runs = [run for run in fresh.values() if len(run.seen) == length]
            self._known |= {
                id(run.seen): (run, own) for run, own in zip(runs, self._vectors(runs), strict=True)
            }
        return np.stack([self._known[id(state.run.seen)][1][state.tick] for state in states])

    def choice(self, states: Sequence[State], *, apart: bool = False, read: Read | None = None) -> Vector:
        """The choice in the first of the states, the others being the background; `apart`: every number a player of
        its own; `read` takes the place of the policy's."""
        groups: dict[str, list[int]] = {}
        for k, name in enumerate(self.names):
            groups.setdefault(name if apart or self._tree else group_of(name), []).append(k)
        units = dict.fromkeys([*_IN_REPLICAS, "need"], "replicas")
        return Vector(read or self.read, self.of(states), groups, self._unit, units, self._label, self._tree)


def group_of(name: str) -> str:
    """The group of a number that networks see: few enough that Shapley values are exact."""
    if "_at_" in name or (name.startswith("lag_") and name != "lag_day"):
        return "same_minute_of_earlier_periods"
    if name.startswith("day") or name == "lag_day":
        return "yesterday"
    if name.startswith(("trend", "rise", "forecast")):
        return "trend_and_forecast"
    if name.startswith(("fluctuation", "idle", "hour")):
        return "fluctuation" if not name.startswith("hour") else "time_of_day"
    if name in ("lead", "stake", "grain", "patience", "usable"):
        return "service"
    if name in ("last", "load", "load_peak", "load_fast", "present") or name.endswith("_1min"):
        return "load_now"
    if name.endswith(("_5min", "_15min", "_30min")) or name == "load_slow":
        return "load_of_the_last_30_minutes"
    if name.endswith(("min", "_day")):
        return "load_of_the_last_day"
    if name in ("replicas", "ready", "starting_share", "draining_share", "hold"):
        return "replicas"
    if name in ("queue", "utilization", "latency", "missed", "batch"):
        return "queue_and_latency"
    if name in ("need", "rounding", "order_level", "keep_level"):
        return "what_the_base_rule_needs"
    return name


def chosen(policy: Policy, explained: State, background: Sequence[State], ticks: int) -> Choice:
    """The choice of any scaling policy: what a network or tree looks at where there is one, else a replay of `ticks`
    ticks."""
    sight = sight_of(policy)
    if sight is None:
        return Replay(policy, explained, background, ticks)
    return sight.choice([explained, *background])


_seen: dict[int, tuple[Policy, Sight | None]] = {}


def sight_of(policy: Policy) -> Sight | None:
    """How a policy's choice follows from a vector, or None of what remembers: rules, and networks with a memory."""
    if id(policy) not in _seen:  # vectors of runs are kept, and few policies are explained by one process
        _seen[id(policy)] = (policy, _sight_of(policy))
    return _seen[id(policy)][1]


def _sight_of(policy: Policy) -> Sight | None:
    if isinstance(policy, Tree):
        return Sight(
            policy.inputs,
            lambda runs: questions_of(policy.base, runs),
            lambda vectors: policy.changes(vectors).astype(float),
            unit="replicas more",
            tree=_for_shap(policy),
        )
    if isinstance(policy, Foresight | Anticipate):
        return _levels(policy)
    if isinstance(policy, Learned) and policy.network.memory is None:
        return _corrected(policy)
    return None


def _for_shap(tree: Tree) -> dict[str, np.ndarray]:
    asks = [node.input is not None for node in tree.nodes]
    inputs = {name: k for k, name in enumerate(tree.inputs)}
    below = np.array([node.then if ask else -1 for node, ask in zip(tree.nodes, asks, strict=True)])
    return {
        "children_left": below,
        "children_right": np.array(
            [node.otherwise if ask else -1 for node, ask in zip(tree.nodes, asks, strict=True)]
        ),
        "children_default": below,
        "features": np.array([-2 if node.input is None else inputs[node.input] for node in tree.nodes]),
        "thresholds": np.array([node.at_most for node in tree.nodes]),
        "values": np.array([[float(node.change)] for node in tree.nodes]),
        "node_sample_weight": np.ones(len(tree.nodes)),
    }


def questions_of(base: Predictive | None, runs: Sequence[Recording]) -> np.ndarray:
    """What a tree with that base would have asked about at every tick of runs of one length; shape (runs, ticks,
    inputs)."""
    questions, out = Questions([run.situation for run in runs], base), []
    for tick in range(len(runs[0].seen)):
        out.append(questions.see([run.seen[tick] for run in runs]))
        decided = [run.decided[tick] for run in runs]
        questions.decided(np.array([d.order for d in decided]), np.array([d.release for d in decided]))
    return np.stack(out, axis=1)


# --- relative to a scale, and back ---------------------------------------------------------------------------
def _absolute(views: np.ndarray, names: Sequence[str], scale: str) -> np.ndarray:
    out = np.array(views, float)
    at = [k for k, name in enumerate(names) if name in _IN_REPLICAS]
    by = names.index(scale)
    out[:, at] = np.expm1(out[:, at] + out[:, [by]])
    out[:, by] = np.expm1(out[:, by])
    return out


def _relative(vectors: np.ndarray, names: Sequence[str], scale: str) -> np.ndarray:
    out = np.array(vectors, float)
    at = [k for k, name in enumerate(names) if name in _IN_REPLICAS]
    by = names.index(scale)
    out[:, by] = np.log1p(np.maximum(out[:, by], 0.0))
    out[:, at] = np.log1p(np.maximum(out[:, at], 0.0)) - out[:, [by]]
    return out


def _levels(policy: Foresight | Anticipate) -> Sight:
    names = (*("present" if name == "scale" else name for name in INPUTS), "replicas")
    n = len(REFERENCES)

    def vectors(runs: Sequence[Recording]) -> np.ndarray:
        outlook, out = Outlook([run.situation for run in runs]), []
        for tick in range(len(runs[0].seen)):
            seen = [run.seen[tick] for run in runs]
            if tick:
                outlook.update(
                    *(np.array([one[name] for one in seen]) for name in ("arrival_rate", "arrival_peak"))
                )
            references, inputs = outlook.view()
            views = inputs.copy()
            views[:, :n] = references
            views[:, n] = np.expm1(views[:, n])
            out.append(np.column_stack([views, [one.replicas for one in seen]]))
        return np.stack(out, axis=1)

    def reader(policy: Foresight | Anticipate) -> Read:
        read = policy.reader()

        def wanted(vectors: np.ndarray) -> np.ndarray:
            inputs = np.clip(_relative(vectors[:, :-1], names[:-1], "present"), -_LIMIT, _LIMIT)
            order, keep = read(np.maximum(vectors[:, :n], 0.0), inputs)
            return np.clip(vectors[:, -1], order, np.maximum(order, keep))

        return wanted

    network = policy.network if isinstance(policy, Foresight) else None
    if network is None:
        return Sight(names, vectors, reader(policy), label=_nearest)
    return Sight(
        names,
        vectors,
        reader(policy),
        base=reader(policy.replace(network=None)),
        fresh=lambda seed: reader(policy.replace(network=shuffled(network, seed))),
        label=_nearest,
    )


def _nearest(wanted: np.ndarray) -> np.ndarray:
    return np.ceil(wanted - 0.5).astype(int)


def shuffled(network: Network, seed: int) -> Network:
    """The network with its weights drawn anew: normal, each layer with the spread that it had."""
    rng = np.random.default_rng(seed)
    weights = tuple(
        tuple(tuple(row) for row in rng.normal(0, np.std(weight), np.shape(weight)).tolist())
        for weight in network.weights
    )
    found: Network = network.replace(weights=weights)
    return found


def _corrected(policy: Learned) -> Sight:
    two = not isinstance(policy.base, Predictive)
    names = LEVEL_OBSERVATIONS if two else OBSERVATIONS
    scale = "scale" if two else "need"

    def vectors(runs: Sequence[Recording]) -> np.ndarray:
        forward, out = Forward(policy.network), []
        rows = corrections([run.situation for run in runs], policy.base, Guard())
        for tick in range(len(runs[0].seen)):
            values = np.stack([run.seen[tick].values for run in runs])
            if tick:
                rows.update(values)
            view = rows.view(np.array([run.seen[tick].now_s for run in runs]), values)
            out.append(_absolute(view, names, scale))
            rows.decide(forward(view), values)
        return np.stack(out, axis=1)

    at = {name: k for k, name in enumerate(names)}

    def reader(act: Read) -> Read:
        def wanted(vectors: np.ndarray) -> np.ndarray:
            actions = np.clip(act(np.clip(_relative(vectors, names, scale), -20, 20)), -1, 1)
            if two:
                order = (
                    vectors[:, at["order_level"]] * (1 + LEVEL_HEADROOM * actions[:, 0]) + 0.5 * actions[:, 0]
                )
                keep = (
                    vectors[:, at["keep_level"]] * (1 + LEVEL_HEADROOM * actions[:, 1]) + 0.5 * actions[:, 1]
                )
                return np.clip(vectors[:, at["replicas"]], order, np.maximum(order, keep))
            need, headroom = vectors[:, at["need"]], actions[:, 0]
            return np.maximum(need * (1 + HEADROOM * headroom) + headroom, 0.0)

        return wanted

    outputs = len(policy.network.biases[-1])
    return Sight(
        names,
        vectors,
        reader(Forward(policy.network)),
        base=reader(lambda views: np.zeros((len(views), outputs))),
        fresh=lambda seed: reader(Forward(shuffled(policy.network, seed))),
        label=_nearest if two else lambda wanted: np.ceil(wanted - 1e-9).astype(int),
    )


def relearned(sight: Sight, states: Sequence[State], background: Sequence[State]) -> Relearned | None:
    """For the check with random weights: what was learned, which is the outcome less that of the policy without it."""
    base, fresh = sight.base, sight.fresh
    if base is None or fresh is None:
        return None

    def contributed(read: Read) -> list[Vector]:
        def learned(vectors: np.ndarray) -> np.ndarray:
            return read(vectors) - base(vectors)

        return [sight.choice([state, *background], read=learned) for state in states]

    return Relearned(contributed(sight.read), lambda seed: contributed(fresh(seed)))
