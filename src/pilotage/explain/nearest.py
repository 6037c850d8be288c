"""What would have had to be different for another decision: the nearest change that flips it, found by trying it.

Values are moved towards those of states that were visited, one input at a time, then two from the same state, then all;
of what flips the decision, the nearest is taken (each input's distance in median absolute deviations of the background,
with a price for every input moved) and moved back as far as the other decision lasts. Every answer has been put to the
policy itself, so it is valid by construction; what is not found is not said. Inputs that nobody can change, such as the
replicas that are there, are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Final

import numpy as np

from pilotage.explain.attribution import Attribution
from pilotage.explain.choice import EARLIER, TIME, Choice
from pilotage.world.spec import Spec

_FIXED: Final = (
    "replicas",
    "max_batch",
    EARLIER,
    TIME,
    "service",
    "price_and_time_left",
    "age",
    "batches_left",
)
_PER_INPUT: Final = 0.5  # deviations that every further input costs
_HALVINGS: Final = 12


class Moved(Spec, frozen=True, kw_only=True):
    """An input, what it was and what it would have to be, in its unit."""

    input: str
    unit: str
    was: float
    to: float


class Flip(Spec, frozen=True, kw_only=True):
    """A change of the situation with which the policy decides otherwise, how far it is in median absolute deviations,
    and the outcome with it."""

    moved: tuple[Moved, ...]
    distance: float
    outcome: float


def nearest(
    explained: Attribution,
    players: Sequence[int],
    wanted: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Flip | None:
    """The nearest flip of a decision, or None if no visited state brings one. `wanted` says which labels will do (None:
    all but the one that was decided)."""
    choice = explained.choice
    own = int(choice.label(np.array([explained.outcome]))[0])
    shown = choice.shown
    free = [k for k in players if not choice.names[k].startswith(_FIXED) and np.isfinite(shown[:, k]).all()]
    scale = np.median(np.abs(shown[1:] - np.median(shown[1:], axis=0)), axis=0)
    scale = np.where(scale > 0, scale, np.maximum(shown[1:].std(axis=0), 1e-9))

    def flips(outcomes: np.ndarray) -> np.ndarray:
        labels = choice.label(outcomes)
        return labels != own if wanted is None else wanted(labels)

    for tries in _attempts(choice, free):
        found = np.flatnonzero(flips(choice.outcome(tries)))
        if len(found) == 0:
            continue
        best: tuple[float, float, np.ndarray] | None = None
        far = [_distance(shown, scale, tries[k], 1.0) for k in found]
        for k in found[np.argsort(far, kind="stable")][:8]:
            blend = _least(choice, tries[k], flips)
            distance = _distance(shown, scale, tries[k], blend)
            if best is None or distance < best[0]:
                best = distance, blend, tries[k]
        assert best is not None
        distance, blend, picks = best
        moved = tuple(
            Moved(
                input=choice.names[p], unit=choice.units[p], was=float(shown[0, p]),
                to=float(shown[0, p] + blend * (shown[picks[p], p] - shown[0, p])),
            )
            for p in free
            if picks[p] and shown[picks[p], p] != shown[0, p]
        )  # fmt: skip
        return Flip(moved=moved, distance=distance, outcome=float(choice.outcome(picks[None], blend)[0]))
    return None


def _attempts(choice: Choice, free: Sequence[int]) -> Iterator[np.ndarray]:
    """Picks to try, the simpler ones first."""
    sources = range(1, choice.background + 1)
    for count in sorted({1, min(2, len(free)), len(free)}):
        if count < 1:
            return
        tries = np.zeros((0, len(choice.names)), int)
        for members in combinations(free, count):
            block = np.zeros((choice.background, len(choice.names)), int)
            block[:, list(members)] = np.array(sources)[:, None]
            tries = np.concatenate([tries, block])
        yield tries


def _distance(shown: np.ndarray, scale: np.ndarray, picks: np.ndarray, blend: float) -> float:
    moved = np.flatnonzero(picks)
    far = blend * np.abs(shown[picks[moved], moved] - shown[0, moved]) / scale[moved]
    return float(far.sum() + _PER_INPUT * np.count_nonzero(far))


def _least(choice: Choice, picks: np.ndarray, flips: Callable[[np.ndarray], np.ndarray]) -> float:
    """The least share of the way to the other state that flips the decision, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if bool(flips(choice.outcome(picks[None], middle))[0]):
            high = middle
        else:
            low = middle
    return high
