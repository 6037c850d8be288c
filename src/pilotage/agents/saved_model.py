"""A model that somebody else trained with plain stable-baselines3, as a policy of ours.

`model.save("model.zip")` writes JSON, weights, and pickles within the JSON. Only the plain part of the JSON and the
weights are read, so that opening a stranger's file runs nothing of it. Read are deterministic policies of
`ActorCriticPolicy` (PPO, A2C, TRPO with `"MlpPolicy"`) with tanh layers, trained on `pilotage/<env>-v0` as it comes: a
correction of `predictive`, whose observations are neither normalised nor stacked. (The statistics of SB3's
`VecNormalize` are a pickle of their own; observations are of order one without it.)
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Final

import torch

from pilotage.control.learned import Learned, contract
from pilotage.control.network import Network
from pilotage.control.scaling import Predictive
from pilotage.env import OBSERVATION_LIMIT
from pilotage.world.spec import SpecError

_LARGEST: Final = {"data": 16 * 2**20, "policy.pth": 64 * 2**20}
_LAYER: Final = re.compile(r"mlp_extractor\.policy_net\.(\d+)\.weight")


def read_model(path: Path) -> Learned:
    """The deterministic policy of a saved model. Raises SpecError: what is not readable, or not of the kind above."""
    try:
        with zipfile.ZipFile(path) as archive:
            data, weights = (_member(archive, name, path) for name in _LARGEST)
        plain: Any = json.loads(data)
        state = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise SpecError(f"{path}: not a saved model of stable-baselines3: {reason}") from None
    _check(plain, path)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise SpecError(f"{path}: policy.pth holds something other than weights")
    order = sorted(int(match[1]) for name in state if (match := _LAYER.fullmatch(name)))
    names = [*(f"mlp_extractor.policy_net.{k}" for k in order), "action_net"]
    try:
        layers = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names]
    except KeyError as error:
        raise SpecError(
            f'{path}: has no weights {error}; valid: a model with "MlpPolicy" of PPO, A2C or TRPO'
        ) from None
    observations, _ = contract(Predictive())
    inputs = len(observations)
    return Learned(
        base=Predictive(),
        network=Network(
            mean=(0.0,) * inputs,
            scale=(1.0,) * inputs,
            clip=OBSERVATION_LIMIT,
            weights=tuple(tuple(map(tuple, weight.double().tolist())) for weight, _ in layers),
            biases=tuple(tuple(bias.double().tolist()) for _, bias in layers),
        ),
    )


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    try:
        size = archive.getinfo(name).file_size
    except KeyError:
        raise SpecError(f"{path}: has no {name}, so it is no saved model of stable-baselines3") from None
    if size > _LARGEST[name]:
        raise SpecError(f"{path}: {name} has {size:,} bytes; valid: at most {_LARGEST[name]:,}")
    with archive.open(name) as file:
        return file.read(_LARGEST[name] + 1)[: _LARGEST[name]]


def _check(plain: Any, path: Path) -> None:
    """Refuses what the weights alone would not give away."""
    if not isinstance(plain, dict):
        raise SpecError(f"{path}: its data are not those of a model")
    given = plain.get("policy_kwargs") or {}
    given = given if isinstance(given, dict) else {}
    activation = str(given.get("activation_fn", "Tanh"))
    if not re.search(r"\bTanh\b", activation):
        raise SpecError(
            f"{path}: layers with {activation}; valid: torch.nn.Tanh, the default of PPO's MlpPolicy"
        )
    if plain.get("use_sde"):
        raise SpecError(f"{path}: trained with use_sde; valid: without state-dependent exploration")
