"""A closed loop with nothing simulated but the accelerator's time, predicted beforehand by the simulator.

Load generator -> Ray Serve -> Prometheus -> `pilotage steer --mode act` -> replicas change -> the objective is met
again. First the machine is measured, one request at a time and a few starts of replicas, and the simulator says what
will happen; then the same requests are sent to Ray Serve steered by the learned policy, and to Ray Serve under its own
autoscaler (its defaults; with --thorough also the best of its settings for this very load, found in the simulator).

    make demo-live            # or: python experiments/live_loop/run.py --out runs/live_loop

Everything runs in network and process namespaces of its own, and ends with them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rayhead import (
    SERVE,
    declare,
    inside,
    loopback_up,
    missing,
    prometheus,
    ray_head,
    running,
    state,
    wait_for,
)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "fidelity" / "ray_serve"))

SERVICE = "ranker"
POLICY = "learned"
START_S = 1.0  # what the constructor of a replica takes, besides the process itself
ALONE = 40  # requests one at a time
WORLDS = 16
DRAIN_S = 30.0  # to wait for answers after the last request
GAP_S = 0.0006  # between two batches of a replica (reference: Ray Serve's semantics, section 2)
QUICK_S = 45.0


# --- the load ----------------------------------------------------------------------------------------------------


async def generate(arrivals_s: Sequence[float], zero: float) -> list[tuple[float, float | None, Any]]:
    """Sends the open loop; when each request was sent and answered, after `zero`, and the answer."""
    from measure import Connections

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
    from measure import Connections

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


# --- the prediction --------------------------------------------------------------------------------------------------


def predicted(spec: Any, times_s: np.ndarray, policy: str, seed: int) -> dict[str, Any]:
    """What will happen, in WORLDS runs with these requests: means, and the interval that holds 95 % of the runs."""
    from pilotage.control.learned import policy_from
    from pilotage.engine.cluster import Recorded, World
    from pilotage.engine.run import at_tick, bill, simulate, tick_of
    from pilotage.metrics import quantiles_s

    end_s = spec.horizon_h * 3600
    chosen = policy_from(policy)
    longer = spec.replace(horizon_h=(end_s + DRAIN_S) / 3600)  # so that all are answered
    worlds = [World(seed + 1 + k, start_s=0.0, traffic=(Recorded(times_s),)) for k in range(WORLDS)]
    runs = simulate(longer, [chosen] * WORLDS, worlds, keep_timeline=True)
    tick_s = runs[0].tick_s
    at = at_tick(longer, tick_of(longer, chosen))
    timelines = np.stack([run.timeline[: round(end_s / tick_s), 0] for run in runs])
    nodes_usd = timelines["node_usd"].sum(axis=1)
    late = np.array([bill(run.totals, at)[:, 1:].sum() for run in runs])
    p95_ms = np.array([1e3 * float(quantiles_s(run.histogram.sum(axis=0), (0.95,))[0]) for run in runs])
    replica_h = timelines["node_s"].sum(axis=1) / 3600
    return {
        "policy": policy, "p95_ms": spread(p95_ms), "replica_hours": spread(replica_h), "usd": spread(nodes_usd + late),
        "late": spread(np.array([float(run.totals["late"].sum() + run.totals["overdue"].sum()) for run in runs])),
        "tick_s": tick_s, "ready": timelines["ready"].mean(axis=0).tolist(),
        "latency_p95_s": np.nanmean(timelines["latency_p95_s"], axis=0).tolist(),
    }  # fmt: skip


def spread(values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def best_of_ray(spec: Any, times_s: np.ndarray, seed: int) -> dict[str, float]:
    """The settings of Ray's autoscaler that cost least for this very load, as far as the simulator can tell."""
    found: list[tuple[float, dict[str, float]]] = []
    for target, up_s, down_s in itertools.product(
        (1.0, 1.5, 2.0), (0.0, 2.0, 5.0, 10.0), (5.0, 10.0, 20.0, 60.0)
    ):
        settings = {
            "target_ongoing_requests": target, "upscale_delay_s": up_s, "downscale_delay_s": down_s,
            "look_back_period_s": 10.0, "metrics_interval_s": 2.0,
        }  # fmt: skip
        found.append((predicted(spec, times_s, ray_policy(settings), seed)["usd"]["mean"], settings))
    return min(found, key=lambda one: one[0])[1]


def ray_policy(settings: dict[str, float]) -> str:
    return "ray-serve" + (":" + ",".join(f"{k}={v:g}" for k, v in settings.items()) if settings else "")


# --- the measurement -----------------------------------------------------------------------------------------------


def measured(
    spec: Any, times_s: np.ndarray, url: str, folder: Path, steer: dict[str, Any] | None
) -> dict[str, Any]:
    """Sends the requests, steered by `pilotage steer` if there is a configuration, and says what happened."""
    steering = start_steering(folder, steer) if steer is not None else None
    watch = Watch(url)
    plan, seen_file = folder / "plan.json", folder / "seen.json"
    zero = time.monotonic() + 1.5
    plan.write_text(json.dumps({"arrivals_s": times_s.tolist(), "zero": zero}))
    try:
        subprocess.run([sys.executable, __file__, "--generate", plan, seen_file], check=True, timeout=600)
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
            "kind": "prometheus", "url": scraped, "metrics": "ray-serve", "window_s": spec.tick_s, "scrape_s": 1.0,
        },
        "target": {"kind": "ray-serve", "url": url},
        "guard": {"required": ["arrival_rate"], "stale_after_s": 15.0},
    }  # fmt: skip


def start_steering(folder: Path, config: dict[str, Any]) -> subprocess.Popen[bytes]:
    """`pilotage steer` at work, after its first tick."""
    (folder / "steer.toml").write_text(toml(config))
    log = (folder / "steer.log").open("wb")
    steering = subprocess.Popen(
        [sys.executable, "-m", "pilotage", "steer", folder / "steer.toml", "--mode", "act"],
        stdout=log,
        stderr=log,
    )

    def ticked() -> bool:
        text = (folder / "steer.log").read_text()
        if steering.poll() is not None:
            raise SystemExit(f"error: steer ended: {text[-2000:]}")
        return '"tick"' in text

    wait_for("the first tick of steer", ticked)
    return steering


# --- the whole ------------------------------------------------------------------------------------------------------


def compared(
    prediction: dict[str, dict[str, Any]], reality: dict[str, dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """table.csv, and the lines of acceptance.csv."""
    rows, lines = [], []
    for name, was in reality.items():
        said = prediction[name]
        row: dict[str, Any] = {"run": name, "policy": said["policy"], "requests": was["requests"]}
        for what in ("p95_ms", "replica_hours", "usd", "late"):
            row |= {f"{what}_predicted": said[what]["mean"], f"{what}_measured": was[what]}
        row |= {"failed": was["failed"], "attainment": was["attainment"], "load_average": was["load_average"]}
        rows.append(row)
        for what, share in (("p95_ms", 0.15), ("replica_hours", 0.10)):
            error = {k: said[what][k] / was[what] - 1 for k in ("mean", "low", "high")}
            if name == POLICY:
                lines.append(
                    line(
                        f"{what} predicted", f"within {100 * share:.0f} %", error, abs(error["mean"]) <= share
                    )
                )
    ours, theirs = reality[POLICY]["usd"], reality["ray-serve default"]["usd"]
    ratio = dict.fromkeys(("mean", "low", "high"), ours / theirs - 1)
    lines.append(
        line("measured dollars of learned against Ray Serve's autoscaler", "below 0 %", ratio, ours < theirs)
    )
    return rows, lines


def line(what: str, asked: str, value: dict[str, float], met: bool) -> dict[str, Any]:
    return {
        "line": what, "asked": asked, "measured": f"{100 * value['mean']:.1f} %", "low": f"{100 * value['low']:.1f} %",
        "high": f"{100 * value['high']:.1f} %", "met": met,
    }  # fmt: skip


def drawn(
    path: Path, spec: Any, times_s: np.ndarray, said: dict[str, Any], was: dict[str, Any], title: str
) -> None:
    """Prediction against reality on one time line."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    end_s, slo_ms = spec.horizon_h * 3600, spec.services[0].slo_ms
    figure, (load, replicas, latency) = plt.subplots(3, 1, sharex=True, figsize=(8, 7), layout="constrained")
    edges = np.arange(0, end_s + 1e-9, spec.tick_s)
    load.stairs(np.histogram(times_s, edges)[0] / spec.tick_s, edges, color="0.4")
    load.set_ylabel("requests/s")
    said_s = said["tick_s"] * (1 + np.arange(len(said["ready"])))
    replicas.step(said_s, said["ready"], where="post", label="predicted", color="C0")
    replicas.step(
        np.arange(len(was["grid_ready"])), was["grid_ready"], where="post", label="measured", color="C1"
    )
    replicas.set_ylabel("replicas ready")
    replicas.legend(frameon=False)
    latency.plot(said_s, 1e3 * np.array(said["latency_p95_s"]), color="C0", label="predicted")
    was_ms = [np.nan if x is None else 1e3 * x for x in was["latency_p95_s"]]
    latency.plot(spec.tick_s * (1 + np.arange(len(was_ms))), was_ms, color="C1", label="measured")
    latency.axhline(slo_ms, color="0.6", linestyle="--", label="objective")
    latency.set(ylabel="p95 in the tick, ms", xlabel="seconds", yscale="log")
    latency.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def shown(rows: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]) -> None:
    print(f"\n{'':28}{'p95 ms':>18}{'replica-hours':>18}{'dollars':>18}{'in time':>10}")
    print(f"{'':28}" + f"{'predicted':>10}{'was':>8}" * 3)
    for row in rows:
        cells = "".join(
            f"{row[f'{what}_predicted']:>10.{d}f}{row[f'{what}_measured']:>8.{d}f}"
            for what, d in (("p95_ms", 0), ("replica_hours", 3), ("usd", 3))
        )
        print(f"{row['run']:28}{cells}{100 * row['attainment']:>9.1f}%")
    for one in lines:
        print(
            f"{'met    ' if one['met'] else 'NOT MET'} {one['line']}: {one['measured']} (asked: {one['asked']})"
        )


def run(out: Path, seed: int, thorough: bool, quick: bool, folder: Path) -> None:
    import msgspec

    from pilotage import results, scenario
    from pilotage.engine.cluster import Cluster, World

    started, clock = datetime.now(UTC), time.perf_counter()
    durations: dict[str, float] = {}

    def lap(what: str) -> None:
        durations[what] = round(time.perf_counter() - clock - sum(durations.values()), 1)
        print(f"{what}: {durations[what]} s", flush=True)

    spec = scenario.load(HERE / "scenario.toml")
    if quick:
        spec = spec.replace(horizon_h=QUICK_S / 3600)
    with ray_head(folder) as url, prometheus(folder) as scraped:
        declare(url, application(spec))
        lap("Ray Serve and Prometheus started")
        times_s = Cluster(spec, [World(seed)]).arrivals(0, 0)
        predicted(spec, times_s, POLICY, seed)
        lap("simulator compiled")
        fitted, machine = calibrated(spec, url)
        table = {k: v for k, v in msgspec.to_builtins(fitted).items() if k not in ("name", "data")}
        (folder / "calibrated.toml").write_text(toml(table))
        lap("machine measured")
        print(json.dumps(machine))
        rays: dict[str, dict[str, float]] = {"ray-serve default": {}}
        if thorough:
            rays["ray-serve tuned"] = best_of_ray(fitted, times_s, seed)
        prediction = {POLICY: predicted(fitted, times_s, POLICY, seed)} | {
            name: predicted(fitted, times_s, ray_policy(settings), seed) for name, settings in rays.items()
        }
        lap("predicted")
        reality = {POLICY: measured(fitted, times_s, url, folder, steering_config(fitted, url, scraped))}
        lap(f"measured: {POLICY}")
        for name, settings in rays.items():
            declare(url, application(spec, settings))
            reality[name] = measured(fitted, times_s, url, folder, None)
            lap(f"measured: {name}")
    rows, lines = compared(prediction, reality)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name in reality:
        path = out / "figures" / f"{name.replace(' ', '_')}.svg"
        drawn(
            path,
            fitted,
            times_s,
            prediction[name],
            reality[name],
            f"Ray Serve, {name}: predicted and measured",
        )
    results.write_whole(out / "table.csv", results.as_csv(rows))
    results.write_whole(out / "acceptance.csv", results.as_csv(lines))
    record = results.provenance("live_loop", sys.argv, started, durations) | {
        "seed": seed, "machine_measured": machine, "prediction": prediction, "reality": reality,
    }  # fmt: skip
    results.write_whole(out / "run.json", json.dumps(record, indent=1) + "\n")
    (out / "steer.log").write_bytes((folder / "steer.log").read_bytes())
    shown(rows, lines)
    print(f"\n{sum(durations.values()):.0f} s in all; the time lines are in {out / 'figures'}")


def main() -> None:
    if sys.argv[1:2] == ["--generate"]:
        plan = json.loads(Path(sys.argv[2]).read_text())
        Path(sys.argv[3]).write_text(json.dumps(asyncio.run(generate(plan["arrivals_s"], plan["zero"]))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="not used: the load is drawn from the scenario")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/live_loop"))
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_S:g} s of load instead of all")
    parser.add_argument(
        "--thorough", action="store_true", help="also Ray's autoscaler with its best settings"
    )
    arguments = parser.parse_args()
    if not os.environ.get("PILOTAGE_INSIDE"):
        why = missing()
        if why is not None:
            raise SystemExit(f"error: {why}")
        command = inside([sys.executable, *sys.argv])
        os.environ["PILOTAGE_INSIDE"] = "1"
        os.execv(command[0], command)
    loopback_up()
    with tempfile.TemporaryDirectory(
        prefix="ll", ignore_cleanup_errors=True
    ) as folder:  # short: Ray's sockets
        run(arguments.out, arguments.seed, arguments.thorough, arguments.quick, Path(folder))


if __name__ == "__main__":
    main()
