"""Does training work at all? Problems whose optimum is known, and training that repeats itself."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pilotage.agents.tune import candidate_of, choose, run_groups, space, tune, typical_usd
from pilotage.control.learned import ACTIONS
from pilotage.control.network import Forward
from pilotage.control.scaling import Predictive, Static
from pilotage.engine.cluster import World
from pilotage.env import ServingVecEnv
from pilotage.scenario import load
from pilotage.world.arrivals import Poisson
from pilotage.world.spec import SpecError

torch = pytest.importorskip("torch")
VecNormalize = pytest.importorskip("stable_baselines3.common.vec_env").VecNormalize
train_module = pytest.importorskip("pilotage.agents.train")
algorithms = pytest.importorskip("pilotage.agents.algorithms")
Settings, train = algorithms.Settings, train_module.train

STEADY = load("steady")
# constant traffic without history effects: three replicas are the best static size by far
FIXED = STEADY.replace(
    horizon_h=0.25,
    services=(STEADY.services[0].replace(traffic=Poisson(rate_rps=40.0), initial_replicas=3),),
)
# so generous a rule that the optimum is to undo it: an agent that learns must cut the headroom
WASTEFUL = Predictive(beta=2.0, z=0.0, margin=1.0, seasonal_weight=0.0, scale_down_delay_s=15.0)


def windows(first: int, count: int) -> list[World]:
    return [World(first + k) for k in range(count)]


def test_tuning_finds_the_best_static_size() -> None:
    groups = [windows(10, 2)]
    costs = {n: typical_usd(run_groups(FIXED, groups, Static(replicas=n))) for n in range(1, 9)}
    best = min(costs, key=costs.__getitem__)
    assert 1 < best < 8
    study = tune(Static(replicas=20), FIXED, groups, trials=50, seed=1)
    chosen = choose(Static(replicas=20), study, FIXED, [windows(50, 2)])
    assert abs(chosen.replicas - best) <= 1
    assert study.best_value <= 1.1 * costs[best]


def test_tuning_repeats_itself_and_resumes(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first = tune(Static(), FIXED, [windows(1, 1)], trials=6, seed=3)
    second = tune(Static(), FIXED, [windows(1, 1)], trials=6, seed=3)
    assert [t.params for t in first.trials] == [t.params for t in second.trials]
    tune(Static(), FIXED, [windows(1, 1)], trials=2, seed=3, storage=storage)
    resumed = tune(Static(), FIXED, [windows(1, 1)], trials=4, seed=3, storage=storage)
    assert len(resumed.trials) == 4


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_tuning_has_several_objectives(sampler: str) -> None:
    study = tune(
        Static(), FIXED, [windows(1, 1)], trials=10, seed=0, objectives=("usd", "attainment"), sampler=sampler
    )
    front = sorted(t.values for t in study.best_trials)
    assert len(front) >= 2
    assert all(later[1] > earlier[1] for earlier, later in pairwise(front))  # dearer ones attain more
    assert all(0 <= t.values[1] <= 1 for t in study.trials)


def test_a_search_starts_from_what_is_known() -> None:
    groups = [windows(1, 1)]
    earlier = tune(
        Static(replicas=20), FIXED, [windows(7, 1)], trials=12, seed=2, objectives=("usd", "attainment")
    )
    known = {t.params["replicas"] for t in earlier.best_trials}
    study = tune(
        Static(replicas=20), FIXED, groups, trials=3 + len(known), starts=[Static(replicas=4), earlier]
    )
    first = [t.params["replicas"] for t in study.trials[: 2 + len(known - {4, 20})]]
    assert first[:2] == [20, 4]
    assert set(first) == known | {20, 4}
    assert study.best_value <= min(typical_usd(run_groups(FIXED, groups, Static(replicas=n))) for n in first)
    with pytest.raises(SpecError, match=r"predictive.* is no static"):
        tune(Static(), FIXED, groups, trials=1, starts=[Predictive()])
    with pytest.raises(SpecError, match="has tuned 'replicas', which 'predictive' does not have"):
        tune(Predictive(), FIXED, groups, trials=1, starts=[earlier])


def test_the_search_space_is_what_the_fields_declare() -> None:
    found = space(Predictive())
    assert found["scale_down_delay_s"].log
    assert (found["z"].low, found["z"].high) == (0, 3)
    assert candidate_of(Predictive(), {"z": 0.123456}).z == 0.1235


@pytest.mark.full
def test_ppo_learns_to_undo_a_wasteful_rule(tmp_path: Path) -> None:
    groups = [windows(900, 3)]
    before = typical_usd(run_groups(FIXED, groups, WASTEFUL))
    settings = Settings(
        steps=40_960, worlds=16, rollout_ticks=32, minibatches=4, evaluations=6, learning_rate=2e-3
    )
    learned = train(FIXED, WASTEFUL, windows(0, 1), [windows(500, 3)], settings, tmp_path)
    after = typical_usd(run_groups(FIXED, groups, learned))
    assert after < 0.95 * before  # the best static size costs less than half: there is room
    curve = (tmp_path / "learning_curve.csv").read_text().splitlines()
    assert curve[0] == "steps,validation_usd,base_usd,best"
    assert len(curve) >= 6


def test_training_repeats_itself_and_its_network_is_the_actor(tmp_path: Path) -> None:
    settings = Settings(steps=1024, worlds=8, rollout_ticks=32, minibatches=2, evaluations=1, seed=4)
    for name in ("a", "b"):
        train(FIXED, Predictive(), windows(0, 1), [windows(5, 1)], settings, tmp_path / name)
    assert (tmp_path / "a" / "policy.json").read_bytes() == (tmp_path / "b" / "policy.json").read_bytes()
    assert (tmp_path / "a" / "learning_curve.csv").read_text() == (
        tmp_path / "b" / "learning_curve.csv"
    ).read_text()


@pytest.mark.parametrize("algo", algorithms.ALGORITHMS)
def test_the_exported_policy_acts_as_the_sb3_model(algo: str, tmp_path: Path) -> None:
    """Masks and memory included: the same orders, tick by tick, as the model gives from its own state."""
    plain = train_module.SB3VecEnv(ServingVecEnv(FIXED, 4, base=WASTEFUL))
    if algo in algorithms.DISCRETE:
        plain = algorithms.Chosen(plain, algorithms.choices(WASTEFUL))
    env = VecNormalize(plain)
    settings = Settings(algo=algo, steps=1024, rollout_ticks=32, minibatches=2, learning_rate=1e-2)
    model = algorithms.fresh(settings, env, tmp_path)
    draws = torch.Generator().manual_seed(7)
    with torch.no_grad():  # as if it had learned something
        for weights in model.policy.parameters():
            weights += 0.2 * torch.randn(weights.shape, generator=draws)
    env.reset()
    for _ in range(4):  # the normaliser sees something, too
        env.step(np.array([env.action_space.sample() for _ in range(4)]))
    env.training = False
    policy = algorithms.exported(model, env, WASTEFUL)
    forward = Forward(policy.network)
    observations, state, starts, varied = env.reset(), None, np.ones(4, bool), set()
    for _ in range(6):
        masks = {"action_masks": plain.action_masks()} if algo == "maskable-ppo" else {}
        expected, state = model.predict(
            observations, state, starts if policy.network.memory else None, deterministic=True, **masks
        )
        found = forward(env.get_original_obs())
        if policy.choices:
            chosen = (np.where(masks["action_masks"], found, -np.inf) if masks else found).argmax(axis=1)
            np.testing.assert_array_equal(chosen, expected)
            assert np.array(policy.choices.options)[chosen].shape == (4, len(ACTIONS))
        else:
            np.testing.assert_allclose(np.clip(found, -1, 1), expected, atol=1e-5)
            assert np.abs(expected).max() > 1e-3
        varied.add(np.round(expected, 4).tobytes())
        observations, _, starts, _ = env.step(expected)
    assert len(varied) > 1 or policy.choices


def test_choices_begin_with_the_base_and_masks_leave_what_the_guard_allows() -> None:
    choices = np.array(algorithms.choices(Predictive()))
    assert not choices[0].any()
    assert len({tuple(row) for row in choices.tolist()}) == len(choices)
    tight = FIXED.replace(services=(FIXED.services[0].replace(min_replicas=3, max_replicas=3),))
    env = ServingVecEnv(tight, 2)
    env.reset(seed=0)
    masks = env.allowed(choices)
    assert masks.shape == (2, len(choices))
    assert masks[:, 0].all()
    assert not masks.all()
    wide = ServingVecEnv(FIXED.replace(services=(FIXED.services[0].replace(min_replicas=0),)), 2)
    wide.reset(seed=0)
    assert wide.allowed(choices).all()


@pytest.mark.full
@pytest.mark.parametrize(
    ("algo", "steps", "rate"),
    [
        ("sac", 12_288, 1e-3),
        ("tqc", 12_288, 1e-3),
        ("qr-dqn", 24_576, 1e-3),
        ("maskable-ppo", 40_960, 2e-3),
        ("recurrent-ppo", 40_960, 2e-3),
    ],
)
def test_every_algorithm_learns_to_undo_a_wasteful_rule(
    algo: str, steps: int, rate: float, tmp_path: Path
) -> None:
    groups = [windows(900, 3)]
    before = typical_usd(run_groups(FIXED, groups, WASTEFUL))
    settings = Settings(
        algo=algo, steps=steps, worlds=16, rollout_ticks=32, minibatches=4, evaluations=6, learning_rate=rate,
        gradient_steps=2, memory=16,
    )  # fmt: skip
    learned = train(FIXED, WASTEFUL, windows(0, 1), [windows(500, 3)], settings, tmp_path)
    assert typical_usd(run_groups(FIXED, groups, learned)) < 0.95 * before


def test_training_resumes_where_it_stopped(tmp_path: Path) -> None:
    settings = Settings(steps=1024, worlds=8, rollout_ticks=32, minibatches=2, evaluations=2)
    train(FIXED, Predictive(), windows(0, 1), [windows(5, 1)], settings, tmp_path)
    longer = Settings(steps=2048, worlds=8, rollout_ticks=32, minibatches=2, evaluations=2)
    train(FIXED, Predictive(), windows(0, 1), [windows(5, 1)], longer, tmp_path, resume=True)
    steps = [
        int(line.split(",")[0]) for line in (tmp_path / "learning_curve.csv").read_text().splitlines()[1:]
    ]
    assert steps[0] == 0
    assert steps[-1] == 2048
    assert steps == sorted(steps)
