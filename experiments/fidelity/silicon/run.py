"""The terms of the iteration law on measured TTFT and TPOT of 13 models on six GPUs, leaving one combination out.

`run.py --data DIR --out DIR` reads DIR/profiles/aiconfigurator_silicon_dev.csv.gz (ai-dynamo/aiconfigurator): mean TTFT
and TPOT at a steady number of clients, aggregated serving. A time is a sum of what the five terms are made of (a
constant, reading the weights, arithmetic per sequence and per prompt token, reading the KV cache), each from public
facts about model (MODELS) and GPU (GPUS), times an efficiency that is fitted; and a factor of the backend. Efficiencies
are fitted (in logarithms, robustly) to all combinations of model, GPU and backend but one, which is then predicted, and
to tell the law's own error from that of carrying it over, to each combination by itself.
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
from scipy.optimize import least_squares

from pilotage.results import as_csv, provenance, write_whole

# parameters, those active per token, bytes of KV cache per token (16 bit), experts, experts per token: model cards
_LLAMA_8B = (8.03e9, 8.03e9, 131_072, 0, 0)
_QWEN_32B = (32.8e9, 32.8e9, 262_144, 0, 0)
_DEEPSEEK = (671e9, 37e9, 70_272, 256, 8)
MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "nvidia/Llama-3.1-8B-Instruct-FP8": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": (70.6e9, 70.6e9, 327_680, 0, 0),
    "Qwen/Qwen3-32B": _QWEN_32B,
    "nvidia/Qwen3-32B-NVFP4": _QWEN_32B,
    "Qwen/Qwen3-235B-A22B-FP8": (235e9, 22e9, 192_512, 128, 8),
    "Qwen/Qwen3.5-397B-A17B": (397e9, 17e9, 30_720, 512, 10),
    "deepseek-ai/DeepSeek-R1": _DEEPSEEK,
    "deepseek-ai/DeepSeek-V3": _DEEPSEEK,
    "nvidia/DeepSeek-R1-NVFP4": _DEEPSEEK,
    "nvidia/DeepSeek-V3.1-NVFP4": _DEEPSEEK,
    "moonshotai/Kimi-K2.5": (1040e9, 32e9, 70_272, 384, 8),
    "zhipuai/GLM-5": (744e9, 40e9, 89_856, 256, 8),
}
# bytes/s of memory, dense 16-bit operations/s: data sheets
GPUS = {
    "h100_sxm": (3.35e12, 989e12),
    "h200_sxm": (4.8e12, 989e12),
    "b200_sxm": (8e12, 2250e12),
    "b300_sxm": (8e12, 2250e12),
    "gb200": (8e12, 2500e12),
    "gb300": (8e12, 2500e12),
}
BYTES = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5, "int4": 0.5}
FASTER = {"bf16": 1.0, "fp8": 2.0, "fp4": 4.0, "int4": 1.0}
BACKENDS = ("vllm", "sglang", "trtllm")


def read(path: Path) -> pd.DataFrame:
    """Complete rows of aggregated serving."""
    table = pd.read_csv(path)
    table = table[table["mode"] == "agg"]
    needed = ["isl", "osl", "concurrency", "silicon_ttft_ms", "silicon_tpot_ms"]
    table = table[table[needed].notna().all(axis=1)].reset_index(drop=True)
    unknown = (
        set(table.model_path) - set(MODELS)
        | set(table.system) - set(GPUS)
        | set(table.backend) - set(BACKENDS)
    )
    if unknown:
        sys.exit(f"error: {path.name} has {', '.join(sorted(unknown))}, of which nothing is known here")
    return table


def terms(t: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Seconds that each term of TPOT and of TTFT would take at full efficiency, both of shape (rows, terms)."""
    parameters, active, kv, experts, chosen = (
        np.array([MODELS[m][j] for m in t.model_path], float) for j in range(5)
    )
    quantised = t.gemm_quant_mode.fillna("").map(
        lambda q: "fp8" if "fp8" in q else "fp4" if "fp4" in q else "bf16"
    )
    precision = t.precision.where(t.precision.notna(), quantised)
    split = {c: t[c].fillna(1).replace(0, 1).to_numpy() for c in t.columns if c.endswith("_size")}
    gpus = np.maximum.reduce(
        [
            split["tp_size"] * split["pp_size"],
            split["attention_dp_size"],
            split["moe_tp_size"] * split["moe_ep_size"],
        ]
    )
    memory = gpus * np.array([GPUS[s][0] for s in t.system])
    compute = gpus * np.array([GPUS[s][1] for s in t.system]) * precision.map(FASTER).to_numpy()
    n, isl, osl = (t[c].to_numpy(float) for c in ("concurrency", "isl", "osl"))
    idle = np.where(
        experts > 0, (1 - chosen / np.maximum(experts, 1)) ** n, 0.0
    )  # share of experts nobody wants
    weights = precision.map(BYTES).to_numpy() * (active + (parameters - active) * (1 - idle)) / memory
    per_token, one = 2 * active / compute, np.ones(len(t))
    split_up = 1e-3 * (gpus > 1)
    tpot = [
        1e-3 * one,
        weights,
        n * per_token,
        n * (isl + osl / 2) * kv / memory,
        n * isl / osl * per_token,
        1e-5 * n,
        split_up,
    ]
    ttft = [
        1e-2 * one,
        weights,
        isl * per_token,
        np.sqrt(n) * isl * per_token,
        n * isl * per_token,
        1e-4 * n,
        10 * split_up,
    ]
    return np.column_stack(tpot), np.column_stack(ttft)


def fit(x: np.ndarray, backend: np.ndarray, y: np.ndarray, shared: bool) -> np.ndarray:
    """Logarithms of the terms' factors, then of the backends' (0 if not `shared`)."""

    def residuals(p: np.ndarray) -> np.ndarray:
        off = np.log(x @ np.exp(p[: x.shape[1]])) - np.log(y)
        if shared:
            off = off + (p[x.shape[1] :])[backend]
        return np.r_[off, 0.02 * p]

    start = np.r_[np.full(x.shape[1], 0.5), np.zeros(len(BACKENDS))]
    best: np.ndarray = least_squares(
        residuals, start, loss="soft_l1", f_scale=0.2, bounds=(-12, 6), max_nfev=60
    ).x
    return best


def predict(p: np.ndarray, x: np.ndarray, backend: np.ndarray, shared: bool) -> np.ndarray:
    seconds: np.ndarray = x @ np.exp(p[: x.shape[1]])
    return seconds * np.exp(p[x.shape[1] :])[backend] if shared else seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PILOTAGE_DATA"))
    parser.add_argument("--out", type=Path, default=Path("results/fidelity/silicon"))
    parser.add_argument("--seed", type=int, default=0, help="not needed: nothing here is drawn")
    parser.add_argument("--quick", action="store_true", help="leave out only every fifth combination")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("error: no data; give --data DIR or PILOTAGE_DATA, the folder that holds profiles")
    started, began = datetime.now(UTC), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    table = read(Path(options.data) / "profiles" / "aiconfigurator_silicon_dev.csv.gz")
    group = (table.model_path + " | " + table.system + " | " + table.backend).to_numpy()
    backend = np.array([BACKENDS.index(b) for b in table.backend])
    x_of = dict(zip(("tpot", "ttft"), terms(table), strict=True))
    chosen = np.unique(group)[:: 5 if options.quick else 1]
    rows, lines = [], []
    for metric, x in x_of.items():
        y = table[f"silicon_{metric}_ms"].to_numpy() / 1e3
        own, left_out = np.full(len(y), np.nan), np.full(len(y), np.nan)
        for name in chosen:
            here = group == name
            others = fit(x[~here], backend[~here], y[~here], True)
            left_out[here] = predict(others, x[here], backend[here], True)
            if here.sum() >= 12:
                mine = fit(x[here], backend[here], y[here], False)
                own[here] = predict(mine, x[here], backend[here], False)
            relative = [np.abs(found[here] / y[here] - 1) for found in (own, left_out)]
            rows.append(
                {
                    "combination": name, "metric": metric, "rows": int(here.sum()),
                    **{
                        f"{which}_p{p}": f"{np.percentile(r, p):.4f}"
                        for which, r in zip(("own", "left_out"), relative, strict=True)
                        for p in (50, 95)
                    },
                    "left_out_bias": f"{np.median(left_out[here] / y[here] - 1):+.4f}",
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
        for which, found in (("by itself", own), ("left out", left_out)):
            relative = np.abs(found / y - 1)[~np.isnan(found)]
            low, high = np.percentile(relative, [25, 75])
            p50, p90, p95 = np.percentile(relative, [50, 90, 95])
            lines.append(
                {
                    "line": f"{metric}, combination {which}: median relative error (p90 {p90:.3f}, p95 {p95:.3f})",
                    "asked": "stated", "measured": f"{p50:.4f}", "low": f"{low:.4f}", "high": f"{high:.4f}",
                    "met": True,
                }
            )  # fmt: skip
            print(lines[-1], flush=True)
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(lines))
    record = provenance("fidelity/silicon", sys.argv, started, {"all": round(time.perf_counter() - began, 1)})
    write_whole(options.out / "run.json", json.dumps(record | {"rows": len(table)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
