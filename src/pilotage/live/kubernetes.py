"""Kubernetes as a target: Deployments, and InferenceServices of KServe.

    [target]
    kind = "kubernetes"
    url = "https://10.0.0.1:6443"
    ca_file = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
    token_file = "/var/run/secrets/kubernetes.io/serviceaccount/token"
    namespace = "models"
    [target.services.ranker]
    object = "inference-service"
    [target.pools.gpu]
    node_selector = {"node.kubernetes.io/instance-type" = "g5.xlarge"}
    tolerations = [{key = "nvidia.com/gpu", operator = "Exists", effect = "NoSchedule"}]

An object is read, what it should have is worked out, and where that differs a merge patch of our own fields is sent
with the `resourceVersion` that was read: all of an order at once, so that none is half done, and nothing that somebody
else has changed meanwhile is overwritten. On a conflict the object is read and the change worked out anew. Counts alone
go through the scale subresource of a Deployment. Of an InferenceService both bounds are set to the count, so that
KServe's own autoscaler has nothing left to decide. The annotation `pilotage.dev/paused: "true"` keeps us away.

Verbs that a role needs: get, list and patch on deployments, deployments/scale and inferenceservices of the namespace.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlencode

import msgspec
from msgspec import Meta

from pilotage.live.endpoint import Answer, Api, Endpoint, must
from pilotage.live.lease import Lease
from pilotage.live.registries import Version
from pilotage.live.targets import MOST_REPLICAS, PausedError, ScaleOrder, TargetError, one_by_one
from pilotage.live.workloads import (
    CHALLENGER_VERSION,
    PAUSED,
    SERVED_ARTIFACT,
    SERVED_VERSION,
    Build,
    DeploymentShape,
    InferenceServiceShape,
    Json,
    NodeChoice,
    merged,
)
from pilotage.world.spec import NonNegative, PositiveCount, Spec, closest

DnsName = Annotated[str, Meta(min_length=1, max_length=63, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
ObjectName = Annotated[str, Meta(min_length=1, max_length=253, pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")]
_PATHS: Final = {
    "deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "inference-service": "/apis/serving.kserve.io/v1beta1/namespaces/{}/inferenceservices",
}
_TRIES: Final = 5  # of one order, each on a freshly read object
_ONE_BY_ONE: Final = 8  # objects; more are read as a list
_PAGE: Final = 500
_MERGE: Final = "application/merge-patch+json"


class Workload(Spec, frozen=True, kw_only=True):
    """The object behind a service; None: as the target says, or named as the service.

    In a Deployment, `container` (None: the first) is told the batch limit and the model by the environment variables
    `max_batch_env` and `model_env`; without the latter a new version is a new image. Both roll its pods over.
    """

    object: Literal["deployment", "inference-service"] | None = None
    name: ObjectName | None = None
    namespace: DnsName | None = None
    container: DnsName | None = None
    max_batch_env: Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    model_env: Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None


class Kubernetes(Endpoint, frozen=True, kw_only=True, tag_field="kind", tag="kubernetes"):
    """An API server, and which object of it every service is. `pools` say where pods of a pool may go, `variants` what
    a build is, per service. `dry_run` lets the server validate everything and store nothing. A new version that is not
    ready within `ready_within_s` is an error (0: that is not waited for).
    """

    namespace: DnsName = "default"
    object: Literal["deployment", "inference-service"] = "deployment"
    services: dict[str, Workload] = msgspec.field(default_factory=dict)
    pools: dict[str, NodeChoice] = msgspec.field(default_factory=dict)
    variants: dict[str, dict[str, Build]] = msgspec.field(default_factory=dict)
    most_replicas: PositiveCount = MOST_REPLICAS
    ready_within_s: NonNegative = 0.0
    dry_run: bool = False

    def begin(self, lease: Lease | None = None) -> KubernetesTarget:
        return KubernetesTarget(self, lease)

    def workload(self, service: str) -> Workload:
        """The object of a service with everything filled in, or a TargetError if it cannot be named."""
        found = self.services.get(service, Workload())
        name = found.name or service
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name):
            raise TargetError(
                f"{service!r} is not a name in Kubernetes; valid: lower-case letters, digits, '-' and '.', or an "
                "entry in services that gives a name"
            )
        filled: Workload = found.replace(
            name=name, namespace=found.namespace or self.namespace, object=found.object or self.object
        )
        return filled


class KubernetesTarget:
    """Scales and deploys through one API server; see `targets.Scaled` and `targets.Target`."""

    def __init__(self, spec: Kubernetes, lease: Lease | None = None) -> None:
        self.spec, self._api = spec, Api(spec, lease)

    # --- what the steer loop asks ----------------------------------------------------------------------------
    def counts(self, services: Sequence[str]) -> Mapping[str, int]:
        found = self._read(services, self._api.deadline())
        return {
            service: count
            for service, one in found.items()
            if isinstance(one, dict) and (count := self._shape(service).count(one)) is not None
        }

    def scale(self, orders: Sequence[ScaleOrder]) -> Sequence[str | TargetError]:
        deadline_s = self._api.deadline()
        try:
            found = self._read([order.service for order in orders], deadline_s)
        except TargetError as error:
            return [error] * len(orders)

        def act(order: ScaleOrder) -> str:
            def wanted(one: Json) -> tuple[Json, str]:
                return self._wanted(order, one)

            first = found.get(order.service)
            if isinstance(first, TargetError):
                raise first
            return self._bring(order.service, wanted, first, deadline_s)

        return one_by_one(orders, act, self.spec.most_replicas, deadline_s)

    def _wanted(self, order: ScaleOrder, one: Json) -> tuple[Json, str]:
        """The merge patch that an order needs, empty if none, and what it does."""
        shape = self._shape(order.service)
        patch, said = shape.replicas(one, order.replicas)
        if order.max_batch is not None:
            patch, said = _and(patch, said, shape.max_batch(merged(one, patch), order.max_batch))
        if order.variant is not None:
            builds = self.spec.variants.get(order.service, {})
            if order.variant not in builds:
                raise TargetError(
                    f"{order.service}: what variant {order.variant!r} is has not been configured; "
                    + closest(order.variant, builds)
                )
            patch, said = _and(
                patch, said, shape.build(merged(one, patch), builds[order.variant], order.variant)
            )
        if order.pool is not None:
            if order.pool not in self.spec.pools:
                raise TargetError(
                    f"{order.service}: pool {order.pool!r} has not been configured; "
                    + closest(order.pool, self.spec.pools)
                )
            patch, said = _and(patch, said, shape.nodes(merged(one, patch), order.pool, self.spec.pools))
        return patch, ", ".join(said)

    # --- what promotion asks ---------------------------------------------------------------------------------
    def running(self, service: str) -> str | None:
        """The version that was deployed last, unless its model has been replaced since."""
        one = self._get(service, self._api.deadline())
        notes = one["metadata"].get("annotations") or {}
        shape = self._shape(service)
        untouched = shape.model(one) == notes.get(SERVED_ARTIFACT) or CHALLENGER_VERSION in notes
        return notes.get(SERVED_VERSION) if untouched else None

    def deploy(self, service: str, version: Version) -> str:
        """All traffic to a version: the model is set, a canary ends, and what runs is noted in annotations."""
        shape = self._shape(service)

        def wanted(one: Json) -> tuple[Json, str]:
            notes = {
                SERVED_VERSION: version.version,
                SERVED_ARTIFACT: version.artifact,
                CHALLENGER_VERSION: None,
            }
            patch, said = shape.serve(one, version.artifact, None)
            patch, said = _and(patch, said, ({"metadata": {"annotations": notes}}, []))
            return _changes(patch, one), ", ".join(said) or f"version {version.version} noted"

        deadline_s = self._api.deadline()
        done = self._bring(service, wanted, None, deadline_s)
        if self.spec.ready_within_s and not self.spec.dry_run:
            self._await_ready(service)
        return f"version {version.version}: {done}"

    def canary(self, service: str, version: Version, percent: int) -> str:
        """A share of the traffic to a version, the rest to what serves now; only InferenceServices can. A promotion is
        the `deploy` of that version, a rollback that of the other."""
        if not 0 <= percent <= 100:
            raise TargetError(f"{service}: {percent} % of the traffic is refused; valid: 0 to 100")
        shape = self._shape(service)

        def wanted(one: Json) -> tuple[Json, str]:
            patch, said = shape.serve(one, version.artifact, percent)
            notes = {"metadata": {"annotations": {CHALLENGER_VERSION: version.version}}}
            return _changes(_and(patch, said, (notes, []))[0], one), ", ".join(said)

        done = self._bring(service, wanted, None, self._api.deadline())
        return f"version {version.version} on trial: {done}"

    def _await_ready(self, service: str) -> None:
        end = time.monotonic() + self.spec.ready_within_s
        while True:
            one = self._get(service, max(end, time.monotonic() + self.spec.timeout_s))
            ready, why = self._shape(service).ready(one)
            if ready:
                return
            if time.monotonic() >= end:
                raise TargetError(
                    self._api.clean(f"{service}: not ready within {self.spec.ready_within_s:g} s: {why}")
                )
            time.sleep(min(0.5, self.spec.ready_within_s / 10))

    # --- reading and writing ---------------------------------------------------------------------------------
    def _bring(
        self,
        service: str,
        wanted: Callable[[Json], tuple[Json, str]],
        first: Json | None,
        deadline_s: float,
    ) -> str:
        """Brings an object to where nothing is left to be `wanted`; `first` is the object if it has just been read."""
        one = first
        for _ in range(_TRIES):
            one = one or self._get(service, deadline_s)
            notes = one["metadata"].get("annotations") or {}
            if str(notes.get(PAUSED, "")).lower() == "true":
                raise PausedError(f"{service}: left as it is, because its annotation {PAUSED} says so")
            patch, said = wanted(one)
            if not patch:
                return f"{service} is as ordered"
            counts_only = self._only_counts(service, patch)
            answer = self._patch(service, patch, one["metadata"]["resourceVersion"], counts_only, deadline_s)
            if answer.status == 409:
                one = None
                continue
            body = must(answer, f"{service}: the change was refused", self._api.clean)
            body = _object(body, service)
            missing = _changes(patch, body) if counts_only else wanted(body)[0]
            if missing:
                raise TargetError(
                    f"{service}: the change was accepted, but {', '.join(_leaves(missing))} is not as sent: something "
                    "in the cluster overrules it, or does not know it"
                )
            return f"{'would change' if self.spec.dry_run else 'changed'} {service}: {said}"
        raise TargetError(f"{service}: somebody else changed it every time, in {_TRIES} tries")

    def _only_counts(self, service: str, patch: Json) -> bool:
        """Whether the scale subresource can do it, which is all that a role then needs to allow."""
        return self.spec.workload(service).object == "deployment" and patch == {
            "spec": {"replicas": patch.get("spec", {}).get("replicas")}
        }

    def _patch(
        self, service: str, patch: Json, resource_version: str, counts_only: bool, deadline_s: float
    ) -> Answer:
        workload = self.spec.workload(service)
        path = f"{self._path(workload)}/{workload.name}" + ("/scale" if counts_only else "")
        query = {"fieldManager": "pilotage"} | ({"dryRun": "All"} if self.spec.dry_run else {})
        body = merged(patch, {"metadata": {"resourceVersion": resource_version}}, keep_nulls=True)
        return self._api.ask(
            "PATCH", f"{path}?{urlencode(query)}", body, content=_MERGE, deadline_s=deadline_s
        )

    def _get(self, service: str, deadline_s: float) -> Json:
        workload = self.spec.workload(service)
        path = f"{self._path(workload)}/{workload.name}"
        body = must(self._api.ask("GET", path, deadline_s=deadline_s), service, self._api.clean)
        return _object(body, service)

    def _read(self, services: Sequence[str], deadline_s: float) -> dict[str, Json | TargetError]:
        """The objects of services in few round trips; what does not exist is left out, what cannot be named is an error
        in its place. Raises a TargetError if the server does not answer."""
        found: dict[str, Json | TargetError] = {}
        groups: dict[str, dict[str, list[str]]] = {}
        for service in services:
            try:
                workload = self.spec.workload(service)
                groups.setdefault(self._path(workload), {}).setdefault(str(workload.name), []).append(service)
            except TargetError as error:
                found[service] = error
        for path, names in groups.items():
            objects = (
                self._listed(path, deadline_s)
                if len(names) > _ONE_BY_ONE
                else self._each(path, names, deadline_s)
            )
            for name in names.keys() & objects.keys():
                found |= dict.fromkeys(names[name], objects[name])
        return found

    def _each(self, path: str, names: Mapping[str, Any], deadline_s: float) -> dict[str, Json]:
        found = {}
        for name in names:
            answer = self._api.ask("GET", f"{path}/{name}", deadline_s=deadline_s)
            if answer.status != 404:
                found[name] = _object(must(answer, name, self._api.clean), name)
        return found

    def _listed(self, path: str, deadline_s: float) -> dict[str, Json]:
        found: dict[str, Json] = {}
        following = ""
        while True:
            query = {"limit": str(_PAGE)} | ({"continue": following} if following else {})
            answer = self._api.ask("GET", f"{path}?{urlencode(query)}", deadline_s=deadline_s)
            if answer.status == 410 and following:  # the list has grown too old: from the beginning
                found, following = {}, ""
                continue
            body = must(answer, path, self._api.clean)
            if not isinstance(body, dict) or not isinstance(body.get("items"), list):
                raise TargetError(f"{path}: the answer is not a list of Kubernetes")
            for one in body["items"]:
                found[_object(one, path)["metadata"]["name"]] = one
            following = (body.get("metadata") or {}).get("continue") or ""
            if not following:
                return found

    def _path(self, workload: Workload) -> str:
        return _PATHS[str(workload.object)].format(workload.namespace)

    def _shape(self, service: str) -> DeploymentShape | InferenceServiceShape:
        workload = self.spec.workload(service)
        if workload.object == "inference-service":
            return InferenceServiceShape(service)
        return DeploymentShape(service, workload.container, workload.max_batch_env, workload.model_env)


def _object(body: Any, what: str) -> Json:
    """An object with a name and a version and a spec, or a TargetError."""
    metadata = body.get("metadata") if isinstance(body, dict) else None
    if (
        not isinstance(metadata, dict)
        or not all(isinstance(metadata.get(key), str) for key in ("name", "resourceVersion"))
        or not isinstance(body.get("spec"), dict)
    ):
        raise TargetError(f"{what}: the answer is not an object of Kubernetes")
    return dict(body)


def _and(patch: Json, said: list[str], more: tuple[Json, list[str]]) -> tuple[Json, list[str]]:
    return merged(patch, more[0], keep_nulls=True), [*said, *more[1]]


def _changes(patch: Json, one: Any) -> Json:
    """What of a merge patch an object does not have yet."""
    out: Json = {}
    for key, value in patch.items():
        now = one.get(key) if isinstance(one, dict) else None
        if isinstance(value, dict):
            inner = _changes(value, now)
            if inner:
                out[key] = inner
        elif value != now:
            out[key] = value
    return out


def _leaves(patch: Json, where: str = "") -> list[str]:
    out = []
    for key, value in patch.items():
        out += _leaves(value, f"{where}{key}.") if isinstance(value, dict) else [where + key]
    return out
