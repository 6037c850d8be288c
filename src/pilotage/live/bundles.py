"""Bundles in MLflow: a registered model with its signature and lineage, and its way back, without a pickle.

What is registered is the bundle's folder as it is, under an `MLmodel` whose Python function is loaded by this module:
measurements of successive ticks in, decisions out, for the service of the bundle's self-test. A process that steers
downloads the folder and opens it with `control.bundle.open_bundle`, which trusts nothing that it finds there.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from pilotage import __version__
from pilotage.control.bundle import SELFTEST, Bundle, open_bundle
from pilotage.control.policy import FEATURES, Observation
from pilotage.control.selftest import Ordered, SelfTest
from pilotage.live.mlflow_server import MlflowServer
from pilotage.live.registries import service_name
from pilotage.world.spec import decode

DIGEST: Final = "pilotage.bundle"  # the tag that holds the hash of the manifest
_FOLDER: Final = "bundle"
_DECISION: Final = {"order": "long", "release": "long", "max_batch": "long"}


def register(bundle: Bundle, url: str, name: str, run_id: str | None = None) -> str:
    """Registers a bundle on an MLflow server; `run_id` is the run that trained the policy (None: one is made).

    Returns `models:/NAME/VERSION`. The same bundle under the same name is registered once. Raises RegistryError.
    """
    server: MlflowServer = decode(
        {"kind": "mlflow", "url": url, "timeout_s": 30.0}, MlflowServer, "--register"
    )
    return server.ask(lambda client: _register(client, bundle, service_name(name), run_id))


def _register(client: Any, bundle: Bundle, name: str, run_id: str | None) -> str:
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for known in client.search_model_versions(f"name = '{name}' and tag.`{DIGEST}` = '{bundle.digest}'"):
        return f"models:/{name}/{known.version}"
    if run_id is None:
        experiment = client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else client.create_experiment(name)
        run = client.create_run(where, run_name="pilotage export")
    else:
        run = client.get_run(run_id)
    tags = {
        DIGEST: bundle.digest,
        "pilotage.policy": bundle.manifest.policy[:500],
        "pilotage.signed": str(bundle.signed is not False).lower(),
    }
    provenance = {k: str(v) for k, v in bundle.manifest.provenance.items() if v is not None}
    model = client.create_logged_model(
        run.info.experiment_id, name=f"bundle-{bundle.digest[:12]}", source_run_id=run.info.run_id,
        params=provenance, tags=tags,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_model(bundle, Path(folder), run.info.run_id, model.model_id)
        client.log_model_artifacts(model.model_id, folder)
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, 0)])
    client.finalize_logged_model(model.model_id, "READY")
    for one in bundle.manifest.evaluation:
        client.log_metric(run.info.run_id, f"saving/{one.env}", one.saving)
        client.log_metric(run.info.run_id, f"total_usd/{one.env}", one.total_usd)
    if run_id is None:
        client.set_terminated(run.info.run_id)
    version = client.create_model_version(
        name, f"models:/{model.model_id}", run.info.run_id, tags=tags, model_id=model.model_id,
        description=bundle.card[:5000], await_creation_for=0,
    )  # fmt: skip
    return f"models:/{name}/{version.version}"


def write_model(bundle: Bundle, folder: Path, run_id: str, model_id: str) -> None:
    """An MLflow model around a bundle; JSON is YAML, too."""
    import mlflow

    shutil.copytree(bundle.path, folder / _FOLDER)
    requirements = f"pilotage[live]=={__version__}\npandas\n"
    (folder / "requirements.txt").write_text(requirements)
    now = {"name": "now_s", "type": "double", "required": True}
    inputs = [now, *({"name": f.name, "type": "double", "required": False} for f in FEATURES)]
    outputs = [{"name": n, "type": t, "required": n != "max_batch"} for n, t in _DECISION.items()]
    outputs.append({"name": "reason", "type": "string", "required": True})
    model = {
        "flavors": {
            "python_function": {
                "loader_module": __name__,
                "data": _FOLDER,
                "python_version": platform.python_version(),
            }
        },
        "metadata": {"bundle": bundle.digest, "schema": bundle.manifest.schema},
        "mlflow_version": mlflow.__version__,
        "model_id": model_id,
        "model_uuid": uuid.uuid4().hex,
        "run_id": run_id,
        "signature": {"inputs": json.dumps(inputs), "outputs": json.dumps(outputs), "params": None},
        "utc_time_created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }
    (folder / "MLmodel").write_text(json.dumps(model, indent=1) + "\n")


class Replay:
    """A bundle as MLflow's Python function: what it decides on measurements of successive ticks, from a fresh start."""

    def __init__(self, bundle: Bundle) -> None:
        self._policy = bundle.policy
        selftest = msgspec.json.decode((bundle.path / SELFTEST).read_bytes(), type=SelfTest)
        self._situation = selftest.cases[0].situation

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """A frame with a row per tick: `now_s` and any of the features; what is not there is missing."""
        import pandas as pd

        controller, rows = self._policy.begin(self._situation), []
        for _, row in model_input.iterrows():
            values = np.array([row.get(f.name, np.nan) for f in FEATURES], float)
            decision = controller.decide(Observation(float(row["now_s"]), values, np.zeros(len(FEATURES))))
            ordered = Ordered.of(decision)
            rows.append({name: getattr(ordered, name) for name in _DECISION} | {"reason": decision.reason})
        return pd.DataFrame(rows).astype({"max_batch": "Int64"})


def _load_pyfunc(path: str) -> Replay:
    return Replay(open_bundle(path))
