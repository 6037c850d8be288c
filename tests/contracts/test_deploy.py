"""The files under docs/deploy: they parse, ask for no more rights than are used, and name what exists."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pilotage.live.status import Status

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
pytest.importorskip(
    "prometheus_client", reason="prometheus_client is not installed: pip install 'pilotage[live]'"
)

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
PROMTOOL = shutil.which("promtool")
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def of_kind(kind: str) -> dict[str, Any]:
    return next(one for one in KUBERNETES if one["kind"] == kind)


def exported() -> set[str]:
    """Every metric that a status exports, with the suffixes of its kind."""
    status = Status("act", 60)
    status.ticked(0.01)
    for counts in (status.errors, status.interventions, status.outcomes):
        counts["x"] += 1
    status.replicas["s"] = (1.0, 1.0)
    return {sample.name for family in status.collect() for sample in family.samples}


def metrics_in(expressions: list[str]) -> set[str]:
    return {name for text in expressions for name in re.findall(r"pilotage_steer_\w+", text)}


def test_rules_and_dashboard_name_metrics_that_exist() -> None:
    rules = yaml.safe_load((DEPLOY / "rules.yml").read_text())["groups"][0]["rules"]
    assert metrics_in([rule["expr"] for rule in rules]) <= exported()
    assert all(rule["annotations"]["summary"] for rule in rules if "alert" in rule)
    board = json.loads((DEPLOY / "dashboard.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert metrics_in(asked) <= exported()
    recorded = {name for text in asked for name in re.findall(r"pilotage:\w+:\w+", text)}
    assert recorded <= {rule.get("record") for rule in rules}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: apt install prometheus")
def test_promtool_takes_the_rules_and_their_tests_pass() -> None:
    for arguments in (("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")):
        done = subprocess.run([str(PROMTOOL), *arguments], cwd=DEPLOY, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_rights_are_those_that_are_used_and_no_more() -> None:
    used = {
        ("apps", "deployments"): {"get", "list", "patch"},
        ("apps", "deployments/scale"): {"get", "patch"},
        ("serving.kserve.io", "inferenceservices"): {"get", "list", "patch"},
        ("coordination.k8s.io", "leases"): {"get", "update"},
    }
    role = of_kind("Role")
    granted = {
        (group, name): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for name in rule["resources"]
    }
    assert granted == used
    lease = of_kind("Lease")["metadata"]["name"]  # which is there, so that none need be created
    assert [rule["resourceNames"] for rule in role["rules"] if rule["resources"] == ["leases"]] == [[lease]]
    assert not [one for one in KUBERNETES if one["kind"].startswith("Cluster")]
    binding = of_kind("RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "pilotage-steer", "namespace": role["metadata"]["namespace"]}
    ]
    assert {one["metadata"]["namespace"] for one in KUBERNETES} == {"models"}


def test_the_deployment_runs_one_writer_without_privileges() -> None:
    spec = of_kind("Deployment")["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (spec["replicas"], spec["strategy"]["type"]) == (1, "Recreate")
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    named = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == named
    assert of_kind("PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteOncePod"]


def test_the_configuration_of_the_manifest_is_valid(tmp_path: Path) -> None:
    text = of_kind("ConfigMap")["data"]["steer.toml"]
    assert 'mode = "shadow"' in text
    for name in ("token", "ca.crt"):
        (tmp_path / name).write_text("x")
    here = text.replace("/var/run/secrets/pilotage", str(tmp_path)).replace(
        "/var/lib/pilotage", str(tmp_path)
    )
    (tmp_path / "steer.toml").write_text(here)
    done = subprocess.run(
        [sys.executable, "-m", "pilotage", "steer", "steer.toml", "--check"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 services, mode shadow" in done.stdout


def test_unit_and_container_start_a_command_that_exists() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "pilotage-steer.service")
    service = unit["Service"]
    assert service["NoNewPrivileges"] == service["PrivateTmp"] == "yes"
    assert service["ProtectSystem"] == "strict"
    started = shlex.split(service["ExecStart"])
    container = (DEPLOY / "Containerfile").read_text()
    assert re.search(r"^USER (?!0|root)", container, re.MULTILINE)
    assert service["Environment"] == "OMP_NUM_THREADS=1" in container
    command = json.loads(re.findall(r"^CMD (\[.*\])", container, re.MULTILINE)[0])
    for arguments in (started[1:], command):
        done = subprocess.run(
            [sys.executable, "-m", "pilotage", arguments[0], "--help"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0
