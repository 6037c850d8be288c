"""The built wheel is complete: in an empty environment it simulates a shipped scenario, or just runs a bundle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
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
    assert {"pilotage/report.html.j2", "pilotage/leaderboard.html.j2", "pilotage/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "experiments", "results"))]


def installed(wheel: Path, extra: str, home: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program of a fresh environment that holds the wheel with one extra, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", home / "venv"], check=True)
    bin_ = home / "venv" / "bin"
    subprocess.run([bin_ / "pip", "install", "--quiet", f"{wheel}[{extra}]"], check=True, capture_output=True)
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PILOTAGE_DATA"}}

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [bin_ / program, *map(str, arguments)],
            cwd=home,
            env=env,
            capture_output=True,
            text=True,
            timeout=900,
        )

    return run


@pytest.mark.full
def test_the_wheel_simulates_the_quickstart(wheel: Path, tmp_path: Path) -> None:
    run = installed(wheel, "sim", tmp_path)
    done = run("pilotage", "simulate", "quickstart", "--policy", "hpa", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["requests"] > 100_000
    refused = run("pilotage", "tune", "quickstart", "--policy", "hpa")
    assert refused.returncode == 2
    assert "pip install 'pilotage[learn]'" in refused.stderr


@pytest.mark.full
def test_the_live_extra_runs_bundles_without_simulator_and_trainers(wheel: Path, tmp_path: Path) -> None:
    from pilotage.agents.export import export
    from pilotage.control.learned import policy_from
    from pilotage.scenario import load

    scenario = load("quickstart").replace(horizon_h=0.25)
    for name in ("hpa", "learned"):
        export(policy_from(name), tmp_path / name, [scenario], runs=1)
    run = installed(wheel, "live", tmp_path)
    packages = {row.partition("==")[0].lower() for row in run("pip", "freeze").stdout.splitlines()}
    assert not packages & {"torch", "numba", "gymnasium", "llvmlite", "stable-baselines3", "pandas", "optuna"}
    assert "onnxruntime" in packages
    for name in ("hpa", "learned"):
        done = run("pilotage", "verify", name, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["signed"] is False
    script = """
import numpy as np
from pilotage.control.learned import policy_from
from pilotage.control.policy import FEATURES, Observation, Situation
from pilotage.scenario import load
s = load("quickstart")
policy = policy_from("learned")
for policy in (policy_from("./hpa"), policy_from("./learned")):
    together = policy.begin_together([Situation(s.services[0], s.pool_by_name, s.tick_s, np.full(240, 20.0))] * 20)
    seen = Observation(0.0, np.ones(len(FEATURES)), np.zeros(len(FEATURES)))
    print(len({(d.order, d.release) for d in together.decide([seen] * 20)}))
"""
    done = run("python", "-c", script)
    assert done.stdout.split() == ["1", "1"], done.stderr
    refused = run("pilotage", "simulate", "quickstart", "--policy", "hpa")
    assert refused.returncode == 2
    assert "pip install 'pilotage[sim]'" in refused.stderr
    refused = run("pilotage", "verify", "nowhere")
    assert refused.returncode == 3
