"""Runs on an MLflow server: what a training, a search or a study was given, measured as it went, and left behind.

Off unless a server is named. A server that cannot be reached at the start ends a command before its hours of work; one
that goes away later costs no work: the numbers that it did not take are offered once more at the end, and what was lost
is said.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from pilotage.live.mlflow_server import MlflowServer
from pilotage.live.registries import RegistryError
from pilotage.live.secrets import without_secrets
from pilotage.live.tracking import code
from pilotage.world.spec import SpecError, decode

_NOT_IN_NAMES: Final = re.compile(r"[^\w\-. :/]")
_MOST: Final = {"metrics": 1000, "params": 100}  # that one request may carry
_LONGEST: Final = 500  # characters of a parameter that every server takes


class MlflowRun:
    """One run, from its creation to its end; with no `url` it does nothing, and MLflow is not loaded.

    `parameters` are plain data; tables in them are taken apart (`train.steps`). `parent` is the run above this one.
    `lost` says what the server did not take, if anything. Raises SpecError where no run can be begun.
    """

    def __init__(
        self,
        url: str | None,
        experiment: str,
        name: str,
        parameters: Mapping[str, Any],
        parent: str | None = None,
    ) -> None:
        self.id: str | None = None
        self.lost: str | None = None
        self._url, self._experiment = url, experiment
        self._pending: list[tuple[str, float, int, int]] = []
        self._away: str | None = None  # why the server is not offered numbers until the end
        if url is None:
            return
        self._server: MlflowServer = decode(
            {"kind": "mlflow", "url": url, "timeout_s": 10.0}, MlflowServer, "--mlflow"
        )
        tags = {"mlflow.source.name": "pilotage", "mlflow.source.git.commit": code().revision}
        if parent:
            tags["mlflow.parentRunId"] = parent
        try:
            self.id = self._server.ask(
                lambda client: (
                    client.create_run(_experiment(client, experiment), run_name=name, tags=tags).info.run_id
                )
            )
            self._send("params", list(_flat(without_secrets(dict(parameters))).items()))
        except RegistryError as error:
            raise SpecError(f"--mlflow {url}: no run can be begun: {error}") from None

    def metrics(self, rows: Iterable[tuple[str, float, int]]) -> None:
        """Sends numbers as (name, value, step), or keeps them for the end once the server has failed."""
        if self.id is None:
            return
        now_ms = time.time_ns() // 1_000_000
        self._pending += [(_NOT_IN_NAMES.sub("_", name), float(v), now_ms, step) for name, v, step in rows]
        if self._away is None:
            self._flush()

    def part(self, name: str, parameters: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """A run below this one that is over: a trial of a search."""
        if self.id is None or self.lost:
            return
        try:
            with MlflowRun(self._url, self._experiment, name, parameters, self.id) as one:
                one.metrics((key, value, 0) for key, value in metrics.items())
        except SpecError as error:
            self.lost = str(error)
        else:
            self.lost = one.lost

    def files(self, folder: Path, paths: Iterable[Path]) -> None:
        """Sends files as artefacts, under the places that they have in a folder."""
        if self.id is None or self.lost:
            return
        try:
            for path in paths:
                place = path.relative_to(folder).parent.as_posix()
                self._server.ask(partial(_log_artifact, run=self.id, path=path, place=place))
        except RegistryError as error:
            self.lost = str(error)

    def __enter__(self) -> MlflowRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.id is None:
            return
        status = "FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED"
        self._flush()
        self.lost = self.lost or self._away
        try:
            self._server.ask(lambda client: client.set_terminated(self.id, status))
        except RegistryError as reason:
            self.lost = str(reason)

    def _flush(self) -> None:
        try:
            self._send("metrics", self._pending)
        except RegistryError as error:
            self._away = str(error)
        else:
            self._pending, self._away = [], None

    def _send(self, what: str, rows: Sequence[tuple[Any, ...]]) -> None:
        for lo in range(0, len(rows), _MOST[what]):
            self._server.ask(partial(_log_batch, run=self.id, what=what, rows=rows[lo : lo + _MOST[what]]))


def _log_batch(client: Any, run: str | None, what: str, rows: Sequence[tuple[Any, ...]]) -> None:
    from mlflow.entities import Metric, Param

    kind = {"metrics": Metric, "params": Param}[what]
    client.log_batch(run, **{what: [kind(*row) for row in rows]})


def _log_artifact(client: Any, run: str | None, path: Path, place: str) -> None:
    client.log_artifact(run, str(path), None if place == "." else place)


def _flat(parameters: Mapping[str, Any], above: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in parameters.items():
        name = above + _NOT_IN_NAMES.sub("_", key)
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: str(value)[:_LONGEST]}
    return found


def _experiment(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another has just made it
            raise
        return str(client.get_experiment_by_name(name).experiment_id)
