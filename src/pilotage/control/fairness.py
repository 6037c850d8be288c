"""The bias gate: whether a retrained model may replace the champion as far as groups of people are concerned.

Both models answer the same requests, whose labels are known. For every group, the candidate's error may not exceed the
champion's by more than `worse_error`; for every sensitive feature, the gap between groups in error, selection rate
(demographic parity), true and false positive rate (equalised odds) may not exceed the champion's by more than
`wider_gap`. Each of these must be *shown*, by a paired bootstrap over users: its p-value is the share of draws in which
the limit is exceeded, corrected by Holm over all that is tested of a feature. So a group too small to tell anything
does not pass unnoticed: below `min_rows` rows or `min_positives` positives it is reported as *insufficient*.

What was recorded with versions is judged without their rows: `judge_counts` from counts of both models' answers to
the same requests, which is the same test; `judge_rates` from shares that were measured apart. Apart, next to nothing
can be shown at a usual number of rows, so what is shown neither way is *insufficient* there, and only what is shown to
be beyond its limit blocks.

Figures per group are fairlearn's; the bootstrap draws the counts they are made of, which is the same and fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.world.spec import Positive, PositiveCount, Spec

METRICS = ("error", "selection_rate", "true_positive_rate", "false_positive_rate")
_MODELS = {"champion": 2, "candidate": 1}  # a cell is 4 * label + 2 * the champion's answer + the candidate's
CELLS = 8
_ERRORS = ("error", "error_rate", "accuracy")  # names of what a group must not have more (less) of

Rates = Mapping[str, Mapping[str, Mapping[str, tuple[float, int]]]]
"""By feature, group and metric: a share, and of how many."""


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
    checks: tuple[Check, ...] = ()
    insufficient: tuple[str, ...] = ()
    groups: tuple[dict[str, float | str], ...] = ()


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
        found = _Found()
        for k, (feature, groups) in enumerate(features.items()):
            names, cells, seen = _cells(labels, champion, candidate, groups)
            found.groups += _figures(feature, names, seen)
            drawn = _drawn(np.random.default_rng([self.seed, k]), cells, seen, users, self.draws)
            self._tested(found, feature, names, seen, drawn)
        return self._verdict(found)

    def judge_counts(self, counts: Mapping[str, Mapping[str, Sequence[int]]]) -> GateVerdict:
        """The same from counts (see `counts_of`) by feature and group, rows being independent. ValueError for others
        than CELLS whole numbers from 0."""
        found = _Found()
        for k, (feature, groups) in enumerate(counts.items()):
            seen = np.array(list(groups.values()), np.int64).reshape(len(groups), -1)
            if seen.shape[1:] != (CELLS,) or not seen.any() or (seen < 0).any():
                raise ValueError(
                    f"{feature}: counts are {groups}; valid: {CELLS} per group, not all of them 0"
                )
            names = np.array(list(groups))
            found.groups += [
                {"feature": feature, "model": model, "group": str(name)}
                | dict(zip(METRICS, map(float, rates), strict=True)) | {"rows": float(of)}
                for model, bit in _MODELS.items()
                for name, rates, of in zip(names, _rates(seen, bit).T, seen.sum(axis=1), strict=True)
            ]  # fmt: skip
            drawn = _drawn(np.random.default_rng([self.seed, k]), seen, seen, None, self.draws)
            self._tested(found, feature, names, seen, drawn)
        return self._verdict(found)

    def judge_rates(self, champion: Rates, candidate: Rates) -> GateVerdict:
        """The verdict on shares that were measured apart, on rows that may differ; what both have is judged."""
        found = _Found()
        for k, feature in enumerate(name for name in champion if name in candidate):
            one, two = champion[feature], candidate[feature]
            rng, tests = np.random.default_rng([self.seed, k]), []
            for model, rates in (("champion", one), ("candidate", two)):
                found.groups += [
                    {"feature": feature, "model": model, "group": group}
                    | {metric: share for metric, (share, _) in by_metric.items()}
                    | {"rows": float(max((n for _, n in by_metric.values()), default=0))}
                    for group, by_metric in rates.items()
                ]
            both = [name for name in one if name in two]
            for metric in dict.fromkeys(metric for group in both for metric in one[group]):
                pairs = {
                    g: (one[g][metric], two[g][metric]) for g in both if metric in one[g] and metric in two[g]
                }
                least = self.min_positives if metric.startswith(("true_", "false_")) else self.min_rows
                small = [g for g, pair in pairs.items() if min(n for _, n in pair) < least]
                found.small += [f"{feature} {g} ({metric} of {min(n for _, n in pairs[g])})" for g in small]
                kept = [g for g in pairs if g not in small]
                if kept:
                    seen = [np.array([[pairs[g][model][0] for g in kept]]) for model in (0, 1)]
                    drawn = [_redrawn(rng, [pairs[g][model] for g in kept], self.draws) for model in (0, 1)]
                    tests += self._tests(metric, kept, [*seen, *drawn])
            found.checks += self._checks(feature, tests)
            found.beyond += self._checks(feature, tests, beyond=True)
        return self._verdict(found, apart=True)

    def refuses(self, verdict: GateVerdict) -> bool:
        """Whether a candidate with this verdict may not go out."""
        return verdict.outcome == "block" or (
            verdict.outcome == "insufficient" and self.small_groups == "hold"
        )

    def _verdict(self, found: _Found, apart: bool = False) -> GateVerdict:
        known = (tuple(found.checks), tuple(found.small), tuple(found.groups))
        failed = [check for check in found.checks if not check.passed]
        shown = [check for check in found.beyond if check.passed]
        of = len(found.checks)
        if shown:
            worst = max(shown, key=lambda check: check.candidate - check.champion - check.limit)
            return GateVerdict("block", f"{_told(worst)} a rise above {worst.limit:g} is shown", *known)
        if failed and not apart:
            worst = max(failed, key=lambda check: check.upper - check.limit)
            bound = f"(upper bound {worst.upper:.4f}; {len(failed)} of {of} checks failed)"
            return GateVerdict(
                "block", f"{_told(worst)} a rise within {worst.limit:g} is not shown {bound}", *known
            )
        if not found.checks or (found.small and self.small_groups == "hold"):
            small = ", ".join(found.small)
            reason = (
                f"too little data on {small}" if small else "nothing was measured in the same groups of both"
            )
            return GateVerdict("insufficient", reason, *known)
        if failed:
            bound = f"(upper bound {failed[0].upper:.4f}; so {len(failed)} of {of} checks)"
            reason = (
                f"{_told(failed[0])} apart, no rise is shown within {failed[0].limit:g}, nor above {bound}"
            )
            return GateVerdict("insufficient", f"{reason}; let both answer the same requests", *known)
        return GateVerdict("pass", f"all {of} checks are within limits", *known)

    def _tested(
        self, found: _Found, feature: str, names: np.ndarray, seen: np.ndarray, drawn: np.ndarray
    ) -> None:
        """Adds what counts of cells as they were, shape (groups, 8), and as drawn, (draws, groups, 8), say."""
        size = seen.sum(axis=1)
        enough = (size >= self.min_rows) & (seen[:, 4:].sum(axis=1) >= self.min_positives)
        found.small += [f"{feature} {names[g]} ({size[g]} rows)" for g in np.flatnonzero(~enough)]
        if not enough.any():
            return
        counts = (seen[None, enough], drawn[:, enough])
        rates = [_rates(part, bit) for part in counts for bit in _MODELS.values()]
        tests = []
        for k, metric in enumerate(METRICS):
            tests += self._tests(metric, [str(name) for name in names[enough]], [r[:, k] for r in rates])
        found.checks += self._checks(feature, sorted(tests, key=lambda test: test[0].startswith("gap")))

    def _tests(self, metric: str, names: Sequence[str], rates: Sequence[np.ndarray]) -> list[_Test]:
        """What is tested of a metric: its rates under champion and candidate, as seen and as drawn, (draws, groups)."""
        tests: list[_Test] = []
        if metric in _ERRORS:
            errors = [1 - rate if metric == "accuracy" else rate for rate in rates]
            tests += [
                (f"error of group {name}", [e[:, g] for e in errors], self.worse_error)
                for g, name in enumerate(names)
            ]
        if len(names) > 1:
            gaps = [np.ptp(rate, axis=-1) for rate in rates]
            tests.append((f"gap in {metric}", gaps, self.wider_gap))
            if self.ceiling is not None:
                alone = [gaps[0] * 0, gaps[1], gaps[2] * 0, gaps[3]]
                tests.append((f"gap in {metric} itself", alone, self.ceiling))
        return tests

    def _checks(self, feature: str, tests: Sequence[_Test], beyond: bool = False) -> list[Check]:
        """Holm's test of each: that the rise is within its limit, or, with `beyond`, that it is not."""
        rises = [values[3] - values[2] for _, values, _ in tests]
        against = [
            np.sum(rise <= limit if beyond else rise > limit)
            for rise, (_, _, limit) in zip(rises, tests, strict=True)
        ]
        ps = _holm((1 + np.array(against)) / (1 + self.draws))
        return [
            Check(
                feature=feature, what=what, champion=float(values[0][0]), candidate=float(values[1][0]),
                upper=float(np.quantile(rise, 1 - self.alpha)), limit=limit, p=float(p), passed=bool(p <= self.alpha),
            )
            for (what, values, limit), rise, p in zip(tests, rises, ps, strict=True)
        ]  # fmt: skip


_Test = tuple[str, list[np.ndarray], float]


class _Found(msgspec.Struct):
    """What has been found so far; `beyond` are tests of the opposite, where both were measured apart."""

    checks: list[Check] = []
    beyond: list[Check] = []
    small: list[str] = []
    groups: list[dict[str, float | str]] = []


def counts_of(
    labels: np.ndarray, champion: np.ndarray, candidate: np.ndarray, groups: np.ndarray
) -> dict[str, tuple[int, ...]]:
    """By group, how many rows have each of CELLS combinations, 4 * label + 2 * the champion's answer + the candidate's.

    ValueError unless labels and answers are 0 or 1 and there is a group for each.
    """
    for name, values in (("champion", champion), ("candidate", candidate), ("groups", groups)):
        if np.shape(values) != np.shape(labels):
            raise ValueError(
                f"{name} has shape {np.shape(values)}; valid: that of the labels, {np.shape(labels)}"
            )
    answers = _binary("champion", champion), _binary("candidate", candidate)
    names, _, counts = _cells(_binary("labels", labels), *answers, np.asarray(groups))
    return {str(name): tuple(map(int, row)) for name, row in zip(names, counts, strict=True)}


def rates_of(counts: Sequence[int]) -> dict[str, tuple[float, int]]:
    """METRICS of the candidate, and of how many rows each is a share, from the counts of a group."""
    of = np.asarray(counts)
    positives = int(of[4:].sum())
    rows = (int(of.sum()), int(of.sum()), positives, int(of[:4].sum()))
    rates = _rates(of[None], _MODELS["candidate"])[:, 0]
    return {metric: (float(rate), n) for metric, rate, n in zip(METRICS, rates, rows, strict=True) if n}


def _cells(
    labels: np.ndarray, champion: np.ndarray, candidate: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Names of the groups, the cell of each row, and how many rows each cell has, shape (groups, CELLS)."""
    names, codes = np.unique(groups, return_inverse=True)
    cells = codes * CELLS + labels * 4 + champion * 2 + candidate
    return names, cells, np.bincount(cells, minlength=CELLS * len(names)).reshape(-1, CELLS)


def _redrawn(rng: np.random.Generator, rates: Sequence[tuple[float, int]], draws: int) -> np.ndarray:
    """Shares of so many as they might as well be (Jeffreys' posterior), shape (draws, groups)."""
    share, n = np.array(rates).T
    bad = np.clip(share, 0, 1) * n
    return rng.beta(bad + 0.5, n - bad + 0.5, (draws, len(rates)))


def _told(check: Check) -> str:
    return f"{check.feature}: {check.what} went from {check.champion:.4f} to {check.candidate:.4f};"


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
    rng: np.random.Generator, cells: np.ndarray, seen: np.ndarray, users: np.ndarray | None, draws: int
) -> np.ndarray:
    """Counts of cells as `seen`, shape (groups, 8), when users are drawn with replacement: (draws, groups, 8)."""
    if users is None:
        drawn: np.ndarray = rng.multinomial(seen.sum(), seen.ravel() / seen.sum(), draws)
        return drawn.reshape(draws, -1, CELLS)
    _, codes = np.unique(users, return_inverse=True)
    people = int(codes.max()) + 1
    out = np.empty((draws, seen.size))
    for k in range(draws):
        times = np.bincount(rng.integers(0, people, people), minlength=people)
        out[k] = np.bincount(cells, times[codes], seen.size)
    return out.reshape(draws, -1, CELLS)


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
