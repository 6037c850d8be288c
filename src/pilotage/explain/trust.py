"""Whether explanations can be trusted: checks with a figure, a bar, and an interval where chance plays a part.

Definitions and bars: additivity |sum phi - (f(x) - mean f)| / sd f; infidelity in its masked form (Yeh et al., NeurIPS
2019) E_S[(sum of phi over S - (f(x) - mean_b f(b_S, x_rest)))^2] / var f; deletion (Petsiuk et al., BMVC 2018): inputs
are exchanged for those of visited states, all from the same one, those that push the choice first, and the area under
what is left of the choice's deviation is compared with random orders; insertion is the reverse; sanity under random
weights (Adebayo et al., NeurIPS 2018): rank correlation of contributions, with their signs, to what was learned, that
is, to the difference to the policy without it (sizes alone are alike under any weights, because an input that is far
from the usual, or a large group, moves whatever function more; their correlation is told, and not judged); a
planted input that nothing depends on; stability (Alvarez-Melis & Jaakkola, 2018): Kendall's tau between the rankings
by mean |phi| of two halves of the background, and of two seeds, over the pairs of inputs that the states tell apart in
one of them (two standard errors of the difference): which of two equals comes first says nothing. A check that does not
apply says why, and counts as passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from pilotage.evaluate import interval
from pilotage.explain.attribution import Attribution, attribute
from pilotage.explain.choice import Choice
from pilotage.world.spec import Spec

ORDERS: Final = 20
MASKS: Final = 24
ADDITIVE: Final = 1e-6
TAU: Final = 0.8
SANE: Final = 0.3
NETWORKS: Final = 8
PLANTED: Final = "planted_noise"


class Check(Spec, frozen=True, kw_only=True):
    """One check: what was measured, its 95 % interval where it is an estimate, and what would have passed."""

    name: str
    asked: str
    measured: float | None
    low: float | None = None
    high: float | None = None
    passed: bool
    note: str = ""


class Relearned(NamedTuple):
    """What was learned, in some states: choices whose outcome is what it contributes, and the same of random weights,
    which `fresh` draws from a seed."""

    choices: Sequence[Choice]
    fresh: Callable[[int], Sequence[Choice]]


class Planted(Choice):
    """A choice with one more input, noise, which it does not depend on."""

    def __init__(self, choice: Choice, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._inner, self.unit = choice, choice.unit
        self.names, self.units = (*choice.names, PLANTED), (*choice.units, "")
        self.shown = np.column_stack([choice.shown, rng.standard_normal(len(choice.shown))])

    def ask(self, picks: np.ndarray, blend: float = 1.0) -> np.ndarray:
        return self._inner.outcome(picks[:, :-1], blend)

    def label(self, outcomes: np.ndarray) -> np.ndarray:
        return self._inner.label(outcomes)


def check(
    explained: Sequence[Attribution],
    players: Sequence[int],
    *,
    relearned: Relearned | None = None,
    seed: int = 0,
) -> list[Check]:
    """All checks, on explanations of several states (fifty at least, for the intervals to be narrow).

    `players` are those that the explanations shared out to; `relearned` is None where nothing was learned.
    """
    outcomes = np.array([one.outcome for one in explained])
    usual = np.array([one.usual for one in explained])
    spread = float(np.std(np.concatenate([outcomes, _outcomes(explained[0].choice)])))
    if spread == 0:
        same = "the policy chose the same in every state: nothing to explain"
        return [Check(name="all", asked="a choice that varies", measured=0.0, passed=True, note=same)]
    found = [
        _additivity(explained, outcomes - usual, spread),
        *_infidelity(explained, spread, seed),
        *_deletion(explained, players, spread, seed),
        _planted(explained[: min(8, len(explained))], players, seed),
        *_stability(explained, players, seed),
    ]
    return [*found, _sanity(relearned, seed)]


def _outcomes(choice: Choice) -> np.ndarray:
    """In the explained state and in those of the background, asked anew."""
    rows = np.arange(choice.background + 1)
    return choice.ask(np.repeat(rows[:, None], len(choice.names), axis=1))


def _additivity(explained: Sequence[Attribution], gaps: np.ndarray, spread: float) -> Check:
    """Both outcome and mean are asked again: an outcome that changes when it is asked twice is not explained."""
    worst = 0.0
    for one in explained:
        again = _outcomes(one.choice)
        worst = max(worst, abs(one.phi.sum() - (again[0] - again[1:].mean())))
    measured = float(worst / spread)
    return Check(
        name="additivity", asked=f"<= {ADDITIVE:g} sd", measured=measured, passed=bool(measured <= ADDITIVE),
        note="contributions sum to the choice less the usual one",
    )  # fmt: skip


def _without(choice: Choice, masks: np.ndarray) -> np.ndarray:
    """The mean outcome over the background with the masked players taken from it; shapes (..., players), (...,)."""
    b, n = choice.background, len(choice.names)
    flat = masks.reshape(-1, n)
    picks = np.where(flat[:, None, :], np.arange(1, b + 1)[None, :, None], 0)
    means = choice.outcome(picks.reshape(-1, n)).reshape(len(flat), b).mean(axis=1)
    return np.asarray(means.reshape(masks.shape[:-1]))


def _infidelity(explained: Sequence[Attribution], spread: float, seed: int) -> list[Check]:
    rng = np.random.default_rng([seed, 1])
    own, shuffled = [], []
    for one in explained:
        n = len(one.phi)
        masks = rng.random((MASKS, n)) < rng.random((MASKS, 1))
        lost = one.outcome - _without(one.choice, masks)
        mine = ((masks * one.phi).sum(axis=1) - lost) ** 2
        others = [((masks * rng.permutation(one.phi)).sum(axis=1) - lost) ** 2 for _ in range(ORDERS)]
        own.append(mine.mean() / spread**2)
        shuffled.append(np.mean(others) / spread**2)
    value, gap = interval(np.array(own), seed), interval(np.array(own) - np.array(shuffled), seed)
    return [
        Check(
            name="infidelity", asked="below that of shuffled contributions, interval below 0", measured=gap["mean"],
            low=gap["low"], high=gap["high"], passed=bool(gap["high"] < 0),
            note=f"{value['mean']:.3g} of the choice's variance, {np.mean(shuffled):.3g} if shuffled",
        )
    ]  # fmt: skip


def _deletion(
    explained: Sequence[Attribution], players: Sequence[int], spread: float, seed: int
) -> list[Check]:
    """Of the players that matter: the others would only dilute the random orders."""
    mine = np.asarray(players)
    rng = np.random.default_rng([seed, 2])
    ahead: dict[str, list[float]] = {"deletion": [], "insertion": []}
    if len(mine) < 2:
        note = "a single input has a single order"
        return [
            Check(name=name, asked="beats random order", measured=None, passed=True, note=note)
            for name in ahead
        ]
    for one in explained:
        n = len(mine)
        sign = 1.0 if one.outcome >= one.usual else -1.0
        orders = np.stack(
            [np.argsort(-sign * one.phi[mine], kind="stable"), *(rng.permutation(n) for _ in range(ORDERS))]
        )
        place = np.argsort(orders, axis=1)  # of each player in each order
        steps = np.arange(n + 1)
        gone = np.zeros((len(orders), n + 1, len(one.phi)), bool)
        gone[..., mine] = place[:, None, :] < steps[None, :, None]
        kept = np.zeros_like(gone)
        kept[..., mine] = ~gone[..., mine]
        for name, masks in (("deletion", gone), ("insertion", kept)):
            area = sign * (_without(one.choice, masks) - one.usual).mean(axis=1) / spread
            less = area[0] - area[1:].mean()
            ahead[name].append(-less if name == "deletion" else less)
    found = []
    for name, values in ahead.items():
        gain = interval(np.array(values), seed)
        found.append(
            Check(
                name=name, asked="beats random order, interval above 0", measured=gain["mean"], low=gain["low"],
                high=gain["high"], passed=bool(gain["low"] > 0), note=f"area in sd, {ORDERS} random orders per state",
            )
        )  # fmt: skip
    return found


def _planted(explained: Sequence[Attribution], players: Sequence[int], seed: int) -> Check:
    worst = 0.0
    for k, one in enumerate(explained):
        choice = Planted(one.choice, seed + k)
        method = "exact" if one.method == "exact" else "permutation"
        found = attribute(choice, [*players, len(one.choice.names)], method=method, seed=seed, passes=3)
        top = float(np.abs(found.phi[:-1]).max())
        worst = max(worst, abs(float(found.phi[-1])) / top if top else abs(float(found.phi[-1])))
    return Check(
        name="planted input", asked="<= 0.05 of the largest", measured=worst, passed=bool(worst <= 0.05),
        note="noise that nothing depends on gets nothing",
    )  # fmt: skip


def _stability(explained: Sequence[Attribution], players: Sequence[int], seed: int) -> list[Check]:
    """On at most twenty states: each is explained four times more."""
    some = explained[:: max(1, len(explained) // 20)]
    rng = np.random.default_rng([seed, 3])
    halves = np.array_split(rng.permutation(np.arange(1, some[0].choice.background + 1)), 2)
    found = []
    for name, kinds in (
        ("stability over backgrounds", [{"background": half} for half in halves]),
        ("stability over seeds", [{"seed": seed + 1}, {"seed": seed + 2}]),
    ):
        if name.endswith("seeds") and some[0].method != "permutation":
            note = "exact Shapley values have no seed"
            found.append(Check(name=name, asked=f"tau >= {TAU:g}", measured=1.0, passed=True, note=note))
            continue
        sizes = [
            np.array([np.abs(attribute(one.choice, players, method=_again(one), **kind).phi) for one in some])
            for kind in kinds
        ]
        tau, pairs = _tau(*(size[:, list(players)] for size in sizes))
        found.append(
            Check(
                name=name, asked=f"tau >= {TAU:g}", measured=tau, passed=bool(tau >= TAU - 1e-9),
                note=f"order of {pairs} pairs of inputs by mean contribution over {len(some)} states",
            )
        )  # fmt: skip
    return found


def _tau(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """Kendall's tau between the orders of the columns' means, over the pairs of columns that the rows of one of the two
    tell apart, and how many pairs that are; 1 without any."""
    i, j = np.triu_indices(a.shape[1], 1)
    signs, clear = [], np.zeros(len(i), bool)
    for sizes in (a, b):
        less = sizes[:, i] - sizes[:, j]
        error = less.std(axis=0, ddof=1) / np.sqrt(len(less)) if len(less) > 1 else np.full(len(i), np.inf)
        signs.append(np.sign(less.mean(axis=0)))
        clear |= np.abs(less.mean(axis=0)) > 2 * error
    return float((signs[0] * signs[1])[clear].mean()) if clear.any() else 1.0, int(clear.sum())


def _again(one: Attribution) -> str:
    return "auto" if one.method == "tree" else one.method


def _sanity(relearned: Relearned | None, seed: int) -> Check:
    asked = f"mean rank correlation <= {SANE:g}"
    if relearned is None:
        note = "nothing was learned: a rule has no weights that could be drawn anew"
        return Check(name="random weights", asked=asked, measured=None, passed=True, note=note)
    signed, sizes = [], []
    own = [attribute(choice).phi for choice in relearned.choices]
    for k in range(NETWORKS):
        for a, b in zip(own, [attribute(choice).phi for choice in relearned.fresh(seed + k)], strict=True):
            signed.append(_alike(a, b))
            sizes.append(_alike(np.abs(a), np.abs(b)))
    per_state = np.array(signed).reshape(NETWORKS, -1).mean(axis=0)
    found = interval(per_state, seed)
    return Check(
        name="random weights", asked=asked, measured=found["mean"], low=found["low"], high=found["high"],
        passed=bool(found["mean"] <= SANE),
        note=f"of what was learned, with {NETWORKS} networks of random weights; {np.mean(sizes):.2f} of sizes alone",
    )  # fmt: skip


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; 0 if one of them says nothing."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0
