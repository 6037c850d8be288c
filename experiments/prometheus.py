"""A real Prometheus on loopback, for the experiments that ask one.

`prometheus` and `promtool` are looked for in the folder PILOTAGE_PROMETHEUS, then on the path. A server listens at a
port that is free, says in `prometheus.log` what it does, and ends with its block.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_START_S: Final = 120.0  # within which a server is ready, on a crowded machine


def program(name: str) -> str | None:
    folders = (os.environ.get("PILOTAGE_PROMETHEUS"), os.environ.get("PATH"))
    return shutil.which(name, path=os.pathsep.join(filter(None, folders)))


def missing() -> str | None:
    """Why there can be no server here, if so."""
    if program("prometheus") and program("promtool"):
        return None
    return (
        "no prometheus and promtool on the path, nor in the folder PILOTAGE_PROMETHEUS; "
        "in Debian: apt-get install prometheus"
    )


def remember(history: str, home: Path, *options: str) -> None:
    """Writes a history (OpenMetrics) into the blocks in `home`; `options` are those of promtool."""
    with tempfile.NamedTemporaryFile("w", dir=home, suffix=".om") as text:
        text.write(history)
        text.flush()
        blocks_of(Path(text.name), home, *options)


def blocks_of(history: Path, home: Path, *options: str) -> None:
    """Does so with a history that stands in a file."""
    command = [str(program("promtool")), "tsdb", "create-blocks-from", "openmetrics", *options, str(history)]
    subprocess.run([*command, str(home / "data")], check=True, capture_output=True)


@contextmanager
def serving(home: Path, config: dict[str, Any] | None = None) -> Iterator[str]:
    """The URL of a server on the blocks in `home`; what it scrapes stands in `config` (None: nothing)."""
    (home / "prometheus.yml").write_text(json.dumps(config or {}))  # JSON is YAML
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with (home / "prometheus.log").open("wb") as log:
        server = subprocess.Popen(
            [str(program("prometheus")), f"--config.file={home / 'prometheus.yml'}",
             f"--storage.tsdb.path={home / 'data'}", "--storage.tsdb.retention.time=100y",
             f"--web.listen-address={url.removeprefix('http://')}"],
            stdout=log, stderr=log, process_group=0,
        )  # fmt: skip
    try:
        end = time.monotonic() + _START_S
        while True:
            try:
                urllib.request.urlopen(f"{url}/-/ready", timeout=1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > end:
                    said = (home / "prometheus.log").read_text(errors="replace")[-1000:]
                    raise SystemExit(f"error: Prometheus does not start: {said}") from None
                time.sleep(0.05)
        yield url
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
