"""Measures a real Ray Serve on this machine, in the file format that `run.py` judges.

    python -m venv rayenv && rayenv/bin/pip install "ray[serve]==2.60.0"
    cd experiments/fidelity/ray_serve
    rayenv/bin/python measure.py --out measured                     # the four reference cases
    rayenv/bin/python measure.py --out measured --cases mine.toml
    rayenv/bin/python measure.py --out measured --name C --replicas 3 --rate 20 --seconds 90 \
        --base-ms 50 --per-item-ms 10 --max-batch 4 --wait-ms 5

The handler awaits a method under `@serve.batch` that sleeps `base + per_item * n` for a batch of n: the
service time is exact, and all the rest of a latency is Ray, HTTP and the machine. Load is an open loop of
Poisson arrivals drawn beforehand, sent from a process of its own over keep-alive HTTP/1.1.

Ray listens beyond loopback whatever it is told. Where the system lets us, the whole measurement therefore
runs in its own network and process namespaces, and every process ends with them; elsewhere Ray's own token
authentication protects it, and the cluster that this script started is shut down at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import fcntl
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import resource
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

INSTALL = 'python -m venv rayenv && rayenv/bin/pip install "ray[serve]==2.60.0"'
LATE_S = 0.005  # a request that the generator sent later than this is left out of case.csv
WARM_UP, ALONE = 60, 60  # requests before all, and then one at a time for the low-load figures
REST_S = 10.0  # after the start, for Ray's own workers to come to rest


@dataclass(frozen=True)
class Case:
    name: str
    replicas: int
    base_s: float
    per_item_s: float
    max_batch: int
    wait_s: float
    max_ongoing: int
    rates_rps: tuple[tuple[float, float], ...]  # (from_s, rate) steps
    seconds: float
    seed: int
    constructor_s: float = 0.0
    scale_at_s: float | None = None
    scale_to: int | None = None
    drain_s: float = 300.0  # to wait for answers after the last arrival; what is open then gets ok = 0

    def arrivals_s(self) -> list[float]:
        """Poisson arrivals with a rate that changes in steps."""
        rng = random.Random(self.seed)
        steps = [*self.rates_rps, (self.seconds, 0.0)]
        times = []
        for (start, rate), (end, _) in itertools.pairwise(steps):
            t = start + rng.expovariate(rate) if rate > 0 else end
            while t < min(end, self.seconds):
                times.append(t)
                t += rng.expovariate(rate)
        return times

    def config(self) -> dict[str, Any]:
        """The `config` block of case.json, with the reference files' keys."""
        rate = self.rates_rps[0][1]
        arrivals = ["poisson", rate, self.seed] if len(self.rates_rps) == 1 else ["step", self.seed]
        config: dict[str, Any] = {"arr": arrivals, "rates_rps": self.rates_rps, "replicas": self.replicas}
        config |= {"max_batch": self.max_batch, "wait": self.wait_s, "a": self.base_s, "b": self.per_item_s}
        config |= {"max_ongoing": self.max_ongoing, "ctor": self.constructor_s, "T": self.seconds}
        if self.scale_at_s is not None:
            config |= {"scale_at": self.scale_at_s, "scale_to": self.scale_to}
        return config


REFERENCE = (
    Case("A_6rps", 1, 0.080, 0.0, 1, 0.0, 16, ((0.0, 6.0),), 240.0, 106),
    Case("A_10rps", 1, 0.080, 0.0, 1, 0.0, 16, ((0.0, 10.0),), 240.0, 110),
    Case("B_25rps", 2, 0.060, 0.015, 8, 0.020, 16, ((0.0, 25.0),), 180.0, 225),
    Case("D_step", 1, 0.100, 0.020, 4, 0.010, 16, ((0.0, 8.0), (20.0, 30.0)), 180.0, 401, 15.0, 30.0, 4),
)


# --- the server ----------------------------------------------------------------------------------------


def application(case: Case, replicas: int) -> Any:
    """One deployment that batches and sleeps, and reports its own times in each answer."""
    import ray
    from ray import serve

    constructor_s, base_s, per_item_s = case.constructor_s, case.base_s, case.per_item_s

    @serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=case.max_ongoing,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=1,
    )
    class Model:
        def __init__(self) -> None:
            began = time.monotonic()
            time.sleep(constructor_s)
            self.built_s = (began, time.monotonic())
            self.replica = ray.get_runtime_context().get_actor_id()[:8]
            self.batches = 0

        @serve.batch(max_batch_size=case.max_batch, batch_wait_timeout_s=case.wait_s)
        async def run(self, items: list[int]) -> list[tuple[int, int, float, float]]:
            began = time.monotonic()
            self.batches += 1
            number = self.batches
            await asyncio.sleep(base_s + per_item_s * len(items))
            return [(number, len(items), began, time.monotonic())] * len(items)

        async def __call__(self, request: Any) -> str:
            seen = time.monotonic()
            answer = await self.run(0)
            return json.dumps([self.replica, *self.built_s, *answer, seen])

    deployment: Any = Model
    deployment._version = "1"  # one version: another number of replicas then scales and does not restart
    return deployment.bind()


def serve_and_load(case: Case, port: int, folder: Path) -> dict[str, Any]:
    """Starts Serve, runs the generator beside it, and returns what the generator saw."""
    import ray
    from ray import serve

    ray.init(
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
        _temp_dir=str(folder),
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(case, case.replicas), name="case", route_prefix="/")
        plan, seen = folder / "plan.json", folder / "seen.json"
        plan.write_text(json.dumps({"port": port, "arrivals_s": case.arrivals_s(), "drain_s": case.drain_s}))
        generator = subprocess.Popen(
            [sys.executable, __file__, "--generate", str(plan), str(seen)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert generator.stdout is not None
            line = generator.stdout.readline()  # the generator has warmed up and says when time zero will be
            if not line:
                raise SystemExit("error: the load generator ended before the measurement began")
            zero = float(line)
            load_average: list[tuple[float, ...]] = []
            scale_call: dict[str, float | int | None] = {}
            while generator.poll() is None:
                time.sleep(0.05)
                now = time.monotonic() - zero
                if not load_average or now >= load_average[-1][0] + 5.0:
                    load_average.append((round(now, 1), *os.getloadavg()))
                if case.scale_to and not scale_call and now >= (case.scale_at_s or 0.0):
                    scale_call = {"sent_s": round(now, 3), "target": case.scale_to}
                    serve._run(application(case, case.scale_to), name="case", route_prefix="/")
        finally:
            if generator.poll() is None:
                generator.terminate()
                generator.wait(10)
        if generator.returncode:
            raise SystemExit(f"error: the load generator ended with status {generator.returncode}")
        return json.loads(seen.read_text()) | {"load_average": load_average, "scale_call": scale_call}
    finally:
        ray.shutdown()


# --- the load generator --------------------------------------------------------------------------------


class Connections:
    """Keep-alive connections to the proxy; as many as there are requests under way."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def get(self) -> tuple[float, float, list[Any] | None]:
        """One request: when it was sent, when its answer was there, and the answer (None if it failed)."""
        sent = time.monotonic()
        try:
            reader, writer = self.idle.pop() if self.idle else await self.open()
            sent = time.monotonic()
            writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            body = b""
            while size := int(await reader.readline(), 16):  # the proxy answers in chunks
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
            done = time.monotonic()
            self.idle.append((reader, writer))
            return sent, done, json.loads(body) if head.split()[1] == b"200" else None
        except (OSError, asyncio.IncompleteReadError, ValueError):
            return sent, time.monotonic(), None

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return reader, writer


async def generate(port: int, arrivals_s: Sequence[float], drain_s: float) -> dict[str, Any]:
    """Warms up, asks one at a time, then sends the open loop."""
    connections = Connections(port)
    await asyncio.gather(*(connections.get() for _ in range(WARM_UP // 2)))
    await asyncio.sleep(REST_S)
    for _ in range(WARM_UP // 2):
        await connections.get()
    alone = [await connections.get() for _ in range(ALONE)]
    zero = time.monotonic() + 1.0
    print(zero, flush=True)
    under_way, sent_s = [], []
    for at in arrivals_s:
        delay = zero + at - time.monotonic()
        if delay > 0:
            await asyncio.sleep(delay)
        sent_s.append(time.monotonic())
        under_way.append(asyncio.create_task(connections.get()))
    if under_way:
        await asyncio.wait(under_way, timeout=drain_s)
    seen = zip(under_way, sent_s, strict=True)
    open_loop = [task.result() if task.done() else (sent, None, None) for task, sent in seen]
    return {"zero": zero, "alone": alone, "open_loop": open_loop}


# --- the files -----------------------------------------------------------------------------------------

COLUMNS = ("scheduled_s", "sent_s", "done_s", "batch", "replica", "ok")
DETAIL = ("batch_no", "handler_in_s", "batch_start_s", "batch_end_s")
PARTS = ("client_to_handler", "handler_to_batch_start", "batch_exec", "batch_end_to_client")


def low_load(case: Case, alone: Sequence[tuple[float, float, list[Any] | None]]) -> dict[str, Any]:
    """Where the time goes of a request that has the system to itself."""
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    total = []
    for sent, done, answer in alone:
        if answer is None:
            continue
        *_, began, ended, seen = answer
        steps = (sent, seen, began, ended, done)
        for part, (start, end) in zip(PARTS, itertools.pairwise(steps), strict=True):
            parts[part].append((end - start) * 1e3)
        total.append((done - sent) * 1e3)
    if not total:
        raise SystemExit("error: no request of the low-load measurement was answered")
    nominal_ms = (case.base_s + case.per_item_s) * 1e3
    wait_ms = case.wait_s * 1e3 if case.max_batch > 1 else 0.0
    return {
        "n": len(total),
        "p50_ms": round(statistics.median(total), 2),
        "nominal_ms_excl_batch_wait": nominal_ms,
        "batch_wait_ms": wait_ms,
        "overhead_ms_p50": round(statistics.median(total) - nominal_ms - wait_ms, 2),
        "parts_ms_p50": {part: round(statistics.median(x), 2) for part, x in parts.items()},
    }


def write(case: Case, result: dict[str, Any], out: Path) -> None:
    """case.csv, case.detail.csv and case.json, as in the reference folder."""
    zero = result["zero"]
    rows: list[tuple[Any, ...]] = []
    on_time: list[tuple[Any, ...]] = []
    lateness: list[float] = []
    replicas: dict[str, tuple[float, float, float]] = {}
    for at, (sent, done, answer) in zip(case.arrivals_s(), result["open_loop"], strict=True):
        if answer is None:  # it loaded the server all the same
            rows.append((f"{at:.6f}", f"{sent - zero:.6f}", "", "", "", 0, "", "", "", ""))
            continue
        replica, built, ready, number, size, began, ended, handled = answer
        first = min(replicas[replica][2] if replica in replicas else math.inf, handled - zero)
        replicas[replica] = (built - zero, ready - zero, first)
        times = [f"{t - zero:.6f}" for t in (sent, done, handled, began, ended)]
        rows.append((f"{at:.6f}", *times[:2], size, replica, 1, number, *times[2:]))
        lateness.append(sent - zero - at)
        if lateness[-1] <= LATE_S:
            on_time.append(rows[-1])
    if not on_time:
        raise SystemExit(f"error: {case.name}: no request was answered")
    for name, columns, selected in (
        (f"{case.name}.detail.csv", (*COLUMNS, *DETAIL), rows),
        (f"{case.name}.csv", COLUMNS, on_time),
    ):
        with (out / name).open("w", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(row[: len(columns)] for row in selected)
    latency_ms = sorted(1e3 * (float(row[2]) - float(row[1])) for row in on_time)
    ranks = {f"p{p}": latency_ms[math.ceil(p / 100 * len(latency_ms)) - 1] for p in (50, 90, 95, 99)}
    versions = {"ray": version("ray"), "python": platform.python_version(), "kernel": platform.release()}
    events = [
        {"replica": name, "ctor_start_s": round(built, 3), "ctor_end_s": round(ready, 3)}
        for name, (built, ready, _) in replicas.items()
    ]
    record = {
        "case": case.name,
        "config": case.config(),
        "start_wall": time.time() - (time.monotonic() - zero),
        "versions": versions,
        "latency_definition": "done_s - sent_s",
        "arrival": f"open loop, times drawn beforehand; sent > {LATE_S * 1e3:g} ms late: left out of the CSV",
        "n_scheduled": len(result["open_loop"]),
        "n_recorded": len(rows),
        "n_not_answered": len(rows) - len(lateness),
        "n_late_discarded": len(lateness) - len(on_time),
        "late_ms_max": round(max(lateness) * 1e3, 2),
        "percentiles_ms": {name: round(value, 2) for name, value in ranks.items()},
        "mean_ms": round(statistics.fmean(latency_ms), 2),
        "mean_batch_seen_by_request": round(statistics.fmean(row[3] for row in on_time), 3),
        "low_load": low_load(case, result["alone"]),
        "loadavg1_mean": round(statistics.fmean(x[1] for x in result["load_average"]), 2),
        "loadavg1_max": max(x[1] for x in result["load_average"]),
        "loadavg_samples": result["load_average"],
        "scale_call": result["scale_call"],
        "replica_events": events,
        "first_request_handled_s": {r: round(first, 3) for r, (_, _, first) in replicas.items()},
        "environment": {"cores": os.cpu_count(), "proxy": "one HTTP proxy, default settings"},
    }
    (out / f"{case.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{case.name}: {len(on_time)} requests, ms", json.dumps(record["percentiles_ms"]), flush=True)


# --- the command ---------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


ISOLATED = "PILOTAGE_MEASURE_ISOLATED"


def isolate() -> None:
    """Starts this very command again in namespaces of its own, where the system lets us."""
    if os.environ.get(ISOLATED):
        loopback_up()
        return
    unshare = shutil.which("unshare")
    own = [unshare or "", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
    for rights in ([], ["--user", "--map-root-user"]):
        if unshare and subprocess.run([*own, *rights, "true"], capture_output=True).returncode == 0:
            os.environ |= {ISOLATED: "1", "RAY_AUTH_MODE": "disabled"}
            os.execv(unshare, [*own, *rights, sys.executable, *sys.argv])
    print("no namespaces here: Ray's ports are open to your network for the time of the run", file=sys.stderr)


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        name = b"lo".ljust(16, b"\0")
        flags = struct.unpack("16sh", fcntl.ioctl(control, 0x8913, name + b"\0" * 16)[:18])[1]  # SIOCGIFFLAGS
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", name, flags | 1))  # SIOCSIFFLAGS, IFF_UP


def read_cases(path: Path) -> list[Case]:
    """Cases from a TOML file: a table per case, with the fields of `Case`."""
    try:
        tables = tomllib.loads(path.read_text())
        cases = []
        for name, table in tables.items():
            rates = table.pop("rates_rps")
            steps = tuple((float(at), float(rate)) for at, rate in rates)
            cases.append(Case(name=name, rates_rps=steps, **table))
        return cases
    except (OSError, tomllib.TOMLDecodeError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise SystemExit(f"error: {path}: {error}") from None


def parsed() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("ray_serve_measured"))
    parser.add_argument("--cases", type=Path, help="TOML file: one table per case, see the README")
    parser.add_argument("--only", help="names of the cases to run, separated by commas")
    parser.add_argument("--name", help="one case, defined by the flags below")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--rate", type=float, default=5.0, help="requests per second, Poisson")
    parser.add_argument("--base-ms", type=float, default=50.0)
    parser.add_argument("--per-item-ms", type=float, default=0.0)
    parser.add_argument("--max-batch", type=int, default=1)
    parser.add_argument("--wait-ms", type=float, default=0.0)
    parser.add_argument("--max-ongoing", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def chosen(arguments: argparse.Namespace) -> list[Case]:
    if arguments.name:
        a = arguments
        rates = ((0.0, a.rate),)
        times = (a.base_ms / 1e3, a.per_item_ms / 1e3, a.max_batch, a.wait_ms / 1e3)
        return [Case(a.name, a.replicas, *times, a.max_ongoing, rates, a.seconds, a.seed)]
    cases = read_cases(arguments.cases) if arguments.cases else list(REFERENCE)
    wanted = arguments.only.split(",") if arguments.only else [case.name for case in cases]
    unknown = set(wanted) - {case.name for case in cases}
    if unknown:
        names = ", ".join(case.name for case in cases)
        raise SystemExit(f"error: no case named {', '.join(sorted(unknown))}; there are {names}")
    return [case for case in cases if case.name in wanted]


def main() -> None:
    if sys.argv[1:2] == ["--generate"]:
        plan = json.loads(Path(sys.argv[2]).read_text())
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        Path(sys.argv[3]).write_text(json.dumps(asyncio.run(generate(**plan))))
        return
    arguments = parsed()
    cases = chosen(arguments)
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("ray.serve") is None:
        raise SystemExit(
            f"error: {sys.executable} has no ray[serve]; make an environment with it:\n  {INSTALL}"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    isolate()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for case in cases:
        folder = Path(tempfile.mkdtemp(prefix="rs"))  # short: Ray's sockets live below it
        try:
            write(case, serve_and_load(case, free_port(), folder), arguments.out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
