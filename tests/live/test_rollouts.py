"""A rollout ends by itself in a promotion or a rollback, with evidence in the ledger, and survives death anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pilotage.control.canary import Arm, EProcess, Evidence, Flagger
from pilotage.control.rollout import FixedSteps, Sequential
from pilotage.live.entries import Actor
from pilotage.live.ledger import Ledger
from pilotage.live.registries import CHALLENGER, Folder, Measure, Version
from pilotage.live.rollouts import Rollout, Terms
from pilotage.live.targets import DryRunTarget, TargetError
from pilotage.live.versions import RefusedError, Versions
from pilotage.world.spec import SpecError
from tests.live.test_versions import ANN, WHY, FileTarget, Member, agree, killed_at, member, versions

__all__ = ["member", "versions"]  # fixtures
TERMS = Terms(
    rule=Sequential(errors=1.0, slow=0.0, wrong=0.0, latency=0.0, min_requests=200),
    schedule=FixedSteps(hold=2),
)


class FileTraffic:
    """Who gets which share, in a file, so that it outlives a process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def split(self, service: str, challenger: Version | None, share: float) -> str:
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps([challenger and challenger.version, round(share, 3)]))
        part.replace(self._path)
        return "split"

    @property
    def now(self) -> list[Any]:
        return json.loads(self._path.read_text())


def measured(errors: float, seed: int = 0, intervals: int = 60) -> list[Evidence]:
    """Two versions, of which the champion answers .5 % with an error."""
    rng = np.random.default_rng(seed)
    arms = [(int(n), rng) for n in rng.poisson(2000, intervals)]
    return [
        Evidence(
            Arm(requests=n, errors=int(rng.binomial(n, 0.005)), latency=np.array([n, 0])),
            Arm(
                requests=n // 4,
                errors=int(rng.binomial(n // 4, errors)),
                latency=np.array([n // 4, 0]),
                usd=0.5,
            ),
        )
        for n, rng in arms
    ]


def two(versions: Versions, member: Member) -> str:
    for _ in range(2):
        versions.add(member.draft(), **WHY)
    versions.promote(member.service, "1", **WHY)
    return member.service


def test_a_good_version_is_promoted_and_a_bad_one_sent_back_with_the_evidence(
    member: Member, versions: Versions, tmp_path: Path
) -> None:
    service, traffic = two(versions, member), FileTraffic(tmp_path / "traffic.json")
    rollout = Rollout(versions, service, traffic)
    assert rollout.resume() is None
    first = rollout.begin("2", TERMS)
    assert (first.champion, first.intervals, first.share) == ("1", 0, 0.05)
    assert traffic.now == ["2", 0.05]
    assert member.registry.aliases(service) == {"champion": "1", CHALLENGER: "2"}
    sent_back = rollout.follow(measured(0.03))
    assert sent_back is not None
    assert (sent_back.outcome, sent_back.over, traffic.now) == ("abort", True, [None, 0.0])
    assert agree(versions, service) == "1"
    assert member.registry.aliases(service) == {"champion": "1"}
    end = versions.ledger.entries(service, moves_of=CHALLENGER, last=1)[0]
    evidence = versions.ledger.entry(end.of).evidence
    assert (end.kind, end.actor.name) == ("withdraw", "sequential")
    assert end.reason.startswith("errors: the canary's")
    assert evidence["intervals"] == sent_back.intervals
    assert evidence["totals"]["canary"]["errors"] == sum(
        e.canary.errors for e in measured(0.03)[: sent_back.intervals]
    )
    rollout.begin("2", TERMS)  # once more: what was seen before does not count
    promoted = rollout.follow(measured(0.004))
    assert promoted is not None
    assert (promoted.outcome, promoted.over, traffic.now) == ("promote", True, [None, 0.0])
    assert agree(versions, service) == "2"
    assert member.registry.aliases(service) == {"champion": "2"}
    done = versions.ledger.entries(service, moves_of="champion", last=1)[0]
    intent = versions.ledger.entry(done.of)
    assert (intent.kind, intent.evidence["outcome"], intent.actor.kind) == ("promote", "promote", "rule")
    number, _, digest = intent.evidence["entries"][1].partition(":")
    assert versions.ledger.entry(int(number)).hash == digest
    with pytest.raises(SpecError, match="no rollout is under way"):
        rollout.step(measured(0.0)[0])


def test_what_serves_already_is_on_probation_and_rolled_back(versions: Versions, member: Member) -> None:
    service = two(versions, member)
    rollout = Rollout(versions, service)
    with pytest.raises(SpecError, match="none before it"):
        rollout.begin("1", TERMS)
    versions.promote(service, "2", **WHY)
    assert rollout.begin("2", TERMS).champion == "1"
    assert rollout.follow(measured(0.03)).outcome == "abort"
    assert agree(versions, service) == "1"
    back = versions.ledger.entries(service, moves_of="champion", last=1)[0]
    assert (back.kind, versions.ledger.entry(back.of).evidence["outcome"]) == ("rollback", "abort")
    versions.promote(service, "2", **WHY)
    rollout.begin("2", TERMS)
    assert rollout.follow(measured(0.004)).outcome == "promote"
    assert agree(versions, service) == "2"


def test_an_interval_counts_once_and_none_is_left_out(tmp_path: Path) -> None:
    member = Member(Folder(path=str(tmp_path)))
    versions = Versions(Ledger(tmp_path), member.registry, DryRunTarget())
    service = two(versions, member)
    seen = measured(0.005)
    rollout, other = (
        Rollout(versions, service, DryRunTarget()),
        Rollout(Versions(Ledger(tmp_path), member.registry), service),
    )
    rollout.begin("2", TERMS)
    for k in range(3):
        first = rollout.step(seen[k], k)
        assert other.step(seen[k], k) == first  # told twice, by another process
    assert first.intervals == 3
    assert first.share == 0.1
    with pytest.raises(SpecError, match="interval 7 came before 3"):
        rollout.step(seen[3], 7)
    with pytest.raises(ValueError, match="at most as many"):
        rollout.step(Evidence(Arm(requests=1), Arm(requests=1, errors=2)))
    quiet = rollout.step(Evidence(Arm(requests=0), Arm(requests=0)))
    assert (quiet.outcome, quiet.intervals, quiet.share) == ("wait", 4, 0.1)
    assert rollout.begin("2", Terms(rule=Flagger())) == quiet  # it goes on by the terms it was begun with
    with pytest.raises(RefusedError, match="version 2 is on trial"):
        rollout.begin("1", TERMS)
    with versions.ledger.alone(f"rollout of {service}"), pytest.raises(RefusedError, match="another process"):
        Rollout(versions, service, wait_s=0.05).step(seen[3])


def test_people_decide_and_nobody_is_overridden(tmp_path: Path) -> None:
    member = Member(Folder(path=str(tmp_path)))
    versions = Versions(Ledger(tmp_path), member.registry, FileTarget(tmp_path / "running.json"))
    service = two(versions, member)
    for number in ("3", "4"):
        assert versions.add(member.draft(), **WHY) == number
    rollout = Rollout(versions, service)
    rollout.begin("2", Terms(rule=EProcess()))
    rollout.step(measured(0.005)[0])
    done = rollout.decide("promote", Actor(kind="human", name="bea"), "looks fine")
    assert (done.over, agree(versions, service)) == (True, "2")
    assert versions.ledger.entries(service, moves_of="champion", last=1)[0].actor.name == "bea"
    rollout.begin("3", TERMS)
    versions.promote(service, "4", **WHY)  # somebody is faster
    end = rollout.follow(measured(0.003))
    assert (end.over, agree(versions, service)) == (True, "4")
    assert "at version 4, not 2" in end.reason
    rollout.begin("3", TERMS)
    member.move(CHALLENGER, "1")  # by hand, in the registry
    with pytest.raises(SpecError, match="no rollout is under way"):
        rollout.step(measured(0.003)[0])
    assert rollout.begin("3", TERMS).intervals == 0
    assert rollout.decide("abort", ANN, "enough").over


def test_the_bias_gate_stands_before_the_end_of_a_rollout(tmp_path: Path) -> None:
    member = Member(Folder(path=str(tmp_path)))
    versions = Versions(Ledger(tmp_path), member.registry, FileTarget(tmp_path / "running.json"))
    for share in (0.9, 0.8):
        sliced = {"sex=1": {"accuracy": Measure(value=share, n=3000)}}
        versions.add(Version(service=member.service, slices=sliced), **WHY)
    versions.promote(member.service, "1", **WHY)
    rollout = Rollout(versions, member.service)
    rollout.begin("2", TERMS)
    end = rollout.follow(measured(0.003))
    assert (end.over, agree(versions, member.service)) == (True, "1")
    assert "bias gate, block" in end.reason
    assert member.registry.aliases(member.service) == {"champion": "1"}


def test_traffic_that_cannot_be_split_leaves_a_bad_version_on_trial_until_it_can(tmp_path: Path) -> None:
    member = Member(Folder(path=str(tmp_path)))
    versions = Versions(Ledger(tmp_path), member.registry)
    service, traffic = two(versions, member), FileTraffic(tmp_path / "traffic.json")
    Rollout(versions, service, traffic).begin("2", TERMS)

    class Broken(FileTraffic):
        def split(self, service: str, challenger: Version | None, share: float) -> str:
            raise TargetError("no router")

    broken = Rollout(versions, service, Broken(tmp_path / "traffic.json"))
    with pytest.raises(TargetError, match="no router"):
        broken.step(Evidence(Arm(requests=2000, errors=5), Arm(requests=500, errors=200)))
    assert member.registry.aliases(service)[CHALLENGER] == "2"
    assert Rollout(versions, service, traffic).resume().over  # nothing is measured again
    assert traffic.now == [None, 0.0]
    assert member.registry.aliases(service) == {"champion": "1"}


@pytest.mark.full
@pytest.mark.parametrize("errors", [0.03, 0.001])
def test_death_at_every_step_of_the_end_of_a_rollout(
    errors: float, member: Member, versions: Versions, tmp_path: Path
) -> None:
    service, traffic, death = two(versions, member), FileTraffic(tmp_path / "traffic.json"), 1
    outcome = "abort" if errors > 0.005 else "promote"
    bad = Evidence(Arm(requests=20_000, errors=100), Arm(requests=20_000, errors=int(20_000 * errors)))
    while True:
        Rollout(versions, service, traffic).begin("2", TERMS)
        died = killed_at(death, versions, lambda v: Rollout(v, service, traffic).step(bad, 0), inside=False)
        if not died:
            break
        again = Rollout(Versions(Ledger(tmp_path), member.registry, versions.target), service, traffic)
        if again.resume() is not None and again.resume() is not None:
            again.step(bad, 0)  # what was not yet written down is measured again
        assert member.registry.aliases(service) == {"champion": "1" if outcome == "abort" else "2"}
        assert agree(versions, service) == ("1" if outcome == "abort" else "2")
        assert traffic.now == [None, 0.0]
        steps = [e for e in versions.ledger.entries(service) if e.kind == "canary"]
        assert len(steps) == death  # each interval once
        if outcome == "promote":
            versions.rollback(service, **WHY)
        death += 1
    assert death > 8
