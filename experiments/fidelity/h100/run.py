"""The iteration law against iterations that were timed on a real H100 (`measure.py`).

`run.py --measured DIR` reads DIR/iterations.csv, fits the law to the batches of the grid and judges it on those drawn
at random, which it has not seen: decodes alone, chunks of prompts alone, and both. Beside it stand two wider laws:
other coefficients for iterations without a prefill (`IterationLaw.decode`), and the sixth term (`cross_s`), for the
attention of a chunk to what came before it. Writes `table.csv`, `acceptance.csv`, and the law of six terms as a
profile, `llama-3.1-8b-h100.toml`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from pilotage.agents.profiling import errors, fit_iterations, save_profile
from pilotage.results import as_csv, provenance, write_whole
from pilotage.world.llm import KvMemory, Profile
from pilotage.world.servers import IterationLaw

HOME = Path(__file__).parents[3] / "results" / "fidelity" / "h100"
GIB = 2**30
MEMORY = KvMemory(gpu_gib=79.2, weights_gib=8.03e9 * 2 / GIB, kv_bytes_per_token=131_072)


def seconds(law: IterationLaw, batches: np.ndarray) -> np.ndarray:
    return np.array([law.seconds(*row) for row in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: the measurements lie in the results")
    parser.add_argument("--measured", type=Path, default=HOME, help="folder that measure.py wrote")
    parser.add_argument("--out", type=Path, default=Path("results/fidelity/h100"))
    parser.add_argument("--seed", type=int, default=0, help="not needed: nothing here is drawn")
    parser.add_argument("--quick", action="store_true", help="the same: it takes a second")
    options = parser.parse_args()
    started, began = datetime.now(UTC), time.perf_counter()
    table = pd.read_csv(options.measured / "iterations.csv")
    gpu = json.loads((options.measured / "gpu.json").read_text())
    names = ("prefill_tokens", "before_tokens", "decodes", "context_tokens")
    prefill, before, decodes, context = (table[name].to_numpy(float) for name in names)
    batches = np.column_stack([prefill, decodes, before + decodes * context, prefill**2])
    y, fitted, alone = table["seconds"].to_numpy(), (table["set"] == "grid").to_numpy(), prefill == 0
    wider = np.column_stack([batches, prefill * before])
    law, _ = fit_iterations(batches[fitted], y[fitted])
    of_six, _ = fit_iterations(wider[fitted], y[fitted])
    of_prefills, _ = fit_iterations(batches[fitted & ~alone], y[fitted & ~alone])
    of_decodes, _ = fit_iterations(batches[fitted & alone], y[fitted & alone])
    laws = {
        "five terms": seconds(law, batches),
        "five terms, others without a prefill": np.where(
            alone, seconds(of_decodes, batches), seconds(of_prefills, batches)
        ),
        "six terms": seconds(of_six, wider),
    }
    kinds = {
        "all": np.ones(len(y), bool),
        "decodes": alone,
        "chunks of prompts": decodes == 0,
        "both": (prefill > 0) & (decodes > 0),
        "chunks that begin a prompt": ~alone & (before == 0),
        "chunks after others": ~alone & (before > 0),
    }
    rows = [
        {"law": name, "batches": kind, "drawn": int((mask & ~fitted).sum())}
        | {k: f"{v:.4f}" for k, v in errors(found[mask & ~fitted], y[mask & ~fitted]).items()}
        | {"bias": f"{np.mean(found[mask & ~fitted] / y[mask & ~fitted]) - 1:+.4f}"}
        for name, found in laws.items()
        for kind, mask in kinds.items()
    ]
    lines = [
        {
            "line": f"{row['law']}, {row['batches']}: median relative error on batches not fitted", "asked": "stated",
            "measured": row["p50"], "low": "", "high": row["p95"], "met": True,
        }
        for row in rows
        if row["batches"] in ("all", "decodes", "chunks of prompts", "both")
    ]  # fmt: skip
    for row in rows:
        print(row)
    found = errors(laws["six terms"][~fitted], y[~fitted])
    profile = Profile(
        model="Llama-3.1-8B shapes, 16 bit",
        hardware=gpu["gpu"],
        engine=f"PyTorch {gpu['torch']}, one CUDA graph per iteration",
        law=of_six,
        memory=MEMORY,
        errors=found,
        source="measured by experiments/fidelity/h100/measure.py; errors on batches not fitted",
        caveat="packed tokens, caches of one length per batch; scheduling and sampling are not in the times",
    )
    save_profile(profile, options.out / "llama-3.1-8b-h100.toml")
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(lines))
    record = provenance("fidelity/h100", sys.argv, started, {"all": round(time.perf_counter() - began, 1)})
    write_whole(options.out / "run.json", json.dumps(record | {"gpu": gpu}, indent=1) + "\n")


if __name__ == "__main__":
    main()
