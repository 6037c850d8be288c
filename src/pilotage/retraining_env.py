"""A Gymnasium environment for when to retrain: a tick is a batch of hours, an episode months, and worlds are many.

Importing this module registers `pilotage/retraining-v0`. What an agent sees is what the shipped policy sees
(`control.learned_retraining.FEATURES`), so that what is trained here runs unchanged outside. Action 1 retrains before
the next batch. The reward of a batch is minus the wrong answers beyond a fresh version's, and minus the price where
the model was retrained, in batches of the oracle's mean cost: what luck makes hard for everybody does not count, and
the sum over an episode differs from minus the cost over the oracle's by a constant and a factor that no action
changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from pilotage.control.learned_retraining import FEATURES
from pilotage.engine.lifetimes import STATE, Stream, advance
from pilotage.scenario import Scenario, load
from pilotage.world.spec import SpecError

LIMIT = 20.0


def streams_of(scenario: str | Scenario, seed: int, count: int) -> list[Stream]:
    """Deployments of a scenario's services that decay, in turn, at one request per second each, whatever their
    traffic is: a retraining costs its price and its share of a node, in wrong answers, and is ready at once."""
    scenario = scenario if isinstance(scenario, Scenario) else load(scenario)
    decaying = [service for service in scenario.services if service.lifecycle]
    if not decaying:
        raise SpecError(f"scenario {scenario.name!r} has no service with a lifecycle; give one that has")
    out = []
    for k in range(count):
        service = decaying[k % len(decaying)]
        life = service.lifecycle
        assert life is not None
        rng = np.random.default_rng([seed, k])
        past, batches = life.past_batches, life.batches(scenario.horizon_h)
        errors, probe = life.decay.recorded(rng, past + batches, life.label_delay_batches)
        price = life.price(scenario.pool_by_name[life.training.pool], service.economics.error_usd, 1.0)
        out.append(
            Stream.of(
                errors, probe if life.probe else probe[:0], past, price, life.decay.batch_size, life.label_delay_batches
            )
        )  # fmt: skip
    return out


class RetrainingVecEnv(VectorEnv):
    """`num_envs` deployments at once, drawn from `streams` anew at every reset, in one compiled call a step."""

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, streams: Sequence[Stream], num_envs: int = 64) -> None:
        if not streams:
            raise ValueError("streams is empty; give at least one")
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(-LIMIT, LIMIT, (len(FEATURES),), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        longest = max(s.errors.shape[1] for s in streams)
        self._errors = np.zeros((len(streams), longest, longest), np.float32)
        self._probe = np.zeros((len(streams), longest))
        # batches, whether a probe runs, price, batch size, label delay, oracle's cost a batch; summary; first state
        self._facts = np.zeros((len(streams), 6))
        self._summary = np.array([s.summary for s in streams])
        self._begin = np.array([s.begin for s in streams])
        for k, s in enumerate(streams):
            n = s.errors.shape[1]
            self._errors[k, :n, :n], self._probe[k, :n] = s.errors, s.probe
            self._facts[k] = (
                n, s.probed, s.stakes.price, s.stakes.batch_size, s.stakes.label_delay, max(s.oracle_usd / n, 1e-9),
            )  # fmt: skip
        self._which = np.full(num_envs, -1)
        self._t = np.zeros(num_envs, np.int64)
        self._state = np.zeros((num_envs, STATE))
        self._seen = np.zeros((num_envs, len(FEATURES)), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._which[:] = -1
        self._advance(np.zeros(self.num_envs, np.int64))
        return self._seen.copy(), {}

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One step; worlds that end, or have not begun, go on with a stream drawn now."""
        rewards, ended = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        final = np.zeros_like(self._seen)
        draws = self.np_random.integers(0, len(self._facts), self.num_envs)
        advance(
            actions, self._errors, self._probe, self._facts, self._summary, self._begin, draws, self._which, self._t,
            self._state, self._seen, rewards, ended, final,
        )  # fmt: skip
        return rewards, ended, final

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One batch of every deployment."""
        if self._which[0] < 0:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        rewards, ended, final = self._advance(np.asarray(actions, np.int64))
        info: dict[str, Any] = {}
        if ended.any():
            last = np.full(self.num_envs, None, object)
            for k in np.flatnonzero(ended):
                last[k] = final[k].copy()
            info = {"final_obs": last, "_final_obs": ended.copy()}
        # the deployment is over at its end, and `left` tells: nothing comes after that an agent should value
        return self._seen.copy(), rewards, ended, np.zeros(self.num_envs, bool), info


class RetrainingEnv(gymnasium.Env):
    """One deployment at a time, of a scenario whose models decay; a new one at every reset."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, scenario: str | Scenario = "drift-gradual", *, render_mode: None = None) -> None:
        self._scenario, self.render_mode = scenario, render_mode
        self.observation_space = spaces.Box(-LIMIT, LIMIT, (len(FEATURES),), np.float32)
        self.action_space = spaces.Discrete(2)
        self._inner: RetrainingVecEnv | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(2**31))
        self._inner = RetrainingVecEnv(streams_of(self._scenario, drawn, 1), 1)
        seen, _ = self._inner.reset(seed=drawn)
        return seen[0], {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self._inner is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        seen, rewards, ended, _, info = self._inner.step(np.array([action]))
        last = info["final_obs"][0] if ended[0] else seen[0]
        if ended[0]:
            self._inner = None
        return last, float(rewards[0]), bool(ended[0]), False, {}


def register() -> None:
    """Registers `pilotage/retraining-v0` with Gymnasium; called when this module is imported."""
    if "pilotage/retraining-v0" not in gymnasium.registry:
        gymnasium.register(id="pilotage/retraining-v0", entry_point="pilotage.retraining_env:RetrainingEnv")


register()
