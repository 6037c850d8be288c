"""The Ray Serve target: against a stand-in that fails as we please, and a real Ray Serve (`ray_serve_cases.py`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from experiments.live_loop.rayhead import inside, missing
from pilotage.live.kubernetes import Kubernetes
from pilotage.live.ray_serve import RayServe, RayServeTarget
from pilotage.live.registries import Version
from pilotage.live.targets import DryRun, ScaleOrder, TargetError
from pilotage.world.spec import SpecError, decode

ROOT = Path(__file__).parents[2]


class Dashboard:
    """What a dashboard of Ray 2.60 answers, as seen at a real one; `fault(method)` gives a status to fail with."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, Any]] = []
        self.fault: Callable[[str], int | None] = lambda method: None
        self.forgetful = False  # accepts a declaration and does not act on it
        self.lag = 0  # readings until a declaration is in force
        self._pending: list[Any] = []
        self.applications: dict[str, Any] = {}
        for name, scaler, declared in (
            ("ranking", True, True),
            ("plain", False, True),
            ("adhoc", True, False),
        ):
            config = {
                "name": name, "import_path": "a:b", "external_scaler_enabled": scaler,
                "deployments": [{"name": "Model", "num_replicas": 1, "user_config": {"max_batch": 8, "x": 1}}],
            }  # fmt: skip
            self.applications[name] = self.deployed(config, declared)

    def deployed(self, config: dict[str, Any], declared: bool = True) -> dict[str, Any]:
        deployments = {
            one["name"]: {
                "name": one["name"], "status": "HEALTHY", "message": "", "target_num_replicas": one["num_replicas"],
                "deployment_config": deepcopy(one), "replicas": [],
            }
            for one in config["deployments"]
        }  # fmt: skip
        return {
            "name": config["name"], "deployed_app_config": config if declared else None,
            "external_scaler_enabled": config["external_scaler_enabled"], "deployments": deployments,
        }  # fmt: skip

    @property
    def writes(self) -> list[tuple[str, str, Any]]:
        return [one for one in self.log if one[0] != "GET"]

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        self.log.append((method, path, body))
        status = self.fault(method)
        if status is not None:
            return status, {"error": "injected"}
        if method == "GET":
            if self._pending and sum(one[0] == "GET" for one in self.log[self._pending[0] :]) > self.lag:
                _, self.applications = self._pending
                self._pending = []
            return 200, {"proxy_location": "HeadOnly", "applications": self.applications}
        if method == "PUT":
            if not self.forgetful:
                adhoc = {n: a for n, a in self.applications.items() if a["deployed_app_config"] is None}
                after = adhoc | {c["name"]: self.deployed(c) for c in body["applications"]}
                if self.lag:
                    self._pending = [len(self.log), after]
                else:
                    self.applications = after
            return 200, None
        *_, application, _, deployment, _ = path.split("/")
        found = self.applications.get(application)
        if found is None or deployment not in found["deployments"]:
            return 404, {"error": "Application or Deployment not found"}
        if not found["external_scaler_enabled"]:
            return 412, {"error": "external_scaler_enabled=false"}
        found["deployments"][deployment]["target_num_replicas"] = body["target_num_replicas"]
        return 200, {"message": "Scaling request received."}


def serve(dashboard: Dashboard, port: int = 0) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = dashboard.answer(self.command, self.path, json.loads(body) if body else None)
            payload = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_PUT = do_POST = handle_one  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    found = Dashboard()
    server = serve(found)
    found.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()


def target(dashboard: Dashboard, **changes: Any) -> RayServeTarget:
    config = {
        "kind": "ray-serve", "url": dashboard.url, "budget_s": 2.0, "timeout_s": 1.0,  # type: ignore[attr-defined]
        "services": {
            "ranker": {"application": "ranking", "deployment": "Model"},
            "plain": {"application": "plain", "deployment": "Model"},
            "adhoc": {"application": "adhoc", "deployment": "Model"},
        },
        "variants": {"ranker": {"int8": {"model_uri": "s3://m/int8"}}},
        "pools": {"gpu": {"gpu-node": 0.5}},
    }  # fmt: skip
    return decode(config | changes, RayServe, "target").begin()


def test_counts_are_those_wanted_and_what_does_not_exist_is_unknown(dashboard: Dashboard) -> None:
    assert dict(target(dashboard).counts(["ranker", "plain", "nobody"])) == {"ranker": 1, "plain": 1}
    assert not dashboard.writes


def test_a_count_alone_goes_to_the_scale_endpoint_and_is_not_repeated(dashboard: Dashboard) -> None:
    steered = target(dashboard)
    assert steered.scale([ScaleOrder("ranker", 3)]) == ["scaled ranker: replicas 1 -> 3"]
    assert steered.scale([ScaleOrder("ranker", 3)]) == ["ranker is as ordered"]
    assert dashboard.writes == [
        ("POST", "/api/v1/applications/ranking/deployments/Model/scale", {"target_num_replicas": 3})
    ]


def test_a_declaration_keeps_the_counts_in_force_and_everything_else(dashboard: Dashboard) -> None:
    steered = target(dashboard)
    steered.scale([ScaleOrder("ranker", 5)])
    said = steered.scale([ScaleOrder("plain", 2, max_batch=4)])
    assert said == ["declared plain: replicas 1 -> 2, max_batch -> 4"]
    (_, _, document) = dashboard.writes[-1]
    ranking, plain = document["applications"]
    assert ranking["deployments"][0]["num_replicas"] == 5, "what was declared once is not what is in force"
    assert plain["deployments"][0] == {
        "name": "Model",
        "num_replicas": 2,
        "user_config": {"max_batch": 4, "x": 1},
    }
    assert document["proxy_location"] == "HeadOnly"
    assert steered.counts(["ranker", "plain"]) == {"ranker": 5, "plain": 2}


def test_all_declarations_of_a_tick_are_one_write(dashboard: Dashboard) -> None:
    orders = [ScaleOrder("ranker", 4, max_batch=2, variant="int8", pool="gpu"), ScaleOrder("plain", 3)]
    assert list(target(dashboard).scale(orders)) == [
        "declared ranker: replicas 1 -> 4, max_batch -> 2, model_uri -> s3://m/int8, pool of replicas -> gpu",
        "declared plain: replicas 1 -> 3",
    ]
    ((_, _, document),) = dashboard.writes
    ranker = document["applications"][0]["deployments"][0]
    assert ranker["user_config"] == {"max_batch": 2, "x": 1, "model_uri": "s3://m/int8"}
    assert ranker["ray_actor_options"] == {"resources": {"gpu-node": 0.5}}
    assert list(target(dashboard).scale(orders)) == ["ranker is as ordered", "plain is as ordered"]


def test_a_declaration_is_carried_over_a_moment_after_it_was_accepted(dashboard: Dashboard) -> None:
    dashboard.lag = 2
    steered = target(dashboard, ready_within_s=2.0)
    orders = [ScaleOrder("ranker", 2, max_batch=2), ScaleOrder("plain", 2)]
    assert list(steered.scale(orders)) == [
        "declared ranker: replicas 1 -> 2, max_batch -> 2",
        "declared plain: replicas 1 -> 2",
    ]
    assert steered.deploy("ranker", Version(service="ranker", version="7", artifact="a")).endswith("was told")
    assert steered.running("ranker") == "7", "healthy, but with what it was before, is not ready"


@pytest.mark.parametrize(
    ("order", "why"),
    [
        (ScaleOrder("ranker", 10_000), "10000 is refused; valid: 0 to 1000"),
        (ScaleOrder("ranker", 1, max_batch=5000), "5000 is refused"),
        (ScaleOrder("ranker", 1, variant="int7"), "did you mean 'int8'?"),
        (
            ScaleOrder("ranker", 1, pool="moon"),
            "pool 'moon' has not been configured; did you mean|valid: gpu",
        ),
        (ScaleOrder("nobody/../x", 2), "Ray Serve has no nobody/../x/nobody/../x; it has: ranking/Model"),
        (ScaleOrder("adhoc", 1, max_batch=2), "was not declared but run by a program"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused_and_stops_no_other(
    dashboard: Dashboard, order: ScaleOrder, why: str
) -> None:
    refused, done = target(dashboard).scale([order, ScaleOrder("adhoc", 2)])
    assert isinstance(refused, TargetError)
    assert any(part in str(refused) for part in why.split("|"))
    assert done == "scaled adhoc: replicas 1 -> 2"
    assert len(dashboard.writes) == 1


def test_what_scales_itself_is_not_fought(dashboard: Dashboard) -> None:
    settings = dashboard.applications["plain"]["deployments"]["Model"]["deployment_config"]
    settings["autoscaling_config"] = {"min_replicas": 1}
    (refused,) = target(dashboard).scale([ScaleOrder("plain", 3)])
    assert "Ray Serve scales it by itself" in str(refused)
    assert not dashboard.writes


def test_a_declaration_that_is_not_acted_upon_is_an_error(dashboard: Dashboard) -> None:
    dashboard.forgetful = True
    refused, done = target(dashboard).scale([ScaleOrder("plain", 3, max_batch=2), ScaleOrder("ranker", 2)])
    assert str(refused) == "plain: declared, but not in force: max_batch, replicas"
    assert done == "scaled ranker: replicas 1 -> 2"


@pytest.mark.parametrize("method", ["GET", "PUT", "POST"])
def test_what_may_pass_is_tried_again(dashboard: Dashboard, method: str) -> None:
    left = [503, 500]
    dashboard.fault = lambda m: left.pop() if m == method and left else None
    outcomes = target(dashboard).scale([ScaleOrder("ranker", 2), ScaleOrder("plain", 2)])
    assert list(outcomes) == ["scaled ranker: replicas 1 -> 2", "declared plain: replicas 1 -> 2"]


def test_errors_that_stay_are_outcomes_within_the_budget(dashboard: Dashboard) -> None:
    dashboard.fault = lambda m: 503 if m == "PUT" else None
    began = time.monotonic()
    done, refused = target(dashboard).scale([ScaleOrder("ranker", 2), ScaleOrder("plain", 2)])
    assert time.monotonic() - began < 3.0
    assert done == "scaled ranker: replicas 1 -> 2"
    assert "PUT /api/serve/applications/: answered 503" in str(refused)
    dashboard.fault = lambda m: 412 if m == "POST" else None
    (refused,) = target(dashboard).scale([ScaleOrder("ranker", 3)])
    assert str(refused) == "ranker: scaling was refused: answered 412: injected"


def test_a_dashboard_that_restarts_is_waited_for(dashboard: Dashboard) -> None:
    first = serve(dashboard)
    steered = target(dashboard, url=f"http://127.0.0.1:{first.server_port}", budget_s=5.0)
    assert steered.counts(["ranker"]) == {"ranker": 1}
    first.shutdown()
    first.server_close()
    later = threading.Timer(1.0, lambda: seconds.append(serve(dashboard, first.server_port)))
    seconds: list[ThreadingHTTPServer] = []
    later.start()
    assert steered.scale([ScaleOrder("ranker", 2)]) == ["scaled ranker: replicas 1 -> 2"]
    seconds[0].shutdown()
    seconds[0].server_close()
    with pytest.raises(TargetError, match="no answer"):
        target(dashboard, url=f"http://127.0.0.1:{first.server_port}", budget_s=0.5).counts(["ranker"])


def test_versions_are_told_to_the_replicas(dashboard: Dashboard) -> None:
    steered = target(dashboard)
    assert steered.running("ranker") is None
    version = Version(service="ranker", version="7", artifact="s3://m/7")
    assert steered.deploy("ranker", version) == "version 7: ranker was told"
    assert steered.running("ranker") == "7"
    assert steered.deploy("ranker", version) == "version 7: ranker is as ordered"
    assert len(dashboard.writes) == 1
    dashboard.applications["ranking"]["deployments"]["Model"]["status"] = "UNHEALTHY"
    with pytest.raises(TargetError, match="not healthy within 1 s: UNHEALTHY"):
        target(dashboard, ready_within_s=1.0).deploy("ranker", version)


def test_a_wrong_configuration_is_one_clear_error(dashboard: Dashboard) -> None:
    with pytest.raises(SpecError, match="did you mean 'services'"):
        target(dashboard, service={})
    with pytest.raises(SpecError, match="application"):
        target(dashboard, services={"a": {"application": "x\ny", "deployment": "d"}})
    with pytest.raises(SpecError, match=r"pool 'p': 'CPU' is not a custom resource"):
        target(dashboard, pools={"p": {"CPU": 1.0}})


def test_a_dry_run_says_what_would_change_and_remembers_it() -> None:
    dry = decode({"kind": "dry-run", "replicas": {"ranker": 3}}, DryRun, "target").begin()
    assert dry.counts(["ranker", "other"]) == {"ranker": 3}
    orders = [
        ScaleOrder("ranker", 5, max_batch=8),
        ScaleOrder("other", 2, pool="gpu"),
        ScaleOrder("other", -2),
    ]
    *said, refused = dry.scale(orders)
    assert said == [
        "would change ranker: replicas 3 -> 5, max_batch unknown -> 8",
        "would change other: replicas unknown -> 2, pool unknown -> gpu",
    ]
    assert "valid: 0 to 1000" in str(refused)
    assert dry.scale(orders[:1]) == ["ranker is as ordered"]
    assert dry.counts(["ranker", "other"]) == {"ranker": 5, "other": 2}


def test_the_tables_of_the_guide_are_valid() -> None:
    text = (ROOT / "docs" / "targets.md").read_text()
    tables = [
        tomllib.loads(block)["target"] for block in re.findall(r"^```toml\n(.*?)^```", text, re.M | re.S)
    ]
    kinds = {"kubernetes": Kubernetes, "ray-serve": RayServe}
    assert [decode(table, kinds[table["kind"]], "guide").begin() is not None for table in tables] == [
        True,
        True,
    ]


def test_targets_load_no_heavy_client() -> None:
    heavy = "kubernetes", "ray", "requests", "mlflow", "numba", "torch", "gymnasium"
    program = (
        "import sys, pilotage.live.kubernetes, pilotage.live.ray_serve\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.full
def test_against_a_real_ray_serve(tmp_path: Path) -> None:
    why = missing()
    if why is not None:
        pytest.skip(why)
    done = subprocess.run(
        inside([sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/live/ray_serve_cases.py"]),
        cwd=ROOT, capture_output=True, text=True, timeout=580, env=os.environ | {"PILOTAGE_INSIDE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
