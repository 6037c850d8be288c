"""The LLM engine against Vidur: bit for bit under the same law, and close to its random forest after one fit.

`run.py --data DIR --out DIR` reads the request-level reference in DIR/llm-reference (made with microsoft/vidur; set-up
in the reference's names and in CASES). Cases `*.analytical.csv.gz` were served under the five-term law LAW and must be
equal in every bit: time to first token, end-to-end latency, restarts. Cases `*.randomforest.csv.gz` were served under
Vidur's own predictor; the five terms are fitted once, on the first half of the requests of the vLLM run, and
percentiles are compared on both runs, of which the Sarathi run was not seen at all. The coefficients that a fit to
Vidur's iterations gives (LAW) are shown beside it. Any further case in the folder is read, too, if its name begins like
a known one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from pilotage.agents.profiling import TERMS, fit_requests, save_profile
from pilotage.engine.serving import Served, serve
from pilotage.results import as_csv, provenance, write_whole
from pilotage.world.llm import LLMServer, Profile
from pilotage.world.servers import IterationLaw
from pilotage.world.tokens import Requests

# relative least squares on Vidur's pooled iterations at 0.8 and 1.0 requests/s: Llama-2-70B, FP16, two A100 80 GB
LAW = IterationLaw(
    base_s=0.05355068894954333,
    prefill_s=0.00027417271363358445,
    sequence_s=0.0003009996818336978,
    context_s=7.19132184572144e-08,
    square_s=4.3106225688973725e-08,
)
# from nothing but orders of magnitude: where the fit to requests starts
START = IterationLaw(base_s=0.02, prefill_s=1e-4, sequence_s=1e-4, context_s=1e-7, square_s=1e-8)
CASES = {
    "vllm-uniform": LLMServer(scheduler="prefill-first", kv_blocks=3328, max_tokens=4096, vidur=True),
    "sarathi-uniform": LLMServer(scheduler="chunked", kv_blocks=3328, chunk_tokens=512, vidur=True),
    "vllm-restart": LLMServer(scheduler="prefill-first", kv_blocks=400, max_tokens=4096, vidur=True),
    "sarathi-restart": LLMServer(scheduler="chunked", kv_blocks=400, chunk_tokens=512, vidur=True),
    "vllm-caps": LLMServer(
        scheduler="prefill-first", kv_blocks=400, max_batch=8, max_tokens=2048, vidur=True
    ),
}
FITTED_ON = "vllm-uniform"
PERCENTILES = (50, 95, 99)


def read(path: Path) -> tuple[Requests, pd.DataFrame]:
    table = pd.read_csv(path)
    return Requests(*(table[c].to_numpy() for c in ("arrival_s", "prompt_tokens", "output_tokens"))), table


def percentile_errors(found: Served, table: pd.DataFrame) -> dict[str, float]:
    """Relative error of every percentile of TTFT, TPOT and E2EL."""
    ttft, e2el, n = (table[c].to_numpy() for c in ("ttft_s", "e2e_s", "output_tokens"))
    tpot = (e2el - ttft)[n > 1] / (n - 1)[n > 1]
    pairs = {"ttft": (found.ttft_s, ttft), "tpot": (found.tpot_s[n > 1], tpot), "e2el": (found.e2el_s, e2el)}
    return {
        f"{name}_p{p}": float(np.percentile(ours, p) / np.percentile(theirs, p) - 1)
        for name, (ours, theirs) in pairs.items()
        for p in PERCENTILES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PILOTAGE_DATA"))
    parser.add_argument("--out", type=Path, default=Path("results/fidelity/vidur"))
    parser.add_argument("--seed", type=int, default=0, help="not needed: nothing here is drawn")
    parser.add_argument("--quick", action="store_true", help="a coarser fit")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("error: no data; give --data DIR or PILOTAGE_DATA, the folder that holds llm-reference")
    folder = Path(options.data) / "llm-reference"
    files = sorted(folder.glob("*.csv.gz"))
    if not files:
        sys.exit(f"error: {folder} holds no *.csv.gz; give --data the folder that holds llm-reference")
    started, began = datetime.now(UTC), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, lines = [], []

    def line(what: str, asked: str, measured: float, met: bool) -> None:
        measured_text = f"{measured:.4g}"
        lines.append(
            {"line": what, "asked": asked, "measured": measured_text, "low": "", "high": "", "met": met}
        )
        print(f"{'met ' if met else 'MISS'} {what}: asked {asked}, measured {measured_text}", flush=True)

    for path in files:
        kind, stem = path.name.split(".")[-3], path.name.rsplit(".", 3)[0]
        server = next((s for name, s in CASES.items() if stem.startswith(name)), None)
        if kind != "analytical" or server is None:
            continue
        requests, table = read(path)
        found = serve(server, LAW, requests)
        largest = float(
            max(np.abs(found.ttft_s - table.ttft_s).max(), np.abs(found.e2el_s - table.e2e_s).max())
        )
        same = np.array_equal(found.restarts, table.n_restarts)
        rows.append(
            {
                "case": stem, "reference": "same law", "requests": len(requests), "law": "given",
                "iterations": found.iterations, "restarts": int(found.restarts.sum()), "largest_difference_s": largest,
            }
        )  # fmt: skip
        line(f"{stem}: largest difference of any TTFT or E2EL, s", "0", largest, largest == 0.0 and same)

    forests = {
        name: read(path)
        for path in files
        if path.name.endswith(".randomforest.csv.gz")
        for name in CASES
        if path.name.startswith(name)
    }
    kept: dict[str, float] = {}
    if FITTED_ON in forests:
        requests, table = forests[FITTED_ON]
        half = np.arange(len(requests)) < len(requests) // 2
        fitted = fit_requests(
            CASES[FITTED_ON], requests, table.ttft_s.to_numpy(), table.e2e_s.to_numpy(), START,
            used=half, evaluations=8 if options.quick else 60,
        )  # fmt: skip
        print({name: f"{value:.6g}" for name, value in zip(TERMS, fitted.vector, strict=True)}, flush=True)
        for name, (requests, table) in forests.items():
            for law, which in ((fitted, "fitted to requests"), (LAW, "fitted to iterations")):
                found = serve(CASES[name], law, requests)
                off = percentile_errors(found, table)
                if law is LAW and name == FITTED_ON:
                    kept = off
                rows.append(
                    {
                        "case": name, "reference": "random forest", "requests": len(requests), "law": which,
                        "iterations": found.iterations, "restarts": int(found.restarts.sum()),
                        "per_request_e2el_mape": f"{np.abs(found.e2el_s / table.e2e_s - 1).mean():.4f}",
                        **{key: f"{value:+.4f}" for key, value in off.items()},
                    }
                )  # fmt: skip
                worst = max(off.values(), key=abs)
                seen = " (held out)" if name != FITTED_ON else ""
                line(
                    f"{name}{seen}, law {which}: worst error of p50, p95, p99 of TTFT, TPOT, E2EL",
                    "within 0.05", worst, abs(worst) <= 0.05,
                )  # fmt: skip
        rows.append(
            {"case": "coefficients", "law": " ".join(f"{n}={v:.8g}" for n, v in zip(TERMS, fitted.vector, strict=True))}
        )  # fmt: skip
    profile = Profile(
        model="Llama-2-70B", hardware="A100 80 GB", tensor_parallel=2, engine="vidur (random forest)", law=LAW,
        source="microsoft/vidur (MIT): relative least squares on 26,468 iterations of its own predictor, elsewhere",
        errors={f"{key}_error": round(abs(value), 4) for key, value in kept.items()},
    )  # fmt: skip
    save_profile(profile, options.out / "profile-a100x2.toml")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_whole(
        options.out / "table.csv", as_csv([{key: row.get(key, "") for key in columns} for row in rows])
    )
    write_whole(options.out / "acceptance.csv", as_csv(lines))
    record = provenance(
        "fidelity/vidur", sys.argv, started, {"all": round(time.perf_counter() - began, 1)}
    ) | {"cases": [p.name for p in files]}
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
