"""Fits the LLM profiles that come with the package, and says how well the law fits what each was fitted to.

`run.py --data DIR --out DIR [--aisimulate PYTHON]` writes `profiles.json` (which the package holds as
`pilotage/world/profiles.json`) and a table of errors. Five sources, most of them fitted by relative least squares with
a law of its own for iterations that only decode:

- splitwise_llm_perf: measured times of prompts and of tokens by batch size (Mutinifni/splitwise-sim), for every model,
  GPU and tensor parallelism; the error is that of each time;
- aiconfigurator_silicon_dev: measured mean TTFT and TPOT at a steady number of clients (ai-dynamo/aiconfigurator), for
  every model, GPU, backend and division with enough rows; one law for both, in which decodes wait for the prompts of
  the others; the error is that of TPOT;
- results/fidelity/h100: iterations timed on a real H100, with the sixth term; the error is that of batches left out;
- results/fidelity/vllm: requests measured on a running vLLM; the error is that of E2EL on requests left out of the fit;
- NVIDIA's aisimulate, where a Python that has it is named; otherwise its profiles are kept as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from scipy.optimize import nnls

from pilotage.agents.estimates import estimated
from pilotage.agents.profiling import errors, fit_regimes
from pilotage.results import as_csv, provenance, write_whole
from pilotage.world.llm import Profile, load_profile, shipped_profiles
from pilotage.world.servers import IterationLaw
from pilotage.world.spec import SpecError

ROWS = 24  # of a combination of the tables
FAILS = 0.3  # 95th percentile of the relative error from which a profile says that the law fails
DIVISION = ["tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size"]
ESTIMATED = (  # model, system, backend, tensor parallelism
    ("meta-llama/Meta-Llama-3.1-8B", "h100_sxm", "vllm", 1),
    ("meta-llama/Meta-Llama-3.1-8B", "a100_sxm", "vllm", 1),
    ("meta-llama/Meta-Llama-3.1-8B", "l40s", "vllm", 1),
    ("meta-llama/Meta-Llama-3.1-70B", "h100_sxm", "vllm", 4),
    ("meta-llama/Meta-Llama-3.1-70B", "a100_sxm", "vllm", 4),
    ("meta-llama/Meta-Llama-3.1-70B", "h200_sxm", "vllm", 4),
    ("Qwen/Qwen3-32B-FP8", "h200_sxm", "vllm", 1),
    ("Qwen/Qwen3-32B-FP8", "b200_sxm", "vllm", 1),
)


def name_of(model: str, hardware: str, split: str, engine: str) -> str:
    return "-".join((model.split("/")[-1], hardware, split, engine)).lower().replace("_", "-")


def from_splitwise(data: Path) -> dict[str, Profile]:
    table = pd.read_csv(data / "profiles/splitwise_llm_perf.csv.gz")
    found = {}
    for (model, hardware, tp), t in table.groupby(["model", "hardware", "tensor_parallel"]):
        n, prompt, output = (t[c].to_numpy(float) for c in ("batch_size", "prompt_size", "token_size"))
        none = np.zeros(len(t))
        prefills = np.column_stack([n * prompt, none, none, n * prompt**2])
        decodes = np.column_stack([none, n, n * (prompt + output / 2), none])
        seconds = np.r_[t["prompt_time"], t["token_time"]] / 1e3
        law, off = fit_regimes(np.vstack([prefills, decodes]), seconds)
        found[name_of(str(model), str(hardware), f"tp{tp}", "splitwise")] = Profile(
            model=str(model), hardware=str(hardware), tensor_parallel=int(tp), engine="vLLM as measured for Splitwise",
            law=law, errors=off, source="Mutinifni/splitwise-sim data/perf_model.csv (MIT), measured",
            caveat="no batch that prefills and decodes was measured: there the terms are added",
        )  # fmt: skip
    return found


def from_tables(data: Path) -> dict[str, Profile]:
    table = pd.read_csv(data / "profiles/aiconfigurator_silicon_dev.csv.gz")
    needed = ["isl", "osl", "concurrency", "silicon_ttft_ms", "silicon_tpot_ms"]
    table = table[(table["mode"] == "agg") & table[needed].notna().all(axis=1)]
    found = {}
    for key, t in table.groupby(["model_path", "system", "backend", "precision", *DIVISION], dropna=False):
        model, system, backend, precision, tp, pp, dp, *experts = key
        if len(t) < ROWS or pp > 1 or (dp == dp and dp > 1):
            continue
        law, off = tabled(t)
        gpus = int(max(tp, np.nanprod(experts)))
        said = precision != precision or str(model).lower().endswith(precision)
        kind = "" if said else f"-{precision}"
        caveat = "fitted to mean TPOT at a steady number of clients, and to TTFT where there was one client"
        if np.nanprod(experts) > 1:
            caveat += "; the larger a batch, the more experts are read, which the law does not have"
        found[name_of(f"{model}{kind}", str(system), f"gpus{gpus}-tp{tp:.0f}", str(backend))] = Profile(
            model=str(model), hardware=str(system), tensor_parallel=int(tp), engine=str(backend), law=law, errors=off,
            source=f"ai-dynamo/aiconfigurator silicon_sample.csv (Apache-2.0), {len(t)} measured rows, {gpus} GPUs",
            caveat=caveat,
        )  # fmt: skip
    return found


def tabled(t: pd.DataFrame) -> tuple[IterationLaw, dict[str, float]]:
    """The law of a combination's means: while a request decodes, every other is prefilled once per output."""
    n, isl, osl = (t[c].to_numpy(float) for c in ("concurrency", "isl", "osl"))
    ttft, tpot = (t[f"silicon_{what}_ms"].to_numpy(float) / 1e3 for what in ("ttft", "tpot"))
    one = np.ones(len(t))
    of_tpot = np.column_stack([one, n * isl / osl, n, n * (isl + osl / 2), n * isl**2 / osl])
    of_ttft = np.column_stack([one, isl, 0 * one, 0 * one, isl**2])
    alone = n == n.min()
    x = np.vstack([of_tpot / tpot[:, None], of_ttft[alone] / ttft[alone, None]])
    scale = np.maximum(np.abs(x).max(axis=0), 1e-300)
    base, prefill, sequence, context, square = (nnls(x / scale, np.ones(len(x)))[0] / scale).tolist()
    law = IterationLaw(
        base_s=base, prefill_s=prefill, sequence_s=sequence, context_s=context, square_s=square
    )
    return law, errors(of_tpot @ np.array(law.vector[:5]), tpot)


def from_requests(results: Path) -> dict[str, Profile]:
    found = {}
    rows = pd.read_csv(results / "fidelity/vllm/table.csv")
    for _, r in rows[(rows["part"] == "held out") & (rows["metric"] == "e2el")].iterrows():
        law = IterationLaw(
            **{c: float(r[c]) for c in ("base_s", "prefill_s", "sequence_s", "context_s", "square_s")}
        )
        found[name_of("Llama-3.1-8B", r["device"], "tp1", "vllm")] = Profile(
            model="meta-llama/Llama-3.1-8B", hardware=str(r["device"]), engine="vllm 0.19", law=law,
            errors={k: float(r[k]) for k in ("mape", "p50", "p95", "max")},
            source="casys-kaist/LLMServingSim bench/examples (MIT): requests measured on vLLM; results/fidelity/vllm",
            caveat="fitted at one rate, 10 requests/s in overload",
        )  # fmt: skip
    return found


def from_iterations(results: Path) -> dict[str, Profile]:
    profile = load_profile(results / "fidelity/h100/llama-3.1-8b-h100.toml")
    return {name_of("Llama-3.1-8B", "h100-sxm", "tp1", "pytorch"): profile}


def from_aisimulate(python: str) -> dict[str, Profile]:
    found = {}
    for model, system, backend, tp in ESTIMATED:
        try:
            found[name_of(model, system, f"tp{tp}", f"{backend}-estimated")] = estimated(
                model, system, backend=backend, tensor_parallel=tp, python=python
            )
        except SpecError as error:
            print(f"left out: {error}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PILOTAGE_DATA"))
    parser.add_argument("--out", type=Path, default=Path("results/llm_profiles"))
    parser.add_argument("--seed", type=int, default=0, help="not needed: nothing here is drawn")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where fidelity is")
    parser.add_argument("--aisimulate", default="", help="a Python that has aisimulate")
    parser.add_argument("--quick", action="store_true", help="not needed: it takes seconds")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("error: no data; give --data DIR or PILOTAGE_DATA, the folder that holds profiles")
    started, began = datetime.now(UTC), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    data = Path(options.data)
    if options.aisimulate:
        theirs = from_aisimulate(options.aisimulate)
    else:
        theirs = {k: p for k, p in shipped_profiles().items() if p.source.startswith("aisimulate")}
    parts = {
        "times of batches": from_splitwise(data),
        "tables of means": from_tables(data),
        "timed iterations": from_iterations(options.results),
        "measured requests": from_requests(options.results),
        "aisimulate": theirs,
    }
    for profiles in parts.values():
        for name, p in profiles.items():
            if p.errors["p95"] > FAILS:
                failing = f"the law fails in places: one time in twenty is more than {FAILS:.0%} off"
                profiles[name] = p.replace(caveat=f"{p.caveat}; {failing}")
    rows: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for source, profiles in parts.items():
        for name, p in profiles.items():
            rows.append(
                {"profile": name, "source": source, **{k: f"{p.errors[k]:.4f}" for k in ("mape", "p50", "p95", "max")}}
            )  # fmt: skip
        if not profiles:
            continue
        low, middle, high = np.percentile([p.errors["mape"] for p in profiles.values()], [2.5, 50, 97.5])
        lines.append(
            {"line": f"mean relative error of the law, median of {len(profiles)} profiles from {source}",
             "asked": "stated", "measured": f"{middle:.4f}", "low": f"{low:.4f}", "high": f"{high:.4f}", "met": True}
        )  # fmt: skip
    for row in (*rows, *lines):
        print(row)
    kept = {name: p for profiles in parts.values() for name, p in sorted(profiles.items())}
    text = msgspec.json.format(msgspec.json.encode(_short(kept)), indent=1).decode()
    write_whole(options.out / "profiles.json", text + "\n")
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(lines))
    record = provenance("llm_profiles", sys.argv, started, {"all": round(time.perf_counter() - began, 1)})
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


def _short(profiles: dict[str, Profile]) -> dict[str, Any]:
    """Six digits of every number, and nothing that is not said."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            unsaid = {"noise_cv": 0.0, "cross_s": 0.0}
            return {k: short(v) for k, v in value.items() if v is not None and unsaid.get(k) != v}
        return float(f"{value:.6g}") if isinstance(value, float) else value

    plain: dict[str, Any] = short(msgspec.to_builtins(profiles))
    return plain


if __name__ == "__main__":
    main()
