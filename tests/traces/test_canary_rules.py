"""Flagger, Argo Rollouts and Kayenta on logs worked out by hand."""

from __future__ import annotations

import pytest

from pilotage.control.canary import Argo, Arm, Evidence, Flagger, Kayenta, ZTest


def outcomes(rule, log) -> str:
    """First letters of the verdicts on (canary requests, canary errors) per interval; the champion has 1 % errors."""
    judge = rule.begin()
    return "".join(
        judge.judge(Evidence(Arm(requests=900, errors=9), Arm(requests=n, errors=x))).outcome[0]
        for n, x in log
    )


GOOD, BAD, NONE = (100, 0), (100, 6), (0, 0)


@pytest.mark.parametrize(
    ("rule", "log", "expected"),
    [
        # by default one failed check aborts, and exactly 99 % is no failure
        (Flagger(), [GOOD, (100, 1), BAD], "cca"),
        # passes do not reset the count; no values found is a failed check
        (Flagger(threshold=3), [BAD, GOOD, NONE, GOOD, BAD], "cccca"),
        (Flagger(threshold=1), [NONE], "a"),
        (Flagger(passes=3), [GOOD] * 3, "ccp"),
        (Flagger(threshold=2, passes=3), [GOOD, BAD, GOOD, GOOD], "cccp"),
        # Argo: failureLimit 0: the first failure; 95 % passes
        (Argo(), [GOOD, (100, 5), BAD], "cca"),
        (Argo(failure_limit=1), [BAD, GOOD, BAD], "cca"),
        # five measurements in a row without a value, one more than the limit; a value resets the count
        (Argo(), [NONE] * 5, "wwwwa"),
        (Argo(count=20), [NONE] * 4 + [GOOD] + [NONE] * 5, "wwwwcwwwwa"),
        (Argo(count=3), [GOOD] * 3, "ccp"),
        # Kayenta judges at every fourth interval, here, and all-identical values pass
        (Kayenta(every=4, lifetime=8), [(100, 1)] * 8, "cccccccp"),
        # 16 pairwise shifts of .05 each: interval [.05, .05] lies above a quarter of .05
        (Kayenta(every=4, lifetime=8), [BAD] * 4, "ccca"),
        # Nodata in the only metric: score 0; an interval without data is left out
        (Kayenta(every=4, lifetime=8), [NONE] * 4, "ccca"),
        (Kayenta(every=4, lifetime=4), [GOOD, NONE, GOOD, GOOD], "cccp"),
        # z of 3 % against 1 %: 100 requests 1.78, as n grows beyond; at the end only, or from the second on
        (ZTest(at=2), [(100, 3)] * 3, "cac"),
        (ZTest(peek_from=1), [(100, 3)], "a"),
        (ZTest(peek_from=2), [(100, 3), NONE], "ca"),
    ],
)
def test_by_hand(rule, log, expected) -> None:
    assert outcomes(rule, log) == expected


def test_flagger_looks_at_latency_where_it_is_told_to() -> None:
    judge = Flagger(max_slow=0.01, threshold=1).begin()
    assert judge.judge(Evidence(Arm(requests=900), Arm(requests=100, slow=1))).outcome == "continue"
    verdict = judge.judge(Evidence(Arm(requests=900), Arm(requests=100, slow=2)))
    assert verdict.outcome == "abort"
    assert "2 that abort" not in verdict.reason
    assert "1 that abort" in verdict.reason
