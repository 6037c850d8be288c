"""The bias gate: its figures are fairlearn's, and it stops what it should and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.control.fairness import METRICS, FairnessGate, _holm, _rates, counts_of, rates_of

pytest.importorskip("fairlearn")


def planted(seed: int, rows: int = 10_000, more: float = 0.0):
    """Groups of 40, 30, 20 and 10 %, error 15 %; the candidate's is `more` higher in the smallest."""
    rng = np.random.default_rng(seed)
    groups, labels = rng.choice(4, rows, p=(0.4, 0.3, 0.2, 0.1)), rng.integers(0, 2, rows)
    wrong = rng.random(rows) < 0.15
    worse = wrong | ((groups == 3) & (rng.random(rows) < more / 0.85))
    return labels, labels ^ wrong, labels ^ worse, {"group": groups}


def test_figures_are_those_of_fairlearn_row_by_row_and_the_bootstraps() -> None:
    from fairlearn.metrics import MetricFrame, false_positive_rate, selection_rate, true_positive_rate

    labels, champion, candidate, features = planted(1, 1500, 0.2)
    groups = features["group"]
    counts = np.bincount(groups * 8 + labels * 4 + champion * 2 + candidate, minlength=32).reshape(4, 8)
    verdict = FairnessGate().judge(labels, champion, candidate, features)
    functions = (
        lambda y_true, y_pred: np.mean(y_true != y_pred),
        selection_rate,
        true_positive_rate,
        false_positive_rate,
    )
    for model, answers, bit in (("champion", champion, 2), ("candidate", candidate, 1)):
        frame = MetricFrame(
            metrics=dict(zip(METRICS, functions, strict=True)),
            y_true=labels,
            y_pred=answers,
            sensitive_features=groups,
        )
        rows = {row["group"]: row for row in verdict.groups if row["model"] == model}
        for k, metric in enumerate(METRICS):
            shown = [rows[str(g)][metric] for g in range(4)]
            np.testing.assert_allclose(shown, frame.by_group[metric], err_msg=metric)
            np.testing.assert_allclose(shown, _rates(counts, bit)[k], err_msg=metric)
            assert rows["all"][metric] == pytest.approx(frame.overall[metric])
        assert rows["all"]["rows"] == 1500


def test_the_same_model_passes_and_three_points_more_in_one_group_are_stopped() -> None:
    passed = [FairnessGate(seed=k).judge(*planted(k)).outcome for k in range(8)]
    blocked = [FairnessGate(seed=k).judge(*planted(k, more=0.03)) for k in range(8)]
    assert passed == ["pass"] * 8
    assert sum(verdict.outcome == "block" for verdict in blocked) >= 7
    assert sum("group 3" in verdict.reason or "gap" in verdict.reason for verdict in blocked) >= 7


def test_the_bootstrap_spreads_as_the_differences_do() -> None:
    """Standard error of a group's rise, from the counts of answers that differ."""
    labels, champion, candidate, features = planted(3, more=0.05)
    verdict = FairnessGate(draws=4000).judge(labels, champion, candidate, features)
    check = next(c for c in verdict.checks if c.what == "error of group 3")
    inside = features["group"] == 3
    rise = (candidate != labels)[inside].astype(int) - (champion != labels)[inside]
    expected = rise.mean() + 1.645 * rise.std() / np.sqrt(inside.sum())
    assert check.candidate - check.champion == pytest.approx(rise.mean())
    assert check.upper == pytest.approx(expected, abs=0.0015)


def test_rows_of_one_user_are_drawn_together() -> None:
    labels, champion, candidate, features = planted(5, 8000, more=0.05)
    users = np.repeat(np.arange(1000), 8)
    alone = FairnessGate().judge(labels, champion, candidate, features)
    copies = [np.tile(values, 4) for values in (labels, champion, candidate)]  # every row four times: no news
    many = FairnessGate().judge(
        *copies, {"group": np.tile(features["group"], 4)}, users=np.tile(np.arange(8000), 4)
    )
    for a, b in zip(alone.checks, many.checks, strict=True):
        assert b.upper == pytest.approx(a.upper, abs=0.004)
    assert len(FairnessGate().judge(labels, champion, candidate, features, users=users).checks) == len(
        alone.checks
    )


def test_small_groups_do_not_pass_unnoticed() -> None:
    labels, champion, _, features = planted(2)
    groups = features["group"].copy()
    groups[:60] = 9
    held = FairnessGate().judge(labels, champion, champion, {"group": groups})
    assert held.outcome == "insufficient"
    assert "group 9 (60 rows)" in held.insufficient[0]
    listed = FairnessGate(small_groups="report").judge(labels, champion, champion, {"group": groups})
    assert listed.outcome == "pass"
    assert listed.insufficient == held.insufficient
    few = FairnessGate(small_groups="report").judge(
        labels[:60], champion[:60], champion[:60], {"g": groups[:60]}
    )
    assert few.outcome == "insufficient"


def test_a_ceiling_stops_a_gap_that_was_there_before() -> None:
    labels, champion, _, features = planted(7)
    champion = np.where((features["group"] == 0) & (np.arange(len(labels)) % 5 == 0), 1 - labels, champion)
    assert FairnessGate().judge(labels, champion, champion, features).outcome == "pass"
    verdict = FairnessGate(ceiling=0.1).judge(labels, champion, champion, features)
    assert verdict.outcome == "block"
    assert "itself" in verdict.reason


def test_counts_say_what_their_rows_say() -> None:
    for more in (0.0, 0.03):
        rows = planted(4, more=more)
        labels, champion, candidate, features = rows
        counts = {"group": counts_of(labels, champion, candidate, features["group"])}
        whole, kept = FairnessGate().judge(*rows), FairnessGate().judge_counts(counts)
        assert (kept.outcome, kept.reason, kept.checks) == (whole.outcome, whole.reason, whole.checks)
        shown = {(r["model"], r["group"]): r for r in whole.groups}
        for row in kept.groups:
            assert row == pytest.approx(shown[row["model"], row["group"]])
        inside = features["group"] == 3
        of = rates_of(counts["group"]["3"])
        assert of["error"] == (pytest.approx(np.mean(candidate[inside] != labels[inside])), inside.sum())
        assert of["true_positive_rate"][1] == (labels[inside] == 1).sum()
        assert of["false_positive_rate"][1] == (labels[inside] == 0).sum()
    with pytest.raises(ValueError, match="8 per group"):
        FairnessGate().judge_counts({"sex": {"1": (1, 2)}})


def measured(rng: np.random.Generator, shares: dict[str, float], n: int, metric: str = "error_rate"):
    return {"group": {g: {metric: (float(rng.binomial(n, p)) / n, n)} for g, p in shares.items()}}


def test_shares_measured_apart_block_what_is_shown_and_no_more() -> None:
    same = {"a": 0.15, "b": 0.15}
    worse = {"a": 0.15, "b": 0.25}
    outcomes: dict[str, list[str]] = {"few": [], "many": [], "worse": [], "right": []}
    for k in range(40):
        rng, gate = np.random.default_rng(k), FairnessGate(seed=k)
        outcomes["few"].append(gate.judge_rates(measured(rng, same, 2000), measured(rng, same, 2000)).outcome)
        many = gate.judge_rates(measured(rng, same, 200_000), measured(rng, same, 200_000))
        outcomes["many"].append(many.outcome)
        found = gate.judge_rates(measured(rng, same, 2000), measured(rng, worse, 2000))
        assert "group b" in found.reason or "gap" in found.reason
        outcomes["worse"].append(found.outcome)
        right = ({g: 1 - p for g, p in shares.items()} for shares in (same, worse))
        found = gate.judge_rates(*(measured(rng, shares, 2000, "accuracy") for shares in right))
        outcomes["right"].append(found.outcome)
    # each direction of three tests at 5 % together: a chance block of the same model is rare
    assert outcomes["few"].count("block") <= 3
    assert outcomes["few"].count("insufficient") >= 36
    assert outcomes["many"] == ["pass"] * 40
    assert outcomes["worse"] == outcomes["right"] == ["block"] * 40


def test_what_was_not_measured_in_both_or_on_few_is_said() -> None:
    rng, gate = np.random.default_rng(0), FairnessGate()
    one = measured(rng, {"a": 0.1, "b": 0.1}, 300_000)
    nothing = gate.judge_rates(one, {"sex": {"1": {"error_rate": (0.1, 9000)}}})
    assert (nothing.outcome, nothing.reason[:7]) == ("insufficient", "nothing")
    assert gate.judge_rates({}, {}).outcome == "insufficient"
    few = measured(rng, {"c": 0.1}, 40)
    for part in (one, few):
        part["group"] |= measured(rng, {"c": 0.1}, 40)["group"]
    held = gate.judge_rates(one, one)
    assert held.outcome == "insufficient"
    assert held.insufficient == ("group c (error_rate of 40)",)
    assert gate.refuses(held)
    listed = FairnessGate(small_groups="report")
    assert listed.judge_rates(one, one).outcome == "pass"
    assert not listed.refuses(held)


def test_holm_by_hand_and_bad_input() -> None:
    np.testing.assert_allclose(_holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])
    labels, champion, candidate, features = planted(1, 100)
    with pytest.raises(ValueError, match="champion has other values"):
        FairnessGate().judge(labels, champion + 1, candidate, features)
    with pytest.raises(ValueError, match="group has shape"):
        FairnessGate().judge(labels, champion, candidate, {"group": features["group"][:50]})
    with pytest.raises(ValueError, match="nothing to judge"):
        FairnessGate().judge(labels, champion, candidate, {})
