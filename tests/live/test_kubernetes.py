"""The Kubernetes target against a stand-in, and real clients against the same to show that it is faithful."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="the official client is not installed: pip install 'pilotage[dev]'")

from pilotage.live.kubernetes import Kubernetes, KubernetesTarget
from pilotage.live.registries import Version
from pilotage.live.targets import PausedError, ScaleOrder, TargetError
from pilotage.live.workloads import amount
from pilotage.world.spec import SpecError, decode
from tests.live.kube_api import (
    Fault,
    KubeApi,
    certify,
    deployment,
    inference_service,
    kserve_schema,
    serving,
)

TOKEN = "s3cr3t-of-the-cluster"
CONFIG: dict[str, Any] = {
    "kind": "kubernetes",
    "namespace": "models",
    "budget_s": 5.0,
    "timeout_s": 1.0,
    "services": {
        "ranker": {"container": "server", "max_batch_env": "MAX_BATCH", "model_env": "MODEL_URI"},
        "fraud": {"object": "inference-service"},
    },
    "pools": {
        "cpu": {"node_selector": {"pool": "cpu"}},
        "gpu": {
            "node_selector": {"pool": "gpu", "accelerator": "a10"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        },
    },
    "variants": {
        "ranker": {"int8": {"model_uri": "s3://models/ranker/7-int8", "requests": {"cpu": "1000m"}}},
        "fraud": {"int8": {"model_uri": "s3://models/fraud/1-int8", "limits": {"nvidia.com/gpu": "1"}}},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cluster")
    certify(path)
    return path


@pytest.fixture
def api(folder: Path) -> Iterator[KubeApi]:
    (folder / "token").write_text(TOKEN + "\n")
    with serving(KubeApi(folder, TOKEN, kserve_schema())) as one:
        one.add(deployment())
        one.add(inference_service())
        one.log.clear()
        yield one


def target(api: KubeApi, **changes: Any) -> KubernetesTarget:
    where = {"url": api.url, "ca_file": str(api.ca_file), "token_file": str(api.ca_file.with_name("token"))}
    return decode(CONFIG | where | changes, Kubernetes, "target").begin()


def ranker(api: KubeApi) -> dict[str, Any]:
    return api.objects["deployments", "models", "ranker"]


def fraud(api: KubeApi) -> dict[str, Any]:
    return api.objects["inferenceservices", "models", "fraud"]["spec"]["predictor"]


# --- scaling -----------------------------------------------------------------------------------------------------


def test_counts_are_those_ordered_and_what_does_not_exist_is_unknown(api: KubeApi) -> None:
    assert dict(target(api).counts(["ranker", "fraud", "nobody"])) == {"ranker": 2, "fraud": 1}
    assert not api.writes


def test_a_count_alone_goes_through_the_scale_subresource(api: KubeApi) -> None:
    steered = target(api)
    (said,) = steered.scale([ScaleOrder("ranker", 5)])
    assert said == "changed ranker: replicas 2 -> 5"
    assert [path.partition("?")[0] for _, path in api.writes] == [
        "/apis/apps/v1/namespaces/models/deployments/ranker/scale"
    ]
    assert ranker(api)["spec"]["replicas"] == 5
    assert steered.scale([ScaleOrder("ranker", 5)]) == ["ranker is as ordered"]
    assert len(api.writes) == 1, "an order that has been carried out writes nothing"


def test_all_of_an_order_is_one_write_and_leaves_the_rest_as_it_was(api: KubeApi) -> None:
    before = json.loads(json.dumps(ranker(api)))
    order = ScaleOrder("ranker", 4, max_batch=16, variant="int8", pool="gpu")
    (said,) = target(api).scale([order])
    assert said == "changed ranker: replicas 2 -> 4, MAX_BATCH=16, variant int8, pool gpu"
    assert len(api.writes) == 1
    after = ranker(api)["spec"]
    pod = after["template"]["spec"]
    assert after["replicas"] == 4
    assert pod["nodeSelector"] == {"pool": "gpu", "accelerator": "a10"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    proxy, server, logs = pod["containers"]
    assert [proxy, logs] == [before["spec"]["template"]["spec"]["containers"][k] for k in (0, 2)]
    assert {e["name"]: e["value"] for e in server["env"]} == {
        "MAX_BATCH": "16", "MODEL_URI": "s3://models/ranker/7-int8",
    }  # fmt: skip
    assert server["resources"] == {"requests": {"cpu": "1", "memory": "2Gi"}}  # as the server writes 1000m
    assert target(api).scale([order]) == ["ranker is as ordered"]
    assert len(api.writes) == 1


def test_another_pool_takes_its_selector_and_tolerations_away_and_no_others(api: KubeApi) -> None:
    foreign = {"key": "spot", "operator": "Exists"}
    api.objects.clear()
    api.add(deployment(nodeSelector={"disk": "ssd"}, tolerations=[foreign]))
    steered = target(api)
    steered.scale([ScaleOrder("ranker", 2, pool="gpu")])
    steered.scale([ScaleOrder("ranker", 2, pool="cpu")])
    pod = ranker(api)["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"disk": "ssd", "pool": "cpu"}
    assert pod["tolerations"] == [foreign]


def test_an_inference_service_has_both_bounds_at_the_count(api: KubeApi) -> None:
    order = ScaleOrder("fraud", 4, max_batch=16, variant="int8", pool="gpu")
    (said,) = target(api).scale([order])
    assert said == "changed fraud: replicas 1..3 -> 4, max_batch None -> 16, variant int8, pool gpu"
    predictor = fraud(api)
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (4, 4)
    assert predictor["batcher"] == {"maxBatchSize": 16}
    assert predictor["model"]["storageUri"] == "s3://models/fraud/1-int8"
    assert predictor["model"]["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert predictor["nodeSelector"] == {"pool": "gpu", "accelerator": "a10"}
    assert target(api).scale([order]) == ["fraud is as ordered"]
    target(api).scale([ScaleOrder("fraud", 0)])
    assert (fraud(api)["minReplicas"], fraud(api)["maxReplicas"]) == (0, 1)


def test_many_services_are_read_as_lists_in_pages(api: KubeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"s{k:02}" for k in range(20)]
    for name in names:
        api.add(deployment(name))
    monkeypatch.setattr("pilotage.live.kubernetes._PAGE", 7)
    api.log.clear()
    assert dict(target(api).counts(names)) == dict.fromkeys(names, 2)
    assert len(api.log) == 3, "21 Deployments in pages of 7"


def test_dry_run_is_validated_by_the_server_and_stored_by_nobody(api: KubeApi) -> None:
    steered = target(api, dry_run=True)
    assert steered.scale([ScaleOrder("ranker", 5, max_batch=4)]) == [
        "would change ranker: replicas 2 -> 5, MAX_BATCH=4"
    ]
    assert ranker(api)["spec"]["replicas"] == 2
    assert all("dryRun=All" in path for _, path in api.writes)


# --- what must not be done ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "why"),
    [
        (ScaleOrder("ranker", 10_000), "replicas 10000 is refused; valid: 0 to 1000"),
        (ScaleOrder("ranker", -1), "replicas -1 is refused"),
        (ScaleOrder("ranker", float("nan")), "replicas nan is refused"),  # type: ignore[arg-type]
        (ScaleOrder("ranker", True), "replicas True is refused"),
        (ScaleOrder("ranker", 3, max_batch=0), "max_batch 0 is refused; valid: 1 to 1024"),
        (ScaleOrder("ranker", 3, pool="moon"), "pool 'moon' has not been configured; valid: cpu, gpu"),
        (ScaleOrder("ranker", 3, variant="int7"), "did you mean 'int8'?"),
        (ScaleOrder("../../api/v1/secrets/root", 3), "is not a name in Kubernetes"),
        (ScaleOrder("ranker/scale?x=", 3), "is not a name in Kubernetes"),
        (ScaleOrder("Ranker\n", 3), "is not a name in Kubernetes"),
        (ScaleOrder("nobody", 3), "not found"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused_and_stops_no_other(
    api: KubeApi, order: ScaleOrder, why: str
) -> None:
    refused, done = target(api).scale([order, ScaleOrder("fraud", 2)])
    assert isinstance(refused, TargetError)
    assert why in str(refused)
    assert done == "changed fraud: replicas 1..3 -> 2"
    assert ranker(api)["spec"]["replicas"] == 2


def test_a_paused_service_is_left_alone(api: KubeApi) -> None:
    ranker(api)["metadata"]["annotations"] = {"pilotage.dev/paused": "true"}
    (refused,) = target(api).scale([ScaleOrder("ranker", 3)])
    assert isinstance(refused, PausedError)
    assert not api.writes


def test_what_the_schema_refuses_is_said_and_not_repeated(api: KubeApi) -> None:
    steered = target(api, pools={"odd": {"node_selector": {"a": "b"}, "tolerations": [{"value": "x"}]}})
    api.fault = lambda method, path: (
        Fault(422, message="spec.tolerations[0]: Invalid\nvalue \x1b[31m" + TOKEN)
        if method == "PATCH"
        else None
    )
    (refused,) = steered.scale([ScaleOrder("ranker", 3, pool="odd")])
    assert isinstance(refused, TargetError)
    assert "spec.tolerations[0]: Invalid value" in str(refused)
    assert TOKEN not in str(refused)
    assert str(refused).isprintable(), "text of a server cannot forge lines of a log"
    assert len(api.writes) == 1


@pytest.mark.skipif(kserve_schema() is None, reason="PILOTAGE_DATA has no schema of KServe")
def test_the_stand_in_refuses_what_the_schema_of_kserve_refuses(api: KubeApi) -> None:
    for predictor in ({"minReplica": 1}, {"scaleMetric": "latency"}, {"canaryTrafficPercent": 150}):
        with pytest.raises(Exception, match="is invalid"):
            api.add(inference_service("wrong", **predictor))
    broken = deployment("wrong")
    broken["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(Exception, match="unknown field"):
        api.add(broken)
    del broken["spec"]["template"]["spec"]["container"], broken["spec"]["selector"]
    with pytest.raises(Exception, match="Required value"):
        api.add(broken)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"url": "https://user:pw@host"}, "url"),
        ({"url": "http://10.0.0.1:6443"}, "in the clear; valid: https"),
        ({"token_env": "TOKEN"}, "give one"),
        ({"cert_file": "c.pem"}, "belong together"),
        ({"namespace": "../kube-system"}, "namespace"),
        ({"services": {"a": {"name": "a/../b"}}}, "name"),
        ({"pools": {"p": {"node_selector": {"x": "a\nb"}}}}, "node_selector"),
        ({"pools": {"p": {"node_selector": {}}}}, "node_selector"),
        ({"variants": {"a": {"v": {"model_uri": "s3://a/../../etc"}}}}, "refused; valid: as s3://"),
        ({"variants": {"a": {"v": {"requests": {"cpu": "two"}}}}}, "requests"),
        ({"servcies": {}}, "did you mean 'services'?"),
    ],
)
def test_a_wrong_configuration_is_one_clear_error(api: KubeApi, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError) as error:
        target(api, **changes)
    assert why in str(error.value)


# --- faults ------------------------------------------------------------------------------------------------------


def failing(api: KubeApi, method: str, *faults: Fault) -> None:
    """The first requests with this method go wrong, one fault each."""
    left = list(faults)
    api.fault = lambda m, path: left.pop(0) if m == method and left else None


def test_on_a_conflict_the_object_is_read_and_the_change_worked_out_anew(api: KubeApi) -> None:
    def meddle(method: str, path: str) -> Fault | None:
        if method == "PATCH" and len(api.writes) == 1:  # somebody else is a moment faster
            one = json.loads(json.dumps(ranker(api)))
            one["spec"]["template"]["spec"]["containers"][1]["image"] = "registry/ranker:8"
            api.replace(("deployments", "models", "ranker"), one, False, False)
        return None

    api.fault = meddle
    (said,) = target(api).scale([ScaleOrder("ranker", 3, max_batch=4)])
    assert said == "changed ranker: replicas 2 -> 3, MAX_BATCH=4"
    server = ranker(api)["spec"]["template"]["spec"]["containers"][1]
    assert server["image"] == "registry/ranker:8", "the other's change is not lost"
    assert server["env"][0]["value"] == "4"


def test_conflicts_without_end_are_given_up(api: KubeApi) -> None:
    api.fault = lambda method, path: Fault(409) if method == "PATCH" else None
    (refused,) = target(api).scale([ScaleOrder("ranker", 3)])
    assert "somebody else changed it every time, in 5 tries" in str(refused)
    assert len(api.writes) == 5


@pytest.mark.parametrize("status", [500, 503, 429])
def test_what_may_pass_is_tried_again(api: KubeApi, status: int) -> None:
    failing(api, "PATCH", Fault(status), Fault(status))
    assert target(api).scale([ScaleOrder("ranker", 3)]) == ["changed ranker: replicas 2 -> 3"]


def test_retry_after_is_respected_and_longer_than_the_budget_is_an_error_at_once(api: KubeApi) -> None:
    failing(api, "PATCH", Fault(429, retry_after_s=1))
    began = time.monotonic()
    assert target(api).scale([ScaleOrder("ranker", 3)]) == ["changed ranker: replicas 2 -> 3"]
    assert 1.0 <= time.monotonic() - began < 2.5
    failing(api, "PATCH", Fault(429, retry_after_s=60))
    began = time.monotonic()
    (refused,) = target(api).scale([ScaleOrder("ranker", 4)])
    assert "answered 429: injected; it asks to wait 60 s" in str(refused)
    assert time.monotonic() - began < 1.0


def test_a_write_that_was_done_but_not_answered_is_done_once(api: KubeApi) -> None:
    for lost in (Fault(applied=True), Fault(applied=True, silence_s=1.5)):
        wanted = ranker(api)["spec"]["replicas"] + 1
        failing(api, "PATCH", lost)
        (said,) = target(api).scale([ScaleOrder("ranker", wanted)])
        assert said == "ranker is as ordered"
        assert ranker(api)["spec"]["replicas"] == wanted
    generation = ranker(api)["metadata"]["generation"]
    assert generation == 3, "each change was made once"


def test_a_server_that_says_nothing_takes_no_longer_than_the_budget(api: KubeApi) -> None:
    api.fault = lambda method, path: Fault(silence_s=3.0)
    steered = target(api, budget_s=1.5, timeout_s=0.5)
    began = time.monotonic()
    outcomes = steered.scale([ScaleOrder("ranker", 3), ScaleOrder("fraud", 3)])
    assert time.monotonic() - began < 2.0
    assert all("it took too long" in str(one) for one in outcomes)
    with pytest.raises(TargetError, match="it took too long"):
        steered.counts(["ranker"])


def test_a_half_applied_decision_is_completed_by_repeating_it(api: KubeApi) -> None:
    orders = [ScaleOrder("ranker", 3), ScaleOrder("fraud", 2)]
    api.fault = lambda method, path: Fault(500) if "inferenceservices" in path and method == "PATCH" else None
    done, failed = target(api, budget_s=1.0).scale(orders)
    assert done == "changed ranker: replicas 2 -> 3"
    assert "answered 500" in str(failed)
    api.fault = lambda method, path: None
    assert list(target(api).scale(orders)) == ["ranker is as ordered", "changed fraud: replicas 1..3 -> 2"]


def test_what_something_in_the_cluster_overrules_is_an_error(api: KubeApi) -> None:
    def overrule(one: dict[str, Any]) -> None:
        one["spec"]["replicas"] = 2

    api.settle = overrule
    (refused,) = target(api).scale([ScaleOrder("ranker", 3)])
    assert "spec.replicas is not as sent" in str(refused)


def test_a_token_that_is_replaced_is_read_again_and_none_is_ever_shown(api: KubeApi) -> None:
    steered = target(api, budget_s=1.0)
    steered.counts(["ranker"])
    api.tokens = {"the-next-one"}
    with pytest.raises(TargetError) as error:
        steered.counts(["ranker"])
    assert "401" in str(error.value)
    assert TOKEN not in str(error.value)
    later = threading.Timer(0.05, lambda: api.ca_file.with_name("token").write_text("the-next-one"))
    later.start()
    assert steered.counts(["ranker"]) == {"ranker": 2}, "one refusal is waited for a new token"
    api.ca_file.with_name("token").unlink()
    with pytest.raises(TargetError, match="cannot be read: No such file"):
        steered.counts(["ranker"])
    api.ca_file.with_name("token").write_text("two\nlines")
    with pytest.raises(TargetError, match="holds no token"):
        steered.counts(["ranker"])


def test_a_certificate_that_is_not_trusted_is_refused(api: KubeApi, tmp_path: Path) -> None:
    # with time for many tries: it is said at once, after the first
    with pytest.raises(TargetError, match=r"127\.0\.0\.1: .*CERTIFICATE_VERIFY_FAILED"):
        target(api, ca_file=None, timeout_s=60.0, budget_s=600.0).counts(["ranker"])
    with pytest.raises(TargetError, match="certificates cannot be read"):
        target(api, ca_file=str(tmp_path / "none.pem"), timeout_s=60.0, budget_s=600.0).counts(["ranker"])
    assert not api.log


def test_an_answer_that_is_no_kubernetes_object_is_an_error(
    api: KubeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    for odd in (
        [],
        "text",
        {"metadata": {"name": "x"}},
        {"metadata": {"name": 1, "resourceVersion": "1"}, "spec": {}},
    ):
        monkeypatch.setattr(api, "get", lambda key, odd=odd: odd)
        with pytest.raises(TargetError, match="not an object of Kubernetes"):
            target(api).counts(["ranker"])


def test_the_connection_is_kept_and_opened_again_when_the_server_has_closed_it(api: KubeApi) -> None:
    steered = target(api)
    steered.counts(["ranker"])
    connection = steered._api._wire._connection
    assert connection is not None
    steered.counts(["ranker"])
    assert steered._api._wire._connection is connection
    failing(api, "GET", Fault(applied=True))
    assert steered.counts(["ranker"]) == {"ranker": 2}


# --- versions ----------------------------------------------------------------------------------------------------


def version(number: str, artifact: str, service: str = "fraud") -> Version:
    return Version(service=service, version=number, artifact=artifact)


def test_promotion_canary_and_rollback_of_an_inference_service(api: KubeApi) -> None:
    steered = target(api)
    one, two = version("1", "s3://models/fraud/1"), version("2", "s3://models/fraud/2")
    assert steered.running("fraud") is None
    assert steered.deploy("fraud", one) == "version 1: changed fraud: version 1 noted"
    assert steered.running("fraud") == "1"
    steered.canary("fraud", two, 20)
    assert (fraud(api)["canaryTrafficPercent"], fraud(api)["model"]["storageUri"]) == (
        20,
        "s3://models/fraud/2",
    )
    assert steered.running("fraud") == "1", "a canary is not what serves"
    assert "all traffic" in steered.deploy("fraud", two)
    assert "canaryTrafficPercent" not in fraud(api)
    assert steered.running("fraud") == "2"
    writes = len(api.writes)
    assert steered.deploy("fraud", two) == "version 2: fraud is as ordered"
    assert len(api.writes) == writes
    steered.canary("fraud", version("3", "s3://models/fraud/3"), 5)
    steered.deploy("fraud", two)
    assert (fraud(api)["model"]["storageUri"], steered.running("fraud")) == ("s3://models/fraud/2", "2")
    api.replace(
        ("inferenceservices", "models", "fraud"),
        json.loads(json.dumps(api.objects["inferenceservices", "models", "fraud"]).replace("fraud/2", "fraud/9")),
        True, False,
    )  # fmt: skip
    notes = api.objects["inferenceservices", "models", "fraud"]["metadata"]["annotations"]
    notes["pilotage.dev/artifact"] = "s3://models/fraud/2"
    assert steered.running("fraud") is None, "somebody else has put another model there"


def test_a_deployment_gets_the_model_in_a_variable_or_as_an_image(api: KubeApi) -> None:
    steered = target(api)
    steered.deploy("ranker", version("8", "s3://models/ranker/8", "ranker"))
    assert steered.running("ranker") == "8"
    image = target(api, services={"ranker": {"container": "server"}})
    image.deploy("ranker", version("9", "registry.local:5000/team/ranker:9", "ranker"))
    assert (
        ranker(api)["spec"]["template"]["spec"]["containers"][1]["image"]
        == "registry.local:5000/team/ranker:9"
    )
    assert image.running("ranker") == "9"
    with pytest.raises(TargetError, match="serves one version"):
        steered.canary("ranker", version("9", "s3://models/ranker/9", "ranker"), 5)


@pytest.mark.parametrize(
    "artifact", ["", "s3://a/../../b", "s3://a b", "x\ny", "s3://{{env}}", "file:///etc/passwd\x00"]
)
def test_an_artifact_that_is_not_a_uri_is_never_deployed(api: KubeApi, artifact: str) -> None:
    with pytest.raises(TargetError, match="is refused; valid: as s3://"):
        target(api).deploy("fraud", version("2", artifact))
    assert not api.writes


def test_a_version_that_never_becomes_ready_is_an_error(api: KubeApi) -> None:
    ready = {"type": "Ready", "status": "False", "message": "image not found"}

    def controller(one: dict[str, Any]) -> None:
        one["status"] = {"observedGeneration": one["metadata"]["generation"], "conditions": [ready]}

    api.settle = controller
    steered = target(api, ready_within_s=0.5)
    with pytest.raises(TargetError, match=r"not ready within 0.5 s: image not found"):
        steered.deploy("fraud", version("2", "s3://models/fraud/2"))
    ready["status"] = "True"
    assert "model" in steered.deploy("fraud", version("3", "s3://models/fraud/3"))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [("1", "1000m", True), ("1.5", "1500m", True), ("1Gi", "1024Mi", True), ("1G", "1Gi", False), ("1e3", "1k", True),
     ("2E", "2000P", True), ("two", "2", False), ("", "", False), ("1mm", "1", False)],
)  # fmt: skip
def test_quantities_are_compared_as_amounts(a: str, b: str, same: bool) -> None:
    assert (amount(a) is not None and amount(a) == amount(b)) is same


# --- is the stand-in faithful? Real clients against it -------------------------------------------------------------


def test_the_official_client_reads_writes_watches_and_hears_of_conflicts(api: KubeApi) -> None:
    from kubernetes import client, watch

    configuration = client.Configuration(host=api.url, api_key={"authorization": f"Bearer {TOKEN}"})
    configuration.ssl_ca_cert = str(api.ca_file)
    with client.ApiClient(configuration) as connection:
        apps, custom = client.AppsV1Api(connection), client.CustomObjectsApi(connection)
        since = str(api.clock)
        target(api).scale([ScaleOrder("ranker", 3), ScaleOrder("fraud", 2)])
        assert apps.read_namespaced_deployment_scale("ranker", "models").spec.replicas == 3
        seen = next(
            watch.Watch().stream(
                apps.list_namespaced_deployment, "models", resource_version=since, timeout_seconds=5
            )
        )
        assert (seen["type"], seen["object"].spec.replicas) == ("MODIFIED", 3)
        where = ("serving.kserve.io", "v1beta1", "models", "inferenceservices", "fraud")
        one = custom.get_namespaced_custom_object(*where)
        assert one["spec"]["predictor"]["minReplicas"] == 2
        custom.replace_namespaced_custom_object(
            *where, one | {"metadata": one["metadata"] | {"labels": {"a": "b"}}}
        )
        with pytest.raises(client.ApiException) as error:
            custom.replace_namespaced_custom_object(*where, one)
        assert (error.value.status, json.loads(error.value.body)["reason"]) == (409, "Conflict")
        with pytest.raises(client.ApiException) as error:
            apps.patch_namespaced_deployment(
                "ranker", "models", {"spec": {"replica": 1}}, _content_type="application/merge-patch+json"
            )
        assert error.value.status == 422
        with pytest.raises(client.ApiException) as error:
            apps.read_namespaced_deployment("nobody", "models")
        assert error.value.status == 404


def kubectl(
    api: KubeApi, folder: Path, *arguments: str, given: str | None = None
) -> subprocess.CompletedProcess[str]:
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": api.url, "certificate-authority": str(api.ca_file)}}],
        "users": [{"name": "u", "user": {"token": TOKEN}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "models"}}],
    }  # fmt: skip
    (folder / "kubeconfig").write_text(json.dumps(config))
    places = ["--kubeconfig", str(folder / "kubeconfig"), "--cache-dir", str(folder / "cache")]
    return subprocess.run(
        ["kubectl", *places, *arguments],
        input=given, capture_output=True, text=True, timeout=60, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_sees_what_the_target_did_and_the_target_what_kubectl_did(api: KubeApi, folder: Path) -> None:
    steered = target(api)
    steered.scale([ScaleOrder("fraud", 2)])
    shown = kubectl(api, folder, "get", "isvc", "fraud", "-o", "jsonpath={.spec.predictor.minReplicas}")
    assert shown.stdout == "2", shown.stderr
    scaled = kubectl(api, folder, "scale", "deployment", "ranker", "--replicas=6")
    assert scaled.returncode == 0, scaled.stderr
    assert steered.counts(["ranker"]) == {"ranker": 6}
    kubectl(api, folder, "annotate", "isvc", "fraud", "pilotage.dev/paused=true")
    (refused,) = steered.scale([ScaleOrder("fraud", 5)])
    assert isinstance(refused, PausedError)
    applied = kubectl(
        api, folder, "apply", "--validate=false", "-f", "-", given=json.dumps(inference_service("scam"))
    )
    assert applied.returncode == 0, applied.stderr
    assert steered.counts(["fraud", "ranker", "scam"])["fraud"] == 2
    typo = kubectl(
        api, folder, "patch", "deployment", "ranker", "--type=merge", "-p", '{"spec":{"replica":1}}'
    )
    assert typo.returncode != 0
    assert "unknown field" in typo.stderr
