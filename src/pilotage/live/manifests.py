"""Manifests: a deployment written down so that a platform can apply it.

Plain dictionaries of KServe's InferenceService (serving.kserve.io/v1beta1), of Kubernetes' Deployment (apps/v1) with a
HorizontalPodAutoscaler (autoscaling/v2) and a Service, and of Ray Serve's configuration file (ServeDeploySchema), and
their YAML. What the schemas do not check and admission webhooks do (bounds in order, whole requests of GPUs) is checked
here.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from pilotage.world.pools import Resources
from pilotage.world.servers import Variant
from pilotage.world.services import Service
from pilotage.world.spec import Count, Positive, PositiveCount, Spec, SpecError

Platform = Literal["kubernetes", "kserve", "ray-serve"]
PLATFORMS: Final[tuple[Platform, ...]] = ("kubernetes", "kserve", "ray-serve")
POOL_LABEL: Final = "pilotage.dev/pool"
# what an HPA asks a custom-metrics adapter for: requests in a pod, waiting or executing
CONCURRENCY_METRIC: Final = "requests_in_system"


class Artifact(Spec, frozen=True, kw_only=True):
    """Where a model and its server are; `{variant}` in a text stands for the variant's name.

    `uri` is where KServe loads the model from, `format` its model format; `image` is the container that a Deployment
    runs, which serves on `port` and reads MAX_BATCH_SIZE and BATCH_WAIT_MS from its environment; `import_path` is the
    application that Ray Serve imports.
    """

    uri: str = "s3://models/{variant}"
    format: str = "onnx"
    image: str = "registry.example/{variant}:latest"
    port: Annotated[int, Meta(ge=1, le=65535)] = 8080
    import_path: Annotated[str, Meta(pattern=r"^[\w.]+:\w+$")] = "app:app"


class Autoscaling(Spec, frozen=True, kw_only=True):
    """Bounds on replicas, and the requests in a replica (waiting or executing) that the platform's autoscaler keeps."""

    platform: Platform = "kubernetes"
    min_replicas: Count = 1
    max_replicas: PositiveCount = 10
    target_concurrency: Positive = 1.0

    def __post_init__(self) -> None:
        if self.min_replicas > self.max_replicas:
            raise SpecError(f"min_replicas {self.min_replicas} exceeds max_replicas {self.max_replicas}")
        if self.platform == "kubernetes" and self.min_replicas < 1:
            raise SpecError(
                "min_replicas is 0, which an HPA takes only behind a feature gate; valid: 1 and more"
            )


def manifests(
    service: Service, variant: Variant, artifact: Artifact, scaling: Autoscaling
) -> list[dict[str, Any]]:
    """What to apply so that the first pool of a service runs a variant under those settings."""
    make = {"kubernetes": _kubernetes, "kserve": _kserve, "ray-serve": _ray_serve}[scaling.platform]
    return make(service, variant, artifact, scaling)


def as_yaml(documents: list[dict[str, Any]]) -> str:
    """One YAML stream."""
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True  # anchors are valid, and hard to read

    return yaml.dump_all(documents, Dumper=Plain, sort_keys=False, width=110)


def _filled(text: str, variant: Variant) -> str:
    return text.replace("{variant}", variant.name)  # no format string: what a file says is not code


def _quantities(needs: Resources | None) -> dict[str, Any]:
    """Kubernetes' requests and limits; a share of a GPU has no quantity there, so it is refused."""
    if needs is None:
        return {}
    if needs.gpus and not float(needs.gpus).is_integer():
        raise SpecError(
            f"gpus is {needs.gpus:g}, but Kubernetes' nvidia.com/gpu takes whole GPUs; give whole ones, or pools whose "
            "nodes are slices (MIG)"
        )
    amounts: dict[str, str] = {}
    if needs.cpu:
        amounts["cpu"] = f"{math.ceil(1000 * needs.cpu - 1e-9)}m"
    if needs.memory_gib:
        amounts["memory"] = f"{math.ceil(1024 * needs.memory_gib - 1e-9)}Mi"
    if needs.gpus:
        amounts["nvidia.com/gpu"] = f"{needs.gpus:.0f}"
    # the CPU is not limited: a limit throttles the batches whose latency the plan relies on
    limits = {name: amount for name, amount in amounts.items() if name != "cpu"}
    return {"resources": {"requests": amounts, **({"limits": limits} if limits else {})}}


def _metadata(service: Service, variant: Variant) -> dict[str, Any]:
    labels = {"app": service.name, "pilotage.dev/variant": variant.name}
    return {"name": _dns(service.name), "labels": labels}


def _dns(name: str) -> str:
    """A name as Kubernetes wants it of a Service: no dots."""
    return name.replace(".", "-")


def _kubernetes(
    service: Service, variant: Variant, artifact: Artifact, scaling: Autoscaling
) -> list[dict[str, Any]]:
    server, metadata = service.server, _metadata(service, variant)
    name = metadata["name"]
    container = {
        "name": "server",
        "image": _filled(artifact.image, variant),
        "ports": [{"name": "http", "containerPort": artifact.port}],
        "env": [
            {"name": "MAX_BATCH_SIZE", "value": str(server.max_batch)},
            {"name": "BATCH_WAIT_MS", "value": f"{server.batch_wait_ms:g}"},
        ],
        "readinessProbe": {
            "httpGet": {"path": "/v2/health/ready", "port": "http"},
            "periodSeconds": 5,
            "failureThreshold": 3,
        },
        **_quantities(variant.resources),
    }
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                # replicas are the HPA's: a count here would reset it at every apply
                "selector": {"matchLabels": {"app": service.name}},
                "template": {
                    "metadata": {"labels": metadata["labels"]},
                    "spec": {
                        "nodeSelector": {POOL_LABEL: service.pools[0]},
                        "containers": [container],
                    },
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "selector": {"app": service.name},
                "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
            },
        },
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": metadata,
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
                "minReplicas": scaling.min_replicas,
                "maxReplicas": scaling.max_replicas,
                "metrics": [
                    {
                        "type": "Pods",
                        "pods": {
                            "metric": {"name": CONCURRENCY_METRIC},
                            "target": {
                                "type": "AverageValue",
                                "averageValue": f"{max(1, round(1000 * scaling.target_concurrency))}m",
                            },
                        },
                    }
                ],
            },
        },
    ]


def _kserve(
    service: Service, variant: Variant, artifact: Artifact, scaling: Autoscaling
) -> list[dict[str, Any]]:
    server, metadata = service.server, _metadata(service, variant)
    # Knative aims at a percentage of a whole number of requests: together they are the target
    whole = max(1, math.ceil(scaling.target_concurrency))
    annotations = {
        "autoscaling.knative.dev/target-utilization-percentage": f"{100 * scaling.target_concurrency / whole:.4g}"
    }
    predictor: dict[str, Any] = {
        "minReplicas": scaling.min_replicas,
        "maxReplicas": scaling.max_replicas,
        "scaleMetric": "concurrency",
        "scaleTarget": whole,
        "nodeSelector": {POOL_LABEL: service.pools[0]},
        "model": {
            "modelFormat": {"name": artifact.format},
            "storageUri": _filled(artifact.uri, variant),
            **_quantities(variant.resources),
        },
    }
    if server.max_batch > 1:
        # 0 would mean the batcher's own default, 500 ms
        wait = max(1, math.ceil(server.batch_wait_ms))
        predictor["batcher"] = {"maxBatchSize": server.max_batch, "maxLatency": wait}
    return [
        {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": metadata | {"annotations": annotations},
            "spec": {"predictor": predictor},
        }
    ]


def _ray_serve(
    service: Service, variant: Variant, artifact: Artifact, scaling: Autoscaling
) -> list[dict[str, Any]]:
    server = service.server
    needs = variant.resources
    options: dict[str, Any] = {
        "resources": {service.pools[0]: 0.001}
    }  # a custom resource that marks the pool's nodes
    if needs and needs.cpu:
        options["num_cpus"] = needs.cpu
    if needs and needs.gpus:
        options["num_gpus"] = needs.gpus
    if needs and needs.memory_gib:
        options["memory"] = math.ceil(needs.memory_gib * 2**30)
    # a replica that may hold no more than a batch starves: room for one executing and one forming
    ongoing = max(2 * server.max_batch * server.batches_in_flight, math.ceil(2 * scaling.target_concurrency))
    deployment = {
        "name": service.name,
        "max_ongoing_requests": ongoing,
        "user_config": {
            "variant": variant.name,
            "max_batch_size": server.max_batch,
            "batch_wait_timeout_s": server.batch_wait_ms / 1e3,
        },
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_concurrency,
        },
        "ray_actor_options": options,
    }
    application = {
        "name": service.name,
        "route_prefix": f"/{service.name}",
        "import_path": artifact.import_path,
        "deployments": [deployment],
    }
    return [{"applications": [application]}]
