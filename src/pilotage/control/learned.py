"""Learned policies, run with NumPy alone: what a network sees, what its outputs mean, and the network.

A learned policy corrects another one, its base. The network sees the situation in units that do not depend on the
service (loads in replicas, times relative to the objective) and answers with three numbers in [-1, 1]; all zeros is the
base itself, so that an untrained policy is already sensible. The base is `predictive`, which forecasts the load at the
end of the start-up delay and says how many replicas that needs, or one of the policies of `control.foresight`, with two
levels and their outlook. `corrections` gives the contract for any number of rows at once: the training environment runs
thousands, a controller runs one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.control.configuring import Configured
from pilotage.control.forecast import LoadTracker
from pilotage.control.foresight import Anticipate, Foresight, Levels, whole
from pilotage.control.guard import Guard
from pilotage.control.network import Network
from pilotage.control.outlook import INPUTS
from pilotage.control.policy import (
    INDEX,
    Alone,
    Controller,
    Decision,
    Observation,
    Policy,
    Situation,
    Together,
    times_of,
    values_of,
)
from pilotage.control.scaling import Predictive, parse
from pilotage.control.tree import Tree
from pilotage.world.spec import Spec, SpecError, decode, read_json

# what the three outputs do to `predictive`, each in [-1, 1]:
#   headroom  scales the rule's need by 1 +- HEADROOM and shifts it by +- 1 replica
#   batch     below 0 lowers the batch limit, down to an eighth of the largest batch; above 0 keeps it
#   patience  multiplies the rule's scale-down delay by PATIENCE**patience
ACTIONS: Final = ("headroom", "batch", "patience")
HEADROOM: Final = 0.5
PATIENCE: Final = 4.0

# Loads are in replicas at full batches, as log(1 + load); what is "relative" is a log ratio to the rule's need.
OBSERVATIONS: Final = (
    "need",  # replicas that the rule wants before rounding
    "replicas",  # ordered and not released, relative
    "ready",  # relative
    "starting_share",  # of the ordered
    "draining_share",
    "load",  # last tick, relative
    "load_peak",  # busiest second, relative
    "load_fast",  # moving averages, relative
    "load_slow",
    "peak_1min",
    "peak_5min",
    "peak_30min",
    "lag_30min",  # loads some time ago, relative
    "lag_60min",
    "lag_90min",
    "lag_120min",
    "lag_day",
    "forecast",  # at the end of the start-up delay, relative
    "forecast_error",  # relative to the load
    "queue",  # waiting requests in seconds of work of the ready replicas, relative to the objective
    "utilization",
    "latency",  # log of the 95th percentile relative to the objective
    "missed",  # share of requests that missed the objective
    "batch",  # mean batch relative to the limit
    "hold",  # replicas kept only by the scale-down delay, relative
    "rounding",  # what rounding up adds to the need
    "hour_sin",
    "hour_cos",
)


class Residual:
    """The contract between a network and the world, for rows of (world, service) pairs.

    `update` takes in a tick's measurements, `view` shows what the network sees, and `decide` turns its outputs
    into orders that have passed the guard. Measurements have shape (rows, len(FEATURES)).
    """

    observations, actions = OBSERVATIONS, ACTIONS

    def __init__(self, situations: Sequence[Situation], base: Predictive, guard: Guard) -> None:
        self.base, self.guard = base, guard
        n = len(situations)
        self._tick_s = situations[0].tick_s
        longest = int(np.ceil(PATIENCE * base.scale_down_delay_s / self._tick_s)) + 1
        self._wanted = np.zeros((longest, n))  # ring of past targets, for the scale-down delay
        self._clock = 0
        self._capacity = np.array([s.capacity_rps() for s in situations])
        self._slo_s = np.array([s.service.slo_s for s in situations])
        self._max_batch = np.array([s.service.server.max_batch for s in situations])
        self.limits = np.array([guard.limits(s) for s in situations])
        self.tracker: LoadTracker = base.tracker(situations)
        self._need = base.need(self.tracker, self._capacity)

    def restart(self, row: int, situation: Situation) -> None:
        """Forgets a row's run; a new one begins."""
        self.tracker.reset(row, situation.history_rps)
        self._wanted[:, row] = 0
        self._need[row] = self.base.need(self.tracker, self._capacity)[row]

    def update(self, values: np.ndarray) -> None:
        """Takes in the measurements of the tick that has passed."""
        self.tracker.update(values[:, INDEX["arrival_rate"]], values[:, INDEX["arrival_peak"]])
        self._need = self.base.need(self.tracker, self._capacity)

    def view(self, now_s: np.ndarray, values: np.ndarray) -> np.ndarray:
        """What the network sees, float32 of shape (rows, len(OBSERVATIONS)). Changes nothing."""
        known = np.nan_to_num(values, nan=0.0)
        seen = {name: known[:, k] for name, k in INDEX.items()}
        t, need, capacity = self.tracker, self._need, self._capacity
        ordered = seen["replicas_ready"] + seen["replicas_starting"] + seen["replicas_pending"]
        scale = np.log1p(need)

        def relative(load_rps: np.ndarray) -> np.ndarray:
            return np.log1p(load_rps / capacity) - scale

        served_rps = np.maximum(seen["replicas_ready"], 1) * capacity
        latency = np.where(
            seen["latency_p95"] > 0, np.log(np.maximum(seen["latency_p95"], 1e-6) / self._slo_s), 0
        )
        missed = np.where(
            np.isnan(values[:, INDEX["attainment"]]), 0.0, np.clip(1 - seen["attainment"], 0, 1)
        )
        hour = 2 * np.pi * (now_s % 86400) / 86400
        columns = {
            "need": scale,
            "replicas": np.log1p(ordered) - scale,
            "ready": np.log1p(seen["replicas_ready"]) - scale,
            "starting_share": (ordered - seen["replicas_ready"]) / np.maximum(ordered, 1),
            "draining_share": seen["replicas_draining"] / np.maximum(ordered, 1),
            "load": relative(t.rate),
            "load_peak": relative(t.peak),
            "load_fast": relative(t.fast),
            "load_slow": relative(t.slow),
            "peak_1min": relative(t.highest(60)),
            "peak_5min": relative(t.highest(300)),
            "peak_30min": relative(t.highest(1800)),
            "lag_30min": relative(t.lag(1800)),
            "lag_60min": relative(t.lag(3600)),
            "lag_90min": relative(t.lag(5400)),
            "lag_120min": relative(t.lag(7200)),
            "lag_day": relative(t.lag(86400)),
            "forecast": relative(t.forecast),
            "forecast_error": np.log1p(t.forecast_error / np.maximum(t.slow, 0.01 * capacity)),
            "queue": np.log1p(seen["queue_length"] / (served_rps * self._slo_s)),
            "utilization": seen["utilization"],
            "latency": latency,
            "missed": np.sqrt(missed),
            "batch": seen["batch_size"] / self._max_batch,
            "hold": np.log1p(np.maximum(self._wanted.max(axis=0) - need, 0)),
            "rounding": np.ceil(need) - need,
            "hour_sin": np.sin(hour),
            "hour_cos": np.cos(hour),
        }
        return np.clip(np.stack([columns[name] for name in OBSERVATIONS], axis=1), -20, 20).astype(np.float32)

    def decide(self, actions: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Replicas to order, replicas to release and the batch limit, int64 of shape (rows,) each."""
        headroom, batch, patience = np.clip(np.nan_to_num(actions), -1, 1).T
        wanted = np.ceil(np.maximum(self._need * (1 + HEADROOM * headroom) + headroom, 0) - 1e-9)
        self._wanted[self._clock % len(self._wanted)] = wanted
        age = (self._clock - np.arange(len(self._wanted))) % len(self._wanted)
        self._clock += 1
        keep = self.base.scale_down_delay_s * PATIENCE**patience / self._tick_s
        target = np.where(age[:, None] <= keep, self._wanted, 0).max(axis=0)
        seen = np.nan_to_num(values, nan=0.0)
        current = sum(seen[:, INDEX[n]] for n in ("replicas_ready", "replicas_starting", "replicas_pending"))
        order, release = self.guard.clamp(
            np.maximum(target - current, 0), np.maximum(current - target, 0), current, self.limits
        )
        return order.astype(np.int64), release.astype(np.int64), batch_limit(batch, self._max_batch)

    def allowed(self, choices: np.ndarray) -> np.ndarray:
        """Which of some actions, shape (count, len(ACTIONS)), ask for as many replicas as the guard lets the service
        have; shape (rows, count). The first is always one of them."""
        headroom = choices[:, 0]
        wanted = np.ceil(np.maximum(self._need[:, None] * (1 + HEADROOM * headroom) + headroom, 0) - 1e-9)
        return _within(wanted, wanted, self.limits)


# what a correction of two levels sees besides their inputs, and what its outputs do: the levels are scaled by
# 1 +- LEVEL_HEADROOM and shifted by +- half a replica, the batch limit is as above
LEVEL_STATE: Final = (
    "order_level",  # relative to the present load
    "keep_level",
    "replicas",  # ordered and not released, relative
    "ready",
    "draining_share",
    "queue",
    "utilization",
    "latency",
    "missed",
    "batch",
)
LEVEL_OBSERVATIONS: Final = (*INPUTS, *LEVEL_STATE)
LEVEL_ACTIONS: Final = ("order", "keep", "batch")
LEVEL_HEADROOM: Final = 0.3


class LevelCorrection:
    """What `Residual` is to `predictive`, for policies of two levels."""

    observations, actions = LEVEL_OBSERVATIONS, LEVEL_ACTIONS

    def __init__(self, situations: Sequence[Situation], base: Foresight | Anticipate, guard: Guard) -> None:
        self._levels = Levels(situations, base, guard)
        self._capacity = np.array([s.capacity_rps() for s in situations])
        self._slo_s = np.array([s.service.slo_s for s in situations])
        self._max_batch = np.array([s.service.server.max_batch for s in situations])
        self._known: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    @property
    def _now(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Both levels and their inputs, read once a tick."""
        if self._known is None:
            self._known = self._levels.wanted_from()
        return self._known

    def restart(self, row: int, situation: Situation) -> None:
        """Forgets a row's run; a new one begins."""
        self._levels.restart(row, situation)
        self._known = None

    def update(self, values: np.ndarray) -> None:
        """Takes in the measurements of the tick that has passed."""
        self._levels.update(values)
        self._known = None

    def view(self, now_s: np.ndarray, values: np.ndarray) -> np.ndarray:
        """What the network sees, float32 of shape (rows, len(LEVEL_OBSERVATIONS)). Changes nothing."""
        known = np.nan_to_num(values, nan=0.0)
        seen = {name: known[:, k] for name, k in INDEX.items()}
        ordered = seen["replicas_ready"] + seen["replicas_starting"] + seen["replicas_pending"]
        order_to, keep_to, inputs = self._now
        scale = inputs[:, INPUTS.index("scale")]
        served_rps = np.maximum(seen["replicas_ready"], 1) * self._capacity
        late = np.where(
            seen["latency_p95"] > 0, np.log(np.maximum(seen["latency_p95"], 1e-6) / self._slo_s), 0
        )
        missed = np.where(
            np.isnan(values[:, INDEX["attainment"]]), 0.0, np.clip(1 - seen["attainment"], 0, 1)
        )
        columns = {
            "order_level": np.log1p(order_to) - scale,
            "keep_level": np.log1p(keep_to) - scale,
            "replicas": np.log1p(ordered) - scale,
            "ready": np.log1p(seen["replicas_ready"]) - scale,
            "draining_share": seen["replicas_draining"] / np.maximum(ordered, 1),
            "queue": np.log1p(seen["queue_length"] / (served_rps * self._slo_s)),
            "utilization": seen["utilization"],
            "latency": late,
            "missed": np.sqrt(missed),
            "batch": seen["batch_size"] / self._max_batch,
        }
        state = np.stack([columns[name] for name in LEVEL_STATE], axis=1)
        return np.clip(np.concatenate([inputs, state], axis=1), -20, 20).astype(np.float32)

    def decide(self, actions: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Replicas to order, replicas to release and the batch limit, int64 of shape (rows,) each."""
        up, down, batch = np.clip(np.nan_to_num(actions), -1, 1).T
        order_to, keep_to, _ = self._now
        order, release = self._levels.decide(
            np.maximum(order_to * (1 + LEVEL_HEADROOM * up) + 0.5 * up, 0),
            np.maximum(keep_to * (1 + LEVEL_HEADROOM * down) + 0.5 * down, 0),
            values,
        )
        return order, release, batch_limit(batch, self._max_batch)

    def allowed(self, choices: np.ndarray) -> np.ndarray:
        """The same as `Residual.allowed`, for both levels."""
        up, down = choices[:, 0], choices[:, 1]
        order_to, keep_to, _ = self._now
        order = order_to[:, None] * (1 + LEVEL_HEADROOM * up) + 0.5 * up
        keep = keep_to[:, None] * (1 + LEVEL_HEADROOM * down) + 0.5 * down
        order, keep = whole(np.maximum(order, 0), np.maximum(keep, 0))
        return _within(keep, order, self._levels.limits)


def _within(least: np.ndarray, most: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Where counts, shape (rows, count), are not below the least or above the most that rows may have."""
    within: np.ndarray = (least >= limits[:, :1]) & (most <= limits[:, 1:])
    within[:, 0] = True
    return within


def batch_limit(action: np.ndarray, max_batch: np.ndarray) -> np.ndarray:
    """Below 0 an action lowers the batch limit, down to an eighth of the largest batch; above 0 it keeps it."""
    return np.maximum(1, np.round(max_batch * 2.0 ** (3 * np.minimum(action, 0)))).astype(np.int64)


Base = Predictive | Anticipate | Foresight


def corrections(situations: Sequence[Situation], base: Base, guard: Guard) -> Residual | LevelCorrection:
    """The contract between a network and the world, for a base."""
    if isinstance(base, Predictive):
        return Residual(situations, base, guard)
    return LevelCorrection(situations, base, guard)


def contract(base: Base) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of what a network sees, and of what it says, if it corrects a base."""
    kind = Residual if isinstance(base, Predictive) else LevelCorrection
    return kind.observations, kind.actions


class Choices(Spec, frozen=True, kw_only=True):
    """Actions of which the one with the highest score is taken, the first among equals; if `masked`, of those that the
    guard's limits leave."""

    options: Annotated[tuple[tuple[float, ...], ...], Meta(min_length=1)]
    masked: bool = False


class Learned(Policy, frozen=True, kw_only=True, tag="learned"):
    """A network's correction of another policy; a training folder holds it as `policy.json`. The network says the
    actions, or, with `choices` of them, a score for each."""

    base: Base
    network: Network
    choices: Choices | None = None

    def __post_init__(self) -> None:
        observations, actions = contract(self.base)
        options = () if self.choices is None else self.choices.options
        self.network.must_map(len(observations), len(options) or len(actions))
        for option in options:
            if len(option) != len(actions):
                raise SpecError(
                    f"a choice of {len(option)} numbers; valid: {len(actions)}, for {', '.join(actions)}"
                )

    def begin(self, situation: Situation) -> Controller:
        return Alone(_Learned(self, [situation]))

    def begin_together(self, situations: Sequence[Situation]) -> Together:
        return _Learned(self, situations)

    def save(self, folder: Path) -> None:
        """Writes `policy.json`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "policy.json.part"
        part.write_bytes(msgspec.json.encode(self))
        part.replace(folder / "policy.json")


class _Learned:
    def __init__(self, policy: Learned, situations: Sequence[Situation]) -> None:
        self._rows = corrections(situations, policy.base, Guard())
        self._network = policy.network.forward()
        self._choices = policy.choices
        self._first = True

    def decide(self, seen: Sequence[Observation]) -> list[Decision]:
        values = values_of(seen)
        if not self._first:  # the first observation is older than the run; the history has it
            self._rows.update(values)
        self._first = False
        actions = self._network(self._rows.view(times_of(seen), values))
        if self._choices is not None:
            options = np.array(self._choices.options)
            if self._choices.masked:
                actions = np.where(self._rows.allowed(options), actions, -np.inf)
            actions = options[actions.argmax(axis=1)]
        rows = zip(*(column.tolist() for column in self._rows.decide(actions, values)), strict=True)
        return [Decision(order=o, release=r, max_batch=limit, reason="learned") for o, r, limit in rows]


# what comes with the package: `experiments/scaling/learn.py` trained the one, `configure.py` the other
SHIPPED, CONFIGURED = "learned", "configured"
Saved = Learned | Foresight | Configured | Tree


def trained(folder: Path) -> Saved:
    """The policy that a training left in a folder."""
    return _read(folder / "policy.json")


def _read(path: Path) -> Saved:
    raw = read_json(path, "the folder of a training")
    found: Saved = decode(raw, Saved, str(path))  # type: ignore[arg-type]
    return found


def policy_from(text: str) -> Policy:
    """The policy that a command-line argument names: a name, a name with parameters, a file, a bundle or a training."""
    if text in (SHIPPED, CONFIGURED):
        return _read(Path(__file__).with_name(f"{text}.json"))
    from pilotage.control.bundle import is_bundle, open_bundle  # which can hold what is defined here

    if is_bundle(text):
        return open_bundle(text).policy
    if (Path(text) / "policy.json").is_file():
        return trained(Path(text))
    if text.endswith(".json"):
        return _read(Path(text))
    return parse(text)
