"""What a registry knows of versions goes into a calibrated scenario: from a folder, and from a real MLflow server."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest

from pilotage.live.calibrate import Fleet, Known
from pilotage.live.generations import generations
from pilotage.live.history import Prometheus
from pilotage.live.mlflow_server import MlflowServer
from pilotage.live.registries import Folder, Measure, Registry, Version
from pilotage.rehearse import service_of
from pilotage.world.drift import Decay, NoDrift
from pilotage.world.lifecycle import Lifecycle, Training
from pilotage.world.pools import Pool
from tests.live.test_calibrate import fit, history

EXAMPLES = 4000
ERRORS = (0.100, 0.104, 0.098, 0.102, 0.160, 0.101, 0.097)  # the fifth is worse


@pytest.fixture(params=["folder", "mlflow"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    if request.param == "folder":
        return Folder(path=str(tmp_path / "registry"))
    return MlflowServer(url=request.getfixturevalue("mlflow_server").url, timeout_s=30)


def filled(registry: Registry, errors: tuple[float, ...] = ERRORS) -> str:
    """A model whose versions 1, 3 and 7 have been promoted, in that order."""
    model = f"ranker-{uuid.uuid4().hex[:8]}"
    for k, error in enumerate(errors):
        measure = Measure(value=1 - error, n=EXAMPLES)
        registry.add(Version(service=model, metrics={"accuracy": measure}), f"key {k}")
    if len(errors) == len(ERRORS):
        for before, to in ((None, "1"), ("1", "3"), ("3", "7")):
            registry.move(model, "champion", before, to, fence=1, key=f"promotion of {to}")
    return model


def fleet(registry: Registry | None, known: Known) -> Fleet:
    source = Prometheus(url="http://127.0.0.1:9090", start="2020-01-01", end="2020-01-08")
    return Fleet(
        prometheus=source,
        pools=(Pool(name="cpu", price_usd_per_hour=1.0),),
        services=(known,),
        registry=registry,
    )


def test_versions_metrics_and_promotions_reach_the_scenario(registry: Registry) -> None:
    model = filled(registry)
    life = Lifecycle(
        decay=Decay(drift=NoDrift(), base_error=0.3, worst_error=0.5),
        training=Training(pool="cpu", hours=2.0),
    )
    asked = Known(name="ranker", slo_ms=200.0, pool="cpu", model=model, lifecycle=life)
    known, found = fleet(registry, asked).known(asked)
    assert found is not None
    assert (found.live, found.versions, found.promoted) == ("7", 7, ("1", "3", "7"))
    assert found.accuracy is not None
    assert found.accuracy[0] == pytest.approx(0.903)
    assert found.accuracy[1] < 0.903 < found.accuracy[2]
    assert found.accuracy[2] - found.accuracy[1] == pytest.approx(
        3.92 * np.sqrt(0.097 * 0.903 / EXAMPLES), rel=0.02
    )
    usual = [e for e in ERRORS if e < 0.12]
    assert found.base_error is not None
    assert found.base_error[0] == pytest.approx(np.mean(usual))
    assert found.luck_cv == pytest.approx(0.0, abs=0.03)  # chance alone makes them differ by 5 %
    assert found.worse is not None
    assert found.worse[0] == pytest.approx(1 / 7)
    assert found.worse_by == pytest.approx(0.160 / 0.101)
    assert found.notes == ()
    recorded = history()
    service = service_of(known, recorded, fit(recorded, 0.2))
    assert service.variants[0].accuracy == pytest.approx(0.903)
    assert service.lifecycle is not None
    assert service.lifecycle.decay.base_error == pytest.approx(np.mean(usual))
    assert service.lifecycle.decay.worst_error == 0.5
    assert service.lifecycle.training.worse == pytest.approx(1 / 7)
    assert service.lifecycle.training.hours == 2.0


def test_what_a_registry_does_not_know_is_said(registry: Registry) -> None:
    model = filled(registry, (0.1, 0.2))
    registry.add(Version(service=model, metrics={"rmse": Measure(value=3.0)}), "another")
    found = generations(registry, model, "accuracy", 0.0, 4e9)
    notes = " ".join(found.notes)
    assert "what is live is not known" in notes
    assert "1 of 3 versions have no 'accuracy'" in notes
    assert found.base_error is found.worse is found.accuracy is None
    registry.move(model, "champion", None, "2", fence=1, key="now")
    found = generations(registry, model, "accuracy", 0.0, 4e9)
    assert "version 2 was made and promoted within the history" in " ".join(found.notes)
    assert "no model 'nobody'" in generations(registry, "nobody", "accuracy", 0.0, 1.0).notes[0]


def test_the_file_of_a_fleet_wins_over_the_registry(tmp_path: Path) -> None:
    registry = Folder(path=str(tmp_path))
    asked = Known(name="ranker", slo_ms=200.0, pool="cpu", model=filled(registry), accuracy=0.5)
    assert fleet(registry, asked).known(asked)[0].accuracy == 0.5
    assert fleet(None, asked).known(asked) == (asked, None)
    assert fleet(Folder(path=str(tmp_path)), asked.replace(model="nobody", accuracy=None)).known(
        asked.replace(model="nobody", accuracy=None)
    )[0].accuracy is None  # fmt: skip
