"""The time on which services live, for a host whose clock may be wrong."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """The services' time (0 is Monday 00:00 UTC): it follows a clock that may jump, but neither leaps nor goes back.

    It runs with the monotonic clock, and makes good what it is behind or ahead at a quarter of its pace.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._at_s: float | None = None
        self._last_s = 0.0

    def now(self, said_s: float) -> float:
        """The time at which somebody says that it is `said_s`."""
        now_s = self._monotonic()
        if self._at_s is None:
            self._at_s = said_s
        else:
            passed_s = now_s - self._last_s
            behind_s = said_s - (self._at_s + passed_s)
            self._at_s += passed_s + min(max(behind_s, -passed_s / 4), passed_s / 4)
        self._last_s = now_s
        return self._at_s
