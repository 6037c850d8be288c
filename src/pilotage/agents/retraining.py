"""Learning when to retrain, from matrices of errors at random, and the oracle that knew them.

A matrix says what every version would get wrong on every batch, so that both branches of every decision can be
followed to the end: the advantage of retraining now over keeping on is known for any policy that decides afterwards.
Policy iteration with that advantage (Lagoudakis & Parr, Reinforcement learning as classification, 2003): a network is
trained to say its sign, every example weighted by how much it matters; then the network is the policy that is
followed, more examples are added, and so on. It begins with the oracle's plan. Nothing here has seen a real stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import torch

from pilotage.control.learned_retraining import FEATURES, LearnedRetraining
from pilotage.control.network import Network
from pilotage.engine.lifetimes import Stream, follow, oracle, visit
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
    base = log_uniform(0.03, 0.35)
    return Decay(
        drift=kinds[rng.choice(len(kinds), p=(0.2, 0.2, 0.25, 0.2, 0.15))](),
        batch_size=int(log_uniform(20, 4000)),
        base_error=base,
        worst_error=base + (0.9 - base) * log_uniform(0.03, 0.8),
        difficulty_cv=log_uniform(0.02, 0.5),
        difficulty_batches=log_uniform(1, 40),
        luck_cv=log_uniform(0.01, 0.3),
        interaction_cv=log_uniform(0.01, 0.3),
        window_batches=4,
        probe_factor=float(rng.uniform(1.0, 1.7)),
        probe_cv=log_uniform(0.02, 0.3),
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
    """How to train; the defaults are those of the shipped policy."""

    streams: int = 3000
    iterations: int = 3
    epochs: int = 30
    rows_per_batch: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    hidden: int = 48
    seed: int = 0


def train(settings: Settings, progress: Callable[[str], None] = lambda _: None) -> LearnedRetraining:
    """Learns a policy from deployments at random; the best of all iterations on others is kept."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng([settings.seed, 1])
    learned = streams_at_random(rng, settings.streams)
    judged = streams_at_random(np.random.default_rng([settings.seed, 2]), max(settings.streams // 5, 50))
    policy, best, least = _silent(settings.hidden), None, math.inf
    for iteration in range(settings.iterations):
        rows, gains = _examples(policy, learned, rng, by_plan=iteration == 0)
        policy = _fitted(rows, gains, settings)
        value = typical_ratio(policy, judged)
        progress(
            f"iteration {iteration + 1}: {len(rows)} examples, {value:.4f} of the oracle's cost on others"
        )
        if value < least:
            best, least = policy, value
    assert best is not None
    return best


def typical_ratio(policy: LearnedRetraining, streams: Sequence[Stream]) -> float:
    """Geometric mean of cost over the oracle's."""
    return float(np.exp(np.mean([math.log(followed(policy, s) / s.oracle_usd) for s in streams])))


def followed(policy: LearnedRetraining, stream: Stream) -> float:
    """What a policy costs on a stream, in wrong answers."""
    cost, _ = follow(
        *stream.known, _plain(policy.network), 0, stream.begin, -1, np.zeros(len(FEATURES)), np.zeros((0, 8)),
        np.zeros((0, len(FEATURES))), np.ones(0),
    )  # fmt: skip
    return float(cost)


def _examples(
    policy: LearnedRetraining, streams: Sequence[Stream], rng: np.random.Generator, *, by_plan: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Features of states on the policy's ways, and what retraining there is worth, as shares of the oracle's cost."""
    net, found = _plain(policy.network), []
    for stream in streams:
        n = stream.errors.shape[1]
        rows, gains = np.zeros((n, len(FEATURES))), np.zeros(n)
        left = oracle(stream.errors, stream.stakes.price)[1] if by_plan else np.zeros((0, 0))
        count = visit(*stream.known, net, stream.begin, left, by_plan, rng.random(n), rows, gains)
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
    return LearnedRetraining(
        network=Network(
            mean=tuple(mean.tolist()),
            scale=tuple(scale.tolist()),
            clip=5.0,
            weights=tuple(tuple(map(tuple, layer.weight.detach().double().tolist())) for layer in layers),
            biases=tuple(tuple(layer.bias.detach().double().tolist()) for layer in layers),
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
