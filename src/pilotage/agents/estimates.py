"""Iteration times of a model on hardware that nobody here has, as NVIDIA's `aisimulate` estimates them.

`aisimulate` (ai-dynamo/aisimulate, Apache-2.0) estimates a forward pass from measured kernel times. It pins its own
versions of large packages, so it runs in a Python of its own, which is asked over a pipe.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Final

import numpy as np

from pilotage.agents.profiling import fit_regimes
from pilotage.world.llm import Profile
from pilotage.world.spec import SpecError

# batches: prefills, their tokens each, tokens of each that are in the cache, decodes, context of each
_CONTEXTS: Final = (256, 512, 1024, 2048, 4096)
_DECODES: Final = tuple(
    (0, 0, 0, n, k) for n in (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256) for k in _CONTEXTS
)
_PREFILLS: Final = tuple((n, p, 0, 0, 0) for n in (1, 2, 4) for p in (128, 256, 512, 1024, 2048))
_MIXED: Final = tuple(
    (1, p, cached, n, k)
    for p in (128, 256, 512, 1024, 2048)
    for cached in (0, 1024)
    for n in (1, 16, 64, 128)
    for k in (512, 1024, 2048)
)
GRID: Final = np.array(_DECODES + _PREFILLS + _MIXED)

# runs in the other Python: the question on standard input, the answer on standard output
_ASKED: Final = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
from aisimulate_core.sdk.rust_engine_step import ForwardPassPerfModelConfig, RustForwardPassPerfModel
asked = json.load(sys.stdin)
model = RustForwardPassPerfModel.best_available(ForwardPassPerfModelConfig(worker_type="aggregated", **asked["config"]))
said = model.diagnostics()
if said["provenance"]["config"]["estimation_mode"] != "op_level":
    print(json.dumps({"error": str(said.get("last_warning"))}))
    sys.exit()
try:
    known = version("aisimulate")
except PackageNotFoundError:
    known = "of unknown version"
times = [
    model.estimate_forward_pass_time_ms({"scheduled_requests": {
        "num_prefill_requests": n, "sum_prefill_tokens": n * p, "sum_prefill_kv_tokens": n * cached,
        "num_decode_requests": d, "sum_decode_kv_tokens": d * k}})
    for n, p, cached, d, k in asked["grid"]
]
print(json.dumps({"ms": times, "backend": said["provenance"]["config"]["backend_version"], "version": known}))
"""


def estimated(
    model: str,
    hardware: str,
    *,
    backend: str = "vllm",
    tensor_parallel: int = 1,
    python: str = sys.executable,
) -> Profile:
    """The profile of a model (a name on Hugging Face) on a system (`h100_sxm`), fitted to aisimulate's estimates.

    `python` is the interpreter where aisimulate is installed. Raises SpecError if it is not there, or if it knows no
    kernel times of this model on this system. Its estimates are of forward passes: the engine's own time is not in.
    """
    config = {"model": model, "system": hardware, "backend": backend, "tp": tensor_parallel}
    asked = json.dumps({"config": config, "grid": GRID.tolist()})
    try:
        done = subprocess.run(  # noqa: S603  (the user's own interpreter)
            [python, "-c", _ASKED], input=asked, capture_output=True, text=True, timeout=600, check=False
        )
    except OSError as error:
        raise SpecError(f"python {python!r}: cannot be run: {error}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise SpecError(
            f"aisimulate in {python!r} failed: {last}; valid: a Python with `pip install --pre aisimulate`"
        )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    where = f"{model} on {hardware} with {backend}, tensor parallel {tensor_parallel}"
    if "error" in found or None in found["ms"]:
        why = found.get("error", "some batches have no estimate")
        raise SpecError(f"aisimulate has no kernel times of {where}: {why}")
    n, tokens, cached, decodes, context = GRID.T
    batches = np.column_stack([n * tokens, decodes, n * cached + decodes * context, n * tokens**2])
    law, errors = fit_regimes(batches.astype(float), np.array(found["ms"]) / 1e3)
    return Profile(
        model=model,
        hardware=hardware,
        tensor_parallel=tensor_parallel,
        engine=f"{backend} {found['backend']}",
        law=law,
        errors=errors,
        source=f"aisimulate {found['version']} (ai-dynamo/aisimulate), its estimates of {len(GRID)} batches",
        caveat="forward passes only: the engine's own time per iteration is not in base_s",
    )
