"""Whether a new version goes out or back, and how much traffic it gets until that is known.

`Sequential` is our rule, `LearnedRollout` was learned; `AnyRule` are all of them, those of others from
`control.canary`, where evidence and verdicts are defined, too. A schedule says the canary's share of the next interval;
what was learned says that itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.control.canary import (
    METRICS,
    QUIET,
    Argo,
    EProcess,
    Evidence,
    Flagger,
    Judge,
    Kayenta,
    Level,
    Msprt,
    Numbers,
    Rule,
    ZTest,
    outcomes_of,
)
from pilotage.control.learned_rollout import LearnedRollout
from pilotage.control.sequential import BETTER, RATIOS, CountEvidence, ExactSpending, slower
from pilotage.world.spec import (
    Positive,
    PositiveCount,
    Probability,
    Spec,
    SpecError,
    decode,
    named,
    read_json,
)

PRIOR_BAD: Final = 0.2  # how many canaries are bad, where that must be supposed


class Sequential(Rule, frozen=True, kw_only=True, tag="sequential"):
    """Ours: exact sequential tests on errors, slow requests and wrong answers, and a band on latency.

    *Abort.* All tests share `alpha`, the probability that a canary that is no worse in anything is ever aborted:
    `errors`, `slow`, `wrong` and `latency` are their shares of it. `half_spent` intervals spend half of it
    (`ExactSpending`). If `max_cost_ratio` is given, so does a request that costs more than that against the champion's,
    once both have had `min_requests`.

    *Promote.* After `min_requests` of the canary, and labels if wrong answers are tested, when every tested count has
    rejected "its rate is at least `margin` times the champion's" at level `promote_alpha` (at any time; all must
    reject, so the level needs no sharing). Such evidence may never come at little traffic: after `deadline`
    intervals, then, `at_deadline` decides: *wait* leaves it to a human, *promote* still asks for `min_requests`, and
    *likelier* aborts what is likelier `margin` times as bad than as good in one of the counts, if one canary in five is
    bad, and promotes the rest.
    """

    alpha: Level = 0.02
    half_spent: Positive = 6.0
    errors: Probability = 0.4
    slow: Probability = 0.3
    wrong: Probability = 0.2
    latency: Probability = 0.1
    margin: Annotated[float, Meta(gt=1)] = 1.5
    promote_alpha: Level = 0.01
    min_requests: PositiveCount = 500
    max_cost_ratio: Annotated[float, Meta(gt=0)] | None = None
    deadline: PositiveCount = 60
    at_deadline: Literal["promote", "abort", "wait", "likelier"] = "wait"

    def __post_init__(self) -> None:
        whole = self.errors + self.slow + self.wrong + self.latency
        if whole > 1 + 1e-9 or whole <= 0 or not any(getattr(self, metric) for metric in METRICS):
            raise SpecError(
                f"shares of alpha: errors {self.errors:g}, slow {self.slow:g}, wrong {self.wrong:g}, latency "
                f"{self.latency:g} sum to {whole:g}; valid: above 0 for one of the counts, and at most 1 together"
            )

    def begin(self) -> Judge:
        return _Sequential(self)


class _Sequential(Judge):
    def __init__(self, rule: Sequential) -> None:
        self._rule, self._taken = rule, 0
        self.tests = {
            metric: ExactSpending(rule.alpha * getattr(rule, metric), rule.half_spent)
            for metric in METRICS
            if getattr(rule, metric) > 0
        }
        self._better = {metric: CountEvidence(BETTER, rule.margin) for metric in self.tests}
        self._worse = {metric: CountEvidence((rule.margin,)) for metric in self.tests}
        self._aborted, self._why = np.zeros((), bool), ""
        self._latency: list[Numbers] = [0, 0]
        self._requests: list[Numbers] = [0, 0]
        self._usd: list[Numbers] = [0.0, 0.0]

    def step(self, seen: Evidence) -> np.ndarray:
        rule, arms = self._rule, (seen.champion, seen.canary)
        self._taken += 1
        requests = [np.asarray(arm.requests) for arm in arms]
        self._requests = [a + b for a, b in zip(self._requests, requests, strict=True)]
        self._usd = [a + arm.usd for a, arm in zip(self._usd, arms, strict=True)]
        enough = np.asarray(self._requests[1] >= rule.min_requests)
        known, doubted = enough, np.zeros((), bool)
        for metric, test in self.tests.items():
            counts = seen.of(metric)
            rejects = test.see(*counts)
            self._end(
                rejects, partial("{}: the canary's {} are more than chance allows".format, metric, test.count)
            )
            enough = enough & (self._better[metric].see(*counts) >= -math.log(rule.promote_alpha))
            doubted = doubted | (self._worse[metric].see(*counts) > math.log((1 - PRIOR_BAD) / PRIOR_BAD))
        if rule.latency and arms[0].latency is not None and arms[1].latency is not None:
            self._latency = [a + arm.latency for a, arm in zip(self._latency, arms, strict=True)]
            behind = slower(self._latency[0], self._latency[1], rule.alpha * rule.latency)
            self._end(behind, lambda: "latency: the canary's distribution is slower beyond chance")
        if rule.max_cost_ratio is not None:
            dear = self._usd[1] * self._requests[0] > rule.max_cost_ratio * self._usd[0] * self._requests[1]
            judged = np.minimum(*self._requests) >= rule.min_requests
            self._end(
                judged & dear, lambda: f"cost: above {rule.max_cost_ratio:g} times the champion's a request"
            )
        over, quiet = self._taken >= rule.deadline, (requests[0] == 0) | (requests[1] == 0)
        likelier = rule.at_deadline == "likelier"
        fails = doubted if likelier else np.asarray(rule.at_deadline == "abort")
        passes = ~doubted if likelier else np.asarray(rule.at_deadline == "promote")
        out = outcomes_of(
            self._aborted | (over & fails & ~enough),
            (enough & ~quiet) | (over & passes & known),
            quiet | over,
        )
        self.say(out, lambda: self._reasons(bool(enough), bool(over and not quiet)))
        return out

    def _end(self, rejects: np.ndarray, why: Callable[[], str]) -> None:
        self._aborted = self._aborted | rejects
        if not self._why and self._aborted.ndim == 0 and self._aborted:
            self._why = why()

    def _reasons(self, enough: bool, over: bool) -> tuple[str, ...]:
        margin = self._rule.margin
        late = f"after {self._taken} intervals it is neither shown worse nor within {margin:g} times the champion"
        return (
            "nothing is worse beyond chance, and not enough is known to promote",
            f"every rate is below {margin:g} times the champion's" if enough else late,
            self._why or late,
            late if over else QUIET,
        )


# --- the canary's share of traffic ---------------------------------------------------------------------------
class FixedSteps(Spec, frozen=True, kw_only=True, tag="fixed-steps", tag_field="kind"):
    """The next step after every `hold` intervals with traffic."""

    steps: Annotated[tuple[Level, ...], Meta(min_length=1)] = (0.05, 0.1, 0.25, 0.5)
    hold: PositiveCount = 10

    def begin(self) -> _FixedSteps:
        return _FixedSteps(self)


class _FixedSteps:
    def __init__(self, policy: FixedSteps) -> None:
        self._policy, self._seen = policy, np.zeros((), int)

    def weight(self, seen: Evidence | None) -> np.ndarray:
        """The canary's share in the next interval, after what the last one showed (None: there was none)."""
        if seen is not None:
            self._seen = self._seen + (np.asarray(seen.canary.requests) > 0)
        step = np.minimum(self._seen // self._policy.hold, len(self._policy.steps) - 1)
        return np.array(self._policy.steps)[step]


class ExpectedDollars(Spec, frozen=True, kw_only=True, tag="expected-dollars", tag_field="kind"):
    """The share, of `choices`, at which the rest of the canary is expected to cost least.

    With R requests and p R errors of the champion per interval, canary share w, and P(d) the posterior that the
    canary's error rate is d times the champion's (`prior_bad` spread over RATIOS beforehand, 1 otherwise):

        J(w) = sum_{d > 1} P(d) w R p (d - 1) error_usd T_d(w)  +  P(1) (1 - w) R gain_usd T_1(w)
        T_d(w) = clip(L_d / (p R K_d(w)), 1, horizon)                intervals until the tests decide
        K_d(w) = w d ln d - (1 - w + w d) ln(1 - w + w d),  L_d = ln(1 / alpha) - log of the e-process so far
        K_1(w) = ln(1 - w + w m) - w ln m,                  L_1 = ln(1 / alpha), m the margin

    K is what an error is expected to tell (nats), d - 1 what a bad version does, and `gain_usd` what a request is worth
    more under a good one: exposure against delay. Until errors have been seen, the least choice.
    """

    choices: Annotated[tuple[Level, ...], Meta(min_length=1)] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
    error_usd: Positive = 0.01
    gain_usd: Positive = 1e-5
    prior_bad: Level = PRIOR_BAD
    alpha: Level = 0.02
    margin: Annotated[float, Meta(gt=1)] = 1.5
    horizon: PositiveCount = 60

    def begin(self) -> _ExpectedDollars:
        return _ExpectedDollars(self)


class _ExpectedDollars:
    def __init__(self, policy: ExpectedDollars) -> None:
        self._policy, self._evidence, self._intervals = policy, CountEvidence(), 0
        self._bad, self._of = np.zeros(()), np.zeros(())

    def weight(self, seen: Evidence | None) -> np.ndarray:
        policy = self._policy
        if seen is not None:
            x0, x1, n0, n1 = seen.of("errors")
            self._evidence.see(x0, x1, n0, n1)
            self._intervals += 1
            self._bad, self._of = self._bad + x0, self._of + n0
        if self._intervals == 0:
            return np.asarray(min(policy.choices))
        return np.array(policy.choices)[np.argmin(self.costs(seen), axis=-1)]  # type: ignore[arg-type]

    def costs(self, seen: Evidence) -> np.ndarray:
        """J of every choice, dollars, shape (..., choices)."""
        policy, logs = self._policy, self._evidence.logs
        w, d = np.array(policy.choices)[:, None], np.array(RATIOS)
        odds = policy.prior_bad / len(RATIOS) * np.exp(np.minimum(logs, 500.0))
        total = odds.sum(axis=-1) + 1 - policy.prior_bad
        bad, good = (odds / total[..., None])[..., None, :], ((1 - policy.prior_bad) / total)[..., None]
        requests = np.asarray(seen.champion.requests) + np.asarray(seen.canary.requests)
        p = (self._bad + 0.5) / (self._of + 1.0)
        errors, requests = (p * requests)[..., None], requests[..., None]
        tells = w * d * np.log(d) - (1 - w + w * d) * np.log(1 - w + w * d)
        left = np.maximum(-math.log(policy.alpha) - self._evidence.log, 0.0)[..., None, None]
        most = policy.horizon
        until = np.clip(left / np.maximum(errors[..., None] * tells, 1e-12), 1, most)
        w = w[:, 0]
        shows = np.log(1 - w + w * policy.margin) - w * math.log(policy.margin)
        delay = np.clip(-math.log(policy.alpha) / np.maximum(errors * shows, 1e-12), 1, most)
        exposure = (bad * (d - 1) * until).sum(axis=-1) * w * errors * policy.error_usd
        return exposure + good * (1 - w) * requests * policy.gain_usd * delay


AnySchedule = FixedSteps | ExpectedDollars
AnyRule = Flagger | Argo | Kayenta | ZTest | Msprt | EProcess | Sequential | LearnedRollout
BY_NAME: Final = {
    str(kind.__struct_config__.tag): kind
    for kind in (Flagger, Argo, Kayenta, ZTest, Msprt, EProcess, Sequential)
}
SHIPPED: Final = "learned-rollout"


def begun(rule: Rule, schedule: AnySchedule | None) -> tuple[Judge, Any]:
    """The controllers of one canary: what judges it, and what says its share (None: the rule itself if it does, else
    fixed steps)."""
    judge = rule.begin()
    if schedule is None and hasattr(judge, "weight"):
        return judge, judge
    return judge, (schedule or FixedSteps()).begin()


def rollout_from(text: str) -> Rule:
    """The rule that a command-line argument names: a name, a name with parameters (`sequential:alpha=0.01`), what is
    shipped (`learned-rollout`, which takes prices as parameters), or a `rollout.json`."""
    name, colon, parameters = text.partition(":")
    if name == SHIPPED:
        learned = _read(Path(__file__).with_name("learned_rollout.json"))
        if not colon:
            return learned
        given = named(f"prices:{parameters}", {"prices": _Prices}, "rollout", SHIPPED)
        changes = {k: v for k in given.__struct_fields__ if (v := getattr(given, k)) is not None}
        return decode(msgspec.to_builtins(learned) | changes, LearnedRollout, f"rollout {text!r}")
    if text.endswith(".json"):
        return _read(Path(text))
    return named(text, BY_NAME, "rollout", f"{SHIPPED}, or a rollout.json")


class _Prices(Spec, frozen=True, kw_only=True):
    """What may be changed of a policy that was learned."""

    error_usd: float | None = None
    slow_usd: float | None = None
    wrong_usd: float | None = None
    gain_usd: float | None = None
    trial_usd: float | None = None
    prior_bad: float | None = None
    horizon: int | None = None
    alpha: float | None = None


def _read(path: Path) -> LearnedRollout:
    return decode(read_json(path, "the path of a rollout.json"), LearnedRollout, str(path))
