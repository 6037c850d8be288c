"""The account of one decision: a sentence for the person on call, and the figures and checks behind it.

One form for every kind of decision; `explain.decisions` makes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import numpy as np

from pilotage.explain.attribution import Attribution
from pilotage.explain.dollars import split
from pilotage.explain.nearest import Flip
from pilotage.explain.trust import Check
from pilotage.world.spec import Spec

_SHOWN: Final = 3  # inputs that the sentence names


class Contribution(Spec, frozen=True, kw_only=True):
    """How much one input moved the choice from the usual one; `value` is what it was, `usual` the background's median,
    both in `unit` (standard deviations of its members if the input is a group; None if it is no number)."""

    input: str
    value: float | None
    usual: float | None
    unit: str
    contribution: float


class Option(Spec, frozen=True, kw_only=True):
    """An alternative: what it is expected to cost by item and in total, and how much more than what was decided."""

    decision: str
    usd: dict[str, dict[str, float]]
    more_usd: dict[str, dict[str, float]]


class Account(Spec, frozen=True, kw_only=True):
    """One decision explained."""

    env: str
    policy: str
    kind: Literal["scaling", "retraining", "rollout"]
    subject: str  # the service
    at: str
    decision: str
    sentence: str
    outcome: float
    usual: float
    unit: str
    method: str
    contributions: tuple[Contribution, ...]
    horizon_h: float | None
    options: tuple[Option, ...]
    flip: Flip | None
    repeated: float | None  # share of decisions that a replay repeats; None: nothing is replayed
    trust: tuple[Check, ...]

    @property
    def trusted(self) -> bool:
        """Whether every check passed."""
        return all(one.passed for one in self.trust)


class Study(NamedTuple):
    """Explanations of many states of one policy, which players may matter, and what its replays repeat."""

    explained: list[Attribution]
    players: list[int]
    checks: list[Check]
    repeated: float | None


def labels(explained: Sequence[Attribution]) -> list[int]:
    """The decisions that are explained, as their outcomes say."""
    return [int(one.choice.label(np.array([one.outcome]))[0]) for one in explained]


def replayed(share: float, note: str) -> Check:
    """The check on decisions that were taken again."""
    return Check(
        name="replay", asked=">= 0.95 of decisions repeated", measured=share, passed=share >= 0.95, note=note
    )


def alternatives(names: Sequence[str], usd: np.ndarray) -> tuple[Option, ...]:
    """What they cost; `usd` has shape (alternatives, futures, ITEMS); the first is what was decided."""
    found = []
    for k, name in enumerate(names):
        more = usd[k] - usd[0]
        found.append(Option(decision=name, usd=split(usd[k]), more_usd=split(more)))
    return tuple(found)


def contributions(one: Attribution) -> tuple[Contribution, ...]:
    """Those that are not 0, the largest first."""
    choice = one.choice
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what was never measured has no usual value either
        usual = np.nanmedian(choice.shown[1:], axis=0)
    return tuple(
        Contribution(
            input=choice.names[k], value=_known(choice.shown[0, k]), usual=_known(usual[k]), unit=choice.units[k],
            contribution=float(one.phi[k]),
        )
        for k in one.ranked
        if one.phi[k] != 0
    )  # fmt: skip


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def sentence(account: Account) -> str:
    """One plain sentence for the person on call."""
    parts = [f"{account.at}: {account.policy} {account.decision} for {account.subject}"]
    if account.kind == "rollout":
        parts = [f"{account.at}: {account.policy} on {account.subject}: {account.decision}"]
    because = []
    for one in account.contributions[:_SHOWN]:
        value = "" if one.value is None or not one.unit else f" was {one.value:.3g} {one.unit}"
        usual = "" if one.usual is None or not one.unit else f", usually {one.usual:.3g}"
        because.append(f"{one.input.replace('_', ' ')}{value}{usual} ({one.contribution:+.2f})")
    if because:
        parts.append("mainly because " + "; ".join(because))
    if len(account.options) > 1:
        best = min(account.options[1:], key=lambda option: option.more_usd["total"]["mean"])
        more = best.more_usd["total"]
        word = "more" if more["mean"] >= 0 else "less"
        low, high = sorted((abs(more["low"]), abs(more["high"])))
        sure = f"95 %: {low:.3g} to {high:.3g}"
        if more["low"] <= 0 <= more["high"]:
            sure = f"95 %: {-more['low']:.3g} less to {more['high']:.3g} more"
        hours = account.horizon_h or 0.0
        span = f"{hours * 60:.0f} minutes" if hours < 2 else f"{hours:.0f} hours"
        parts.append(
            f"the best alternative, {best.decision}, is expected to cost ${abs(more['mean']):.3g} {word} over the "
            f"next {span} ({sure})"
        )
    if account.flip is not None:
        moved = " and ".join(
            f"{one.input.replace('_', ' ')} {one.to:.3g}{' ' + one.unit if one.unit else ''} instead of {one.was:.3g}"
            for one in account.flip.moved
        )
        parts.append(f"it would have decided otherwise with {moved}")
    return "; ".join(parts) + "."
