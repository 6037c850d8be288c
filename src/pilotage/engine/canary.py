"""Canaries in a simulated cluster: a new version beside the old one, on replicas of its own, with a share of the
traffic.

A `Candidate` is the version on trial: it may err more, be slower, or answer with errors. `rehearse` runs a scenario
of one service with it: after `begin_h` the candidate gets the share of requests that a schedule says, a fresh
baseline of the old version gets as much, and a rule judges the two interval by interval, on counts as a monitor would
report them, until it promotes the candidate or sends it back. Both the candidate and the baseline are services of the
cluster: they boot, batch, queue and are billed like everything else. Which request goes where is drawn once per
request, whatever the shares are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from pilotage.control.canary import Arm, Evidence, Rule
from pilotage.control.guard import Guard
from pilotage.control.policy import Decision, Observation, Policy
from pilotage.control.rollout import AnySchedule, begun
from pilotage.control.steer import Helm, steer
from pilotage.engine.cluster import Cluster, Recorded, World, stream
from pilotage.engine.run import bill
from pilotage.metrics import ITEMS
from pilotage.scenario import Scenario
from pilotage.world.arrivals import Arrivals, Traffic
from pilotage.world.servers import Affine, Variant
from pilotage.world.services import Service
from pilotage.world.spec import Count, Positive, Probability, Spec, SpecError

OLD, BASELINE, NEW = range(3)


class Candidate(Spec, frozen=True, kw_only=True):
    """The version on trial, and the old one beside it: shares of requests answered with an error (5xx) and of answers
    that are wrong, and how many times as long a batch takes under the new one. A share `labelled` of the answers is
    checked, `label_delay` intervals late."""

    old_errors: Probability = 0.005
    new_errors: Probability = 0.005
    old_wrong: Probability = 0.05
    new_wrong: Probability = 0.05
    slowdown: Annotated[float, Meta(ge=0.1, le=10)] = 1.0
    labelled: Probability = 0.2
    label_delay: Count = 30


class Trial(Spec, frozen=True, kw_only=True):
    """When the candidate comes, how often it is judged, and how much of the traffic it may have by then."""

    begin_h: Positive = 0.5
    interval_s: Positive = 60.0
    most: Annotated[float, Meta(gt=0, lt=0.5)] = 0.4  # the baseline gets as much as the candidate


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a candidate: `decided` is "promote", "abort" or "" (none until the end) after `minutes`; `usd`
    has the items of the bill (errors: wrong answers; what was answered with an error is dropped); `reached` counts
    requests that the candidate served before. `evidence` is what the rule saw, interval by interval, and `shares` are
    the candidate's of the traffic in them."""

    decided: str
    minutes: float
    usd: np.ndarray
    reached: int
    reason: str
    evidence: tuple[Evidence, ...] = ()
    shares: tuple[float, ...] = ()

    @property
    def total_usd(self) -> float:
        return float(self.usd.sum())


class Split:
    """The traffic of one service, shared out among three by `shares`, which may change with time."""

    def __init__(self, traffic: Traffic | Recorded, rng: np.random.Generator) -> None:
        self._traffic, self._rng = traffic, rng
        self.shares = np.array([1.0, 0.0, 0.0])
        self._source: Arrivals | None = None
        self._until_s = -1.0
        self._parts: list[np.ndarray] = []

    def until(self, t_s: float, which: int) -> np.ndarray:
        assert self._source is not None
        if t_s != self._until_s:
            times = self._source.until(t_s)
            # a request's draw decides where it goes: the candidate's from below, the baseline's from above
            draw = self._rng.random(len(times))
            new = draw < self.shares[NEW]
            baseline = ~new & (draw >= 1 - self.shares[BASELINE])
            self._parts = [times[~new & ~baseline], times[baseline], times[new]]
            self._until_s = t_s
        return self._parts[which]

    def open(self, *where: Any) -> None:
        self._source = self._traffic.begin(*where)


class Part:
    """One of the three, as a source of a service. The first opens the traffic."""

    def __init__(self, split: Split, which: int) -> None:
        self._split, self._which = split, which

    def begin(self, streams: Any, start_s: float, end_s: float, data: Path | None) -> Any:
        if self._which == OLD:
            self._split.open(streams, start_s, end_s, data)
        return self

    def until(self, t_s: float) -> np.ndarray:
        return self._split.until(t_s, self._which)


def with_arms(scenario: Scenario, candidate: Candidate) -> Scenario:
    """The scenario of one service with a baseline and a candidate beside it, of no replicas to begin with."""
    if len(scenario.services) != 1:
        raise SpecError(
            f"scenario {scenario.name!r} has {len(scenario.services)} services; a canary is rehearsed with one"
        )
    service = scenario.services[0]
    slower = tuple(_slower(variant, candidate.slowdown) for variant in service.variants)

    def arm(name: str, variants: tuple[Variant, ...]) -> Service:
        arms: Service = service.replace(
            name=f"{service.name[:50]}.{name}",
            variants=variants,
            initial_replicas=0,
            min_replicas=max(1, service.min_replicas),
        )
        return arms

    arms: Scenario = scenario.replace(
        services=(service, arm("baseline", service.variants), arm("candidate", slower))
    )
    return arms


def _slower(variant: Variant, slowdown: float) -> Variant:
    laws = {}
    for pool, law in variant.latency.items():
        if not isinstance(law, Affine):
            raise SpecError(f"variant {variant.name!r}: latency of kind 'table'; a canary needs 'affine'")
        laws[pool] = law.replace(base_ms=law.base_ms * slowdown, per_item_ms=law.per_item_ms * slowdown)
    changed: Variant = variant.replace(latency=laws)
    return changed


class _Arms:
    """Follows one candidate in one world."""

    def __init__(
        self, candidate: Candidate, trial: Trial, rule: Rule, schedule: AnySchedule | None, seed: int
    ) -> None:
        self._candidate, self._trial = candidate, trial
        self._error_share = np.array([candidate.old_errors, candidate.old_errors, candidate.new_errors])
        self._wrong_share = np.array([candidate.old_wrong, candidate.old_wrong, candidate.new_wrong])
        self._judge, self._schedule = begun(rule, schedule)
        self._rng = stream(seed, "canary/answers")
        self._waiting: deque[tuple[tuple[int, int], tuple[int, int]]] = deque()
        self.outcome, self.minutes, self.reason = "", 0.0, ""
        self.share, self.needed, self.asked = 0.0, 0, False
        self.evidence: list[Evidence] = []
        self.shares: list[float] = []
        self.wrong = np.zeros(3)
        self.failed = np.zeros(3)
        self._seen = np.zeros((3, 3), int)  # of this interval: requests, late, and errors, by arm
        self._right = np.zeros(3, int)
        self._next_s = trial.begin_h * 3600

    def tick(self, now_s: float, ready: np.ndarray, served: np.ndarray, late: np.ndarray) -> np.ndarray:
        """What the arms, with so many replicas ready, did in a tick; at the end of an interval, the verdict. Returns
        how traffic is to be shared from now on."""
        failed = self._rng.binomial(served, self._error_share)
        self.failed += failed
        self.wrong += (served - failed) * self._wrong_share
        self._seen += np.stack([served, late, failed])
        self._right += self._rng.binomial(served - failed, self._candidate.labelled)
        if now_s + 1e-6 >= self._next_s and not self.outcome:
            self._next_s += self._trial.interval_s
            evidence = self._verdict(now_s) if self.share > 0 else None
            # arms get traffic once they are there, as a Kubernetes service would have it
            if not self.outcome and (self.share > 0 or min(ready[BASELINE], ready[NEW]) > 0):
                self.share = min(float(self._schedule.weight(evidence)), self._trial.most)
            self._seen[:] = 0
            self._right[:] = 0
        self.asked = now_s + 1e-6 >= self._trial.begin_h * 3600
        if self.outcome == "abort":
            return np.array([1.0, 0.0, 0.0])
        if self.outcome == "promote":  # as fast as replicas of the new version come
            self.share = max(self.share, min(1.0, ready[NEW] / max(self.needed, 1)))
            return np.array([1 - self.share, 0.0, self.share])
        return np.array([1 - 2 * self.share, self.share, self.share])

    def steered(self, seen: Sequence[Observation], wanted: Sequence[Decision]) -> list[Decision]:
        """The scaling policy's decisions, but what has no part in the trial has no replicas, and what is promoted
        gets as many as the old version has."""
        idle = [False, not self.asked or self.outcome != "", not self.asked or self.outcome == "abort"]
        out = [
            Decision(release=one.replicas, reason="not on trial") if rests else decision
            for one, decision, rests in zip(seen, wanted, idle, strict=True)
        ]
        if self.outcome == "promote":
            if self.share < 1:
                self.needed = max(self.needed, seen[OLD].replicas)
                out[OLD], out[NEW] = Decision(), Decision.towards(self.needed, seen[NEW], reason="promoted")
            else:
                out[OLD] = Decision(release=seen[OLD].replicas, reason="replaced")
        return out

    def _verdict(self, now_s: float) -> Evidence:
        labelled = (int(self._right[BASELINE]), int(self._right[NEW]))
        shares = self._wrong_share[[BASELINE, NEW]]
        bad = tuple(int(self._rng.binomial(n, w)) for n, w in zip(labelled, shares, strict=True))
        self._waiting.append((labelled, (bad[0], bad[1])))
        known, found = (
            self._waiting.popleft() if len(self._waiting) > self._candidate.label_delay else ((0, 0), (0, 0))
        )
        arms = [
            Arm(
                requests=int(self._seen[0, arm]), slow=int(self._seen[1, arm]), errors=int(self._seen[2, arm]),
                labelled=known[k], wrong=found[k],
            )
            for k, arm in enumerate((BASELINE, NEW))
        ]  # fmt: skip
        evidence = Evidence(*arms)
        self.evidence.append(evidence)
        self.shares.append(self.share)
        verdict = self._judge.judge(evidence)
        if verdict.outcome in ("promote", "abort"):
            self.outcome, self.reason = verdict.outcome, verdict.reason
            self.minutes = (now_s - self._trial.begin_h * 3600) / 60
        return evidence


class _Steered:
    """The scaling policy of all arms, as far as they have a part."""

    def __init__(self, helm: Helm, arms: Sequence[_Arms | None]) -> None:
        self._helm, self._arms = helm, arms

    def decide(self, seen: Sequence[Observation]) -> list[Decision]:
        wanted, out = self._helm.decide(seen), []
        for w, arm in enumerate(self._arms):
            rows = slice(3 * w, 3 * w + 3)
            if arm is not None:
                out += arm.steered(seen[rows], wanted[rows])
            else:
                out += [wanted[3 * w], *(Decision(release=one.replicas) for one in seen[rows][1:])]
        return out


def rehearse(
    scenario: Scenario,
    policy: Policy,
    candidate: Candidate,
    rule: Rule | None,
    worlds: Sequence[World],
    *,
    schedule: AnySchedule | None = None,
    trial: Trial | None = None,
    guard: Guard | None = None,
) -> list[Outcome]:
    """One candidate under a rule, in every world. Without a rule the candidate is never tried, and all that is lost
    is what it would have gained. `scenario.tick_s` must divide the interval."""
    trial = trial or Trial()
    arms_scenario = with_arms(scenario, candidate)
    base = scenario.services[0].traffic
    splits = [
        Split(base if w.traffic is None else w.traffic[0], stream(w.seed, "canary/split")) for w in worlds
    ]
    fed = [
        world._replace(traffic=tuple(Part(split, which) for which in range(3)))  # type: ignore[misc]
        for world, split in zip(worlds, splits, strict=True)
    ]
    cluster = Cluster(arms_scenario, fed, read_ahead_s=scenario.tick_s)
    situations = [cluster.situation(w, s) for w in range(len(worlds)) for s in range(3)]
    arms = [_Arms(candidate, trial, rule, schedule, world.seed) if rule else None for world in worlds]
    reached = np.zeros(len(worlds))

    def record(*_: Any) -> None:
        for w, arm in enumerate(arms):
            if arm is not None:
                t = cluster.ticks[w]
                splits[w].shares = arm.tick(float(cluster.clock_s[w]), t["ready"], t["served"], t["late"])
                reached[w] += t["served"][NEW]

    steer(
        cluster, _Steered(Helm([policy] * len(situations), situations, guard), arms), scenario.ticks, record
    )
    cluster.finish()
    return [
        _outcome(arms_scenario, candidate, cluster.totals[w], arms[w], int(reached[w]))
        for w in range(len(worlds))
    ]


def _outcome(
    scenario: Scenario, candidate: Candidate, totals: np.ndarray, arm: _Arms | None, reached: int
) -> Outcome:
    if arm is None:
        served = totals["served"].astype(float)
        failed = served * candidate.old_errors
        wrong = (served - failed) * candidate.old_wrong
    else:
        failed, wrong = arm.failed, arm.wrong
    economics = scenario.services[0].economics
    usd = bill(totals, scenario).sum(axis=0)
    usd[ITEMS.index("errors")] += float(wrong.sum()) * economics.error_usd
    usd[ITEMS.index("dropped")] += float(failed.sum()) * economics.dropped_usd
    if arm is None:
        return Outcome("", 0.0, usd, reached, "never tried")
    return Outcome(arm.outcome, arm.minutes, usd, reached, arm.reason, tuple(arm.evidence), tuple(arm.shares))
