"""Ray Serve as a target, through the REST API of Ray's dashboard (2.60).

    [target]
    kind = "ray-serve"
    url = "http://127.0.0.1:8265"
    token_env = "RAY_TOKEN"                      # where the cluster asks for one
    [target.services.ranker]
    application = "ranking"
    deployment = "Ranker"

Counts go to the scale endpoint, which an application offers with `external_scaler_enabled: true`; the batch limit, the
build, the pool and the version go into the declared configuration (`user_config` reaches replicas that live, without a
restart; other resources replace them). A declaration replaces that of all applications, so it is read, changed and sent
whole, with the counts that are in force: those that once were declared would undo what was scaled since. There is no
compare-and-set, so one writer at a time; what came of it is read back.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final
from urllib.parse import quote

import msgspec
from msgspec import Meta

from pilotage.live.endpoint import Api, Endpoint, must
from pilotage.live.lease import Lease
from pilotage.live.registries import Version
from pilotage.live.targets import MOST_REPLICAS, ScaleOrder, TargetError, one_by_one
from pilotage.world.spec import NonNegative, Positive, PositiveCount, Spec, SpecError, closest

_DECLARED: Final = "/api/serve/applications/"
_KEPT: Final = ("proxy_location", "http_options", "grpc_options", "target_capacity")
_IN_FORCE_WITHIN_S: Final = 5.0
_POOL: Final = "pool of replicas"  # among the changes; no deployment calls a setting so
Json = dict[str, Any]
RayName = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]


class ServeDeployment(Spec, frozen=True, kw_only=True):
    """The deployment behind a service."""

    application: RayName
    deployment: RayName


class RayServe(Endpoint, frozen=True, kw_only=True, tag_field="kind", tag="ray-serve"):
    """A dashboard, and which deployment every service is (not among `services`: the application and the deployment of
    its name). `max_batch_key`, `model_key` and `version_key` are what the `user_config` of deployments calls the batch
    limit, the URI of the model and its version; `variants` are what a build changes there, per service; `pools` the
    custom resources that replicas of a pool ask for. A new version that is not healthy within `ready_within_s` is an
    error (0: that is not waited for).
    """

    services: dict[str, ServeDeployment] = msgspec.field(default_factory=dict)
    max_batch_key: str = "max_batch"
    model_key: str = "model_uri"
    version_key: str = "model_version"
    variants: dict[str, dict[str, dict[str, Any]]] = msgspec.field(default_factory=dict)
    pools: dict[str, dict[str, Positive]] = msgspec.field(default_factory=dict)
    most_replicas: PositiveCount = MOST_REPLICAS
    ready_within_s: NonNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for pool, resources in self.pools.items():
            for name in resources.keys() & {"CPU", "GPU", "memory", "object_store_memory"}:
                # Ray accepts the declaration, and then the application is gone
                raise SpecError(
                    f"pool {pool!r}: {name!r} is not a custom resource; valid: one of the nodes' own"
                )

    def begin(self, lease: Lease | None = None) -> RayServeTarget:
        return RayServeTarget(self, lease)


class RayServeTarget:
    """Scales and deploys through one dashboard; see `targets.Scaled` and `targets.Target`."""

    def __init__(self, spec: RayServe, lease: Lease | None = None) -> None:
        self.spec, self._api = spec, Api(spec, lease)

    # --- what the steer loop asks ----------------------------------------------------------------------------
    def counts(self, services: Sequence[str]) -> Mapping[str, int]:
        seen = _Seen(self._read(self._api.deadline()), self.spec)
        return {service: seen.count(service) for service in services if seen.knows(service)}

    def scale(self, orders: Sequence[ScaleOrder]) -> Sequence[str | TargetError]:
        deadline_s = self._api.deadline()
        try:
            seen = _Seen(self._read(deadline_s), self.spec)
        except TargetError as error:
            return [error] * len(orders)
        declared: dict[str, ScaleOrder] = {}

        def act(order: ScaleOrder) -> str:
            changes = seen.changes(order)
            now = seen.count(order.service)
            said = [f"replicas {now} -> {order.replicas}"] if order.replicas != now else []
            said += [f"{key} -> {value}" for key, value in changes.items()]
            if not said:
                return f"{order.service} is as ordered"
            if changes or not seen.scaled_from_outside(order.service):
                seen.declare(order.service, order.replicas, changes)
                declared[order.service] = order
                return f"declared {order.service}: {', '.join(said)}"
            self._post(order, deadline_s)
            seen.scaled(order.service, order.replicas)
            return f"scaled {order.service}: {said[0]}"

        outcomes = one_by_one(orders, act, self.spec.most_replicas, deadline_s)
        if declared:
            failed = self._declared(seen, declared, deadline_s)
            outcomes = [
                failed.get(order.service, outcome) if isinstance(outcome, str) else outcome
                for order, outcome in zip(orders, outcomes, strict=True)
            ]
        return outcomes

    def _post(self, order: ScaleOrder, deadline_s: float) -> None:
        place = _place(self.spec, order.service)
        names = [quote(name, safe="") for name in (place.application, place.deployment)]
        path = f"/api/v1/applications/{names[0]}/deployments/{names[1]}/scale"
        body = {"target_num_replicas": order.replicas}
        answer = self._api.ask("POST", path, body, deadline_s=deadline_s)
        if answer.status != 200 and isinstance(answer.body, dict):
            answer = answer._replace(body=str(answer.body.get("error", "")))
        must(answer, f"{order.service}: scaling was refused", self._api.clean)

    def _declared(
        self, seen: _Seen, declared: Mapping[str, ScaleOrder], deadline_s: float
    ) -> dict[str, TargetError]:
        """Sends what was declared, all at once, and reads it back; the services for which that failed, and why. Ray
        accepts a declaration first, and its controller carries it over to the deployments in its next round.
        """
        end = min(deadline_s - self.spec.timeout_s, time.monotonic() + _IN_FORCE_WITHIN_S)
        try:
            self._put(seen, deadline_s)
            while True:
                after = _Seen(self._read(deadline_s), self.spec)
                failed = {}
                for service, order in declared.items():
                    left = [*after.changes(order)]
                    if after.count(service) != order.replicas:
                        left.append("replicas")
                    if left:
                        failed[service] = TargetError(
                            f"{service}: declared, but not in force: {', '.join(left)}"
                        )
                if not failed or time.monotonic() >= end:
                    return failed
                time.sleep(0.1)
        except TargetError as error:
            return dict.fromkeys(declared, error)

    # --- what promotion asks ---------------------------------------------------------------------------------
    def running(self, service: str) -> str | None:
        """The version that the deployment was given last."""
        seen = _Seen(self._read(self._api.deadline()), self.spec)
        found = seen.user_config(service).get(self.spec.version_key)
        return None if found is None else str(found)

    def deploy(self, service: str, version: Version) -> str:
        """The version's model to all replicas, which `reconfigure` without a restart."""
        deadline_s = self._api.deadline()
        seen = _Seen(self._read(deadline_s), self.spec)
        wanted = {self.spec.model_key: version.artifact, self.spec.version_key: version.version}
        now = seen.user_config(service)
        changes = {key: value for key, value in wanted.items() if now.get(key) != value}
        if changes:
            seen.declare(service, seen.count(service), changes)
            self._put(seen, deadline_s)
        if self.spec.ready_within_s:
            self._await_healthy(service, wanted)
        return f"version {version.version}: {service} " + ("was told" if changes else "is as ordered")

    def _await_healthy(self, service: str, wanted: Mapping[str, str]) -> None:
        end = time.monotonic() + self.spec.ready_within_s
        while True:
            seen = _Seen(self._read(self._api.deadline()), self.spec)
            status, why = seen.status(service)
            if status == "HEALTHY" and wanted.items() <= seen.user_config(service).items():
                return
            if time.monotonic() >= end or status in ("UNHEALTHY", "DEPLOY_FAILED"):
                raise TargetError(
                    self._api.clean(
                        f"{service}: not healthy within {self.spec.ready_within_s:g} s: {status} {why}"
                    )
                )
            time.sleep(min(0.25, self.spec.ready_within_s / 10))

    # --- the wire --------------------------------------------------------------------------------------------
    def _read(self, deadline_s: float) -> Json:
        body = must(self._api.ask("GET", _DECLARED, deadline_s=deadline_s), "Ray Serve", self._api.clean)
        if not isinstance(body, dict) or not isinstance(body.get("applications"), dict):
            raise TargetError("Ray Serve: the answer is not the state of a Serve instance")
        return dict(body)

    def _put(self, seen: _Seen, deadline_s: float) -> None:
        answer = self._api.ask("PUT", _DECLARED, seen.document(), deadline_s=deadline_s)
        must(answer, "Ray Serve: the declaration was refused", self._api.clean)


class _Seen:
    """What the dashboard says of all applications, and what is to be declared."""

    def __init__(self, state: Json, spec: RayServe) -> None:
        self._state, self._spec = state, spec
        self._wanted: dict[tuple[str, str], int] = {}  # counts that were ordered after the reading
        self._changes: dict[tuple[str, str], Json] = {}

    def knows(self, service: str) -> bool:
        return self._find(service) is not None

    def count(self, service: str) -> int:
        """Replicas wanted now, whether or not they run."""
        place = self._place(service)
        return self._wanted.get(place, int(self._deployment(service)["target_num_replicas"]))

    def status(self, service: str) -> tuple[str, str]:
        found = self._deployment(service)
        return str(found.get("status")), str(found.get("message") or "")

    def user_config(self, service: str) -> Json:
        found = (self._deployment(service).get("deployment_config") or {}).get("user_config")
        return dict(found) if isinstance(found, dict) else {}

    def scaled_from_outside(self, service: str) -> bool:
        return bool(self._application(service).get("external_scaler_enabled"))

    def scaled(self, service: str, replicas: int) -> None:
        self._wanted[self._place(service)] = replicas

    def changes(self, order: ScaleOrder) -> Json:
        """What of an order, but for the count, is not in force."""
        service, spec = order.service, self._spec
        wanted: Json = {}
        if order.max_batch is not None:
            wanted[spec.max_batch_key] = order.max_batch
        if order.variant is not None:
            builds = spec.variants.get(service, {})
            if order.variant not in builds:
                raise TargetError(
                    f"{service}: what variant {order.variant!r} is has not been configured; "
                    + closest(order.variant, builds)
                )
            wanted |= builds[order.variant]
        now = self.user_config(service)
        out = {key: value for key, value in wanted.items() if now.get(key) != value}
        if order.pool is not None:
            if order.pool not in spec.pools:
                raise TargetError(
                    f"{service}: pool {order.pool!r} has not been configured; "
                    + closest(order.pool, spec.pools)
                )
            options = (self._deployment(service).get("deployment_config") or {}).get(
                "ray_actor_options"
            ) or {}
            if (options.get("resources") or {}) != spec.pools[order.pool]:
                out[_POOL] = order.pool
        return out

    def declare(self, service: str, replicas: int, changes: Json) -> None:
        """Notes what the next document is to say."""
        if self._application(service).get("deployed_app_config") is None:
            raise TargetError(
                f"{service}: its application was not declared but run by a program, so only its count can be changed, "
                "and that with external_scaler_enabled: true; valid: serve deploy"
            )
        settings = self._deployment(service).get("deployment_config") or {}
        if settings.get("autoscaling_config") is not None:
            raise TargetError(
                f"{service}: Ray Serve scales it by itself (autoscaling_config); valid: num_replicas, and "
                "external_scaler_enabled: true"
            )
        place = self._place(service)
        self._wanted[place] = replicas
        self._changes[place] = self._changes.get(place, {}) | changes

    def document(self) -> Json:
        """The declaration of all applications as they are now, with the changes."""
        out: Json = {key: self._state[key] for key in _KEPT if self._state.get(key) is not None}
        out["applications"] = []
        for name, application in self._state["applications"].items():
            config = copy.deepcopy(application.get("deployed_app_config"))
            if config is None:
                continue
            declared = {one["name"]: one for one in config.setdefault("deployments", [])}
            for deployment, state in application["deployments"].items():
                place = (name, deployment)
                if not application.get("external_scaler_enabled") and place not in self._wanted:
                    continue
                if deployment not in declared:
                    declared[deployment] = {"name": deployment}
                    config["deployments"].append(declared[deployment])
                mine = declared[deployment]
                mine["num_replicas"] = self._wanted.get(place, state["target_num_replicas"])
                self._change(mine, state.get("deployment_config") or {}, self._changes.get(place, {}))
            out["applications"].append(config)
        return out

    def _change(self, mine: Json, settings: Json, changes: Json) -> None:
        user = {key: value for key, value in changes.items() if key != _POOL}
        if user:
            mine["user_config"] = (settings.get("user_config") or {}) | user
        if _POOL in changes:
            options = mine.get("ray_actor_options") or settings.get("ray_actor_options") or {}
            mine["ray_actor_options"] = options | {"resources": self._spec.pools[changes[_POOL]]}

    def _place(self, service: str) -> tuple[str, str]:
        place = _place(self._spec, service)
        return place.application, place.deployment

    def _find(self, service: str) -> Json | None:
        application, deployment = self._place(service)
        found = (self._state["applications"].get(application) or {}).get("deployments") or {}
        one = found.get(deployment)
        return one if isinstance(one, dict) and type(one.get("target_num_replicas")) is int else None

    def _deployment(self, service: str) -> Json:
        found = self._find(service)
        if found is None:
            application, deployment = self._place(service)
            known = [
                f"{a}/{d}"
                for a, one in self._state["applications"].items()
                for d in one.get("deployments") or {}
            ]
            raise TargetError(
                f"{service}: Ray Serve has no {application}/{deployment}; it has: {', '.join(known) or 'nothing'}"
            )
        return found

    def _application(self, service: str) -> Json:
        self._deployment(service)
        return dict(self._state["applications"][self._place(service)[0]])


def _place(spec: RayServe, service: str) -> ServeDeployment:
    return spec.services.get(service) or ServeDeployment(application=service, deployment=service)
