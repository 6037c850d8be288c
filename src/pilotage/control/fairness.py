"""The bias gate: whether a retrained model may replace the champion as far as groups of people are concerned.

Both models answer the same requests, whose labels are known. For every group, the candidate's error may not exceed the
champion's by more than `worse_error`; for every sensitive feature, the gap between groups in error, selection rate
(demographic parity), true and false positive rate (equalised odds) may not exceed the champion's by more than
`wider_gap`. Each of these must be *shown*, by a paired bootstrap over users: its p-value is the share of draws in which
the limit is exceeded, corrected by Holm over all that is tested of a feature. So a group too small to tell anything
does not pass unnoticed: below `min_rows` rows or `min_positives` positives it is reported as *insufficient*.

Figures per group are fairlearn's; the bootstrap draws the counts they are made of, which is the same and fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.world.spec import Positive, PositiveCount, Spec

METRICS = ("error", "selection_rate", "true_positive_rate", "false_positive_rate")
_MODELS = {"champion": 2, "candidate": 1}  # a cell is 4 * label + 2 * the champion's answer + the candidate's


class Check(msgspec.Struct, frozen=True):
    """One thing that was tested: `what` rose from `champion` to `candidate`, at most by `upper` (one-sided bound before
    correction), where `limit` is allowed; `p` is Holm's."""

    feature: str
    what: str
    champion: float
    candidate: float
    upper: float
    limit: float
    p: float
    passed: bool


class GateVerdict(msgspec.Struct, frozen=True):
    """`groups`: per feature, model and group the figures and counts, as written into the ledger."""

    outcome: Literal["pass", "block", "insufficient"]
    reason: str
    checks: tuple[Check, ...]
    insufficient: tuple[str, ...]
    groups: tuple[dict[str, float | str], ...]


class FairnessGate(Spec, frozen=True, kw_only=True, tag="fairness-gate", tag_field="kind"):
    """The limits, as shares (0.01 is a point). `ceiling` bounds the candidate's gap itself; None: no such bound.
    `small_groups` *hold*: groups with too little data keep the gate from passing; *report*: they are only listed."""

    worse_error: Positive = 0.01
    wider_gap: Positive = 0.01
    ceiling: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_rows: PositiveCount = 500
    min_positives: PositiveCount = 50
    small_groups: Literal["hold", "report"] = "hold"
    alpha: Annotated[float, Meta(gt=0, lt=0.5)] = 0.05
    draws: Annotated[int, Meta(ge=1000)] = 2000
    seed: int = 0

    def judge(
        self,
        labels: np.ndarray,
        champion: np.ndarray,
        candidate: np.ndarray,
        features: Mapping[str, np.ndarray],
        users: np.ndarray | None = None,
    ) -> GateVerdict:
        """The verdict on a candidate. `labels` and both models' answers are 0 or 1, shape (rows,); `features` maps each
        sensitive feature to a group per row; rows of one user (None: each row is its own) are drawn together.
        ValueError for other values or shapes."""
        labels, champion, candidate = (_binary(*pair) for pair in (
            ("labels", labels), ("champion", champion), ("candidate", candidate),
        ))  # fmt: skip
        for name, values in (
            ("champion", champion),
            ("candidate", candidate),
            ("users", users),
            *features.items(),
        ):
            if values is not None and np.shape(values) != labels.shape:
                raise ValueError(
                    f"{name} has shape {np.shape(values)}; valid: that of the labels, {labels.shape}"
                )
        if not features or not len(labels):
            raise ValueError("nothing to judge: valid are at least one sensitive feature and one row")
        checks: list[Check] = []
        small: list[str] = []
        rows: list[dict[str, float | str]] = []
        for k, (feature, groups) in enumerate(features.items()):
            names, codes = np.unique(groups, return_inverse=True)
            cells = codes * 8 + labels * 4 + champion * 2 + candidate
            rows += _figures(feature, names, np.bincount(cells, minlength=8 * len(names)).reshape(-1, 8))
            size = np.bincount(codes)
            enough = (size >= self.min_rows) & (np.bincount(codes, labels) >= self.min_positives)
            small += [f"{feature} {names[g]} ({size[g]} rows)" for g in np.flatnonzero(~enough)]
            if enough.any():
                rng = np.random.default_rng([self.seed, k])
                drawn = _drawn(rng, cells, 8 * len(names), users, self.draws)
                kept = [str(name) for name in names[enough]]
                checks += self._checks(
                    feature, kept, *(c.reshape(-1, len(names), 8)[:, enough] for c in drawn)
                )
        failed = [check for check in checks if not check.passed]
        if failed:
            worst = max(failed, key=lambda check: check.upper - check.limit)
            return GateVerdict(
                "block",
                f"{worst.feature}: {worst.what} went from {worst.champion:.4f} to {worst.candidate:.4f}; a rise "
                f"within {worst.limit:g} is not shown (upper bound {worst.upper:.4f}; {len(failed)} of {len(checks)} "
                "checks failed)",
                tuple(checks), tuple(small), tuple(rows),
            )  # fmt: skip
        if not checks or (small and self.small_groups == "hold"):
            return GateVerdict(
                "insufficient",
                f"too little data on {', '.join(small)}",
                tuple(checks),
                tuple(small),
                tuple(rows),
            )
        return GateVerdict(
            "pass", f"all {len(checks)} checks are within limits", tuple(checks), tuple(small), tuple(rows)
        )

    def _checks(self, feature: str, names: list[str], seen: np.ndarray, drawn: np.ndarray) -> list[Check]:
        """Of cell counts as they were, shape (1, groups, 8), and as drawn, (draws, groups, 8)."""
        rates = [_rates(counts, bit) for counts in (seen, drawn) for bit in _MODELS.values()]
        tests: list[tuple[str, list[np.ndarray], float]] = [
            (f"error of group {name}", [r[:, 0, g] for r in rates], self.worse_error)
            for g, name in enumerate(names)
        ]
        if len(names) > 1:
            for k, metric in enumerate(METRICS):
                gaps = [np.ptp(r[:, k], axis=-1) for r in rates]
                tests.append((f"gap in {metric}", gaps, self.wider_gap))
                if self.ceiling is not None:
                    alone = [gaps[0] * 0, gaps[1], gaps[2] * 0, gaps[3]]
                    tests.append((f"gap in {metric} itself", alone, self.ceiling))
        rises = [values[3] - values[2] for _, values, _ in tests]
        beyond = [np.sum(rise > limit) for rise, (_, _, limit) in zip(rises, tests, strict=True)]
        ps = _holm((1 + np.array(beyond)) / (1 + self.draws))
        return [
            Check(
                feature=feature, what=what, champion=float(values[0][0]), candidate=float(values[1][0]),
                upper=float(np.quantile(rise, 1 - self.alpha)), limit=limit, p=float(p), passed=bool(p <= self.alpha),
            )
            for (what, values, limit), rise, p in zip(tests, rises, ps, strict=True)
        ]  # fmt: skip


def _binary(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name} has other values than 0 and 1, or not one per row; valid: binary answers")
    return values.astype(np.int64)


def _figures(feature: str, names: np.ndarray, counts: np.ndarray) -> list[dict[str, float | str]]:
    """fairlearn's metrics per group and model, and over all, from counts of cells, shape (groups, 8).

    MetricFrame gets each kind of row once, weighted by how many there are: it walks through rows in Python.
    """
    from fairlearn.metrics import (
        MetricFrame,
        false_positive_rate,
        selection_rate,
        true_positive_rate,
    )  # an extra

    metrics = {
        "error": lambda y_true, y_pred, sample_weight: float(np.average(y_true != y_pred, weights=sample_weight)),
        "selection_rate": selection_rate, "true_positive_rate": true_positive_rate,
        "false_positive_rate": false_positive_rate,
        "rows": lambda y_true, y_pred, sample_weight: float(np.sum(sample_weight)),
    }  # fmt: skip
    group, cell = np.nonzero(counts)
    weights = {name: {"sample_weight": counts[group, cell]} for name in metrics}
    out: list[dict[str, float | str]] = []
    for model, bit in _MODELS.items():
        frame = MetricFrame(
            metrics=metrics, y_true=(cell & 4 > 0).astype(int), y_pred=(cell & bit > 0).astype(int),
            sensitive_features=names[group], sample_params=weights,
        )  # fmt: skip
        for name, row in (*frame.by_group.iterrows(), ("all", frame.overall)):
            known = {metric: float(row[metric]) for metric in metrics}
            out.append({"feature": feature, "model": model, "group": str(name), **known})
    return out


def _drawn(
    rng: np.random.Generator, cells: np.ndarray, count: int, users: np.ndarray | None, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts of cells: as seen, shape (1, count), and with users drawn with replacement, (draws, count)."""
    seen = np.bincount(cells, minlength=count)
    if users is None:
        return seen[None], rng.multinomial(len(cells), seen / len(cells), draws)
    _, codes = np.unique(users, return_inverse=True)
    people = int(codes.max()) + 1
    out = np.empty((draws, count))
    for k in range(draws):
        times = np.bincount(rng.integers(0, people, people), minlength=people)
        out[k] = np.bincount(cells, times[codes], count)
    return seen[None], out


def _rates(counts: np.ndarray, bit: int) -> np.ndarray:
    """METRICS of one model (`bit` of the cell that holds its answer) from counts (..., groups, 8): (..., 4, groups).

    A rate of nothing is 0: drawn groups are large enough for that not to happen.
    """
    cell = np.arange(8)
    label, answer = cell & 4 > 0, cell & bit > 0

    def share(part: np.ndarray, of: np.ndarray) -> np.ndarray:
        below = counts[..., of].sum(axis=-1)
        return np.divide(
            counts[..., part & of].sum(axis=-1), below, out=np.zeros(below.shape), where=below > 0
        )

    everything = cell >= 0
    return np.stack(
        [
            share(label != answer, everything),
            share(answer, everything),
            share(answer, label),
            share(answer, ~label),
        ],
        axis=-2,
    )


def _holm(ps: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values."""
    order = np.argsort(ps)
    stepped = np.maximum.accumulate(ps[order] * np.arange(len(ps), 0, -1))
    out = np.empty(len(ps))
    out[order] = np.minimum(stepped, 1)
    return out
