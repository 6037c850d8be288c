"""What requests at an LLM service look like: prompts, outputs and shared prefixes, in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
from msgspec import Meta

from pilotage.world import traces
from pilotage.world.servers import log_normal_table
from pilotage.world.spec import Spec, SpecError

MAX_TOKENS: Final = 10_000_000  # of one prompt or output; more is a mistake in the data


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
    try:
        if ids is None:
            return Requests(arrival_s, prompt, output)
        listed = traces.lists_of(path, data, ids)
        lo = np.cumsum([0, *map(len, listed)])
        return Requests(arrival_s, prompt, output, np.concatenate(listed), lo, prefix_block_tokens)
    except SpecError as error:
        raise SpecError(f"trace {path!r}: {error}") from None


# --- sources for the requests of a service ----------------------------------------------------------------------
def draws(seed: int, numbers: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), one per number: `engine.randomness.uniform` for arrays."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed % 2**64) + np.uint64(0x9E3779B97F4A7C15) * (
            numbers.astype(np.uint64) + np.uint64(1)
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def from_table(table: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Quantiles at probabilities u of a table made by `world.servers.quantile_table`."""
    cells = len(table) // 2
    places = np.r_[np.arange(cells - 1) / cells, (cells - 1 + np.arange(cells + 1) / cells) / cells]
    return np.interp(u, places, table)


@dataclass(frozen=True)
class Lengths:
    """Tokens of some requests: prompt and output, of shape (n,) each, and where their prefix blocks are.

    Those of request i are `ids[lo[i]:lo[i] + blocks[i]]` of the source that drew it.
    """

    prompt: np.ndarray
    output: np.ndarray
    lo: np.ndarray
    blocks: np.ndarray


class TokenSource(Spec, frozen=True, kw_only=True, tag_field="kind"):
    """How many tokens requests have; request number k of a run has them whatever policy steers it."""

    @property
    def means(self) -> tuple[float, float]:
        """Mean tokens of a prompt and of an output: what policies take a request to be."""
        raise NotImplementedError

    def begin(self, data: Path | None, block_tokens: int | None) -> Tokens:
        """The source ready to draw, its prefix blocks of `block_tokens` tokens each (None: no prefix is looked at)."""
        raise NotImplementedError


class Tokens:
    """A source of tokens in use: `ids` (m,) are its prefix blocks, numbers below `distinct`; no prompt has more than
    `most` of them. `of(seed, numbers)` gives the tokens of requests by number."""

    ids = np.zeros(0, np.int32)
    distinct = 0
    most = 0

    def of(self, seed: int, numbers: np.ndarray) -> Lengths:
        raise NotImplementedError


class RandomTokens(TokenSource, frozen=True, kw_only=True, tag="log-normal"):
    """Independent log-normal lengths with the given means and coefficients of variation, cut at `max_tokens`."""

    prompt_mean: Annotated[float, Meta(ge=1, le=1e6)]
    output_mean: Annotated[float, Meta(ge=1, le=1e6)]
    prompt_cv: Annotated[float, Meta(ge=0, le=5)] = 1.0
    output_cv: Annotated[float, Meta(ge=0, le=5)] = 1.0
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] = 100_000

    @property
    def means(self) -> tuple[float, float]:
        return self.prompt_mean, self.output_mean

    def begin(self, data: Path | None, block_tokens: int | None) -> Tokens:
        return _Random(self)


class _Random(Tokens):
    def __init__(self, source: RandomTokens) -> None:
        self._most = source.max_tokens
        prompt = source.prompt_mean, log_normal_table(source.prompt_cv)
        self._laws = prompt, (source.output_mean, log_normal_table(source.output_cv))

    def of(self, seed: int, numbers: np.ndarray) -> Lengths:
        drawn = []
        for k, (mean, table) in enumerate(self._laws):
            lengths = np.round(mean * from_table(table, draws(seed + k, numbers)))
            drawn.append(np.clip(lengths, 1, self._most).astype(np.int64))
        none = np.zeros(len(numbers), np.int64)
        return Lengths(drawn[0], drawn[1], none, none)


class TraceTokens(TokenSource, frozen=True, kw_only=True, tag="trace"):
    """The lengths of a trace's rows (columns input_tokens, output_tokens), in their order from a random row on, so that
    neighbours stay neighbours. `ids` names the column of block ids, if there is one; when the rows have been gone
    through, the next round has prefixes of its own, in one of `rounds` sets. `prompt_mean` and `output_mean` are what
    policies take a request to be."""

    path: Annotated[str, Meta(min_length=1)]
    prompt_mean: Annotated[float, Meta(ge=1, le=1e6)]
    output_mean: Annotated[float, Meta(ge=1, le=1e6)]
    ids: str | None = None
    rounds: Annotated[int, Meta(ge=1, le=16)] = 2

    @property
    def means(self) -> tuple[float, float]:
        return self.prompt_mean, self.output_mean

    def begin(self, data: Path | None, block_tokens: int | None) -> Tokens:
        return _Rows(
            self, read_requests(self.path, data, ids=self.ids, prefix_block_tokens=block_tokens or 512)
        )


class _Rows(Tokens):
    def __init__(self, source: TraceTokens, rows: Requests) -> None:
        self._rows, self._rounds = rows, source.rounds
        if rows.prefix_ids is not None and rows.prefix_lo is not None:
            known, numbers = np.unique(rows.prefix_ids, return_inverse=True)
            self.distinct = len(known) * source.rounds
            self.ids = np.concatenate([numbers + len(known) * k for k in range(source.rounds)]).astype(
                np.int32
            )
            self.most = int(np.diff(rows.prefix_lo).max())

    def of(self, seed: int, numbers: np.ndarray) -> Lengths:
        rows, n = self._rows, len(self._rows)
        at = int(draws(seed, np.zeros(1, np.int64))[0] * n) + numbers
        row = at % n
        if rows.prefix_lo is None or rows.prefix_ids is None:
            lo = blocks = np.zeros(len(numbers), np.int64)
        else:
            lo = rows.prefix_lo[row] + len(rows.prefix_ids) * (at // n % self._rounds)
            blocks = rows.prefix_lo[row + 1] - rows.prefix_lo[row]
        return Lengths(rows.prompt_tokens[row], rows.output_tokens[row], lo, blocks)


class Sessions(TokenSource, frozen=True, kw_only=True, tag="sessions"):
    """Agents that send their whole history with every turn: `live` sessions take turns in a circle, each for `turns`
    turns. A prompt is `system_tokens`, the same for all, and `turn_tokens` for every turn so far (answers included),
    times a factor of the session's own (log-normal, `cv`); the next prompt begins with it. Outputs are log-normal, too.
    Whole blocks of the prompt are prefixes that later turns find.
    """

    live: Annotated[int, Meta(ge=1, le=4096)]
    turns: Annotated[int, Meta(ge=1, le=256)]
    system_tokens: Annotated[int, Meta(ge=1, le=1_000_000)]
    turn_tokens: Annotated[int, Meta(ge=1, le=1_000_000)]
    output_mean: Annotated[float, Meta(ge=1, le=1e6)]
    cv: Annotated[float, Meta(ge=0, le=2)] = 0.5
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] = 128_000

    @property
    def means(self) -> tuple[float, float]:
        return self.system_tokens + self.turn_tokens * (self.turns + 1) / 2, self.output_mean

    def begin(self, data: Path | None, block_tokens: int | None) -> Tokens:
        return _Sessions(self, block_tokens)


class _Sessions(Tokens):
    GENERATIONS = 4  # of a place in the circle, before its ids come again

    def __init__(self, source: Sessions, block_tokens: int | None) -> None:
        self._source, self._block = source, block_tokens
        self._table = log_normal_table(source.cv)
        if block_tokens is not None:
            shared = source.system_tokens // block_tokens
            self.most = -(-source.max_tokens // block_tokens)
            own = np.arange(source.live * self.GENERATIONS)[:, None] * self.most + shared
            ids = np.arange(self.most) + own
            ids[:, :shared] = np.arange(min(shared, self.most))
            self.ids, self.distinct = ids.reshape(-1).astype(np.int32), int(ids.max()) + 1

    def of(self, seed: int, numbers: np.ndarray) -> Lengths:
        s = self._source
        place, round_ = numbers % s.live, numbers // s.live
        # sessions begin at different turns, so that they do not all end together
        turn = round_ + place * s.turns // s.live
        session = place + s.live * (turn // s.turns)
        factor = from_table(self._table, draws(seed, session))
        prompt = s.system_tokens + np.floor(s.turn_tokens * factor * (turn % s.turns + 1)).astype(np.int64)
        prompt = np.minimum(prompt, s.max_tokens)
        output = np.maximum(
            1, np.round(s.output_mean * from_table(self._table, draws(seed + 1, numbers)))
        ).astype(np.int64)
        if self._block is None:
            none = np.zeros(len(numbers), np.int64)
            return Lengths(prompt, output, none, none)
        row = place * self.GENERATIONS + turn // s.turns % self.GENERATIONS
        return Lengths(prompt, output, row * self.most, -(-prompt // self._block))


RequestTokens = RandomTokens | TraceTokens | Sessions
