"""Learned policies, run with NumPy alone: what a network sees, what its outputs mean, and the network.

A learned policy corrects a rule. The rule is `predictive`: it forecasts the load at the end of the start-up
delay and says how many replicas that needs. The network sees the situation in units that do not depend on the
service (loads in replicas, times relative to the objective) and answers with three numbers in [-1, 1]; all
zeros is the rule itself, so that an untrained policy is already sensible. `Residual` holds this contract for
any number of rows at once: the training environment runs thousands, a controller runs one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from pilotage.control.forecast import LoadTracker
from pilotage.control.guard import Guard
from pilotage.control.policy import INDEX, Controller, Decision, Observation, Policy, Situation
from pilotage.control.scaling import Predictive
from pilotage.world.spec import Spec, SpecError, decode

# what the three outputs do, each in [-1, 1]:
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

    def __init__(self, situations: Sequence[Situation], base: Predictive, guard: Guard | None = None) -> None:
        self.base, self.guard = base, guard or Guard()
        n = len(situations)
        self._tick_s = situations[0].tick_s
        self._longest = int(np.ceil(PATIENCE * max(base.scale_down_delay_s, self._tick_s) / self._tick_s)) + 1
        self._wanted = np.zeros((self._longest, n))
        self._capacity = np.array([s.capacity_rps() for s in situations])
        self._slo_s = np.array([s.service.slo_s for s in situations])
        self._max_batch = np.array([s.service.server.max_batch for s in situations])
        limits = [self.guard.limits(s) for s in situations]
        self._limits = np.array(limits)
        self.tracker: LoadTracker = base.tracker(situations)
        self._clock = 0
        self._need = base.need(self.tracker)

    def restart(self, row: int, situation: Situation) -> None:
        """Forgets a row's run; a new one begins."""
        self.tracker.reset(row, situation.history_rps)
        self._wanted[:, row] = 0
        self._need[row] = self.base.need(self.tracker)[row]

    def update(self, values: np.ndarray) -> None:
        """Takes in the measurements of the tick that has passed."""
        self.tracker.update(values[:, INDEX["arrival_rate"]], values[:, INDEX["arrival_peak"]])
        self._need = self.base.need(self.tracker)
        self._clock += 1

    def view(self, now_s: np.ndarray, values: np.ndarray) -> np.ndarray:
        """What the network sees, float32 of shape (rows, len(OBSERVATIONS)). Changes nothing."""
        raise NotImplementedError

    def decide(self, actions: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Replicas to order, replicas to release and the batch limit, each of shape (rows,)."""
        raise NotImplementedError
