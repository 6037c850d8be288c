"""What can be said of a model before its labels come: expected accuracy, which inputs moved, and what that may cost.

`expected_accuracy` takes a classifier at its word (confidence-based performance estimation). `InputDrift` compares a
batch of rows with a reference, input by input, and holds the error of many tests. `attribute` says by how much the
error changes with what moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Final, NamedTuple

import numpy as np
from msgspec import Meta

from pilotage.world.spec import Spec

Table = Mapping[str, np.ndarray]  # columns of one length: numbers, or anything else as categories
ATTRIBUTION: Final = "attribution/"  # so begin a version's metrics that say how much it looks at an input
_FEWEST: Final = 20  # rows with a value, on either side, for a test


class Estimate(NamedTuple):
    """An accuracy that nobody has measured, and how far chance alone may move that of a batch of so many rows."""

    accuracy: float
    standard_error: float


def expected_accuracy(probabilities: np.ndarray) -> Estimate:
    """The accuracy that a classifier's own probabilities promise: the mean of those it gives to what it predicts.

    `probabilities` has shape (rows, classes), or (rows,) for the positive class of two, predicted above one half. It
    holds as far as the classifier is calibrated on these inputs: it follows a shift of inputs, not one of the meaning
    of inputs (concept drift), for which labels are needed. Rows with a missing value (NaN) are left out. Raises
    ValueError on values outside 0 to 1, on rows that do not sum to 1, or if no row is left.
    """
    given = np.asarray(probabilities, float)
    if given.ndim == 1:
        given = np.column_stack([1 - given, given])
    if given.ndim != 2 or given.shape[1] < 2:
        raise ValueError(
            f"probabilities of shape {given.shape}; valid: (rows,), or (rows, classes) of two and more"
        )
    given = given[~np.isnan(given).any(axis=1)]
    if len(given) == 0:
        raise ValueError("probabilities: no row without a missing value; valid: at least one")
    if given.min() < 0 or given.max() > 1 or np.abs(given.sum(axis=1) - 1).max() > 1e-3:
        sums = given.sum(axis=1)
        raise ValueError(
            f"probabilities from {given.min():.4g} to {given.max():.4g}, rows that sum to {sums.min():.4g} to "
            f"{sums.max():.4g}; valid: 0 to 1, rows that sum to 1"
        )
    sure = given.max(axis=1)
    return Estimate(float(sure.mean()), math.sqrt(float((sure * (1 - sure)).sum())) / len(sure))


class Moved(NamedTuple):
    """One input of a batch against the reference.

    `effect` is the Kolmogorov-Smirnov distance of a number, the total variation distance of a category (0 to 1);
    `missing_effect` the change of its share of missing values; `p_value` is Holm's, over all inputs; `moved` says that
    it is significant and the effect large enough to matter; `reason` is why nothing could be tested, if so.
    """

    name: str
    effect: float
    missing_effect: float
    p_value: float
    moved: bool
    reason: str = ""


class InputDrift(Spec, frozen=True, kw_only=True):
    """Whether inputs are distributed as in the reference, however large the batch.

    Numbers: two-sample Kolmogorov-Smirnov test; categories: chi-squared test of counts, categories that the reference
    does not know counted as one of their own; missing values: chi-squared test of their share, where there are any. Of
    an input's two p-values, twice the smaller counts. `alpha` bounds the chance of any false alarm in a batch (Holm,
    Scandinavian Journal of Statistics 6, 1979). As any difference is significant in a batch that is large enough, an
    input has moved only if its effect is at least `least_effect`, too.
    """

    alpha: Annotated[float, Meta(gt=0, lt=1)] = 0.05
    least_effect: Annotated[float, Meta(ge=0, le=1)] = 0.1

    def compare(self, reference: Table, batch: Table) -> list[Moved]:
        """One row per input, in the reference's order. Raises ValueError if columns differ or one is empty.

        A constant input is compared like any other. With fewer than 20 values on a side an input is not tested.
        """
        _must_match(reference, batch)
        found = [_tested(name, np.asarray(reference[name]), np.asarray(batch[name])) for name in reference]
        adjusted = _holm([one.p_value for one in found])
        return [
            one._replace(
                p_value=p,
                moved=not one.reason
                and p <= self.alpha
                and max(one.effect, one.missing_effect) >= self.least_effect,
            )
            for one, p in zip(found, adjusted, strict=True)
        ]


def attribute(
    error: Callable[[Table], float],
    reference: Table,
    batch: Table,
    names: list[str],
    seed: int = 0,
    repeats: int = 5,
) -> dict[str, float]:
    """How much of the batch's error goes with each of these inputs: worst first, positive where its move hurts.

    `error` is the model's error on a table, with or without labels: the share of wrong answers where labels are known,
    else one less `expected_accuracy`. An input's part is the error of the batch less the mean error after that input
    alone was given values drawn from the reference (`repeats` times). As its relation to the other inputs is broken by
    that, it is a measure of what to look at first, not of cause; parts need not add up.
    """
    _must_match(reference, batch)
    rng, usual = np.random.default_rng(seed), error(batch)
    rows = len(next(iter(batch.values())))
    parts = {}
    for name in names:
        if name not in reference:
            raise ValueError(f"input {name!r} does not exist; valid: {', '.join(reference)}")
        pool = np.asarray(reference[name])
        swapped = [error({**batch, name: rng.choice(pool, rows)}) for _ in range(repeats)]
        parts[name] = usual - float(np.mean(swapped))
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def _must_match(reference: Table, batch: Table) -> None:
    for table, other, what in ((reference, batch, "the batch"), (batch, reference, "the reference")):
        lacking = [name for name in table if name not in other]
        if lacking:
            raise ValueError(f"{what} lacks the inputs {', '.join(lacking)}; valid: the same inputs in both")
    for table, what in ((reference, "the reference"), (batch, "the batch")):
        lengths = {len(column) for column in table.values()}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"{what} has columns of {sorted(lengths)} rows; valid: one length of at least 1")


def _tested(name: str, reference: np.ndarray, batch: np.ndarray) -> Moved:
    there, here = _present(reference), _present(batch)
    gone = np.array([[there.sum(), (~there).sum()], [here.sum(), (~here).sum()]])
    missing_effect = abs(float((~there).mean() - (~here).mean()))
    from scipy.stats import (
        chi2_contingency,  # only when a test is asked for: what reads names alone stays quick
    )

    missing_p = float(chi2_contingency(gone).pvalue) if (gone.sum(axis=0) > 0).all() else 1.0
    a, b = reference[there], batch[here]
    if min(len(reference), len(batch)) < _FEWEST:
        return Moved(name, math.nan, missing_effect, 1.0, False, f"fewer than {_FEWEST} rows")
    effect, p = 0.0, 1.0
    if min(len(a), len(b)) >= _FEWEST:
        effect, p = _numbers(a, b) if _numeric(reference) and _numeric(batch) else _categories(a, b)
    elif missing_effect == 0:
        return Moved(name, math.nan, missing_effect, 1.0, False, f"fewer than {_FEWEST} values")
    both = min(1.0, 2 * min(p, missing_p)) if missing_p < 1 else p
    return Moved(name, effect, missing_effect, both, False)


def _numeric(column: np.ndarray) -> bool:
    return column.dtype.kind in "iuf"


def _present(column: np.ndarray) -> np.ndarray:
    if column.dtype.kind == "f":
        return ~np.isnan(column)
    if column.dtype.kind == "O":
        return np.array([x is not None and x == x for x in column], bool)
    return np.ones(len(column), bool)


def _numbers(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    from scipy.stats import ks_2samp

    found = ks_2samp(a, b, method="auto" if max(len(a), len(b)) <= 1000 else "asymp")
    return float(found.statistic), float(found.pvalue)


def _categories(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    from scipy.stats import chi2_contingency

    known, index = np.unique(a.astype(str), return_inverse=True)
    place = {name: k for k, name in enumerate(known.tolist())}
    seen = np.array([place.get(name, len(known)) for name in b.astype(str).tolist()])
    counts = np.array(
        [np.bincount(index, minlength=len(known) + 1), np.bincount(seen, minlength=len(known) + 1)]
    )
    shares = counts / counts.sum(axis=1, keepdims=True)
    effect = float(np.abs(shares[0] - shares[1]).sum() / 2)
    # chi-squared needs a few expected in each cell: the rare ones are taken together
    rare = counts.sum(axis=0) * counts.sum(axis=1).min() / counts.sum() < 5
    merged = np.column_stack([counts[:, ~rare], counts[:, rare].sum(axis=1)])
    merged = merged[:, merged.sum(axis=0) > 0]
    return effect, float(chi2_contingency(merged, correction=False).pvalue) if merged.shape[1] > 1 else 1.0


def _holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    least, adjusted = 0.0, [0.0] * len(p_values)
    for rank, k in enumerate(order.tolist()):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = least
    return adjusted
