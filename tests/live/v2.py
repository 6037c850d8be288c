"""A small server of the KServe V2 protocol: a replica that sleeps as its law says, and misbehaves on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Replica:
    """What a server does: `base_s + per_row_s * rows` a batch, one at a time; counters of what it was asked."""

    def __init__(self, base_s: float = 0.004, per_row_s: float = 0.002, **knobs: Any) -> None:
        self.base_s, self.per_row_s = base_s, per_row_s
        self.cold_batches: int = knobs.get("cold_batches", 0)  # so many first batches take ten times as long
        self.never_rests: bool = knobs.get("never_rests", False)  # each batch takes longer than the last
        self.fail_every: int = knobs.get("fail_every", 0)
        self.throttle_every: int = knobs.get("throttle_every", 0)
        self.stall: tuple[int, float] | None = knobs.get("stall")  # at which batch, for how long
        self.repository: bool = knobs.get("repository", True)
        self.load_s: float = knobs.get("load_s", 0.05)
        self.rows: int = knobs.get("rows", -1)
        self.asked, self.ready_at = 0, 0.0
        self._one = threading.Lock()

    def infer(self, rows: int) -> int:
        """Serves a batch; the HTTP status."""
        with self._one:
            self.asked += 1
            if self.fail_every and self.asked % self.fail_every == 0:
                return 500
            if self.throttle_every and self.asked % self.throttle_every == 0:
                return 429
            took = self.base_s + self.per_row_s * rows
            if self.asked <= self.cold_batches:
                took *= 10
            if self.never_rests:
                took *= 1.02**self.asked
            if self.stall and self.asked == self.stall[0]:
                took += self.stall[1]
            time.sleep(took)
            return 200


@contextmanager
def serving(replica: Replica) -> Iterator[str]:
    """The URL of a server of that replica."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self, status: int, body: Any = None) -> None:
            text = json.dumps(body if body is not None else {}).encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0.01")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            if self.path == "/v2/models/m":
                inputs = [{"name": "x", "datatype": "FP32", "shape": [replica.rows, 4]}]
                self.answer(200, {"name": "m", "inputs": inputs, "outputs": []})
            elif self.path == "/v2/models/m/ready":
                self.answer(200 if time.monotonic() >= replica.ready_at else 503)
            else:
                self.answer(404, {"error": "no such model"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/v2/models/m/infer":
                self.answer(replica.infer(body["inputs"][0]["shape"][0]), {"outputs": []})
            elif self.path.startswith("/v2/repository/models/m/") and replica.repository:
                if self.path.endswith("/load"):
                    replica.ready_at = time.monotonic() + replica.load_s
                self.answer(200)
            else:
                self.answer(404)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v2/models/m"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
