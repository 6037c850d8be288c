"""The PettingZoo view is one, and is the same world as the others."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("pettingzoo")

from pettingzoo.test import parallel_api_test

from pilotage.env import ServingVecEnv
from pilotage.parallel_env import ServicesEnv
from pilotage.scenario import load

SCENARIO = load("multi-tenant").replace(horizon_h=0.2, history_h=0.0)


def test_it_is_a_parallel_environment() -> None:
    parallel_api_test(ServicesEnv(SCENARIO), num_cycles=30)


def test_agents_live_in_the_world_of_the_vector_environment() -> None:
    agents, rows = ServicesEnv(SCENARIO), ServingVecEnv(SCENARIO, len(SCENARIO.services))
    seen, _ = agents.reset(seed=3)
    other, _ = rows.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(5):
        np.testing.assert_array_equal(np.stack(list(seen.values())), other)
        action = rng.uniform(-1, 1, rows.action_space.shape).astype(np.float32)
        seen, rewards, _, _, infos = agents.step(dict(zip(agents.agents, action, strict=True)))
        other, expected, _, _, info = rows.step(action)
        np.testing.assert_array_equal(list(rewards.values()), expected)
        np.testing.assert_array_equal([infos[agent]["usd"] for agent in rewards], info["usd"])


def test_all_agents_leave_at_the_horizon() -> None:
    env = ServicesEnv(SCENARIO)
    env.reset(seed=0)
    zero = {agent: np.zeros(env.action_space(agent).shape or (), np.float32) for agent in env.agents}
    steps = 0
    while env.agents:
        _, _, terminations, truncations, _ = env.step(zero)
        steps += 1
    assert steps == SCENARIO.ticks
    assert all(truncations.values())
    assert not any(terminations.values())
