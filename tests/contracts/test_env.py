"""Environments: Gymnasium's and SB3's checkers, autoreset modes, seeding, and law 8 (env = steer loop)."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import pilotage.env
from pilotage.control.foresight import Anticipate, Foresight
from pilotage.control.guard import Guard
from pilotage.control.learned import ACTIONS, Learned, contract, trained
from pilotage.control.network import Network
from pilotage.control.scaling import Predictive
from pilotage.engine.cluster import World
from pilotage.engine.run import simulate
from pilotage.env import ServingEnv, ServingVecEnv, reward_scale_usd
from pilotage.scenario import load, shipped
from pilotage.world.spec import decode

SHORT = load("quickstart").replace(horizon_h=0.1)
SYNTHETIC = [stem for stem in shipped() if stem not in ("azure-chat", "llm-chat")]


def two_services():
    one = SHORT.services[0]
    return SHORT.replace(services=(one, one.replace(name="other", slo_ms=900.0)))


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("stem", SYNTHETIC)
def test_gymnasium_makes_and_checks_every_environment(stem: str) -> None:
    env = gymnasium.make(f"pilotage/{stem}-v0")
    check_env(env.unwrapped, skip_render_check=True)


def test_sb3_checks_the_single_environment() -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(ServingEnv(SHORT))


def test_sb3_trains_on_the_plain_environment_with_no_other_code() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.PPO("MlpPolicy", ServingEnv(SHORT), n_steps=32, batch_size=32, device="cpu").learn(64)
    assert model.num_timesteps == 64


def test_the_vector_entry_point_is_registered() -> None:
    envs = gymnasium.make_vec("pilotage/quickstart-v0", num_envs=3, vectorization_mode="vector_entry_point")
    observations, _ = envs.reset(seed=1)
    assert envs.observation_space.contains(observations)
    assert envs.unwrapped.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP


def rollout(env: ServingVecEnv, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    seen = [env.reset(seed=seed)[0]]
    rewards, ends = [], []
    for _ in range(steps):
        actions = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(actions)
        assert env.observation_space.contains(observation)
        assert not terminated.any()
        seen.append(observation)
        rewards.append(reward)
        ends.append(truncated)
    return np.array(seen), np.array(rewards), np.array(ends)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_the_same_seed_gives_the_same_bytes_across_resets(mode: AutoresetMode) -> None:
    first = rollout(ServingVecEnv(SHORT, 3, autoreset_mode=mode), 5, 60)
    second = rollout(ServingVecEnv(SHORT, 3, autoreset_mode=mode, threads=2), 5, 60)
    other = rollout(ServingVecEnv(SHORT, 3, autoreset_mode=mode), 6, 60)
    for a, b in zip(first, second, strict=True):
        assert a.tobytes() == b.tobytes()
    assert first[0].tobytes() != other[0].tobytes()


def test_same_step_autoreset_hands_out_the_final_observation() -> None:
    env = ServingVecEnv(SHORT, 2)
    env.reset(seed=0)
    zero = np.zeros(env.action_space.shape, np.float32)
    for k in range(SHORT.ticks):
        observation, _, _, truncated, info = env.step(zero)
        assert truncated.all() == (k == SHORT.ticks - 1)
    assert info["_final_obs"].all()
    assert env.single_observation_space.contains(info["final_obs"][0])
    assert not np.array_equal(info["final_obs"][0], observation[0])


def test_next_step_autoreset_resets_on_the_following_step_with_no_reward() -> None:
    env = ServingVecEnv(SHORT, 2, autoreset_mode="NextStep")
    env.reset(seed=0)
    zero = np.zeros(env.action_space.shape, np.float32)
    for _ in range(SHORT.ticks):
        _, reward, _, truncated, info = env.step(zero)
    assert truncated.all()
    assert (reward < 0).all()
    assert "final_obs" not in info
    _, reward, _, truncated, _ = env.step(zero)
    assert not truncated.any()
    assert (reward == 0).all()
    assert (env.step(zero)[1] < 0).all()


def test_disabled_autoreset_waits_for_a_masked_reset() -> None:
    env = ServingVecEnv(SHORT, 2, autoreset_mode="Disabled")
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(env.action_space.shape))
    env.reset(seed=0)
    zero = np.zeros(env.action_space.shape, np.float32)
    for _ in range(SHORT.ticks):
        env.step(zero)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(zero)
    env.reset(options={"reset_mask": np.array([True, True])})
    env.step(zero)


def test_a_masked_reset_leaves_the_other_worlds_alone() -> None:
    zero = np.zeros((2, len(ACTIONS)), np.float32)
    plain, masked = (ServingVecEnv(SHORT, 2) for _ in range(2))
    for env in (plain, masked):
        env.reset(seed=3)
        for _ in range(5):
            env.step(zero)
    masked.reset(options={"reset_mask": np.array([False, True])})
    for _ in range(5):
        a, b = plain.step(zero), masked.step(zero)
        assert a[0][0].tobytes() == b[0][0].tobytes()
        assert a[1][0] == b[1][0]
        assert a[0][1].tobytes() != b[0][1].tobytes()


BASES = [Predictive(), Anticipate(), Foresight()]


def zero_network(base=BASES[0], bias: float = 0.0) -> Network:
    observations, actions = contract(base)
    n = len(observations)
    return Network(
        mean=(0.0,) * n, scale=(1.0,) * n, clip=10.0, weights=(((0.0,) * n,) * len(actions),),
        biases=((bias,) * len(actions),),
    )  # fmt: skip


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__struct_config__.tag)
@pytest.mark.parametrize("scenario", [SHORT, two_services()], ids=["one service", "two services"])
@pytest.mark.parametrize("bias", [0.0, 0.4, -0.7])
def test_law_8_the_environment_follows_the_steer_loop(scenario, bias: float, base) -> None:
    env = ServingVecEnv(scenario, len(scenario.services), base=base, autoreset_mode="Disabled")
    env.reset(seed=11)
    world = env.unwrapped._cluster.worlds[0]
    rewards, usd = [], []
    for _ in range(scenario.ticks):
        _, reward, _, _, info = env.step(np.full(env.action_space.shape, bias))
        rewards.append(reward)
        usd.append(info["usd"])
    policy = Learned(base=base, network=zero_network(base, bias))
    run = simulate(scenario, [policy], [World(world.seed)], guard=Guard())[0]
    np.testing.assert_allclose(np.sum(usd, axis=0), run.usd, rtol=1e-9, atol=1e-9)
    # sum(parts) == reward, every step, exactly
    for reward, items in zip(rewards, usd, strict=True):
        np.testing.assert_array_equal(reward, -items.sum(axis=1) / reward_scale_usd(scenario))


@pytest.mark.parametrize("rule", BASES, ids=lambda base: base.__struct_config__.tag)
def test_a_zero_action_is_the_rule_itself(rule) -> None:
    silent = Learned(base=rule, network=zero_network(rule))
    runs = simulate(SHORT, [rule, silent], [World(1), World(1)], guard=Guard())
    np.testing.assert_array_equal(runs[0].usd, runs[1].usd)
    assert runs[0].totals.tobytes() == runs[1].totals.tobytes()


def test_a_learned_policy_survives_the_disk(tmp_path) -> None:
    policy = Learned(base=Predictive(), network=zero_network(bias=0.123456789))
    policy.save(tmp_path)
    assert trained(tmp_path) == policy


def test_num_envs_must_fit_the_services() -> None:
    with pytest.raises(ValueError, match="multiple"):
        ServingVecEnv(two_services(), 3)


def test_importing_the_module_registers_every_scenario() -> None:
    pilotage.env.register()  # twice does no harm
    assert {f"pilotage/{stem}-v0" for stem in shipped()} <= set(gymnasium.registry)


def test_decode_of_a_policy_file_checks_the_network() -> None:
    import msgspec

    raw = msgspec.to_builtins(Learned(base=Predictive(), network=zero_network()))
    raw["network"]["biases"] = [[0.0]]
    with pytest.raises(ValueError, match="does not fit"):
        decode(raw, Learned, "policy.json")
