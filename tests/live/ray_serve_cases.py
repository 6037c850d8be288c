"""A real Ray Serve, steered. `test_ray_serve.py` runs this in namespaces of its own, where nobody else reaches Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.live_loop.rayhead import (
    SERVE,
    asked,
    declare,
    loopback_up,
    ray_head,
    running,
    settled,
    state,
    wait_for,
)
from pilotage.live.ray_serve import RayServe, ServeDeployment
from pilotage.live.registries import Version
from pilotage.live.targets import ScaleOrder

PLACES = {n: ServeDeployment(application=n, deployment="Model") for n in ("scaled", "plain", "automatic")}


def application(name: str, **settings: Any) -> dict[str, Any]:
    deployment = {
        "name": "Model",
        "max_ongoing_requests": 16,
        "user_config": {"max_batch": 4, "batch_wait_s": 0.01},
    }
    return {
        "name": name, "route_prefix": f"/{name}", "import_path": "serve_app:build",
        "external_scaler_enabled": name == "scaled",
        "args": {"name": "Model", "start_s": 0.2, "base_s": 0.01, "per_item_s": 0.001},
        "deployments": [deployment | settings],
    }  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    assert os.environ.get("PILOTAGE_INSIDE"), "only in a namespace of its own"
    loopback_up()
    with (
        tempfile.TemporaryDirectory(prefix="rs", ignore_cleanup_errors=True) as folder,
        ray_head(Path(folder)) as url,
    ):
        declare(
            url, application("scaled", num_replicas=1), application("plain", num_replicas=1),
            application("automatic", autoscaling_config={"min_replicas": 1, "max_replicas": 2}),
        )  # fmt: skip
        yield url


def replicas(url: str, name: str) -> set[str]:
    return {r["replica_id"] for r in state(url, name)["Model"]["replicas"] if r["state"] == "RUNNING"}


def answer(name: str) -> dict[str, Any]:
    return asked(f"http://127.0.0.1:{SERVE}/{name}")


def test_scaling_batching_and_versions(url: str) -> None:
    target = RayServe(url=url, services=PLACES).begin()
    assert dict(target.counts([*PLACES, "nobody"])) == {"scaled": 1, "plain": 1, "automatic": 1}

    # the scale endpoint
    assert target.scale([ScaleOrder("scaled", 2)]) == ["scaled scaled: replicas 1 -> 2"]
    assert target.counts(["scaled"]) == {"scaled": 2}
    assert target.scale([ScaleOrder("scaled", 2)]) == ["scaled is as ordered"]
    wait_for("the second replica", lambda: running(state(url, "scaled")["Model"]) == 2)

    # batching and a declared count, without a restart, and without undoing what was scaled
    before = replicas(url, "scaled")
    said = target.scale([ScaleOrder("scaled", 2, max_batch=2), ScaleOrder("plain", 2)])
    assert list(said) == ["declared scaled: max_batch -> 2", "declared plain: replicas 1 -> 2"]
    wait_for("the declaration", lambda: settled(url, ["scaled", "plain"]))
    assert replicas(url, "scaled") == before, "a batch limit replaces no replica, and the count is kept"
    assert state(url, "scaled")["Model"]["deployment_config"]["user_config"]["max_batch"] == 2
    assert running(state(url, "plain")["Model"]) == 2

    # a version
    version = Version(service="scaled", version="7", artifact="s3://models/7")
    waits = RayServe(url=url, services=PLACES, ready_within_s=60.0).begin()
    assert waits.deploy("scaled", version) == "version 7: scaled was told"
    assert waits.running("scaled") == "7"
    assert answer("scaled")["model"] == "s3://models/7"
    assert replicas(url, "scaled") == before

    # what Ray scales by itself is left to it
    (refused,) = target.scale([ScaleOrder("automatic", 2)])
    assert "Ray Serve scales it by itself" in str(refused)


def test_a_deployment_that_does_not_exist_is_said(url: str) -> None:
    wrong = {"nobody": ServeDeployment(application="scaled", deployment="Mod/el?x=1")}
    (refused,) = RayServe(url=url, services=wrong).begin().scale([ScaleOrder("nobody", 2)])
    assert "Ray Serve has no scaled/Mod/el?x=1; it has: " in str(refused)


def test_the_dashboard_may_restart(url: str) -> None:
    target = RayServe(url=url, services=PLACES, timeout_s=10.0, budget_s=90.0).begin()
    assert target.counts(["scaled"]) == {"scaled": 2}
    (process,) = [
        entry for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and b"/dashboard/dashboard.py" in (entry / "cmdline").read_bytes()
    ]  # fmt: skip
    command = (process / "cmdline").read_bytes().split(b"\0")[:-1]
    environment = dict(e.split(b"=", 1) for e in (process / "environ").read_bytes().split(b"\0") if b"=" in e)
    os.kill(int(process.name), signal.SIGKILL)
    time.sleep(0.5)
    assert answer("scaled")["batch"] >= 1, "what serves goes on"
    subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (said,) = target.scale([ScaleOrder("scaled", 1)])
    assert said == "scaled scaled: replicas 2 -> 1"
    wait_for("one replica", lambda: running(state(url, "scaled")["Model"]) == 1)
