"""Gymnasium environments: observation <-> array, decision <-> action, reward = minus dollars.

Importing this module registers every shipped scenario as `pilotage/<stem>-v0`.

`ServingEnv` is the single-agent view of a scenario: one agent steers all of its services. `ServingVecEnv`
steps many worlds in one compiled call, with every (world, service) pair as an environment of its own that
shares one policy. Both show what `control.learned` defines for the base that is corrected (`predictive`, unless
another is given), so that what is trained here runs unchanged outside.

The reward of a tick is minus the dollars spent in it, divided by the price of one node of the service's
preferred pool for one tick: a reward of -3 is the cost of three nodes. `info["usd"]` itemises it.

An episode is one run of the scenario. It is never terminated, only truncated at the horizon. Models do not decay here:
when to retrain is learned in `retraining_env`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from pilotage.control.guard import Guard
from pilotage.control.learned import Base, contract, corrections
from pilotage.control.policy import measure
from pilotage.control.scaling import Predictive
from pilotage.engine.cluster import Cluster, World
from pilotage.engine.run import bill
from pilotage.scenario import Scenario, load, shipped

OBSERVATION_LIMIT = 20.0


def _as_scenario(scenario: str | Scenario) -> Scenario:
    return scenario if isinstance(scenario, Scenario) else load(scenario)


def reward_scale_usd(scenario: Scenario) -> np.ndarray:
    """Dollars per unit of reward, per service: one node of its preferred pool for one tick (1 if it is free)."""
    pools = scenario.pool_by_name
    usd = np.array([pools[s.pools[0]].price_usd_per_hour * scenario.tick_s / 3600 for s in scenario.services])
    return np.where(usd > 0, usd, 1.0)


class ServingVecEnv(VectorEnv):
    """`worlds` independent worlds of a scenario; environment w * services + s is service s of world w.

    Observations and actions have a row per environment, float32; `contract(base)` names their columns.
    `windows`, if given, are the runs to draw from at a reset (start and traffic; the seed is drawn anew);
    otherwise a run starts where the scenario says. `base` is the rule that a zero action follows.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        scenario: str | Scenario,
        num_envs: int = 8,
        *,
        windows: Sequence[World] | None = None,
        base: Base | None = None,
        guard: Guard | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        threads: int = 1,
        render_mode: None = None,
    ) -> None:
        self.scenario = _as_scenario(scenario)
        services = len(self.scenario.services)
        if num_envs < services or num_envs % services:
            raise ValueError(f"num_envs {num_envs} must be a multiple of the scenario's {services} services")
        self.num_envs = num_envs
        self.worlds = num_envs // services
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = render_mode
        self._base, self._guard = base or Predictive(), guard or Guard()
        observations, actions = contract(self._base)
        self.single_observation_space = spaces.Box(
            -OBSERVATION_LIMIT, OBSERVATION_LIMIT, (len(observations),), np.float32
        )
        self.single_action_space = spaces.Box(-1.0, 1.0, (len(actions),), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._windows = list(windows) if windows else [World(0)]
        self._threads = threads
        self._scale_usd = np.tile(reward_scale_usd(self.scenario), self.worlds)
        self._cluster: Cluster | None = None
        self._seen = np.zeros((num_envs, len(observations)), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts new runs; `options={"reset_mask": bool array (num_envs,)}` restarts only those worlds."""
        super().reset(seed=seed)
        mask = (options or {}).get("reset_mask")
        if mask is None or self._cluster is None:
            indices = np.arange(self.worlds)
        else:
            indices = np.flatnonzero(np.asarray(mask, bool).reshape(self.worlds, -1).any(axis=1))
        self._restart(indices)
        return self._seen.copy(), {}

    def _restart(self, indices: np.ndarray) -> None:
        picks = self.np_random.integers(0, len(self._windows), len(indices))
        seeds = self.np_random.integers(0, 2**32, len(indices))
        fresh = [self._windows[k]._replace(seed=int(seed)) for k, seed in zip(picks, seeds, strict=True)]
        services = len(self.scenario.services)
        if self._cluster is None:
            self._cluster = Cluster(self.scenario, fresh, threads=self._threads)
            situations = [self._cluster.situation(w, s) for w in range(self.worlds) for s in range(services)]
            self._rows = corrections(situations, self._base, self._guard)
        else:
            self._cluster.restart(indices.tolist(), fresh)
            for w in indices:
                for s in range(services):
                    self._rows.restart(w * services + s, self._cluster.situation(w, s))
        self._cluster.active[indices] = True
        rows = (indices[:, None] * services + np.arange(services)).reshape(-1)
        self._seen[rows] = self._view()[rows]

    def _view(self) -> np.ndarray:
        cluster = self._cluster
        assert cluster is not None
        self._values = measure(cluster.ticks).reshape(self.num_envs, -1)
        return self._rows.view(np.repeat(cluster.now_s, len(self.scenario.services)), self._values)

    def allowed(self, choices: np.ndarray) -> np.ndarray:
        """Which of some actions, one per row, the guard's limits leave now; bool of shape (num_envs, count)."""
        return self._rows.allowed(np.asarray(choices, np.float64))

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One control tick of every world, in one compiled call."""
        cluster = self._cluster
        if cluster is None:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        services = len(self.scenario.services)
        resting = ~cluster.active
        if resting.any() and self.autoreset_mode == AutoresetMode.DISABLED:
            raise gymnasium.error.ResetNeeded(
                f"worlds {np.flatnonzero(resting).tolist()} have ended; reset them"
            )
        orders = cluster.no_orders()
        flat = orders.reshape(-1)
        order, release, batch = self._rows.decide(np.asarray(actions, np.float64), self._values)
        flat["order"], flat["release"], flat["max_batch"] = order, release, batch
        cluster.advance(orders)
        ended = cluster.active & (np.round(cluster.clock_s / self.scenario.tick_s) >= self.scenario.ticks)
        if ended.any():
            cluster.finish(np.flatnonzero(ended).tolist())
        cluster.active[ended] = False
        usd = bill(cluster.ticks, self.scenario).reshape(self.num_envs, -1)
        usd[np.repeat(resting, services)] = 0.0
        rewards = -usd.sum(axis=1) / self._scale_usd
        self._rows.update(measure(cluster.ticks).reshape(self.num_envs, -1))
        self._seen = self._view()
        truncations = np.repeat(ended, services)
        info: dict[str, Any] = {"usd": usd, "_usd": np.ones(self.num_envs, bool)}
        if self.autoreset_mode == AutoresetMode.SAME_STEP and ended.any():
            final = np.full(self.num_envs, None, object)
            for k in np.flatnonzero(truncations):
                final[k] = self._seen[k].copy()
            info |= {"final_obs": final, "_final_obs": truncations.copy()}
            self._restart(np.flatnonzero(ended))
        elif self.autoreset_mode == AutoresetMode.NEXT_STEP and resting.any():
            self._restart(np.flatnonzero(resting))
        return self._seen.copy(), rewards, np.zeros(self.num_envs, bool), truncations, info


class ServingEnv(gymnasium.Env):
    """The single-agent view: one agent steers all services of one world.

    Observations and actions are those of all services, one after another, float32; `contract(base)` names them.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (as Gymnasium declares it)

    def __init__(self, scenario: str | Scenario, *, render_mode: None = None, **options: Any) -> None:
        scenario = _as_scenario(scenario)
        services = len(scenario.services)
        self._worlds = ServingVecEnv(scenario, services, autoreset_mode=AutoresetMode.DISABLED, **options)
        self.scenario = scenario
        self.render_mode = render_mode
        seen, said = self._worlds.observation_space.shape, self._worlds.action_space.shape
        assert seen is not None
        assert said is not None
        self.observation_space = spaces.Box(
            -OBSERVATION_LIMIT, OBSERVATION_LIMIT, (int(np.prod(seen)),), np.float32
        )
        self.action_space = spaces.Box(-1.0, 1.0, (int(np.prod(said)),), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._worlds.np_random = self.np_random
        observations, info = self._worlds.reset()
        return observations.reshape(-1), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observations, rewards, _, truncations, info = self._worlds.step(
            np.asarray(action).reshape(self._worlds.num_envs, -1)
        )
        return (
            observations.reshape(-1),
            float(rewards.sum()),
            False,
            bool(truncations[0]),
            {"usd": info["usd"]},
        )


def register() -> None:
    """Registers every shipped scenario with Gymnasium; called when this module is imported."""
    for stem in shipped():
        if f"pilotage/{stem}-v0" not in gymnasium.registry:
            gymnasium.register(
                id=f"pilotage/{stem}-v0",
                entry_point="pilotage.env:ServingEnv",
                vector_entry_point="pilotage.env:ServingVecEnv",
                kwargs={"scenario": stem},
            )


register()
