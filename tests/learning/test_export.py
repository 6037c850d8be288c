"""What stable-baselines3 learned, and its bundle: the same outputs, and the same choices."""

from __future__ import annotations

from pathlib import Path

import pytest

from pilotage.scenario import load

pytest.importorskip("stable_baselines3")
pytest.importorskip("onnxruntime")
parity = pytest.importorskip("experiments.export.parity")

SCENARIO = load("quickstart").replace(horizon_h=0.25)


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_a_bundle_decides_as_the_sb3_policy(algo: str, tmp_path: Path) -> None:
    one = parity.trained(SCENARIO, algo, 4096, seed=3, out=tmp_path / "bundle")
    for row in parity.compared(one, 10_000, seed=5):
        assert row["count"] == 10_000
        assert row["largest_difference"] < 1e-5, row
        assert row["same_choice"] >= 0.9999, row
        assert row["largest_output"] > 0.1  # it has learned something
