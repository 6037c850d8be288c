"""`pilotage explain`: what it prints, what it leaves on disk, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import msgspec
import pytest

from pilotage.cli_explain import explain, named_policy
from pilotage.control.learned import policy_from
from pilotage.control.lifecycle import retraining_from
from pilotage.control.rollout import rollout_from
from pilotage.control.tree import Node, Tree
from pilotage.engine.canary import Candidate
from pilotage.explain import decisions
from pilotage.explain.account import Account
from pilotage.explain.trust import Check
from pilotage.live.compare import compare
from pilotage.live.registries import Measure, Version
from pilotage.scenario import load
from pilotage.world.spec import SpecError

NUMBER = {"type": ["number", "null"]}
INTERVAL = {
    "type": "object",
    "required": ["mean", "low", "high"],
    "additionalProperties": NUMBER,
}
USD = {
    "type": "object",
    "required": ["nodes", "late", "dropped", "errors", "retraining", "total"],
    "additionalProperties": INTERVAL,
}


def record(**properties: object) -> dict:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(properties),
        "properties": properties,
    }


EXPLANATION = record(
    env={"type": "string"},
    policy={"type": "string"},
    kind={"enum": ["scaling", "retraining", "rollout"]},
    subject={"type": "string"},
    at={"type": "string"},
    decision={"type": "string"},
    sentence={"type": "string", "pattern": r"\.$"},
    outcome={"type": "number"},
    usual={"type": "number"},
    unit={"type": "string"},
    method={"enum": ["exact", "permutation", "tree"]},
    contributions={
        "type": "array",
        "items": record(
            input={"type": "string"}, value=NUMBER, usual=NUMBER, unit={"type": "string"},
            contribution={"type": "number"},
        ),
    },
    horizon_h=NUMBER,
    options={
        "type": "array",
        "minItems": 2,
        "items": record(decision={"type": "string"}, usd=USD, more_usd=USD),
    },
    flip={
        "anyOf": [
            {"type": "null"},
            record(
                moved={
                    "type": "array",
                    "minItems": 1,
                    "items": record(
                        input={"type": "string"}, unit={"type": "string"}, was={"type": "number"},
                        to={"type": "number"},
                    ),
                },
                distance={"type": "number"},
                outcome={"type": "number"},
            ),
        ]
    },
    repeated=NUMBER,
    trust={
        "type": "array",
        "minItems": 1,
        "items": record(
            name={"type": "string"}, asked={"type": "string"}, measured=NUMBER, low=NUMBER, high=NUMBER,
            passed={"type": "boolean"}, note={"type": "string"},
        ),
    },
    trusted={"type": "boolean"},
)  # fmt: skip


def test_a_scaling_decision_is_explained_as_json_and_in_figures(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pilotage", "explain", "hpa", "quickstart", "--hours", "0.5"),
            *("--states", "12", "--futures", "4", "--why-not", "+2", "--out", str(tmp_path), "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=500,
    )
    found = json.loads(done.stdout)
    jsonschema.validate(found, EXPLANATION)
    assert done.returncode == (0 if found["trusted"] else 3), done.stderr
    assert found["options"][1]["decision"] == "+2 replicas"
    total = found["options"][0]["usd"]
    assert sum(total[item]["mean"] for item in total if item != "total") == pytest.approx(
        total["total"]["mean"]
    )
    assert found["options"][0]["more_usd"]["total"]["mean"] == 0
    assert sum(one["contribution"] for one in found["contributions"]) == pytest.approx(
        found["outcome"] - found["usual"], abs=1e-6
    )
    assert json.loads((tmp_path / "explanation.json").read_text())["sentence"] == found["sentence"]
    for name in ("beeswarm", "dependence"):
        assert (tmp_path / "figures" / f"{name}.svg").read_text().startswith("<?xml")


def test_decisions_about_versions_are_told_in_the_same_form() -> None:
    verdict, _, canaries = decisions.rollout(
        "learned-rollout", rollout_from("learned-rollout"), load("quickstart").replace(horizon_h=0.75),
        candidates=(Candidate(), Candidate(new_errors=0.1)), worlds=2, background=3, seed=1,
    )  # fmt: skip
    batch, _, batches = decisions.retraining(
        "learned-retraining", retraining_from("learned-retraining"), load("drift-sudden"),
        deployments=4, states=8, background=4, futures=4,
    )  # fmt: skip
    for account, study in ((verdict, canaries), (batch, batches)):
        told = json.loads(msgspec.json.encode(account)) | {"trusted": account.trusted}
        jsonschema.validate(told, EXPLANATION)
        checks = {one.name: one for one in account.trust}
        assert checks["replay"].measured == account.repeated == 1.0
        assert checks["additivity"].passed
        assert checks["random weights"].measured is not None
        assert account.contributions[0].input in study.explained[0].choice.names
    assert "the new version goes back" in verdict.sentence
    assert {option.decision for option in batch.options} == {"retrained the model", "not retrained"}
    with pytest.raises(SpecError, match=r"--tick 99: valid: 0 to"):
        decisions.retraining("never", retraining_from("never"), load("drift-sudden"), deployments=4, states=8,
                             background=4, tick=99)  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "options", "says"),
    [
        ("hpa", {"service": "nobody"}, "valid: ranker"),
        ("hpa", {"why_not": ["much"]}, "not a change of replicas"),
        ("ski-rental", {"worst": True}, "are about scaling"),
        ("hpaa", {}, "did you mean 'hpa'"),
        ("sequental", {}, "does not exist"),
        ("hpa", {"hours": 0.0}, "must be a positive number"),
    ],
)
def test_wrong_input_is_refused_before_any_work(
    policy: str, options: dict, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise SpecError("not a change of replicas" if "why_not" in options else "work was begun")

    monkeypatch.setattr(decisions, "Scaling", never)
    given = {
        "tick": None,
        "worst": False,
        "why_not": None,
        "service": None,
        "out": None,
        "hours": None,
        "data": None,
    }
    with pytest.raises(SpecError, match=says):
        explain(policy, "quickstart", **given | options)


def test_an_explanation_that_fails_a_check_ends_with_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    bad = Check(name="infidelity", asked="less", measured=2.0, passed=False)
    account = Account(
        env="quickstart", policy="hpa", kind="scaling", subject="ranker", at="tick 3", decision="kept 3 replicas",
        sentence="So.", outcome=3.0, usual=3.0, unit="replicas", method="exact", contributions=(), horizon_h=0.1,
        options=(), flip=None, repeated=None, trust=(bad,),
    )  # fmt: skip
    monkeypatch.setattr(decisions, "Scaling", lambda *_, **__: type("Of", (), {"study": lambda self: None})())
    monkeypatch.setattr(decisions, "scaling", lambda *_, **__: (account, None))
    with pytest.raises(SystemExit) as ended:
        explain("hpa", "quickstart", tick=None, worst=False, why_not=None, service=None, out=None, hours=None,
                data=None, as_json=True)  # fmt: skip
    assert ended.value.code == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out)["trusted"] is False
    assert "infidelity failed" in printed.err


def test_every_kind_of_policy_is_known_by_its_name() -> None:
    assert [named_policy(name)[0] for name in
            ("hpa", "learned", "ski-rental", "learned-retraining", "sequential", "learned-rollout:alpha=0.01")] == [
        "scaling", "scaling", "retraining", "retraining", "rollout", "rollout",
    ]  # fmt: skip


def test_a_tree_is_a_policy_argument_as_a_folder_and_as_a_file(tmp_path: Path) -> None:
    tree = Tree(nodes=(Node(input="hour", at_most=8.0, then=1, otherwise=2), Node(), Node(change=1)))
    tree.save(tmp_path)
    assert policy_from(str(tmp_path)) == tree
    assert policy_from(str(tmp_path / "policy.json")) == tree
    (tmp_path / "policy.json").write_text(json.dumps({"kind": "tree", "nodes": [{"input": "rain"}]}))
    with pytest.raises(SpecError, match="does not exist; valid: replicas"):
        policy_from(str(tmp_path))


def test_compare_shows_how_the_attention_of_two_versions_moved() -> None:
    def version(number: str, **sizes: float) -> Version:
        return Version(
            service="fraud",
            version=number,
            metrics={f"attribution/{name}": Measure(value=size) for name, size in sizes.items()},
        )

    found = compare(version("1", amount=3.0, country=1.0), version("2", amount=1.0, country=1.0))
    assert found.metrics == ()
    assert found.attention is not None
    assert found.attention.moved == pytest.approx(0.25)
    assert found.attention.inputs["amount"] == pytest.approx((0.75, 0.5))
    assert msgspec.to_builtins(found)["attention"]["moved"] == pytest.approx(0.25)
    assert compare(version("1", amount=3.0), version("2")).attention is None
