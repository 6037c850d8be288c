"""A decision tree as a policy: what a larger policy does, in a few questions that a person can read.

`explain.distil` grows it. A leaf says how many replicas to order or release, and, if the policy that was distilled set
one, the batch limit. The questions are about numbers that a person on call can look up: how many replicas short of, or
what share of the replicas, some load is (those of `control.outlook`, or what a base rule says is needed), what waits,
how late answers are, and how long ago replicas were last ordered or released.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.control.outlook import REFERENCES, Outlook
from pilotage.control.policy import (
    INDEX,
    Alone,
    Controller,
    Decision,
    Observation,
    Policy,
    Situation,
    Together,
    values_of,
)
from pilotage.control.scaling import Predictive
from pilotage.world.spec import Count, Spec, SpecError

_LOADS: Final = (
    "last", "highest_5min", "highest_15min", "highest_30min", "mean_1min", "mean_5min", "mean_15min",
    "busiest_second_1min", "busiest_second_5min", "trend_5min", "trend_15min", "highest_rise_at_30min_x6",
    "day_ahead", "day_scaled", "rise_typical", "rise_highest",
)  # fmt: skip
_AT: Final = np.array([REFERENCES.index(name) for name in _LOADS])
_PLAIN: Final = (
    "utilization", "queue_length", "drop_rate", "batch_size", "replicas_starting", "replicas_draining",
)  # fmt: skip
_LONGEST_S: Final = 3600.0
INPUTS: Final = (
    "replicas",  # ordered and not released
    *_PLAIN,
    "latency",  # 95th percentile over the objective
    "missed",  # share of requests that missed the objective
    *(f"short_of_{name}" for name in _LOADS),  # the load, in replicas at full batches, less the replicas
    *(f"use_{name}" for name in _LOADS),  # the load over the replicas
    "since_order",  # s, an hour at most
    "since_release",
    "hour",  # of the day
)
BASE_INPUTS: Final = (
    "short_of_need",  # what the base rule needs before rounding, less the replicas
    "short_of_held_need",  # the highest of that within its scale-down delay
    "use_need",
)


class Node(Spec, frozen=True, kw_only=True, omit_defaults=True):
    """A question (`input` at most `at_most`: go to node `then`, else to `otherwise`), or a leaf (no `input`)."""

    input: str | None = None
    at_most: float = 0.0
    then: Count = 0
    otherwise: Count = 0
    change: int = 0  # replicas to order, or, below 0, to release
    max_batch: Annotated[int, Meta(ge=1)] | None = None


class Tree(Policy, frozen=True, kw_only=True, tag="tree"):
    """A policy that asks the questions of `nodes`, from the first one on; children come after their parents. `base` is
    the rule whose need some of the questions are about (None: no such questions)."""

    nodes: Annotated[tuple[Node, ...], Meta(min_length=1)]
    base: Predictive | None = None

    def __post_init__(self) -> None:
        for k, node in enumerate(self.nodes):
            if node.input is None:
                continue
            if node.input not in self.inputs:
                raise SpecError(
                    f"node {k}: input {node.input!r} does not exist; valid: {', '.join(self.inputs)}"
                )
            if not np.isfinite(node.at_most):
                raise SpecError(f"node {k}: at_most is {node.at_most}; valid: a finite number")
            for child in (node.then, node.otherwise):
                if not k < child < len(self.nodes):
                    raise SpecError(
                        f"node {k}: goes to {child}; valid: a later node, up to {len(self.nodes) - 1}"
                    )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The numbers that questions may be about."""
        return INPUTS if self.base is None else (*INPUTS, *BASE_INPUTS)

    @property
    def leaves(self) -> int:
        return sum(node.input is None for node in self.nodes)

    def leaf_of(self, vectors: np.ndarray) -> np.ndarray:
        """The number of the leaf that vectors of shape (rows, len(inputs)) end in; shape (rows,)."""
        at = {name: k for k, name in enumerate(self.inputs)}
        column = np.array([-1 if node.input is None else at[node.input] for node in self.nodes])
        below = np.array([node.then for node in self.nodes])
        above = np.array([node.otherwise for node in self.nodes])
        threshold = np.array([node.at_most for node in self.nodes])
        where = np.zeros(len(vectors), int)
        rows = np.arange(len(vectors))
        while (asks := column[where] >= 0).any():
            yes = vectors[rows, np.maximum(column[where], 0)] <= threshold[where]
            where = np.where(asks, np.where(yes, below[where], above[where]), where)
        return where

    def changes(self, vectors: np.ndarray) -> np.ndarray:
        """Replicas to order (above 0) or release, for vectors of shape (rows, len(inputs)); shape (rows,)."""
        return np.array([node.change for node in self.nodes])[self.leaf_of(vectors)]

    def save(self, folder: Path) -> None:
        """Writes `policy.json`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "policy.json.part"
        part.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
        part.replace(folder / "policy.json")

    def begin(self, situation: Situation) -> Controller:
        return Alone(_Tree(self, [situation]))

    def begin_together(self, situations: Sequence[Situation]) -> Together:
        return _Tree(self, situations)


class Questions:
    """The numbers that a tree asks about, for rows of services: `see` takes in a tick and answers with them,
    `decided` is told what was ordered and released."""

    def __init__(self, situations: Sequence[Situation], base: Predictive | None) -> None:
        self._outlook, self._base = Outlook(situations), base
        self._capacity = self._outlook.capacity_rps
        self._slo_s = np.array([s.service.slo_s for s in situations])
        self._tick_s = situations[0].tick_s
        n = len(situations)
        self._since = np.full((2, n), _LONGEST_S)
        self._tracker = None if base is None else base.tracker(situations)
        keep = 1 if base is None else int(base.scale_down_delay_s / self._tick_s) + 1
        self._needs: list[np.ndarray] = []
        self._keep = keep
        self._first = True

    def see(self, seen: Sequence[Observation]) -> np.ndarray:
        """Shape (rows, inputs)."""
        values = values_of(seen)
        if not self._first:  # the first observation is older than the run; the history has it
            rates = values[:, INDEX["arrival_rate"]], values[:, INDEX["arrival_peak"]]
            self._outlook.update(*rates)
            if self._tracker is not None:
                self._tracker.update(*rates)
            self._since = np.minimum(self._since + self._tick_s, _LONGEST_S)
        self._first = False
        known = np.nan_to_num(values, nan=0.0)
        replicas = np.array([float(one.replicas) for one in seen])
        shared = np.maximum(replicas, 1.0)
        loads = self._outlook.view()[0][:, _AT].T
        attained = values[:, INDEX["attainment"]]
        columns = [
            replicas,
            *(known[:, INDEX[name]] for name in _PLAIN),
            known[:, INDEX["latency_p95"]] / self._slo_s,
            np.where(np.isnan(attained), 0.0, 1 - attained),
            *(loads - replicas),
            *(loads / shared),
            *self._since,
            np.array([one.now_s % 86400 / 3600 for one in seen]),
        ]
        if self._base is not None:
            need = self._base.need(self._tracker, self._capacity)  # type: ignore[arg-type]
            self._needs = [*self._needs, need][-self._keep :]
            columns += [need - replicas, np.max(self._needs, axis=0) - replicas, need / shared]
        return np.stack(columns, axis=1)

    def decided(self, order: np.ndarray, release: np.ndarray) -> None:
        """What was ordered and released after the last `see`; shapes (rows,)."""
        self._since[0, order > 0] = 0.0
        self._since[1, release > 0] = 0.0


class _Tree:
    def __init__(self, policy: Tree, situations: Sequence[Situation]) -> None:
        self._policy, self._questions = policy, Questions(situations, policy.base)

    def decide(self, seen: Sequence[Observation]) -> list[Decision]:
        leaves = self._policy.leaf_of(self._questions.see(seen)).tolist()
        found = []
        for leaf, one in zip(leaves, seen, strict=True):
            node = self._policy.nodes[leaf]
            release = min(max(-node.change, 0), one.replicas)
            found.append(Decision(max(node.change, 0), release, node.max_batch, reason=f"leaf {leaf}"))
        self._questions.decided(np.array([d.order for d in found]), np.array([d.release for d in found]))
        return found
