"""Times iterations of a transformer decoder on the GPU at hand: what a forward pass of an LLM server takes.

`measure.py --out DIR` needs PyTorch with CUDA, and nothing of pilotage. The decoder has the shapes of Llama 3.1 8B (32
layers of width 4,096, 32 heads in 8 groups, 14,336 hidden units, 128,256 tokens, after its model card), 16-bit weights
at random (times do not depend on their values), and the structure of a serving engine: the tokens of a batch are
packed, decodes attend to caches of the same length, a chunk of a prompt to what came before it, only the last token of
every sequence is turned into logits, and an iteration is captured as one CUDA graph, so that launching costs nothing.
Tokenizing, scheduling and sampling beyond the maximum are not in these times. Writes `iterations.csv`, one row per
batch, and `gpu.json`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import statistics
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

WIDTH, LAYERS, HEADS, GROUPS, HEAD, HIDDEN, VOCABULARY = 4096, 32, 32, 8, 128, 14336, 128256
KV_TOKENS = 270_000  # of cache in all: 35 GB beside 16 GB of weights
REPLAYS, WARM_UPS, DRAWN = 9, 3, 100
Batch = tuple[
    int, int, int, int
]  # prefill tokens, tokens before them, sequences that decode, tokens of each of those


def drawn(rng: random.Random, count: int) -> list[Batch]:
    """Batches as chunked prefill makes them, at random: a law fitted to `grid` has not seen them."""

    def about(low: float, high: float) -> int:
        return round(low * (high / low) ** rng.random())

    found: list[Batch] = []
    while len(found) < count:
        kind = rng.choice(("decode", "both", "both", "prompt"))
        prefill = 0 if kind == "decode" else about(32, 4096)
        before = 0 if kind == "decode" or rng.random() < 0.5 else about(256, 16384)
        n, context = (0, 0) if kind == "prompt" else (about(1, 256), about(64, 8192))
        if n * (context + 1) + prefill + before <= KV_TOKENS:
            found.append((prefill, before, n, context))
    return found


def grid() -> list[Batch]:
    """Decodes alone, chunks of prompts alone, and both."""
    found = [(0, 0, n, c) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) for c in (64, 256, 1024, 4096, 16384)]
    found += [
        (p, before, 0, 0)
        for p in (16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
        for before in (0, 2048, 8192, 24576)
    ]
    found += [
        (p, before, n, c)
        for p, before in itertools.product((128, 512, 2048), (0, 4096))
        for n, c in itertools.product((8, 32, 128), (256, 1024))
    ]
    return [(p, before, n, c) for p, before, n, c in found if n * (c + 1) + p + before <= KV_TOKENS]


class Decoder:
    """Weights, a cache, and one iteration."""

    def __init__(self) -> None:
        torch.manual_seed(0)

        def weight(out: int, given: int) -> torch.Tensor:
            return torch.randn(out, given, dtype=torch.bfloat16, device="cuda") * 0.02

        rows = (HEADS + 2 * GROUPS) * HEAD
        self.layers = [
            (
                weight(rows, WIDTH),
                weight(WIDTH, HEADS * HEAD),
                weight(2 * HIDDEN, WIDTH),
                weight(WIDTH, HIDDEN),
            )
            for _ in range(LAYERS)
        ]
        self.embedding, self.head = weight(VOCABULARY, WIDTH), weight(VOCABULARY, WIDTH)
        shape = (LAYERS, 2, KV_TOKENS * GROUPS * HEAD)
        self.cache = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        angles = torch.outer(torch.arange(65536.0), 5e5 ** (-torch.arange(0, HEAD, 2) / HEAD)).cuda()
        self.cosines, self.sines = angles.cos().bfloat16(), angles.sin().bfloat16()

    def rotate(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Rotary positions; x has shape (tokens, heads, HEAD)."""
        cosine, sine = self.cosines[at][:, None], self.sines[at][:, None]
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)

    def run(self, batch: Batch, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """One forward pass; the decodes come first in `tokens`. Returns the next token of every sequence."""
        prefill, before, n, context = batch
        x = self.embedding[tokens]
        cut = n * (context + 1) * GROUPS * HEAD
        for (qkv, out, up, down), cache in zip(self.layers, self.cache, strict=True):
            normed = functional.rms_norm(x, (WIDTH,))
            q, k, v = (normed @ qkv.T).view(len(x), -1, HEAD).split((HEADS, GROUPS, GROUPS), dim=1)
            q, k = self.rotate(q, at), self.rotate(k, at)
            attended = torch.empty_like(q)
            if n:
                keys, values = (c[:cut].view(n, GROUPS, context + 1, HEAD) for c in cache)
                keys[:, :, context], values[:, :, context] = k[:n], v[:n]
                # the heads of a group as its queries: then the cache is read once
                grouped = q[:n].view(n, GROUPS, HEADS // GROUPS, HEAD)
                attended[:n] = functional.scaled_dot_product_attention(grouped, keys, values).reshape(
                    n, HEADS, HEAD
                )
            if prefill:
                size = (before + prefill) * GROUPS * HEAD
                keys, values = (c[cut : cut + size].view(1, before + prefill, GROUPS, HEAD) for c in cache)
                keys[0, before:], values[0, before:] = k[n:], v[n:]
                chunk = functional.scaled_dot_product_attention(
                    q[n:].transpose(0, 1)[None],
                    keys.transpose(1, 2),
                    values.transpose(1, 2),
                    attn_mask=causal_lower_right(prefill, before + prefill),
                    enable_gqa=True,
                )
                attended[n:] = chunk[0].transpose(0, 1)
            x = x + attended.view(len(x), -1) @ out.T
            gate, rest = (functional.rms_norm(x, (WIDTH,)) @ up.T).chunk(2, dim=-1)
            x = x + (functional.silu(gate) * rest) @ down.T
        last = torch.cat((x[:n], x[-1:])) if prefill else x
        return (functional.rms_norm(last, (WIDTH,)) @ self.head.T).argmax(dim=-1)


def timed(decoder: Decoder, batch: Batch) -> list[float]:
    """Seconds of every replay of the iteration."""
    prefill, before, n, context = batch
    tokens = torch.randint(VOCABULARY, (n + prefill,), device="cuda")
    at = torch.cat((torch.full((n,), context), before + torch.arange(prefill))).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            decoder.run(batch, tokens, at)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.run(batch, tokens, at)
    seconds = []
    for k in range(WARM_UPS + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if k >= WARM_UPS:
            seconds.append(begin.elapsed_time(end) / 1e3)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/fidelity/h100"))
    parser.add_argument("--seed", type=int, default=0, help="of the order in which batches are measured")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(options.seed)
    order = [("grid", b) for b in grid()] + [("drawn", b) for b in drawn(rng, DRAWN)]
    rng.shuffle(order)  # so that the card's warming up is in no direction
    rows = []
    with torch.inference_mode():
        decoder = Decoder()
        for part_of, batch in order:
            seconds = timed(decoder, batch)
            low, _, high = statistics.quantiles(seconds, n=4)
            names = ("prefill_tokens", "before_tokens", "decodes", "context_tokens")
            figures = {"seconds": statistics.median(seconds), "low_s": low, "high_s": high}
            rows.append(
                {"set": part_of}
                | dict(zip(names, batch, strict=True))
                | {k: f"{v:.6g}" for k, v in figures.items()}
            )
            print(rows[-1], flush=True)
    rows.sort(
        key=lambda row: [
            row[k] for k in ("set", "prefill_tokens", "before_tokens", "decodes", "context_tokens")
        ]
    )
    part = options.out / "iterations.csv.part"
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    part.replace(options.out / "iterations.csv")
    machine = {
        "gpu": torch.cuda.get_device_name(), "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
        "torch": torch.__version__, "cuda": torch.version.cuda, "replays": REPLAYS, "seed": options.seed,
    }  # fmt: skip
    (options.out / "gpu.json").write_text(json.dumps(machine, indent=1) + "\n")


if __name__ == "__main__":
    main()
