"""The LLM engine against real vLLM: fitted on the first part of a measured run, it predicts the rest.

`run.py --data DIR --out DIR` reads DIR/profiles/vllm_measured_requests_llama8b.csv.gz: 300 requests each on an RTX 4090
and an RTX PRO 6000, Llama-3.1-8B, vLLM 0.19, 10 requests/s, overloaded, measured by casys-kaist/LLMServingSim. Per
device the five terms of the iteration law are fitted to TTFT and E2EL of the first `--share` of the requests; then all
requests are served, and errors are those of the requests that the fit did not see. How many KV blocks the RTX 4090 has
is read off the measured cache usage while the first part arrived; those of the RTX PRO 6000 follow from its memory.
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

from pilotage.agents.profiling import TERMS, errors, fit_requests, save_profile
from pilotage.engine.serving import serve
from pilotage.results import as_csv, provenance, write_whole
from pilotage.world.llm import KvMemory, LLMServer, Profile
from pilotage.world.servers import IterationLaw
from pilotage.world.tokens import Requests

START = IterationLaw(base_s=0.01, prefill_s=5e-5, sequence_s=1e-5, context_s=1e-7, square_s=1e-10)
# 2 x 32 layers x 8 KV heads x 128 x 2 bytes; 8.03 billion parameters in BF16
MEMORY = {"RTXPRO6000": KvMemory(gpu_gib=95.0, weights_gib=15.0, reserve_gib=2.0, kv_bytes_per_token=131072)}
PUBLISHED = {
    "ttft": 0.176,
    "e2el": 0.067,
}  # BLIS, median error on runs held out (inference-sim/inference-sim)


def tokens_at(table: pd.DataFrame, t: float) -> float:
    """KV tokens of the requests that were running at t, if they produce their tokens evenly."""
    on = table[(table.scheduled_s <= t) & (table.last_token_s > t)]
    share = ((t - on.first_token_s) / (on.last_token_s - on.first_token_s)).clip(0, 1)
    return float((on.input_tokens + share * on.output_tokens).sum())


def kv_blocks(table: pd.DataFrame, usage: pd.DataFrame, before_s: float) -> int:
    """KV blocks from the cache usage that vLLM reported while it was neither nearly empty nor full."""
    seen = usage[(usage.t <= before_s) & (usage.kv_cache_pct > 20) & (usage.kv_cache_pct < 90)]
    found = [100 * tokens_at(table, row.t) / row.kv_cache_pct / 16 for row in seen.itertuples()]
    return int(np.median(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("PILOTAGE_DATA"))
    parser.add_argument("--out", type=Path, default=Path("results/fidelity/vllm"))
    parser.add_argument("--seed", type=int, default=0, help="not needed: nothing here is drawn")
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the requests, the first, that are fitted"
    )
    parser.add_argument("--quick", action="store_true", help="a coarser fit")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("error: no data; give --data DIR or PILOTAGE_DATA, the folder that holds profiles")
    if not 0.1 <= options.share <= 0.9:
        sys.exit(f"error: --share {options.share}; valid: from 0.1 to 0.9")
    folder = Path(options.data) / "profiles"
    measured = pd.read_csv(folder / "vllm_measured_requests_llama8b.csv.gz")
    usage = pd.read_csv(folder / "vllm_measured_timeseries_llama8b.csv.gz")
    started, began = datetime.now(UTC), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    rows, lines, unseen = [], [], {"ttft": [], "e2el": []}
    for device, table in measured.groupby("device"):
        table = table.reset_index(drop=True)
        used = np.arange(len(table)) < int(options.share * len(table))
        requests = Requests(*(table[c].to_numpy() for c in ("arrival_s", "input_tokens", "output_tokens")))
        ttft, e2el = (table[c].to_numpy() - requests.arrival_s for c in ("first_token_s", "last_token_s"))
        cache = (
            {"memory": MEMORY[device]}
            if device in MEMORY
            else {
                "kv_blocks": kv_blocks(
                    table[used], usage[usage.device == device], requests.arrival_s[used][-1]
                )
            }
        )
        # vLLM's own: 2,048 tokens an iteration; both runs kept at most 128 sequences; no watermark since V1
        server = LLMServer(scheduler="chunked", chunk_tokens=2048, max_batch=128, watermark=0.0, **cache)
        law = fit_requests(
            server, requests, ttft, e2el, START, used=used, evaluations=8 if options.quick else 60
        )
        found = serve(server, law, requests)
        off = errors(found.e2el_s[~used], e2el[~used])
        profile = Profile(
            model="Llama-3.1-8B", hardware=device, engine="vllm 0.19", law=law, memory=server.memory,
            errors={f"e2el_{k}": round(v, 4) for k, v in off.items()},
            source="casys-kaist/LLMServingSim bench/examples (MIT); fitted to requests, errors on those held out",
            caveat="" if server.memory else f"{server.blocks} KV blocks of 16 tokens, read off the cache usage",
        )  # fmt: skip
        save_profile(profile, options.out / f"profile-{device.lower()}.toml")
        for part, mask in (("fitted", used), ("held out", ~used)):
            for metric, ours, theirs in (("ttft", found.ttft_s, ttft), ("e2el", found.e2el_s, e2el)):
                relative = np.abs(ours[mask] / theirs[mask] - 1)
                p99 = np.percentile(ours[mask], 99) / np.percentile(theirs[mask], 99) - 1
                rows.append(
                    {
                        "device": device, "requests": int(mask.sum()), "part": part, "metric": metric,
                        **{k: f"{v:.4f}" for k, v in errors(ours[mask], theirs[mask]).items()},
                        "p99_error": f"{np.percentile(relative, 99):.4f}", "of_p99": f"{p99:+.4f}",
                        "kv_blocks": server.blocks, "restarts": int(found.restarts[mask].sum()),
                        **{n: f"{v:.6g}" for n, v in zip(TERMS, law.vector, strict=True)},
                    }
                )  # fmt: skip
                if part == "held out":
                    unseen[metric].append(relative)
                print(rows[-1], flush=True)
    for metric, bar in PUBLISHED.items():
        pooled = np.concatenate(unseen[metric])
        median = float(np.median(pooled))
        picks = np.random.default_rng(0).integers(0, len(pooled), (2000, len(pooled)))
        low, high = np.percentile(np.median(pooled[picks], axis=1), [2.5, 97.5])
        lines.append(
            {
                "line": f"median relative error of {metric} on requests held out, both devices",
                "asked": f"< {bar}", "measured": f"{median:.4f}", "low": f"{low:.4f}", "high": f"{high:.4f}",
                "met": median < bar,
            }
        )  # fmt: skip
        print(lines[-1], flush=True)
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(lines))
    record = provenance("fidelity/vllm", sys.argv, started, {"all": round(time.perf_counter() - began, 1)})
    write_whole(options.out / "run.json", json.dumps(record | {"share": options.share}, indent=1) + "\n")


if __name__ == "__main__":
    main()
