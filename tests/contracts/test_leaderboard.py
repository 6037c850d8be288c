"""The leaderboard: all policies, paired runs that are not repeated, scores by hand, and a page that is whole."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

pytest.importorskip("jinja2", reason="needs the extra `report`")

from pilotage import leaderboard
from pilotage.agents.export import export
from pilotage.control.learned import policy_from
from pilotage.control.scaling import Scaling
from pilotage.leaderboard import (
    BASELINE,
    COLUMNS,
    entrants,
    environments,
    play,
    standings,
    table,
    write_board,
)
from pilotage.scenario import load, shipped
from pilotage.world.spec import SpecError

SMALL = load("quickstart").replace(horizon_h=0.2)


def row(policy: str, env: str, seed: int, usd: float, note: str = "") -> dict[str, str]:
    found = dict.fromkeys(COLUMNS, "0") | {
        "policy": policy,
        "env": env,
        "seed": str(seed),
        "total_usd": str(usd),
    }
    return found | {"in_time": "90", "finished": "100", "submitted": "False", "note": note}


def test_scores_are_geometric_means_of_paired_ratios() -> None:
    rows = [row("hpa", env, k, 10.0 * (k + 1)) for env in ("a", "b") for k in range(3)]
    rows += [row("half", "a", k, 5.0 * (k + 1)) for k in range(3)]
    rows += [row("half", "b", k, 20.0 * (k + 1)) for k in (2, 0, 1)]  # in any order
    rows += [row("partly", "a", k, 1.0) for k in range(3)] + [
        row("partly", "b", k, 0, "no") for k in range(3)
    ]
    board = standings(rows)
    assert [one.name for one in board] == ["half", "hpa", "partly"]
    half, hpa, partly = board
    assert half.score == pytest.approx(math.sqrt(0.5 * 2.0))
    assert (half.low, half.high) == pytest.approx((1.0, 1.0))  # paired: the same ratio in every run
    assert half.cells["a"].verdict == "cheaper"
    assert half.cells["b"].verdict == "dearer"
    assert half.worst[0] == "b"
    assert hpa.score == 1
    assert hpa.cells["a"].verdict == "no clear difference"
    assert not partly.complete
    assert partly.ran == 1
    assert partly.cells["b"].note == "no"


def test_every_named_policy_and_every_serving_environment_is_on_it() -> None:
    names = {one.__struct_config__.tag for one in Scaling.__args__} - {"static", "schedule", "foresight"}
    assert {one.name for one in entrants({})} == names | {"learned", "configured"}
    decaying = {env for env in shipped() if any(s.lifecycle for s in load(env).services)}
    recorded = {"azure-chat", "llm-chat"}
    assert {one.name for one in environments(None)} | recorded == set(shipped()) - decaying


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A board of two policies and a bundle."""
    folder = tmp_path_factory.mktemp("board")
    export(policy_from("staffing"), folder / "bundle", [SMALL], runs=1)
    entered = [
        one for one in entrants({"mine": folder / "bundle"}) if one.name in ("hpa", "staffing", "mine")
    ]
    write_board(folder, play(folder, [SMALL], entered, runs=2), {"seeds": [1, 2]})
    return folder


def test_a_bundle_costs_what_its_policy_costs_and_is_named_by_its_hash(played: Path) -> None:
    board = {one.name: one for one in standings(leaderboard._read(played / "runs.csv"))}
    assert board["mine"].score == board["staffing"].score
    assert board["mine"].submitted
    assert board["mine"].digest != board["staffing"].digest
    with (played / "table.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [r["env"] for r in written] == ["all", "quickstart"] * 3
    assert len(table(list(board.values()))) == 6


def test_what_has_been_run_is_not_run_again(played: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = [one for one in entrants({}) if one.name == BASELINE]
    with monkeypatch.context() as patch:
        patch.setattr(leaderboard, "simulate", lambda *_, **__: pytest.fail("was run again"))
        rows = play(played, [SMALL], entered, runs=2)
    assert {r["policy"] for r in rows} == {"hpa", "staffing", "mine"}  # what was added before stays
    told: list[str] = []
    play(played, [SMALL.replace(horizon_h=0.1)], entered, runs=2, step=told.append)
    assert told == ["hpa in quickstart"]  # another scenario: run anew
    play(played, [SMALL], [one for one in entrants({}) if one.name in ("hpa", "staffing")], runs=2)


def test_the_page_is_whole_and_escapes(played: Path) -> None:
    page = (played / "index.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert "submitted, " in page
    rows = leaderboard._read(played / "runs.csv")
    rows[0]["note"] = ""
    hostile = [r | {"policy": "<script>alert(1)</script>"} for r in rows if r["policy"] == "staffing"]
    write_board(played, rows + hostile, {})
    assert "<script>" not in (played / "index.html").read_text()


@pytest.mark.parametrize(
    ("name", "says"), [("hpa", "is on the board already"), ("a b", "not a name"), ("mine", "nowhere")]
)
def test_what_cannot_be_added_is_named(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=says):
        entrants({name: tmp_path / "nowhere"})


ROW = {
    "type": "object",
    "additionalProperties": False,
    "required": ["place", "policy", "submitted", "env", "usd", "over_hpa", "low", "high", "attainment", "note"],
    "properties": {
        "policy": {"type": "string"}, "env": {"type": "string"}, "note": {"type": "string"},
        "submitted": {"type": "boolean"}, "place": {"type": ["integer", "string"]},
        **{name: {"type": "string"} for name in ("usd", "over_hpa", "low", "high", "attainment")},
    },
}  # fmt: skip
BOARD = {
    "type": "object",
    "additionalProperties": False,
    "required": ["envs", "runs", "rows"],
    "properties": {
        "envs": {"type": "array", "items": {"type": "string"}},
        "runs": {"type": "integer"},
        "rows": {"type": "array", "items": ROW},
    },
}


def test_the_command_prints_one_object_and_names_what_cannot_be(tmp_path: Path) -> None:
    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "pilotage",
            "leaderboard",
            *arguments,
            "--out",
            str(tmp_path / "board"),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = ask("--env", "quickstart", "--hours", "0.05", "--runs", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    jsonschema.validate(found, BOARD)
    assert (found["envs"], found["runs"]) == (["quickstart"], 2)
    assert {one["policy"] for one in found["rows"]} == {one.name for one in entrants({})}
    assert {path.name for path in (tmp_path / "board").iterdir()} == {
        "index.html",
        "run.json",
        "runs.csv",
        "table.csv",
    }
    for arguments, code, says in (
        (("--add", "mine"), 2, "NAME=BUNDLE"),
        (("--add", f"mine={tmp_path}"), 3, "error: bundle"),
        (("--env", "drift-none"), 2, "is not on the board"),
    ):
        refused = ask(*arguments)
        assert refused.returncode == code, refused.stderr
        assert says in refused.stderr
