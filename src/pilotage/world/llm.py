"""How an LLM replica serves: scheduling, the KV cache, objectives, and profiles of models on hardware."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.world.servers import IterationLaw
from pilotage.world.spec import (
    NonNegative,
    Positive,
    PositiveCount,
    Probability,
    Spec,
    SpecError,
    closest,
    decode,
    read_json,
    read_toml,
)
from pilotage.world.tokens import MAX_TOKENS


class KvMemory(Spec, frozen=True, kw_only=True):
    """What a replica keeps in the memory of its `gpus`: weights, a `reserve_gib` for activations, and KV blocks.

    `gpu_gib` is the memory of one GPU, of which the engine may use `share` (vLLM's `gpu_memory_utilization`);
    `kv_bytes_per_token` is 2 x layers x KV heads x head size x bytes of an element, of the whole model.
    """

    gpu_gib: Positive
    gpus: PositiveCount = 1
    share: Annotated[float, Meta(gt=0, le=1)] = 0.9
    weights_gib: Positive
    reserve_gib: NonNegative = 0.0
    kv_bytes_per_token: Positive

    def blocks(self, block_tokens: int) -> int:
        """KV blocks of `block_tokens` tokens that fit; SpecError if the model itself does not."""
        left_gib = self.gpu_gib * self.gpus * self.share - self.weights_gib - self.reserve_gib
        count = math.floor(left_gib * 2**30 / (self.kv_bytes_per_token * block_tokens))
        if count < 1:
            raise SpecError(
                f"the model ({self.weights_gib:g} GiB of weights, {self.reserve_gib:g} GiB reserved) leaves no "
                f"room for KV blocks in {self.gpus} x {self.gpu_gib:g} GiB x {self.share:g}; give more GPUs or a "
                "smaller model"
            )
        return count


class Profile(Spec, frozen=True, kw_only=True):
    """A model on some hardware: its iteration law, its memory, and how well the law fits what was measured.

    `errors` are relative, of the law against
    what it was fitted to (`mape`, `p95`) or to data left out of the fit; `source` says whose measurements they are,
    and `caveat` where the law fails.
    """

    model: str
    hardware: str
    tensor_parallel: PositiveCount = 1
    engine: str
    law: IterationLaw
    memory: KvMemory | None = None
    errors: dict[str, NonNegative] = msgspec.field(default_factory=dict)
    source: str
    caveat: str = ""


PROFILES: Final = Path(__file__).with_name("profiles.json")


@cache
def shipped_profiles() -> dict[str, Profile]:
    """The profiles that come with the package, by name; `experiments/llm_profiles` fitted them."""
    return decode(read_json(PROFILES, "the shipped profiles"), dict[str, Profile], str(PROFILES.name))


def shipped_profile(name: str) -> Profile:
    """One of them; SpecError where there is none of that name."""
    found = shipped_profiles().get(name)
    if found is None:
        raise SpecError(f"profile {name!r} does not exist; {closest(name, list(shipped_profiles()))}")
    return found


def load_profile(path: str | Path) -> Profile:
    """The profile in a TOML file; SpecError with the file and the place in it if it makes no sense."""
    return decode(read_toml(Path(path), "a profile"), Profile, str(path))


class Objectives(Spec, frozen=True, kw_only=True):
    """What a request must meet to count as good: time to first token, mean time per later token, and end-to-end
    latency, in milliseconds (None: not asked). Names and definitions as in `vllm bench serve --goodput`."""

    ttft_ms: Positive | None = None
    tpot_ms: Positive | None = None
    e2el_ms: Positive | None = None

    @property
    def seconds(self) -> tuple[float, float, float]:
        """TTFT, TPOT and E2EL in seconds; infinite where nothing is asked."""
        given = (self.ttft_ms, self.tpot_ms, self.e2el_ms)
        ttft, tpot, e2el = (math.inf if ms is None else ms / 1e3 for ms in given)
        return ttft, tpot, e2el


class LLMServer(Spec, frozen=True, kw_only=True):
    """A continuous-batching LLM server.

    `scheduler`: *prefill-first* (vLLM 0.x) prefills whole prompts, as many as `max_tokens` (padded) allow, and lets
    decodes wait; *chunked* (Sarathi-Serve, today's vLLM) mixes decodes with chunks of prompts, up to `chunk_tokens`
    an iteration. At most `max_batch` sequences (vLLM's `max_num_seqs`) hold KV blocks of `block_tokens` tokens. A
    prompt is admitted whole if that leaves `watermark` of the blocks free; a decode that finds none preempts the
    request that came last, which is computed anew.

    `kv_blocks` is the number of blocks of a replica, or it follows from `memory`. With `prefix_block_tokens` (a
    multiple of `block_tokens`; the size of the blocks whose ids the traffic carries) prompts share the prefixes they
    have in common, and find those of earlier ones until the room is wanted.

    `routing`: *round-robin*, *least-outstanding*, or *kv-aware*, which sends a request where the blocks still to be
    prefilled (its own and the waiting ones, times `overlap_weight`) and those in use are fewest.

    `role`: *unified*, or one half of a service whose prompts are prefilled on some replicas and decoded on others:
    *prefill* is through with a request at its first token, *decode* takes over what a prefill service hands to it.

    `vidur` repeats a quirk of Vidur's chunked scheduler: a prompt preempted half-way forgets its other half, which is
    then produced as if it were output.
    """

    scheduler: Literal["prefill-first", "chunked"] = "chunked"
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 128
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] = 8192
    chunk_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] = 2048
    block_tokens: Annotated[int, Meta(ge=1, le=1024)] = 16
    kv_blocks: Annotated[int, Meta(ge=2, le=100_000_000)] | None = None
    memory: KvMemory | None = None
    watermark: Probability = 0.01
    prefix_block_tokens: PositiveCount | None = None
    routing: Literal["round-robin", "least-outstanding", "kv-aware"] = "least-outstanding"
    overlap_weight: NonNegative = 1.0
    objectives: Objectives = Objectives()
    role: Literal["unified", "prefill", "decode"] = "unified"
    vidur: bool = False

    def __post_init__(self) -> None:
        if (self.kv_blocks is None) == (self.memory is None):
            raise SpecError("give either kv_blocks or memory, from which their number follows")
        if self.prefix_block_tokens is not None and self.prefix_block_tokens % self.block_tokens:
            raise SpecError(
                f"prefix_block_tokens {self.prefix_block_tokens} is no multiple of block_tokens {self.block_tokens}"
            )
        if self.blocks - max(self.watermark_blocks, 1) < 1:
            raise SpecError(
                f"watermark {self.watermark} keeps {self.watermark_blocks} of {self.blocks} KV blocks free, "
                "so that nothing can ever be admitted; lower it, or give more blocks"
            )

    @property
    def blocks(self) -> int:
        """KV blocks of a replica."""
        if self.kv_blocks is not None:
            return self.kv_blocks
        assert self.memory is not None
        return self.memory.blocks(self.block_tokens)

    @property
    def watermark_blocks(self) -> int:
        return int(self.watermark * self.blocks)


def batch_times_s(
    server: LLMServer, law: IterationLaw, means: tuple[float, float], largest: int
) -> np.ndarray:
    """Seconds in which one replica serves n mean requests that it always has in hand, for n from 0 to `largest`.

    Each decodes its output, at the context that it has half-way, and every one is prefilled once meanwhile; more than
    fit into the KV cache take turns. Reused prefixes are not counted on. What policies take a replica's capacity to be.
    A prefill service fills its iterations with prompts, a decode service prefills nothing.
    """
    prompt, output = means
    fit = max(1.0, (law.kv_blocks or server.blocks) * server.block_tokens / (prompt + output / 2))
    n = np.arange(largest + 1)
    at_once = np.minimum(np.maximum(n, 1), fit)
    chunk = min(prompt, server.chunk_tokens if server.scheduler == "chunked" else server.max_tokens)
    prefill_s = _prefill_s(law, prompt, chunk)
    if server.role == "prefill":
        most = server.chunk_tokens if server.scheduler == "chunked" else server.max_tokens
        prefills: np.ndarray = n * prefill_s + law.base_s * np.maximum(n * prompt / most, np.minimum(n, 1))
        return prefills
    if server.role == "decode":
        prefill_s = 0.0
    decode = law.decode or law
    step_s = decode.base_s + decode.sequence_s * at_once + decode.context_s * at_once * (prompt + output / 2)
    times: np.ndarray = (output * step_s + at_once * prefill_s) * np.maximum(n, 1) / at_once
    times[0] = 0.0
    return times


def _prefill_s(law: IterationLaw, prompt: float, chunk: float) -> float:
    """What one prompt adds to the iterations that prefill it, chunk by chunk."""
    cross_s = law.cross_s * prompt * (prompt - chunk) / 2
    return law.prefill_s * prompt + law.square_s * prompt * chunk + cross_s


def waits_s(server: LLMServer, law: IterationLaw, means: tuple[float, float], largest: int) -> np.ndarray:
    """Seconds of what the objective of a service is for, at a replica with n mean requests, for n from 1 to `largest`.

    Time to first token: the iteration in flight, which prefills as much as there is to do at n, and the iterations of
    the prompt itself; infinite where tokens come too slowly after it. Of a prefill service, the time of n prompts;
    of a decode service, the time per token.
    """
    prompt, output = means
    times = batch_times_s(server, law, means, largest)[1:]
    if server.role == "prefill":
        return times
    if server.role == "decode":
        return times / output
    n = np.arange(1, largest + 1)
    chunk = min(prompt, server.chunk_tokens if server.scheduler == "chunked" else server.max_tokens)
    decode = law.decode or law
    step_s = decode.base_s + (decode.sequence_s + decode.context_s * (prompt + output / 2)) * n
    prefill_s = _prefill_s(law, prompt, chunk)
    first_s = (1 + math.ceil(prompt / chunk)) * step_s + prefill_s * (1 + np.minimum(n / output, 1.0))
    _, tpot_s, _ = server.objectives.seconds
    return np.where(times / output <= tpot_s, first_s, np.inf)
