"""The view of PettingZoo: every service of a scenario is an agent, and all act at once.

`ServicesEnv("multi-tenant")` is a `pettingzoo.ParallelEnv` whose agents are the services' names. What an agent sees
and does is what `env` defines for one service; its reward is minus the dollars of its own service, so services that
share nodes have reasons of their own. All end together, truncated at the horizon.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from pettingzoo import ParallelEnv

from pilotage.env import ServingVecEnv
from pilotage.scenario import Scenario, load


class ServicesEnv(ParallelEnv[str, np.ndarray, np.ndarray]):
    """One world of a scenario with an agent per service; `options` are those of `env.ServingVecEnv`."""

    metadata: dict[str, Any] = {"name": "pilotage", "render_modes": []}  # noqa: RUF012  (as PettingZoo declares it)

    def __init__(self, scenario: str | Scenario, *, render_mode: None = None, **options: Any) -> None:
        self.scenario = scenario if isinstance(scenario, Scenario) else load(scenario)
        self.render_mode = render_mode
        self.possible_agents = [service.name for service in self.scenario.services]
        self.agents: list[str] = []
        self._worlds = ServingVecEnv(
            self.scenario, len(self.possible_agents), autoreset_mode=AutoresetMode.DISABLED, **options
        )
        seen, said = self._worlds.single_observation_space, self._worlds.single_action_space
        self._seen: dict[str, spaces.Space[Any]] = dict.fromkeys(self.possible_agents, seen)
        self._said: dict[str, spaces.Space[Any]] = dict.fromkeys(self.possible_agents, said)

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return self._seen[agent]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return self._said[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
        observations, _ = self._worlds.reset(seed=seed)
        self.agents = list(self.possible_agents)
        return self._by_agent(observations), {agent: {} for agent in self.agents}

    def step(
        self, actions: dict[str, np.ndarray]
    ) -> tuple[
        dict[str, np.ndarray], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]
    ]:
        """One control tick; every agent has to act. `info["usd"]` itemises an agent's dollars."""
        joint = np.stack([actions[agent] for agent in self.possible_agents])
        observations, rewards, _, truncations, info = self._worlds.step(joint)
        agents = self.agents
        if truncations.all():
            self.agents = []
        return (
            self._by_agent(observations),
            dict(zip(agents, rewards.tolist(), strict=True)),
            dict.fromkeys(agents, False),
            dict(zip(agents, truncations.tolist(), strict=True)),
            {agent: {"usd": info["usd"][k]} for k, agent in enumerate(agents)},
        )

    def _by_agent(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self.possible_agents, rows, strict=True))
