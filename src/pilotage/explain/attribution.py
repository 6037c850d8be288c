"""Shapley values of a choice: how much each input moves it away from what the policy does on average.

    phi_i = sum over S without i of |S|! (M - |S| - 1)! / M! (v(S + i) - v(S)),   v(S) = mean_b f(x_S, b_rest)

with b over the background, states that the policy visits (Lundberg & Lee, A unified approach to interpreting model
predictions, NeurIPS 2017); their sum is f(x) - mean_b f(b). shap computes them: exactly up to `EXACT` players, by
permutations beyond, by the tree explainer for a tree.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from pilotage.explain.choice import Choice, Vector

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of optional parts that are not installed
    import shap

EXACT: Final = 10
_PASSES: Final = 10


class Attribution(NamedTuple):
    """Shapley values `phi` of a choice, shape (players,), in the unit of its outcome; `usual` is the background's mean
    outcome, `outcome` the explained one; `method` is exact, permutation or tree."""

    choice: Choice
    phi: np.ndarray
    usual: float
    outcome: float
    method: str

    @property
    def ranked(self) -> list[int]:
        """Players by the size of their contribution, largest first."""
        return np.argsort(-np.abs(self.phi), kind="stable").tolist()


def attribute(
    choice: Choice,
    players: Sequence[int] | None = None,
    *,
    background: np.ndarray | None = None,
    method: str = "auto",
    passes: int = _PASSES,
    seed: int = 0,
) -> Attribution:
    """Shapley values of one choice.

    `players` are those that may matter (None: all; see `relevant`), the others get 0. `background` are numbers of
    states to average over, from 1 on (None: all). `method` is auto, exact, or permutation with so many `passes`.
    """
    rows = np.arange(1, choice.background + 1) if background is None else np.asarray(background)
    if len(rows) == 0:
        raise ValueError("background is empty; give at least one state that the policy visited")
    mine = np.arange(len(choice.names)) if players is None else np.asarray(players, int)
    phi = np.zeros(len(choice.names))
    explained = float(choice.outcome(np.zeros((1, len(choice.names)), int))[0])
    every = np.repeat(rows[:, None], len(choice.names), axis=1)
    every[:, np.setdiff1d(np.arange(len(choice.names)), mine)] = 0
    usual = float(choice.outcome(every).mean())
    exact = method == "exact" or (method == "auto" and len(mine) <= EXACT)
    if isinstance(choice, Vector) and choice.tree is not None and method == "auto":
        return Attribution(choice, _of_tree(choice, rows), usual, explained, "tree")
    if len(mine) == 1:  # shap wants two players at least
        phi[mine[0]] = explained - usual
    elif len(mine) > 1:
        phi[mine] = _shap(choice, mine, rows, exact, passes, seed)
    return Attribution(choice, phi, usual, explained, "exact" if exact else "permutation")


def _of_tree(choice: Vector, rows: np.ndarray) -> np.ndarray:
    """Exact values of a tree (interventional, Lundberg et al., Nature Machine Intelligence 2, 2020)."""
    assert choice.tree is not None
    explainer = shap.TreeExplainer(
        {"trees": [choice.tree]}, choice.values[rows], feature_perturbation="interventional"
    )
    return np.asarray(explainer.shap_values(choice.values[:1], check_additivity=False), float).reshape(-1)


def _shap(
    choice: Choice, mine: np.ndarray, rows: np.ndarray, exact: bool, passes: int, seed: int
) -> np.ndarray:
    def outcome(picks: Any) -> np.ndarray:
        picks = np.asarray(picks)
        full = np.zeros((len(picks), len(choice.names)), int)
        full[:, mine] = picks
        return choice.outcome(full)

    masker = shap.maskers.Independent(np.repeat(rows[:, None], len(mine), axis=1).astype(float), len(rows))
    kind = shap.explainers.ExactExplainer if exact else shap.explainers.PermutationExplainer
    explainer = kind(outcome, masker) if exact else kind(outcome, masker, seed=seed)
    most = 2 ** len(mine) if exact else passes * (2 * len(mine) + 1)
    options: dict[str, Any] = {"max_evals": most, "silent": True}
    if exact:
        options["interactions"] = False
    found = explainer(np.zeros((1, len(mine))), **options)
    return np.asarray(found.values[0], float)


def relevant(choices: Sequence[Choice], seed: int = 0, tries: int = 24) -> list[int]:
    """The players that have ever changed an outcome, of choices with the same players.

    In four of the choices every player is exchanged `tries` times while random others are, too. Then in every choice
    all that are left are exchanged at once, for those of each state of the background: where that changes an outcome,
    one after the other is, and who changes it matters. So contributions sum to the choice less the usual one; what only
    matters together with some others may be missed, and shows in the infidelity.
    """
    rng = np.random.default_rng(seed)
    known = [choice for choice in choices if choice.background > 0]
    matters = np.zeros(len(choices[0].names), bool)
    for choice in known[:: max(1, len(known) // 4)]:
        matters |= _exchanged(choice, np.flatnonzero(~matters), rng, tries)
    for choice in known:
        while (found := _left_out(choice, matters)).any():
            matters |= found
    return np.flatnonzero(matters).tolist()


def _exchanged(choice: Choice, players: np.ndarray, rng: np.random.Generator, tries: int) -> np.ndarray:
    """Which of some players change an outcome while random others are exchanged."""
    n = len(choice.names)
    matters = np.zeros(n, bool)
    if len(players) == 0:
        return matters
    source = rng.integers(1, choice.background + 1, (tries, 1))
    without = np.where(rng.random((tries, n)) < 0.5, source, 0)
    after = np.repeat(without[None], len(players), axis=0)
    for k, player in enumerate(players):
        after[k, :, player] = np.where(without[:, player] > 0, 0, source[:, 0])
    changed = choice.outcome(after.reshape(-1, n)).reshape(len(players), tries) != choice.outcome(without)
    matters[players] = changed.any(axis=1)
    return matters


def _left_out(choice: Choice, matters: np.ndarray) -> np.ndarray:
    """Which of the other players, exchanged one after the other, change what those that matter have left."""
    n, rows = len(matters), np.arange(1, choice.background + 1)[:, None]
    whole = choice.outcome(np.repeat(rows, n, axis=1)) != choice.outcome(np.where(matters, rows, 0))
    if not whole.any():
        return np.zeros(n, bool)
    others = np.flatnonzero(~matters)
    step = np.repeat(np.where(matters, rows[whole], 0)[:, None], len(others) + 1, axis=1)
    for k, player in enumerate(others):
        step[:, k + 1 :, player] = rows[whole]
    outcomes = choice.outcome(step.reshape(-1, n)).reshape(step.shape[:2])
    found = np.zeros(n, bool)
    found[others] = (np.diff(outcomes, axis=1) != 0).any(axis=0)
    return found
