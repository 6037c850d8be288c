"""Does it learn when to retrain?"""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.control.retraining import Never, Periodic, cost_of, retrained_at

retraining = pytest.importorskip("pilotage.agents.retraining")
SMALL = retraining.Settings(streams=150, iterations=2, epochs=12, hidden=24)


def over_oracle(policy, streams) -> float:
    costs = [cost_of(s.errors, s.stakes.price, retrained_at(policy, s.errors, s.stakes)) for s in streams]
    return float(np.exp(np.mean([np.log(c / s.oracle_usd) for c, s in zip(costs, streams, strict=True)])))


def test_a_learned_policy_beats_never_and_always_and_repeats_itself() -> None:
    streams = retraining.streams_at_random(np.random.default_rng(77), 120)
    learned = retraining.train(SMALL)
    reached = retraining.typical_ratio(learned, streams)
    assert 1.0 <= reached < over_oracle(Never(), streams)
    assert reached < over_oracle(Periodic(every_batches=10), streams)
    tiny = retraining.Settings(streams=10, iterations=1, epochs=1, hidden=4)
    assert retraining.train(tiny) == retraining.train(tiny)
