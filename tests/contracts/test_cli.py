"""The command line: what it prints, how it fails, and what is left on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jsonschema
import pytest

PILOTAGE = [sys.executable, "-m", "pilotage"]
SCENARIO = """
title = "a test"
horizon_h = 0.1
[[pools]]
name = "cpu"
price_usd_per_hour = 1.0
boot_s = 20
[[services]]
name = "ranker"
slo_ms = 300
pools = ["cpu"]
traffic = {kind = "poisson", rate_rps = 20.0}
economics = {late_usd = 0.001, dropped_usd = 0.001}
[services.server]
max_batch = 4
[[services.variants]]
name = "fp32"
load_s = 10
latency = {cpu = {kind = "affine", base_ms = 20.0, per_item_ms = 10.0}}
"""

INTERVAL = {
    "type": "object",
    "required": ["mean", "low", "high"],
    "additionalProperties": {"type": ["number", "null"]},
}
POLICY = {
    "type": "object",
    "additionalProperties": False,
    "required": [
        "policy", "total_usd", "usd", "slo_attainment", "latency_ms", "requests", "dropped", "replica_hours",
        "node_hours", "accuracy", "over_bound",
    ],
    "properties": {
        "policy": {"type": "string"},
        "total_usd": INTERVAL,
        "usd": {
            "type": "object",
            "required": ["nodes", "late", "dropped", "errors", "retraining"],
            "additionalProperties": {"type": "number"},
        },
        "slo_attainment": {"type": "number", "minimum": 0, "maximum": 1},
        "latency_ms": {
            "type": "object",
            "required": ["p50", "p95", "p99"],
            "additionalProperties": {"type": ["number", "null"]},
        },
        "requests": {"type": "integer"},
        "dropped": {"type": "integer"},
        "replica_hours": {"type": "number"},
        "node_hours": {"type": "number"},
        "accuracy": {"type": ["number", "null"]},
        "over_bound": {"anyOf": [INTERVAL, {"type": "null"}]},
        "env": {"type": "string"},
        "seed": {"type": "integer"},
    },
}  # fmt: skip
EVALUATION = {
    "type": "object",
    "additionalProperties": False,
    "required": ["env", "seeds", "hours", "policies", "versus", "bound_usd", "engine"],
    "properties": {
        "env": {"type": "string"},
        "seeds": {"type": "array", "items": {"type": "integer"}},
        "hours": {"type": "number"},
        "policies": {"type": "array", "items": POLICY},
        "versus": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["policy", "baseline", "saving"],
                "properties": {"saving": INTERVAL},
            },
        },
        "bound_usd": {"type": ["object", "null"], "required": ["lower", "schedule"]},
        "engine": {"type": "object", "required": ["requests_per_s"]},
    },
}


def pilotage(
    *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PILOTAGE_DATA"} | environment
    return subprocess.run(
        [*PILOTAGE, *arguments], capture_output=True, text=True, cwd=cwd, env=env, timeout=300
    )


def refused(*arguments: str, cwd: Path | None = None, **environment: str) -> str:
    """Runs a command that must be refused as bad input; returns its one-line message."""
    done = pilotage(*arguments, cwd=cwd, **environment)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(SCENARIO)
    return path


def test_evaluate_prints_the_agreed_json_and_the_same_bytes_twice(scenario: Path) -> None:
    command = (
        "evaluate",
        str(scenario),
        "--policy",
        "hpa",
        "--policy",
        "predictive",
        "--seeds",
        "3",
        "--bound",
        "--json",
    )
    first, second = (json.loads(pilotage(*command).stdout) for _ in range(2))
    jsonschema.validate(first, EVALUATION)
    assert [row["policy"] for row in first["policies"]] == ["hpa", "predictive"]
    for result in (first, second):
        assert result.pop("engine")["requests_per_s"] > 0
    assert json.dumps(first) == json.dumps(second)
    for row in first["policies"]:
        assert row["total_usd"]["mean"] == pytest.approx(sum(row["usd"].values()))
        assert row["total_usd"]["mean"] >= first["bound_usd"]["lower"]
    assert first["bound_usd"]["schedule"] >= first["bound_usd"]["lower"]


def test_simulate_prints_one_policy_and_writes_a_timeline(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = pilotage("simulate", str(scenario), "--policy", "static:replicas=2", "--json", "--out", str(out))
    result = json.loads(done.stdout)
    jsonschema.validate(result, POLICY)
    assert result["env"] == "mine"
    assert (out / "timeline.csv").read_text().count("\n") == 1 + 24
    assert (out / "figures" / "timeline.svg").is_file()
    assert not list(out.rglob("*.part"))


def test_envs_lists_every_environment_and_prints_a_schema() -> None:
    lines = pilotage("envs").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "azure-chat", "bad-retrain", "diurnal", "drift-gradual", "drift-none", "drift-recurring", "drift-sudden",
        "flash-crowd", "fleet-lifecycle", "late-labels", "llm-agentic", "llm-chat", "llm-disaggregated", "llm-mixed",
        "multi-tenant", "quickstart", "sparse", "spot-fleet", "steady", "zone-outage",
    ]  # fmt: skip
    schema = json.loads(pilotage("envs", "--schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)


def test_the_schema_accepts_every_shipped_environment() -> None:
    import tomllib

    from pilotage.scenario import folder, json_schema

    schema = json_schema()
    for path in folder().glob("*.toml"):
        jsonschema.validate(tomllib.loads(path.read_text()), schema)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[[pools]]", "[[pools]", "not valid TOML"),
        ("rate_rps = 20.0", "rate_rps = -1.0", "services[0].traffic.rate_rps"),
        ('kind = "poisson"', 'kind = "posson"', "did you mean 'poisson'"),
        ("slo_ms = 300", "slo_ms = 0", "services[0].slo_ms"),
        ("slo_ms = 300", "slo_m = 300", "did you mean 'slo_ms'"),
        ('pools = ["cpu"]', 'pools = ["gpu"]', "gpu"),
        ("max_batch = 4", "max_batch = 0", "services[0].server.max_batch"),
        ("max_batch = 4", "max_bach = 4", "did you mean 'max_batch'"),
        ("base_ms = 20.0", "base_ms = nan", "base_ms"),
        ("horizon_h = 0.1", "horizon_h = 0.001", "shorter than one tick"),
        ("horizon_h = 0.1", "horizon_h = 0.1\nunused = 1", "unused"),
    ],
)
def test_a_wrong_scenario_is_refused_with_file_place_and_remedy(
    scenario: Path, old: str, new: str, says: str
) -> None:
    scenario.write_text(SCENARIO.replace(old, new, 1))
    message = refused("simulate", str(scenario), "--policy", "hpa")
    assert "mine.toml" in message
    assert says in message
    assert message.count("\n") == 1


def test_zero_pools_is_refused(scenario: Path) -> None:
    text = SCENARIO.replace(SCENARIO[SCENARIO.index("[[pools]]") : SCENARIO.index("[[services]]")], "")
    scenario.write_text("pools = []\n" + text)
    assert "$.pools" in refused("simulate", str(scenario), "--policy", "hpa")


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("hpaa", "did you mean 'hpa'"),
        ("hpa:target_utilisation=0.5", "did you mean 'target_utilization'"),
        ("hpa:target_utilization=7", "target_utilization"),
        ("hpa:target_utilization=high", "target_utilization"),
        ("nowhere/policy.toml", "nowhere/policy.toml"),
    ],
)
def test_a_wrong_policy_is_refused(scenario: Path, policy: str, says: str) -> None:
    assert says in refused("simulate", str(scenario), "--policy", policy)


def test_a_wrong_environment_option_or_folder_is_refused(scenario: Path, tmp_path: Path) -> None:
    assert "did you mean 'quickstart'" in refused("simulate", "quikstart", "--policy", "hpa")
    assert "--data" in refused("simulate", "azure-chat", "--policy", "hpa")
    assert "not a directory" in refused(
        "simulate", "azure-chat", "--policy", "hpa", "--data", str(tmp_path / "no")
    )
    assert "PILOTAGE_DATA" in refused("simulate", "azure-chat", "--policy", "hpa", PILOTAGE_DATA="/nowhere")
    assert "--hours" in refused("simulate", str(scenario), "--policy", "hpa", "--hours", "-3")
    assert "seeds" in refused("evaluate", str(scenario), "--policy", "hpa", "--seeds", "0")
    assert "polic" in refused("evaluate", str(scenario))
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "--out" in refused("simulate", str(scenario), "--policy", "hpa", "--out", str(blocked / "out"))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("arrival_s\n", "empty"),
        ("arrival_s\n1.0\nnan\n2.0\n", "nan"),
        ("arrival_s\n1.0\n3.0\n2.0\n", "sort"),
        ("arrival_s\n1.0\n2.0\n2.0\n", "duplicate"),
        ("when\n1.0\n2.0\n", "arrival_s"),
        ("arrival_s\n1.0\n2.0\n100.0\n", "horizon"),
    ],
)
def test_a_wrong_trace_is_refused(scenario: Path, tmp_path: Path, rows: str, says: str) -> None:
    (tmp_path / "trace.csv").write_text(rows)
    scenario.write_text(
        SCENARIO.replace('{kind = "poisson", rate_rps = 20.0}', '{kind = "trace", path = "trace.csv"}')
    )
    message = refused("simulate", str(scenario), "--policy", "hpa", "--data", str(tmp_path))
    assert says in message.lower()


STUDY = """
title = "a test"
question = "does it resume?"
env = "{env}"
policies = ["hpa"]
[[groups]]
name = "poisson"
train = {{count = 2}}
validate = {{count = 2}}
test = {{count = 3}}
[tune]
policies = ["predictive"]
trials = {trials}
"""


@pytest.mark.full
def test_a_study_that_was_interrupted_resumes_and_leaves_nothing_half_written(
    scenario: Path, tmp_path: Path
) -> None:
    experiment, out = tmp_path / "resume.toml", tmp_path / "out"
    experiment.write_text(STUDY.format(env=scenario, trials=250))
    command = ("study", str(experiment), "--out", str(out))
    process = subprocess.Popen(
        [*PILOTAGE, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # what a shell starts in the background ignores interrupts, and so would its children
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    storage = None
    for _ in range(1200):
        storage = next(iter(out.glob("work/tune-*.db")), None)
        if storage and storage.stat().st_size > 0 and _trials(storage) >= 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not (out / "evaluation.json").exists()
    assert not list(out.rglob("*.part"))
    kept = _trials(storage)
    assert 3 <= kept < 250

    before = storage.name
    done = pilotage(*command, "--json")
    assert done.returncode == 0, done.stderr
    assert (out / "report.html").is_file()
    assert next(out.glob("work/tune-*.db")).name == before
    assert _trials(storage) == 250


def _trials(storage: Path) -> int:
    import sqlite3

    try:
        with sqlite3.connect(storage) as connection:
            return connection.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    assert "run.json" in refused("report", str(tmp_path))
