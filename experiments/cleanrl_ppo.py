"""PPO in one file, in the style of CleanRL, on nothing but Gymnasium, NumPy and PyTorch. Writes results/cleanrl_ppo.

Not a library's PPO: every line of the algorithm (Schulman et al. 2017, with the details that Huang et al. 2022 list)
stands here, to be read and changed. It learns corrections of the predictive rule on the quickstart's many worlds, and
is asked the same as the other: does it do better than the rule it started from, on runs that it has not seen?
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import nn
from torch.distributions import Normal

import pilotage.env  # noqa: F401  (registers the environments)
from pilotage.evaluate import ratio_interval
from pilotage.results import as_csv, provenance, write_whole

WORLDS, ROLLOUT_TICKS, EPOCHS, MINIBATCHES = 32, 128, 8, 8
DISCOUNT, TRACE, CLIP, LEARNING_RATE, MAX_GRADIENT = 0.98, 0.95, 0.2, 1e-3, 0.5


def layer(inputs: int, outputs: int, gain: float) -> nn.Linear:
    made = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(made.weight, gain)
    nn.init.zeros_(made.bias)
    return made


class Agent(nn.Module):
    def __init__(self, observations: int, actions: int) -> None:
        super().__init__()
        gain = 2**0.5
        self.critic = nn.Sequential(
            layer(observations, 64, gain), nn.Tanh(), layer(64, 64, gain), nn.Tanh(), layer(64, 1, 1.0)
        )
        self.actor = nn.Sequential(
            layer(observations, 64, gain), nn.Tanh(), layer(64, 64, gain), nn.Tanh(), layer(64, actions, 0.0)
        )
        self.log_deviation = nn.Parameter(torch.full((actions,), -1.0))

    def distribution(self, seen: torch.Tensor) -> Normal:
        return Normal(self.actor(seen), self.log_deviation.exp())


def learn(env: gymnasium.vector.VectorEnv, agent: Agent, steps: int, seed: int) -> list[tuple[int, float]]:
    """Trains in place; the mean reward per tick of every rollout."""
    optimiser = torch.optim.Adam(agent.parameters(), LEARNING_RATE, eps=1e-5)
    shape = (ROLLOUT_TICKS, env.num_envs)
    width = env.single_observation_space.shape[0]
    seen = np.zeros((*shape, width), np.float32)
    acted = np.zeros((*shape, env.single_action_space.shape[0]), np.float32)
    logp, rewards, values, ends = (np.zeros(shape, np.float32) for _ in range(4))
    now, _ = env.reset(seed=seed)
    returns, spread = np.zeros(env.num_envs), 1.0
    curve, updates = [], max(1, steps // (ROLLOUT_TICKS * env.num_envs))
    for update in range(updates):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / updates)
        gained = 0.0
        for t in range(ROLLOUT_TICKS):
            with torch.no_grad():
                state = torch.from_numpy(now)
                distribution = agent.distribution(state)
                action = distribution.sample()
                logp[t] = distribution.log_prob(action).sum(1)
                values[t] = agent.critic(state).squeeze(1)
            seen[t], acted[t] = now, action
            now, reward, _, cut, info = env.step(np.clip(acted[t], -1, 1))
            gained += reward.mean()
            # rewards in units of the returns' spread, and a run that was cut goes on in its last state's value
            returns = reward + DISCOUNT * returns * ~cut
            spread = 0.99 * spread + 0.01 * max(float(returns.std()), 1e-3)
            rewards[t], ends[t] = reward / spread, cut
            for k in np.flatnonzero(cut):
                with torch.no_grad():
                    last = agent.critic(torch.from_numpy(info["final_obs"][k]))
                rewards[t, k] += DISCOUNT * float(last)
        with torch.no_grad():
            following = agent.critic(torch.from_numpy(now)).squeeze(1).numpy()
        advantages, running = np.zeros(shape, np.float32), np.zeros(env.num_envs, np.float32)
        for t in reversed(range(ROLLOUT_TICKS)):
            ahead = values[t + 1] if t + 1 < ROLLOUT_TICKS else following
            surprise = rewards[t] + DISCOUNT * ahead * (1 - ends[t]) - values[t]
            running = surprise + DISCOUNT * TRACE * running * (1 - ends[t])
            advantages[t] = running
        flat = [
            torch.from_numpy(a.reshape(ROLLOUT_TICKS * env.num_envs, *a.shape[2:]))
            for a in (seen, acted, logp, advantages, advantages + values)
        ]
        for _ in range(EPOCHS):
            for part in torch.randperm(len(flat[0])).chunk(MINIBATCHES):
                s, a, old, advantage, target = (x[part] for x in flat)
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                ratio = (agent.distribution(s).log_prob(a).sum(1) - old).exp()
                gain = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
                loss = 0.5 * (agent.critic(s).squeeze(1) - target).square().mean() - gain
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRADIENT)
                optimiser.step()
        curve.append(((update + 1) * ROLLOUT_TICKS * env.num_envs, gained / ROLLOUT_TICKS))
    return curve


def judged_usd(agent: Agent | None, runs: int, seed: int) -> np.ndarray:
    """Dollars of whole runs, shape (runs,); without an agent, of the rule."""
    env = gymnasium.make_vec("pilotage/quickstart-v0", num_envs=runs)
    now, _ = env.reset(seed=seed)
    spent = np.zeros(runs)
    while True:
        action = np.zeros(env.action_space.shape, np.float32)
        if agent is not None:
            with torch.no_grad():
                action = agent.actor(torch.from_numpy(now)).clamp(-1, 1).numpy()
        now, _, _, cut, info = env.step(action)
        spent += info["usd"].sum(axis=1)
        if cut.all():
            return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed")
    parser.add_argument("--out", type=Path, default=Path("results/cleanrl_ppo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400_000)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.steps = 20_000
    clock, durations = time.perf_counter(), dict[str, float]()
    facts = provenance("cleanrl_ppo", sys.argv, datetime.now(UTC), durations)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    env = gymnasium.make_vec("pilotage/quickstart-v0", num_envs=WORLDS)
    agent = Agent(env.single_observation_space.shape[0], env.single_action_space.shape[0])
    curve = learn(env, agent, options.steps, options.seed)
    unseen, runs = options.seed + 1_000_000, 8 if options.quick else 40
    rule, learned = judged_usd(None, runs, unseen), judged_usd(agent, runs, unseen)
    share = ratio_interval(learned, rule)
    low, mean, high = 1 - share["high"], 1 - share["mean"], 1 - share["low"]
    print(f"{mean:.2%} cheaper than the rule it started from [{low:.2%}, {high:.2%}], {runs} unseen runs")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [{"steps": n, "reward_per_tick": f"{reward:.5f}"} for n, reward in curve]
    write_whole(options.out / "table.csv", as_csv(rows))
    line = {"line": "saving over the predictive rule, on unseen runs", "asked": "> 0", "measured": f"{mean:.5f}",
            "low": f"{low:.5f}", "high": f"{high:.5f}", "met": low > 0}  # fmt: skip
    write_whole(options.out / "acceptance.csv", as_csv([line]))
    durations["all"] = round(time.perf_counter() - clock, 1)
    write_whole(options.out / "run.json", json.dumps(facts | {"seeds": [options.seed]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
