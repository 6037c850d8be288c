"""Results are current and whole: each belongs to an experiment, says where it comes from, and holds what was asked."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

import pilotage
from experiments import reproduce_quick

ROOT = Path(__file__).parents[2]
EXPERIMENTS, RESULTS = ROOT / "experiments", ROOT / "results"
RECORDS = sorted(RESULTS.rglob("*run.json"))
ACCEPTANCE = sorted(RESULTS.rglob("*acceptance.csv"))
# why an experiment has no results yet
PENDING: dict[str, str] = {}
KEYS = {"experiment", "command", "commit", "dirty", "versions", "machine", "durations_s", "started_at"}
BOUND = re.compile(r"\s*(<=|>=|<|>|=)\s*(-?\d+(?:\.\d+)?(?:e-?\d+)?)\s*")


def experiments() -> set[str]:
    """Names of experiments, as their results' folders."""
    return set(reproduce_quick.programs())


def name(path: Path) -> str:
    return str(path.relative_to(RESULTS))


def read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def test_every_experiment_has_results_or_a_reason() -> None:
    with_results = {str(path.parent.relative_to(RESULTS)) for path in RECORDS}
    assert experiments() - with_results - set(PENDING) == set()


def test_every_experiment_is_run_quickly_or_said_why_not() -> None:
    programs = reproduce_quick.programs()
    sources = {str(path.parent.relative_to(EXPERIMENTS)) for path in EXPERIMENTS.glob("*/**/*.py")}
    assert sources <= set(programs), "a folder without run.py"
    for named in (
        reproduce_quick.ALONE,
        reproduce_quick.LEFT_OUT,
        reproduce_quick.TRACES,
        reproduce_quick.PROMETHEUS,
    ):
        assert set(named) <= set(programs)
    assert not set(reproduce_quick.ALONE) & set(reproduce_quick.LEFT_OUT)
    for program in programs.values():
        assert program.suffix == ".toml" or '"--quick"' in program.read_text(), program


def test_lines_and_rows_agree_where_intervals_overlap(tmp_path: Path) -> None:
    head = "line,asked,measured,low,high,met\n"
    written = {
        "a/acceptance.csv": head + "x,>0,1,0.5,1.5,True\ny,>0,1,0.9,1.1,True\nz,>0,1,,,True\nt,,nan,,,\n",
        "b/acceptance.csv": head + "x,>0,1.6,1.4,1.9,True\ny,>0,1.2,,,True\nz,>0,-2,,,False\n",
        "a/table.csv": "policy,env,usd,low,high,saves_low,saves_high\nhpa,a,3,2,4,,\nkpa,a,3,2,4,0.1,0.2\n",
        "b/table.csv": "policy,env,usd,low,high,saves_low,saves_high\nkpa,a,9,8,9,0.2,0.3\nkeda,a,1,1,2,0,1\n",
    }
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    count, apart = reproduce_quick.compared(tmp_path / "a", tmp_path / "b")
    assert count == 5  # x, y, z; and of kpa both
    assert [one.partition(":")[0] for one in apart] == ["kpa, a", "y", "z"]
    assert reproduce_quick.compared(tmp_path / "a", tmp_path / "a") == (6, [])
    assert reproduce_quick.compared(tmp_path / "a", tmp_path / "nowhere") == (0, [])


def test_every_folder_of_results_belongs_to_an_experiment() -> None:
    folders = {
        path.relative_to(RESULTS).parts[0]
        for path in RESULTS.rglob("*")
        if path.is_file() and path.parent != RESULTS
    }
    known = {one.partition("/")[0] for one in experiments()}
    assert folders - known == set()
    assert {str(path.parent.relative_to(RESULTS)) for path in RECORDS} <= experiments()


@pytest.mark.parametrize("path", RECORDS, ids=name)
def test_a_record_says_where_results_come_from(path: Path) -> None:
    record = read(path)
    assert set(record) >= KEYS
    folder = str(path.parent.relative_to(RESULTS))
    assert record["experiment"].startswith(folder), "it was written by another experiment"
    assert re.fullmatch(r"(python experiments/|pilotage |make ).+", record["command"])
    program = next((word for word in record["command"].split() if word.startswith("experiments/")), None)
    if program is not None:
        assert (ROOT / program).is_file(), "the program is gone: the results are stale"
        assert program.removeprefix("experiments/").startswith(folder)
    assert record["versions"]["pilotage"] == pilotage.__version__
    assert isinstance(record["dirty"], bool)
    assert not re.search(r"/(home|root|tmp/wt|work)/", json.dumps(record)), "a place of one machine"


def test_commits_of_results_are_in_the_history() -> None:
    def git(*arguments: str, given: str = "") -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, input=given)
        return done.stdout if done.returncode == 0 else ""

    if git("rev-parse", "--is-shallow-repository").strip() != "false":
        pytest.skip("no whole history here")
    commits = {read(path)["commit"] for path in RECORDS}
    answers = git("cat-file", "--batch-check", given="\n".join(sorted(commits)) + "\n").splitlines()
    assert [line for line in answers if line.split()[1] != "commit"] == []


def test_studies_were_run_with_the_file_that_is_there() -> None:
    for path in EXPERIMENTS.glob("*.toml"):
        record = read(RESULTS / path.stem / "run.json")
        assert record["experiment_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest(), path.stem
        assert record["title"] == tomllib.loads(path.read_text())["title"]


@pytest.mark.parametrize("path", ACCEPTANCE, ids=name)
def test_what_was_asked_stands_beside_what_came_out(path: Path) -> None:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        assert reader.fieldnames == ["line", "asked", "measured", "low", "high", "met"]
    assert rows
    assert len({row["line"] for row in rows}) == len(rows)
    for row in rows:
        assert row["line"]
        assert row["met"] in ("True", "False", "")
        bound = BOUND.fullmatch(row["asked"])
        if bound is None or not row["met"]:
            continue
        values = [float(row[key]) for key in ("measured", "low", "high") if row[key] not in ("", "nan")]
        if not values:
            assert row["met"] == "False", "nothing was measured"
            continue
        limit = float(bound[2])
        fits = [
            {"<=": v <= limit, ">=": v >= limit, "<": v < limit, ">": v > limit, "=": v == limit}[bound[1]]
            for v in values
        ]
        # a line is judged by its value or by an end of its interval
        assert (row["met"] == "True") in fits, row


def test_tables_are_there_and_every_row_is_whole() -> None:
    for path in RECORDS:
        tables = list(path.parent.glob("*.csv"))
        assert tables, path
        for table in tables:
            with table.open(newline="") as file:
                rows = list(csv.reader(file))
            assert len(rows) > 1, table
            assert {len(row) for row in rows} == {len(rows[0])}, table
