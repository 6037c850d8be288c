"""A stranger's model: what plain stable-baselines3 saved decides the same as a policy of ours, and runs nothing."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="needs the extra `learn`")

import stable_baselines3 as sb3
import torch

import pilotage.env  # noqa: F401  (registers the environments)
from pilotage.agents.saved_model import read_model
from pilotage.control.scaling import parse
from pilotage.world.spec import SpecError


def saved(path: Path, algorithm: str = "PPO", **options: Any) -> Any:
    torch.set_num_threads(1)
    env = gymnasium.make("pilotage/quickstart-v0")
    steps = {"PPO": {"n_steps": 64, "batch_size": 32}, "A2C": {"n_steps": 16}}.get(algorithm, {})
    model = getattr(sb3, algorithm)("MlpPolicy", env, seed=0, device="cpu", **steps, **options)
    model.learn(64)
    model.save(path)
    return model


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [("PPO", {}), ("A2C", {"policy_kwargs": {"net_arch": [16]}})],
    ids=["ppo", "a2c"],
)
def test_it_says_what_the_model_says(algorithm: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = saved(tmp_path / "model.zip", algorithm, **options)
    seen = np.random.default_rng(1).normal(size=(1000, 28)).astype(np.float32)
    expected, _ = model.predict(seen, deterministic=True)
    found = np.clip(read_model(tmp_path / "model.zip").network.forward()(seen), -1, 1)
    assert np.abs(found - expected).max() < 1e-5
    assert np.ptp(expected, axis=0).min() > 1e-3  # it says different things


@pytest.mark.parametrize(
    ("algorithm", "options", "says"),
    [
        ("PPO", {"policy_kwargs": {"activation_fn": torch.nn.ReLU}}, "ReLU.*valid: torch.nn.Tanh"),
        ("PPO", {"use_sde": True}, "use_sde"),
        ("SAC", {"buffer_size": 100, "learning_starts": 1000}, "valid: a model with"),
    ],
)
def test_other_kinds_are_named(algorithm: str, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    saved(tmp_path / "model.zip", algorithm, **options)
    with pytest.raises(SpecError, match=says):
        read_model(tmp_path / "model.zip")


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_nothing_of_it_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    weights = io.BytesIO()
    torch.save(Evil(mark), weights)
    data = json.dumps({"policy_class": {":serialized:": pickle.dumps(Evil(mark)).hex()}}).encode()
    for content in (weights.getvalue(), pickle.dumps(Evil(mark))):
        path = archive(tmp_path / "evil.zip", {"data": data, "policy.pth": content})
        with pytest.raises(SpecError, match="not a saved model"):
            read_model(path)
    assert not mark.exists()
    torch.load(io.BytesIO(weights.getvalue()), weights_only=False)
    assert mark.exists()  # it would have been


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({}, "has no data"),
        ({"data": b"{}"}, "has no policy.pth"),
        ({"data": b"[" * 100_000, "policy.pth": b""}, "not a saved model"),
        ({"data": b"{}", "policy.pth": b"\0" * (65 * 2**20)}, "valid: at most"),
    ],
)
def test_broken_and_enormous_files_are_refused(members: dict[str, bytes], says: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=says):
        read_model(archive(tmp_path / "model.zip", members))
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(SpecError, match="not a saved model"):
        read_model(tmp_path / "text.zip")
    with pytest.raises(SpecError, match="cannot be read"):
        read_model(tmp_path / "nowhere.zip")


def test_a_policy_argument_says_how_to_make_one() -> None:
    with pytest.raises(SpecError, match=r"pilotage export model\.zip"):
        parse("model.zip")
