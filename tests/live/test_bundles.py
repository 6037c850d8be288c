"""A bundle in a real MLflow server: registered with signature and lineage, and back again as it was."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import numpy as np
import pytest

from pilotage.agents.export import export
from pilotage.control.bundle import Judged, open_bundle
from pilotage.control.policy import FEATURES
from pilotage.control.scaling import Predictive
from pilotage.live.bundles import DIGEST, register
from pilotage.live.registries import MissingError, UnavailableError
from pilotage.scenario import load
from pilotage.world.spec import SpecError
from tests.live.conftest import Server, free_port

KEY = b"a key that no forger knows"
JUDGED = Judged(
    env="quickstart", hours=1.0, runs=3, usd={"nodes": 1.0}, total_usd=1.5, total_usd_low=0.9, total_usd_high=1.1,
    attainment=0.99, latency_p95_ms=200.0, baseline="hpa", saving=0.25, saving_low=0.1, saving_high=0.4,
)  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("registered") / "bundle"
    scenario = load("quickstart").replace(horizon_h=0.25, history_h=0.5)
    export(
        Predictive(), out, [scenario], judged=[JUDGED], provenance={"argument": "predictive"}, runs=1, key=KEY
    )
    return out


def test_a_bundle_comes_back_as_it_was_with_signature_and_lineage(
    mlflow_server: Server, bundle: Path, tmp_path: Path
) -> None:
    import mlflow
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_server.url, mlflow_server.url)
    name = f"scaler-{uuid.uuid4().hex[:8]}"
    training = client.create_run(client.create_experiment(name)).info.run_id
    sound = open_bundle(bundle, KEY)
    where = register(sound, mlflow_server.url, name, training)
    assert where == f"models:/{name}/1"
    assert register(sound, mlflow_server.url, name, training) == where  # once is enough
    version = client.get_model_version(name, "1")
    assert version.run_id == training
    assert version.tags[DIGEST] == sound.digest
    assert version.tags["pilotage.signed"] == "true"
    assert client.get_run(training).data.metrics["saving/quickstart"] == 0.25
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.source_run_id == training
    assert model.params["argument"] == "predictive"

    mlflow.set_tracking_uri(mlflow_server.url)
    folder = Path(mlflow.artifacts.download_artifacts(where, dst_path=str(tmp_path)))
    again = open_bundle(folder / "bundle", KEY)
    assert again.digest == sound.digest
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 7
    assert not [path for path in files if path.read_bytes()[:1] == b"\x80"]  # no pickle
    info = mlflow.models.get_model_info(where)
    assert [column.name for column in info.signature.inputs] == ["now_s", *(f.name for f in FEATURES)]
    assert info.metadata["bundle"] == sound.digest


def test_mlflow_runs_a_registered_bundle_without_a_pickle(
    mlflow_server: Server, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas as pd

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    name = f"scaler-{uuid.uuid4().hex[:8]}"
    where = register(open_bundle(bundle), mlflow_server.url, name)
    mlflow.set_tracking_uri(mlflow_server.url)
    loaded = mlflow.pyfunc.load_model(where)
    ticks = pd.DataFrame({f.name: np.ones(5) for f in FEATURES} | {"now_s": 15.0 * np.arange(5)})
    ticks["arrival_rate"] = 200.0
    found = loaded.predict(ticks.drop(columns=["utilization"]))  # what is not there is missing
    assert list(found.columns) == ["order", "release", "max_batch", "reason"]
    assert len(found) == 5
    assert found.order.max() > 0
    pd.testing.assert_frame_equal(
        found, loaded.predict(ticks.drop(columns=["utilization"]))
    )  # from a fresh start
    ticks.loc[2, "replicas_ready"] = np.nan
    assert loaded.predict(ticks).reason[2].startswith("held: replicas_ready is missing")


def test_errors_of_the_server_are_said(mlflow_server: Server, bundle: Path) -> None:
    sound = open_bundle(bundle)
    with pytest.raises(MissingError, match="not found"):
        register(sound, mlflow_server.url, "scaler", "0" * 32)
    with pytest.raises(SpecError, match="not a name"):
        register(sound, mlflow_server.url, "a/b")
    with pytest.raises(UnavailableError):
        register(sound, f"http://127.0.0.1:{free_port()}", "scaler")
    assert os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT") is None
