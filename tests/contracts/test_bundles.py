"""Bundles: any policy goes through one unchanged, and whatever is not sound is refused before it decides."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest

from experiments.export.fuzz import KEY, Fuzz
from pilotage.agents.export import export, watch
from pilotage.control.bundle import (
    CARD,
    MANIFEST,
    POLICY,
    SELFTEST,
    SIGNATURE,
    BundleError,
    Judged,
    open_bundle,
    signature_of,
)
from pilotage.control.guard import Guard
from pilotage.control.handover import Bundled
from pilotage.control.intake import table
from pilotage.control.learned import Learned, policy_from
from pilotage.control.network import Network
from pilotage.control.policy import Policy, Situation
from pilotage.control.scaling import Hpa, Predictive
from pilotage.control.selftest import Ordered, SelfTest
from pilotage.scenario import load
from pilotage.world.spec import SpecError
from tests.contracts.test_policies import POLICIES

ROOT = Path(__file__).parents[2]
PILOTAGE = [sys.executable, "-m", "pilotage"]
SCENARIO = load("quickstart").replace(horizon_h=0.25, history_h=0.5)
JUDGED = Judged(
    env="quickstart", hours=1.0, runs=3, usd={"nodes": 1.0}, total_usd=1.0, total_usd_low=0.9, total_usd_high=1.1,
    attainment=0.99, latency_p95_ms=200.0, baseline="hpa", saving=0.1, saving_low=-0.05, saving_high=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A rule and the shipped network, and the first signed."""
    home = tmp_path_factory.mktemp("bundles")
    for name, policy, key in (
        ("rule", Hpa(), None),
        ("network", policy_from("learned"), None),
        ("signed", Hpa(), KEY),
    ):
        export(policy, home / name, [SCENARIO], judged=[JUDGED], provenance={"argument": name}, key=key)
    return {path.name: path for path in home.iterdir()}


@pytest.fixture
def mine(bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the network's bundle, to be spoilt."""
    return shutil.copytree(bundles["network"], tmp_path / "mine")


def seal(folder: Path, key: bytes | None = None, **changes: Any) -> None:
    """Makes hashes and sizes right again, as a forger would, with some of the manifest changed."""
    manifest = json.loads((folder / MANIFEST).read_bytes()) | changes
    for name, row in manifest["files"].items():
        if (folder / name).is_file():
            raw = (folder / name).read_bytes()
            row |= {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
    raw = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(raw)
    (folder / SIGNATURE).write_bytes(signature_of(raw, key))


def edit(path: Path, how: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_bytes())
    how(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: str(p.__struct_config__.tag))
def test_every_policy_decides_in_its_bundle_as_outside(policy: Policy, tmp_path: Path) -> None:
    bundle = export(policy, tmp_path / "bundle", [SCENARIO], runs=1)
    assert bundle.policy.period_s() == policy.period_s()
    watched = watch(policy, SCENARIO, Guard(), 1)
    for row, situation in enumerate(watched.situations):
        seen = [each[row] for each in watched.seen]
        plain = Bundled(policy=policy, observation=table(), guard=Guard()).begin(situation)
        handed = open_bundle(tmp_path / "bundle").policy.begin(situation)
        assert [Ordered.of(handed.decide(s)) for s in seen] == [Ordered.of(plain.decide(s)) for s in seen]


def test_a_correction_of_a_learned_policy_has_two_networks(tmp_path: Path) -> None:
    base = policy_from("learned")
    network = Network(
        mean=(0.0,) * 72,
        scale=(1.0,) * 72,
        clip=10.0,
        weights=(((0.01,) * 72,) * 3,),
        biases=((0.3, -0.2, 0.1),),
    )
    bundle = export(Learned(base=base, network=network), tmp_path / "bundle", [SCENARIO], runs=1)
    assert {name for name in bundle.manifest.files if name.endswith("onnx")} == {
        "policy.onnx",
        "policy.base.onnx",
    }
    assert [row.name for row in bundle.manifest.networks["policy.onnx"].inputs][-1] == "batch"
    again = export(open_bundle(tmp_path / "bundle").policy, tmp_path / "again", [SCENARIO], runs=1)
    for name in bundle.manifest.networks:  # out of a bundle comes what went in
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "bundle" / name).read_bytes()
    assert again.manifest.kind == "learned"


def test_one_by_one_and_together_are_the_same(bundles: dict[str, Path]) -> None:
    policy = open_bundle(bundles["network"]).policy
    watched = watch(policy, SCENARIO, Guard(), 12)
    together = policy.begin_together(watched.situations)
    alone = [policy.begin(situation) for situation in watched.situations]
    for seen in watched.seen[:30]:
        many, each = together.decide(seen), [one.decide(s) for one, s in zip(alone, seen, strict=True)]
        assert list(map(Ordered.of, many)) == list(map(Ordered.of, each))


def test_an_export_repeats_itself_and_writes_over_nothing(tmp_path: Path) -> None:
    first = export(Predictive(), tmp_path / "a", [SCENARIO], runs=1)
    second = export(Predictive(), tmp_path / "b", [SCENARIO], runs=1)
    assert first.digest == second.digest
    with pytest.raises(SpecError, match="is there already"):
        export(Predictive(), tmp_path / "a", [SCENARIO], runs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # nothing half-written lies around


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    wide = Network(
        mean=(0.0,) * 28, scale=(1.0,) * 28, clip=10.0, weights=(((1e39,) * 28,) * 3,), biases=((0.0,) * 3,)
    )
    with pytest.raises(SpecError, match="not finite"):
        export(Learned(base=Predictive(), network=wide), tmp_path / "a", [SCENARIO], runs=1)
    assert not list(tmp_path.iterdir())


def test_the_manifest_and_the_card_say_what_is_in_it(bundles: dict[str, Path]) -> None:
    bundle = open_bundle(bundles["network"])
    manifest = bundle.manifest
    assert {row.name for row in manifest.observation if row.seen is not None} >= {
        "arrival_rate",
        "replicas_ready",
    }
    assert len(manifest.networks["policy.onnx"].inputs) == 62
    assert manifest.provenance["argument"] == "network"
    assert "**undecided**. 1.00 dollars per run of 1 h, 10.0 % less than `hpa`" in bundle.card
    for part in ("What it is", "Where it comes from", "bad measurements", "Limits", "Why it decides"):
        assert part in bundle.card
    for path in bundle.path.iterdir():
        assert b"/root" not in path.read_bytes()
        assert not path.read_bytes().startswith(b"\x80")  # no pickle


# --- refusals ----------------------------------------------------------------------------------------------------
def spoil_bytes(mine: Path) -> None:
    raw = bytearray((mine / "policy.onnx").read_bytes())
    raw[5000] ^= 1
    (mine / "policy.onnx").write_bytes(raw)


def spoil_manifest_byte(mine: Path) -> None:
    raw = (mine / MANIFEST).read_bytes()
    (mine / MANIFEST).write_bytes(raw.replace(b'"low": 0.0', b'"low": 0.1', 1))


def truncate(mine: Path) -> None:
    os.truncate(mine / "policy.onnx", 1000)


def oversize(mine: Path) -> None:
    os.truncate(mine / "policy.onnx", 2**30)


def oversize_together(mine: Path) -> None:
    for name in ("policy.onnx", "policy.base.onnx"):
        (mine / name).touch()
        os.truncate(mine / name, 2**26)


def link(mine: Path) -> None:
    shutil.move(mine / CARD, mine.parent / CARD)
    (mine / CARD).symlink_to(mine.parent / CARD)


def pipe(mine: Path) -> None:
    (mine / CARD).unlink()
    os.mkfifo(mine / CARD)


def folder_inside(mine: Path) -> None:
    (mine / "policy.onnx").unlink()
    (mine / "policy.onnx").mkdir()


def rename_in_manifest(to: str) -> Callable[[Path], None]:
    def spoil(mine: Path) -> None:
        files = json.loads((mine / MANIFEST).read_bytes())["files"]
        files[to] = files.pop("policy.onnx")
        seal(mine, files=files)

    return spoil


def more_files(mine: Path) -> None:
    for k in range(40):
        (mine / f"policy.{'a' * (k + 1)}.onnx").write_bytes(b"")


def edited(file: str, how: Callable[[Any], Any]) -> Callable[[Path], None]:
    def spoil(mine: Path) -> None:
        edit(mine / file, how)
        seal(mine)

    return spoil


def replaced(file: str, raw: bytes) -> Callable[[Path], None]:
    def spoil(mine: Path) -> None:
        (mine / file).write_bytes(raw)
        seal(mine)

    return spoil


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (spoil_bytes, "policy.onnx: its contents are not those in the manifest"),
    "a changed manifest": (spoil_manifest_byte, "manifest.json: is not what manifest.sig says"),
    "cut off": (truncate, "policy.onnx: 1000 bytes; the manifest says"),
    "too large": (oversize, "valid: at most"),
    "too large in all": (oversize_together, "bytes in all; valid: at most"),
    "a missing file": (lambda mine: (mine / CARD).unlink(), "card.md is missing"),
    "no manifest": (lambda mine: (mine / MANIFEST).unlink(), "manifest.json is missing"),
    "no seal": (lambda mine: (mine / SIGNATURE).unlink(), "manifest.sig is missing"),
    "a file too many": (lambda mine: (mine / "run.py").write_text("1"), "'run.py' does not belong in a bundle"),
    "a network too many": (
        lambda mine: (mine / "policy.base.onnx").write_bytes(b""), "'policy.base.onnx' is not in the manifest",
    ),
    "many files": (more_files, "more than 18 files"),
    "a link": (link, "'card.md' is not a plain file; links and folders are not allowed"),
    "a pipe": (pipe, "'card.md' is not a plain file"),
    "a folder inside": (folder_inside, "'policy.onnx' is not a plain file"),
    "a path that leads out": (rename_in_manifest("../policy.onnx"), "'policy.onnx' is not in the manifest"),
    "an absolute path": (rename_in_manifest("/etc/passwd"), "'policy.onnx' is not in the manifest"),
    "a future schema": (lambda mine: seal(mine, schema=2, surprise=1), "schema 2; valid here: 1; a newer pilotage"),
    "an unknown field": (lambda mine: seal(mine, surprise=1), "unknown field `surprise`"),
    "a feature that is not measured here": (
        lambda mine: seal(mine, observation=[{"name": "gpu_temperature", "unit": "K"}]), "cannot be measured here",
    ),
    "another kind of policy": (lambda mine: seal(mine, kind="hpa"), "is 'foresight'; the manifest says 'hpa'"),
    "a guard that makes no sense": (
        lambda mine: seal(mine, guard={"max_order": 0}), "manifest.json: Expected `int` >= 1",
    ),
    "not JSON": (replaced(POLICY, b"\xff{"), "policy.json: not valid JSON"),
    "not UTF-8": (replaced(CARD, b"\xff\xfe"), "card.md: is not text in UTF-8"),
    "deep JSON": (replaced(POLICY, b'{"a":' * 5000 + b"1" + b"}" * 5000), "policy.json: is nested too deep"),
    "a deep policy": (replaced(POLICY, b'{"a":' * 50 + b"1" + b"}" * 50), "nested deeper than 24 levels"),
    "a number that is none": (
        edited(SELFTEST, lambda s: s["cases"][0]["values"][0].__setitem__(0, 10**400)), "selftest.json",
    ),
    "no ONNX": (replaced("policy.onnx", b"hello"), "policy.onnx: not a network as pilotage writes it"),
    "a network of another normalisation": (
        lambda mine: seal(mine, networks=_shifted(mine)), "policy.onnx: is not normalised as the manifest says",
    ),
    "a network that is elsewhere": (
        edited(POLICY, lambda p: p.update(network={"onnx": "../policy.onnx"})), "is not a network of its own",
    ),
    "a network inside the JSON": (
        lambda mine: (edit(mine / POLICY, lambda p: p.update(network=_plain())), seal(mine)), "valid: an ONNX file",
    ),
    "a parameter out of bounds": (
        edited(POLICY, lambda p: p.update(scale=99.0)), "policy.json: Expected `float` <= 1.6",
    ),
    "another decision": (
        edited(SELFTEST, lambda s: s["cases"][0]["decisions"][3].update(order=7)), "case 0: at tick 3 it decides",
    ),
    "another output": (
        edited(SELFTEST, lambda s: s["probes"]["policy.onnx"]["outputs"][0].__setitem__(0, 9.0)),
        "says something else than it should",
    ),
    "no self-test": (edited(SELFTEST, lambda s: s.update(cases=[])), "selftest.json: Expected `array` of length >= 1"),
    "a self-test that would take long": (
        edited(SELFTEST, lambda s: s["cases"][0].update(history_rps=[9e6])), "a load of 9e+06",
    ),
    "a self-test that would fill the memory": (
        edited(SELFTEST, lambda s: s["cases"][0]["pools"][0].update(boot_s=1e12)), "s to start; valid: at most",
    ),
}  # fmt: skip


def _plain() -> Any:
    return json.loads((ROOT / "src/pilotage/control/learned.json").read_bytes())["network"]


def _shifted(mine: Path) -> Any:
    networks = json.loads((mine / MANIFEST).read_bytes())["networks"]
    networks["policy.onnx"]["inputs"][0]["mean"] += 1.0
    return networks


@pytest.mark.parametrize(("spoil", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_sound_is_refused_with_the_reason(
    spoil: Callable[[Path], Any], reason: str, mine: Path
) -> None:
    open_bundle(mine)
    spoil(mine)
    with pytest.raises(BundleError) as found:
        open_bundle(mine)
    assert reason in str(found.value)
    assert str(mine) in str(found.value)


def test_a_weight_that_differs_fails_the_self_test_even_if_all_hashes_are_right(mine: Path) -> None:
    raw = bytearray((mine / "policy.onnx").read_bytes())
    at = raw.index(np.float32(_plain()["biases"][0][0]).tobytes())
    raw[at : at + 4] = np.float32(3.0).tobytes()
    (mine / "policy.onnx").write_bytes(raw)
    seal(mine)
    with pytest.raises(BundleError, match=r"policy\.onnx says something else than it should"):
        open_bundle(mine)


def test_with_a_key_only_what_is_signed_with_it_is_opened(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_bundle(bundles["signed"], KEY).signed is True
    assert open_bundle(bundles["signed"]).signed is None  # no key: it cannot be checked, and says so
    assert open_bundle(bundles["rule"]).signed is False
    with pytest.raises(BundleError, match="is not signed, and a key is configured"):
        open_bundle(bundles["rule"], KEY)
    with pytest.raises(BundleError, match="its signature is not that of the configured key"):
        open_bundle(bundles["signed"], b"another key that is long enough")
    forged = shutil.copytree(bundles["signed"], tmp_path / "forged")
    edit(forged / POLICY, lambda p: p.update(target_utilization=0.9))
    seal(forged, b"what a forger may have as a key")
    with pytest.raises(BundleError, match="its signature"):
        open_bundle(forged, KEY)
    monkeypatch.setenv("PILOTAGE_BUNDLE_KEY", KEY.decode())
    assert isinstance(policy_from(str(bundles["signed"])), Bundled)
    with pytest.raises(BundleError, match="is not signed"):
        policy_from(str(bundles["rule"]))
    monkeypatch.setenv("PILOTAGE_BUNDLE_KEY", "short")
    with pytest.raises(SpecError, match="a key of 5 bytes; valid: at least 16"):
        open_bundle(bundles["rule"])


@pytest.mark.parametrize("path", ["nowhere", "file"])
def test_what_is_no_folder_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"bundle .*(No such file|Not a directory)"):
        open_bundle(tmp_path / path)


@pytest.mark.parametrize(
    ("name", "forged", "key", "count"),
    [
        ("rule", False, None, 2000),
        ("network", False, None, 500),
        ("network", True, KEY, 500),
        ("rule", True, None, 200),
    ],
)
def test_mutated_bundles_are_refused_and_nothing_else_happens(
    name: str, forged: bool, key: bytes | None, count: int, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """Only somebody who may make bundles, because no key is configured, can make another one that is sound."""
    source = bundles[name]
    if key is not None:
        source = shutil.copytree(source, tmp_path / "signed")
        seal(source, key)
    open_bundle(source, key)  # what is imported late is imported now
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as home:
        fuzz = Fuzz(source, Path(home), seed=1)
        found = [fuzz.once(forged, key) for _ in range(count)]
    outcomes = Counter(outcome for _, outcome, _ in found)
    assert not [row for row in found if row[1] == "crashed"]
    if not forged or key is not None:
        assert not outcomes["loaded"]
    assert outcomes["refused"] > 0.6 * len(found)
    assert len({why for _, _, why in found}) > 15  # many different checks were met


# --- the command line --------------------------------------------------------------------------------------------
def pilotage(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "PILOTAGE_BUNDLE_KEY"}
    return subprocess.run(
        [*PILOTAGE, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=kept | env
    )


VERIFIED = {
    "type": "object",
    "additionalProperties": False,
    "required": ["bundle", "policy", "kind", "schema", "digest", "signed", "files", "provenance", "evaluation"],
    "properties": {
        "bundle": {"type": "string"}, "policy": {"type": "string"}, "kind": {"type": "string"},
        "schema": {"const": 1}, "digest": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "signed": {"type": ["boolean", "null"]}, "provenance": {"type": "object"},
        "registered": {"type": ["string", "null"]},
        "files": {
            "type": "object",
            "additionalProperties": {"type": "object", "required": ["sha256", "size"]},
        },
        "evaluation": {"type": "array", "items": {"type": "object", "required": ["env", "total_usd", "saving"]}},
    },
}  # fmt: skip


def test_a_self_test_that_fails_ends_a_run_before_the_first_decision(mine: Path) -> None:
    edited(SELFTEST, lambda s: s["cases"][0]["decisions"][3].update(order=7))(mine)
    for arguments in (("verify", mine), ("simulate", "quickstart", "--hours", 0.25, "--policy", mine)):
        refused = pilotage(*arguments)
        assert refused.returncode == 3
        assert "case 0: at tick 3 it decides" in refused.stderr
        assert not refused.stdout


def test_export_verify_and_run_from_the_command_line(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(KEY.decode() + "\n")
    why = {"policy": "predictive", "env": "quickstart", "sentence": "The load rose.", "outcome": 3, "usual": 2,
           "unit": "replicas", "contributions": [{"input": "rate", "contribution": 0.75}], "trusted": False,
           "trust": [{"name": "deletion", "asked": "", "passed": False}]}  # fmt: skip
    (tmp_path / "explanation.json").write_text(json.dumps(why))
    done = pilotage(
        "export",
        "predictive:z=2",
        "--explanation",
        tmp_path / "explanation.json",
        "--out",
        tmp_path / "bundle",
        "--seeds",
        2,
        "--hours",
        0.25,
        "--key",
        key,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    exported = json.loads(done.stdout)
    jsonschema.validate(exported, VERIFIED)
    assert exported["signed"] is True
    assert exported["evaluation"][0]["runs"] == 2
    card = (tmp_path / "bundle" / CARD).read_text()
    assert "The load rose." in card
    assert "- rate: +0.75\n\nIt is not to be trusted: deletion failed." in card
    done = pilotage("verify", tmp_path / "bundle", "--key", key, "--json")
    assert done.returncode == 0, done.stderr
    jsonschema.validate(json.loads(done.stdout), VERIFIED)
    assert json.loads(done.stdout)["digest"] == exported["digest"]
    same = [
        json.loads(pilotage("simulate", "quickstart", "--hours", 0.25, "--policy", p, "--json").stdout)["usd"]
        for p in ("predictive:z=2", tmp_path / "bundle")
    ]
    assert same[0] == same[1]
    (tmp_path / "bundle" / CARD).write_text("trust me")
    for arguments in (
        ("verify", tmp_path / "bundle"),
        ("simulate", "quickstart", "--policy", tmp_path / "bundle"),
    ):
        refused = pilotage(*arguments)
        assert refused.returncode == 3
        assert refused.stderr.startswith("error: bundle ")
        assert "card.md: 8 bytes; the manifest says" in refused.stderr
        assert not refused.stdout
    refused = pilotage("verify", tmp_path / "nowhere")
    assert refused.returncode == 3
    refused = pilotage("verify", tmp_path / "bundle", "--key", tmp_path / "none")
    assert refused.returncode == 2


def test_a_process_that_only_runs_bundles_is_small(bundles: dict[str, Path]) -> None:
    script = """
import json, sys
from pathlib import Path
import numpy as np
from pilotage.control.bundle import SELFTEST, open_bundle
from pilotage.control.selftest import SelfTest
import msgspec
for path in sys.argv[1:]:
    bundle = open_bundle(path)
    selftest = msgspec.json.decode((bundle.path / SELFTEST).read_bytes(), type=SelfTest)
    case = selftest.cases[0]
    together = bundle.policy.begin_together([case.situation] * 20)
    for seen in case.observations(selftest.features):
        together.decide([seen] * 20)
heavy = {"torch", "numba", "gymnasium", "stable_baselines3", "pandas", "scipy", "mlflow", "onnx", "matplotlib"}
(peak,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
print(json.dumps({
    "mb": int(peak.split()[1]) / 1024,
    "loaded": sorted(heavy & {name.partition(".")[0] for name in sys.modules}),
    "pilotage": sorted(n for n in sys.modules if n.startswith(("pilotage.engine", "pilotage.env", "pilotage.agents"))),
}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, bundles["rule"], bundles["network"]],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["loaded"] == found["pilotage"] == []
    assert found["mb"] < 150


def test_the_situation_of_a_case_is_the_one_it_was_taken_from(bundles: dict[str, Path]) -> None:
    selftest = msgspec.json.decode((bundles["rule"] / SELFTEST).read_bytes(), type=SelfTest)
    found, service = selftest.cases[0].situation, SCENARIO.services[0]
    assert isinstance(found, Situation)
    assert found.service.replace(traffic=service.traffic) == service
    assert len(found.history_rps) == 120
