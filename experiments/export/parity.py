"""Does a bundle decide as the stable-baselines3 policy that it was made of?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecNormalize

from pilotage.agents.algorithms import Settings, fresh, network
from pilotage.agents.export import export
from pilotage.agents.train import SB3VecEnv
from pilotage.control.bundle import Bundle
from pilotage.control.guard import Guard
from pilotage.control.learned import Learned, Residual
from pilotage.control.policy import measure
from pilotage.control.scaling import Predictive
from pilotage.env import ServingVecEnv
from pilotage.scenario import Scenario

WORLDS = 64


class Trained(NamedTuple):
    """A model of stable-baselines3, the environment whose normalisation it saw, and its bundle."""

    model: Any
    env: VecNormalize
    bundle: Bundle


def trained(scenario: Scenario, algo: str, steps: int, seed: int, out: Path) -> Trained:
    """Trains for some steps, fast, so that the network is far from where it began, and exports it."""
    env = VecNormalize(SB3VecEnv(ServingVecEnv(scenario, WORLDS)))
    env.seed(seed)
    settings = Settings(
        algo=algo, steps=steps, seed=seed, rollout_ticks=32, minibatches=4, learning_rate=3e-3, log_std=-0.5
    )
    model = fresh(settings, env, out.parent / f"tensorboard-{algo}")
    model.learn(steps)
    env.training = False
    policy = Learned(base=Predictive(), network=network(model, env))
    return Trained(model, env, export(policy, out, [scenario], name=f"{algo} of {steps} steps", runs=1))


def raw_actions(one: Trained, observations: np.ndarray) -> np.ndarray:
    """What the SB3 policy says before it is clipped, of observations that are not normalised; (rows, actions)."""
    seen = torch.as_tensor(one.env.normalize_obs(observations)).float()
    policy = one.model.policy
    with torch.no_grad():
        if isinstance(one.model, PPO):
            found = policy.get_distribution(seen).distribution.mean
        else:
            found = policy.actor(seen, deterministic=True)
    return found.numpy()


def visited(one: Trained, count: int) -> tuple[np.ndarray, int]:
    """So many observations that the SB3 policy comes to see while it acts, and in how many of them the bundle, which
    sees the same, orders something else."""
    inner: Any = one.env.venv.inner
    cluster_env = ServingVecEnv(inner.scenario, WORLDS, base=Predictive())
    observations, _ = cluster_env.reset(seed=1)
    seen, differ = [], 0
    forward = one.bundle.policy.policy.network.forward()
    situations = [cluster_env._cluster.situation(w, 0) for w in range(WORLDS)]
    ways = [Residual(situations, Predictive(), Guard()) for _ in range(2)]
    while len(seen) * WORLDS < count:
        values = measure(cluster_env._cluster.ticks).reshape(WORLDS, -1)
        ours, theirs = forward(observations), raw_actions(one, observations)
        found, expected = (way.decide(said, values) for way, said in zip(ways, (ours, theirs), strict=True))
        differ += int(np.any([a != b for a, b in zip(found, expected, strict=True)], axis=0).sum())
        seen.append(observations)
        observations, _, _, ended, _ = cluster_env.step(theirs)
        if ended.any():  # all worlds end together; what was measured last is in the views of the next run
            ways = [Residual(situations, Predictive(), Guard()) for _ in range(2)]
            continue
        for way in ways:
            way.update(measure(cluster_env._cluster.ticks).reshape(WORLDS, -1))
    return np.concatenate(seen)[:count], differ


def random_observations(one: Trained, count: int, seed: int) -> np.ndarray:
    """Observations from well within to far beyond what the normalisation saw."""
    rng = np.random.default_rng(seed)
    mean, scale = one.env.obs_rms.mean, np.sqrt(one.env.obs_rms.var + one.env.epsilon)
    spread = rng.choice([0.3, 1.0, 3.0, 10.0], (count, 1))
    return np.clip(mean + scale * spread * rng.normal(size=(count, len(mean))), -20, 20).astype(np.float32)


def orders(actions: np.ndarray, seed: int) -> np.ndarray:
    """What corrections order where the rule needs some number of replicas: target and batch limit; (rows, 2)."""
    need = np.random.default_rng(seed).uniform(0.2, 40.0, len(actions))
    said = np.clip(actions, -1, 1)
    target = np.ceil(np.maximum(need * (1 + 0.5 * said[:, 0]) + said[:, 0], 0) - 1e-9)
    return np.stack([target, np.maximum(1, np.round(16 * 2.0 ** (3 * np.minimum(said[:, 1], 0))))], axis=1)


def compared(one: Trained, count: int, seed: int) -> list[dict[str, Any]]:
    """Largest difference of the outputs and share of other choices: on-policy and at random, one by one and batched."""
    forward = one.bundle.policy.policy.network.forward()
    on_policy, differ = visited(one, count)
    at_random = random_observations(one, count, seed)
    rows = []
    for name, observations in (("on-policy", on_policy), ("random", at_random)):
        exact = raw_actions(one, observations)
        for way, found in (
            ("onnxruntime", forward(observations)),
            ("numpy", np.concatenate([forward(row[None]) for row in observations])),
        ):
            other = np.any(orders(found, seed) != orders(exact, seed), axis=1)
            if name == "on-policy" and way == "onnxruntime":
                share = differ / len(observations)
            else:
                share = float(other.mean())
            rows.append(
                {
                    "observations": name, "runtime": way, "count": len(observations),
                    "largest_difference": float(np.abs(found - exact).max()), "same_choice": 1 - share,
                    "largest_output": float(np.abs(exact).max()),
                }
            )  # fmt: skip
    return rows
