"""A small neural network as plain numbers, run with NumPy alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pilotage.world.spec import Spec, SpecError

Function = Callable[[np.ndarray], np.ndarray]  # from (rows, inputs) to (rows, outputs)


class Memory(Spec, frozen=True, kw_only=True):
    """An LSTM layer (Hochreiter & Schmidhuber 1997) of h units as in torch: rows are the input, forget, cell and output
    gates, h each; `inputs` (4h, n), `recurrent` (4h, h), `bias` (4h), in which torch has two."""

    inputs: tuple[tuple[float, ...], ...]
    recurrent: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        units = len(self.bias) // 4
        whole = units > 0 and len(self.bias) == len(self.inputs) == len(self.recurrent) == 4 * units
        if not whole or any(len(row) != units for row in self.recurrent):
            raise SpecError(
                f"a memory of {len(self.inputs)} and {len(self.recurrent)} rows and {len(self.bias)} biases; "
                "valid: four for every unit, and recurrent rows as long as there are units"
            )


class Network(Spec, frozen=True, kw_only=True):
    """A tanh network with its input normalisation: clip((x - mean) / scale), a `memory` if there is one, dense layers,
    linear outputs, or outputs `squashed` by tanh."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    clip: float
    weights: tuple[tuple[tuple[float, ...], ...], ...]
    biases: tuple[tuple[float, ...], ...]
    squashed: bool = False
    memory: Memory | None = None

    def __post_init__(self) -> None:
        sizes = [len(self.mean)]
        if len(self.scale) != sizes[0]:
            raise SpecError(f"the network has {sizes[0]} means but {len(self.scale)} scales")
        if self.memory is not None:
            if any(len(row) != sizes[0] for row in self.memory.inputs):
                raise SpecError(f"the network's memory does not fit {sizes[0]} inputs")
            sizes.append(len(self.memory.bias) // 4)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            if len(weight) != len(bias) or any(len(row) != sizes[-1] for row in weight):
                raise SpecError(
                    f"a layer of {len(weight)} rows does not fit {sizes[-1]} inputs, {len(bias)} biases"
                )
            sizes.append(len(bias))

    def must_map(self, inputs: int, outputs: int) -> None:
        """Refuses a network of another shape."""
        last = len(self.biases[-1]) if self.biases else len(self.mean)
        if (len(self.mean), last) != (inputs, outputs):
            raise SpecError(
                f"the network maps {len(self.mean)} inputs to {last} outputs; valid: {inputs} to {outputs}"
            )

    def forward(self) -> Function:
        """What runs it, for inputs of shape (rows, inputs)."""
        return Forward(self)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    half: np.ndarray = 0.5 + 0.5 * np.tanh(0.5 * x)
    return half


class Forward:
    """A network as arrays, for inputs of shape (rows, inputs).

    With a memory, a call is one step of the same rows' runs; `forget` begins them anew.
    """

    def __init__(self, network: Network) -> None:
        self._mean, self._scale, self._clip = np.array(network.mean), np.array(network.scale), network.clip
        self._squashed = network.squashed
        self._layers = [
            (np.array(weight).T.copy(), np.array(bias))
            for weight, bias in zip(network.weights, network.biases, strict=True)
        ]
        m = network.memory
        self._gates = (
            None if m is None else tuple(np.array(x).T.copy() for x in (m.inputs, m.recurrent, m.bias))
        )
        self.forget()

    def forget(self) -> None:
        """Begins all rows' runs anew."""
        self._hidden: np.ndarray | float = 0.0
        self._cell: np.ndarray | float = 0.0

    def _remember(self, x: np.ndarray) -> np.ndarray:
        assert self._gates is not None
        inputs, recurrent, bias = self._gates
        if isinstance(self._hidden, float):
            self._hidden = np.zeros((len(x), len(recurrent)))
        take, keep, new, show = np.split(x @ inputs + self._hidden @ recurrent + bias, 4, axis=1)
        self._cell = _sigmoid(keep) * self._cell + _sigmoid(take) * np.tanh(new)
        self._hidden = _sigmoid(show) * np.tanh(self._cell)
        return self._hidden

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        x = inputs - self._mean
        x /= self._scale
        np.clip(x, -self._clip, self._clip, out=x)
        if self._gates is not None:
            x = self._remember(x)
        for weight, bias in self._layers[:-1]:
            x = x @ weight
            x += bias
            np.tanh(x, out=x)
        weight, bias = self._layers[-1]
        out = x @ weight
        out += bias
        return np.tanh(out, out=out) if self._squashed else out
