"""What is recorded of a training by itself, and what two versions look like side by side."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pilotage.control.fairness import FairnessGate
from pilotage.live.compare import compare, direction, wilson
from pilotage.live.entries import Actor
from pilotage.live.ledger import Ledger
from pilotage.live.registries import Code, Data, Folder, Measure, Parameter, Version
from pilotage.live.tracking import code, describe, digest_of, run, track
from pilotage.live.versions import RefusedError, Versions
from pilotage.world.spec import SpecError

ANN = Actor(kind="human", name="ann")
TEST = (Data(name="test.csv", digest="ee", role="test"),)


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(Ledger(tmp_path / "home"), Folder(path=str(tmp_path / "home")))


# --- tracking ------------------------------------------------------------------------------------------------
def test_a_training_in_python_is_recorded_by_itself(
    versions: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *arguments], check=True)
    frame = pd.DataFrame({"x": [0.0, 1.0, 2.0, 3.0], "y": [0, 0, 1, 1]})
    frame.to_csv("train.csv", index=False)
    with track("fraud", versions) as tracked:
        read = pd.read_csv("train.csv")
        model = linear.LogisticRegression(C=0.5).fit(read[["x"]], read["y"])
        tracked.model(model)
        tracked.data(frame, "held out", role="test")
        tracked.metric("accuracy", model.predict(frame[["x"]]) == frame["y"])
        Path("model.json").write_text("{}")
        tracked.artifact("model.json")
    kept = versions.registry.version("fraud", str(tracked.registered))
    assert kept.parameters["C"] == 0.5
    assert kept.parameters["model"] == "LogisticRegression"
    data = {one.name: one for one in kept.data}
    assert set(data) == {"train.csv", "held out"}
    assert data["train.csv"].digest == digest_of("train.csv")
    assert (data["train.csv"].rows, data["train.csv"].columns) == (4, {"x": "float64", "y": "int64"})
    assert data["held out"].role == "test"
    assert (kept.metrics["accuracy"].value, kept.metrics["accuracy"].n) == (1.0, 4)
    assert kept.artifact_digest == digest_of("model.json")
    assert kept.code.dirty
    assert len(kept.code.revision) == 40
    assert kept.environment["pandas"] == pd.__version__
    Path("train.csv").read_text()  # after the block, nothing listens any more
    assert versions.registry.version("fraud", "1") == kept


def test_a_training_that_fails_registers_nothing(versions: Versions) -> None:
    with pytest.raises(ZeroDivisionError), track("fraud", versions):
        _ = 1 / 0
    assert versions.registry.versions("fraud") == []


SCRIPT = """
import json, sys
print("epoch 1")
print("{not json")
print(json.dumps({"accuracy": 0.8, "loss": float("nan"), "done": True, "note": "text"}))
print(json.dumps({"accuracy": {"value": 0.9, "n": 1000}, "bad": {"n": 3}, "parameters": {"depth": 3},
                  "slices": {"sex=1": {"accuracy": 0.95}}}))
print("secret", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def test_a_command_is_recorded_from_outside(versions: Versions, tmp_path: Path) -> None:
    script, data, out = tmp_path / "train.py", tmp_path / "d.csv", io.StringIO()
    script.write_text(SCRIPT)
    data.write_text("a,b\n1,x\n2,y\n")
    command = [
        sys.executable, str(script), "0", "--rate=0.1", "--deep", "--data", str(data), "--api-key", "hunter2",
    ]  # fmt: skip
    tracked = run("fraud", command, versions, out=out)
    kept = versions.registry.version("fraud", str(tracked.registered))
    assert out.getvalue().startswith("epoch 1\n{not json\n")
    assert kept.metrics["accuracy"] == Measure(value=0.9, n=1000)
    assert set(kept.metrics) == {"accuracy", "training_s"}
    assert kept.slices == {"sex=1": {"accuracy": Measure(value=0.95)}}
    assert kept.parameters["rate"] == "0.1"
    assert kept.parameters["deep"] == "true"
    assert kept.parameters["depth"] == 3
    assert [(d.rows, d.columns) for d in kept.data] == [(2, {"a": "int64", "b": "str"})]
    everything = b"".join(path.read_bytes() for path in versions.ledger.folder.rglob("*") if path.is_file())
    assert b"hunter2" not in everything
    command[2] = "3"
    with pytest.raises(subprocess.CalledProcessError):
        run("fraud", command, versions, out=out)
    with pytest.raises(SpecError, match="cannot be run"):
        run("fraud", ["no-such-program"], versions, out=out)
    assert len(versions.registry.versions("fraud")) == 1


def test_digests_tell_data_apart(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": [1, 2], "y": ["a", "b"]})
    same, array = frame.copy(), np.arange(6.0)
    assert describe(frame, "d").digest == describe(same, "d").digest
    for other in (
        frame.rename(columns={"x": "z"}), frame[::-1], frame.astype({"x": float}), frame.replace("b", "c"),
        frame["x"],
    ):  # fmt: skip
        assert describe(other, "d").digest != describe(frame, "d").digest
    digests = {describe(a, "d").digest for a in (array, array[::-1], array.reshape(2, 3), array.astype(int))}
    assert len(digests) == 4
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_text("1")
    before = digest_of(tmp_path / "a")
    (tmp_path / "a" / "one").rename(tmp_path / "a" / "two")
    assert digest_of(tmp_path / "a") != before
    with pytest.raises(SpecError, match="cannot be read"):
        digest_of(tmp_path / "none")
    with pytest.raises(SpecError, match="no digest"):
        describe([object()], "d")


@pytest.mark.parametrize("value", [math.nan, math.inf, [], [0.1, math.nan]])
def test_metrics_that_are_no_numbers_are_refused(versions: Versions, value: object) -> None:
    with pytest.raises(SpecError, match="accuracy"), track("fraud", versions) as tracked:
        tracked.metric("accuracy", value)


def test_outside_of_git_the_code_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code() == Code()


# --- comparison ----------------------------------------------------------------------------------------------
def version(number: str, data: tuple[Data, ...] = TEST, **metrics: Measure) -> Version:
    return Version(service="fraud", version=number, metrics=metrics, data=data)


def share(value: float, n: int = 10_000) -> Measure:
    return Measure(value=value, n=n)


def test_wilson_and_newcombe_are_as_published() -> None:
    """Newcombe, Statistics in Medicine 17, 1998: 56/70 less 48/80, method 10, is 0.0524 to 0.3339."""
    assert wilson(56 / 70, 70) == pytest.approx((0.6920, 0.8774), abs=5e-4)
    found = compare(version("1", accuracy=share(48 / 80, 80)), version("2", accuracy=share(56 / 70, 70)))
    assert (found.metrics[0].low, found.metrics[0].high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_a_clear_gain_is_recommended_and_a_clear_loss_is_not() -> None:
    old = version("1", accuracy=share(0.90), latency_p95_ms=Measure(value=10, low=9.5, high=10.5))
    better = version("2", accuracy=share(0.93), latency_p95_ms=Measure(value=10, low=9.5, high=10.5))
    slower = version("3", accuracy=share(0.93), latency_p95_ms=Measure(value=15, low=14, high=16))
    assert compare(old, better).recommendation == "b"
    assert compare(better, old).recommendation == "a"
    found = compare(old, slower)
    assert found.recommendation == "a"
    assert any("latency_p95_ms is worse" in reason for reason in found.reasons)
    assert compare(old, version("4", accuracy=share(0.901))).recommendation == "undecided"


def test_what_has_no_interval_is_told_and_not_trusted() -> None:
    old = version("1", accuracy=share(0.90), latency_p95_ms=Measure(value=10))
    found = compare(old, version("2", accuracy=share(0.93), latency_p95_ms=Measure(value=30)))
    assert found.recommendation == "undecided"
    assert any("latency_p95_ms is worse by 20, and without an interval" in reason for reason in found.reasons)
    assert compare(version("1"), version("2")).reasons == ("neither has a metric",)
    nan = compare(version("1", loss=Measure(value=math.nan)), version("2", loss=Measure(value=1.0)))
    assert nan.metrics[0].verdict == "unknown"


def test_a_group_that_suffers_stops_a_gain_and_small_groups_say_nothing() -> None:
    def sliced(number: str, overall: float, groups: dict[str, tuple[float, int]]) -> Version:
        slices = {name: {"accuracy": share(value, n)} for name, (value, n) in groups.items()}
        return Version(
            service="fraud", version=number, metrics={"accuracy": share(overall)}, slices=slices, data=TEST
        )

    old = sliced(
        "1", 0.90, {"sex=1": (0.90, 6000), "sex=2": (0.90, 4000), "race=9": (0.9, 20), "race=8": (0.9, 90)}
    )
    worse = sliced("2", 0.92, {"sex=1": (0.95, 6000), "sex=2": (0.875, 4000), "race=9": (0.6, 20)})
    found = compare(old, worse)
    assert found.recommendation == "a"
    assert any("accuracy in sex=2 is worse" in reason for reason in found.reasons)
    assert found.gate.outcome == "block"
    assert any(
        "the bias gate blocks: sex: gap in accuracy went from 0.0000 to 0.0750" in r for r in found.reasons
    )
    assert found.gate.insufficient == ("race 9 (accuracy of 20)",)
    small = sliced("3", 0.92, {"race=9": (0.3, 20)})  # a group in which nothing can be told, alone
    assert compare(old, small).gate.outcome == "insufficient"


def test_answers_to_the_same_requests_are_judged_together(versions: Versions) -> None:
    """What is recorded of a training decides its promotion: a group that suffers stops it, with figures and reasons in
    the ledger, and a reason of somebody's own lets it through."""
    rng = np.random.default_rng(0)
    labels, sex = rng.integers(0, 2, 8000), rng.choice(["1", "2"], 8000)
    old = labels ^ (rng.random(8000) < 0.15)
    honest = np.where(rng.random(8000) < 0.002, 1 - old, old)
    unfair = np.where((sex == "2") & (labels == 1) & (rng.random(8000) < 0.2), 0, old)
    for answers, champion in ((old, None), (honest, old), (unfair, old)):
        with track("fraud", versions) as tracked:
            tracked.answers(labels, answers, {"sex": sex}, champion)
        if champion is None:
            versions.promote("fraud", tracked.registered, actor=ANN, reason="the first")
    kept = [versions.registry.version("fraud", number) for number in ("1", "2", "3")]
    assert kept[0].paired is None
    assert kept[1].paired is not None
    assert kept[1].paired.against == "1"
    error = kept[2].slices["sex=2"]["error_rate"]
    assert (error.value, error.n) == (np.mean((unfair != labels)[sex == "2"]), (sex == "2").sum())
    assert kept[2].metrics["selection_rate"].value == unfair.mean()
    with pytest.raises(RefusedError, match="bias gate, block: sex"):
        versions.promote("fraud", "3", actor=ANN, reason="newer")
    refused = versions.ledger.entries("fraud", last=1)[0]
    assert (refused.outcome, refused.fairness["outcome"]) == ("refused", "block")
    assert not refused.fairness["checks"][0]["passed"]
    assert {row["group"] for row in refused.fairness["groups"]} == {"1", "2"}
    assert versions.registry.aliases("fraud") == {"champion": "1"}
    done = versions.promote("fraud", "2", actor=ANN, reason="newer")
    assert versions.ledger.entry(done.of).fairness["outcome"] == "pass"
    versions.rollback("fraud", actor=ANN, reason="back")
    done = versions.promote("fraud", "3", actor=ANN, reason="newer", override="the old one leaks data")
    intent = versions.ledger.entry(done.of)
    assert (intent.fairness["outcome"], intent.fairness["override"]) == ("block", "the old one leaks data")
    versions.rollback("fraud", actor=ANN, reason="back")  # the way back asks nothing
    open_ = Versions(versions.ledger, versions.registry, gate=None)
    assert open_.promote("fraud", "3", actor=ANN, reason="no gate").outcome == "applied"
    hold = Versions(versions.ledger, versions.registry, gate=FairnessGate())
    with track("fraud", versions) as tracked:
        tracked.metric("accuracy", 0.9, n=1000)
    with pytest.raises(RefusedError, match="insufficient: nothing was measured"):
        hold.promote("fraud", tracked.registered, actor=ANN, reason="newer")
    with pytest.raises(ValueError, match="other values than 0 and 1"):
        tracked.answers(labels + 1, labels, {})


def test_lineage_and_test_data_are_told_apart() -> None:
    def made(number: str, **parameters: Parameter) -> Version:
        return Version(
            service="fraud", version=number, parameters=parameters, code=Code(revision=f"r{number}"),
            data=(Data(name="test.csv", digest=number, role="test"),), metrics={"accuracy": share(0.9)},
        )  # fmt: skip

    found = compare(made("1", depth=3, rate=0.1), made("2", depth=4, rate=0.1))
    assert found.lineage["parameter depth"] == ("3", "4")
    assert "parameter rate" not in found.lineage
    assert found.lineage["code"] == ("r1", "r2")
    assert any("different data" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("metric", "wanted"),
    [
        ("val_accuracy", "higher"), ("roc_auc", "higher"), ("neg_log_loss", "higher"), ("log_loss", "lower"),
        ("brier_score", "lower"), ("latency_p95_ms", "lower"), ("total_usd", "lower"), ("RMSE", "lower"),
        ("error_rate", "lower"), ("false_positive_rate", "lower"), ("true_positive_rate", "higher"),
        ("selection_rate", "unknown"), ("training_s", "unknown"), ("template", "unknown"), ("slate", "unknown"),
    ],
)  # fmt: skip
def test_the_direction_of_a_metric_is_in_its_name(metric: str, wanted: str) -> None:
    assert direction(metric) == wanted


def test_a_bootstrap_interval_is_about_the_normal_one(versions: Versions) -> None:
    sample = (np.random.default_rng(1).random(2000) < 0.8).astype(float)
    with track("fraud", versions) as tracked:
        tracked.metric("accuracy", sample)
    kept = versions.registry.version("fraud", "1").metrics["accuracy"]
    half = 1.96 * sample.std() / math.sqrt(2000)
    assert (kept.low, kept.high) == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.003)
    assert json.loads(json.dumps(kept.value)) == sample.mean()
