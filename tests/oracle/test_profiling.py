"""Fits of the iteration law find the law that made the data; profiles survive a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pilotage.agents.profiling import fit_iterations, fit_requests, save_profile
from pilotage.engine.serving import serve
from pilotage.world.llm import KvMemory, LLMServer, Profile, load_profile
from pilotage.world.servers import IterationLaw
from pilotage.world.spec import SpecError
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
