"""Learning how a new version goes out, from rollouts at random: by imitation of a plan, then by PPO.

The plan goes on while one more interval is expected to save more than it costs; a network learns to do the same, and
PPO (stable-baselines3) improves on it. The network that loses least on other rollouts is kept. A lane of the
environment is one rollout (`engine.rollouts.cases_at_random`); what an agent sees is what the shipped policy sees
(`control.learned_rollout.FEATURES`), an action is a share, to promote, or to abort. The reward is minus what is lost
beside knowing the version, in tenths of the stakes of the rollout; what is lost after a decision comes with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from scipy.special import ndtr
from stable_baselines3 import PPO

from pilotage.agents.retraining import KeepBest, Normalised, Progress
from pilotage.agents.train import SB3VecEnv
from pilotage.control.canary import ABORT, PROMOTE
from pilotage.control.learned_rollout import (
    ACTIONS,
    BEGINS,
    FEATURES,
    SHARES,
    Belief,
    Learned,
    LearnedRollout,
)
from pilotage.control.network import Forward, Network
from pilotage.engine.rollouts import LATEST, Cases, Simulation, cases_at_random, followed

LIMIT = 30.0


class RolloutVecEnv(VectorEnv):
    """`num_envs` rollouts at once, each followed by another one drawn at random."""

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int = 512, seed: int = 0) -> None:
        self.num_envs, self._seed = num_envs, seed
        self.single_observation_space = spaces.Box(-LIMIT, LIMIT, (len(FEATURES),), np.float32)
        self.single_action_space = spaces.Discrete(ACTIONS)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=self._seed if seed is None else seed)
        first = cases_at_random(self.np_random, self.num_envs)
        first.label_delay[0] = LATEST
        self._simulation = Simulation(first, int(self.np_random.integers(2**31)))
        self._cases, self._stakes, self._belief = first, first.stakes_usd, Belief(first)
        self._belief.share = np.full(self.num_envs, BEGINS)
        evidence, _ = self._simulation.step(self._belief.share)
        return self._clipped(self._belief.see(evidence)), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One interval of every rollout."""
        outcome = self._belief.act(np.asarray(actions))
        ended = (outcome == PROMOTE) | (outcome == ABORT) | (self._simulation.t >= self._cases.horizon)
        rewards = -10 * np.where(ended, self._simulation.rest(outcome), 0.0) / self._stakes
        over = np.flatnonzero(ended)
        info: dict[str, Any] = {}
        if len(over):
            final = np.full(self.num_envs, None, object)
            for k in over:
                final[k] = self._seen[k].copy()
            info = {"final_obs": final, "_final_obs": ended.copy()}
            drawn = cases_at_random(self.np_random, len(over))
            self._simulation.begin(over, drawn)
            self._belief.forget(over)
            self._stakes[over] = drawn.stakes_usd
        # what the next interval loses belongs to the action that goes on; to none where a rollout is new
        evidence, lost = self._simulation.step(self._belief.share)
        rewards -= 10 * np.where(ended, 0.0, lost) / self._stakes
        seen = self._clipped(self._belief.see(evidence))
        return seen, rewards, ended, np.zeros(self.num_envs, bool), info

    def _clipped(self, rows: np.ndarray) -> np.ndarray:
        self._seen = np.clip(rows, -LIMIT, LIMIT).astype(np.float32)
        return self._seen.copy()


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to train; the defaults are those of the shipped policy."""

    hidden: int = 32
    # imitation
    imitated: int = 300  # intervals of every world
    epochs: int = 12
    # PPO
    steps: int = 600_000
    worlds: int = 512
    rollout_intervals: int = 64
    minibatch: int = 4096
    ppo_epochs: int = 4
    learning_rate: float = 3e-4
    clip: float = 0.1
    discount: float = 0.998
    gae_lambda: float = 0.95
    entropy: float = 0.001
    judged: int = 2000
    evaluations: int = 10
    seed: int = 0


def train(settings: Settings, progress: Progress = lambda steps, lost: None) -> LearnedRollout:
    """Learns a policy from rollouts at random; the one that is best on others is kept.

    `progress(steps, mean loss over the stakes on those)` is called after every evaluation.
    """
    torch.set_num_threads(1)
    judged = cases_at_random(np.random.default_rng([settings.seed, 1]), settings.judged)
    env = RolloutVecEnv(settings.worlds, settings.seed)
    start = _imitated(env, Plan(), settings)
    best, least = LearnedRollout(network=start), loss_of(Forward(start), judged)
    progress(0, least)
    model = _ppo(SB3VecEnv(env), start, settings)
    keep = KeepBest(
        lambda: _read(model, start),
        lambda found: loss_of(Forward(found.network), judged),
        (best, least),
        settings.steps // settings.evaluations,
        settings.worlds * settings.rollout_intervals,
        progress,
    )
    model.learn(settings.steps, callback=keep)
    return keep.best


def loss_of(scores: Callable[[np.ndarray], np.ndarray], cases: Cases, seed: int = 0) -> float:
    """Mean loss over the stakes of what scores actions by FEATURES and knows every rollout's own prices."""
    policy = Learned(scores, cases)
    return float(np.mean(followed(cases, policy, policy, seed)["usd"] / cases.stakes_usd))


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What PPO begins with: go on while that is expected to save more than it costs.

    With the worth of a request normal as the belief has it, promoting now is expected to lose P and aborting A a
    request. An interval at share w costs w P + (1 - w) A and the trial; what it tells is held to save a share
    `tells` 4 w (1 - w) / (age + `slow`) of what the better decision still risks.
    """

    tells: float = 3.0
    slow: float = 40.0

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        of = {name: rows[:, k : k + 1] for k, name in enumerate(FEATURES)}
        value, spread = np.sign(of["value"]) * np.expm1(np.abs(of["value"])) / 10, np.exp(of["spread"])
        z = value / spread
        density, above = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi), ndtr(z)
        promote, abort = spread * (density - z * (1 - above)), spread * (density + z * above)
        w, age, left = np.array(SHARES), np.expm1(of["age"]), np.expm1(of["left"])
        saved = np.minimum(promote, abort) * left * self.tells * 4 * w * (1 - w) / (age + self.slow)
        more = saved - w * promote - (1 - w) * abort - np.exp(of["trial"])
        ends = np.concatenate([promote, abort], 1)
        return np.concatenate([more, np.where(ends == ends.min(axis=1, keepdims=True), 0.0, -np.inf)], 1)


def _imitated(env: RolloutVecEnv, plan: Plan, settings: Settings) -> Network:
    """A network that does what a plan does, learned on its way; one action in ten is another share."""
    rng, seen = np.random.default_rng(settings.seed), env.reset()[0]
    rows, wanted = [], []
    for _ in range(settings.imitated):
        actions = plan(seen.astype(float)).argmax(axis=1)
        rows.append(seen)
        wanted.append(actions)
        other = rng.random(len(actions)) < 0.1
        seen = env.step(np.where(other, rng.integers(0, len(SHARES), len(actions)), actions))[0]
    inputs, labels = np.concatenate(rows), torch.from_numpy(np.concatenate(wanted))
    mean, scale = inputs.mean(axis=0), inputs.std(axis=0) + 0.05
    torch.manual_seed(settings.seed)
    sizes = (len(FEATURES), settings.hidden, settings.hidden, ACTIONS)
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    net = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    x = torch.from_numpy(np.clip((inputs - mean) / scale, -5, 5)).float()
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for epoch in range(settings.epochs):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - epoch / settings.epochs)
        for at in torch.randperm(len(x)).split(settings.minibatch // 4):
            loss = torch.nn.functional.cross_entropy(net(x[at]), labels[at])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return _network(mean.tolist(), scale.tolist(), layers)


def _ppo(env: SB3VecEnv, start: Network, settings: Settings) -> PPO:
    """PPO whose policy begins as a network."""
    model = PPO(
        "MlpPolicy", env, n_steps=settings.rollout_intervals, batch_size=settings.minibatch,
        n_epochs=settings.ppo_epochs, clip_range=settings.clip,
        learning_rate=lambda left: settings.learning_rate * left, gamma=settings.discount,
        gae_lambda=settings.gae_lambda, ent_coef=settings.entropy, seed=settings.seed, device="cpu",
        policy_kwargs={
            "net_arch": {"pi": [settings.hidden] * 2, "vf": [64, 64]},
            "activation_fn": torch.nn.Tanh,
            "features_extractor_class": Normalised,
            "features_extractor_kwargs": {"mean": start.mean, "scale": start.scale, "clip": start.clip},
        },
    )  # fmt: skip
    with torch.no_grad():
        for layer, weights, biases in zip(_layers(model), start.weights, start.biases, strict=True):
            layer.weight.copy_(torch.tensor(weights))
            layer.bias.copy_(torch.tensor(biases))
    return model


def _layers(model: PPO) -> list[torch.nn.Linear]:
    net = model.policy.mlp_extractor.policy_net
    return [layer for layer in net if isinstance(layer, torch.nn.Linear)] + [model.policy.action_net]


def _read(model: PPO, start: Network) -> LearnedRollout:
    return LearnedRollout(network=_network(start.mean, start.scale, _layers(model)))


def _network(mean: Sequence[float], scale: Sequence[float], layers: Sequence[torch.nn.Linear]) -> Network:
    """Layers as plain numbers of five digits: an entry of the ledger must hold them."""

    def plain(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(float(f"{v:.5g}") for v in values)

    return Network(
        mean=plain(mean), scale=plain(scale), clip=5.0,
        weights=tuple(tuple(map(plain, layer.weight.detach().tolist())) for layer in layers),
        biases=tuple(plain(layer.bias.detach().tolist()) for layer in layers),
    )  # fmt: skip
