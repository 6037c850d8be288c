"""Are runs made elsewhere the same runs, what do more workers gain, what does a dead one cost? Writes results/workers.

One comparison (`--seeds` hours of `multi-tenant`, by a rule and by the learned policy) by one process, two local
processes, two Dask workers and a Ray cluster of two nodes, all on this machine; one local and one Dask worker is killed
mid-way; two processes search one study in a PostgreSQL database, one in a journal file. All of it runs in network and
process namespaces of its own, for Ray listens beyond loopback whatever it is told. Whatever is not installed is left
out, and its line says so. Times are wall clock: on a machine that others use they mean nothing.

`limits.csv` is the calculation on paper for a thousand workers: what all of them share, how much of it a second has
(measured here, alone on it), how many workers that keeps busy with windows of the length measured, and how long a
window, or a trial of four, must last so that it is enough for 1,000. What saturates first comes first.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.live_loop.rayhead import inside, loopback_up
from pilotage.control.guard import Guard
from pilotage.control.learned import policy_from
from pilotage.engine.cluster import World
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Scenario, load
from pilotage.workers import Workers

POLICIES = ("hpa", "learned")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def started(*commands: list[str], wait_s: float = 0.0) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that end with the block."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(wait_s)
        yield running
    finally:
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def dask() -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    from distributed import Client

    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    module = [sys.executable, "-m"]
    scheduler = [
        *module,
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-dashboard",
    ]
    worker = [*module, "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    with started(scheduler, worker, worker) as running:
        with Client(address, timeout="60s") as client:
            client.wait_for_workers(2, timeout=90)
        yield address, running


@contextmanager
def ray_of_two_nodes() -> Iterator[str]:
    if not os.environ.get("PILOTAGE_INSIDE"):
        raise ModuleNotFoundError(
            "no network namespace is allowed here, without which Ray can be reached", name="ray"
        )
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "180",
        "RAY_agent_register_timeout_ms": "180000",
        "RAY_worker_niceness": "0",
    }
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield "ray"
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        cluster.shutdown()


@contextmanager
def postgres() -> Iterator[str]:
    """A database server of its own, on loopback, in a folder that goes away."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    programs = [Path(found).parent] if (found := shutil.which("initdb")) else programs
    if not programs:
        raise FileNotFoundError("no PostgreSQL server is installed")
    with tempfile.TemporaryDirectory() as folder:
        port, as_user = free_port(), []
        if os.geteuid() == 0:  # the server refuses to run as root
            shutil.chown(folder, "postgres")
            as_user = ["runuser", "-u", "postgres", "--"]
        data = f"{folder}/data"
        make = [*as_user, str(programs[-1] / "initdb"), "-D", data, "-A", "trust", "-U", "tuner"]
        subprocess.run(make, check=True, capture_output=True)
        serve = [
            *as_user,
            str(programs[-1] / "postgres"),
            "-D",
            data,
            "-p",
            str(port),
            "-k",
            folder,
            "-h",
            "127.0.0.1",
        ]
        with started(serve):
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                with socket.socket() as one:
                    if one.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            time.sleep(1)
            yield f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"


def measured(scenario: Scenario, worlds: list[World], where: str | None) -> tuple[float, bytes]:
    """Seconds of the comparison, and its dollars, bit by bit; the workers have compiled and loaded before."""
    with Workers(where) as workers:
        warm = [World(10_000 + k) for k in range(4 * workers.count)]
        for name in POLICIES:
            workers.simulate(
                scenario.replace(horizon_h=0.2), [policy_from(name)] * len(warm), warm, guard=Guard()
            )
        began, usd = time.perf_counter(), []
        for name in POLICIES:
            runs = workers.simulate(
                scenario, [policy_from(name)] * len(worlds), worlds, guard=Guard(), label=name
            )
            usd += [run.usd.tobytes() for run in runs]
        return time.perf_counter() - began, b"".join(usd)


def children(pid: int) -> list[int]:
    return [
        int(one) for file in Path(f"/proc/{pid}/task").glob("*/children") for one in file.read_text().split()
    ]


def kill_one(nanny: int | None) -> None:
    """Ends a worker without a word: a Dask worker with its nanny, which would start another, or a local process."""
    if nanny is not None:
        gone = [*children(nanny), nanny]
    else:
        gone = [
            p for p in children(os.getpid()) if b"LokyProcess" in Path(f"/proc/{p}/cmdline").read_bytes()
        ][:1]
    for pid in gone:
        os.kill(pid, signal.SIGKILL)


def searches(url: str, options: argparse.Namespace, apart: bool) -> list[dict[str, float]]:
    """A study by two processes at once (or one), through its storage; the trials, as parameters and dollars."""
    import optuna

    command = [sys.executable, "-m", "pilotage", "tune", "quickstart", "--policy", "hpa", "--hours", "1",
               "--seeds", "2", "--trials", str(options.trials), "--storage", url, "--json"]  # fmt: skip
    with started(*[[*command, "--seed", str(k)] for k in range(2 if apart else 1)]) as running:
        for process in running:
            if process.wait() != 0:
                raise RuntimeError(f"a search ended with {process.returncode}")
    from pilotage.agents.tune import storage_of

    study = optuna.load_study(study_name=None, storage=storage_of(url))
    return [{**t.params, "usd": t.values[0]} for t in study.trials if t.values]


def given_back(run: Any) -> Any:
    return run


def passed_on(where: str, run: Any, many: int) -> float:
    """Windows per second that a scheduler and this process hand out and take back, with nothing to do for them."""
    with Workers(where) as workers:
        workers.map(given_back, [(run,)] * 20)
        began = time.perf_counter()
        workers.map(given_back, [(run,)] * many)
        return many / (time.perf_counter() - began)


def stored(url: str, many: int) -> tuple[float, float]:
    """Seconds that a trial costs a storage: to be drawn and told, and to be read once by another process."""
    import optuna

    from pilotage.agents.tune import space, storage_of

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.RandomSampler(seed=0)  # which reads no trial
    study = optuna.create_study(storage=storage_of(url), study_name="limits", sampler=sampler)
    distributions = space(policy_from("hpa"))
    began = time.perf_counter()
    for k in range(many):
        study.tell(study.ask(distributions), float(k))
    wrote_s = (time.perf_counter() - began) / many
    began = time.perf_counter()
    count = len(optuna.load_study(study_name="limits", storage=storage_of(url)).trials)
    return wrote_s, (time.perf_counter() - began) / count


def limit(
    part: str, measured: float, unit: str, work_s: float, of: str, squared: bool = False
) -> dict[str, Any]:
    """A row of limits.csv. `measured` seconds are needed for every piece of work of `work_s` seconds, one at a time;
    `squared`: for every piece and worker, as each worker reads what every other has found."""
    most = (work_s / measured) ** (0.5 if squared else 1.0)
    return {
        "part": part, "measured": f"{measured:.3g}", "unit": unit, "work": f"{of} of {work_s:.3g} s",
        "workers": round(most), "seconds_for_1000": f"{measured * (1000**2 if squared else 1000):.3g}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed")
    parser.add_argument("--out", type=Path, default=Path("results/workers"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=24, help="windows of the comparison, of an hour each")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if not os.environ.get("PILOTAGE_INSIDE"):
        command = inside([sys.executable, *sys.argv])
        if not subprocess.run(inside(["true"]), capture_output=True).returncode:
            os.environ["PILOTAGE_INSIDE"] = "1"
            os.execv(command[0], command)
    else:
        loopback_up()
    clock, durations = time.perf_counter(), dict[str, float]()
    facts = provenance("workers", sys.argv, datetime.now(UTC), durations)
    scenario, repeats = load("multi-tenant").replace(horizon_h=1.0), 3
    if options.quick:
        options.seeds, options.trials, repeats = 4, 4, 1
        scenario = scenario.replace(horizon_h=0.5)
    worlds = [World(options.seed + k) for k in range(options.seeds)]

    rows: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []

    def say(line: str, asked: str, value: object, met: object) -> None:
        lines.append({"line": line, "asked": asked, "measured": value, "low": "", "high": "", "met": met})
        print(lines[-1], flush=True)

    seconds: dict[str, list[float]] = {}
    bits: dict[str, set[bytes]] = {}
    missing: dict[str, str] = {}
    here = (("one process", "local:1"), ("two local processes", "local:2"))
    there = (("two Dask workers", dask), ("two Ray nodes", ray_of_two_nodes))
    for k in range(repeats):  # in turn, so that a busy minute hits all alike
        for name, place in (*here, *there) if k == 0 else here:
            try:
                with ExitStack() as stack:
                    where = stack.enter_context(place()) if callable(place) else place
                    where = where[0] if isinstance(where, tuple) else where
                    took, usd = measured(scenario, worlds, where)
            except ModuleNotFoundError as error:
                missing[name] = str(error)
                continue
            seconds.setdefault(name, []).append(took)
            bits.setdefault(name, set()).add(usd)
            print(name, f"{took:.1f} s", flush=True)
    threads_s, serial = measured(scenario, worlds, None)
    serial_s = float(np.median(seconds["one process"]))
    for name, times in seconds.items():
        median = float(np.median(times))
        rows.append(
            {"where": name, "seconds": f"{median:.2f}", "speed": f"{serial_s / median:.2f}",
             "same_as_serial": bits[name] == {serial}}
        )  # fmt: skip
        if name != "one process":
            say(
                f"{name}: same dollars, to the bit, as in one process",
                "yes",
                bits[name] == {serial},
                bits[name] == {serial},
            )
    rows.append(
        {
            "where": "threads of one process",
            "seconds": f"{threads_s:.2f}",
            "speed": f"{serial_s / threads_s:.2f}",
            "same_as_serial": True,
        }
    )
    for name, why in missing.items():
        say(f"{name}: same dollars as in one process", "yes", why, False)
    speed = serial_s / float(np.median(seconds["two local processes"]))
    say("two local processes, times as fast as one", ">= 1.7", f"{speed:.3f}", speed >= 1.7)

    # --- what a thousand workers would share
    limits: list[dict[str, Any]] = []
    window_s = serial_s / (len(POLICIES) * len(worlds))
    with Workers() as workers:
        (run,) = workers.simulate(scenario, [policy_from("learned")], worlds[:1], guard=Guard())
    size = len(pickle.dumps(run)) + len(pickle.dumps((scenario, policy_from("learned"), worlds[0])))
    limits.append(
        limit("network of the caller, 10 Gbit/s", size / 1.25e9, "s per window", window_s, "a window")
    )
    for name, place in (("Dask", dask), ("Ray", ray_of_two_nodes)):
        with suppress(ModuleNotFoundError), place() as found:
            rate = passed_on(
                found if isinstance(found, str) else found[0], run, 100 if options.quick else 1000
            )
            limits.append(
                limit(f"{name}: scheduler and caller", 1 / rate, "s per window", window_s, "a window")
            )

    for name in ("local", "Dask"):
        with ExitStack() as stack:
            where, nanny = "local:2", None
            if name == "Dask":
                where, running = stack.enter_context(dask())
                nanny = running[-1].pid
            workers = stack.enter_context(Workers(where))
            warm = [World(10_000 + k) for k in range(8)]
            workers.simulate(scenario.replace(horizon_h=0.2), [policy_from("hpa")] * 8, warm, guard=Guard())
            killer = threading.Timer(0.3 * serial_s / 2, kill_one, [nanny])
            killer.start()
            usd = []
            for policy in POLICIES:
                runs = workers.simulate(scenario, [policy_from(policy)] * len(worlds), worlds, guard=Guard())
                usd += [run.usd.tobytes() for run in runs]
            died = not killer.is_alive()
            killer.join()
        same = died and b"".join(usd) == serial
        say(f"a {name} worker killed mid-way: same dollars", "yes", same, same)

    with tempfile.TemporaryDirectory() as folder:
        alone = searches(f"journal:{folder}/alone.log", options, apart=False)
        memory = searches(f"sqlite:///{folder}/alone.db", options, apart=False)
        say(
            "one search, in a journal file and in SQLite: same trials",
            "yes",
            alone == memory,
            alone == memory,
        )
        both = searches(f"journal:{folder}/both.log", options, apart=True)
        enough = len(both) >= options.trials and len({tuple(sorted(t.items())) for t in both}) == len(both)
        say("two processes search one journal: trials, none twice", f">= {options.trials}", len(both), enough)
    try:
        with postgres() as url:
            both = searches(url, options, apart=True)
            wrote_s, read_s = stored(url, 100 if options.quick else 500)
        trial_s = 4 * window_s
        limits += [
            limit("PostgreSQL: a trial drawn and told", wrote_s, "s per trial", trial_s, "a trial"),
            limit(
                "PostgreSQL: a trial read by every worker", read_s, "s per trial and worker", trial_s, "a trial",
                squared=True,
            ),
        ]  # fmt: skip
        enough = len(both) >= options.trials and len({tuple(sorted(t.items())) for t in both}) == len(both)
        say(
            "two processes search one PostgreSQL study: trials, none twice",
            f">= {options.trials}",
            len(both),
            enough,
        )
    except (FileNotFoundError, RuntimeError) as error:
        say("two processes search one PostgreSQL study", f">= {options.trials}", str(error), False)

    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(lines))
    write_whole(options.out / "limits.csv", as_csv(sorted(limits, key=lambda row: row["workers"])))
    durations["all"] = round(time.perf_counter() - clock, 1)
    write_whole(options.out / "run.json", json.dumps(facts | {"seeds": [options.seed]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
