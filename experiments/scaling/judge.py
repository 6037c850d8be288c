"""Opens the test windows: the learned policy, every tuned and default rule, the bound and who knew the future.

`judge.py --data DIR --out DIR` reads `policy.json` and `tuned.json`, which were chosen on validation, and writes the
leaderboard, every window, and the acceptance lines. How often test has been opened is counted in `opened.csv`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import protocol

from pilotage.agents.bound import bound
from pilotage.agents.hindsight import costs_usd, look_back
from pilotage.agents.known_rate import rate_known
from pilotage.control.foresight import Foresight
from pilotage.control.guard import Guard
from pilotage.control.scaling import parse
from pilotage.engine import hindsight
from pilotage.engine.cluster import recorded
from pilotage.engine.run import Run, simulate
from pilotage.metrics import attainment
from pilotage.results import as_csv, provenance, write_whole

RESAMPLES = 4000
DEFAULTS = ("hpa", "kpa", "ray-serve", "predictive")
LEARNED = "foresight"
KNOWING = "rate known, sample not"


def attained(runs: list[Run]) -> float:
    """Share of all requests of some runs that met the objective."""

    def count(*names: str) -> float:
        return float(sum(run.totals[name].sum() for run in runs for name in names))

    finished = count("served", "rejected", "timed_out", "abandoned", "lost", "overdue")
    return attainment(count("served") - count("late"), finished)


def family_interval(values: np.ndarray, families: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean, by resampling families and then the windows of each."""
    rng, names, means = np.random.default_rng(0), np.unique(families), []
    for _ in range(RESAMPLES):
        picked = []
        for name in rng.choice(names, len(names)):
            own = values[families == name]
            picked.append(rng.choice(own, len(own)))
        means.append(np.concatenate(picked).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/scaling"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--split", choices=("validate", "test"), default="test", help="validation is not counted"
    )
    options = parser.parse_args()
    started, began = datetime.now(UTC), time.perf_counter()
    scenario = protocol.service(options.data)
    rng = np.random.default_rng([options.seed, 4 if options.split == "test" else 1004])
    found = protocol.windows(scenario, options.split, rng, protocol.JUDGED[options.split])
    found = found[:: 8 if options.quick else 1]
    families = np.array([family for family, _ in found])
    worlds = recorded(scenario, [world for _, world in found])
    tuned = json.loads((options.out / "tuned.json").read_text())
    test = options.split == "test"
    contenders = {LEARNED: msgspec.json.decode((options.out / "policy.json").read_bytes(), type=Foresight)}
    contenders |= {f"{name} tuned": parse(text) for name, text in tuned.items()}
    contenders |= {name: parse(name) for name in DEFAULTS}
    runs: dict[str, list[Run]] = {}
    for name, policy in contenders.items():
        runs[name] = simulate(
            scenario, [policy] * len(worlds), worlds, guard=Guard(), label=name, threads=os.cpu_count() or 1
        )
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    table = look_back(scenario, worlds, threads=os.cpu_count() or 1)
    least_usd = hindsight.least(table.missed_usd, table.price_usd, table.lead, table.low)
    held = np.arange(1, table.missed_usd.shape[2])
    static = table.price_usd[:, None] * held * scenario.ticks + table.missed_usd[:, :, 1:].sum(axis=1)
    threads = os.cpu_count() or 1
    plans = [rate_known(scenario, world, guard=Guard(), threads=threads) for _, world in found]
    knowing = simulate(scenario, plans, worlds, guard=Guard(), label=KNOWING, threads=threads)
    print(f"{KNOWING}: {time.perf_counter() - began:.0f} s", flush=True)
    brackets = [bound(scenario, world, list(contenders.values()), guard=Guard()) for world in worlds]
    print(f"bounds: {time.perf_counter() - began:.0f} s", flush=True)
    lower_usd = np.array([b.lower_usd for b in brackets])
    usd = {name: np.array([run.total_usd for run in of]) for name, of in runs.items()}
    usd["static, best in hindsight"] = static.min(axis=1)
    # what the gap consists of: the engine's noise and guard, and the start-up delay
    usd[f"{LEARNED}, by the table"] = costs_usd(contenders[LEARNED], table)
    prompt = replace(table, lead=np.ones_like(table.lead))
    usd[f"{LEARNED}, by the table, ready after a tick"] = costs_usd(contenders[LEARNED], prompt)
    usd[KNOWING] = np.array([run.total_usd for run in knowing])
    usd["clairvoyant schedule"] = np.array([b.schedule.total_usd for b in brackets])
    usd["hindsight of every count"] = least_usd
    runs[KNOWING] = knowing
    runs["clairvoyant schedule"] = [b.schedule for b in brackets]

    rows, details = [], []
    for name, cost in usd.items():
        over, hind = np.log(cost / lower_usd), np.log(cost / np.maximum(least_usd, lower_usd))
        low, high = family_interval(over, families)
        mine = runs.get(name, [])
        rows.append(
            {
                "policy": name,
                "over_bound": f"{np.exp(over.mean()):.4f}",
                "low": f"{np.exp(low):.4f}",
                "high": f"{np.exp(high):.4f}",
                "over_hindsight": f"{np.exp(hind.mean()):.4f}",
                "worst_window": f"{np.exp(over.max()):.3f}",
                "attainment": f"{attained(mine):.5f}" if mine else "",
                "worst_attainment": f"{min(attained([run]) for run in mine):.4f}" if mine else "",
                "usd_per_window": f"{cost.mean():.4f}",
                **{
                    f"over_hindsight_{family}": f"{np.exp(hind[families == family].mean()):.3f}"
                    for family in dict.fromkeys(families)
                },
            }
        )
        details += [
            {
                "policy": name,
                "family": family,
                "window": k,
                "usd": f"{cost[k]:.6g}",
                "lower_usd": f"{lower_usd[k]:.6g}",
            }
            for k, family in enumerate(families)
        ]
    best = min((name for name in usd if name.endswith("tuned")), key=lambda name: np.log(usd[name]).mean())
    saved = -np.log(usd[LEARNED] / usd[best])
    low, high = family_interval(saved, families)
    mine = runs[LEARNED]
    over = usd[LEARNED] / lower_usd
    lines = [
        ("cost over the bound, geometric mean", "<= 1.45", float(np.exp(np.log(over).mean())), 1.45, True),
        ("cost over the bound, worst window", "<= 4", float(over.max()), 4.0, True),
        ("attainment, pooled", ">= 0.998", attained(mine), 0.998, False),
        ("attainment, worst window", ">= 0.97", min(attained([run]) for run in mine), 0.97, False),
        (f"saving over {best}, geometric mean", ">= 0.15", 1 - float(np.exp(-saved.mean())), 0.15, False),
        (f"saving over {best}, lower end by family", "> 0", 1 - float(np.exp(-low)), 0.0, False),
    ]
    acceptance = [
        {
            "line": line, "asked": asked, "measured": f"{value:.5g}", "low": "", "high": "",
            "met": bool(value <= limit if below else value >= limit),
        }
        for line, asked, value, limit, below in lines
    ]  # fmt: skip
    for row in rows:
        print(row)
    for line in acceptance:
        print(line)
    options.out.mkdir(parents=True, exist_ok=True)
    if test:
        opened = options.out / "opened.csv"
        before = opened.read_text() if opened.is_file() else "when,windows,seed\n"
        write_whole(opened, before + f"{started:%Y-%m-%dT%H:%MZ},{len(worlds)},{options.seed}\n")
    name = "" if test else "validation_"
    write_whole(options.out / f"{name}leaderboard.csv", as_csv(rows))
    write_whole(options.out / f"{name}windows.csv", as_csv(details))
    write_whole(options.out / f"{name}acceptance.csv", as_csv(acceptance))
    facts = provenance("scaling", sys.argv, started, {"judge": round(time.perf_counter() - began, 1)})
    facts |= {
        "seeds": [options.seed],
    }
    write_whole(options.out / f"{name}run.json", json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
