"""The registry of an MLflow server (mlflow-skinny 3), which has aliases but no history and no compare-and-swap.

A version is a registered model version with its run (parameters, metrics, data sets) and logged model; the tag
`pilotage.version` holds all of it in one piece, and versions that somebody else registered are read from their runs.
Moving an alias is read, check, write, read back, guarded by a fencing number in a tag of the registered model: writers
that share a ledger exclude each other, and of others a move between check and write is noticed only afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from pilotage.live.registries import (
    ADDED,
    MOVED,
    Code,
    ConflictError,
    Data,
    DeniedError,
    Measure,
    MissingError,
    RegistryError,
    UnavailableError,
    Version,
)
from pilotage.world.spec import Positive, Spec, SpecError

_BODY: Final = "pilotage.version"
_FENCE: Final = "pilotage.fence"
_MAX_TAG: Final = 100_000  # characters: MAX_MODEL_REGISTRY_TAG_VALUE_LENGTH
_TRIES: Final = 3
T = TypeVar("T")


class MlflowServer(Spec, frozen=True, kw_only=True, tag_field="kind", tag="mlflow"):
    """An MLflow tracking server with a model registry. Credentials come from MLflow's own environment variables, never
    from the URL; `timeout_s` is for one request, of which an operation may need ten."""

    url: Annotated[str, Meta(pattern=r"^https?://[^@\s]+$")]
    timeout_s: Positive = 5.0

    def add(self, draft: Version, key: str) -> str:
        if len(draft.stored) > _MAX_TAG:
            raise SpecError(
                f"version of {draft.service!r}: {len(draft.stored)} bytes; valid for MLflow: at most {_MAX_TAG}; give "
                "fewer columns or slices"
            )
        return self._asked(lambda client: _add(client, draft, key))

    def added(self, service: str, key: str) -> str | None:
        return self._asked(lambda client: _added(client, service, key))

    def version(self, service: str, version: str) -> Version:
        if not version.isdecimal():
            raise MissingError(f"{self.url}: {service!r} has no version {version!r}; valid: a number")
        return self._asked(lambda client: _version(client, client.get_model_version(service, version)))

    def versions(self, service: str) -> list[Version]:
        found = self._asked(lambda client: [_version(client, one) for one in _search(client, service)])
        return sorted(found, key=lambda one: int(one.version))

    def aliases(self, service: str) -> dict[str, str]:
        try:
            return self._asked(
                lambda client: {
                    alias: str(version)
                    for alias, version in client.get_registered_model(service).aliases.items()
                }
            )
        except MissingError:
            return {}

    def move(
        self, service: str, alias: str, expected: str | None, to: str | None, *, fence: int, key: str
    ) -> None:
        name = f"{_FENCE}.{alias}"

        def attempt(client: Any) -> None:
            model = client.get_registered_model(service)
            now, passed = model.aliases.get(alias), int(model.tags.get(name, -1))
            if passed > fence:
                raise ConflictError(f"{service}@{alias}: writer {passed} came after this one ({fence})")
            now = None if now is None else str(now)
            if now not in (expected, to):
                raise ConflictError(f"{service}@{alias}: is at version {now}, not {expected}")
            client.set_registered_model_tag(service, name, str(fence))
            if to is None:
                client.delete_registered_model_alias(service, alias)
            else:
                client.set_model_version_tag(service, to, f"{MOVED}.{alias}", key)
                client.set_registered_model_alias(service, alias, to)
            model = client.get_registered_model(service)
            found, passed = model.aliases.get(alias), int(model.tags.get(name, -1))
            if (None if found is None else str(found), passed) != (to, fence):
                raise ConflictError(
                    f"{service}@{alias}: was moved to version {to}, but another writer was there, too: it is at "
                    f"{found} now"
                )

        self._asked(attempt)

    def tag(self, service: str, version: str, name: str, value: str) -> None:
        self._asked(lambda client: client.set_model_version_tag(service, version, name, value))

    def ask(self, what: Callable[[Any], T]) -> T:
        """The answer of a client of this server, for what the protocol of a registry does not know."""
        return self._asked(what)

    def _asked(self, what: Callable[[Any], T]) -> T:
        """The answer of the server, asked again where there is none: every question here may be repeated."""
        client = _client(self.url)
        for attempt in range(1, _TRIES + 1):
            try:
                with _impatient(self.timeout_s), _translated(self.url):
                    return what(client)
            except UnavailableError:
                if attempt == _TRIES:
                    raise
                time.sleep(0.2 * attempt)
        raise AssertionError


@functools.lru_cache(8)
def _client(url: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is the caller's
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=url, registry_uri=url)


_patience: Final = threading.Lock()
_users_own: list[dict[str, str | None]] = []  # the environment as it was, once per call that is under way


@contextlib.contextmanager
def _impatient(timeout_s: float) -> Iterator[None]:
    """MLflow's client waits two minutes and retries for as long; a control loop cannot. It reads the environment at
    every request and nothing else, so the environment is changed for the call, and restored after the last one."""
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(timeout_s))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    with _patience:
        _users_own.append(_users_own[0] if _users_own else {name: os.environ.get(name) for name in wanted})
        os.environ.update(wanted)
    try:
        yield
    finally:
        with _patience:
            before = _users_own.pop()
            if not _users_own:
                for name, value in before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        status = re.search(r"(?:failed with error code|too many) (\d{3})", error.message)
        code = int(status[1]) if status else error.get_http_status_code()
        said = f"{url}: {error.message.splitlines()[0][:300]}"
        kind: type[RegistryError] = RegistryError
        if code in (401, 403) or error.error_code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            kind, said = (
                DeniedError,
                f"{said}; give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD that may do this",
            )
        elif error.error_code == "RESOURCE_DOES_NOT_EXIST":
            kind = MissingError
        elif code >= 500 or code in (408, 429):
            kind = UnavailableError
        raise kind(said) from None
    except OSError as error:  # requests' errors are
        raise UnavailableError(f"{url}: {type(error).__name__}: {error}"[:300]) from None


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "") + "'"


def _search(client: Any, service: str, more: str = "") -> list[Any]:
    found, page = [], None
    while True:
        some = client.search_model_versions(f"name = {_quoted(service)}{more}", page_token=page)
        found += some
        page = some.token
        if not page:
            return found


def _added(client: Any, service: str, key: str) -> str | None:
    found = _search(client, service, f" and tag.`{ADDED}` = {_quoted(key)}")
    return str(found[0].version) if found else None


def _add(client: Any, draft: Version, key: str) -> str:
    """Run, data sets, logged model, version; what an interrupted attempt with the same key left is used again."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param
    from mlflow.exceptions import MlflowException

    known = _added(client, draft.service, key)
    if known is not None:
        return known
    experiment = client.get_experiment_by_name(draft.service)
    where = experiment.experiment_id if experiment else client.create_experiment(draft.service)
    runs = client.search_runs([where], f"tags.`{ADDED}` = {_quoted(key)}", max_results=1)
    tags = {ADDED: key, "mlflow.source.git.commit": draft.code.revision}
    run = runs[0] if runs else client.create_run(where, tags=tags)
    now = int(time.time() * 1000)
    parameters = {name: str(value) for name, value in draft.parameters.items()}
    measures = draft.metrics | {
        f"{group}/{name}": measure for group, part in draft.slices.items() for name, measure in part.items()
    }
    items = list(parameters.items())
    for start in range(0, len(items), 100):
        client.log_batch(
            run.info.run_id, params=[Param(_key(k), v[:6000]) for k, v in items[start : start + 100]]
        )
    metrics = [Metric(_key(name), m.value, now, 0) for name, m in measures.items()]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + 1000])
    client.log_inputs(
        run.info.run_id,
        [
            DatasetInput(
                Dataset(
                    name=one.name[:500], digest=one.digest[:36], source_type="local", source=one.name,
                    schema=msgspec.json.encode(one.columns).decode(),
                ),
                [InputTag("mlflow.data.context", one.role)],
            )
            for one in draft.data
        ],
    )  # fmt: skip
    model = client.create_logged_model(
        where, source_run_id=run.info.run_id, params=parameters, tags={ADDED: key}
    )
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, 0)])
    client.finalize_logged_model(model.model_id, "READY")
    client.set_terminated(run.info.run_id)
    try:
        client.create_registered_model(draft.service)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        draft.service,
        f"models:/{model.model_id}",
        run.info.run_id,
        tags=draft.tags | {ADDED: key, _BODY: draft.stored.decode()},
        model_id=model.model_id,
        await_creation_for=0,
    )
    return str(version.version)


def _key(name: str) -> str:
    """A name that MLflow takes for a parameter or metric."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _version(client: Any, found: Any) -> Version:
    """A version from its tag, or, if somebody else registered it, from its run."""
    created = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(found.creation_timestamp / 1000))
    tags = {name: value for name, value in found.tags.items() if name != _BODY}
    body = found.tags.get(_BODY)
    if body is not None:
        try:
            stored = msgspec.json.decode(body, type=Version)
        except msgspec.DecodeError as error:
            raise RegistryError(
                f"{found.name} version {found.version}: tag {_BODY} cannot be read: {error}"
            ) from None
        if stored.service == found.name:
            return msgspec.structs.replace(stored, version=str(found.version), created=created, tags=tags)
    draft = Version(
        service=found.name,
        version=str(found.version),
        created=created,
        artifact=found.source or "",
        tags=tags,
    )
    if not found.run_id:
        return draft
    run = client.get_run(found.run_id)
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return msgspec.structs.replace(
        draft,
        code=Code(revision=run.data.tags.get("mlflow.source.git.commit", "")),
        parameters=dict(run.data.params),
        metrics={name: Measure(value=value) for name, value in run.data.metrics.items()},
        data=tuple(Data(name=one.dataset.name, digest=one.dataset.digest) for one in inputs),
    )
