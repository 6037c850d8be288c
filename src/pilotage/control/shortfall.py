"""What a replica can do less than its law says, as a policy finds out while it runs.

A policy that staffs for loads trusts the law of its service. Where the law is wrong (a model profiled on other prompts,
a neighbour that takes bandwidth), requests are late although all that was ordered serves, and go on to be late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from pilotage.control.policy import INDEX, Situation

RISE: Final = 1.05  # a tick
MOST: Final = 2.0
FADE_S: Final = 4 * 3600.0
_FEWEST_TICKS: Final = 4
_SEEN: Final = [
    INDEX[name]
    for name in ("attainment", "completion_rate", "drop_rate", "replicas_starting", "replicas_pending")
]


class Shortfall:
    """By what the loads of some rows are to be multiplied, because their replicas serve less than the law says.

    A row's factor rises with every tick at which all that was ordered has been ready for as long as another replica
    takes to come, and what was missed all that time cost more than that replica would have; otherwise it falls towards
    1, by a factor of e in `FADE_S`. What is not measured is no evidence.
    """

    def __init__(self, situations: Sequence[Situation], lead: np.ndarray) -> None:
        money = [s.service.economics for s in situations]
        self._missed_usd = np.array([min(m.late_usd, m.dropped_usd) for m in money])
        self._replica_usd_per_s = np.array([s.replica_usd_per_hour / 3600 for s in situations])
        self._grace = np.maximum(lead, _FEWEST_TICKS)
        self._since = np.zeros(len(situations), np.int64)
        self._fade = math.exp(-situations[0].tick_s / FADE_S)
        self.factor = np.ones(len(situations))

    def update(self, values: np.ndarray) -> None:
        """Takes in the measurements of the tick that has passed, of shape (rows, len(FEATURES))."""
        attainment, completed, dropped, starting, pending = values[:, _SEEN].T
        missed_per_s = (1 - attainment) * (completed + dropped)
        all_ready = starting + pending == 0
        pays = missed_per_s * self._missed_usd > self._replica_usd_per_s  # not, if anything is NaN
        self._since = np.where(all_ready & pays, self._since + 1, 0)
        self.factor = np.where(
            self._since > self._grace,
            np.minimum(self.factor * RISE, MOST),
            1 + (self.factor - 1) * self._fade,
        )
