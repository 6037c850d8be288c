"""A real Prometheus on loopback, and a stand-in for one that misbehaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

import pytest

from tests.live.conftest import free_port


def program(name: str) -> str | None:
    """Where `prometheus` or `promtool` is: in the folder PILOTAGE_PROMETHEUS, or on the path."""
    folder = os.environ.get("PILOTAGE_PROMETHEUS")
    return shutil.which(name, path=folder) if folder else shutil.which(name)


PROMETHEUS, PROMTOOL = program("prometheus"), program("promtool")
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None or PROMTOOL is None,
    reason="prometheus and promtool are not installed: apt install prometheus",
)


@contextmanager
def serving(handle: Callable[[BaseHTTPRequestHandler, str], None]) -> Iterator[str]:
    """The URL of a server on loopback whose every request is handled by `handle(handler, body)`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            try:
                handle(self, body)
            except OSError:  # the client did not wait
                self.close_connection = True

        do_GET = do_POST = do_PUT = one  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None: ...

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, kind: str = "application/json") -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def found(*samples: tuple[str, str, float | str], now_s: float = 1e9) -> bytes:
    """The answer to the question for everything: (feature, service, value) each, and the server's time."""
    result: list[dict[str, Any]] = [{"metric": {"asked": "now"}, "value": [now_s, str(now_s)]}]
    for asked, service, value in samples:
        result.append({"metric": {"asked": asked, "service": service}, "value": [now_s, str(value)]})
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()


def query_of(body: str) -> str:
    return parse_qs(body).get("query", [""])[0]


class Prometheus:
    """A real server in a folder, that scrapes given addresses every second."""

    def __init__(self, folder: Path, targets: list[str], history: str = "") -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
            f"scrape_configs: [{{job_name: fleet, static_configs: [{{targets: {json.dumps(targets)}}}]}}]\n"
        )
        if history:
            (folder / "history.om").write_text(history)
            made = [str(PROMTOOL), "tsdb", "create-blocks-from", "openmetrics", "history.om", "data"]
            subprocess.run(made, cwd=folder, check=True, capture_output=True)

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    str(PROMETHEUS), "--config.file=prometheus.yml", "--storage.tsdb.path=data",
                    "--storage.tsdb.retention.time=100y", f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=log, stderr=log, cwd=self.folder, process_group=0,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=1).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self.folder / "server.log").read_text()[-2000:]) from None
                time.sleep(0.05)

    def wait_for(self, query: str) -> None:
        """Waits until a query finds something."""
        url = f"{self.url}/api/v1/query?{urlencode({'query': query})}"
        deadline = time.monotonic() + 60
        while True:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if json.load(answer)["data"]["result"]:
                    return
            assert time.monotonic() < deadline, query
            time.sleep(0.1)

    def stop(self) -> None:
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


@contextmanager
def remembering(text: str, folder: Path) -> Iterator[str]:
    """The URL of a Prometheus with that history (OpenMetrics), which promtool has written into its blocks."""
    server = Prometheus(folder, [], text)
    server.start()
    try:
        yield server.url
    finally:
        server.stop()
