"""The algorithms of stable-baselines3 that learn a correction: fresh models, and what they learned as plain numbers.

PPO (Schulman et al. 2017), SAC (Haarnoja et al. 2018) and TQC (Kuznetsov et al. 2020) say the corrections as numbers,
and so does PPO with a memory (an LSTM, as in `sb3_contrib`), which is exported with it. QR-DQN (Dabney et al. 2018) and
MaskablePPO (Huang & Ontañón 2022) choose among `choices`; the latter among those that the guard's limits leave. Every
model starts from the base: the first choice, and a last layer of zeros, are the base itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, MaskablePPO, RecurrentPPO
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from pilotage.control.learned import Base, Choices, Learned, contract
from pilotage.control.network import Memory, Network

ALGORITHMS: Final[dict[str, Any]] = {
    "ppo": PPO,
    "sac": SAC,
    "tqc": TQC,
    "recurrent-ppo": RecurrentPPO,
    "qr-dqn": QRDQN,
    "maskable-ppo": MaskablePPO,
}
DISCRETE: Final = ("qr-dqn", "maskable-ppo")
ON_POLICY: Final = ("ppo", "recurrent-ppo", "maskable-ppo")
_FIRST: Final = 2.0  # logit of the base before MaskablePPO learns: about a fifth of its first actions
_QUANTILES: Final = 25


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to train. The defaults are those of every experiment here unless its file says otherwise."""

    algo: str = "ppo"
    steps: int = 400_000
    worlds: int = 64
    rollout_ticks: int = 128
    epochs: int = 8
    minibatches: int = 8
    gradient_steps: int = 4  # of SAC, TQC and QR-DQN, after every step of all worlds
    learning_rate: float = 1e-3  # falls linearly to zero
    discount: float = 0.98  # at ticks of 15 s, what is 9 minutes away counts for half
    gae_lambda: float = 0.9
    entropy: float = 0.0
    clip: float = 0.2
    log_std: float = -1.7  # exploration starts small: one missed spike costs hundreds of ordinary ticks
    explored: float = 0.1  # share of QR-DQN's actions that are chosen by chance; falls to a tenth of it
    hidden: tuple[int, ...] = (64, 64)
    memory: int = 32  # units of a recurrent policy's LSTM
    evaluations: int = 10
    seed: int = 0


def choices(base: Base) -> tuple[tuple[float, ...], ...]:
    """The corrections among which a discrete policy chooses, the least first: zero is the base itself."""
    levels: dict[str, tuple[float, ...]] = {"batch": (0.0, -1 / 3)}
    _, actions = contract(base)
    grid = [
        levels.get(name, (-1.0, -0.4, 0.0, 0.4, 1.0) if k == 0 else (-1.0, 0.0, 1.0))
        for k, name in enumerate(actions)
    ]
    return tuple(sorted(product(*grid), key=lambda one: (sum(x * x for x in one), one)))


class Chosen(VecEnvWrapper):
    """A vector environment in which the number of a choice is the action, with the masks of the guard's limits."""

    def __init__(self, venv: VecEnv, of: Sequence[Sequence[float]]) -> None:
        self._choices = np.array(of, np.float32)
        super().__init__(venv, action_space=spaces.Discrete(len(self._choices)))

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_async(self, actions: np.ndarray) -> None:
        self.venv.step_async(self._choices[actions])

    def step_wait(self) -> VecEnvStepReturn:
        return self.venv.step_wait()

    def action_masks(self) -> np.ndarray:
        """Which choices the guard's limits leave; bool of shape (environments, choices)."""
        masks: np.ndarray = self.venv.get_attr("allowed")[0](self._choices)
        return masks

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        if attr_name == "action_masks":
            return [self.action_masks] * self.num_envs
        return super().get_attr(attr_name, indices)

    def has_attr(self, attr_name: str) -> bool:
        return attr_name == "action_masks" or bool(super().has_attr(attr_name))

    def env_method(
        self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        if method_name == "action_masks":
            return list(self.action_masks())
        return super().env_method(method_name, *args, indices=indices, **kwargs)


def fresh(settings: Settings, env: VecNormalize, log: Path) -> BaseAlgorithm:
    """A model that has learned nothing: what it would do is the base itself."""
    common: dict[str, Any] = {
        "learning_rate": lambda left: settings.learning_rate * left,
        "gamma": settings.discount,
        "seed": settings.seed,
        "device": "cpu",
        "tensorboard_log": str(log),
    }
    shape: dict[str, Any] = {"activation_fn": torch.nn.Tanh}
    hidden = list(settings.hidden)
    if settings.algo in ON_POLICY:
        shape["net_arch"] = {"pi": hidden, "vf": hidden}
        if settings.algo not in DISCRETE:
            shape["log_std_init"] = settings.log_std
        if settings.algo == "recurrent-ppo":
            shape["lstm_hidden_size"] = settings.memory
        common |= {
            "n_steps": settings.rollout_ticks,
            "batch_size": max(1, settings.rollout_ticks * env.num_envs // settings.minibatches),
            "n_epochs": settings.epochs,
            "gae_lambda": settings.gae_lambda,
            "clip_range": settings.clip,
            "ent_coef": settings.entropy,
        }
    else:
        common |= {
            "buffer_size": min(settings.steps, 500_000),
            "learning_starts": settings.rollout_ticks * env.num_envs,
            "batch_size": 512,
            "gradient_steps": settings.gradient_steps,
        }
        if settings.algo in DISCRETE:
            shape |= {"net_arch": hidden, "n_quantiles": _QUANTILES}
            common |= {
                "train_freq": 1,
                "target_update_interval": 10 * env.num_envs,
                "exploration_initial_eps": settings.explored,
                "exploration_final_eps": settings.explored / 10,
                "exploration_fraction": 1.0,
            }
        else:
            shape["net_arch"] = {"pi": hidden, "qf": hidden}
            # no reward for noise: exploration is as small as it begins, for one missed spike costs hundreds of ticks
            common["ent_coef"] = settings.entropy
    policy = "MlpLstmPolicy" if settings.algo == "recurrent-ppo" else "MlpPolicy"
    model: BaseAlgorithm = ALGORITHMS[settings.algo](policy, env, policy_kwargs=shape, **common)
    with torch.no_grad():
        for layer in _last(model):
            layer.weight.zero_()
            layer.bias.zero_()
        if settings.algo in ("sac", "tqc"):
            model.policy.actor.log_std.bias.fill_(settings.log_std)
        if settings.algo == "maskable-ppo":
            model.policy.action_net.bias[0] = _FIRST
    return model


def _last(model: BaseAlgorithm) -> list[Any]:
    """The layers whose zeros make the base of a model."""
    policy: Any = model.policy
    if isinstance(model, QRDQN):
        return [policy.quantile_net.quantile_net[-1], policy.quantile_net_target.quantile_net[-1]]
    if isinstance(model, PPO | MaskablePPO | RecurrentPPO):
        return [policy.action_net]
    return [policy.actor.mu, policy.actor.log_std]


def network(model: BaseAlgorithm, env: VecNormalize) -> Network:
    """The deterministic policy of a model as plain numbers, its input normalisation and memory included.

    Of QR-DQN, the mean of the quantiles, which is a linear layer like any other.
    """
    policy: Any = model.policy
    if isinstance(model, QRDQN):
        *hidden, last = policy.quantile_net.quantile_net
        count = int(model.action_space.n)
        shape = (policy.quantile_net.n_quantiles, count)
        out = (last.weight.view(*shape, -1).mean(dim=0), last.bias.view(*shape).mean(dim=0))
    elif isinstance(model, SAC | TQC):
        hidden, out = policy.actor.latent_pi, (policy.actor.mu.weight, policy.actor.mu.bias)
    else:
        hidden, out = policy.mlp_extractor.policy_net, (policy.action_net.weight, policy.action_net.bias)
    layers = [*((m.weight, m.bias) for m in hidden if isinstance(m, torch.nn.Linear)), out]
    memory = None
    if isinstance(model, RecurrentPPO):
        lstm = policy.lstm_actor
        memory = Memory(
            inputs=_rows(lstm.weight_ih_l0),
            recurrent=_rows(lstm.weight_hh_l0),
            bias=_row(lstm.bias_ih_l0 + lstm.bias_hh_l0),
        )
    return Network(
        mean=tuple(env.obs_rms.mean.tolist()),
        scale=tuple(np.sqrt(env.obs_rms.var + env.epsilon).tolist()),
        clip=env.clip_obs,
        weights=tuple(_rows(weight) for weight, _ in layers),
        biases=tuple(_row(bias) for _, bias in layers),
        squashed=isinstance(model, SAC | TQC),
        memory=memory,
    )


def _row(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(values.detach().numpy().astype(float).tolist())


def _rows(values: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(_row(row) for row in values)


def exported(model: BaseAlgorithm, env: VecNormalize, base: Base) -> Learned:
    """What a model would do, as the policy that ships."""
    discrete, masked = isinstance(model, QRDQN | MaskablePPO), isinstance(model, MaskablePPO)
    among = Choices(options=choices(base), masked=masked) if discrete else None
    return Learned(base=base, network=network(model, env), choices=among)
