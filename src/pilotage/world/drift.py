"""How models decay: the errors that a version trained at one time makes at every later time.

Time runs in batches of labelled requests. Data lie somewhere in a space of concepts; `Drift` moves them there. A
version learns where its training window lay, and errs the more, the further the data have gone since; it errs at
random a little more or less than others that were trained alike, for retraining is not monotone. The result is a
matrix: entry [s, t] is how many of batch t's answers the version trained just before batch s would get wrong (t >=
s). A policy that retrains chooses a path through it (Mahadevan & Mathioudakis, Cost-aware retraining for machine
learning, 2024).
"""

from __future__ import annotations

import math
from typing import Annotated, Union

import numpy as np
from msgspec import Meta

from pilotage.world.spec import NonNegative, Positive, PositiveCount, Probability, Spec, SpecError

Batches = Annotated[float, Meta(ge=1, le=1e6)]


class Drift(Spec, frozen=True, kw_only=True, tag_field="kind"):
    """How the data move; `magnitude` is a distance at which a version has lost 63 % of what it can lose."""

    def path(self, rng: np.random.Generator, batches: int) -> np.ndarray:
        """Where the data of each batch lie; shape (batches, dimensions)."""
        raise NotImplementedError


class NoDrift(Drift, frozen=True, kw_only=True, tag="none"):
    """Nothing changes."""

    def path(self, rng: np.random.Generator, batches: int) -> np.ndarray:
        return np.zeros((batches, 1))


class SuddenDrift(Drift, frozen=True, kw_only=True, tag="sudden"):
    """Jumps to somewhere new, after exponential times with the given mean."""

    mean_batches: Batches
    magnitude: Positive = 1.0

    def path(self, rng: np.random.Generator, batches: int) -> np.ndarray:
        jumps = rng.random(batches) < -math.expm1(-1 / self.mean_batches)
        steps = _directions(rng, batches) * (self.magnitude * jumps)[:, None]
        return np.cumsum(steps, axis=0)


class GradualDrift(Drift, frozen=True, kw_only=True, tag="gradual"):
    """Moves on at a steady pace, and wanders; in `batches_per_unit` batches it goes as far as a magnitude of 1.

    `wander` is the share of the pace that is a random walk. It moves for `lasts_batches` and then rests as long
    (None: it never rests).
    """

    batches_per_unit: Positive
    wander: Probability = 0.3
    lasts_batches: Batches | None = None

    def path(self, rng: np.random.Generator, batches: int) -> np.ndarray:
        pace, heading = 1 / self.batches_per_unit, _directions(rng, 1)
        steps = (1 - self.wander) * pace * heading + self.wander * pace * _directions(rng, batches) * 3
        if self.lasts_batches is not None:
            at = np.arange(batches) + rng.uniform(0, 2 * self.lasts_batches)
            steps = steps * (at % (2 * self.lasts_batches) < self.lasts_batches)[:, None]
        return np.cumsum(steps, axis=0)


class RecurringDrift(Drift, frozen=True, kw_only=True, tag="recurring"):
    """Goes to and fro among a few places, staying exponential times with the given mean."""

    mean_batches: Batches
    places: Annotated[int, Meta(ge=2, le=100)] = 3
    magnitude: Positive = 1.0

    def path(self, rng: np.random.Generator, batches: int) -> np.ndarray:
        where = _directions(rng, self.places) * self.magnitude / math.sqrt(2)
        jumps = rng.random(batches) < -math.expm1(-1 / self.mean_batches)
        places = np.cumsum(jumps * rng.integers(1, self.places, batches)) % self.places
        return where[places]


class SeasonalDrift(Drift, frozen=True, kw_only=True, tag="seasonal"):
    """Goes round in a circle; `magnitude` is its diameter."""

    period_batches: Batches
    magnitude: Positive = 1.0

    def path(self, rng: np.random.Generator, batches: int) -> np.ndarray:
        angle = 2 * np.pi * (np.arange(batches) / self.period_batches + rng.random())
        return self.magnitude / 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)


AnyDrift = Union[NoDrift, SuddenDrift, GradualDrift, RecurringDrift, SeasonalDrift]  # noqa: UP007


class Decay(Spec, frozen=True, kw_only=True):
    """What drift does to a model.

    A fresh version errs in a share `base_error` of answers, one that has lost everything in `worst_error`. Batches
    are harder or easier for all versions alike (`difficulty_cv`, correlated over `difficulty_batches`). A version as
    such errs `luck_cv` times the base more or less, and on one batch `interaction_cv` times. A version is trained on
    the `window_batches` before it. Chance does the rest, and a share `common` of its variance is the same for all
    versions: the same answers are hard. A probe (a small model that is fitted anew for every batch) errs `probe_factor`
    times a fresh version's base, `probe_cv` times more or less.
    """

    drift: AnyDrift
    batch_size: PositiveCount = 500
    base_error: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    worst_error: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    difficulty_cv: NonNegative = 0.1
    difficulty_batches: Batches = 5.0
    luck_cv: NonNegative = 0.05
    interaction_cv: NonNegative = 0.03
    window_batches: PositiveCount = 4
    common: Probability = 0.6
    probe_factor: Annotated[float, Meta(ge=0.5, le=100)] = 1.1
    probe_cv: NonNegative = 0.05

    def __post_init__(self) -> None:
        if self.worst_error < self.base_error:
            raise SpecError(
                f"worst_error {self.worst_error:g} is below base_error {self.base_error:g}; "
                "a version that has lost everything errs at least as much as a fresh one"
            )

    def errors(self, rng: np.random.Generator, batches: int) -> np.ndarray:
        """Wrong answers by version and batch, int64 of shape (batches, batches); 0 below the diagonal."""
        return self.recorded(rng, batches)[0]

    def recorded(
        self, rng: np.random.Generator, batches: int, label_delay: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Those, and a probe's, int64 of shape (batches,), whose labels come `label_delay` batches late."""
        share, probe, _ = self.shares(rng, batches, label_delay)
        return self.counts(rng, share, probe)

    def counts(
        self, rng: np.random.Generator, share: np.ndarray, probe: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Wrong answers of versions and of a probe, int64, where `shares` says how many to expect: binomial each, and
        correlated (a Gaussian copula), because the same answers are hard for all."""
        from scipy.special import ndtr  # large, and of no use to a process that only steers
        from scipy.stats import binom

        n = len(share)
        chance = math.sqrt(self.common) * rng.standard_normal(n)
        own = math.sqrt(1 - self.common)
        errors, upper = np.zeros((n, n), np.int64), np.triu_indices(n)
        rank = ndtr(chance[upper[1]] + own * rng.standard_normal(len(upper[0])))
        errors[upper] = binom.ppf(rank, self.batch_size, share[upper])
        rank = ndtr(chance + own * rng.standard_normal(n))
        return errors, binom.ppf(rank, self.batch_size, probe).astype(np.int64)

    def shares(
        self, rng: np.random.Generator, batches: int, label_delay: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What share of answers is wrong, by version and batch, and of a probe; and how much of what a version can
        lose it has lost, by version and batch: shapes (batches, batches), (batches,) and (batches, batches)."""
        window = self.window_batches
        path = self.drift.path(rng, batches + window)
        far = np.linalg.norm(path[:, None] - path[None, window:], axis=2)  # (batches + window, batches)
        sums = np.cumsum(np.concatenate([np.zeros((1, batches)), far]), axis=0)
        distance = (sums[window : window + batches] - sums[:batches]) / window
        phi = math.exp(-1 / self.difficulty_batches)
        shocks, level = rng.standard_normal(batches), rng.standard_normal()
        hard = np.empty(batches)
        for t in range(batches):
            level = phi * level + math.sqrt(1 - phi * phi) * shocks[t]
            hard[t] = level
        luck = np.exp(self.luck_cv * rng.standard_normal((batches, 1)))
        apart = np.exp(self.interaction_cv * rng.standard_normal((batches, batches)))
        base = self.base_error * np.exp(self.difficulty_cv * hard)
        lost = -np.expm1(-distance)
        losing = self.worst_error - self.base_error
        newest = lost[np.maximum(np.arange(batches) - label_delay, 0), np.arange(batches)]
        noise = np.exp(self.probe_cv * rng.standard_normal(batches))
        share = np.clip(base * luck * apart + losing * lost, 0.0, 1.0)
        probe = np.clip(base * self.probe_factor * noise + losing * newest, 0.0, 1.0)
        return share, probe, lost


def _directions(rng: np.random.Generator, count: int, dimensions: int = 8) -> np.ndarray:
    """Unit vectors in random directions; shape (count, dimensions)."""
    found = rng.standard_normal((count, dimensions))
    return found / np.linalg.norm(found, axis=1, keepdims=True)
