"""One decision as a function of its inputs, whatever the policy: the face that everything else here explains.

A `Choice` has players (inputs, or groups of them), the values they had in the state that is explained, and the values
they had in states that the same policy visited on its own (the background). `outcome` takes *picks*: for every player
the number of the state that its value comes from, 0 for the explained one, j for the j-th of the background. So a
player may be anything that can be swapped: a number, a group of numbers, a signal with all its recent past.

There are two kinds. A `Vector` is a function of numbers that the policy itself looks at: a network's inputs, a tree's,
a retraining network's features; its outcome is what the policy wants before rounding. A `Replay` is for rules that
remember: the decision is taken again by a fresh controller, which is shown the last ticks of the run with some signals
exchanged, after a past that is exchanged as well. Its outcome is the decision itself. Of a rule that remembers longer
than the replay lasts, the replay is lengthened until it repeats the decision that was taken.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from pilotage.control.guard import Guard
from pilotage.control.policy import FEATURES, Decision, Observation, Policy, Situation
from pilotage.control.steer import Helm, steer
from pilotage.engine.cluster import Cluster, World, recorded
from pilotage.scenario import Scenario
from pilotage.world.spec import SpecError

EARLIER: Final = "earlier_traffic"  # the player that is the past before a replay begins
TIME: Final = "time_of_day"
_NAMES: Final = tuple(feature.name for feature in FEATURES)
_COUNTS: Final = np.array(
    [feature.unit in ("replicas",) or feature.name == "max_batch" for feature in FEATURES]
)  # whole numbers, also half-way between two states
_ROWS: Final = 256  # controllers at once: some keep a day of every service's past


class Recording(NamedTuple):
    """One service in one run of a policy: what it saw and decided, tick by tick; `advised` is what another policy said
    of the same observations, if one was asked."""

    situation: Situation
    world: World
    seen: list[Observation]
    decided: list[Decision]
    advised: list[Decision]


class State(NamedTuple):
    """A decision that was taken."""

    run: Recording
    tick: int

    @property
    def seen(self) -> Observation:
        return self.run.seen[self.tick]

    @property
    def decision(self) -> Decision:
        return self.run.decided[self.tick]

    @property
    def change(self) -> int:
        """Replicas more (or less) than before, after the guard."""
        return self.decision.order - self.decision.release


def record(
    policy: Policy,
    scenario: Scenario,
    worlds: Sequence[World],
    service: int = 0,
    *,
    adviser: Policy | None = None,
    guard: Guard | None = None,
) -> list[Recording]:
    """Runs a policy in worlds and keeps what it saw and decided for one service; `adviser` is asked, and not obeyed."""
    worlds = recorded(scenario, worlds)
    cluster = Cluster(scenario, worlds)
    services = len(scenario.services)
    rows = range(len(worlds) * services)
    situations = [cluster.situation(r // services, r % services) for r in rows]
    helm = Helm([policy] * len(rows), situations, guard or Guard())
    other = None if adviser is None else Helm([adviser] * len(rows), situations, guard or Guard())
    runs = [
        Recording(situations[w * services + service], world, [], [], []) for w, world in enumerate(worlds)
    ]

    def keep(_: int, seen: Sequence[Observation], decided: Sequence[Decision]) -> None:
        advised = [] if other is None else other.decide(seen)
        for w, run in enumerate(runs):
            row = w * services + service
            run.seen.append(seen[row])
            run.decided.append(decided[row])
            if advised:
                run.advised.append(advised[row])

    steer(cluster, helm, scenario.ticks, keep)
    return runs


def visited(
    runs: Sequence[Recording], count: int, first: int, seed: int = 0, acting: bool = False
) -> list[State]:
    """States of the runs, from tick `first` on, stratified by load: as many of every regime of the arrival rate. With
    `acting`, half of them are states in which replicas were ordered or released, as far as there are any."""
    states = [State(run, tick) for run in runs for tick in range(first, len(run.seen))]
    if not states:
        raise SpecError(f"the runs have no tick after the {first}-th; give a longer run (--hours)")
    changing = [state for state in states if state.change] if acting else []
    some = _by_load(changing, min(count // 2, len(changing)), seed) if changing else []
    return [*some, *_by_load(states, count - len(some), seed + len(some))]


def _by_load(states: Sequence[State], count: int, seed: int) -> list[State]:
    rates = np.array([state.seen["arrival_rate"] for state in states])
    order = np.argsort(np.nan_to_num(rates), kind="stable")
    strata = np.array_split(order, min(count, len(order)))
    rng = np.random.default_rng(seed)
    return [states[rng.choice(part)] for part in strata]


class Choice:
    """A decision as a function of its inputs.

    `names` are the players, `units` theirs; `shown` has shape (1 + background, players): what they were, NaN where a
    player is no single number. `label` turns outcomes into decisions that can be told apart.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    shown: np.ndarray
    unit: str

    @property
    def background(self) -> int:
        return len(self.shown) - 1

    def ask(self, picks: np.ndarray, blend: float = 1.0) -> np.ndarray:
        """The outcome with each player's value taken from the state that `picks` says; shapes (rows, players) and
        (rows,). With `blend` below 1 values go only so far from the explained ones."""
        raise NotImplementedError

    def outcome(self, picks: np.ndarray, blend: float = 1.0) -> np.ndarray:
        """The same, which need not be asked again."""
        return self.ask(np.asarray(picks, int), blend)

    def label(self, outcomes: np.ndarray) -> np.ndarray:
        """The decision that an outcome is, as whole numbers."""
        return np.round(outcomes).astype(int)


class Remembering(Choice):
    """A choice that is dear to ask, and of few players: all answers are kept, by values of `blend` and picks."""

    def outcome(self, picks: np.ndarray, blend: float = 1.0) -> np.ndarray:
        rows, inverse = np.unique(np.asarray(picks, int), axis=0, return_inverse=True)
        known: dict[tuple[float, bytes], float] = self.__dict__.setdefault("_known", {})
        keys = [(blend, row.tobytes()) for row in rows]
        new = [k for k, key in enumerate(keys) if key not in known]
        if new:
            found = self.ask(rows[new], blend).tolist()
            known |= {keys[k]: one for k, one in zip(new, found, strict=True)}
        return np.array([known[key] for key in keys])[inverse.reshape(-1)]


class Vector(Choice):
    """A function of numbers, `read`, of shape (rows, columns) to (rows,); `groups` has the columns of every player.
    `tree` is the function as shap's tree explainer takes it, if it is a tree whose players are the columns."""

    def __init__(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        values: np.ndarray,
        groups: dict[str, list[int]],
        unit: str,
        units: dict[str, str],
        label: Callable[[np.ndarray], np.ndarray] | None = None,
        tree: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.read, self.values, self.unit, self.tree = read, np.asarray(values, float), unit, tree
        self.names = tuple(groups)
        self.units = tuple(units.get(name, "") for name in groups)
        self._player = np.zeros(self.values.shape[1], int)
        for k, columns in enumerate(groups.values()):
            self._player[columns] = k
        # a group is shown as its value if it has one, else by how far it is from the middle of the background
        middle = np.median(self.values, axis=0)
        spread = np.maximum(self.values.std(axis=0), 1e-12)
        far = (self.values - middle) / spread
        self.shown = np.stack(
            [
                self.values[:, columns[0]] if len(columns) == 1 else far[:, columns].mean(axis=1)
                for columns in groups.values()
            ],
            axis=1,
        )
        self._label = label

    def reading(self, read: Callable[[np.ndarray], np.ndarray]) -> Vector:
        """The same numbers, read by another function."""
        other = copy.copy(self)
        other.read = read
        return other

    def ask(self, picks: np.ndarray, blend: float = 1.0) -> np.ndarray:
        source = picks[:, self._player]
        values = self.values[source, np.arange(self.values.shape[1])]
        if blend < 1.0:
            values = self.values[0] + blend * (values - self.values[0])
        return np.asarray(self.read(values), float)

    def label(self, outcomes: np.ndarray) -> np.ndarray:
        return super().label(outcomes) if self._label is None else self._label(outcomes)


class Replay(Choice):
    """A scaling decision, taken again with signals of the last `ticks` ticks exchanged. The outcome is replicas wanted:
    those that were there, plus ordered, less released, before the guard."""

    unit = "replicas"

    def __init__(self, policy: Policy, explained: State, background: Sequence[State], ticks: int) -> None:
        states = [explained, *background]
        short = [state.tick for state in states if state.tick < ticks]
        if short:
            raise SpecError(f"tick {min(short)}: a replay of {ticks} ticks needs as many before it")
        self._policy = policy
        self._values = np.stack(
            [[one.values for one in state.run.seen[state.tick - ticks : state.tick + 1]] for state in states]
        )  # (states, ticks + 1, features)
        self._now_s = np.array(
            [[one.now_s for one in state.run.seen[state.tick - ticks : state.tick + 1]] for state in states]
        )
        self._situations = [_as_of(state.run, state.tick - ticks) for state in states]
        self._age_s = np.zeros(len(FEATURES))
        hours = (self._now_s[:, -1] % 86400) / 3600
        past = [np.mean(s.history_rps[-120:]) if len(s.history_rps) else np.nan for s in self._situations]
        self.names = (*_NAMES, EARLIER, TIME)
        self.units = (*(feature.unit for feature in FEATURES), "requests/s", "h")
        self.shown = np.column_stack([self._values[:, -1], past, hours])

    def ask(self, picks: np.ndarray, blend: float = 1.0) -> np.ndarray:
        rows, inverse = np.unique(picks, axis=0, return_inverse=True)
        found = [self._decide(rows[lo : lo + _ROWS], blend) for lo in range(0, len(rows), _ROWS)]
        return np.concatenate(found)[inverse.reshape(-1)]

    def _decide(self, picks: np.ndarray, blend: float) -> np.ndarray:
        n, features = len(picks), len(FEATURES)
        values = np.moveaxis(self._values[picks[:, :features], :, np.arange(features)], 1, 2).copy()
        if blend < 1.0:
            mixed = self._values[0] + blend * (values - self._values[0])
            values = np.where(_COUNTS, np.round(mixed), mixed)
        now_s = self._now_s[picks[:, features + 1]].tolist()
        situations = [self._situations[k] for k in picks[:, features].tolist()]
        together = self._policy.begin_together(situations)
        if together is not None:
            for tick in range(values.shape[1]):
                seen = [Observation(now_s[k][tick], values[k, tick], self._age_s) for k in range(n)]
                decided = list(together.decide(seen))
        else:
            decided, seen = [], []
            for k, situation in enumerate(situations):
                controller = self._policy.begin(situation)
                for tick in range(values.shape[1]):
                    last = Observation(now_s[k][tick], values[k, tick], self._age_s)
                    decision = controller.decide(last)
                decided.append(decision)
                seen.append(last)
        return np.array(
            [one.replicas + d.order - d.release for one, d in zip(seen, decided, strict=True)], float
        )


def _as_of(run: Recording, tick: int) -> Situation:
    """What was known of the service before a tick: its past, and the ticks of the run until then."""
    rates = [one["arrival_rate"] for one in run.seen[1 : tick + 1]]
    past = np.concatenate([run.situation.history_rps, np.nan_to_num(np.array(rates, float))])
    return Situation(run.situation.service, run.situation.pools, run.situation.tick_s, past)


def memory_of(policy: Policy, states: Sequence[State], shortest: int = 24) -> tuple[int, float]:
    """For how many ticks to replay a policy so that it repeats its decisions, and the share of these that it repeats.

    The shortest of `shortest` and its doubles that repeats 98 % of them, else the longest that the states allow, with
    what it achieves.
    """
    ticks, longest = shortest, min(state.tick for state in states)
    while True:
        ticks = min(ticks, longest)
        again = 0
        for state in states:
            found = Replay(policy, state, [], ticks).outcome(np.zeros((1, len(_NAMES) + 2), int))[0]
            again += within_bounds(state, found) == state.seen.replicas + state.change
        if again >= 0.98 * len(states) or ticks == longest:
            return ticks, again / len(states)
        ticks *= 2


def within_bounds(state: State, wanted: float) -> int:
    """What the guard's bounds leave of a number of replicas wanted."""
    low, high = Guard().limits(state.run.situation)
    return int(np.clip(wanted, low, high))


def words(state: State) -> str:
    """The decision in words."""
    change, now = state.change, state.seen.replicas
    if change == 0:
        return f"kept {now} replicas"
    verb = "ordered" if change > 0 else "released"
    return (
        f"{verb} {abs(change)} replica{'s' if abs(change) > 1 else ''} ({now} before, {now + change} after)"
    )
