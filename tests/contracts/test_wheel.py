"""The built wheel is complete: installed alone into an empty environment it simulates a shipped scenario."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", out, ROOT], check=True, capture_output=True
    )
    return next(out.glob("*.whl"))


@pytest.mark.full
def test_the_wheel_holds_environments_and_template(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for path in (ROOT / "envs").glob("*.toml"):
        assert f"pilotage/envs/{path.name}" in names
    assert "pilotage/report.html.j2" in names
    assert not [name for name in names if name.startswith(("tests", "experiments", "results"))]


@pytest.mark.full
def test_the_wheel_alone_simulates_the_quickstart(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    bin_ = tmp_path / "venv" / "bin"
    subprocess.run([bin_ / "pip", "install", "--quiet", wheel], check=True, capture_output=True)
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PILOTAGE_DATA"}}
    done = subprocess.run(
        [bin_ / "pilotage", "simulate", "quickstart", "--policy", "hpa", "--json"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["requests"] > 100_000
    refused = subprocess.run(
        [bin_ / "pilotage", "tune", "quickstart", "--policy", "hpa"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "pip install 'pilotage[learn]'" in refused.stderr
