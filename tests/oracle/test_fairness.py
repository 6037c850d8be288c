"""The bias gate: its figures are fairlearn's, and it stops what it should and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from pilotage.control.fairness import METRICS, FairnessGate, _holm, _rates

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


def test_holm_by_hand_and_bad_input() -> None:
    np.testing.assert_allclose(_holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])
    labels, champion, candidate, features = planted(1, 100)
    with pytest.raises(ValueError, match="champion has other values"):
        FairnessGate().judge(labels, champion + 1, candidate, features)
    with pytest.raises(ValueError, match="group has shape"):
        FairnessGate().judge(labels, champion, candidate, {"group": features["group"][:50]})
    with pytest.raises(ValueError, match="nothing to judge"):
        FairnessGate().judge(labels, champion, candidate, {})
