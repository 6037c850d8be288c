"""Models that can be measured: ONNX and scikit-learn files in this process, and servers of the KServe V2 protocol.

Files that run code when they are opened (pickle, joblib) are refused: `.onnx` holds a graph, and `.skops` is opened
only if all its types are scikit-learn's, NumPy's and SciPy's own. Inputs are random, of the shapes that the model says
it takes; a model that takes no varying number of rows is measured at batches of one.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import numpy as np

from pilotage.world.spec import SpecError

UNSAFE: Final = (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".bin")
TRUSTED: Final = ("sklearn.", "numpy.", "scipy.", "builtins.", "collections.")
_DYNAMIC: Final = 8  # what stands for another dimension that a model leaves open


class ProfileError(Exception):
    """What was to be measured cannot be: it fails, throttles, or does not come to rest."""


class ThrottledError(Exception):
    """A server refused a request because it has too much to do; it may be asked again after `after_s`."""

    def __init__(self, after_s: float) -> None:
        super().__init__(f"throttled, again after {after_s:g} s")
        self.after_s = after_s


class Measured(Protocol):
    """A model of which batches can be run, from several threads at once."""

    name: str
    batches: bool  # whether it takes more than one row

    def infer(self, rows: int) -> None:
        """Runs one batch; raises ThrottledError or ProfileError."""
        ...

    def load(self) -> float | None:
        """Loads it anew, and says how many seconds that took until the first answer; None: it cannot be told to."""
        ...


def open_model(text: str, *, model: str | None = None, threads: int = 1, timeout_s: float = 30.0) -> Measured:
    """The model that a command-line argument names: a .onnx or .skops file, or the URL of a V2 server with `model`."""
    if text.startswith(("http://", "https://")):
        return V2(text, model, timeout_s)
    path = Path(text)
    if path.suffix in UNSAFE:
        raise SpecError(
            f"{path}: {path.suffix} files run code when they are opened; convert it where it was made: valid are .onnx "
            "(skl2onnx, torch.onnx) and .skops (skops.io.dump)"
        )
    if path.suffix not in (".onnx", ".skops"):
        raise SpecError(f"{path}: not a model that can be measured; give a .onnx or .skops file, or a URL")
    if not path.is_file():
        raise SpecError(f"{path}: does not exist; give the path of a model, or a URL")
    return Onnx(path, threads) if path.suffix == ".onnx" else Skops(path)


class _File:
    """A model in this process; one batch at a time, as one replica with one thread pool has it."""

    def __init__(self, path: Path) -> None:
        self.name, self.batches = path.stem.lower(), True
        self._path, self._lock = path, threading.Lock()
        self._run: Callable[[int], Any] = self._open()
        try:
            self._run(2)
        except Exception:  # a fixed number of rows
            self.batches = False

    def _open(self) -> Callable[[int], Any]:
        raise NotImplementedError

    def infer(self, rows: int) -> None:
        with self._lock:
            try:
                self._run(rows)
            except Exception as error:
                raise ProfileError(f"{self._path}: a batch of {rows} failed: {error}") from error

    def load(self) -> float | None:
        import time

        began = time.perf_counter()
        self._open()(1)
        return time.perf_counter() - began


class Onnx(_File):
    """A graph on ONNX Runtime's CPU provider, with so many threads."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self._threads = threads
        super().__init__(path)

    def _open(self) -> Callable[[int], Any]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        try:
            session = onnxruntime.InferenceSession(
                str(self._path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise SpecError(f"{self._path}: ONNX Runtime cannot load it: {error}") from None
        wanted = [(i.name, i.shape, _ONNX_TYPES.get(i.type)) for i in session.get_inputs()]
        for name, _, kind in wanted:
            if kind is None:
                raise SpecError(
                    f"{self._path}: input {name!r} is of no numeric type; valid: tensors of numbers"
                )
        made: dict[int, dict[str, np.ndarray]] = {}

        def run(rows: int) -> Any:
            if rows not in made:
                made[rows] = {
                    name: _random(_shape(shape, rows), kind or "float32") for name, shape, kind in wanted
                }
            return session.run(None, made[rows])

        return run


class Skops(_File):
    """A scikit-learn estimator; `predict` on random rows."""

    def _open(self) -> Callable[[int], Any]:
        import skops.io

        foreign = [
            name for name in skops.io.get_untrusted_types(file=self._path) if not name.startswith(TRUSTED)
        ]
        if foreign:
            raise SpecError(
                f"{self._path}: holds types that are not scikit-learn's, NumPy's or SciPy's: {', '.join(foreign)}"
            )
        estimator = skops.io.load(self._path, trusted=skops.io.get_untrusted_types(file=self._path))
        columns = getattr(estimator, "n_features_in_", None)
        if columns is None:
            raise SpecError(f"{self._path}: says not how many features it takes; valid: a fitted estimator")
        made: dict[int, np.ndarray] = {}

        def run(rows: int) -> Any:
            if rows not in made:
                made[rows] = _random([rows, columns], "float32")
            return estimator.predict(made[rows])

        return run


class V2:
    """A model behind the KServe V2 protocol (Open Inference Protocol) over HTTP: MLServer, Triton, KServe, …"""

    def __init__(self, url: str, model: str | None, timeout_s: float = 30.0) -> None:
        parts = urlsplit(url)
        found = parts.path.strip("/").split("/")
        if model is None and len(found) >= 3 and found[0] == "v2" and found[1] == "models":
            model = found[2]
        if model is None:
            raise SpecError(f"{url}: which model? give --model NAME, or a URL that ends with /v2/models/NAME")
        if not parts.hostname:
            raise SpecError(f"{url}: has no host; give http://HOST:PORT")
        self.name = model.lower()
        self._model, self._timeout_s = model, timeout_s
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._idle: list[HTTPConnection] = []  # the last one used is the next, so that few are ever open
        status, body, _ = self._ask("GET", f"/v2/models/{model}")
        if status != 200:
            raise ProfileError(f"{url}: metadata of model {model!r}: HTTP {status}: {body[:200]!r}")
        try:
            self._inputs = [(i["name"], i["datatype"], list(i["shape"])) for i in json.loads(body)["inputs"]]
        except (ValueError, KeyError, TypeError):
            raise ProfileError(
                f"{url}: metadata of model {model!r} name no inputs with shape and datatype, as V2 wants it"
            ) from None
        for name, datatype, _ in self._inputs:
            if datatype not in _V2_TYPES:
                raise SpecError(f"{url}: input {name!r} is {datatype}; valid: {', '.join(_V2_TYPES)}")
        self.batches = all(shape and int(shape[0]) < 0 for _, _, shape in self._inputs)
        self._bodies: dict[int, bytes] = {}

    def _body(self, rows: int) -> bytes:
        if rows not in self._bodies:
            inputs = []
            for name, datatype, shape in self._inputs:
                values = _random(
                    _shape([None if int(s) < 0 else s for s in shape], rows), _V2_TYPES[datatype]
                )
                inputs.append(
                    {
                        "name": name,
                        "datatype": datatype,
                        "shape": list(values.shape),
                        "data": values.ravel().tolist(),
                    }
                )
            self._bodies[rows] = json.dumps({"inputs": inputs}).encode()
        return self._bodies[rows]

    def infer(self, rows: int) -> None:
        status, body, headers = self._ask("POST", f"/v2/models/{self._model}/infer", self._body(rows))
        if status in (429, 503):
            try:
                after_s = float(headers.get("Retry-After", 0.1))
            except ValueError:
                after_s = 0.1  # a date
            raise ThrottledError(min(max(after_s, 0.0), 10.0))
        if status != 200:
            raise ProfileError(f"model {self._model!r}: a batch of {rows}: HTTP {status}: {body[:200]!r}")

    def load(self) -> float | None:
        """Through the model repository extension, where the server has it."""
        import time

        if self._ask("POST", f"/v2/repository/models/{self._model}/unload", b"{}")[0] != 200:
            return None
        began = time.perf_counter()
        status, body, _ = self._ask("POST", f"/v2/repository/models/{self._model}/load", b"{}")
        if status != 200:
            raise ProfileError(
                f"model {self._model!r} was unloaded, and loading it anew: HTTP {status}: {body[:200]!r}"
            )
        while time.perf_counter() - began < 600:
            if self._ask("GET", f"/v2/models/{self._model}/ready")[0] == 200:
                self.infer(1)
                return time.perf_counter() - began
            time.sleep(0.05)
        raise ProfileError(f"model {self._model!r} was unloaded and is not ready again after 600 s")

    def _ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers. Over a connection that is free; over a new one if the server has closed that."""
        for fresh in (not self._idle, True):
            connection = None
            if not fresh:
                with contextlib.suppress(IndexError):  # another thread has taken the last
                    connection = self._idle.pop()
            if connection is None:
                make = HTTPSConnection if self._secure else HTTPConnection
                connection, fresh = make(self._host, self._port, timeout=self._timeout_s), True
            try:
                connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
                answer = connection.getresponse()
                text = answer.read()
                self._idle.append(connection)
                return answer.status, text, dict(answer.headers)
            except (OSError, HTTPException) as error:
                connection.close()
                if fresh:
                    where = f"{self._host}:{self._port or (443 if self._secure else 80)}"
                    raise ProfileError(f"{where}{path}: {type(error).__name__}: {error}") from error
        raise AssertionError


_ONNX_TYPES: Final = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_V2_TYPES: Final = {
    "FP32": "float32",
    "FP64": "float64",
    "FP16": "float32",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def _shape(shape: list[Any], rows: int) -> list[int]:
    """The first dimension is rows, if it is open; what else is open gets a small number."""
    fixed = [s if isinstance(s, int) and s > 0 else _DYNAMIC for s in shape]
    if shape and not (isinstance(shape[0], int) and shape[0] > 0):
        fixed[0] = rows
    elif rows > 1:
        raise ValueError(f"the model takes {fixed[0] if fixed else 'no'} rows, not {rows}")
    return fixed


def _random(shape: list[int], kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.random(shape) if kind.startswith("float") else rng.integers(0, 2, shape)
    return values.astype(kind)
