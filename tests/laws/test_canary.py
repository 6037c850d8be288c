"""What must hold of canaries in a simulated cluster."""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.control.canary import Flagger
from pilotage.control.rollout import FixedSteps, Sequential
from pilotage.control.scaling import Static
from pilotage.engine.canary import Candidate, Part, Split, Trial, rehearse, with_arms
from pilotage.engine.cluster import Cluster, World, stream
from pilotage.engine.run import simulate
from pilotage.scenario import load
from pilotage.world.arrivals import Poisson
from pilotage.world.spec import SpecError

SCENARIO = load("quickstart").replace(horizon_h=1.0)
SOON = Trial(begin_h=0.1)
WORLDS = [World(1), World(2)]


def tried(candidate: Candidate, rule, **options):
    return rehearse(SCENARIO, Static(replicas=6), candidate, rule, WORLDS, trial=SOON, **options)


def test_every_request_goes_to_exactly_one_of_the_three() -> None:
    def streams(name: str) -> np.random.Generator:
        return stream(7, name)

    source = Poisson(rate_rps=20.0)
    whole = source.begin(streams, 0.0, 600.0, None).until(600.0)
    split = Split(source, stream(7, "canary/split"))
    parts = [Part(split, which) for which in range(3)]
    arrivals = [part.begin(streams, 0.0, 600.0, None) for part in parts]
    found, counts = [], np.zeros(3)
    for k in range(1, 11):
        split.shares = np.array([1 - 0.02 * k - 0.1, 0.1, 0.02 * k])
        pieces = [one.until(60.0 * k) for one in arrivals]
        counts += [len(p) for p in pieces]
        found += pieces
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), whole)
    assert counts[1] == pytest.approx(0.1 * len(whole), rel=0.1)
    assert counts[2] == pytest.approx(0.11 * len(whole), rel=0.1)


def test_a_candidate_that_is_never_tried_changes_nothing() -> None:
    plain = simulate(SCENARIO, [Static(replicas=6)] * 2, WORLDS)
    found = tried(Candidate(old_errors=0, old_wrong=0), None)
    for outcome, run in zip(found, plain, strict=True):
        assert outcome.usd == pytest.approx(run.usd[0])
        assert outcome.reached == 0


def test_what_is_promoted_gets_all_traffic_and_what_is_sent_back_none() -> None:
    at_once = Flagger(threshold=1000, min_success=0.0, passes=1)
    for outcome in tried(Candidate(), at_once):
        assert outcome.decided == "promote"
        assert 2 <= outcome.minutes <= 3  # a minute to boot, one to be judged
        assert outcome.reached > 0.7 * 40 * 3600 * 0.5
    never_good = Flagger(threshold=1, min_success=1.0)
    for outcome in tried(Candidate(new_errors=0.5), never_good):
        assert outcome.decided == "abort"
        assert 0 < outcome.reached < 1000
        assert "1 checks failed" in outcome.reason


def test_bad_versions_are_sent_back_and_the_same_seed_says_the_same() -> None:
    leaks = Candidate(new_errors=0.05)
    first, again = (tried(leaks, Sequential(), schedule=FixedSteps(steps=(0.2,))) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert a.decided == "abort"
        assert a.minutes == b.minutes
        np.testing.assert_array_equal(a.usd, b.usd)
    wrong = Candidate(new_wrong=0.3, label_delay=5)
    for outcome in tried(wrong, Sequential(), schedule=FixedSteps(steps=(0.2,))):
        assert outcome.decided == "abort"
        assert outcome.minutes >= 7  # before that no label has come
        assert outcome.reason.startswith("wrong")


def test_slower_versions_are_slower_and_one_service_is_asked_for() -> None:
    arms = with_arms(SCENARIO, Candidate(slowdown=2.0))
    law = arms.services[2].variants[0].latency["cpu"]
    assert law.base_ms == 2 * SCENARIO.services[0].variants[0].latency["cpu"].base_ms
    assert Cluster(arms, [World(0)]).shape == (1, 3)
    with pytest.raises(SpecError, match="has 24 services"):
        with_arms(load("multi-tenant"), Candidate())
