"""Records where a training came from without anybody writing it down: code, data, parameters, environment, metrics.

`track` is a context manager for Python; `run` does the same for any command. What is recorded is digests and numbers,
never data, and no environment variable.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import IO, Any, Final, Literal

import msgspec
import numpy as np

from pilotage.control.fairness import METRICS, counts_of, rates_of
from pilotage.live.entries import Actor
from pilotage.live.registries import (
    CHAMPION,
    Code,
    Data,
    Measure,
    Paired,
    Parameter,
    Version,
    service_name,
)
from pilotage.live.versions import Versions
from pilotage.world.spec import SpecError

_DATA_SUFFIXES: Final = frozenset(
    {".arrow", ".csv", ".feather", ".gz", ".json", ".jsonl", ".npy", ".npz", ".parquet", ".tsv", ".xlsx"}
)
_RESAMPLES: Final = 1000
_COMMON: Final = (
    "numpy",
    "pandas",
    "scikit-learn",
    "torch",
    "xgboost",
    "lightgbm",
    "tensorflow",
    "onnx",
    "pilotage",
)
Role = Literal["training", "test", "other"]


class Tracked:
    """What is known of a training so far. Files of data that Python opens while it runs are recorded by themselves."""

    def __init__(self, service: str) -> None:
        self.service = service_name(service)
        self.registered: str | None = None  # the version's number, once it has one
        self._data: dict[str, Data] = {}
        self._files: dict[Path, None] = {}
        self._parameters: dict[str, Parameter] = {}
        self._metrics: dict[str, Measure] = {}
        self._slices: dict[str, dict[str, Measure]] = {}
        self._counts: dict[str, dict[str, tuple[int, ...]]] = {}
        self._artifact: Path | None = None

    def data(self, what: Any, name: str | None = None, role: Role = "training") -> None:
        """A frame, series, array, or path of a file or folder."""
        label = name or (str(what) if isinstance(what, (str, os.PathLike)) else role)
        self._data[label] = describe(what, label, role)

    def model(self, estimator: Any) -> None:
        """Parameters of an estimator that has `get_params()`, as scikit-learn's have."""
        if not hasattr(estimator, "get_params"):
            raise SpecError(
                f"{type(estimator).__name__}: has no get_params(); give an estimator, or use parameters()"
            )
        self.parameters(model=type(estimator).__name__, **estimator.get_params())

    def parameters(self, **values: Any) -> None:
        """Plain values are kept as they are, others as text."""
        for name, value in values.items():
            plain = value is None or isinstance(value, (str, int, float, bool))
            self._parameters[name] = value if plain else repr(value)[:500]

    def metric(
        self, name: str, value: Any, *, n: int | None = None, group: str | None = None, seed: int = 0
    ) -> None:
        """A number (of n examples), or one value per example: then its mean, with a bootstrap interval of 95 %.

        `group` is the part of the examples that it holds for, as "sex=1". NaN and infinity are refused.
        """
        measure = value if isinstance(value, Measure) else _measured(name, value, n, seed)
        if not math.isfinite(measure.value):
            raise SpecError(f"metric {name!r}: {measure.value} is not a finite number")
        (self._metrics if group is None else self._slices.setdefault(group, {}))[name] = measure

    def answers(
        self, labels: Any, answers: Any, groups: Mapping[str, Any], champion: Any | None = None
    ) -> None:
        """Error, selection rate, true and false positive rate, overall and by group, of answers to labelled requests.

        Labels and answers are 0 or 1, shape (rows,); `groups` maps a feature to a group per row. With the `champion`'s
        answers to the same requests the bias gate can judge both together, which shows far more.
        """
        labels, answers = np.asarray(labels), np.asarray(answers)
        beside = answers if champion is None else np.asarray(champion)
        everybody = counts_of(labels, beside, answers, np.zeros(labels.shape, int))
        by_feature = {name: counts_of(labels, beside, answers, np.asarray(of)) for name, of in groups.items()}
        parts: list[tuple[str | None, tuple[int, ...]]] = [(None, counts) for counts in everybody.values()]
        for feature, found in by_feature.items():
            parts += [(f"{feature}={group}", counts) for group, counts in found.items()]
        for where, counts in parts:
            for metric, (share, n) in rates_of(counts).items():
                self.metric("error_rate" if metric == METRICS[0] else metric, share, n=n, group=where)
        if champion is not None:
            self._counts |= by_feature

    def artifact(self, path: Path | str) -> None:
        """The file or folder of the trained model, of which the digest is kept."""
        self._artifact = Path(path)

    def draft(self, started: float, champion: str | None = None) -> Version:
        """All of it, as a version to be, made to replace a champion."""
        for path in self._files:
            if path.is_file() and str(path) not in self._data and path != self._artifact:
                self.data(path)
        if "training_s" not in self._metrics:
            self._metrics["training_s"] = Measure(value=round(time.monotonic() - started, 3))
        return Version(
            service=self.service, parents=(champion,) if champion else (), code=code(), data=tuple(self._data.values()),
            parameters=self._parameters, metrics=self._metrics, slices=self._slices,
            paired=Paired(against=champion, counts=self._counts) if champion and self._counts else None,
            environment=environment(), artifact=str(self._artifact or ""),
            artifact_digest=digest_of(self._artifact) if self._artifact else "",
        )  # fmt: skip

    def heard(self, line: str) -> None:
        """Takes metrics from a line of output that is a JSON object of numbers.

        A value may be `{"value": 0.9, "n": 1000}` with `low` and `high`; `"slices"` holds such objects by group,
        `"parameters"` plain values. Every other line is left alone.
        """
        if not line.lstrip().startswith("{"):
            return
        try:
            found = json.loads(line)
        except ValueError:
            return
        self.parameters(**_object(found.pop("parameters", {})))
        slices = _object(found.pop("slices", {}))
        for group, part in [(None, found), *slices.items()]:
            for name, value in _object(part).items():
                if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                    self.metric(name, value, group=group)
                elif isinstance(value, dict):
                    with contextlib.suppress(msgspec.ValidationError):
                        self.metric(name, msgspec.convert(value, Measure), group=group)


@contextlib.contextmanager
def track(
    service: str, versions: Versions, *, actor: Actor | None = None, reason: str = "training"
) -> Iterator[Tracked]:
    """Registers a new version of a service when the block ends well; its parent is the champion.

    Nothing is registered if the block raises.
    """
    run, started = Tracked(service), time.monotonic()
    with _watched(run._files):
        yield run
    _register(run, versions, started, actor, reason)


def run(
    service: str,
    command: Sequence[str],
    versions: Versions,
    *,
    data: Sequence[Path] = (),
    artifact: Path | None = None,
    out: IO[str] = sys.stdout,
    actor: Actor | None = None,
) -> Tracked:
    """Runs a command and registers what it trained; its output is passed on to `out`.

    Arguments `--name value` and `--name=value` are parameters, those that are files of data are digested, as are
    `data`; metrics come from its output (see `Tracked.heard`). A command that fails raises
    subprocess.CalledProcessError, and nothing is registered.
    """
    tracked, started = Tracked(service), time.monotonic()
    for path in data:
        tracked.data(path, str(path))
    if artifact is not None:
        tracked.artifact(artifact)
    _arguments(tracked, command)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace")  # noqa: S603  (the user's own command)
    except OSError as error:
        raise SpecError(f"{command[0]}: cannot be run: {error.strerror}; give a command after --") from None
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            out.write(line)
            tracked.heard(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[0])
    tracked.parameters(command=" ".join(command))
    _register(tracked, versions, started, actor, "training by a command")
    return tracked


def _register(run: Tracked, versions: Versions, started: float, actor: Actor | None, reason: str) -> None:
    draft = run.draft(started, versions.registry.aliases(run.service).get(CHAMPION))
    run.registered = versions.add(draft, actor=actor or whoever(), reason=reason)


def whoever() -> Actor:
    """The person whose process this is."""
    import getpass

    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        name = f"user {os.getuid()}"
    return Actor(kind="human", name=name)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _measured(name: str, value: Any, n: int | None, seed: int) -> Measure:
    if np.ndim(value) == 0:
        return Measure(value=float(value), n=n)
    sample = np.asarray(value, float).ravel()
    if len(sample) == 0 or not np.isfinite(sample).all():
        raise SpecError(f"metric {name!r}: {len(sample)} values, which must be at least one, and all finite")
    rng = np.random.default_rng(seed)
    means = [float(sample[rng.integers(0, len(sample), len(sample))].mean()) for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Measure(value=float(sample.mean()), n=len(sample), low=float(low), high=float(high))


def _arguments(tracked: Tracked, command: Sequence[str]) -> None:
    words = list(command[1:])
    for k, word in enumerate(words):
        path = Path(word.partition("=")[2] if word.startswith("--") and "=" in word else word)
        if path.suffix in _DATA_SUFFIXES and path.is_file():
            tracked.data(path, str(path))
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            if not equals:
                following = words[k + 1] if k + 1 < len(words) else "--"
                value = "true" if following.startswith("--") else following
            tracked.parameters(**{name.replace("-", "_"): value})


_listening: dict[Path, None] | None = None
_hooked = False


@contextlib.contextmanager
def _watched(files: dict[Path, None]) -> Iterator[None]:
    """Notes the files of data that Python opens for reading. An audit hook cannot be removed, so there is one."""
    global _listening, _hooked
    if not _hooked:
        sys.addaudithook(_opened)
        _hooked = True
    before, _listening = _listening, files
    try:
        yield
    finally:
        _listening = before


def _opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or _listening is None:
        return
    name, _, flags = arguments
    reads = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) == 0
    if isinstance(name, (str, os.PathLike)) and reads:
        path = Path(os.fspath(name))
        if path.suffix in _DATA_SUFFIXES and "site-packages" not in path.parts:
            _listening[path] = None


# --- what there is -------------------------------------------------------------------------------------------
def describe(what: Any, name: str, role: Role = "training") -> Data:
    """Digest, rows and types of a pandas frame or series, an array, or a path (folders: all files in it)."""
    if isinstance(what, (str, os.PathLike)):
        path = Path(what)
        rows, columns = _table_of(path)
        return Data(name=name, digest=digest_of(path), role=role, rows=rows, columns=columns)
    if hasattr(what, "to_frame") and not hasattr(what, "columns"):
        what = what.to_frame()
    found = hashlib.sha256()
    if hasattr(what, "columns") and hasattr(what, "dtypes"):
        import pandas as pd

        columns = {str(column): str(kind) for column, kind in zip(what.columns, what.dtypes, strict=True)}
        found.update(msgspec.json.encode(list(columns.items())))
        found.update(pd.util.hash_pandas_object(what, index=False).to_numpy().tobytes())
        return Data(name=name, digest=found.hexdigest(), role=role, rows=len(what), columns=columns)
    array = np.ascontiguousarray(what)
    if array.dtype == object:
        raise SpecError(
            f"data {name!r}: {type(what).__name__} has no digest; give a frame, a numeric array or a path"
        )
    found.update(f"{array.dtype.str} {array.shape}".encode())
    found.update(array.tobytes())
    rows = int(array.shape[0]) if array.ndim else None
    return Data(name=name, digest=found.hexdigest(), role=role, rows=rows, columns={"": str(array.dtype)})


def digest_of(path: Path | str) -> str:
    """SHA-256 of a file, or of the names and digests of all files in a folder."""
    path, found = Path(path), hashlib.sha256()
    try:
        if path.is_dir():
            for inner in sorted(p for p in path.rglob("*") if p.is_file()):
                found.update(f"{inner.relative_to(path).as_posix()} {digest_of(inner)}\n".encode())
        else:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    found.update(block)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}; give a file or folder") from None
    return found.hexdigest()


def _table_of(path: Path) -> tuple[int | None, dict[str, str]]:
    """Rows and types of a table in a file, as far as they are cheap to find: types of CSV are those of its start."""
    with contextlib.suppress(Exception):  # whatever cannot be read as a table has a digest all the same
        import pandas as pd

        if path.suffix == ".csv":
            start = pd.read_csv(path, nrows=1000)
            with path.open("rb") as file:
                lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
            return max(0, lines - 1), {str(c): str(t) for c, t in start.dtypes.items()}
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            file_ = pq.ParquetFile(path)
            return file_.metadata.num_rows, {f.name: str(f.type) for f in file_.schema_arrow}
    return None, {}


def code() -> Code:
    """The git revision of the working folder, and the digest of what differs from it; empty outside of git."""

    def git(*arguments: str) -> bytes:
        return subprocess.run(  # noqa: S603  (fixed arguments)
            ["git", *arguments],  # noqa: S607  (whichever git the user has)
            capture_output=True, check=True, timeout=30,
        ).stdout  # fmt: skip

    try:
        revision = git("rev-parse", "HEAD").decode().strip()
        status = git("status", "--porcelain")
        if not status:
            return Code(revision=revision)
        return Code(
            revision=revision,
            dirty=True,
            diff_digest=hashlib.sha256(status + git("diff", "HEAD")).hexdigest(),
        )
    except (OSError, subprocess.SubprocessError):
        return Code()


def environment() -> dict[str, str]:
    """Python, platform, and the versions of the packages that are loaded, or usual in training."""
    loaded = {name.partition(".")[0] for name in sys.modules}
    names = {d for module, ds in packages_distributions().items() if module in loaded for d in ds} | {
        *_COMMON
    }
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in sorted(names):
        with contextlib.suppress(Exception):
            found[name] = version(name)
    return found
