"""Does it learn how a new version goes out, and does what is simulated cost what it should?"""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.control.canary import ABORT, PROMOTE, EProcess, Flagger
from pilotage.control.learned_rollout import ACTIONS, FEATURES
from pilotage.control.network import Forward
from pilotage.control.rollout import ExpectedDollars, FixedSteps, begun, rollout_from
from pilotage.engine.rollouts import Simulation, cases_at_random, followed

rollouts = pytest.importorskip("pilotage.agents.rollouts")


@pytest.fixture(scope="module")
def cases():
    return cases_at_random(np.random.default_rng(4711), 600)


def over_stakes(cases, rule, schedule=None) -> float:
    return float(np.mean(followed(cases, *begun(rule, schedule), 1)["usd"] / cases.stakes_usd))


def test_a_decision_costs_what_it_costs_until_the_horizon(cases) -> None:
    blindly = Flagger(threshold=1000, min_success=0.0, passes=1)
    at_once = followed(cases, *begun(blindly, FixedSteps(steps=(0.1,))), 1)
    quiet = at_once["minutes"] > 1  # no request of the canary in the first minute
    assert np.mean(quiet) < 0.2
    worth, load = cases.worth[~quiet], (cases.requests * (1 + cases.swing * np.sin(cases.phase)))[~quiet]
    first = load * np.where(worth < 0, -0.1 * worth, 0.9 * worth) + cases.trial_usd[~quiet]
    rest = (cases.horizon - 1)[~quiet] * cases.requests[~quiet] * np.maximum(-worth, 0)
    np.testing.assert_allclose(at_once["usd"][~quiet], first + rest)
    assert set(at_once["outcome"][~quiet]) == {PROMOTE}
    never = followed(cases, *begun(EProcess(alpha=1e-300), FixedSteps(steps=(0.1,))), 1)
    trial = never["usd"] - cases.trial_usd * cases.horizon
    mean = cases.requests * cases.horizon * np.where(cases.worth < 0, -0.1 * cases.worth, 0.9 * cases.worth)
    even = (cases.swing < 0.2) & (never["outcome"] == 0)  # some are so bad that even this aborts them
    assert even.sum() > 50
    np.testing.assert_allclose(trial[even], mean[even], rtol=0.25, atol=1e-9)


def test_counts_are_as_often_bad_as_their_rates_and_labels_come_late(cases) -> None:
    simulation = Simulation(cases, 3)
    share = np.full(len(cases), 0.3)
    bad, of, labels = np.zeros((2, 2)), np.zeros((2, 2)), []
    for t in range(61):
        seen, _ = simulation.step(share)
        seen.check()
        for k, arm in enumerate((seen.champion, seen.canary)):
            of[k] += [
                arm.requests.sum(),
                (arm.requests * cases.rates[0] * (cases.ratios[0] if k else 1)).sum(),
            ]
            bad[k] += [arm.errors.sum(), 0]
        labels.append(np.asarray(seen.canary.labelled) > 0)
        assert not labels[-1][cases.label_delay > t].any()
    assert np.array(labels).any(axis=0)[(cases.labelled > 0.1) & (cases.requests > 100)].all()
    np.testing.assert_allclose(bad[:, 0] / of[:, 1], 1.0, atol=0.25)  # up to the swing that both share


def test_the_shipped_policy_loses_less_than_rules_on_rollouts_it_has_not_seen(cases) -> None:
    learned = rollouts.loss_of(Forward(rollout_from("learned-rollout").network), cases, 1)
    assert learned < 1.05 * rollouts.loss_of(rollouts.Plan(), cases, 1)
    for rule, schedule in (
        (EProcess(), FixedSteps()), (EProcess(), ExpectedDollars()), (Flagger(threshold=5, passes=60), FixedSteps()),
    ):  # fmt: skip
        assert learned < over_stakes(cases, rule, schedule) - 0.01


def test_a_short_training_beats_deciding_blindly_and_the_same_seed_learns_the_same(cases) -> None:
    small = rollouts.Settings(
        imitated=60,
        epochs=6,
        steps=20_000,
        worlds=128,
        rollout_intervals=32,
        minibatch=1024,
        judged=200,
        evaluations=2,
    )
    learned = rollouts.train(small)
    reached = rollouts.loss_of(Forward(learned.network), cases)
    never, at_once = (np.maximum(sign * cases.worth, 0) * cases.requests * cases.horizon for sign in (1, -1))
    assert reached < 0.8 * min(np.mean(lost / cases.stakes_usd) for lost in (never, at_once))
    tiny = rollouts.Settings(
        imitated=5,
        epochs=1,
        steps=2000,
        worlds=32,
        rollout_intervals=32,
        minibatch=512,
        judged=20,
        evaluations=1,
        hidden=4,
    )
    assert rollouts.train(tiny) == rollouts.train(tiny)


def test_the_environment_gives_what_it_says() -> None:
    env, again = rollouts.RolloutVecEnv(8, 3), rollouts.RolloutVecEnv(8, 3)
    first, same = env.reset()[0], again.reset()[0]
    np.testing.assert_array_equal(first, same)
    assert first.shape == (8, len(FEATURES))
    rng, ends = np.random.default_rng(0), 0
    for _ in range(100):
        actions = rng.integers(0, ACTIONS, 8)
        a, b = env.step(actions), again.step(actions)
        for k in range(3):
            np.testing.assert_array_equal(a[k], b[k])
        assert env.observation_space.contains(a[0])
        assert (a[1] <= 0).all()
        ends += int(a[2].sum())
    assert ends > 10
    assert ABORT != PROMOTE
