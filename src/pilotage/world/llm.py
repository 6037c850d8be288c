"""How an LLM replica serves: the time of an iteration, the KV cache, and what requests look like in tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.world import traces
from pilotage.world.spec import (
    NonNegative,
    Positive,
    PositiveCount,
    Probability,
    Spec,
    SpecError,
    decode,
    read_toml,
)

MAX_TOKENS: Final = 10_000_000  # of one prompt or output; more is a mistake in the data
Finite = Annotated[float, Meta(ge=0, le=1e4)]


class IterationLaw(Spec, frozen=True, kw_only=True):
    """Seconds of one iteration (forward pass) of a replica; the five-term law of Vidur-like simulators.

    `base_s + prefill_s p + sequence_s d + context_s k + square_s s`, from left to right in double precision: `p`
    prefill tokens in the batch, `d` sequences that decode, `k` tokens that all members have in the KV cache already,
    `s` the sum of the squares of the prefill chunks.
    """

    base_s: Finite
    prefill_s: Finite
    sequence_s: Finite
    context_s: Finite
    square_s: Finite = 0.0

    def __post_init__(self) -> None:
        if self.base_s + self.sequence_s <= 0:
            raise SpecError("base_s and sequence_s are both 0: a decode would take no time; give one of them")

    @property
    def vector(self) -> tuple[float, ...]:
        return self.base_s, self.prefill_s, self.sequence_s, self.context_s, self.square_s

    def seconds(self, prefill: float, sequences: float, context: float, square: float) -> float:
        return (
            self.base_s
            + self.prefill_s * prefill
            + self.sequence_s * sequences
            + self.context_s * context
            + self.square_s * square
        )


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
                f"the model ({self.weights_gib:g} GiB of weights, {self.reserve_gib:g} GiB reserved) leaves no room "
                f"for KV blocks in {self.gpus} x {self.gpu_gib:g} GiB x {self.share:g}; give more GPUs or a smaller model"
            )
        return count


class Profile(Spec, frozen=True, kw_only=True):
    """A model on some hardware: its iteration law, its memory, and how well the law fits what was measured.

    `decode_law` (None: the same) holds for iterations without a prefill. `errors` are relative, of the law against
    what it was fitted to (`mape`, `p95`) or to data left out of the fit; `source` says whose measurements they are,
    and `caveat` where the law fails.
    """

    model: str
    hardware: str
    tensor_parallel: PositiveCount = 1
    engine: str
    law: IterationLaw
    decode_law: IterationLaw | None = None
    memory: KvMemory | None = None
    errors: dict[str, NonNegative] = msgspec.field(default_factory=dict)
    source: str
    caveat: str = ""


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


@dataclass(frozen=True)
class Requests:
    """Requests at an LLM service, in order of arrival.

    `arrival_s`, `prompt_tokens`, `output_tokens` have shape (n,). `prefix_ids`, if there are any, are whole numbers,
    those of request i at [prefix_lo[i], prefix_lo[i + 1]): one per block of `prefix_block_tokens` of its prompt, the
    last of which may be partial; equal ids stand for equal prompts up to the end of that block.
    """

    arrival_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    prefix_ids: np.ndarray | None = None
    prefix_lo: np.ndarray | None = None
    prefix_block_tokens: int = 0

    def __post_init__(self) -> None:
        n = len(self.arrival_s)
        for what, values in (("prompt", self.prompt_tokens), ("output", self.output_tokens)):
            if len(values) != n:
                raise SpecError(f"{len(values)} {what} token counts for {n} arrivals; give one for each")
            bad = np.flatnonzero(~((values >= 1) & (values <= MAX_TOKENS) & (values == np.floor(values))))
            if len(bad):
                raise SpecError(
                    f"request {bad[0]}: {values[bad[0]]} {what} tokens; valid: whole numbers from 1 to {MAX_TOKENS}"
                )
        times = self.arrival_s
        if n and not (np.all(np.isfinite(times)) and np.all(np.diff(times) >= 0) and times[0] >= 0):
            raise SpecError("arrival_s must be finite, at least 0, and in ascending order")
        if (self.prefix_ids is None) != (self.prefix_lo is None):
            raise SpecError("prefix_ids and prefix_lo belong together; give both or none")
        if self.prefix_ids is not None and self.prefix_lo is not None:
            self._check_prefixes(self.prefix_ids, self.prefix_lo)

    def _check_prefixes(self, ids: np.ndarray, lo: np.ndarray) -> None:
        if self.prefix_block_tokens < 1:
            raise SpecError("prefix_ids are given without prefix_block_tokens, the tokens of one block")
        if len(lo) != len(self.arrival_s) + 1 or lo[0] != 0 or lo[-1] != len(ids) or np.any(np.diff(lo) < 0):
            raise SpecError(
                f"prefix_lo must go from 0 to {len(ids)} in {len(self.arrival_s) + 1} steps upwards"
            )
        if len(ids) and ids.min() < 0:
            raise SpecError(f"prefix id {ids.min()}; valid: whole numbers from 0 on")
        wanted = -(-self.prompt_tokens // self.prefix_block_tokens)
        bad = np.flatnonzero(np.diff(lo) != wanted)
        if len(bad):
            i = bad[0]
            raise SpecError(
                f"request {i}: {lo[i + 1] - lo[i]} block ids for a prompt of {self.prompt_tokens[i]} tokens; "
                f"valid: {wanted[i]}, one for each {self.prefix_block_tokens} tokens or part of them"
            )

    def __len__(self) -> int:
        return len(self.arrival_s)


def read_requests(
    path: str, data: Path | None, *, ids: str | None = None, prefix_block_tokens: int = 512
) -> Requests:
    """Requests of a trace below `data` with columns arrival_s, input_tokens, output_tokens, and perhaps `ids`, a column
    of block ids joined by semicolons. Rows stay in order; times are kept as they are, whether or not they are equal."""
    arrival_s = traces.times_of(path, data, "arrival_s", False, "keep")
    prompt, output = (traces.counts_of(path, data, name) for name in ("input_tokens", "output_tokens"))
    if ids is None:
        return Requests(arrival_s, prompt, output)
    listed = traces.lists_of(path, data, ids)
    lo = np.cumsum([0, *map(len, listed)])
    return Requests(arrival_s, prompt, output, np.concatenate(listed), lo, prefix_block_tokens)
