"""Explanations measured: can they be trusted, do they know the dollars, and does a small tree do what a network does?

Three parts, each with a table: `trust` (every check of `explain.trust` on each policy, and exact Shapley values beside
the permutation estimate with its error), `dollars` (the split of expected dollars from a few futures, against brute
force on others: does it sum up, does it order alternatives alike), `tree` (VIPER on the quickstart policy: leaves
against agreement and return). `--part` runs one of them, which leaves the lines of the others in acceptance.csv alone.
Runs that are explained or judged have seeds that nothing was trained on.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pilotage.control.learned import policy_from
from pilotage.control.lifecycle import retraining_from
from pilotage.control.rollout import rollout_from
from pilotage.engine.cluster import World
from pilotage.evaluate import interval
from pilotage.explain import distil, drawings
from pilotage.explain.account import Study
from pilotage.explain.attribution import attribute
from pilotage.explain.decisions import Scaling, retraining, rollout
from pilotage.explain.dollars import Weighed, weigh
from pilotage.metrics import ITEMS
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Scenario, load

QUICKSTART = str(
    Path(__file__).parents[2] / "results" / "quickstart"
)  # the folder of the quickstart's training
SCALERS = ("learned", QUICKSTART, "predictive", "hpa")
SEED = 9_000_000


class Sizes(NamedTuple):
    hours: float = 1.5
    states: int = 32  # of each policy, on which explanations are checked
    weighed: int = 500  # states in which alternatives are weighed, over all policies
    futures: int = 8
    brute: int = 24
    horizon_s: float = 180.0
    leaves: tuple[int, ...] = (4, 8, 15, 31)
    rounds: int = 4
    worlds: int = 40  # of training, of validation, and to be judged


QUICK = Sizes(hours=0.6, states=10, weighed=24, futures=4, brute=8, leaves=(4, 8), rounds=1, worlds=2)


def short(policy: str) -> str:
    return "quickstart's" if policy == QUICKSTART else policy


def trust(scenario: Scenario, sizes: Sizes, seed: int, out: Path) -> list[dict]:
    """Every check of every policy."""
    rows, lines = [], []

    def take(name: str, kind: str, study: Study) -> None:
        for one in study.checks:
            rows.append({
                "policy": name, "kind": kind, "states": len(study.explained), "inputs": len(study.players),
                "check": one.name, "asked": one.asked, "measured": one.measured, "low": one.low, "high": one.high,
                "passed": one.passed, "note": one.note,
            })  # fmt: skip
            print(rows[-1], flush=True)
        write_whole(out / "trust.csv", as_csv(rows))

    for name in ("learned-retraining", "paired", "ski-rental"):
        *_, study = retraining(
            name, retraining_from(name), load("drift-gradual"), deployments=12, states=sizes.states, seed=seed
        )
        take(name, "retraining", study)
    for name in ("sequential", "learned-rollout"):
        *_, study = rollout(
            name,
            rollout_from(name),
            scenario.replace(horizon_h=2.0),  # a verdict may take an hour
            worlds=2 if sizes == QUICK else 6,
            seed=seed,
        )
        take(name, "rollout", study)
    for policy in SCALERS:
        of = Scaling(policy_from(policy), scenario, runs=4, background=24, states=sizes.states, seed=seed)
        study = of.study()
        take(short(policy), "scaling", study)
        if policy == "learned":
            lines.append(exact_against_permutation(of, sizes))
            if sizes != QUICK:
                write_figures(out, study, "What moves the shipped policy on quickstart")
    write_whole(out / "trust.csv", as_csv(rows))
    passed = np.array([row["passed"] for row in rows])
    lines.append(
        line(f"trust checks passed, of {len(rows)} on {len({r['policy'] for r in rows})} policies", "1",
             {"mean": passed.mean(), "low": np.nan, "high": np.nan}, bool(passed.all()))
    )  # fmt: skip
    deletion = [row for row in rows if row["check"] == "deletion"]
    worst = min(deletion, key=lambda row: row["low"])
    lines.append(
        line(f"deletion beats random order, worst policy ({worst['policy']}), area in sd", "low > 0",
             {"mean": worst["measured"], "low": worst["low"], "high": worst["high"]}, worst["low"] > 0)
    )  # fmt: skip
    return lines


def exact_against_permutation(of: Scaling, sizes: Sizes) -> dict:
    """Of a policy with at most ten inputs: the share of values whose permutation estimate, of ten independent ones of
    two passes each, is within its own 95 % interval of the exact value."""
    within, repeats = [], 10
    t_quantile = 2.262  # of Student's t with nine degrees of freedom
    for state in of.states[:: max(1, len(of.states) // 10)]:
        choice = of.choice(state)
        exact = attribute(choice, of.players, method="exact").phi[of.players]
        estimates = np.array(
            [
                attribute(choice, of.players, method="permutation", passes=2, seed=k).phi[of.players]
                for k in range(repeats)
            ]
        )
        error = estimates.std(axis=0, ddof=1) / np.sqrt(repeats)
        within += (np.abs(estimates.mean(axis=0) - exact) <= t_quantile * error + 1e-9).tolist()
    found = interval(np.array(within, float))
    return line(
        "exact Shapley values within the permutation estimate's 95 % interval, share of values", "~0.95",
        found, bool(found["high"] >= 0.95),
    )  # fmt: skip


def write_figures(out: Path, study: Study, title: str) -> None:
    (out / "figures").mkdir(exist_ok=True)
    for picture in (drawings.beeswarm(study.explained, title), drawings.dependence(study.explained, title)):
        write_whole(out / "figures" / f"{picture.name}.svg", picture.desk)


def dollars(scenario: Scenario, sizes: Sizes, seed: int, out: Path) -> list[dict]:
    """A split from `futures` rollouts, beside brute force from `brute` others, in states spread over runs."""
    rows = []
    policies = ("predictive", QUICKSTART, "hpa", "predictive", QUICKSTART)[: 2 if sizes == QUICK else 5]
    each = -(-sizes.weighed // len(policies))
    ahead = round(sizes.horizon_s / scenario.tick_s)
    for number, policy in enumerate(policies):
        ticks = np.unique(np.linspace(20, scenario.ticks - 1 - ahead, each).astype(int)).tolist()
        for found in weigh(
            scenario, policy_from(policy), World(SEED + 100 * seed + number), ticks,
            futures=sizes.futures + sizes.brute, horizon_s=sizes.horizon_s, seed=seed + number,
        ):  # fmt: skip
            rows.append({"policy": short(policy), "run": number, "tick": found.tick} | compared(found, sizes))
        print(rows[-1], flush=True)
        write_whole(out / "dollars.csv", as_csv(rows))
    sums = np.array([row["within"] for row in rows], float)
    telling = [row for row in rows if row["significant"] > 0]
    alike = interval(np.array([row["alike"] for row in telling], float))
    share = interval(sums)
    return [
        line(f"split sums to the brute-force value within their interval, share of {len(rows)} states", ">= 0.95",
             share, share["mean"] >= 0.95),
        line(f"alternatives ordered as brute force does, share of {len(telling)} of {len(rows)} states where the "
             "difference is significant", ">= 0.95", alike, alike["mean"] >= 0.95),
    ]  # fmt: skip


def compared(found: Weighed, sizes: Sizes) -> dict:
    """The split of what was decided, item by item, against the total that other futures say; and the order."""
    few, many = found.usd[:, : sizes.futures], found.totals[:, sizes.futures :]
    parts = few[0].mean(axis=0)
    total, value = few[0].sum(axis=1), many[0]
    # both are means of independent futures: 95 % of the time their difference is within that of two t intervals
    error = np.hypot(total.std(ddof=1) / np.sqrt(len(total)), value.std(ddof=1) / np.sqrt(len(value)))
    t_quantile = {4: 3.18, 8: 2.36}.get(sizes.futures, 2.1)
    significant = alike = 0
    for option in range(1, len(found.options)):
        less = interval(many[option] - many[0])
        if less["low"] > 0 or less["high"] < 0:
            significant += 1
            alike += bool((few[option].sum(axis=1) - total).mean() * less["mean"] > 0)
    return {
        **{f"{item}_usd": f"{usd:.6g}" for item, usd in zip(ITEMS, parts, strict=True)},
        "sum_usd": f"{parts.sum():.6g}", "value_usd": f"{value.mean():.6g}", "error_usd": f"{error:.3g}",
        "within": bool(abs(parts.sum() - value.mean()) <= t_quantile * error + 1e-12),
        "significant": significant, "alike": bool(alike == significant),
    }  # fmt: skip


def tree(scenario: Scenario, sizes: Sizes, seed: int, out: Path) -> list[dict]:
    """Leaves against agreement and return, on unseen runs."""
    teacher, reference = policy_from(QUICKSTART), policy_from("hpa")
    worlds = {
        use: [World(SEED + 10_000 * k + 100 * seed + w) for w in range(sizes.worlds)]
        for k, use in (
            (1, "train"),
            (2, "validate"),
            (4, "test"),
        )  # 3 judged a method that was changed after it
    }
    settings = distil.Settings(rounds=sizes.rounds, gap_states=max(12, 3 * sizes.worlds), seed=seed)
    grown = distil.grow(
        teacher, scenario, worlds["train"], worlds["validate"], sizes.leaves, settings,
        lambda text: print(text, flush=True),
    )  # fmt: skip
    rows = []
    for most, found in sorted(grown.items()):
        judged = distil.judge(found, teacher, reference, scenario, worlds["test"])
        rows.append({
            "leaves_at_most": most, **{k: v for k, v in judged.items() if not isinstance(v, dict)},
            "return_ratio": judged["return_ratio"]["mean"], "return_ratio_low": judged["return_ratio"]["low"],
            "return_ratio_high": judged["return_ratio"]["high"], "cost_ratio": judged["cost_ratio"]["mean"],
            "cost_ratio_low": judged["cost_ratio"]["low"], "cost_ratio_high": judged["cost_ratio"]["high"],
            **{f"{name}_usd": usd for name, usd in judged["usd"].items()},
        })  # fmt: skip
        print(rows[-1], flush=True)
    write_whole(out / "tree.csv", as_csv(rows))
    best = [row for row in rows if row["leaves_at_most"] <= 31][-1]  # as asked, whatever the others do here
    chosen = grown[best["leaves_at_most"]]
    chosen.save(out)
    (out / "figures").mkdir(exist_ok=True)
    pictures = (
        drawings.tree(chosen, f"The quickstart policy in {chosen.leaves} leaves"),
        drawings.curve(rows, "Leaves against agreement and return"),
    )
    for picture in pictures:
        write_whole(out / "figures" / f"{picture.name}.svg", picture.desk)
    unknown = {"low": np.nan, "high": np.nan}
    ratio = {
        end: best[f"return_ratio{ending}"]
        for end, ending in (("mean", ""), ("low", "_low"), ("high", "_high"))
    }
    return [
        line(f"agreement of the tree of {best['leaves']} leaves with the quickstart policy, replicas and batch limit",
             ">= 0.95", {"mean": best["agreement"], **unknown}, best["agreement"] >= 0.95),
        line("the same, but for one request in the batch limit", ">= 0.95",
             {"mean": best["agreement_within_one"], **unknown}, best["agreement_within_one"] >= 0.95),
        line("the same, on replicas alone, in the quickstart policy's states", ">= 0.95",
             {"mean": best["agreement_replicas"], **unknown}, best["agreement_replicas"] >= 0.95),
        line("share of the saving over default HPA that it keeps (return ratio)", ">= 0.97", ratio,
             ratio["mean"] >= 0.97),
    ]  # fmt: skip


def line(what: str, asked: str, of: dict[str, float], met: bool) -> dict:
    return {"line": what, "asked": asked, **dict(zip(("measured", "low", "high"),
            (f"{of[key]:.5g}" for key in ("mean", "low", "high")), strict=True)), "met": bool(met)}  # fmt: skip


PARTS = {"trust": trust, "dollars": dollars, "tree": tree}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--out", type=Path, default=Path("results/explain"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--weighed", type=int, help="states in which alternatives are weighed (default: 500)")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    if options.weighed is not None:
        sizes = sizes._replace(weighed=options.weighed)
    scenario = load("quickstart").replace(horizon_h=sizes.hours)
    options.out.mkdir(parents=True, exist_ok=True)
    for part in PARTS if options.part == "all" else [options.part]:
        started, began = datetime.now(UTC), time.perf_counter()
        cpu, lasted = time.process_time(), {}
        # of the code that runs, not of a later commit
        facts = provenance("explain", sys.argv, started, lasted)
        lines = PARTS[part](scenario, sizes, options.seed, options.out)
        lasted[part] = round(time.perf_counter() - began, 1)
        lasted[f"{part}, cpu"] = round(time.process_time() - cpu, 1)
        facts |= {
            "part": part, "seed": options.seed, "sizes": sizes._asdict(), "scenario_sha256": scenario.digest(),
        }  # fmt: skip
        write_whole(options.out / f"{part}_run.json", json.dumps(facts, indent=2) + "\n")
        write_whole(options.out / f"{part}_acceptance.csv", as_csv(lines))
        for row in lines:
            print(row, flush=True)
    whole = []
    for part in PARTS:
        path = options.out / f"{part}_acceptance.csv"
        if path.exists():
            whole += list(csv.DictReader(path.read_text().splitlines()))
    write_whole(options.out / "acceptance.csv", as_csv(whole))


if __name__ == "__main__":
    main()
