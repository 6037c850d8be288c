"""Order up to one level, release down to another: policies that read two levels from the outlook.

With a start-up delay and costs that are proportional to replicas, the best policy orders when what is ordered is below
one level, releases when it is above another, and leaves alone what lies between (invest, stay put, disinvest: Eberly &
Van Mieghem, J. Economic Theory 75, 1997). Both levels are mixtures of the reference loads of `control.outlook`, scaled
and with a margin: they grow with the load, whatever its size, and say which past they trust. The network was trained by
differentiating what its levels would have cost (`agents.hindsight`); a network of zeros is a cautious rule.
`Anticipate` reads the same references with a handful of numbers that can be tuned. What a service's law
promises too much, both find out as they go (`control.shortfall`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Final

import numpy as np
from msgspec import Meta

from pilotage.control.decisions import Decisions
from pilotage.control.guard import Guard
from pilotage.control.network import Network
from pilotage.control.outlook import INPUTS, REFERENCES, Outlook
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
from pilotage.control.shortfall import Shortfall
from pilotage.world.spec import SpecError

# what the network says, in this order: weights of the references for each level, then scales and margins
LEVELS: Final = ("order", "keep")
READOUT: Final = len(LEVELS) * (len(REFERENCES) + 2) + 1
PRIOR: Final = np.zeros(READOUT)
for _k in range(len(LEVELS)):  # a network of zeros trusts the last minutes most
    PRIOR[_k * len(REFERENCES) + REFERENCES.index("highest_5min")] = 2.0
PRIOR[2 * len(REFERENCES) :] = (0.25, 0.5, 0.25, 0.5, 0.0)


def levels(readout: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The levels up to which to order and down to which to release, in replicas; shape (rows,) each.

    `readout` has shape (rows, READOUT), `references` (rows, len(REFERENCES)).
    """
    n = len(REFERENCES)
    z = readout + PRIOR
    order = _mixed(z[:, :n], references) * np.exp(z[:, 2 * n]) + _softplus(z[:, 2 * n + 1])
    keep = _mixed(z[:, n : 2 * n], references) * np.exp(z[:, 2 * n + 2]) + _softplus(z[:, 2 * n + 3])
    return order, np.maximum(order, keep) + _softplus(z[:, 2 * n + 4])


def _mixed(logits: np.ndarray, references: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    mixed: np.ndarray = (weights * references).sum(axis=1) / weights.sum(axis=1)
    return mixed


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


class Levels:
    """The contract between two levels and the world, for rows of (world, service) pairs.

    `update` takes in a tick's measurements, of shape (rows, len(FEATURES)); `decide` turns the levels into orders that
    have passed the guard.
    """

    def __init__(self, situations: Sequence[Situation], policy: Foresight | Anticipate, guard: Guard) -> None:
        self.outlook = Outlook(situations)
        self._read = policy.reader()
        self._guard = guard
        self.limits = np.array([guard.limits(s) for s in situations])

    def restart(self, row: int, situation: Situation) -> None:
        """Forgets a row's run; a new one begins."""
        self.outlook.reset(row, situation)

    def update(self, values: np.ndarray) -> None:
        """Takes in the measurements of the tick that has passed."""
        self.outlook.update(values[:, INDEX["arrival_rate"]], values[:, INDEX["arrival_peak"]])

    def wanted(self) -> tuple[np.ndarray, np.ndarray]:
        """The levels up to which to order and down to which to release, in replicas; shape (rows,) each."""
        return self.wanted_from()[:2]

    def wanted_from(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same, with the inputs that they were read from, of shape (rows, len(INPUTS))."""
        references, inputs = self.outlook.view()
        return *self._read(references, inputs), inputs

    def decide(
        self, order_to: np.ndarray, keep_to: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Replicas to order and to release, int64 of shape (rows,) each."""
        order_to, keep_to = whole(order_to, keep_to)
        seen = np.nan_to_num(values, nan=0.0)
        current = sum(seen[:, INDEX[n]] for n in ("replicas_ready", "replicas_starting", "replicas_pending"))
        order, release = self._guard.clamp(
            np.maximum(order_to - current, 0), np.maximum(current - keep_to, 0), current, self.limits
        )
        return order.astype(np.int64), release.astype(np.int64)


def whole(order_to: np.ndarray, keep_to: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both levels in whole replicas, the nearest ones."""
    order_to = np.ceil(order_to - 0.5)
    return order_to, np.maximum(np.floor(keep_to + 0.5), order_to)


Read = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Foresight(Policy, frozen=True, kw_only=True, tag="foresight"):
    """Two levels that a network mixes from the references; without a network, a cautious rule.

    Both are multiplied by `scale` and raised by `margin` replicas, which adapts a trained network to one service by a
    search over two numbers.
    """

    network: Network | None = None
    scale: Annotated[float, Meta(ge=0.6, le=1.6)] = 1.0
    margin: Annotated[float, Meta(ge=-0.5, le=1.5)] = 0.0

    def __post_init__(self) -> None:
        if self.network is not None:
            self.network.must_map(len(INPUTS), READOUT)
            if self.network.memory is not None:
                raise SpecError(
                    "foresight's network has a memory; valid: one without, which sees the outlook only"
                )

    def reader(self) -> Read:
        """From references and inputs, of shape (rows, ...), to the levels."""
        forward = None if self.network is None else self.network.forward()

        def read(references: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            readout = np.zeros((len(inputs), READOUT)) if forward is None else forward(inputs)
            order, keep = levels(readout, references)
            return self.scale * order + self.margin, self.scale * keep + self.margin

        return read

    def begin(self, situation: Situation) -> Controller:
        return Alone(_Together(self, [situation]))

    def begin_together(self, situations: Sequence[Situation]) -> Together:
        return _Together(self, situations)


class Anticipate(Policy, frozen=True, kw_only=True, tag="anticipate"):
    """The tunable rule on the references that `foresight` sees: staffing for the largest of what may come.

    The load L is the largest of the last minute's mean, and of these, each times its weight: the highest of 5 and of 30
    minutes, the 5-minute trend, what the same minute of earlier quarters, half hours and hours brought on top of the
    present load, and yesterday's coming minutes at today's level. Orders go up to L + beta sqrt(L) + margin; the least
    that is kept is the highest load of the last `keep_min` minutes, staffed alike.
    """

    beta: Annotated[float, Meta(ge=0, le=2)] = 0.6
    margin: Annotated[float, Meta(ge=0, le=2)] = 0.3
    five_minutes: Annotated[float, Meta(ge=0, le=1.5)] = 1.0
    half_hour: Annotated[float, Meta(ge=0, le=1.5)] = 0.0
    trend: Annotated[float, Meta(ge=0, le=1.5)] = 1.0
    quarters: Annotated[float, Meta(ge=0, le=1.5)] = 0.0
    half_hours: Annotated[float, Meta(ge=0, le=1.5)] = 0.5
    hours: Annotated[float, Meta(ge=0, le=1.5)] = 0.0
    day: Annotated[float, Meta(ge=0, le=1.5)] = 0.0
    keep_min: Annotated[float, Meta(ge=1, le=120, extra={"log": True})] = 5.0

    def reader(self) -> Read:
        """From references and inputs, of shape (rows, ...), to the levels."""
        at = {name: k for k, name in enumerate(REFERENCES)}
        windows = np.array([1.0, 5.0, 15.0, 30.0, 60.0, 120.0])
        kept = f"highest_{windows[int(np.argmin(np.abs(np.log(windows / self.keep_min))))]:g}min"
        weights = {
            "highest_5min": self.five_minutes,
            "highest_30min": self.half_hour,
            "trend_5min": self.trend,
            "highest_rise_at_15min_x8": self.quarters,
            "highest_rise_at_30min_x6": self.half_hours,
            "highest_rise_at_60min_x6": self.hours,
            "day_scaled_highest": self.day,
        }
        columns, factors = [at["mean_1min"], *(at[n] for n in weights)], np.array([1.0, *weights.values()])

        def staffed(load: np.ndarray) -> np.ndarray:
            needed: np.ndarray = load + self.beta * np.sqrt(load) + self.margin
            return needed

        def read(references: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            order = staffed((references[:, columns] * factors).max(axis=1))
            return order, np.maximum(order, staffed(references[:, at[kept]]))

        return read

    def begin(self, situation: Situation) -> Controller:
        return Alone(_Together(self, [situation]))

    def begin_together(self, situations: Sequence[Situation]) -> Together:
        return _Together(self, situations)


class _Together:
    def __init__(self, policy: Foresight | Anticipate, situations: Sequence[Situation]) -> None:
        self._levels = Levels(situations, policy, Guard())
        self._shortfall = Shortfall(situations, self._levels.outlook.lead)
        self._first = True

    def decide(self, seen: Sequence[Observation]) -> Sequence[Decision]:
        values = values_of(seen)
        if not self._first:  # the first observation is older than the run; the history has it
            self._levels.update(values)
            self._shortfall.update(values)
        self._first = False
        order_to, keep_to = (level * self._shortfall.factor for level in self._levels.wanted())
        order, release = self._levels.decide(order_to, keep_to, values)
        up, down, factors = order_to.tolist(), keep_to.tolist(), self._shortfall.factor.tolist()

        def why(row: int) -> str:
            more = "" if factors[row] < 1.005 else f", {factors[row]:.2f} times what the law says is enough"
            return f"order up to {up[row]:.1f}, keep {down[row]:.1f} replicas{more}"

        return Decisions(order, release, why)
