"""The public interface: its names and signatures are those listed here, it is typed, documented, and loaded late."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import pilotage

ROOT = Path(__file__).parents[2]
# what a name takes; a change here is a change of the interface: say it in the changelog
API = {
    "BundleError": "",
    "Controller": "",
    "Decision": "order, release, max_batch, pool, variant, reason, batch_wait_s, chunk_tokens",
    "FEATURES": "",
    "Guard": "min_replicas, max_replicas, max_order, max_release, order_cooldown_s, release_cooldown_s, "
    "max_usd_per_hour, max_total_usd_per_hour, required, stale_after_s, ranges, outside, fallback, hold, hold_file",
    "Observation": "now_s, values, age_s",
    "Policy": "",
    "Run": "policy, world, tick_s, usd, totals, histogram, seconds, timeline, decisions, retrained_s",
    "Scenario": "title, pools, services, tick_s, horizon_h, start_h, history_h, placement, interference, outages, "
    "random_outages, name, data",
    "Situation": "service, pools, tick_s, history_rps",
    "SpecError": "",
    "World": "seed, start_s, traffic",
    "bound": "scenario, world, policies, guard",
    "compare": "scenario, results, lower_usd, schedule",
    "export": "policy, out, scenarios, name, guard, judged, provenance, explanation, runs, key",
    "load": "env, data",
    "open_bundle": "path, key",
    "policy_from": "text",
    "simulate": "scenario, policies, worlds, retraining, label, guard, keep_timeline, threads",
}


def parameters(name: str) -> str:
    thing = getattr(pilotage, name)
    if fields := getattr(thing, "__struct_fields__", None):
        return ", ".join(fields)
    if isinstance(thing, type) and issubclass(thing, Exception):
        return ""
    try:
        found = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return ""
    return ", ".join(p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def test_the_interface_is_what_is_listed_here() -> None:
    assert sorted(pilotage.__all__) == sorted(API)
    assert {name: parameters(name) for name in API} == API
    assert set(API) <= set(dir(pilotage))
    assert not hasattr(pilotage, "nothing_of_the_kind")


def test_every_name_is_documented() -> None:
    page = (ROOT / "docs" / "reference-python.md").read_text()
    assert set(re.findall(r"^::: pilotage\.(\w+)", page, re.MULTILINE)) == set(API) - {"FEATURES"}
    for name in set(API) - {"FEATURES"}:
        assert inspect.getdoc(getattr(pilotage, name)), name


def test_the_package_says_that_it_is_typed() -> None:
    assert files("pilotage").joinpath("py.typed").is_file()


def test_the_layers_are_explained_in_their_order() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = re.findall(r"\w+", " ".join(contract["layers"]).replace("pilotage.", ""))
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = page.partition("```text\n")[2].partition("```")[0]
    missing = [
        name for name in layers if not name.startswith("cli_") and not re.search(rf"\b{name}\b", drawn)
    ]
    assert missing == []
    first = [re.match(r"\w+", line)[0] for line in drawn.splitlines()]  # type: ignore[index]
    rows = {
        name: k for k, row in enumerate(contract["layers"]) for name in re.findall(r"pilotage\.(\w+)", row)
    }
    assert [rows[name] for name in first] == sorted(rows[name] for name in first)


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_importing_loads_nothing_heavy() -> None:
    heavy = "('numpy', 'numba', 'gymnasium', 'torch', 'pandas', 'mlflow', 'optuna')"
    done = run(f"import sys, pilotage; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    light = run(
        f"import sys; from pilotage import open_bundle, policy_from, Guard, load, Decision;"
        f"print([m for m in {heavy} if m in sys.modules and m != 'numpy'])"
    )
    assert light.stdout.strip() == "[]", light.stdout + light.stderr


NO_NETWORK = """
import importlib, pkgutil, socket
def refuse(*arguments, **_):
    raise AssertionError(f"a connection at import: {arguments}")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.getaddrinfo = socket.create_connection = refuse
import pilotage
names = [m.name for m in pkgutil.walk_packages(pilotage.__path__, "pilotage.")]
missing = []
for name in names:
    if name.endswith("__main__"):
        continue
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing.append(f"{name}: {error.name}")
for name in pilotage.__all__:
    getattr(pilotage, name)
print(len(names), missing)
"""


@pytest.mark.full
def test_importing_any_module_opens_no_connection() -> None:
    done = run(NO_NETWORK)
    assert done.returncode == 0, done.stderr
    count, missing = done.stdout.split(maxsplit=1)
    assert int(count) > 150
    assert missing.strip() == "[]", f"not installed here: {missing}"


def test_mlflow_sends_no_telemetry_of_ours() -> None:
    pytest.importorskip("mlflow", reason="needs the extra `live`")
    env = {k: v for k, v in os.environ.items() if k not in {"MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI"}}
    script = (
        "from pilotage.live.mlflow_server import _client; _client('http://127.0.0.1:9');"
        "from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY as off; print(off.get())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "True", done.stderr


def test_python_m_pilotage_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "pilotage", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == pilotage.__version__


def test_a_shell_completes_commands_and_options() -> None:
    program = "import sys; sys.argv[0] = 'pilotage'; from pilotage.cli import main; main()"

    def completed(words: str, at: int) -> list[str]:
        asked = {"_PILOTAGE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | asked
        )
        return done.stdout.split()

    assert completed("pilotage simul", 1) == ["simulate"]
    assert completed("pilotage simulate quickstart --pol", 3) == ["--policy"]
