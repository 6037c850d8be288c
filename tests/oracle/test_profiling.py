"""Fits of the iteration law find the law that made the data; profiles survive a file."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pilotage.agents.estimates import GRID, estimated
from pilotage.agents.profiling import fit_iterations, fit_regimes, fit_requests, save_profile
from pilotage.cli import app
from pilotage.engine.serving import serve
from pilotage.world.llm import KvMemory, LLMServer, Profile, load_profile
from pilotage.world.servers import IterationLaw
from pilotage.world.spec import SpecError, decode
from pilotage.world.tokens import Requests

TRUE = IterationLaw(base_s=0.03, prefill_s=2e-4, sequence_s=3e-4, context_s=1e-7, square_s=3e-8)


def test_iterations_give_back_their_law() -> None:
    rng = np.random.default_rng(0)
    highest = (2000, 100, 90_000, 10**6)
    batches = np.column_stack([rng.integers(0, n, 300) for n in highest])
    seconds = np.array([TRUE.seconds(*row) for row in batches])
    law, off = fit_iterations(batches, seconds)
    assert np.allclose(law.vector, TRUE.vector, rtol=1e-6)
    assert off["max"] < 1e-9
    law, off = fit_iterations(batches, seconds * rng.lognormal(0, 0.02, 300))
    assert np.allclose(law.vector[:3], TRUE.vector[:3], rtol=0.05)
    assert 0.01 < off["mape"] < 0.03
    more, batches = TRUE.replace(cross_s=2e-9), np.column_stack([batches, rng.integers(0, 10**7, 300)])
    law, _ = fit_iterations(batches, np.array([more.seconds(*row) for row in batches]))
    assert np.allclose(law.vector, more.vector, rtol=1e-6)


def test_requests_give_back_a_law_that_serves_them_alike() -> None:
    rng = np.random.default_rng(1)
    requests = Requests(
        np.cumsum(rng.exponential(0.8, 150)), rng.integers(100, 1500, 150), rng.integers(20, 200, 150)
    )
    server = LLMServer(scheduler="prefill-first", kv_blocks=3000, max_tokens=4096)
    seen = serve(server, TRUE, requests)
    start = TRUE.replace(base_s=0.02, prefill_s=1e-4, sequence_s=2e-4)
    law = fit_requests(server, requests, seen.ttft_s, seen.e2el_s, start, evaluations=20)
    again = serve(server, law, requests)
    for ours, theirs in ((again.ttft_s, seen.ttft_s), (again.e2el_s, seen.e2el_s)):
        assert np.allclose(np.percentile(ours, [50, 95]), np.percentile(theirs, [50, 95]), rtol=0.05)


def test_what_cannot_be_fitted_is_refused() -> None:
    ones = np.ones
    bad = ((ones((3, 4)), ones(3)), (ones((9, 3)), ones(9)), (ones((9, 4)), np.zeros(9)))
    for batches, seconds in bad:
        with pytest.raises(SpecError):
            fit_iterations(batches, seconds)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile = Profile(
        model="m", hardware="h", engine="vllm", law=TRUE.replace(decode=TRUE), source='said "so"',
        memory=KvMemory(gpu_gib=80, weights_gib=15, kv_bytes_per_token=131072), errors={"mape": 0.02},
    )  # fmt: skip
    save_profile(profile, tmp_path / "p.toml")
    assert load_profile(tmp_path / "p.toml") == profile


def test_two_regimes_give_back_their_laws() -> None:
    decode = TRUE.replace(base_s=0.02, sequence_s=1e-4)
    n, tokens, cached, decodes, context = GRID.T
    batches = np.column_stack([n * tokens, decodes, n * cached + decodes * context, n * tokens**2]).astype(
        float
    )
    seconds = np.array([(TRUE if row[0] > 0 else decode).seconds(*row) for row in batches])
    law, off = fit_regimes(batches, seconds)
    assert np.allclose(law.vector, TRUE.vector, rtol=1e-6)
    assert law.decode is not None
    assert np.allclose(np.array(law.decode.vector)[[0, 2, 3]], np.array(decode.vector)[[0, 2, 3]], rtol=1e-6)
    assert off["max"] < 1e-9


# stands for a Python that has aisimulate: `-c PROGRAM` with the question on standard input
STAND_IN = """#!{python}
import json, sys
asked = json.load(sys.stdin)
if asked["config"]["system"] == "abacus":
    print(json.dumps({{"error": "unsupported system"}}))
    sys.exit()
ms = [1e3 * (0.01 + 1e-5 * n * p + 2e-5 * d + 3e-8 * (n * c + d * k) + 1e-9 * n * p * p)
      for n, p, c, d, k in asked["grid"]]
print("a library says hello")
print(json.dumps({{"ms": ms, "backend": "9.9", "version": "0.0"}}))
"""


def test_estimates_become_a_profile(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    found = estimated("some/model", "h100_sxm", tensor_parallel=2, python=str(python))
    assert np.allclose(found.law.vector, (0.01, 1e-5, 2e-5, 3e-8, 1e-9, 0), rtol=1e-5)
    assert (found.engine, found.tensor_parallel) == ("vllm 9.9", 2)
    assert found.errors["max"] < 1e-6
    assert "aisimulate 0.0" in found.source
    with pytest.raises(SpecError, match="no kernel times of some/model on abacus with vllm"):
        estimated("some/model", "abacus", python=str(python))
    with pytest.raises(SpecError, match="cannot be run"):
        estimated("some/model", "h100_sxm", python=str(tmp_path / "nowhere"))


def test_the_command_writes_a_profile_and_a_variant(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    asked = [
        "profile",
        "--from",
        "aisimulate",
        "--model",
        "some/model",
        "--hardware",
        "l40s",
        "--pool",
        "gpu",
    ]
    done = CliRunner().invoke(app, [*asked, "--python", str(python), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "# error of the law: mape 0.0%" in done.output
    kept = load_profile(tmp_path / "profile.toml")
    (variant,) = tomllib.loads((tmp_path / "variant.toml").read_text())["services"]["variants"]
    assert decode(variant["latency"]["gpu"], IterationLaw, "variant.toml") == kept.law
    for wrong in (["profile"], ["profile", "--from", "hearsay"], [*asked[:5]]):
        assert isinstance(CliRunner().invoke(app, wrong).exception, SpecError)


def test_a_python_without_aisimulate_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport surely_not_installed_anywhere\n")
    python.chmod(0o755)
    with pytest.raises(SpecError, match=r"ModuleNotFoundError.*valid: a Python with"):
        estimated("some/model", "h100_sxm", python=str(python))
