"""What steering says of itself: structured logs, `/metrics` and `/healthz`."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, TextIO

from pilotage import __version__
from pilotage.live.secrets import without_secrets
from pilotage.world.spec import SpecError

_BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONGEST: Final = 2000


class Log:
    """One JSON object per line. Whatever stands in a value stays in its string, and secrets are withheld."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out, self._lock = out or sys.stderr, threading.Lock()

    def __call__(self, event: str, /, level: str = "info", **fields: Any) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        known = {name: value for name, value in fields.items() if value is not None}
        line = json.dumps({"at": at, "level": level, "event": event, **_plain(without_secrets(known))})
        with self._lock:
            try:
                self._out.write(line + "\n")
                self._out.flush()
            except (OSError, ValueError):
                pass  # nobody reads it: that is no reason to stop


def _plain(value: Any) -> Any:
    """A value as it may stand in a line: short, and a number or null where JSON knows no NaN."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value[:_LONGEST] if isinstance(value, str) else value


class Status:
    """The state of steering as it is served: written by the loop, read by scrapes."""

    def __init__(self, mode: str, healthy_within_s: float) -> None:
        self.mode, self._within_s = mode, healthy_within_s
        self.ticks = 0
        self.buckets, self.seconds = [0] * (len(_BOUNDS_S) + 1), 0.0
        self.errors: Counter[str] = Counter()
        self.interventions: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.usd: dict[str, float] = {"actual": 0.0, "wanted": 0.0}
        self.replicas: dict[str, tuple[float, float]] = {}
        self.waiting = 0
        self.stopped = False
        self._last_s: float | None = None
        self._began_s = time.monotonic()

    def ticked(self, seconds: float) -> None:
        self.ticks += 1
        self.seconds += seconds
        self.buckets[sum(seconds > bound for bound in _BOUNDS_S)] += 1
        self._last_s = time.monotonic()

    def health(self) -> dict[str, Any]:
        """Whether the loop is alive: it has finished a tick lately, or has only begun."""
        since_s = time.monotonic() - (self._began_s if self._last_s is None else self._last_s)
        return {
            "ok": since_s <= self._within_s and not self.stopped,
            "mode": self.mode,
            "ticks": self.ticks,
            "last_tick_s_ago": None if self._last_s is None else round(since_s, 1),
            "ledger_waiting": self.waiting,
        }

    def collect(self) -> Iterator[Any]:
        """The metrics, for prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        yield GaugeMetricFamily("pilotage_steer_up", "Whether the loop is alive.", value=self.health()["ok"])
        about = GaugeMetricFamily("pilotage_steer_info", "Version and mode.", labels=["version", "mode"])
        about.add_metric([__version__, self.mode], 1)
        yield about
        spans = HistogramMetricFamily("pilotage_steer_tick_seconds", "Time from reading to recording.")
        so_far, buckets = 0, []
        for bound, count in zip([*map(str, _BOUNDS_S), "+Inf"], list(self.buckets), strict=True):
            so_far += count
            buckets.append((bound, float(so_far)))
        spans.add_metric([], buckets, self.seconds)
        yield spans
        for name, text, label, counts in (
            ("errors", "Faults of a part of the loop.", "part", self.errors),
            ("interventions", "Decisions that the guard changed or held.", "why", self.interventions),
            ("entries", "Decisions by what came of them.", "outcome", self.outcomes),
            ("usd", "Dollars of replicas, as they are and as they were wanted.", "of", self.usd),
        ):
            family = CounterMetricFamily(f"pilotage_steer_{name}", text, labels=[label])
            for key, count in _copied(counts).items():
                family.add_metric([key], count)
            yield family
        replicas = GaugeMetricFamily(
            "pilotage_steer_replicas", "Replicas ordered now, and wanted.", labels=["service", "of"]
        )
        for service, (now, wanted) in _copied(self.replicas).items():
            replicas.add_metric([service, "actual"], now)
            replicas.add_metric([service, "wanted"], wanted)
        yield replicas
        yield GaugeMetricFamily(
            "pilotage_steer_ledger_waiting", "Entries that the ledger could not take yet.", value=self.waiting
        )


def _copied(counts: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of what another thread may be changing."""
    while True:
        try:
            return dict(counts)
        except RuntimeError:
            continue


def serve(status: Status, listen: str) -> ThreadingHTTPServer:
    """Serves `/metrics` and `/healthz` at host:port until it is shut down."""
    host, colon, port = listen.rpartition(":")
    if not (colon and port.isdecimal() and int(port) < 1 << 16):
        raise SpecError(f"listen {listen!r}: valid: HOST:PORT, as 127.0.0.1:9465")
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError:
        raise SpecError("listen needs prometheus_client: pip install 'pilotage[live]'") from None
    registry = CollectorRegistry()
    registry.register(status)

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # of a client that does not ask

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._send(200, "text/plain; version=0.0.4; charset=utf-8", generate_latest(registry))
            elif self.path == "/healthz":
                health = status.health()
                self._send(200 if health["ok"] else 503, "application/json", json.dumps(health).encode())
            else:
                self._send(404, "text/plain", b"valid: /metrics, /healthz\n")

        def _send(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None: ...  # a client that goes away is not our fault

    try:
        server = Server((host.strip("[]") or "127.0.0.1", int(port)), Handler)
    except OSError as error:
        raise SpecError(f"listen {listen!r}: cannot be opened: {error.strerror}") from None
    threading.Thread(target=server.serve_forever, name="status", daemon=True).start()
    return server
