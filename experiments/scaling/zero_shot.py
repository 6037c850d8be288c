"""One policy on services that it has never seen: against each service's own tuned rule, before and after fine-tuning.

`zero_shot.py --data DIR --out DIR` draws services at random (laws, delays, prices), each with windows of training days
to tune on and of test days, of families never trained on, too, to be judged on. The rule is `predictive`, tuned for
each service; fine-tuning adapts the learned policy's two numbers to what hindsight tells of the same training windows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import protocol

from pilotage.agents.domain import service_at_random
from pilotage.agents.hindsight import look_back, search
from pilotage.agents.tune import candidate_of, tune
from pilotage.control.foresight import Foresight
from pilotage.control.guard import Guard
from pilotage.control.scaling import Predictive, describe
from pilotage.engine.cluster import recorded
from pilotage.engine.run import simulate
from pilotage.results import as_csv, provenance, write_whole

SERVICES, TRIALS = 50, 20
TRAIN = {"twitter": 1, "functions": 2, "synthetic": 2}
TEST = {"twitter": 1, "functions": 1, "nasa": 1, "servegen": 1, "synthetic": 2}


def judge(data: Path, policy: Foresight, seed: int, number: int) -> dict[str, object]:
    """Dollars of the tuned rule, of the policy as it is and fine-tuned, on one service's test windows."""
    rng = np.random.default_rng([seed, 50, number])
    scenario = service_at_random(rng, protocol.service(data))
    train = recorded(scenario, [w for _, w in protocol.windows(scenario, "train", rng, TRAIN)])
    test = recorded(scenario, [w for _, w in protocol.windows(scenario, "test", rng, TEST)])
    began = time.perf_counter()
    study = tune(Predictive(), scenario, [[world] for world in train], trials=TRIALS, seed=number)
    rule = candidate_of(Predictive(), study.best_params)
    tuned_s, began = time.perf_counter() - began, time.perf_counter()
    found, _ = search(policy, look_back(scenario, train), trials=2 * TRIALS, seed=number)
    fine_s = time.perf_counter() - began
    usd = {
        name: float(sum(run.total_usd for run in simulate(scenario, [one] * len(test), test, guard=Guard())))
        for name, one in (("rule", rule), ("policy", policy), ("fine_tuned", found))
    }
    service = scenario.services[0]
    return {
        "service": number,
        "slo_ms": f"{service.slo_ms:.4g}",
        "start_up_s": f"{scenario.pools[0].boot_s + service.variants[0].load_s:.4g}",
        "price_usd_per_hour": f"{scenario.pools[0].price_usd_per_hour:.4g}",
        "late_usd": f"{service.economics.late_usd:.4g}",
        **{f"{name}_usd": f"{value:.6g}" for name, value in usd.items()},
        "policy_saves": f"{1 - usd['policy'] / usd['rule']:.4f}",
        "fine_tuned_saves": f"{1 - usd['fine_tuned'] / usd['rule']:.4f}",
        "tuning_s": f"{tuned_s:.1f}",
        "fine_tuning_s": f"{fine_s:.1f}",
        "rule": describe(rule),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/scaling"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    started, began = datetime.now(UTC), time.perf_counter()
    policy = msgspec.json.decode((options.out / "policy.json").read_bytes(), type=Foresight)
    count, rows = 4 if options.quick else SERVICES, []
    with ProcessPoolExecutor() as pool:
        for row in pool.map(partial(judge, options.data, policy, options.seed), range(count)):
            rows.append(row)
            print(row["service"], row["policy_saves"], row["fine_tuned_saves"], flush=True)
    wins = {name: sum(float(row[f"{name}_saves"]) > 0 for row in rows) for name in ("policy", "fine_tuned")}
    lines = [
        {"line": f"unseen services on which {name} is cheaper than their tuned predictive, of {count}",
         "asked": f">= {asked}", "measured": wins[name], "low": "", "high": "", "met": wins[name] >= asked * count / 50}
        for name, asked in (("policy", 40), ("fine_tuned", 45))
    ]  # fmt: skip
    for line in lines:
        print(line)
    write_whole(options.out / "zero_shot.csv", as_csv(rows))
    write_whole(options.out / "zero_shot_acceptance.csv", as_csv(lines))
    facts = provenance("scaling", sys.argv, started, {"zero_shot": round(time.perf_counter() - began, 1)})
    facts |= {"seeds": [options.seed]}
    write_whole(options.out / "zero_shot_run.json", json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
