"""Canary rules side by side: how often is a harmless canary aborted, and how soon a bad one?

One hour of one-minute intervals, many simulated canaries per cell; every rule sees the same ones. Cells `reference`:
the set-up of the project's reference, N0 ~ Poisson(.9 L) and N1 ~ Poisson(.1 L) requests, L = q (1 + .3 sin(2 pi t /
60)), error probability of each arm p (1 + .5 sin(t / 10)). `other`: other shares, rates and volumes. `diurnal`: load
swings by a factor of 19. `latency`: the canary is slower and nothing else. `accuracy`: its answers are worse and
labels come late. `no traffic`: it gets none in most minutes. `half_spent` of our rule was chosen on other rates,
volumes and shares than these, but with a look at `reference`; its margin for promotion was tightened after a first
run had promoted 2.5 % of the canaries of 2000/min, 0.005 -> 0.01; nothing was chosen on the other groups. A canary
that is promoted is over, and can no longer be aborted. `schedules.csv` compares schedules of the canary's share in
dollars. Acceptance lines are measured on ten times as many canaries of their cells, under our rule alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from scipy.special import ndtr

from pilotage.control.canary import (
    ABORT,
    PROMOTE,
    Argo,
    Arm,
    EProcess,
    Evidence,
    Flagger,
    Kayenta,
    Msprt,
    Rule,
    ZTest,
)
from pilotage.control.rollout import ExpectedDollars, FixedSteps, Sequential
from pilotage.evaluate import interval
from pilotage.results import as_csv, provenance, write_whole

MINUTES, LANES = 60, 500  # LANES canaries are simulated at a time
ERRORS_ONLY = {"errors": 1.0, "slow": 0.0, "wrong": 0.0, "latency": 0.0}
RULES = {
    "flagger": Flagger(threshold=5, passes=MINUTES),
    "argo": Argo(failure_limit=3, count=MINUTES),
    "z at end": ZTest(at=MINUTES),
    "z peeking": ZTest(peek_from=5),
    "kayenta at end": Kayenta(every=MINUTES, marginal_score=95.0),
    "kayenta every 10": Kayenta(every=10, marginal_score=95.0),
    "msprt": Msprt(),
    "e-process": EProcess(),
    "e-process at 2 %": EProcess(alpha=0.02),
    "sequential, errors only": Sequential(**ERRORS_ONLY),
    "sequential": Sequential(),
}
OURS = "sequential, errors only"
REFERENCE = [
    (q, p0, p1)
    for q in (200, 2000)
    for p0, p1 in ((0.005, 0.005), (0.02, 0.02), (0.005, 0.01), (0.005, 0.02), (0.005, 0.1))
]
OTHER = [
    (q, p, p * d, share)
    for q, p, share in (
        (20, 0.02, 0.25),
        (50, 0.01, 0.05),
        (500, 0.001, 0.25),
        (500, 0.05, 0.05),
        (5000, 0.001, 0.25),
    )
    for d in (1, 3)
]
OBJECTIVE_S, LATE_BY, LABELLED = 0.25, 15, 0.2
EDGES_S = np.sort(np.r_[np.geomspace(0.02, 2.0, 46), OBJECTIVE_S])  # of latency buckets

Canaries = Callable[[np.random.Generator, int], Iterator[Evidence]]


def loaded(q: float, t: int, swing: float = 0.3) -> float:
    return q * (1 + swing * np.sin(2 * np.pi * t / MINUTES))


def errors(
    q: float, p0: float, p1: float, share: float = 0.1, swing: float = 0.3, quiet: float = 0.0
) -> Canaries:
    """Errors only; a share `quiet` of the canaries' minutes is without traffic."""

    def canaries(rng: np.random.Generator, lanes: int) -> Iterator[Evidence]:
        for t in range(MINUTES):
            load, factor = loaded(q, t, swing), 1 + 0.5 * np.sin(t / 10)
            n0 = rng.poisson(load * (1 - share), lanes)
            n1 = rng.poisson(load * share, lanes) * (rng.random(lanes) >= quiet)
            x0, x1 = (rng.binomial(n, min(p * factor, 1.0)) for n, p in ((n0, p0), (n1, p1)))
            yield Evidence(Arm(requests=n0, errors=x0), Arm(requests=n1, errors=x1))

    return canaries


def latencies(q: float, slowdown: float, share: float = 0.1) -> Canaries:
    """Lognormal latency with a median of 60 ms, the canary's `slowdown` times that; errors equal, at .5 %."""

    def canaries(rng: np.random.Generator, lanes: int) -> Iterator[Evidence]:
        slow = int(np.flatnonzero(EDGES_S == OBJECTIVE_S)[0]) + 1  # the first bucket above the objective
        for t in range(MINUTES):
            arms = []
            for part, factor in ((1 - share, 1.0), (share, slowdown)):
                n = rng.poisson(loaded(q, t) * part, lanes)
                below = ndtr(np.log(EDGES_S / (0.06 * factor)) / 0.6)
                histogram = rng.multinomial(n, np.diff(below, prepend=0.0, append=1.0))
                arms.append(
                    Arm(
                        requests=n,
                        errors=rng.binomial(n, 0.005),
                        slow=histogram[:, slow:].sum(axis=1),
                        latency=histogram,
                    )
                )
            yield Evidence(*arms)

    return canaries


def answers(q: float, w0: float, w1: float, late_by: int, share: float = 0.1) -> Canaries:
    """Wrong answers; the labels of a fifth of the requests come `late_by` minutes late. Errors equal, at .5 %."""

    def canaries(rng: np.random.Generator, lanes: int) -> Iterator[Evidence]:
        past = []
        for t in range(MINUTES):
            n = [rng.poisson(loaded(q, t) * part, lanes) for part in (1 - share, share)]
            labelled = [rng.binomial(k, LABELLED) for k in n]
            factor = 1 + 0.2 * np.sin(t / 10)  # it drifts for both
            past.append([(k, rng.binomial(k, w * factor)) for k, w in zip(labelled, (w0, w1), strict=True)])
            known = past[t - late_by] if t >= late_by else [(np.zeros(lanes, int),) * 2] * 2
            yield Evidence(
                *(
                    Arm(requests=k, errors=rng.binomial(k, 0.005), labelled=of, wrong=bad)
                    for k, (of, bad) in zip(n, known, strict=True)
                )
            )

    return canaries


def cells() -> list[tuple[str, str, bool, Canaries]]:
    """Group, name, whether the canary is harmless, and the canaries."""
    out = [
        ("reference", f"{q}/min; {p0:g} -> {p1:g}", p0 == p1, errors(q, p0, p1)) for q, p0, p1 in REFERENCE
    ]
    out += [
        ("other", f"{q}/min; {p0:g} -> {p1:g}; share {share:g}", p0 == p1, errors(q, p0, p1, share))
        for q, p0, p1, share in OTHER
    ]
    for p1 in (0.01, 0.02, 0.03):
        name = f"500/min +-90 %; 0.01 -> {p1:g}"
        out.append(("diurnal", name, p1 == 0.01, errors(500, 0.01, p1, swing=0.9)))
    for slowdown in (1.0, 1.2, 1.5):
        out.append(("latency", f"500/min; latency x {slowdown:g}", slowdown == 1, latencies(500, slowdown)))
    for w1, late in ((0.1, LATE_BY), (0.13, LATE_BY), (0.2, LATE_BY), (0.2, 0)):
        name = f"500/min; wrong 0.1 -> {w1:g}; labels {late} min late"
        out.append(("accuracy", name, w1 == 0.1, answers(500, 0.1, w1, late)))
    for p1 in (0.005, 0.02):
        name = f"500/min; 0.005 -> {p1:g}; 4 of 5 minutes silent"
        out.append(("no traffic", name, p1 == 0.005, errors(500, 0.005, p1, quiet=0.8)))
    return out


def judged(
    canaries: Canaries, seed: list[int], runs: int, rules: dict[str, Rule]
) -> dict[str, dict[str, np.ndarray]]:
    """Rules on the same canaries: minute of the end (0: none), how it ended, bad requests of the canary until then."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in rules}
    for start in range(0, runs, LANES):
        lanes = min(LANES, runs - start)
        judges = {name: rule.begin() for name, rule in rules.items()}
        ended = {name: np.zeros((3, lanes), int) for name in rules}
        for t, seen in enumerate(canaries(np.random.default_rng([*seed, start]), lanes)):
            bad = sum(
                np.broadcast_to(getattr(seen.canary, what), lanes) for what in ("errors", "slow", "wrong")
            )
            for name, judge in judges.items():
                minute, how, served = ended[name]
                going = minute == 0
                if not going.any():
                    continue
                served[going] += bad[going]
                out = np.broadcast_to(judge.step(seen), lanes)
                over = going & ((out == ABORT) | (out == PROMOTE))
                minute[over], how[over] = t + 1, out[over]
        for name in rules:
            parts[name].append(ended[name])
    return {
        name: dict(zip(("minute", "how", "bad"), np.concatenate(part, axis=1), strict=True))
        for name, part in parts.items()
    }


def interval_of(count: int, of: int) -> dict[str, float]:
    """A share with its 95 % interval (Wilson)."""
    p, z2 = count / of, 1.96**2
    middle, half = p + z2 / (2 * of), np.sqrt(z2 * p * (1 - p) / of + z2**2 / (4 * of**2))
    return {
        "p_abort": p,
        "low": float((middle - half) / (1 + z2 / of)),
        "high": float((middle + half) / (1 + z2 / of)),
    }


def summary(ends: dict[str, np.ndarray]) -> dict[str, float]:
    """Share aborted and median minute of it, with 95 % intervals (by bootstrap the latter), bad requests served."""
    aborted = ends["how"] == ABORT
    minutes = ends["minute"][aborted] if aborted.any() else np.array([np.nan])
    again = np.median(np.random.default_rng(0).choice(minutes, (500, len(minutes))), axis=1)
    return interval_of(int(aborted.sum()), len(aborted)) | {
        "median_minute": float(np.median(minutes)),
        "minute_low": float(np.quantile(again, 0.025)),
        "minute_high": float(np.quantile(again, 0.975)),
        "p_promote": float(np.mean(ends["how"] == PROMOTE)),
        "bad_before_abort": float(ends["bad"].mean()),
    }


def schedules(seed: int, runs: int) -> list[dict]:
    """Dollars lost in the hour beside knowing the canary at once: errors beyond the champion's, and what a good version
    would have earned on the champion's traffic. A fifth are bad (error rate times 1.5 to 10)."""
    money = ExpectedDollars()
    policies = {
        **{f"constant {share:g}": FixedSteps(steps=(share,)) for share in (0.02, 0.05, 0.1, 0.25, 0.5)},
        "fixed steps": FixedSteps(),
        "expected dollars": money,
    }
    rows = []
    for q, p in ((200, 0.005), (2000, 0.005), (2000, 0.02)):
        for name, policy in policies.items():
            rng = np.random.default_rng([seed, 77, q, int(1000 * p)])
            bad = rng.random(runs) < money.prior_bad
            d = np.where(bad, np.exp(rng.uniform(np.log(1.5), np.log(10), runs)), 1.0)
            judge, weights, usd = (
                Sequential(**ERRORS_ONLY, at_deadline="promote").begin(),
                policy.begin(),
                np.zeros(runs),
            )
            state, minutes, seen = np.zeros(runs, int), np.zeros(runs), None
            for t in range(MINUTES):
                w = np.broadcast_to(weights.weight(seen), runs)
                factor = p * (1 + 0.5 * np.sin(t / 10))
                going = state == 0
                n0, n1 = (rng.poisson(loaded(q, t) * part * going) for part in (1 - w, w))
                x0, x1 = rng.binomial(n0, factor), rng.binomial(n1, np.minimum(factor * d, 1))
                seen = Evidence(Arm(requests=n0, errors=x0), Arm(requests=n1, errors=x1))
                share = np.where(going, w, state == PROMOTE)  # of the canary in this minute
                minutes += going
                harm = loaded(q, t) * share * factor * np.maximum(d - 1, 0) * money.error_usd
                usd += harm + np.where(bad, 0.0, (1 - share) * loaded(q, t) * money.gain_usd)
                out = judge.step(seen)
                state = np.where(going & ((out == ABORT) | (out == PROMOTE)), out, state)
            found = interval(usd)
            rows.append(
                {
                    "cell": f"{q}/min; {p:g}", "schedule": name, "runs": runs, "usd": f"{found['mean']:.5g}",
                    "low": f"{found['low']:.5g}", "high": f"{found['high']:.5g}",
                    "usd_bad": f"{usd[bad].mean():.5g}", "usd_good": f"{usd[~bad].mean():.5g}",
                    "bad_aborted": f"{np.mean(state[bad] == ABORT):.4f}",
                    "good_aborted": f"{np.mean(state[~bad] == ABORT):.4f}", "minutes": f"{minutes.mean():.4g}",
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads data")
    parser.add_argument("--out", type=Path, default=Path("results/canary"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=2000, help="canaries per cell")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    runs = 200 if options.quick else options.runs
    started, began, lasted = datetime.now(UTC), time.perf_counter(), {}
    options.out.mkdir(parents=True, exist_ok=True)
    rows, found, harmless_of = [], {}, {}
    for k, (group, cell, harmless, canaries) in enumerate(cells()):
        for rule, ends in judged(canaries, [options.seed, k], runs, RULES).items():
            got = found[cell, rule] = summary(ends)
            harmless_of[cell] = harmless
            rows.append(
                {"group": group, "cell": cell, "harmless": harmless, "rule": rule, "runs": runs}
                | {key: "" if np.isnan(value) else f"{value:.4g}" for key, value in got.items()}
            )
        print(
            cell,
            f"{time.perf_counter() - began:.0f} s",
            {r: found[cell, r]["p_abort"] for r in RULES},
            flush=True,
        )
    lasted["table"] = round(time.perf_counter() - began, 1)
    write_whole(options.out / "table.csv", as_csv(rows))

    acceptance = []

    def line(text: str, asked: str, mean: float, low: float, high: float, met: bool) -> None:
        figures = {"measured": f"{mean:.4g}", "low": f"{low:.4g}", "high": f"{high:.4g}"}
        acceptance.append({"line": text, "asked": asked, **figures, "met": bool(met)})
        print(acceptance[-1])

    def share(text: str, asked: str, got: dict[str, float], met: bool) -> None:
        line(text, asked, got["p_abort"], got["low"], got["high"], met)

    def ours(q: float, p0: float, p1: float) -> dict[str, float]:
        seed = [options.seed, 1000, q, round(1e4 * p0), round(1e4 * p1)]
        return summary(judged(errors(q, p0, p1), seed, 10 * runs, {OURS: RULES[OURS]})[OURS])

    for q, p0, p1 in REFERENCE:
        if p0 == p1:
            got = ours(q, p0, p1)
            share(f"false aborts, {q}/min at {p0:g}", "<= 0.02", got, got["p_abort"] <= 0.02)
    for q, p1, power, minutes in ((200, 0.02, 0.98, 10), (2000, 0.01, 0.99, 8)):
        got, text = ours(q, 0.005, p1), f"{q}/min, 0.005 -> {p1:g}"
        share(f"power over the hour, {text}", f">= {power}", got, got["p_abort"] >= power)
        ends = (got["median_minute"], got["minute_low"], got["minute_high"])
        line(f"median minutes to the abort, {text}", f"<= {minutes}", *ends, ends[0] <= minutes)
    for rule in (OURS, "sequential"):
        pooled = np.mean([found[cell, rule]["p_abort"] for cell, harmless in harmless_of.items() if harmless])
        cells_of = sum(harmless_of.values())
        got = interval_of(round(pooled * cells_of * runs), cells_of * runs)
        share(
            f"false aborts, all harmless cells of the table, {rule}", "<= 0.02", got, got["p_abort"] <= 0.02
        )
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    lasted["acceptance"] = round(time.perf_counter() - began - lasted["table"], 1)
    write_whole(options.out / "schedules.csv", as_csv(schedules(options.seed, max(runs // 2, 1))))
    lasted["schedules"] = round(time.perf_counter() - began - sum(lasted.values()), 1)
    record = provenance("canary", sys.argv, started, lasted)
    record |= {"seed": options.seed, "runs": runs}
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
