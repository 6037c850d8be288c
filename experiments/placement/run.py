"""Learned placement against Kubernetes' scores, packing heuristics and the exact optimum.

`run.py --out DIR` trains from nothing on packing problems and fleets at random (`pilotage.agents.placing`), then opens
what training never saw: other packing problems with their exact optimum, and the environments `spot-fleet` and
`multi-tenant` on paired seeds, under two scaling policies. (When the terms were designed, what the older rules and the
first learned weights cost in both environments was known; no weight was chosen on them.) With `--policy FILE` nothing
is trained. Dollars are compared run by run; intervals are 95 %, by bootstrap over problems or seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pilotage.agents.placing import RULE, Packed, Settings, train
from pilotage.control.guard import Guard
from pilotage.control.placing import LearnedPlacement
from pilotage.control.scaling import parse
from pilotage.engine.cluster import World, recorded
from pilotage.engine.placement import TERMS
from pilotage.engine.run import Run, simulate
from pilotage.evaluate import interval, ratio_interval
from pilotage.metrics import attainment
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Placement, load
from pilotage.world.spec import decode

KUBERNETES = "kubernetes"  # its default resource scores; see engine.placement
HEURISTICS = ("least-allocated", "balanced", "most-allocated", "best-fit", "first-fit", "cheapest", "spread")
PACKING = (RULE, KUBERNETES, *(name for name in HEURISTICS if name != "spread"))
ENVS = {"spot-fleet": 4, "multi-tenant": 1}  # paired runs are so many times --seeds
SCALERS = ("hpa", "predictive")
RULES = (RULE, f"{RULE}, drain", KUBERNETES, f"{KUBERNETES}, replace-first", "cheapest", "best-fit")
QUICK = Settings(
    instances=40, fleets=8, validation_instances=20, validation_fleets=4, generations_packing=10, generations=3,
    instances_per_generation=20, fleets_per_generation=4, fleet_hours=1.0, evaluations=1,
)  # fmt: skip
TEST_SEED = 900_000  # training draws from ten times its own seed, plus 1 to 4


def met(runs: list[Run], world: int) -> float:
    """Share of the requests of one run that met their objective."""
    total = runs[world].totals
    lost = sum(float(total[name].sum()) for name in ("rejected", "timed_out", "abandoned", "lost", "overdue"))
    served = float(total["served"].sum())
    return attainment(served - float(total["late"].sum()), served + lost)


def shown(ratio: dict[str, float]) -> dict[str, str]:
    return {key: f"{ratio[key]:.5g}" for key in ("mean", "low", "high")}


def placement(name: str, learned: LearnedPlacement) -> Placement:
    """A rule by its name; of those that drain at a notice, or that replace first, whatever they do by themselves."""
    rule, _, at_notice = name.partition(", ")
    weights, own = (learned.weights_of(TERMS), learned.at_notice) if rule == RULE else ((), "drain")
    return decode({"rule": rule, "weights": weights, "at_notice": at_notice or own}, Placement, "placement")


def pack(weights: tuple[float, ...], seed: int, count: int) -> tuple[list[dict], dict[str, dict[str, float]]]:
    """Every rule on packing problems of the test, static and dynamic: mean dollars over the optimum's."""
    rows, ours = [], {}
    for kind in ("static", "dynamic"):
        problems = [
            Packed(np.random.default_rng([TEST_SEED + seed, k]), kind == "dynamic") for k in range(count)
        ]
        for rule in PACKING:
            vector = np.array(weights if rule == RULE else ())
            ratios = np.array([math.exp(p.loss(vector, rule)) for p in problems])
            found = interval(ratios)
            rows.append(
                {
                    "problem": f"packing, {kind}", "scaler": "", "rule": rule, "runs": count, "usd": "",
                    "over_optimum": f"{found['mean']:.5g}", "over_optimum_low": f"{found['low']:.5g}",
                    "over_optimum_high": f"{found['high']:.5g}", "worst_over_optimum": f"{ratios.max():.4g}",
                    "share_optimal": f"{np.mean(ratios < 1 + 1e-9):.3f}",
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
            if rule == RULE:
                ours[kind] = found
    return rows, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--out", type=Path, default=Path("results/placement"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", type=Path, help="a placement.json: judge it, train nothing")
    parser.add_argument("--problems", type=int, default=100, help="packing problems of each kind")
    parser.add_argument(
        "--seeds", type=int, default=5, help="paired runs of multi-tenant; spot-fleet has four times as many"
    )
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    problems, seeds = (20, 2) if options.quick else (options.problems, options.seeds)
    started, began, lasted = datetime.now(UTC), time.perf_counter(), {}

    def lap(name: str) -> None:
        lasted[name] = round(time.perf_counter() - began - sum(lasted.values()), 1)

    options.out.mkdir(parents=True, exist_ok=True)
    if options.policy:
        learned = LearnedPlacement.read(options.policy)
    else:
        settings = QUICK if options.quick else Settings(seed=options.seed)
        learned, curve = train(
            settings, lambda text: print(f"{time.perf_counter() - began:.0f} s: {text}", flush=True)
        )
        write_whole(
            options.out / "learning.csv",
            as_csv([{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in curve]),
        )
    learned.save(options.out)
    weights = learned.weights_of(TERMS)
    lap("train")

    rows, packed = pack(weights, options.seed, problems)
    lap("packing")
    lines = [
        (
            f"dollars over the exact optimum, {kind} packing",
            "<= 1.03",
            packed[kind],
            packed[kind]["mean"] <= 1.03,
        )
        for kind in packed
    ]
    empty = dict.fromkeys(list(rows[0]), "")
    for env, times in ENVS.items():
        scenario, runs_each = load(env), times * seeds
        if options.quick:
            scenario = scenario.replace(horizon_h=2.0)
        worlds = recorded(scenario, [World(TEST_SEED + 1000 * options.seed + k) for k in range(runs_each)])
        for scaler in SCALERS:
            usd, attained = {}, {}
            for rule in RULES:
                placed = scenario.replace(placement=placement(rule, learned))
                runs = simulate(
                    placed,
                    [parse(scaler)] * runs_each,
                    worlds,
                    guard=Guard(),
                    label=rule,
                    threads=os.cpu_count() or 1,
                )
                usd[rule] = np.array([run.total_usd for run in runs])
                attained[rule] = np.array([met(runs, w) for w in range(runs_each)])
                items = np.mean([run.usd.sum(axis=0) for run in runs], axis=0)
                row = empty | {
                    "problem": env, "scaler": scaler, "rule": rule, "runs": runs_each, "usd": f"{usd[rule].mean():.5g}",
                    "node_usd": f"{items[0]:.5g}", "late_usd": f"{items[1]:.5g}", "dropped_usd": f"{items[2]:.5g}",
                    "attainment": f"{attained[rule].mean():.6f}",
                }  # fmt: skip
                print(row, f"{time.perf_counter() - began:.0f} s", flush=True)
                rows.append(row)
            for row in rows[-len(RULES) :]:
                share = ratio_interval(usd[RULE], usd[row["rule"]])
                row |= {
                    "learned_saves": f"{1 - share['mean']:.4f}", "learned_saves_low": f"{1 - share['high']:.4f}",
                    "learned_saves_high": f"{1 - share['low']:.4f}",
                }  # fmt: skip
            share = ratio_interval(usd[RULE], usd[KUBERNETES])
            saved = {"mean": 1 - share["mean"], "low": 1 - share["high"], "high": 1 - share["low"]}
            more = interval(attained[RULE] - attained[KUBERNETES])
            where = f"{env} under {scaler}"
            lines.append(
                (f"saving over Kubernetes' scores, {where}", ">= 0.08", saved, saved["mean"] >= 0.08)
            )
            lines.append((f"attainment less that of Kubernetes, {where}", ">= 0", more, more["mean"] >= 0))
        lap(env)
    acceptance = []
    for line, asked, of, ok in lines:
        figures = shown(of)
        acceptance.append(
            {"line": line, "asked": asked, "measured": figures.pop("mean"), **figures, "met": bool(ok)}
        )
        print(acceptance[-1])
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_whole(options.out / "table.csv", as_csv([dict.fromkeys(columns, "") | row for row in rows]))
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    record = provenance("placement", sys.argv, started, lasted)
    record |= {"seed": options.seed, "seeds": seeds, "problems": problems}
    record["scenarios"] = {env: load(env).digest() for env in ENVS}
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
