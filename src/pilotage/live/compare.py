"""Two versions side by side: what was measured, how sure that is, where they come from, and which of them to run.

Intervals are at 95 %: as recorded, else Wilson's for a share of n examples (Wilson 1927), else unknown. The interval of
a difference of two independent values follows from their own (method of variance estimates recovery, Zou & Donner,
Statistics in Medicine 27, 2008; of two Wilson intervals it is Newcombe's method 10). Many metrics are judged at once,
so a single small excess among dozens may be chance. What groups of people are concerned, `judged` asks the bias gate
(`control.fairness`), which promotions must pass, too.
"""

from __future__ import annotations

import math
import re
from statistics import NormalDist
from typing import Any, Final, Literal

import msgspec

from pilotage.control.fairness import FairnessGate, GateVerdict
from pilotage.control.shift import ATTRIBUTION
from pilotage.live.registries import Measure, Version
from pilotage.world.spec import Spec

_Z: Final = NormalDist().inv_cdf(0.975)
_HIGHER: Final = re.compile(
    r"(?:^|[^a-z0-9])(?:accuracy|auc|f1|precision|recall|r2|tpr|tnr|true_(?:positive|negative)_rate|kappa|mcc|attainment|goodput|throughput|rps|ndcg|"
    r"map|score)(?![a-z0-9])"
)
_LOWER: Final = re.compile(
    r"(?:^|[^a-z0-9])(?:errors?|log_?loss|loss|mae|mse|rmse|mape|fpr|fnr|false_(?:positive|negative)_rate|brier|perplexity|"
    r"drift|latency|cost|late|dropped|ms|s|usd|gib)(?![a-z0-9])"
)
_SHARE: Final = re.compile(
    r"(?:^|[^a-z0-9])(?:accuracy|precision|recall|tpr|fpr|tnr|fnr|attainment|share|rate)(?![a-z0-9])"
)
_TOLD: Final = (
    0.05  # a change for the worse by more than this share is told, even if nobody knows how sure it is
)
GATE: Final = FairnessGate(small_groups="report")  # groups with too little data do not stop a promotion

Direction = Literal["higher", "lower", "unknown"]


class Difference(Spec, frozen=True, kw_only=True):
    """One metric of two versions and B less A, with intervals (None: unknown)."""

    metric: str
    better: Direction
    a: Measure | None
    b: Measure | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: Literal["better", "worse", "no clear difference", "unknown"] = "unknown"


class Attention(Spec, frozen=True, kw_only=True):
    """What two versions look at: the share that each input has of all contributions, in both, largest change first, and
    how much of the whole has moved (total variation distance: 0 nothing, 1 everything)."""

    inputs: dict[str, tuple[float, float]]
    moved: float


class Comparison(Spec, frozen=True, kw_only=True):
    """Version B against version A."""

    a: str
    b: str
    metrics: tuple[Difference, ...]
    slices: dict[str, tuple[Difference, ...]]
    gate: GateVerdict
    lineage: dict[str, tuple[str, str]]
    recommendation: Literal["b", "a", "undecided"]
    reasons: tuple[str, ...]
    attention: Attention | None = None


def compare(a: Version, b: Version, gate: FairnessGate = GATE) -> Comparison:
    """B against A. Recommends B if something is clearly better and nothing looks worse, A if something is clearly
    worse: overall, in a group, or by the bias gate, which is to let B take A's place. Where both cannot be compared, or
    no difference is clear, it is undecided: then what runs should go on running.
    """
    metrics = _differences(
        *({k: m for k, m in v.metrics.items() if not k.startswith(ATTRIBUTION)} for v in (a, b))
    )
    slices = {
        group: _differences(a.slices.get(group, {}), b.slices.get(group, {}))
        for group in sorted({*a.slices, *b.slices})
    }
    verdict = judged(gate, a, b)
    reasons: list[str] = []
    worse = better = doubtful = False
    for where, part in [("", metrics), *((f" in {group}", part) for group, part in slices.items())]:
        for one in part:
            if one.verdict in ("better", "worse"):
                reasons.append(f"{one.metric}{where} is {one.verdict} by {_shown(one)}")
            elif _looks_worse(one):
                doubtful = True
                reasons.append(
                    f"caution: {one.metric}{where} is worse by {abs(one.difference or 0):.4g}, and without an interval "
                    "it is not known whether that is chance"
                )
            worse |= one.verdict == "worse"
            better |= one.verdict == "better"
    worse |= verdict.outcome == "block"
    doubtful |= gate.refuses(verdict)
    if verdict.groups:
        word = {"pass": "passes", "block": "blocks", "insufficient": "cannot tell"}[verdict.outcome]
        reasons.append(f"the bias gate {word}: {verdict.reason}")
    lineage = _lineage(a, b)
    tested = [{d.digest for d in v.data if d.role == "test"} for v in (a, b)]
    if not all(tested):
        reasons.append("caution: it is not recorded on which data both were tested")
    elif tested[0] != tested[1]:
        reasons.append("caution: they were tested on different data, so a difference may be that of the data")
    if b.retired is not None:
        worse = True
        reasons.append(f"version {b.version} is retired: {b.retired}")
    if not metrics:
        reasons.append("neither has a metric")
    elif not (worse or better):
        reasons.append("no difference is clear")
    return Comparison(
        a=f"{a.service}:{a.version}", b=f"{b.service}:{b.version}", metrics=metrics, slices=slices, gate=verdict,
        lineage=lineage, reasons=tuple(reasons),
        recommendation="a" if worse else "b" if better and not doubtful else "undecided",
        attention=attention(a, b),
    )  # fmt: skip


def attention(a: Version, b: Version) -> Attention | None:
    """How what they look at differs; None unless both have recorded it (`explain.models`)."""
    sizes = [
        {
            name.removeprefix(ATTRIBUTION): measure.value
            for name, measure in version.metrics.items()
            if name.startswith(ATTRIBUTION)
        }
        for version in (a, b)
    ]
    whole = [sum(own.values()) for own in sizes]
    if min(whole) <= 0:
        return None
    names = list(dict.fromkeys([*sizes[0], *sizes[1]]))
    shares = {
        name: (sizes[0].get(name, 0.0) / whole[0], sizes[1].get(name, 0.0) / whole[1]) for name in names
    }
    ordered = sorted(shares.items(), key=lambda one: -abs(one[1][1] - one[1][0]))
    return Attention(inputs=dict(ordered), moved=sum(abs(y - x) for x, y in shares.values()) / 2)


def judged(gate: FairnessGate, champion: Version, candidate: Version) -> GateVerdict:
    """The bias gate on what is recorded of two versions: counts of their answers to the same requests, where the
    candidate was tested beside this champion, else the shares of n per group ("feature=group") that both have."""
    if candidate.paired is not None and candidate.paired.against == champion.version:
        return gate.judge_counts(candidate.paired.counts)
    return gate.judge_rates(_shares(champion), _shares(candidate))


def written(gate: FairnessGate, verdict: GateVerdict) -> dict[str, Any]:
    """A verdict as an entry of the ledger can hold it: what failed comes first, and is cut last."""
    checks = sorted(verdict.checks, key=lambda check: check.passed)
    return {
        "gate": msgspec.to_builtins(gate), "outcome": verdict.outcome, "reason": verdict.reason[:1000],
        "checks": msgspec.to_builtins(checks[:50]), "insufficient": list(verdict.insufficient[:50]),
        "groups": list(verdict.groups[:100]),
    }  # fmt: skip


def _shares(version: Version) -> dict[str, dict[str, dict[str, tuple[float, int]]]]:
    found: dict[str, dict[str, dict[str, tuple[float, int]]]] = {}
    for where, metrics in version.slices.items():
        feature, equals, group = where.partition("=")
        shares = {
            name: (measure.value, measure.n)
            for name, measure in metrics.items()
            if equals and measure.n and _SHARE.search(name.lower()) and 0 <= measure.value <= 1
        }
        if shares:
            found.setdefault(feature, {})[group] = shares
    return found


def direction(metric: str) -> Direction:
    """Whether more or less of a metric is better, by its name; what training took says nothing about a version."""
    name = metric.lower()
    if name.startswith(("neg_", "training_")):  # scikit-learn's scorers
        return "higher" if name.startswith("neg_") else "unknown"
    return "lower" if _LOWER.search(name) else "higher" if _HIGHER.search(name) else "unknown"


def interval(metric: str, measure: Measure) -> tuple[float, float] | None:
    """The 95 % interval of a measured value, None where nothing is known about it."""
    if measure.low is not None and measure.high is not None:
        return measure.low, measure.high
    if measure.n and _SHARE.search(metric.lower()) and 0 <= measure.value <= 1:
        return wilson(measure.value, measure.n)
    return None


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n."""
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _differences(a: dict[str, Measure], b: dict[str, Measure]) -> tuple[Difference, ...]:
    return tuple(_difference(name, a.get(name), b.get(name)) for name in sorted({*a, *b}))


def _difference(metric: str, a: Measure | None, b: Measure | None) -> Difference:
    better = direction(metric)
    found = Difference(metric=metric, better=better, a=a, b=b)
    if a is None or b is None or not (math.isfinite(a.value) and math.isfinite(b.value)):
        return found
    difference = b.value - a.value
    sure_a, sure_b = interval(metric, a), interval(metric, b)
    found = found.replace(
        a=a if sure_a is None else a.replace(low=sure_a[0], high=sure_a[1]),
        b=b if sure_b is None else b.replace(low=sure_b[0], high=sure_b[1]),
        difference=difference,
    )
    if sure_a is None or sure_b is None:
        return found
    low = difference - math.hypot(b.value - sure_b[0], sure_a[1] - a.value)
    high = difference + math.hypot(sure_b[1] - b.value, a.value - sure_a[0])
    verdict = "no clear difference"
    if better != "unknown" and (low > 0 or high < 0):
        verdict = "better" if (low > 0) == (better == "higher") else "worse"
    return found.replace(low=low, high=high, verdict=verdict)


def _looks_worse(one: Difference) -> bool:
    if one.verdict != "unknown" or one.better == "unknown" or one.difference is None or one.a is None:
        return False
    return (one.difference > 0) == (one.better == "lower") and abs(one.difference) > _TOLD * abs(one.a.value)


def _lineage(a: Version, b: Version) -> dict[str, tuple[str, str]]:
    """What differs in where they come from."""

    def facts(v: Version) -> dict[str, str]:
        return {
            "code": v.code.revision
            + (f" with changes {(v.code.diff_digest or '')[:12]}" if v.code.dirty else ""),
            "artifact": v.artifact_digest,
            "parents": ", ".join(v.parents),
            **{f"data {d.role} {d.name}": f"{d.digest[:12]} ({d.rows} rows)" for d in v.data},
            **{f"parameter {name}": str(value) for name, value in v.parameters.items()},
            **{f"environment {name}": value for name, value in v.environment.items()},
        }

    one, two = facts(a), facts(b)
    names = [*one, *(name for name in two if name not in one)]
    return {k: (one.get(k, ""), two.get(k, "")) for k in names if one.get(k, "") != two.get(k, "")}


def _shown(one: Difference) -> str:
    assert one.difference is not None
    return f"{abs(one.difference):.4g} (difference {one.low:.4g} to {one.high:.4g})"
