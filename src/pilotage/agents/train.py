"""Learning a policy with stable-baselines3.

PPO (Schulman et al. 2017), SAC (Haarnoja et al. 2018) or TQC (Kuznetsov et al. 2020) on `ServingVecEnv`: the network
corrects a base (see `control.learned`), its last layer starts at zero, so that training starts from the base and the
untrained policy is already in the running. Every so often the policy is judged on validation traffic, noise off, and
the best one is kept: what comes out is never worse there than the base it started from. With a `foresight` policy as
base, this is the fine-tuning in the engine itself, queues and noise included, of what was learned from hindsight.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from sb3_contrib import TQC
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from pilotage.agents.tune import run_groups, typical_usd
from pilotage.control.learned import Base, Learned, trained
from pilotage.control.network import Network
from pilotage.engine.cluster import World
from pilotage.env import ServingVecEnv
from pilotage.scenario import Scenario
from pilotage.world.spec import SpecError

ALGORITHMS: Final[dict[str, Any]] = {"ppo": PPO, "sac": SAC, "tqc": TQC}


class SB3VecEnv(VecEnv):
    """A vector environment as stable-baselines3 wants it; resets in the same step, as SB3 does."""

    def __init__(self, inner: VectorEnv) -> None:
        self.inner = inner
        self._actions = np.zeros(inner.action_space.shape or (), np.float32)
        self._seed: int | None = None
        super().__init__(inner.num_envs, inner.single_observation_space, inner.single_action_space)

    def reset(self) -> VecEnvObs:
        observations, _ = self.inner.reset(seed=self._seed)
        self._seed = None
        self.reset_infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, terminations, truncations, info = self.inner.step(self._actions)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        done = terminations | truncations
        for k in np.flatnonzero(done):
            cut = bool(truncations[k])
            infos[k] = {"terminal_observation": info["final_obs"][k], "TimeLimit.truncated": cut}
        return observations, rewards.astype(np.float32), done, infos

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        self._seed = seed
        return [seed] * self.num_envs

    def close(self) -> None:
        self.inner.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self.inner, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        setattr(self.inner, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        return [getattr(self.inner, method_name)(*args, **kwargs)] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to train. The defaults are those of every experiment here unless its file says otherwise."""

    algo: str = "ppo"
    steps: int = 400_000
    worlds: int = 64
    rollout_ticks: int = 128
    epochs: int = 8
    minibatches: int = 8
    gradient_steps: int = 4  # of SAC and TQC, after every step of all worlds
    learning_rate: float = 1e-3  # falls linearly to zero
    discount: float = 0.98  # at ticks of 15 s, what is 9 minutes away counts for half
    gae_lambda: float = 0.9
    entropy: float = 0.0
    clip: float = 0.2
    log_std: float = -1.7  # exploration starts small: one missed spike costs hundreds of ordinary ticks
    hidden: tuple[int, ...] = (64, 64)
    evaluations: int = 10
    seed: int = 0


def train(
    scenario: Scenario,
    base: Base,
    windows: Sequence[World],
    validation: Sequence[Sequence[World]],
    settings: Settings,
    folder: Path,
    *,
    progress: Callable[[int, float], None] | None = None,
    resume: bool = False,
) -> Learned:
    """Trains on `windows`, keeps the best policy on `validation` (windows by group), writes into `folder`.

    `folder` receives `policy.json` (the best policy, see `control.learned`), `learning_curve.csv`,
    `checkpoint.zip` with `normaliser.json` (the latest, for `resume`; SAC and TQC then begin with an empty replay
    buffer) and tensorboard events. `progress(steps,
    validation_usd)` is called after each evaluation. Returns the best policy.
    """
    if settings.algo not in ALGORITHMS:
        raise SpecError(f"algo {settings.algo!r} does not exist; valid: {', '.join(ALGORITHMS)}")
    torch.set_num_threads(1)  # small networks lose more to synchronisation than they gain
    folder.mkdir(parents=True, exist_ok=True)
    services = len(scenario.services)
    inner = ServingVecEnv(
        scenario, settings.worlds * services, windows=windows, base=base, threads=os.cpu_count() or 1
    )
    env = VecNormalize(SB3VecEnv(inner), gamma=settings.discount, clip_obs=10.0, clip_reward=50.0)
    model = _model(settings, env, folder / "tensorboard")
    curve: list[tuple[int, float, float]] = []
    checkpoint = folder / "checkpoint.zip"
    if resume and checkpoint.is_file():
        curve = _restore(model, env, folder)
    judge = _Judge(scenario, base, validation, settings, folder, curve, progress)
    left = settings.steps - model.num_timesteps
    if left > 0:
        model.learn(left, callback=judge, reset_num_timesteps=model.num_timesteps == 0, log_interval=10)
    judge.evaluate()
    env.close()
    learned = trained(folder)
    assert isinstance(learned, Learned)
    return learned


def _model(settings: Settings, env: VecNormalize, log: Path) -> BaseAlgorithm:
    """A fresh model whose mean action is zero: the base itself."""
    common: dict[str, Any] = {
        "learning_rate": lambda left: settings.learning_rate * left,
        "gamma": settings.discount,
        "seed": settings.seed,
        "device": "cpu",
        "tensorboard_log": str(log),
    }
    shape: dict[str, Any] = {"activation_fn": torch.nn.Tanh}
    model: BaseAlgorithm
    if settings.algo == "ppo":
        batch = settings.rollout_ticks * env.num_envs
        shape |= {"net_arch": {"pi": list(settings.hidden), "vf": list(settings.hidden)}}
        shape |= {"log_std_init": settings.log_std}
        model = PPO(
            "MlpPolicy",
            env,
            n_steps=settings.rollout_ticks,
            batch_size=max(1, batch // settings.minibatches),
            n_epochs=settings.epochs,
            gae_lambda=settings.gae_lambda,
            clip_range=settings.clip,
            ent_coef=settings.entropy,
            policy_kwargs=shape,
            **common,
        )
        last = [model.policy.action_net]
    else:
        shape |= {"net_arch": {"pi": list(settings.hidden), "qf": list(settings.hidden)}}
        model = ALGORITHMS[settings.algo](
            "MlpPolicy",
            env,
            buffer_size=min(settings.steps, 500_000),
            learning_starts=settings.rollout_ticks * env.num_envs,
            batch_size=512,
            gradient_steps=settings.gradient_steps,
            # no reward for noise: exploration is as small as it begins, for one missed spike costs hundreds of ticks
            ent_coef=settings.entropy,
            policy_kwargs=shape,
            **common,
        )
        actor = model.policy.actor
        last = [actor.mu, actor.log_std]
    with torch.no_grad():
        for layer in last:
            layer.weight.zero_()
            layer.bias.zero_()
        if settings.algo != "ppo":
            last[1].bias.fill_(settings.log_std)
    return model


def network(model: BaseAlgorithm, env: VecNormalize) -> Network:
    """The deterministic policy of an SB3 actor as plain arrays, its input normalisation included."""
    if isinstance(model, PPO):
        hidden, last = model.policy.mlp_extractor.policy_net, model.policy.action_net
    else:
        hidden, last = model.policy.actor.latent_pi, model.policy.actor.mu
    layers = [*(m for m in hidden if isinstance(m, torch.nn.Linear)), last]
    return Network(
        mean=tuple(env.obs_rms.mean.tolist()),
        scale=tuple(np.sqrt(env.obs_rms.var + env.epsilon).tolist()),
        clip=env.clip_obs,
        weights=tuple(tuple(map(tuple, m.weight.detach().numpy().astype(float).tolist())) for m in layers),
        biases=tuple(tuple(m.bias.detach().numpy().astype(float).tolist()) for m in layers),
        squashed=not isinstance(model, PPO),
    )


class _Judge(BaseCallback):
    """Judges the policy on validation traffic `evaluations` times, keeps the best, writes checkpoints."""

    def __init__(
        self,
        scenario: Scenario,
        base: Base,
        validation: Sequence[Sequence[World]],
        settings: Settings,
        folder: Path,
        curve: list[tuple[int, float, float]],
        progress: Callable[[int, float], None] | None,
    ) -> None:
        super().__init__()
        self.scenario, self.base, self.validation, self.settings = scenario, base, validation, settings
        self.folder, self.curve, self.progress = folder, curve, progress
        self.next_at = curve[-1][0] + settings.steps // settings.evaluations if curve else 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self.next_at:
            self.evaluate()
            self.next_at = self.num_timesteps + self.settings.steps // self.settings.evaluations

    def evaluate(self) -> None:
        env = self.model.get_env()
        assert isinstance(env, VecNormalize)
        policy = Learned(base=self.base, network=network(self.model, env))
        usd = typical_usd(run_groups(self.scenario, self.validation, policy))
        if not self.curve:
            self.base_usd = typical_usd(run_groups(self.scenario, self.validation, self.base))
        else:
            self.base_usd = self.curve[0][2]
        best = min((row[1] for row in self.curve), default=np.inf)
        self.curve.append((self.num_timesteps, usd, self.base_usd))
        if usd < best:
            policy.save(self.folder)
        _checkpoint(self.model, env, self.folder, self.curve)
        self.logger.record("validation/usd", usd)
        if self.progress is not None:
            self.progress(self.num_timesteps, usd)


def _checkpoint(
    model: BaseAlgorithm, env: VecNormalize, folder: Path, curve: list[tuple[int, float, float]]
) -> None:
    """Saves what `resume` needs; every file is complete or absent."""
    best = np.minimum.accumulate([row[1] for row in curve])
    lines = ["steps,validation_usd,base_usd,best"]
    lines += [f"{n},{usd!r},{base!r},{usd == low}" for (n, usd, base), low in zip(curve, best, strict=True)]
    text = folder / "learning_curve.csv.part"
    text.write_text("\n".join(lines) + "\n")
    text.replace(folder / "learning_curve.csv")
    model.save(folder / "checkpoint.part.zip")
    (folder / "checkpoint.part.zip").replace(folder / "checkpoint.zip")
    statistics = {
        "obs": [env.obs_rms.mean.tolist(), env.obs_rms.var.tolist(), float(env.obs_rms.count)],
        "ret": [float(env.ret_rms.mean), float(env.ret_rms.var), float(env.ret_rms.count)],
        "curve": curve,
    }
    part = folder / "normaliser.json.part"
    part.write_text(json.dumps(statistics))
    part.replace(folder / "normaliser.json")


def _restore(model: BaseAlgorithm, env: VecNormalize, folder: Path) -> list[tuple[int, float, float]]:
    """Puts a fresh model and normaliser to the state of the latest checkpoint; returns the curve so far."""
    model.set_parameters(str(folder / "checkpoint.zip"))
    statistics = json.loads((folder / "normaliser.json").read_text())
    mean, var, count = statistics["obs"]
    env.obs_rms.mean, env.obs_rms.var, env.obs_rms.count = np.array(mean), np.array(var), count
    mean, var, count = statistics["ret"]
    env.ret_rms.mean, env.ret_rms.var, env.ret_rms.count = np.array(mean), np.array(var), count
    curve = [(int(n), float(usd), float(base)) for n, usd, base in statistics["curve"]]
    model.num_timesteps = curve[-1][0]
    return curve
