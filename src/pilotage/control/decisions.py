"""Decisions for many services at a tick, in arrays as `Observations` are: a tick then makes no object per service."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np

from pilotage.control.policy import Decision


class Decisions(Sequence[Decision]):
    """What is ordered and released for every row, whole numbers of shape (rows,); nothing else is changed.

    A row becomes a `Decision` when it is asked for, and only then does `why(row)` put its reason into words.
    """

    def __init__(self, order: np.ndarray, release: np.ndarray, why: Callable[[int], str]) -> None:
        self.order, self.release, self.why = order, release, why

    @staticmethod
    def towards(target: np.ndarray, current: np.ndarray, why: Callable[[int], str]) -> Decisions:
        """`Decision.towards` of every row, of whole numbers; `current` as `Observation.replicas`."""
        change = target - current
        return Decisions(np.maximum(change, 0), np.maximum(-change, 0), why)

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, row: int) -> Decision: ...
    @overload
    def __getitem__(self, row: slice) -> Decisions: ...
    def __getitem__(self, row: int | slice) -> Decision | Decisions:
        if isinstance(row, slice):
            rows = range(len(self))[row]
            return Decisions(self.order[row], self.release[row], lambda k: self.why(rows[k]))
        row = range(len(self))[row]
        return Decision(order=int(self.order[row]), release=int(self.release[row]), reason=self.why(row))

    def __iter__(self) -> Iterator[Decision]:
        for row, (order, release) in enumerate(zip(self.order.tolist(), self.release.tolist(), strict=True)):
            yield Decision(order=order, release=release, reason=self.why(row))


def amounts_of(decisions: Sequence[Decision]) -> tuple[np.ndarray, np.ndarray]:
    """What is ordered and released for all rows, to be changed by whoever asks; each of shape (rows,)."""
    if isinstance(decisions, Decisions):
        return decisions.order.copy(), decisions.release.copy()
    return (
        np.array([one.order for one in decisions], np.int64),
        np.array([one.release for one in decisions], np.int64),
    )
