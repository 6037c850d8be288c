"""Learning when to retrain, from deployments at random, and the oracle that knew them.

A deployment at random (`engine.lifetimes.Stream`) says what every version would get wrong on every batch, so that the
cost of both answers to every decision is known in hindsight, if the oracle decides everything after. A network is first
trained to say the sign of the difference, every example weighted by how much it matters (Lagoudakis & Parr,
Reinforcement learning as classification, 2003). Such a policy waits too long: hindsight knows which version will be the
lucky one. PPO (stable-baselines3) on `RetrainingVecEnv` then takes it from there, on other deployments, and the best
policy on a third set is kept. Real streams differ from those at random, so the network has in the end to be surer by a
margin than it was trained to be. Training has seen no real stream; the margin was chosen on the first 40 % of some
(`experiments/retraining/caution.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from pilotage.agents.train import SB3VecEnv
from pilotage.control.learned_retraining import FEATURES, LearnedRetraining
from pilotage.control.network import Network
from pilotage.engine.lifetimes import STATE, Stream, follow, oracle, visit
from pilotage.retraining_env import RetrainingVecEnv
from pilotage.world.drift import (
    AnyDrift,
    Decay,
    GradualDrift,
    NoDrift,
    RecurringDrift,
    SeasonalDrift,
    SuddenDrift,
)


def decay_at_random(rng: np.random.Generator) -> Decay:
    """A kind of decay: how the data move, how large batches are, how hard the problem is."""

    def log_uniform(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    magnitude = log_uniform(0.1, 2.0)
    kinds: tuple[Callable[[], AnyDrift], ...] = (
        NoDrift,
        lambda: SuddenDrift(mean_batches=log_uniform(8, 150), magnitude=magnitude),
        lambda: GradualDrift(
            batches_per_unit=log_uniform(10, 500),
            wander=float(rng.uniform(0, 1)),
            lasts_batches=log_uniform(10, 200) if rng.random() < 0.5 else None,
        ),
        lambda: RecurringDrift(
            mean_batches=log_uniform(4, 60), places=int(rng.integers(2, 5)), magnitude=magnitude
        ),
        lambda: SeasonalDrift(period_batches=log_uniform(8, 200), magnitude=magnitude),
    )
    base, size, window = log_uniform(0.03, 0.35), int(log_uniform(20, 4000)), 4
    return Decay(
        drift=kinds[rng.choice(len(kinds), p=(0.2, 0.2, 0.25, 0.2, 0.15))](),
        batch_size=size,
        base_error=base,
        worst_error=base + (0.9 - base) * log_uniform(0.03, 0.8),
        difficulty_cv=log_uniform(0.02, 0.5),
        difficulty_batches=log_uniform(1, 40),
        # what a version makes of its training window is a matter of how much there is to learn from
        luck_cv=min(log_uniform(0.3, 3.0) / math.sqrt(window * size * base), 0.8),
        interaction_cv=log_uniform(0.01, 0.3),
        window_batches=window,
        common=float(rng.uniform(0.2, 0.95)),
        probe_factor=float(rng.uniform(0.95, 1.5)),
        probe_cv=log_uniform(0.01, 0.2),
    )


def streams_at_random(rng: np.random.Generator, count: int) -> list[Stream]:
    """Deployments at random, a few of them without a past, without a probe, or with labels that come late."""
    out = []
    for _ in range(count):
        decay, batches = decay_at_random(rng), int(rng.integers(30, 160))
        delay = int(rng.choice([0, 0, 0, 1, 2, 5]))
        errors, probe = decay.recorded(rng, batches, delay)
        begin = int(0.4 * batches) if rng.random() < 0.85 else 0
        price = decay.batch_size * float(np.exp(rng.uniform(np.log(0.02), np.log(2.0))))
        probe = probe if rng.random() < 0.8 else probe[:0]
        out.append(Stream.of(errors, probe, begin, price, decay.batch_size, delay))
    return out


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to train; the defaults are those of the shipped policy. `streams` are for either stage; `margin` is what the
    network's output, log odds, is lowered by at the end."""

    streams: int = 6000
    judged: int = 1000
    hidden: int = 48
    # classification
    epochs: int = 30
    rows_per_batch: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    # PPO
    steps: int = 5_000_000
    worlds: int = 256
    rollout_batches: int = 128
    minibatch: int = 4096
    ppo_epochs: int = 4
    ppo_learning_rate: float = 5e-4
    discount: float = 0.99
    gae_lambda: float = 0.97
    evaluations: int = 12
    margin: float = 1.5
    seed: int = 0


Progress = Callable[[int, float], None]
P = TypeVar("P")


def train(settings: Settings, progress: Progress = lambda steps, ratio: None) -> LearnedRetraining:
    """Learns a policy from deployments at random; the best one on others is kept.

    `progress(steps of PPO, typical cost over the oracle's)` is called after every evaluation, in which the margin is 0.
    """
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    first, second, third = (np.random.default_rng([settings.seed, k]) for k in (1, 2, 3))
    judged = streams_at_random(second, settings.judged)
    policy = _fitted(*_examples(streams_at_random(first, settings.streams), first, settings), settings)
    best, least = policy, typical_ratio(policy, judged)
    progress(0, least)
    if settings.steps == 0:
        return cautious(best, settings.margin)
    env = SB3VecEnv(RetrainingVecEnv(streams_at_random(third, settings.streams), settings.worlds))
    model = _ppo(policy.network, env, settings)
    keep = KeepBest(
        lambda: _read(model, policy.network),
        lambda found: typical_ratio(found, judged),
        (best, least),
        settings.steps // settings.evaluations,
        settings.worlds * settings.rollout_batches,
        progress,
    )
    model.learn(settings.steps, callback=keep)
    return cautious(keep.best, settings.margin)


def cautious(policy: LearnedRetraining, margin: float) -> LearnedRetraining:
    """The policy that retrains only where its network would say more than `margin`."""
    *hidden, (last,) = policy.network.biases
    return policy.replace(network=policy.network.replace(biases=(*hidden, (last - margin,))))


class KeepBest(BaseCallback, Generic[P]):
    """Judges what a training has come to about every so many steps, and keeps the `best`: that of the least cost.

    `read` gives the policy as it is now, `judge` its cost; `start` is a policy with its cost, a `rollout` is so many
    steps. `progress(steps, cost)` is called after every judgement.
    """

    def __init__(
        self,
        read: Callable[[], P],
        judge: Callable[[P], float],
        start: tuple[P, float],
        every: int,
        rollout: int,
        progress: Progress,
    ) -> None:
        super().__init__()
        self._policy, self._cost, self._every, self._rollout = read, judge, max(1, every), rollout
        self.best, self._least = start
        self._progress = progress

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.num_timesteps % self._every < self._rollout:
            found = self._policy()
            cost = self._cost(found)
            self._progress(self.num_timesteps, cost)
            if cost < self._least:
                self.best, self._least = found, cost


def typical_ratio(policy: LearnedRetraining, streams: Sequence[Stream]) -> float:
    """Geometric mean of cost over the oracle's."""
    return float(np.exp(np.mean([math.log(followed(policy, s) / s.oracle_usd) for s in streams])))


def followed(policy: LearnedRetraining, stream: Stream) -> float:
    """What a policy costs on a stream, in wrong answers."""
    cost, _ = follow(
        *stream.known, _plain(policy.network), stream.begin, np.zeros(len(FEATURES)), np.zeros((0, 1 + STATE)),
        np.zeros((0, len(FEATURES))), np.ones(0),
    )  # fmt: skip
    return float(cost)


def _examples(
    streams: Sequence[Stream], rng: np.random.Generator, settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """Features of states on the way, and what retraining there is worth in hindsight, over the oracle's cost.

    The way is that of a policy that retrains at random, once in eight batches or so.
    """
    found = []
    for stream in streams:
        n = stream.errors.shape[1]
        rows, gains = np.zeros((n, len(FEATURES))), np.zeros(n)
        left = oracle(stream.errors, stream.stakes.price)[1]
        net = _plain(_silent(settings.hidden).network)
        count = visit(*stream.known, net, stream.begin, left, rng.random(n), rows, gains)
        found.append((rows[:count], gains[:count] / stream.oracle_usd))
    return np.concatenate([rows for rows, _ in found]), np.concatenate([gains for _, gains in found])


def _fitted(rows: np.ndarray, gains: np.ndarray, settings: Settings) -> LearnedRetraining:
    """A network that says the sign of the gains, every row weighted by their size."""
    mean, scale = rows.mean(axis=0), rows.std(axis=0) + 0.05
    x = torch.from_numpy(np.clip((rows - mean) / scale, -5, 5)).float()
    sign, weight = torch.from_numpy(np.sign(gains)).float(), torch.from_numpy(np.abs(gains)).float()
    weight = weight / weight.mean()
    sizes = (len(FEATURES), settings.hidden, settings.hidden, 1)
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    net = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    optimiser = torch.optim.AdamW(
        net.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    batches = max(1, len(rows) // settings.rows_per_batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.epochs * batches + 1
    )
    for _ in range(settings.epochs):
        order = torch.randperm(len(rows))
        for k in range(batches):
            at = order[k * settings.rows_per_batch : (k + 1) * settings.rows_per_batch]
            loss = (weight[at] * torch.nn.functional.softplus(-sign[at] * net(x[at])[:, 0])).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return _policy(mean, scale, [(layer.weight, layer.bias) for layer in layers])


class Normalised(BaseFeaturesExtractor):
    """Features as the network was first trained to take them."""

    def __init__(self, space: spaces.Box, mean: Sequence[float], scale: Sequence[float], clip: float) -> None:
        super().__init__(space, len(mean))
        self.register_buffer("mean", torch.tensor(mean).float())
        self.register_buffer("scale", torch.tensor(scale).float())
        self._clip = clip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.mean) / self.scale).clamp(-self._clip, self._clip)


def _ppo(start: Network, env: SB3VecEnv, settings: Settings) -> PPO:
    """PPO whose policy is the network: the logit of no is 0, that of yes what the network says."""
    model = PPO(
        "MlpPolicy", env, n_steps=settings.rollout_batches, batch_size=settings.minibatch, n_epochs=settings.ppo_epochs,
        learning_rate=lambda left: settings.ppo_learning_rate * left, gamma=settings.discount,
        gae_lambda=settings.gae_lambda, seed=settings.seed, device="cpu",
        policy_kwargs={
            "net_arch": {"pi": [settings.hidden] * 2, "vf": [64, 64]},
            "activation_fn": torch.nn.Tanh,
            "features_extractor_class": Normalised,
            "features_extractor_kwargs": {"mean": start.mean, "scale": start.scale, "clip": start.clip},
        },
    )  # fmt: skip
    last = model.policy.action_net
    with torch.no_grad():
        for layer, weights, bias in zip(_hidden(model), start.weights, start.biases, strict=False):
            layer.weight.copy_(torch.tensor(weights))
            layer.bias.copy_(torch.tensor(bias))
        last.weight.zero_()
        last.bias.zero_()
        last.weight[1] = torch.tensor(start.weights[-1][0])
        last.bias[1] = start.biases[-1][0]
    return model


def _hidden(model: PPO) -> list[torch.nn.Linear]:
    return [layer for layer in model.policy.mlp_extractor.policy_net if isinstance(layer, torch.nn.Linear)]


def _read(model: PPO, start: Network) -> LearnedRetraining:
    """The policy that PPO has come to: yes where its logit is the larger."""
    last = model.policy.action_net
    layers = [(layer.weight, layer.bias) for layer in _hidden(model)]
    layers.append(((last.weight[1] - last.weight[0])[None], (last.bias[1] - last.bias[0])[None]))
    return _policy(np.array(start.mean), np.array(start.scale), layers)


def _policy(
    mean: np.ndarray, scale: np.ndarray, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> LearnedRetraining:
    return LearnedRetraining(
        network=Network(
            mean=tuple(mean.tolist()),
            scale=tuple(scale.tolist()),
            clip=5.0,
            weights=tuple(tuple(map(tuple, weight.detach().double().tolist())) for weight, _ in layers),
            biases=tuple(tuple(bias.detach().double().tolist()) for _, bias in layers),
        )
    )


def _silent(hidden: int) -> LearnedRetraining:
    """A network that never says yes."""
    sizes = (len(FEATURES), hidden, hidden, 1)
    return LearnedRetraining(
        network=Network(
            mean=(0.0,) * len(FEATURES),
            scale=(1.0,) * len(FEATURES),
            clip=5.0,
            weights=tuple(((0.0,) * a,) * b for a, b in pairwise(sizes)),
            biases=((0.0,) * hidden, (0.0,) * hidden, (-1.0,)),
        )
    )


def _plain(network: Network) -> tuple[Any, ...]:
    """A network of two hidden layers as compiled code takes it."""
    layers = [np.array(x) for pair in zip(network.weights, network.biases, strict=True) for x in pair]
    return (np.array(network.mean), np.array(network.scale), network.clip, *layers)
