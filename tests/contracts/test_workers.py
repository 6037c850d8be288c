"""Runs made anywhere are the same runs; a worker that dies costs its task."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy

from pilotage.agents.tune import storage_of, tune
from pilotage.control.guard import Guard
from pilotage.control.scaling import parse
from pilotage.engine.cluster import World
from pilotage.engine.run import Run, simulate
from pilotage.scenario import load
from pilotage.workers import Workers
from pilotage.world.spec import SpecError

WORLDS = [World(seed) for seed in range(5)]
SCENARIO = load("quickstart").replace(horizon_h=0.25, history_h=0.0)


def ended(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Dask scheduler with two workers."""
    pytest.importorskip("distributed")
    folder = tmp_path_factory.mktemp("dask")
    told = folder / "scheduler.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(told)]
    started = [subprocess.Popen([*command, *options], cwd=folder, env=environment, stderr=subprocess.DEVNULL)]
    command = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(told)]
    options = ["--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1"]
    try:
        deadline = time.monotonic() + 60
        while not told.is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        for _ in range(2):
            started.append(
                subprocess.Popen([*command, *options], cwd=folder, env=environment, stderr=subprocess.DEVNULL)
            )
        import json

        from distributed import Client

        address: str = json.loads(told.read_text())["address"]
        with Client(address) as client:
            client.wait_for_workers(2, timeout=60)
        yield address
    finally:
        for process in reversed(started):
            ended(process)


@pytest.fixture(scope="module")
def serial() -> list[Run]:
    return simulate(SCENARIO, [parse("hpa")] * 5, WORLDS, guard=Guard(), label="hpa")


def assert_same(found: list[Run], expected: list[Run]) -> None:
    assert [run.world.seed for run in found] == [run.world.seed for run in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.usd.tobytes() == other.usd.tobytes()
        assert one.totals.tobytes() == other.totals.tobytes()
        assert one.histogram.tobytes() == other.histogram.tobytes()


@pytest.mark.parametrize("where", [None, "local:2"])
def test_local_processes_make_the_same_runs(where: str | None, serial: list[Run]) -> None:
    with Workers(where) as workers:
        assert_same(workers.simulate(SCENARIO, [parse("hpa")] * 5, WORLDS, guard=Guard()), serial)


def test_dask_makes_the_same_runs(dask: str, serial: list[Run]) -> None:
    with Workers(dask) as workers:
        assert workers.count == 2
        assert_same(workers.simulate(SCENARIO, [parse("hpa")] * 5, WORLDS, guard=Guard()), serial)


@pytest.mark.parametrize("where", ["local:2", "dask"])
def test_a_worker_that_dies_costs_its_task(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # cloudpickle sends a function by value when it is local, so workers need not import this module
    def task(number: int, mark: str) -> int:
        import os
        import signal

        if number == 3:
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return number * number
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    address = request.getfixturevalue("dask") if where == "dask" else where
    with Workers(address) as workers:
        found = workers.map(task, [(k, str(tmp_path / "died")) for k in range(8)])
    assert (tmp_path / "died").exists()
    assert found == [k * k for k in range(8)]


def test_what_a_task_raises_is_raised() -> None:
    def task(number: int) -> float:
        return 1 / number

    with Workers("local:2") as workers, pytest.raises(ZeroDivisionError):
        workers.map(task, [(1,), (0,)])


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("local:0", "no number of processes"),
        ("local:two", "no number of processes"),
        ("http://x", "is no cluster"),
        ("tcp:", "is no cluster"),
        ("tcp://127.0.0.1:9", "no Dask scheduler answers"),
    ],
)
def test_addresses_that_are_none(where: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where.startswith("tcp:/"):
        pytest.importorskip("distributed")
    with pytest.raises(SpecError, match=why):
        Workers(where)


def test_two_processes_search_one_study(tmp_path: Path) -> None:
    """Half of the trials by one, half by another, in one journal; nothing is drawn twice."""
    storage, groups = f"journal:{tmp_path / 'study.log'}", [WORLDS[:1]]
    policy = parse("hpa")
    tune(policy, SCENARIO, groups, trials=4, seed=0, storage=storage)
    study = tune(policy, SCENARIO, groups, trials=8, seed=0, storage=storage)
    assert len(study.trials) == 8
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 8


def test_a_trial_is_the_same_wherever_its_windows_run() -> None:
    with Workers("local:2") as workers:
        apart = tune(parse("hpa"), SCENARIO, [WORLDS], trials=3, seed=1, workers=workers)
    here = tune(parse("hpa"), SCENARIO, [WORLDS], trials=3, seed=1)
    np.testing.assert_array_equal([t.values[0] for t in apart.trials], [t.values[0] for t in here.trials])


def test_a_study_behind_a_proxy_is_the_same_study(tmp_path: Path) -> None:
    """A gRPC proxy, as on a network where workers do not reach the database: same trials, and they stand there."""
    pytest.importorskip("grpc")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, behind = f"grpc://127.0.0.1:{port}", f"journal:{tmp_path / 'study.log'}"
    serve = (
        "import optuna; from pilotage.agents.tune import storage_of;"
        f"optuna.storages.run_grpc_proxy_server(storage_of({behind!r}), host='127.0.0.1', port={port})"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    server = subprocess.Popen([sys.executable, "-c", serve], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        far = tune(parse("hpa"), SCENARIO, [WORLDS[:2]], trials=3, seed=1, storage=url)
        near = tune(parse("hpa"), SCENARIO, [WORLDS[:2]], trials=3, seed=1)
        assert [t.params for t in far.trials] == [t.params for t in near.trials]
        assert [t.values for t in far.trials] == [t.values for t in near.trials]
    finally:
        ended(server)
    kept = tune(parse("hpa"), SCENARIO, [WORLDS[:2]], trials=3, seed=1, storage=behind)
    assert [t.params for t in kept.trials] == [t.params for t in near.trials]


def test_who_loses_the_race_for_the_tables_of_a_database_opens_what_the_other_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, opened, real = f"sqlite:///{tmp_path / 'study.db'}", [], optuna.storages.RDBStorage

    class Raced(real):  # type: ignore[misc, valid-type]
        def __init__(self, url: str) -> None:
            opened.append(url)
            super().__init__(url)
            if len(opened) == 1:  # somebody else was quicker
                raise sqlalchemy.exc.ProgrammingError("CREATE TABLE studies", {}, Exception("it exists"))

    monkeypatch.setattr(optuna.storages, "RDBStorage", Raced)
    study = tune(parse("hpa"), SCENARIO, [WORLDS[:2]], trials=2, storage=url)
    assert (len(opened), len(study.trials)) == (2, 2)
    monkeypatch.setattr(optuna.storages, "RDBStorage", real)
    with pytest.raises(SpecError, match="cannot be opened"):
        tune(parse("hpa"), SCENARIO, [WORLDS[:2]], trials=2, storage=f"sqlite:///{tmp_path / 'no' / 'x.db'}")


@pytest.mark.parametrize(
    ("url", "why"), [("journal:/no/such/folder/x.log", "does not exist"), ("grpc://host", "no host and port")]
)
def test_storages_that_are_none(url: str, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        storage_of(url)


def test_a_database_that_does_not_answer_says_so_without_its_password() -> None:
    with pytest.raises(SpecError, match="cannot be opened") as caught:
        tune(parse("hpa"), SCENARIO, [WORLDS], trials=1, storage="nosuch://user:hunter2@127.0.0.1/x")
    assert "hunter2" not in str(caught.value)
