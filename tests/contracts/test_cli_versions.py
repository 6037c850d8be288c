"""The commands history, compare, rollback and track: what they print, how they fail, what they load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from pilotage.live.entries import Actor
from pilotage.live.ledger import Ledger
from pilotage.live.registries import Folder, Measure, Version
from pilotage.live.versions import Versions
from tests.contracts.test_cli import pilotage

TEXT, NUMBER = {"type": "string"}, {"type": ["number", "null"]}
MAYBE = {"type": ["string", "null"]}
ENTRY = {
    "type": "object",
    "required": ["seq", "time", "kind", "outcome", "service", "actor", "reason", "hash"],
    "properties": {
        "seq": {"type": "integer"}, "time": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT[\d:.]+Z$"},
        "hash": {"type": "string", "pattern": "^[0-9a-f]{64}$"}, "kind": TEXT, "reason": TEXT,
        "outcome": {"enum": ["intent", "applied", "failed", "refused", "abandoned", "observed"]},
        "new_version": MAYBE, "expected_version": MAYBE, "actor": {"type": "object", "required": ["kind", "name"]},
    },
}  # fmt: skip
HISTORY = {
    "type": "object",
    "additionalProperties": False,
    "required": ["service", "alias"],
    "properties": {
        "service": TEXT, "alias": TEXT, "entries": {"type": "array", "items": ENTRY},
        "live": {
            "type": "object", "required": ["service", "alias", "at", "version", "since", "reason", "entry", "in_doubt"],
            "properties": {"version": MAYBE, "since": MAYBE, "reason": MAYBE, "entry": MAYBE, "in_doubt": MAYBE},
        },
        "verification": {
            "type": "object", "required": ["entries", "head", "problem", "notes"],
            "properties": {"entries": {"type": "integer"}, "problem": MAYBE},
        },
    },
}  # fmt: skip
DIFFERENCE = {
    "type": "object",
    "required": ["metric", "better", "a", "b", "difference", "low", "high", "verdict"],
    "properties": {
        "verdict": {"enum": ["better", "worse", "no clear difference", "unknown"]},
        "difference": NUMBER, "low": NUMBER, "high": NUMBER,
    },
}  # fmt: skip
COMPARISON = {
    "type": "object",
    "additionalProperties": False,
    "required": ["a", "b", "metrics", "slices", "gate", "lineage", "recommendation", "reasons"],
    "properties": {
        "a": TEXT, "b": TEXT, "metrics": {"type": "array", "items": DIFFERENCE},
        "slices": {"type": "object", "additionalProperties": {"type": "array", "items": DIFFERENCE}},
        "gate": {
            "type": "object", "required": ["outcome", "reason", "checks", "insufficient", "groups"],
            "properties": {"outcome": {"enum": ["pass", "block", "insufficient"]}, "reason": TEXT},
        },
        "lineage": {"type": "object"}, "recommendation": {"enum": ["a", "b", "undecided"]},
        "reasons": {"type": "array", "items": TEXT, "minItems": 1},
        "attention": {"type": ["object", "null"]},
    },
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    versions = Versions(Ledger(tmp_path / ".pilotage"), Folder(path=str(tmp_path / ".pilotage")))
    ann = Actor(kind="human", name="ann")
    for number in ("1", "2"):
        accuracy = Measure(value=0.8 + int(number) / 20, n=2000)
        versions.add(
            Version(service="fraud", metrics={"accuracy": accuracy}, slices={"sex=1": {"accuracy": accuracy}}),
            actor=ann, reason="training",
        )  # fmt: skip
        versions.promote("fraud", number, actor=ann, reason=f"reason {number}")
    return tmp_path


def refused(*arguments: str, home: Path, code: int = 2) -> str:
    done = pilotage(*arguments, cwd=home)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    return done.stderr


def asked(*arguments: str, home: Path, schema: dict[str, object]) -> dict[str, object]:
    done = pilotage(*arguments, "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    jsonschema.validate(result, schema)
    return result


def test_every_command_prints_the_agreed_json(home: Path) -> None:
    entries = asked("history", "fraud", home=home, schema=HISTORY)["entries"]
    assert len(entries) == 8
    at = entries[-2]["time"]
    live = asked("history", "fraud", "--at", at, home=home, schema=HISTORY)["live"]
    assert (live["version"], live["reason"], live["in_doubt"]) == ("1", "reason 1", "2")
    result = asked("compare", "fraud:1", "fraud@champion", home=home, schema=COMPARISON)
    assert (result["b"], result["recommendation"]) == ("fraud:2", "b")
    done = asked("rollback", "fraud", "--reason", "worse", home=home, schema=ENTRY)
    assert (done["expected_version"], done["new_version"], done["outcome"]) == ("2", "1", "applied")
    assert Folder(path=str(home / ".pilotage")).aliases("fraud") == {"champion": "1"}
    found = asked("history", "fraud", "--verify", home=home, schema=HISTORY)["verification"]
    assert (found["problem"], found["entries"]) == (None, 10)
    command = (
        "track",
        "--service",
        "fraud",
        "--json",
        "--",
        sys.executable,
        "-c",
        "print('{\"accuracy\": 0.9}')",
    )
    tracked = pilotage(*command, cwd=home)
    assert json.loads(tracked.stdout) == {"service": "fraud", "version": "3"}
    assert Folder(path=str(home / ".pilotage")).version("fraud", "3").parents == ("1",)


def test_every_command_tells_people(home: Path) -> None:
    assert "reason 2" in pilotage("history", "fraud", cwd=home).stdout
    assert "version 2 since" in pilotage("history", "fraud", "--at", "2999-01-01", cwd=home).stdout
    assert "nothing was live" in pilotage("history", "fraud", "--at", "1999-12-31", cwd=home).stdout
    assert "intact: 8 entries" in pilotage("history", "fraud", "--verify", cwd=home).stdout
    assert "prefer fraud:2" in pilotage("compare", "fraud:1", "fraud:2", cwd=home).stdout
    assert "version 2 -> 1" in pilotage("rollback", "fraud", cwd=home).stdout


def test_the_bias_gate_stops_a_promotion_unless_somebody_says_why(home: Path) -> None:
    versions = Versions(Ledger(home / ".pilotage"), Folder(path=str(home / ".pilotage")))
    worse = {f"sex={k}": {"accuracy": Measure(value=0.9 - k / 10, n=2000)} for k in (0, 1)}
    versions.add(
        Version(service="fraud", slices=worse), actor=Actor(kind="human", name="ann"), reason="training"
    )
    compared = asked("compare", "fraud:2", "fraud:3", home=home, schema=COMPARISON)
    assert (compared["gate"]["outcome"], compared["recommendation"]) == ("block", "a")
    said = refused("promote", "fraud", "3", home=home, code=1)
    assert "bias gate, block: sex: error of group 1 went from 0.1000 to 0.2000" in said
    assert "wider_gap" in refused("promote", "fraud", "3", "--gate", "fairness-gate:wider_gap=x", home=home)
    assert "fairness-gate" in refused("compare", "fraud:2", "fraud:3", "--gate", "fair", home=home)
    loose = ("--gate", "fairness-gate:worse_error=0.2,wider_gap=0.2,small_groups=report")
    assert "blocks" not in pilotage("compare", "fraud:2", "fraud:3", *loose, cwd=home).stdout
    done = asked("promote", "fraud", "3", "--override", "law", home=home, schema=ENTRY)
    assert (done["expected_version"], done["new_version"], done["outcome"]) == ("2", "3", "applied")
    told = pilotage("promote", "fraud", "1", "--reason", "older", cwd=home)
    assert "version 3 -> 1" in told.stdout, told.stderr


def test_a_ledger_that_was_changed_ends_with_3(home: Path) -> None:
    path = home / ".pilotage" / "ledger.jsonl"
    whole = path.read_text()
    kept = pilotage("history", "fraud", "--verify", cwd=home).stdout.split()[-1]
    path.write_text(whole.replace("reason 1", "reason 3"))
    done = pilotage("history", "fraud", "--verify", "--json", cwd=home)
    assert done.returncode == 3
    assert "entry 2: " in done.stderr
    assert json.loads(done.stdout)["verification"]["problem"].startswith("entry 2: ")
    path.write_text(whole[: len(whole) // 2])
    assert pilotage("history", "fraud", "--verify", cwd=home).returncode == 3
    assert "cut or changed" in refused("rollback", "fraud", home=home, code=3)
    path.write_text(whole)
    assert pilotage("history", "fraud", "--verify", "--head", kept, cwd=home).returncode == 0
    assert pilotage("history", "fraud", "--verify", "--head", f"7:{'0' * 64}", cwd=home).returncode == 3


def test_a_ledger_is_verified_without_its_registry(home: Path) -> None:
    pytest.importorskip("mlflow")
    registry = ("--registry", "http://127.0.0.1:9")  # where nothing listens
    done = pilotage("history", "fraud", "--verify", *registry, cwd=home)
    assert done.returncode == 0, done.stderr
    assert "was not checked" in done.stdout
    assert refused("compare", "fraud:1", "fraud:2", *registry, home=home, code=1).startswith(
        "error: http://127.0.0.1:9"
    )


def test_a_rollback_reaches_the_target_that_a_file_names(home: Path) -> None:
    (home / "steer.toml").write_text('[target]\nkind = "dry-run"\n')
    done = asked("rollback", "fraud", "--target", "steer.toml", home=home, schema=ENTRY)
    assert "by 1 (no artifact)" in str(done["response"])
    (home / "bad.toml").write_text('[target]\nkind = "kubernets"\n')
    assert "did you mean 'kubernetes'" in refused("rollback", "fraud", "--target", "bad.toml", home=home)
    (home / "none.toml").write_text("")
    assert "kind None does not exist" in refused("rollback", "fraud", "--target", "none.toml", home=home)
    assert "cannot be read" in refused("promote", "fraud", "2", "--target", "absent.toml", home=home)


def test_bad_input_is_refused_with_what_would_be_valid(home: Path) -> None:
    assert "knows no such service" in refused("history", "freud", home=home)
    assert "ISO 8601" in refused("history", "fraud", "--at", "noon", home=home)
    assert "NUMBER:HASH" in refused("history", "fraud", "--verify", "--head", "x", home=home)
    assert "holds no ledger" in refused("history", "fraud", "--home", "elsewhere", home=home)
    assert "SERVICE:VERSION" in refused("compare", "fraud", "fraud:1", home=home)
    assert "valid: champion" in refused("compare", "fraud@chalenger", "fraud:1", home=home)
    assert "no version '9'" in refused("compare", "fraud:9", "fraud:1", home=home, code=1)
    assert "valid: 1, 2" in refused("rollback", "fraud", "--to", "9", home=home, code=1)
    assert "no earlier version" in refused("rollback", "freud", home=home)
    assert "--registry" in refused("compare", "a:1", "a:2", "--registry", "ftp://x", home=home)
    assert "--registry" in refused("compare", "a:1", "a:2", "--registry", "http://u:p@x", home=home)
    assert "not a name" in refused("track", "--service", "a/b", "--", "true", home=home)
    assert "cannot be run" in refused("track", "--service", "a", "--", "no-such-program", home=home)
    assert "ended with code 1" in refused("track", "--service", "a", "--", "false", home=home, code=1)


def test_the_commands_load_neither_simulator_nor_trainers_nor_mlflow(home: Path) -> None:
    heavy = (
        "numba",
        "torch",
        "gymnasium",
        "stable_baselines3",
        "mlflow",
        "pilotage.engine",
        "pilotage.env",
        "scipy",
    )
    for command in (
        ["history", "fraud", "--verify"], ["compare", "fraud:1", "fraud:2"], ["rollback", "fraud"],
        ["promote", "fraud", "2"], ["track", "--service", "fraud", "--", "true"],
    ):  # fmt: skip
        text = (
            f"import sys\nsys.argv = {['pilotage', *command]!r}\nfrom pilotage.cli import main\n"
            f"try: main()\nfinally: print('loaded', [m for m in {heavy!r} if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=home, capture_output=True, text=True, env=dict(os.environ)
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("loaded []\n"), done.stdout
