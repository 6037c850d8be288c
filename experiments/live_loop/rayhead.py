"""A real Ray head with Serve, inside a network and process namespace of its own.

Ray listens beyond loopback whatever it is told, and anyone who reaches it runs code: so it runs only where nobody can.
`inside(command)` gives the command that does that; everything in it ends with it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RAY = Path(os.environ.get("PILOTAGE_RAY", HERE.parents[1] / ".ray")).absolute()
DASHBOARD, SERVE, METRICS = 8266, 8155, 8099


def missing() -> str | None:
    """Why Ray Serve cannot run here, if so."""
    if not (RAY / "bin" / "ray").exists():
        return f"no ray[serve] in {RAY.name}; `make demo-live` installs it"
    if subprocess.run([*inside(["true"])], capture_output=True).returncode:
        return "no network namespace is allowed here, and Ray must not listen on a real network"
    return None


def inside(command: Sequence[str]) -> list[str]:
    """The command in namespaces of its own."""
    unshare = [
        shutil.which("unshare") or "unshare",
        "--net",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
    ]
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return [*unshare, *user, *command]


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        name = b"lo".ljust(16, b"\0")
        flags = struct.unpack("16sh", fcntl.ioctl(control, 0x8913, name + b"\0" * 16)[:18])[1]  # SIOCGIFFLAGS
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", name, flags | 1))  # SIOCSIFFLAGS, IFF_UP


def asked(url: str, method: str = "GET", body: Any = None) -> Any:
    """The JSON of an answer, or an OSError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read()
    return json.loads(text) if text.strip().startswith((b"{", b"[")) else text


def wait_for(what: str, done: Callable[[], bool], within_s: float = 180.0) -> None:
    end, why = time.monotonic() + within_s, ""
    while True:
        try:
            if done():
                return
        except OSError as error:
            why = f": {error} " + (
                error.read().decode(errors="replace")[:500] if hasattr(error, "read") else ""
            )
        if time.monotonic() > end:
            raise SystemExit(f"error: {what} did not come about within {within_s:g} s{why}")
        time.sleep(0.2)


@contextmanager
def ray_head(folder: Path, cpus: int = 2) -> Iterator[str]:
    """The URL of the dashboard of a Ray head whose Serve proxy listens at SERVE, its metrics at METRICS (every 1 s)."""
    environment = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(HERE),
        "RAY_metrics_report_interval_ms": "1000", "RAY_worker_niceness": "0",  # not behind what else runs here
        "RAY_SERVE_REQUEST_LATENCY_BUCKETS_MS": "20,40,60,80,100,120,140,160,180,200,230,260,300,350,400,450,500,600,"
        "700,800,1000,1300,1600,2000,3000,4000,6000,8000,12000,20000",
    }  # fmt: skip
    with (folder / "ray.log").open("wb") as log:
        subprocess.run(
            [RAY / "bin" / "ray", "start", "--head", "--port=6399", f"--num-cpus={cpus}", "--disable-usage-stats",
             "--dashboard-host=127.0.0.1", f"--dashboard-port={DASHBOARD}", f"--metrics-export-port={METRICS}",
             "--object-store-memory=80000000", f"--temp-dir={folder / 't'}"],
            check=True, stdout=log, stderr=log, env=environment,
        )  # fmt: skip
    yield f"http://127.0.0.1:{DASHBOARD}"  # it ends with the namespace


def declare(url: str, *applications: dict[str, Any]) -> None:
    """Deploys applications and waits until all of their deployments are healthy."""
    document = {
        "proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": SERVE},
        "applications": applications,
    }  # fmt: skip
    wait_for("Ray's dashboard", lambda: asked(f"{url}/api/serve/applications/", "PUT", document) is not None)
    wait_for("the application", lambda: settled(url, [one["name"] for one in applications]))


def state(url: str, application: str) -> dict[str, Any]:
    """The deployments of an application, by name."""
    return asked(f"{url}/api/serve/applications/")["applications"][application]["deployments"]


def running(deployment: dict[str, Any]) -> int:
    return sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])


def settled(url: str, applications: Sequence[str]) -> bool:
    found = asked(f"{url}/api/serve/applications/")["applications"]
    deployments = [
        d for name in applications for d in (found.get(name) or {}).get("deployments", {}).values()
    ]
    return bool(deployments) and all(
        d["status"] == "HEALTHY" and running(d) == d["target_num_replicas"] for d in deployments
    )
