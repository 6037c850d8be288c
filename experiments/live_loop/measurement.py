"""What happens: a service on Ray Serve, the machine's own share of its times, the load, and steering."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from prediction import DRAIN_S
from rayhead import SERVE, running, state, wait_for

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "fidelity" / "ray_serve"))
from measure import Connections  # noqa: E402  (the load generator of that experiment)

SERVICE = "ranker"
POLICY = "learned"
START_S = 1.0  # what the constructor of a replica takes, besides the process itself
ALONE = 40  # requests one at a time
GAP_S = 0.0006  # between two batches of a replica (reference: Ray Serve's semantics, section 2)
# A scrape of Ray takes a third of a second of a core, and on a busy machine more than a second; a rate needs four.
SCRAPE_S, WINDOW_S = 2.0, 8.0
# The busiest seconds, as nearly as scrapes can tell: what the shipped mapping asks for is smoothed over four of them.
PEAK = "max_over_time(sum(rate(ray_serve_num_router_requests_total{deployment='$service'}[4s]))[$window:2s])"


# --- the load ----------------------------------------------------------------------------------------------------


async def generate(arrivals_s: Sequence[float], zero: float) -> list[tuple[float, float | None, Any]]:
    """Sends the open loop; when each request was sent and answered, after `zero`, and the answer."""
    connections = Connections(SERVE)
    under_way, sent_s = [], []
    for at in arrivals_s:
        delay = zero + at - time.monotonic()
        if delay > 0:
            await asyncio.sleep(delay)
        sent_s.append(time.monotonic())
        under_way.append(asyncio.create_task(connections.get()))
    if under_way:
        await asyncio.wait(under_way, timeout=DRAIN_S)
    out = []
    for task, sent in zip(under_way, sent_s, strict=True):
        _, done, answer = task.result() if task.done() else (sent, None, None)
        out.append((sent - zero, None if done is None or answer is None else done - zero, answer))
    return out


def one_at_a_time(count: int) -> list[tuple[float, float, Any]]:
    async def ask() -> list[tuple[float, float, Any]]:
        connections = Connections(SERVE)
        for _ in range(10):
            await connections.get()
        return [await connections.get() for _ in range(count)]

    return [one for one in asyncio.run(ask()) if one[2] is not None]


class Watch:
    """Replicas of the deployment, a few times a second: (time, existing, running)."""

    def __init__(self, url: str) -> None:
        self._url, self._stop = url, threading.Event()
        self.seen: list[tuple[float, int, int]] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            try:
                replicas = state(self._url, SERVICE)[SERVICE]["replicas"]
            except (OSError, KeyError):
                continue
            ready = sum(one["state"] == "RUNNING" for one in replicas)
            self.seen.append((time.monotonic(), len(replicas), ready))

    def stop(self) -> list[tuple[float, int, int]]:
        self._stop.set()
        self._thread.join(5)
        return self.seen


# --- what is deployed ----------------------------------------------------------------------------------------------


def application(spec: Any, autoscaling: dict[str, Any] | None = None) -> dict[str, Any]:
    """The service of a scenario as an application of Ray, scaled from outside, or by Ray's autoscaler."""
    from pilotage.world.servers import Affine

    service = spec.services[0]
    law = service.variants[0].latency[service.pools[0]]
    assert isinstance(law, Affine)
    deployment: dict[str, Any] = {
        "name": SERVICE, "max_ongoing_requests": service.server.router.max_ongoing_requests,
        "user_config": {"max_batch": service.server.max_batch, "batch_wait_s": service.server.batch_wait_ms / 1e3},
    }  # fmt: skip
    if autoscaling is None:
        deployment["num_replicas"] = service.initial_replicas
    else:
        bounds = {
            "min_replicas": service.min_replicas, "max_replicas": service.max_replicas,
            "initial_replicas": service.initial_replicas,
        }  # fmt: skip
        deployment["autoscaling_config"] = bounds | autoscaling
    return {
        "name": SERVICE, "route_prefix": "/", "import_path": "serve_app:build",
        "external_scaler_enabled": autoscaling is None, "deployments": [deployment],
        "args": {
            "name": SERVICE, "start_s": START_S, "base_s": law.base_ms / 1e3, "per_item_s": law.per_item_ms / 1e3,
        },
    }  # fmt: skip


def scaled_to(target: Any, replicas: int) -> None:
    from pilotage.live.targets import ScaleOrder

    (said,) = target.scale([ScaleOrder(SERVICE, replicas)])
    if isinstance(said, Exception):
        raise SystemExit(f"error: {said}")


def calibrated(spec: Any, url: str) -> tuple[Any, dict[str, Any]]:
    """The scenario with what this machine adds, from requests one at a time and from starting two replicas."""
    import msgspec

    from pilotage.live.ray_serve import RayServe

    parts = [(done - sent, body["ended"] - body["began"]) for sent, done, body in one_at_a_time(ALONE)]
    target = RayServe(url=url).begin()
    starts: list[float] = []
    first = spec.services[0].initial_replicas
    for wanted in (first + 2, first + 4):
        began = time.monotonic()
        scaled_to(target, wanted)
        for count in (wanted - 1, wanted):
            wait_for("more replicas", lambda c=count: running(state(url, SERVICE)[SERVICE]) >= c)  # type: ignore[misc]
            starts.append(time.monotonic() - began)
    scaled_to(target, first)
    wait_for("fewer replicas", lambda: len(state(url, SERVICE)[SERVICE]["replicas"]) == first)
    total_s, batch_s = np.array(parts).T
    overhead_ms = np.quantile(1e3 * (total_s - batch_s), np.linspace(0, 1, 21))
    raw = msgspec.to_builtins(spec)
    service = raw["services"][0]
    law = service["variants"][0]["latency"][service["pools"][0]]
    nominal_s = (law["base_ms"] + law["per_item_ms"]) / 1e3
    law["base_ms"] += 1e3 * (float(np.median(batch_s)) - nominal_s + GAP_S)
    del service["variants"][0]["load_s"], service["server"]["overhead_ms"]
    service["variants"][0]["load_quantiles_s"] = sorted(starts)
    service["server"]["overhead_quantiles_ms"] = np.maximum.accumulate(np.maximum(overhead_ms, 0)).tolist()
    measured = {
        "overhead_ms_p50": round(float(np.median(overhead_ms)), 2), "start_s": [round(s, 2) for s in sorted(starts)],
        "batch_excess_ms": round(1e3 * (float(np.median(batch_s)) - nominal_s), 2),
    }  # fmt: skip
    return msgspec.convert(raw, type(spec)), measured


def toml(table: dict[str, Any]) -> str:
    """A table as TOML, what is in it inline; None is left out."""

    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {inline(v)}" for k, v in value.items() if v is not None) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(inline, value)) + "]"
        return json.dumps(value)

    return "".join(f"{key} = {inline(value)}\n" for key, value in table.items() if value is not None)


# --- the measurement -----------------------------------------------------------------------------------------------


def measured(
    spec: Any, times_s: np.ndarray, url: str, folder: Path, steer: dict[str, Any] | None
) -> dict[str, Any]:
    """Sends the requests, steered by `pilotage steer` if there is a configuration, and says what happened."""
    zero = time.monotonic() + 1.5
    steering = None
    if steer is not None:
        steering, first_tick = start_steering(folder, steer)
        zero = first_tick + spec.tick_s  # so that ticks fall as they do in the simulator
    watch = Watch(url)
    plan, seen_file = folder / "plan.json", folder / "seen.json"
    plan.write_text(json.dumps({"arrivals_s": times_s.tolist(), "zero": zero}))
    try:
        subprocess.run([sys.executable, __file__, plan, seen_file], check=True, timeout=600)
    finally:
        counts = watch.stop()
        if steering is not None:
            steering.send_signal(signal.SIGTERM)
            steering.wait(30)
    return summed_up(spec, json.loads(seen_file.read_text()), [(t - zero, *n) for t, *n in counts])


def summed_up(
    spec: Any, requests: Sequence[tuple[float, float | None, Any]], counts: Sequence[tuple[float, int, int]]
) -> dict[str, Any]:
    service, end_s = spec.services[0], spec.horizon_h * 3600
    sent_s = np.array([one[0] for one in requests])
    done_s = np.array([np.nan if one[1] is None else one[1] for one in requests])
    latency_s = done_s - sent_s
    known = np.sort(latency_s[np.isfinite(latency_s)])
    late = int((latency_s > service.slo_s).sum())
    failed = int(np.isnan(latency_s).sum())
    at = np.array([t for t, *_ in counts])
    grid = np.arange(0, end_s, 0.1)
    existing, ready = (
        np.array([n[k] for n in counts])[np.searchsorted(at, grid, "right") - 1] for k in (1, 2)
    )
    replica_h = float(existing.mean()) * end_s / 3600
    price = spec.pools[0].price_usd_per_hour
    usd = replica_h * price + late * service.economics.late_usd + failed * service.economics.dropped_usd
    tick = np.floor(done_s / spec.tick_s)
    ticks = np.arange(round(end_s / spec.tick_s))
    return {
        "requests": len(requests), "failed": failed, "late": late, "replica_hours": replica_h, "usd": usd,
        "p95_ms": 1e3 * float(known[int(np.ceil(0.95 * len(known))) - 1]),
        "attainment": 1 - (late + failed) / len(requests),
        "ready": ready[:: round(spec.tick_s / 0.1)].tolist(), "grid_ready": ready[::10].tolist(),
        "grid_existing": existing[::10].tolist(),
        "latency_p95_s": [float(np.quantile(x, 0.95)) if len(x := latency_s[tick == k]) else None for k in ticks],
        "load_average": os.getloadavg()[0],
    }  # fmt: skip


def steering_config(spec: Any, url: str, scraped: str) -> dict[str, Any]:
    return {
        "scenario": "calibrated.toml", "ledger": "ledger", "policy": POLICY, "mode": "act", "history_h": 0.0,
        "monitor": {
            "kind": "prometheus", "url": scraped, "metrics": "ray-serve", "window_s": WINDOW_S, "scrape_s": SCRAPE_S,
            "queries": {"arrival_peak": PEAK},
        },
        "target": {"kind": "ray-serve", "url": url},
        "guard": {"required": ["arrival_rate"], "stale_after_s": 15.0},
    }  # fmt: skip


def start_steering(folder: Path, config: dict[str, Any]) -> tuple[subprocess.Popen[bytes], float]:
    """`pilotage steer` at work, and when its first tick was, on the monotonic clock."""
    (folder / "steer.toml").write_text(toml(config))
    path = folder / "steer.log"
    with path.open("wb") as log:
        steering = subprocess.Popen(
            [sys.executable, "-m", "pilotage", "steer", folder / "steer.toml", "--mode", "act"],
            stdout=log,
            stderr=log,
        )

    def ticked() -> bool:
        if steering.poll() is not None:
            raise SystemExit(f"error: steer ended: {path.read_text()[-2000:]}")
        return '"event": "tick"' in path.read_text()

    wait_for("the first tick of steer", ticked)
    first = next(json.loads(text) for text in path.read_text().splitlines() if '"event": "tick"' in text)
    at = datetime.fromisoformat(first["at"]).timestamp() - first["seconds"]
    return steering, at - time.time() + time.monotonic()


if __name__ == "__main__":  # the load generator, in a process of its own
    plan = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(asyncio.run(generate(plan["arrivals_s"], plan["zero"]))))
