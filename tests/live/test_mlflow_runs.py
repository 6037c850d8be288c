"""Trainings, searches and studies as runs of a real MLflow server; without the option nothing is sent anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pilotage.live.mlflow_runs import MlflowRun
from pilotage.world.spec import SpecError
from tests.live.conftest import Server, free_port, proxy


def pilotage(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pilotage", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def client(mlflow_server: Server) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(mlflow_server.url, mlflow_server.url)


def only(client: Any, experiment: str, words: str) -> Any:
    """The run of an experiment whose name contains these words."""
    known = client.get_experiment_by_name(experiment)
    found = [run for run in client.search_runs([known.experiment_id]) if words in run.info.run_name]
    assert len(found) == 1
    return found[0]


def test_a_training_is_a_run(mlflow_server: Server, client: Any, tmp_path: Path) -> None:
    done = pilotage(
        "train", "steady", "--steps", "4096", "--worlds", "8", "--hours", "0.2", "--out", "mine",
        "--mlflow", mlflow_server.url, "--json", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["policy"] == "mine"  # stdout is still one object
    run = only(client, "pilotage/steady", "train ppo")
    assert f"MLflow: run {run.info.run_id}" in done.stderr
    assert run.info.status == "FINISHED"
    assert run.data.params["steps"] == "4096"
    assert run.data.params["base"] == "predictive"
    lines = (tmp_path / "mine" / "learning_curve.csv").read_text().splitlines()[1:]
    kept = client.get_metric_history(run.info.run_id, "validation_usd")
    assert [(m.step, repr(m.value)) for m in sorted(kept, key=lambda m: m.step)] == [
        (int(line.split(",")[0]), line.split(",")[1]) for line in lines
    ]
    files = {one.path for one in client.list_artifacts(run.info.run_id)}
    assert files == {"policy.json", "learning_curve.csv"}


def test_a_search_is_a_run_and_so_is_every_trial(mlflow_server: Server, client: Any, tmp_path: Path) -> None:
    done = pilotage(
        "tune", "quickstart", "--policy", "hpa", "--trials", "3", "--seeds", "1", "--hours", "0.2",
        "--mlflow", mlflow_server.url, "--json", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = only(client, "pilotage/quickstart", "tune hpa")
    assert run.info.status == "FINISHED"
    below = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    assert sorted(one.info.run_name for one in below) == ["trial 0", "trial 1", "trial 2"]
    assert all(one.data.params and one.info.status == "FINISHED" for one in below)
    best = json.loads(done.stdout)["best"][0]["usd"]
    assert run.data.metrics["best_usd"] == min(one.data.metrics["usd"] for one in below) == best


STUDY = """
title = "A small one"
question = "Is it kept?"
env = "quickstart"
horizon_h = 0.2
policies = ["hpa", "predictive"]
bound = false
groups = [{name = "only", test = {count = 2}}]
"""


def test_a_study_is_a_run_with_its_report(mlflow_server: Server, client: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    (tmp_path / "small.toml").write_text(STUDY)
    done = pilotage(
        "study", "small.toml", "--out", "found", "--mlflow", mlflow_server.url, "--json", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    run = only(client, "pilotage/studies", "small")
    assert run.data.params["title"] == "A small one"
    rows = {row["policy"]: row for row in json.loads(done.stdout)[0]["policies"]}
    assert set(rows) == {"hpa", "predictive"}
    for policy, row in rows.items():
        assert run.data.metrics[f"only/{policy}/total_usd"] == row["total_usd"]["mean"]
    files = {one.path for one in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "run.json", "table.csv", "figures"} <= files
    assert "work" not in files


def test_a_server_that_goes_away_costs_no_work(mlflow_server: Server, client: Any, tmp_path: Path) -> None:
    away: list[bool] = [False]
    (tmp_path / "policy.json").write_text("{}")
    with proxy(mlflow_server.port, lambda method, path: (503, b"{}") if away[0] else None) as url:
        with MlflowRun(url, "away", "comes back", {"token": "s3cret", "deep": {"er": [1, 2]}}) as run:
            run.metrics([("usd", 1.0, 1)])
            away[0] = True
            run.metrics([("usd", 2.0, 2)])
            run.metrics([("usd", 3.0, 3)])
            away[0] = False
        assert run.lost is None  # it was there again at the end
        kept = client.get_run(run.id)
        assert kept.data.params == {"token": "[withheld]", "deep.er": "[1, 2]"}
        assert [m.value for m in client.get_metric_history(run.id, "usd")] == [1.0, 2.0, 3.0]
        with MlflowRun(url, "away", "stays away", {}) as run:
            away[0] = True
            run.metrics([("usd", 2.0, 2)])
            run.files(tmp_path, [tmp_path / "policy.json"])
            run.part("trial", {}, {})
        assert run.lost is not None
        assert "503" in run.lost


def test_a_run_that_fails_is_called_failed(mlflow_server: Server, client: Any) -> None:
    with pytest.raises(ZeroDivisionError), MlflowRun(mlflow_server.url, "fails", "one", {}) as run:
        1 / 0  # noqa: B018
    assert client.get_run(run.id).info.status == "FAILED"


def test_a_server_that_is_not_there_ends_it_before_the_work(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs the extra `live`")
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(SpecError, match="no run can be begun"):
        MlflowRun(url, "x", "y", {})
    with pytest.raises(SpecError, match="url"):
        MlflowRun("http://user:password@host", "x", "y", {})


def test_without_the_option_mlflow_is_not_loaded() -> None:
    script = (
        "import sys; from pilotage.live.mlflow_runs import MlflowRun\n"
        "with MlflowRun(None, 'a', 'b', {}) as run:\n"
        "    run.metrics([('x', 1.0, 0)]); run.part('y', {}, {}); run.files(None, [])\n"
        "print(run.id, 'mlflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["None", "False"], done.stderr
