"""What must hold of any canary, whatever its traffic."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotage.control.canary import OUTCOMES, Argo, Arm, EProcess, Evidence, Flagger, Kayenta, Msprt, ZTest
from pilotage.control.learned_rollout import ACTIONS, FEATURES, GRID, SHARES, Belief, LearnedRollout
from pilotage.control.network import Network
from pilotage.control.rollout import AnyRule, ExpectedDollars, FixedSteps, Sequential, rollout_from
from pilotage.control.sequential import CountEvidence, ExactSpending
from pilotage.world.spec import SpecError


def at_random(seed: int) -> LearnedRollout:
    """A policy whose network says anything, now and then to go out or back."""
    rng = np.random.default_rng(seed)

    def rows(*shape: int) -> tuple[tuple[float, ...], ...]:
        return tuple(map(tuple, rng.normal(0, 0.5, shape).tolist()))

    sizes = (len(FEATURES), 6, ACTIONS)
    biases = ((0.0,) * 6, (*rng.normal(0, 1, len(SHARES)).tolist(), -0.5, -0.5))
    return LearnedRollout(
        network=Network(
            mean=(0.0,) * sizes[0], scale=(1.0,) * sizes[0], clip=5.0, weights=(rows(6, sizes[0]), rows(ACTIONS, 6)),
            biases=biases,
        )
    )  # fmt: skip


RULES = (
    Flagger(threshold=3), Argo(failure_limit=2), Kayenta(every=4, lifetime=8), ZTest(at=5), ZTest(peek_from=2), Msprt(),
    EProcess(), Sequential(deadline=6), Sequential(errors=1.0, slow=0.0, wrong=0.0, latency=0.0, min_requests=20),
    Sequential(deadline=4, at_deadline="likelier", min_requests=20), at_random(1), at_random(2),
)  # fmt: skip


@st.composite
def intervals(draw, quiet: bool = True):
    n0, n1 = draw(st.integers(0 if quiet else 1, 200)), draw(st.integers(0 if quiet else 1, 200))
    return n0, n1, draw(st.integers(0, min(n0, 20))), draw(st.integers(0, min(n1, 20)))


logs = st.lists(intervals(), min_size=1, max_size=10)


def evidence(n0, n1, x0, x1) -> Evidence:
    return Evidence(Arm(requests=n0, errors=x0), Arm(requests=n1, errors=x1))


@settings(max_examples=60, deadline=None)
@given(log=logs, order=st.randoms(use_true_random=False))
def test_the_order_of_intervals_does_not_change_the_e_process_nor_do_weights_reset_it(log, order) -> None:
    shuffled = list(log)
    order.shuffle(shuffled)
    ends = []
    for one in (log, shuffled):
        test = CountEvidence()
        for n0, n1, x0, x1 in one:
            test.see(*map(np.array, (x0, x1, n0, n1)))
        ends.append(test.logs)
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-9)
    parts = [
        CountEvidence() for _ in log
    ]  # the whole is the product of what each interval, at its weight, says alone
    for part, (n0, n1, x0, x1) in zip(parts, log, strict=True):
        part.see(*map(np.array, (x0, x1, n0, n1)))
    np.testing.assert_allclose(ends[0], sum(part.logs for part in parts), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(log=logs, alpha=st.sampled_from([0.01, 0.05, 0.3]))
def test_exact_spending_never_spends_more_than_alpha_on_any_history(log, alpha) -> None:
    test, before = ExactSpending(alpha, 3.0), 0.0
    for k, (n0, n1, x0, x1) in enumerate(log):
        test.see(*map(np.array, (x0, x1, n0, n1)))
        assert before <= float(test.spent) <= alpha * (k + 1) / (k + 4) + 1e-12
        before = float(test.spent)


@settings(max_examples=40, deadline=None)
@given(
    logs=st.lists(st.lists(intervals(), min_size=8, max_size=8), min_size=2, max_size=4),
    rule=st.sampled_from(RULES),
)
def test_many_canaries_at_once_get_the_verdicts_of_each_alone(logs, rule) -> None:
    logs = [*logs, logs[0], [*logs[0][:4], *logs[1][4:]]]  # two that share a history, and one that leaves it
    together, alone = rule.begin(), [rule.begin() for _ in logs]
    for t in range(8):
        counts = np.array([log[t] for log in logs])
        outcomes = np.broadcast_to(together.step(evidence(*counts.T)), len(logs))
        each = [judge.judge(evidence(*log[t])).outcome for judge, log in zip(alone, logs, strict=True)]
        assert [OUTCOMES[k] for k in outcomes] == each


@settings(max_examples=15, deadline=None)
@given(log=st.lists(intervals(quiet=False), min_size=1, max_size=6), at=st.integers(0, 6))
def test_an_interval_without_traffic_is_waited_out_and_changes_nothing_for_our_rules(log, at) -> None:
    for rule in (EProcess(), Sequential(deadline=50)):
        plain, paused = rule.begin(), rule.begin()
        expected = [plain.judge(evidence(*one)).outcome for one in log]
        got = []
        for k, one in enumerate(log):
            if k == min(at, len(log) - 1):
                silent = paused.judge(evidence(0, 0, 0, 0))
                assert silent.outcome == ("abort" if "abort" in expected[k - 1 : k] else "wait")
            got.append(paused.judge(evidence(*one)).outcome)
        assert got == expected


@settings(max_examples=30, deadline=None)
@given(log=logs, policy=st.sampled_from((FixedSteps(hold=2), ExpectedDollars())))
def test_schedules_choose_among_their_choices(log, policy) -> None:
    schedule = policy.begin()
    known = policy.steps if isinstance(policy, FixedSteps) else policy.choices
    assert schedule.weight(None) == min(known)
    for one in log:
        assert float(schedule.weight(evidence(*one))) in known


def test_a_canary_that_looks_bad_gets_less_than_one_that_looks_good() -> None:
    weights = []
    for errors in (1, 12):
        schedule = ExpectedDollars().begin()
        for _ in range(10):
            weight = float(schedule.weight(evidence(1800, 200, 9, errors)))
        weights.append(weight)
    assert weights[0] > weights[1]


def test_our_rule_promotes_a_good_canary_aborts_a_bad_one_and_says_why() -> None:
    def last(rule, n, errors0, errors1, times, **arm):
        judge = rule.begin()
        for _ in range(times):
            verdict = judge.judge(
                Evidence(Arm(requests=n, errors=errors0), Arm(requests=n, errors=errors1, **arm))
            )
            if verdict.outcome in ("promote", "abort"):
                return verdict
        return verdict

    rule = Sequential(errors=1.0, slow=0.0, wrong=0.0, latency=0.0)
    good = last(rule, 1000, 10, 10, 59)
    assert good.outcome == "promote"
    assert "1.5 times" in good.reason
    bad = last(rule, 1000, 10, 30, 5)
    assert bad.outcome == "abort"
    assert bad.reason.startswith("errors: ")
    assert last(rule, 10, 0, 0, 100).outcome == "wait"  # too little to promote on, and the deadline is over
    assert last(rule.replace(at_deadline="promote"), 10, 0, 0, 100).outcome == "promote"
    assert last(rule.replace(at_deadline="abort"), 10, 0, 0, 100).outcome == "abort"
    assert last(Sequential(), 1000, 10, 10, 59).outcome == "continue"  # no label has come
    odds = rule.replace(at_deadline="likelier", min_requests=20, deadline=5)
    doubted = last(odds, 100, 2, 4, 5)
    assert (doubted.outcome, doubted.reason[:17]) == ("abort", "after 5 intervals")
    assert last(odds, 100, 4, 4, 5).outcome == "promote"
    dear = last(rule.replace(max_cost_ratio=1.2), 1000, 0, 0, 1, usd=1.0)
    assert (dear.outcome, dear.reason[:4]) == ("abort", "cost")
    late = last(Sequential(), 1000, 0, 0, 5, labelled=0, wrong=0, slow=100)
    assert late.reason.startswith("slow")


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"requests": -1}, "requests"),
        ({"requests": 5, "errors": 6}, "errors is 6 of requests 5"),
        ({"requests": 5, "wrong": 1}, "labelled"),
        ({"requests": 5.5}, "whole numbers"),
        ({"requests": 5, "usd": float("nan")}, "usd"),
        ({"requests": 5, "latency": np.ones(3)}, "equal buckets"),
    ],
)
def test_counts_that_cannot_be_are_refused(arm, message) -> None:
    with pytest.raises(ValueError, match=message):
        Sequential().begin().judge(Evidence(Arm(requests=5), Arm(**arm)))


def test_rules_are_specifications() -> None:
    for rule in RULES:
        assert msgspec.convert(msgspec.to_builtins(rule), AnyRule) == rule
    with pytest.raises(SpecError, match="shares of alpha"):
        Sequential(errors=0.9)


def test_the_belief_is_bayes_rule_by_hand() -> None:
    policy = at_random(0)
    belief = Belief(policy)
    seen = Evidence(Arm(requests=1900, errors=10), Arm(requests=100, errors=3))
    of = dict(zip(FEATURES, belief.see(seen), strict=True))
    shares = np.array(GRID) * 100 / (np.array(GRID) * 100 + 1900)
    likelihood = shares**3 * (1 - shares) ** 10
    worse = np.array(GRID) > 1
    good = (1 - policy.prior_bad) ** (1 / 3)
    prior = np.where(worse, (1 - good) / worse.sum(), good / 6)
    prior[GRID.index(1.0)] = good / 2
    bad = (prior * likelihood)[worse].sum() / (prior * likelihood).sum()
    assert of["errors_odds"] == pytest.approx(np.log(bad / (1 - bad)), abs=1e-4)
    assert of["slow_odds"] == pytest.approx(np.log((1 - good) / good), abs=1e-3)
    assert of["errors_tells"] == pytest.approx(np.log(2000 * 10.5 / 1901), abs=1e-3)  # 100 requests are 5 %
    assert of["labels"] == 0
    assert of["left"] == pytest.approx(np.log1p(239))


@settings(max_examples=30, deadline=None)
@given(log=st.lists(intervals(), min_size=1, max_size=8), action=st.integers(0, ACTIONS - 1))
def test_no_network_promotes_on_nothing_or_saves_what_a_test_rejects(log, action) -> None:
    belief, requests = Belief(at_random(0)), 0
    for one in log:
        belief.see(evidence(*one))
        requests += one[1]
        share, outcome = float(belief.share), OUTCOMES[int(belief.act(np.array(action)))]
        if min(one[:2]) == 0:
            assert outcome in ("wait", "abort")
            assert float(belief.share) == share
        elif requests < 200:
            assert outcome != "promote"
    belief.see(evidence(10_000, 10_000, 50, 400))
    assert OUTCOMES[int(belief.act(np.array(action)))] == "abort"


def test_rules_are_named_as_arguments_and_prices_given() -> None:
    assert rollout_from("sequential:alpha=0.01") == Sequential(alpha=0.01)
    shipped = rollout_from("learned-rollout")
    assert isinstance(shipped, LearnedRollout)
    priced = rollout_from("learned-rollout:error_usd=0.5,horizon=60")
    assert priced == shipped.replace(error_usd=0.5, horizon=60)
    for wrong in ("learned-rollout:network=1", "learned-rollout:error_usd=-1", "learnt", "none.json"):
        with pytest.raises(SpecError):
            rollout_from(wrong)
