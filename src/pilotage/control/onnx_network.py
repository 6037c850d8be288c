"""Networks as ONNX: the one file that stands for a network, byte for byte, and how it is run.

A network is written as the graph `observation (double) -> Sub, Div, Clip -> Cast -> Gemm, Tanh, ... -> action (float)`
of opset 17: normalised in double precision, as training normalises, then in single precision, as training computes.
`encode` writes one and the same file for the same numbers. `decode` takes the numbers out of a file and refuses it
unless writing them again gives these very bytes. So no operator, attribute, external file or custom domain can hide in
a bundle, and ONNX Runtime's own parser is never shown anything but what `encode` wrote; any other ONNX tool reads the
file as well. Protocol buffers: https://protobuf.dev/programming-guides/encoding, fields as numbered in onnx.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from pilotage.control.network import Network
from pilotage.world.spec import SpecError

FEW_ROWS: Final = 8  # up to here NumPy is quicker, beyond ONNX Runtime (experiments/export measures both)
_LAYERS: Final = 16
_IR_VERSION: Final = 8
_OPSET: Final = 17
_FLOAT, _DOUBLE = 1, 11  # TensorProto.DataType
_TYPES: Final[dict[int, Any]] = {_FLOAT: np.dtype("<f4"), _DOUBLE: np.dtype("<f8")}
_INT: Final = 2  # AttributeProto.AttributeType
_MODEL_GRAPH, _GRAPH_TENSOR = 7, 5
_TENSOR_DIMS, _TENSOR_NAME, _TENSOR_RAW = 1, 8, 9


class OnnxNetwork(Network, frozen=True, kw_only=True):
    """A network that came out of an ONNX file, and the file; it runs in single precision."""

    model: bytes

    def forward(self) -> OnnxForward:
        return OnnxForward(self)


class OnnxForward:
    """A network for inputs of shape (rows, inputs): few rows by NumPy, many by ONNX Runtime where it is installed.

    Both compute in single precision and agree up to rounding.
    """

    def __init__(self, network: OnnxNetwork) -> None:
        self._network = network
        self._mean, self._scale = np.array(network.mean), np.array(network.scale)
        self._clip = network.clip
        last = len(network.biases) - 1
        self._layers = [
            (np.array(weight, np.float32).T.copy(), np.array(bias, np.float32), k < last or network.squashed)
            for k, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True))
        ]
        self._session: Any = None
        self._asked = False

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """What the network says, float32 of shape (rows, outputs)."""
        if len(inputs) == 1:
            return self.by_numpy(inputs[0])[None]  # a vector is quicker than a matrix of one row
        if len(inputs) > FEW_ROWS and self.session is not None:
            found: np.ndarray = self._session.run(None, {"observation": np.asarray(inputs, np.float64)})[0]
            return found
        return self.by_numpy(inputs)

    def by_numpy(self, inputs: np.ndarray) -> np.ndarray:
        """The same by NumPy, for inputs of shape (..., inputs)."""
        x = inputs - self._mean
        x /= self._scale
        np.minimum(np.maximum(x, -self._clip, out=x), self._clip, out=x)
        x = x.astype(np.float32)
        for weight, bias, bent in self._layers:
            x = x.dot(weight)
            x += bias
            if bent:
                np.tanh(x, out=x)
        return x

    @property
    def session(self) -> Any:
        """ONNX Runtime's session of one thread, opened when first asked for; None where it is not installed."""
        if not self._asked:
            self._asked = True
            self._session = _open(self._network.model)
        return self._session


def _open(model: bytes) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# --- writing -----------------------------------------------------------------------------------------------------
def encode(network: Network) -> bytes:
    """The ONNX file of a network; weights are rounded to single precision. Raises SpecError unless all is finite."""
    if network.memory is not None:
        raise SpecError("the network has a memory, which a file of one step cannot hold")
    if not network.biases or len(network.biases) > _LAYERS:
        raise SpecError(f"the network has {len(network.biases)} layers; valid: 1 to {_LAYERS}")
    tensors = [
        _tensor("mean", np.array(network.mean, "<f8")),
        _tensor("scale", np.array(network.scale, "<f8")),
        _tensor("low", np.array(-network.clip, "<f8")),
        _tensor("high", np.array(network.clip, "<f8")),
    ]
    nodes = [
        _node("Sub", ["observation", "mean"], "centred"),
        _node("Div", ["centred", "scale"], "scaled"),
        _node("Clip", ["scaled", "low", "high"], "clipped"),
        _node("Cast", ["clipped"], "layer0", to=_FLOAT),
    ]
    last = len(network.biases) - 1
    for k, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        with np.errstate(over="ignore"):
            tensors += [
                _tensor(f"weight{k}", np.array(weight, "<f4")),
                _tensor(f"bias{k}", np.array(bias, "<f4")),
            ]
        bent = k < last or network.squashed
        then = "action" if k == last else f"layer{k + 1}"
        nodes.append(
            _node("Gemm", [f"layer{k}", f"weight{k}", f"bias{k}"], f"dense{k}" if bent else then, transB=1)
        )
        if bent:
            nodes.append(_node("Tanh", [f"dense{k}"], then))
    graph = b"".join([
        *(_part(1, node) for node in nodes),
        _part(2, b"policy"),
        *(_part(_GRAPH_TENSOR, tensor) for tensor in tensors),
        _part(11, _value("observation", _DOUBLE, len(network.mean))),
        _part(12, _value("action", _FLOAT, len(network.biases[-1]))),
    ])  # fmt: skip
    return b"".join([
        _number(1, _IR_VERSION),
        _part(2, b"pilotage"),
        _part(_MODEL_GRAPH, graph),
        _part(8, _part(1, b"") + _number(2, _OPSET)),
    ])  # fmt: skip


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _part(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _tensor(name: str, values: np.ndarray) -> bytes:
    if not np.isfinite(values).all():
        raise SpecError(f"the network's {name} has values that are not finite in {values.dtype}")
    kind = _FLOAT if values.dtype.itemsize == 4 else _DOUBLE
    dims = b"".join(_number(_TENSOR_DIMS, n) for n in values.shape)
    return dims + _number(2, kind) + _part(_TENSOR_NAME, name.encode()) + _part(_TENSOR_RAW, values.tobytes())


def _node(op: str, inputs: Sequence[str], output: str, **numbers: int) -> bytes:
    attributes = [
        _part(5, _part(1, name.encode()) + _number(3, value) + _number(20, _INT))
        for name, value in numbers.items()
    ]
    return b"".join(
        [
            *(_part(1, n.encode()) for n in inputs),
            _part(2, output.encode()),
            _part(4, op.encode()),
            *attributes,
        ]
    )


def _value(name: str, kind: int, columns: int) -> bytes:
    shape = _part(1, _part(2, b"rows")) + _part(1, _number(1, columns))
    return _part(1, name.encode()) + _part(2, _part(1, _number(1, kind) + _part(2, shape)))


# --- reading -----------------------------------------------------------------------------------------------------
def decode(model: bytes) -> OnnxNetwork:
    """The network of a file that `encode` wrote. Raises SpecError for every other file."""
    try:
        tensors = dict(map(_array, _parts(_only(_parts(model, _MODEL_GRAPH)), _GRAPH_TENSOR)))
        count = sum(name.startswith("bias") for name in tensors)
        network = OnnxNetwork(
            mean=tuple(tensors["mean"].tolist()),
            scale=tuple(tensors["scale"].tolist()),
            clip=float(tensors["high"]),
            weights=tuple(tuple(map(tuple, tensors[f"weight{k}"].tolist())) for k in range(count)),
            biases=tuple(tuple(tensors[f"bias{k}"].tolist()) for k in range(count)),
            model=model,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SpecError(f"not a network as pilotage writes it: {error}") from None
    if not min(network.scale, default=1.0) > 0 or not network.clip > 0:
        raise SpecError("the network's scales and clip must be above 0")
    for candidate in (network, msgspec.structs.replace(network, squashed=True)):
        if encode(candidate) == model:
            return candidate
    raise SpecError("not a network as pilotage writes it: it has other operators, names or fields")


def _parts(data: bytes, wanted: int) -> Iterator[bytes]:
    """The contents of the fields of a number, among the fields of one message."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        if key & 7 == 0:
            _, at = _read_varint(data, at)
            continue
        if key & 7 != 2:
            raise ValueError(f"field {key >> 3} is of an unknown kind")
        size, at = _read_varint(data, at)
        if size > len(data) - at:
            raise ValueError(f"field {key >> 3} is cut off")
        if key >> 3 == wanted:
            yield data[at : at + size]
        at += size


def _only(found: Iterator[bytes]) -> bytes:
    first = next(found, None)
    if first is None or next(found, None) is not None:
        raise ValueError("it must have one graph")
    return first


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 63, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is cut off or too long")


def _array(tensor: bytes) -> tuple[str, np.ndarray]:
    """Name and values of a tensor; its shape is what its size and name say, and is checked by writing it again."""
    name = _only(_parts(tensor, _TENSOR_NAME)).decode()
    raw = _only(_parts(tensor, _TENSOR_RAW))
    shape, at = [], 0
    while at < len(tensor) and tensor[at] == _TENSOR_DIMS << 3:
        size, at = _read_varint(tensor, at + 1)
        shape.append(size)
    kind = _TYPES[_DOUBLE if name in ("mean", "scale", "low", "high") else _FLOAT]
    if len(shape) > 2 or math.prod(shape) * kind.itemsize != len(raw):
        raise ValueError(f"{name!r} is not of its size")
    return name, np.frombuffer(raw, kind).reshape(shape)
