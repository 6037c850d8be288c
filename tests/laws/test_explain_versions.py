"""Decisions about versions, as choices: they are what the policies decided, and dollars follow what is done."""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.control.canary import EProcess, Evidence, Judge, Rule
from pilotage.control.lifecycle import retraining_from
from pilotage.control.rollout import rollout_from
from pilotage.control.scaling import parse
from pilotage.engine.canary import Candidate, Trial
from pilotage.engine.cluster import World
from pilotage.explain.attribution import attribute
from pilotage.explain.versions import (
    VERDICTS,
    RolloutReplay,
    canaries,
    deployments,
    retraining_choices,
    weigh_retraining,
)
from pilotage.metrics import ITEMS
from pilotage.retraining_env import streams_of
from pilotage.scenario import load

STREAMS = streams_of("drift-sudden", 5, 4)


@pytest.mark.parametrize("name", ["learned-retraining", "paired", "ski-rental"])
def test_the_outcome_in_the_explained_state_is_what_was_decided(name: str) -> None:
    choices, batches = retraining_choices(retraining_from(name), STREAMS, 8, 6)
    assert len(choices) == len(batches) > 0
    for choice, batch in zip(choices, batches, strict=True):
        own = choice.outcome(np.zeros((1, len(choice.names)), int))
        assert bool(choice.label(own)[0]) == batch.retrain
    one = attribute(choices[0])
    assert one.phi.sum() == pytest.approx(one.outcome - one.usual, abs=1e-6)


def test_what_a_retraining_costs_is_its_price_and_the_answers_that_follow() -> None:
    policy = retraining_from("never")
    batch = deployments(policy, STREAMS[:1])[0][12]
    usd = weigh_retraining(policy, batch, 0.5, futures=30)
    errors, retrained = ITEMS.index("errors"), ITEMS.index("retraining")
    assert (usd[0, :, retrained] == 0).all()
    np.testing.assert_allclose(usd[1, :, retrained], 0.5 * batch.stream.stakes.price)
    at, stream = batch.at, batch.stream
    kept, fresh = stream.errors[0, at:].sum(), stream.errors[at, at:].sum()
    assert usd[0, :, errors].mean() == pytest.approx(0.5 * kept, rel=0.05)
    assert usd[1, :, errors].mean() == pytest.approx(0.5 * fresh, rel=0.05)


def test_a_canarys_verdict_is_explained_by_its_errors() -> None:
    scenario = load("quickstart").replace(horizon_h=0.5)
    rule, bad = EProcess(), Candidate(new_errors=0.2)
    trial = Trial(begin_h=0.1)
    heard = canaries(
        rule, scenario, parse("static:replicas=4"), [bad, Candidate()], [World(1), World(2)], trial
    )
    for one in heard:
        others = [other for other in heard if other is not one]
        choice = RolloutReplay(rule, one, others)
        assert choice.outcome(np.zeros((1, len(choice.names)), int))[0] == VERDICTS[one.outcome.decided]
    sent_back = next(one for one in heard if one.outcome.decided == "abort")
    harmless = [one for one in heard if one.candidate == Candidate()]
    found = attribute(RolloutReplay(rule, sent_back, harmless), method="exact")
    assert found.choice.names[found.ranked[0]] == "canary_errors"
    assert found.phi[found.ranked[0]] < 0


def test_requests_follow_the_shares_that_a_learned_rule_says_in_the_replay() -> None:
    rule = rollout_from("learned-rollout:prior_bad=0.5,horizon=30")
    scenario = load("quickstart").replace(horizon_h=0.5)
    heard = canaries(
        rule, scenario, parse("static:replicas=4"), [Candidate(new_errors=0.008), Candidate()],
        [World(1), World(2)], Trial(begin_h=0.1),
    )  # fmt: skip
    assert len({share for one in heard for share in one.outcome.shares}) > 1
    for one in heard:
        choice = RolloutReplay(rule, one, [other for other in heard if other is not one])
        assert choice.outcome(np.zeros((1, 7), int))[0] == VERDICTS[one.outcome.decided]
        for told, says in ((listened(choice, rule), None), (listened(choice, rule, says=0.025), 0.025)):
            for seen, then, share in zip(told, one.outcome.evidence, one.outcome.shares, strict=True):
                requests = then.canary.requests * (1 if says is None else says / share)
                assert seen.canary.requests[0] == pytest.approx(requests, abs=0.5)


def listened(choice: RolloutReplay, rule: Rule, says: float | None = None) -> list[Evidence]:
    """What a rule is told when it is asked for its decision; with `says`, that is its share throughout."""
    told: list[Evidence] = []

    class Listening:
        def begin(self) -> Judge:
            judge = rule.begin()
            step = judge.step
            judge.step = lambda seen: told.append(seen) or step(seen)
            if says is not None:
                judge.weight = lambda _: np.asarray(says)
            return judge

    choice._rule = Listening()
    choice.ask(np.zeros((1, len(choice.names)), int))
    return told
