"""A real Prometheus that has a history: OpenMetrics text is written into blocks by promtool, then served."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def program(name: str) -> str | None:
    """Where `prometheus` or `promtool` is: in the folder PILOTAGE_PROMETHEUS, or on the path."""
    folder = os.environ.get("PILOTAGE_PROMETHEUS")
    return shutil.which(name, path=folder) if folder else shutil.which(name)


@contextmanager
def remembering(text: str, folder: Path) -> Iterator[str]:
    """The URL of a Prometheus with that history."""
    prometheus, promtool = program("prometheus"), program("promtool")
    assert prometheus
    assert promtool
    (folder / "history.om").write_text(text)
    (folder / "prometheus.yml").write_text("global: {scrape_interval: 1h}\n")
    subprocess.run(
        [promtool, "tsdb", "create-blocks-from", "openmetrics", str(folder / "history.om"), str(folder / "data")],
        check=True, capture_output=True,
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        prometheus, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.retention.time=100y",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"{url}/-/ready", timeout=1).close()
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError((folder / "log").read_text()[-2000:]) from None
                    time.sleep(0.05)
            yield url
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(20)
