"""Where in a Deployment or an InferenceService stands what is ordered: pure functions from an object to a merge patch.

Every function gives a patch (RFC 7396; empty where nothing is to be changed) and what it does in words. Only fields of
ours are touched; lists are sent whole, as a merge patch needs, and as they were read but for our entries.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from pilotage.live.targets import TargetError
from pilotage.world.spec import Spec, SpecError

Json = dict[str, Any]

PAUSED: Final = "pilotage.dev/paused"
SERVED_VERSION: Final = "pilotage.dev/version"
SERVED_ARTIFACT: Final = "pilotage.dev/artifact"
CHALLENGER_VERSION: Final = "pilotage.dev/challenger"

LabelKey = Annotated[
    str, Meta(max_length=317, pattern=r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?$")
]
LabelValue = Annotated[str, Meta(max_length=63, pattern=r"^([A-Za-z0-9]([\w.-]*[A-Za-z0-9])?)?$")]
_QUANTITY: Final = r"^\+?\d+(\.\d+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?\d+)?$"
Quantity = Annotated[str, Meta(max_length=32, pattern=_QUANTITY)]
_FACTORS: Final = {"m": Decimal("0.001"), "": Decimal(1)} | {
    suffix: Decimal(base) ** power
    for base, suffixes in ((1000, "k M G T P E"), (1024, "Ki Mi Gi Ti Pi Ei"))
    for power, suffix in enumerate(suffixes.split(), 1)
}
# a model is a URI, an image a reference as container registries have them; text of a registry is not trusted
_URI: Final = re.compile(r"[a-z][a-z0-9+.-]{0,30}:/{0,3}[\w.~%@:/?=&+,-]{1,1000}", re.ASCII)
_IMAGE: Final = re.compile(
    r"[a-z0-9][\w.-]*(:\d+)?(/[a-z0-9][\w.-]*)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?", re.ASCII
)


class Toleration(Spec, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """As in a pod."""

    key: LabelKey | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class NodeChoice(Spec, frozen=True, kw_only=True):
    """Where pods of a pool may go. A service is in one pool: another one rolls all of its pods over."""

    node_selector: Annotated[dict[LabelKey, LabelValue], Meta(min_length=1)]
    tolerations: tuple[Toleration, ...] = ()


class Build(Spec, frozen=True, kw_only=True):
    """What a variant is on the cluster: an image or the URI of a model, and what a replica asks for."""

    image: str | None = None
    model_uri: str | None = None
    requests: dict[str, Quantity] = msgspec.field(default_factory=dict)
    limits: dict[str, Quantity] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            if self.image is not None:
                _artifact(self.image, "image")
            if self.model_uri is not None:
                _artifact(self.model_uri, "uri")
        except TargetError as error:
            raise SpecError(str(error)) from None


class DeploymentShape:
    """A Deployment of apps/v1. The batch limit and the model are environment variables of one container."""

    def __init__(
        self, service: str, container: str | None, max_batch_env: str | None, model_env: str | None
    ) -> None:
        self._service, self._container = service, container
        self._max_batch_env, self._model_env = max_batch_env, model_env

    def count(self, one: Json) -> int | None:
        count = one["spec"].get("replicas", 1)
        return count if type(count) is int else None

    def replicas(self, one: Json, count: int) -> tuple[Json, list[str]]:
        now = one["spec"].get("replicas")
        return ({}, []) if now == count else ({"spec": {"replicas": count}}, [f"replicas {now} -> {count}"])

    def max_batch(self, one: Json, limit: int) -> tuple[Json, list[str]]:
        if self._max_batch_env is None:
            raise TargetError(
                f"{self._service}: no way to set max_batch; valid: max_batch_env, the variable that the container reads"
            )
        return self._set_variable(one, self._max_batch_env, str(limit))

    def build(self, one: Json, build: Build, name: str) -> tuple[Json, list[str]]:
        containers, mine = self._containers(one)
        if build.model_uri is not None:
            if self._model_env is None:
                raise TargetError(
                    f"{self._service}: variant {name!r} has a model_uri, but there is no model_env"
                )
            _set(mine, self._model_env, build.model_uri)
        if build.image is not None:
            mine["image"] = build.image
        resources = _resources(mine.get("resources") or {}, build)
        if resources:
            mine["resources"] = resources
        return self._replaced(one, containers, f"variant {name}")

    def nodes(self, one: Json, pool: str, pools: Mapping[str, NodeChoice]) -> tuple[Json, list[str]]:
        patch = _nodes(_pod(one), pool, pools)
        return ({"spec": {"template": {"spec": patch}}}, [f"pool {pool}"]) if patch else ({}, [])

    def model(self, one: Json) -> str | None:
        _, mine = self._containers(one)
        if self._model_env is None:
            return mine.get("image")
        return next((e.get("value") for e in mine.get("env") or [] if e["name"] == self._model_env), None)

    def serve(self, one: Json, artifact: str, percent: int | None) -> tuple[Json, list[str]]:
        if percent is not None:
            raise TargetError(
                f"{self._service}: a Deployment serves one version; valid for a canary: an InferenceService"
            )
        if self._model_env is not None:
            return self._set_variable(one, self._model_env, _artifact(artifact, "uri"))
        containers, mine = self._containers(one)
        mine["image"] = _artifact(artifact, "image")
        return self._replaced(one, containers, f"image {artifact}")

    def ready(self, one: Json) -> tuple[bool, str]:
        status, wanted = one.get("status") or {}, one["spec"].get("replicas", 1)
        if status.get("observedGeneration", 0) < one["metadata"].get("generation", 0):
            return False, "the change has not been seen yet"
        updated, ready = status.get("updatedReplicas", 0), status.get("readyReplicas", 0)
        return min(updated, ready) >= wanted, f"{updated} of {wanted} replicas are new, {ready} are ready"

    def _set_variable(self, one: Json, name: str, value: str) -> tuple[Json, list[str]]:
        containers, mine = self._containers(one)
        _set(mine, name, value)
        return self._replaced(one, containers, f"{name}={value}")

    def _containers(self, one: Json) -> tuple[list[Json], Json]:
        """A copy of the containers, and the one of ours in it."""
        containers = copy.deepcopy(_pod(one).get("containers") or [])
        for container in containers:
            if self._container in (None, container.get("name")):
                return containers, container
        raise TargetError(
            f"{self._service}: the Deployment has no container {self._container!r}; it has: "
            + ", ".join(str(c.get("name")) for c in containers)
        )

    @staticmethod
    def _replaced(one: Json, containers: list[Json], what: str) -> tuple[Json, list[str]]:
        if containers == _pod(one)["containers"]:
            return {}, []
        return {"spec": {"template": {"spec": {"containers": containers}}}}, [what]


class InferenceServiceShape:
    """An InferenceService of serving.kserve.io/v1beta1 with a predictor that has a `model`."""

    def __init__(self, service: str) -> None:
        self._service = service

    def count(self, one: Json) -> int | None:
        count = _predictor(one).get("minReplicas", 1)
        return count if type(count) is int else None

    def replicas(self, one: Json, count: int) -> tuple[Json, list[str]]:
        """Both bounds are the count; with none, KServe may start one when a request comes, which no bound forbids."""
        predictor = _predictor(one)
        now = (predictor.get("minReplicas"), predictor.get("maxReplicas"))
        if now == (count, max(count, 1)):
            return {}, []
        bounds = {"minReplicas": count, "maxReplicas": max(count, 1)}
        return {"spec": {"predictor": bounds}}, [f"replicas {now[0]}..{now[1]} -> {count}"]

    def max_batch(self, one: Json, limit: int) -> tuple[Json, list[str]]:
        now = (_predictor(one).get("batcher") or {}).get("maxBatchSize")
        if now == limit:
            return {}, []
        return {"spec": {"predictor": {"batcher": {"maxBatchSize": limit}}}}, [f"max_batch {now} -> {limit}"]

    def build(self, one: Json, build: Build, name: str) -> tuple[Json, list[str]]:
        model, wanted = self._model(one), {}
        if build.image is not None:
            wanted["image"] = build.image
        if build.model_uri is not None:
            wanted["storageUri"] = build.model_uri
        patch: Json = {key: value for key, value in wanted.items() if model.get(key) != value}
        now = model.get("resources") or {}
        resources = _resources(now, build)
        if resources != now:
            patch["resources"] = resources
        return ({"spec": {"predictor": {"model": patch}}}, [f"variant {name}"]) if patch else ({}, [])

    def nodes(self, one: Json, pool: str, pools: Mapping[str, NodeChoice]) -> tuple[Json, list[str]]:
        patch = _nodes(_predictor(one), pool, pools)
        return ({"spec": {"predictor": patch}}, [f"pool {pool}"]) if patch else ({}, [])

    def model(self, one: Json) -> str | None:
        found = (_predictor(one).get("model") or {}).get("storageUri")
        return found if isinstance(found, str) else None

    def serve(self, one: Json, artifact: str, percent: int | None) -> tuple[Json, list[str]]:
        """The model's URI, and the share of the traffic that goes to it (None: all, and no canary any more)."""
        now, uri = self._model(one).get("storageUri"), _artifact(artifact, "uri")
        share = _predictor(one).get("canaryTrafficPercent")
        predictor: Json = {}
        said = []
        if now != uri:
            predictor["model"] = {"storageUri": uri}
            said.append(f"model {now} -> {uri}")
        if share != percent:
            predictor["canaryTrafficPercent"] = percent
            said.append("all traffic" if percent is None else f"{percent} % of the traffic")
        return ({"spec": {"predictor": predictor}}, said) if predictor else ({}, [])

    def ready(self, one: Json) -> tuple[bool, str]:
        status = one.get("status") or {}
        if status.get("observedGeneration", 0) < one["metadata"].get("generation", 0):
            return False, "the change has not been seen yet"
        for condition in status.get("conditions") or []:
            if condition.get("type") == "Ready":
                return condition.get("status") == "True", str(
                    condition.get("message") or condition.get("reason")
                )
        return False, "it has no condition Ready"

    def _model(self, one: Json) -> Json:
        model = _predictor(one).get("model")
        if not isinstance(model, dict):
            raise TargetError(f"{self._service}: the predictor has no model; valid: spec.predictor.model")
        return model


def merged(one: Any, patch: Json, keep_nulls: bool = False) -> Json:
    """An object after a merge patch (RFC 7396). With `keep_nulls` two patches become one."""
    out = dict(one) if isinstance(one, dict) else {}
    for key, value in patch.items():
        if isinstance(value, dict):
            out[key] = merged(out.get(key), value, keep_nulls)
        elif value is None and not keep_nulls:
            out.pop(key, None)
        else:
            out[key] = value
    return out


def amount(quantity: Any) -> Decimal | None:
    """A Kubernetes quantity as a number, None if it is none: "1500m" and "1.5" are the same."""
    text = str(quantity)
    if not re.fullmatch(_QUANTITY, text):
        return None
    found = re.fullmatch(r"(.*?\d)([A-Za-z]{0,2})", text)
    try:
        if found is None or found[2] not in _FACTORS:
            return Decimal(text)
        return Decimal(found[1]) * _FACTORS[found[2]]
    except InvalidOperation:
        return None


def _pod(one: Json) -> Json:
    return (one["spec"].get("template") or {}).get("spec") or {}


def _predictor(one: Json) -> Json:
    return one["spec"].get("predictor") or {}


def _artifact(text: str, what: Literal["uri", "image"]) -> str:
    """A URI of a model or a reference of an image, or a TargetError if it is none or leaves its folder."""
    pattern, like = (_URI, "s3://bucket/model") if what == "uri" else (_IMAGE, "registry/name:tag")
    if not pattern.fullmatch(text) or ".." in text or "//" in text.partition("://")[2]:
        raise TargetError(f"artifact {text[:200]!r} is refused; valid: as {like}")
    return text


def _set(container: Json, name: str, value: str) -> None:
    """Sets an environment variable of a container, in its place if it is there."""
    entries = container.get("env") or []
    for k, entry in enumerate(entries):
        if entry.get("name") == name:
            entries[k] = entry if entry.get("value") == value else {"name": name, "value": value}
            break
    else:
        entries = [*entries, {"name": name, "value": value}]
    container["env"] = entries


def _resources(now: Json, build: Build) -> Json:
    """Requests and limits with those of a build, in the server's own words where they amount to the same."""
    out = copy.deepcopy(now)
    for kind, wanted in (("requests", build.requests), ("limits", build.limits)):
        for name, quantity in wanted.items():
            have = (out.get(kind) or {}).get(name)
            if have is None or amount(have) != amount(quantity):
                out.setdefault(kind, {})[name] = quantity
    return out


def _nodes(pod: Json, pool: str, pools: Mapping[str, NodeChoice]) -> Json:
    """The patch of selector and tolerations: what belongs to a pool is of the chosen one, the rest stays."""
    selector = pod.get("nodeSelector") or {}
    wanted = pools[pool].node_selector
    ours = {key for choice in pools.values() for key in choice.node_selector}
    change: Json = dict.fromkeys(sorted(ours & selector.keys() - wanted.keys()))
    change |= {key: value for key, value in wanted.items() if selector.get(key) != value}
    patch: Json = {"nodeSelector": change} if change else {}
    of = {name: [msgspec.to_builtins(t) for t in choice.tolerations] for name, choice in pools.items()}
    present = pod.get("tolerations") or []
    foreign = [t for t in present if not any(t in theirs for theirs in of.values())]
    mine = [t for t in present if t in of[pool]]
    missing = [t for t in of[pool] if t not in present]
    if missing or len(foreign) + len(mine) != len(present):
        patch["tolerations"] = [*foreign, *mine, *missing]
    return patch
