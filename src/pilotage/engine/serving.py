"""One LLM service by itself, on a fixed number of replicas: requests in, latencies out.

In a fleet an LLM service meets other services, its replicas come and go, and a policy decides; here nothing but
serving happens. It is what fidelity and speed are measured on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pilotage.engine import llm
from pilotage.engine.llm_layout import (
    BUILD,
    DECODE,
    ENGINE,
    HANDED_OVER,
    PREFILL,
    PREFIX,
    READY,
    REJECTIONS,
    ROUTINGS,
    SCHEDULERS,
    SEQUENCE,
    SERVED,
    SERVER,
    UNIFIED,
    Fleet,
)
from pilotage.metrics import BUCKETS, is_good, quantiles_s, tpot_s
from pilotage.world.llm import LLMServer
from pilotage.world.servers import IterationLaw
from pilotage.world.spec import SpecError
from pilotage.world.tokens import Requests


def server_record(
    server: LLMServer, role: int = UNIFIED, *, concurrency: int = 0, stepwise: bool = False
) -> np.ndarray:
    """A server in numbers."""
    record = np.zeros((), SERVER)
    record["scheduler"], record["routing"] = SCHEDULERS[server.scheduler], ROUTINGS[server.routing]
    record["max_batch"], record["max_tokens"] = server.max_batch, server.max_tokens
    record["chunk"], record["block_tokens"] = server.chunk_tokens, server.block_tokens
    reused = 0 if role == DECODE else server.prefix_block_tokens or 0
    record["span"] = reused // server.block_tokens
    record["vidur"], record["role"] = server.vidur, role
    record["concurrency"], record["stepwise"] = concurrency, stepwise
    record["ttft_s"], record["tpot_s"], record["e2el_s"] = server.objectives.seconds
    record["overlap"] = server.overlap_weight
    return record


def build_record(server: LLMServer, law: IterationLaw) -> np.ndarray:
    """What a replica is like where the law holds."""
    record = np.zeros((), BUILD)
    record["law"], record["decode_law"] = law.vector, (law.decode or law).vector
    record["kv_blocks"] = law.kv_blocks or server.blocks
    record["watermark"] = int(server.watermark * record["kv_blocks"])
    return record


def engine_record(server: LLMServer, law: IterationLaw) -> np.ndarray:
    """A replica that has done nothing yet."""
    record, build = np.zeros((), ENGINE), build_record(server, law)
    for name in ("law", "decode_law", "kv_blocks", "watermark"):
        record[name] = build[name]
    record["free"], record["pace"] = build["kv_blocks"], 1.0
    record["oldest"], record["newest"], record["stamp"] = -1, -1, -1
    return record


def sequence_records(requests: Requests, ids: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Requests in numbers, the ids of their prefix blocks counted from 0, and how many different ones there are."""
    out = np.zeros(len(requests), SEQUENCE)
    out["arrival_s"] = out["here_s"] = requests.arrival_s
    out["first_s"] = out["last_s"] = np.nan
    out["prompt"] = out["target"] = requests.prompt_tokens
    out["total"] = requests.prompt_tokens + requests.output_tokens
    out["blocks"] = out["replica"] = -1
    if not ids or requests.prefix_ids is None or requests.prefix_lo is None:
        return out, np.zeros(0, np.int32), 0
    known, numbers = np.unique(requests.prefix_ids, return_inverse=True)
    out["id_lo"] = out["hold_lo"] = requests.prefix_lo[:-1]
    out["ids"] = np.diff(requests.prefix_lo)
    return out, numbers.astype(np.int32), len(known)


def new_fleet(
    server: np.ndarray, engines: np.ndarray, sequences: np.ndarray, ids: np.ndarray, distinct: int
) -> Fleet:
    """The arrays of one LLM service whose engines all get requests."""
    n, batch = len(engines), int(server["max_batch"])
    cache = np.zeros((n, distinct), PREFIX)
    cache["holders"] = -1
    desk = np.zeros(8, np.int64)
    desk[READY] = n
    return Fleet(
        server=server[()],
        sequences=sequences,
        engines=engines,
        running=np.zeros((n, batch), np.int32),
        batch=np.zeros((n, batch), np.int32),
        scheduled=np.zeros((n, batch), np.int32),
        aside=np.zeros(max(batch, int(server["block_tokens"]) + 1), np.int32),
        ids=ids,
        holds=np.zeros(len(ids), np.uint8),
        cache=cache,
        itl=np.zeros(BUCKETS, np.int64),
        ready=np.arange(n),
        done=np.zeros(len(sequences), np.int32),
        desk=desk,
    )


@dataclass(frozen=True)
class Served:
    """What became of requests, in their order; times are NaN for those that were rejected.

    `ttft_s`, `e2el_s`, `tpot_s` have shape (n,), `itl` is a histogram of all gaps between tokens (BUCKETS,),
    `rejected` counts by reason, `engines` are the ENGINE records of the replicas at the end.
    """

    arrival_s: np.ndarray
    ttft_s: np.ndarray
    e2el_s: np.ndarray
    tpot_s: np.ndarray
    restarts: np.ndarray
    cached_tokens: np.ndarray
    itl: np.ndarray
    rejected: dict[str, int]
    engines: np.ndarray
    sequences: np.ndarray

    @property
    def duration_s(self) -> float:
        """From the first request to the last answer."""
        return float(np.nanmax(self.arrival_s + self.e2el_s) - self.arrival_s[0])

    @property
    def iterations(self) -> int:
        return int(self.engines["iterations"].sum())

    def summary(self, server: LLMServer) -> dict[str, float]:
        """vLLM's report: rates per second, and mean, median, p90, p95 and p99 of TTFT, TPOT, ITL and E2EL in ms."""
        done = ~np.isnan(self.e2el_s)
        output = self.sequences["total"] - self.sequences["prompt"]
        good = is_good(self.ttft_s, self.tpot_s, self.e2el_s, server.objectives.seconds)
        lasted = self.duration_s if done.any() else math.nan
        queried = int(self.engines["queried"].sum())
        out = {
            "completed": float(done.sum()),
            "request_throughput": done.sum() / lasted,
            "request_goodput": good.sum() / lasted,
            "output_throughput": output[done].sum() / lasted,
            "total_token_throughput": self.sequences["total"][done].sum() / lasted,
            "prefix_hit_rate": int(self.engines["hit"].sum()) / queried if queried else math.nan,
        }
        for name, values in (("ttft", self.ttft_s), ("tpot", self.tpot_s), ("e2el", self.e2el_s)):
            known = 1e3 * values[~np.isnan(values)]
            out[f"mean_{name}_ms"] = float(known.mean()) if len(known) else math.nan
            for p in (50, 90, 95, 99):
                out[f"p{p}_{name}_ms"] = float(np.percentile(known, p)) if len(known) else math.nan
        out |= {f"p{p}_itl_ms": 1e3 * float(quantiles_s(self.itl, (p / 100,))[0]) for p in (50, 90, 95, 99)}
        return out


def serve(
    server: LLMServer,
    law: IterationLaw,
    requests: Requests,
    *,
    replicas: int = 1,
    concurrency: int = 0,
    stepwise: bool = False,
) -> Served:
    """Serves all requests on `replicas` replicas. With a `concurrency` arrivals do not count: so many clients each send
    a request when they have the answer to the one before, which one replica serves. `stepwise` takes no short cut.
    """
    if replicas < 1 or concurrency < 0 or (concurrency and replicas > 1):
        raise SpecError(
            f"{replicas} replicas and concurrency {concurrency}; valid: at least one, and exactly one in a closed loop"
        )
    record = server_record(server, concurrency=concurrency, stepwise=stepwise)
    fleet = _fleet(record, np.tile(engine_record(server, law), replicas), server, requests)
    if concurrency:
        llm.serve_clients(fleet)
    else:
        llm.serve(fleet, 0, len(requests), math.inf)
    return _served(fleet, fleet.itl, fleet.engines)


def serve_apart(
    server: LLMServer,
    law: IterationLaw,
    requests: Requests,
    *,
    prefill: int,
    decode: int,
    transfer_s: float,
    transfer_s_per_token: float,
) -> Served:
    """Serves requests on `prefill` replicas that only prefill, and `decode` ones that do the rest.

    The first token is there at the end of the prefill; the KV blocks reach the other replica `transfer_s`, and
    `transfer_s_per_token` for every token of the prompt, later, and leave the first one at once.
    """
    if min(prefill, decode) < 1:
        raise SpecError(f"{prefill} prefill and {decode} decode replicas; valid: at least one of each")
    record = server_record(server, PREFILL)
    record["transfer_s"], record["transfer_s_per_token"] = transfer_s, transfer_s_per_token
    one = engine_record(server, law)
    first = _fleet(record, np.tile(one, prefill), server, requests)
    llm.serve(first, 0, len(requests), math.inf)
    passed = np.flatnonzero(first.sequences["state"] == HANDED_OVER)
    passed = passed[np.argsort(first.sequences["here_s"][passed], kind="stable")]
    second = new_fleet(
        server_record(server, DECODE), np.tile(one, decode), first.sequences[passed], np.zeros(0, np.int32), 0
    )
    llm.serve(second, 0, len(passed), math.inf)
    first.sequences[passed] = second.sequences
    return _served(first, first.itl + second.itl, np.concatenate([first.engines, second.engines]))


def _fleet(record: np.ndarray, engines: np.ndarray, server: LLMServer, requests: Requests) -> Fleet:
    reused = server.prefix_block_tokens
    if reused is not None and requests.prefix_block_tokens not in (0, reused):
        raise SpecError(
            f"prefix_block_tokens of the server is {reused}, of the requests {requests.prefix_block_tokens}; "
            "they must be the same"
        )
    sequences, ids, distinct = sequence_records(requests, bool(record["span"] > 0))
    return new_fleet(record, engines, sequences, ids, distinct)


def _served(fleet: Fleet, itl: np.ndarray, engines: np.ndarray) -> Served:
    q = fleet.sequences
    ttft = q["first_s"] - q["arrival_s"]
    e2el = np.where(q["state"] == SERVED, q["last_s"] - q["arrival_s"], np.nan)
    return Served(
        arrival_s=q["arrival_s"].copy(),
        ttft_s=ttft,
        e2el_s=e2el,
        tpot_s=tpot_s(ttft, e2el, q["total"] - q["prompt"]),
        restarts=q["restarts"].copy(),
        cached_tokens=q["cached"].copy(),
        itl=itl,
        rejected={reason: int((q["state"] == state).sum()) for state, reason in REJECTIONS.items()},
        engines=engines,
        sequences=q,
    )
