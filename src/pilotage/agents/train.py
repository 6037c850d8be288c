"""Learning a policy with stable-baselines3.

One of `agents.algorithms` on `ServingVecEnv`: the network corrects a base (see `control.learned`) and starts as the
base itself, so that the untrained policy is already in the running. Every so often the policy is judged on validation
traffic, noise off, and the best one is kept: what comes out is never worse there than the base it started from. With a
`foresight` policy as base, this is the fine-tuning in the engine itself, queues and noise included, of what was learned
from hindsight.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from pilotage.agents.algorithms import ALGORITHMS, DISCRETE, Chosen, Settings, choices, exported, fresh
from pilotage.agents.tune import run_groups, typical_usd
from pilotage.control.learned import Base, Learned, trained
from pilotage.engine.cluster import World
from pilotage.env import ServingVecEnv
from pilotage.scenario import Scenario
from pilotage.world.spec import SpecError


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
    `checkpoint.zip` with `normaliser.json` (the latest, for `resume`; SAC, TQC and QR-DQN then begin with an empty
    replay buffer) and tensorboard events. `progress(steps,
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
    plain: VecEnv = SB3VecEnv(inner)
    if settings.algo in DISCRETE:
        plain = Chosen(plain, choices(base))
    env = VecNormalize(plain, gamma=settings.discount, clip_obs=10.0, clip_reward=50.0)
    model = fresh(settings, env, folder / "tensorboard")
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
        policy = exported(self.model, env, self.base)
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
