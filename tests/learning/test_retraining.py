"""Does it learn when to retrain, and is its environment what it says?"""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from pilotage.control.learned_retraining import LearnedRetraining
from pilotage.control.lifecycle import retraining_from
from pilotage.control.network import Forward
from pilotage.control.retraining import Never, Periodic, cost_of, retrained_at
from pilotage.retraining_env import RetrainingEnv, RetrainingVecEnv, streams_of
from pilotage.world.spec import SpecError

retraining = pytest.importorskip("pilotage.agents.retraining")
SMALL = retraining.Settings(streams=200, judged=80, epochs=12, hidden=24, steps=300_000, evaluations=4)


def over_oracle(policy, streams) -> float:
    costs = []
    for s in streams:
        when = retrained_at(policy, s.errors, s.stakes, probe=s.probe if s.probed else s.probe[:0])
        costs.append(cost_of(s.errors, s.stakes.price, when))
    return float(np.exp(np.mean([np.log(c / s.oracle_usd) for c, s in zip(costs, streams, strict=True)])))


@pytest.fixture(scope="module")
def streams():
    return retraining.streams_at_random(np.random.default_rng(77), 120)


@pytest.mark.full
def test_a_learned_policy_beats_rules_and_ppo_improves_on_the_plan(streams) -> None:
    seen: list[tuple[int, float]] = []
    learned = retraining.train(SMALL, lambda steps, ratio: seen.append((steps, ratio)))
    assert seen[0][0] == 0
    assert min(ratio for _, ratio in seen) <= seen[0][1]
    reached = retraining.typical_ratio(learned, streams)
    assert 1.0 <= reached < over_oracle(Never(), streams)
    assert reached < over_oracle(Periodic(every_batches=10), streams)
    tiny = retraining.Settings(streams=10, judged=5, epochs=1, hidden=4, steps=33_000, evaluations=1)
    assert retraining.train(tiny) == retraining.train(tiny)


def test_the_shipped_policy_beats_every_rule_on_deployments_it_has_not_seen(streams) -> None:
    shipped = retraining_from("learned-retraining")
    assert isinstance(shipped, LearnedRetraining)
    reached = retraining.typical_ratio(shipped, streams)
    for rule in ("never", "ski-rental", "fresh-ski", "paired", "periodic"):
        assert reached < over_oracle(retraining_from(rule), streams) - 0.01


def test_an_episode_costs_what_the_policy_costs(streams) -> None:
    # the rewards of an episode are minus the cost over the oracle's, up to the fresh versions' errors
    shipped = retraining_from("learned-retraining")
    forward = Forward(shipped.network)
    for stream in streams[:20]:
        n = stream.errors.shape[1]
        env = RetrainingVecEnv([stream], 1)
        seen, _ = env.reset(seed=0)
        # what is paid before the first decision is in no reward: the version of the start is given
        before = min(1 + stream.stakes.label_delay, n)
        paid = sum(stream.errors[0, t] - stream.errors[t, t] for t in range(before))
        total, ended = 0.0, False
        while not ended:
            action = int(forward(seen)[0, 0] > 0)
            seen, rewards, over, _, _ = env.step(np.array([action]))
            total, ended = total + float(rewards[0]), bool(over[0])
        cost = -total * stream.oracle_usd / n + paid + np.trace(stream.errors)
        assert cost == pytest.approx(retraining.followed(shipped, stream), rel=0.02)


def test_the_environment_is_one(streams) -> None:
    check_env(gymnasium.make("pilotage/retraining-v0").unwrapped, skip_render_check=True)
    first, again = (RetrainingVecEnv(streams, 4) for _ in range(2))
    np.testing.assert_array_equal(first.reset(seed=3)[0], again.reset(seed=3)[0])
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(300):
        actions = rng.integers(0, 2, 4)
        a, b = first.step(actions), again.step(actions)
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
        assert first.observation_space.contains(a[0])
        ends += a[2].sum()
    assert ends >= 4
    with pytest.raises(gymnasium.error.ResetNeeded):
        RetrainingEnv().step(0)
    with pytest.raises(ValueError, match="streams is empty"):
        RetrainingVecEnv([], 4)
    with pytest.raises(SpecError, match="no service with a lifecycle"):
        streams_of("quickstart", 0, 1)


def test_a_rule_that_never_retrains_is_the_environment_left_alone(streams) -> None:
    stream = streams[1]
    env = RetrainingVecEnv([stream], 1)
    env.reset(seed=0)
    n, total, ended = stream.errors.shape[1], 0.0, False
    while not ended:
        _, rewards, over, _, _ = env.step(np.zeros(1, int))
        total, ended = total + float(rewards[0]), bool(over[0])
    before = min(1 + stream.stakes.label_delay, n)
    beyond = sum(stream.errors[0, t] - stream.errors[t, t] for t in range(before, n))
    assert total == pytest.approx(-beyond * n / stream.oracle_usd)
