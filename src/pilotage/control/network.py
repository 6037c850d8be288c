"""A small neural network as plain numbers, run with NumPy alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pilotage.world.spec import Spec, SpecError

Function = Callable[[np.ndarray], np.ndarray]  # from (rows, inputs) to (rows, outputs)


class Network(Spec, frozen=True, kw_only=True):
    """A tanh network with its input normalisation: clip((x - mean) / scale), dense layers, linear outputs, or
    outputs `squashed` by tanh."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    clip: float
    weights: tuple[tuple[tuple[float, ...], ...], ...]
    biases: tuple[tuple[float, ...], ...]
    squashed: bool = False

    def __post_init__(self) -> None:
        sizes = [len(self.mean)]
        if len(self.scale) != sizes[0]:
            raise SpecError(f"the network has {sizes[0]} means but {len(self.scale)} scales")
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


class Forward:
    """A network as arrays, for inputs of shape (rows, inputs)."""

    def __init__(self, network: Network) -> None:
        self._mean, self._scale, self._clip = np.array(network.mean), np.array(network.scale), network.clip
        self._squashed = network.squashed
        self._layers = [
            (np.array(weight).T.copy(), np.array(bias))
            for weight, bias in zip(network.weights, network.biases, strict=True)
        ]

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        x = np.clip((inputs - self._mean) / self._scale, -self._clip, self._clip)
        for weight, bias in self._layers[:-1]:
            x = np.tanh(x @ weight + bias)
        weight, bias = self._layers[-1]
        out = x @ weight + bias
        return np.tanh(out) if self._squashed else out
