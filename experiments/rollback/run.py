"""Bad versions in the simulated fleet: what each rule loses against knowing beforehand whether the candidate is good.

`run.py --out DIR`: the service of `quickstart` gets candidates that are a little better, answer with errors, are
slower, or are wrong more often (labels come half an hour late); every rule decides, request by request and on the
same traffic, whether they go out or back. The loss is the bill less the smaller one of never trying the candidate and
taking it at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pilotage.control.canary import Argo, EProcess, Flagger, Kayenta, Rule
from pilotage.control.guard import Guard
from pilotage.control.rollout import AnySchedule, ExpectedDollars, FixedSteps, Sequential, rollout_from
from pilotage.control.scaling import Predictive
from pilotage.engine.canary import Candidate, Outcome, rehearse
from pilotage.engine.cluster import World
from pilotage.evaluate import interval
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import load

HOURS, ERROR_USD, OURS = 4.0, 0.002, "sequential"
CANDIDATES = {
    "a little better": Candidate(new_wrong=0.04),
    "no different": Candidate(),
    "leaks errors": Candidate(new_errors=0.02),
    "slower": Candidate(slowdown=2.0),
    "wrong more often": Candidate(new_wrong=0.08),
}
BAD = ("leaks errors", "slower", "wrong more often")
# what the service of `quickstart` pays for a request that is dropped or late, and for a wrong answer; what two more
# arms cost a minute; what a good version is supposed to be worth a request; minutes from the trial to the end
PRICES = f"error_usd=0.002,slow_usd=0.002,wrong_usd={ERROR_USD},trial_usd=0.04,gain_usd=1e-5,horizon=210"
RULES: dict[str, tuple[Rule, AnySchedule | None]] = {
    OURS: (Sequential(at_deadline="likelier"), FixedSteps()),
    "sequential, promoted at the deadline": (Sequential(at_deadline="promote"), FixedSteps()),
    "sequential, share by expected dollars": (
        Sequential(at_deadline="likelier"),
        ExpectedDollars(error_usd=ERROR_USD),
    ),
    "learned-rollout": (rollout_from(f"learned-rollout:{PRICES}"), None),
    "e-process": (EProcess(), FixedSteps()),
    "flagger": (Flagger(threshold=5, max_slow=0.05), FixedSteps()),
    "argo-rollouts": (Argo(failure_limit=3, count=60), FixedSteps()),
    "kayenta": (Kayenta(every=10), FixedSteps()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--out", type=Path, default=Path("results/rollback"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=16, help="paired runs")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started, began = datetime.now(UTC), time.perf_counter()
    scenario = load("quickstart").replace(horizon_h=HOURS)
    service = scenario.services[0]
    economics = service.economics.replace(error_usd=ERROR_USD)
    scenario = scenario.replace(services=(service.replace(economics=economics),))
    worlds = [World(970_000 + 1000 * options.seed + k) for k in range(2 if options.quick else options.seeds)]

    def bills(candidate: Candidate, rule: Rule | None, schedule: AnySchedule | None) -> list[Outcome]:
        return rehearse(scenario, Predictive(), candidate, rule, worlds, schedule=schedule, guard=Guard())

    at_once = Flagger(threshold=1000, min_success=0.0, passes=1)
    rows, losses = [], {}
    for name, candidate in CANDIDATES.items():
        never = np.array([o.total_usd for o in bills(candidate, None, FixedSteps())])
        taken = np.array([o.total_usd for o in bills(candidate, at_once, FixedSteps(steps=(0.05,)))])
        known = np.minimum(never.mean(), taken.mean())
        best = never if never.mean() <= taken.mean() else taken
        for rule, (spec, schedule) in RULES.items():
            found = bills(candidate, spec, schedule)
            lost = np.array([o.total_usd for o in found]) - best
            losses[name, rule] = lost
            decided = [o.decided for o in found]
            minutes = [o.minutes for o in found if o.decided == "abort"]
            mean = interval(lost)
            rows.append({
                "candidate": name, "rule": rule, "lost_usd": f"{mean['mean']:.4g}", "low": f"{mean['low']:.4g}",
                "high": f"{mean['high']:.4g}", "aborted": f"{decided.count('abort') / len(found):.3g}",
                "promoted": f"{decided.count('promote') / len(found):.3g}",
                "abort_minutes": f"{np.median(minutes):.3g}" if minutes else "",
                "requests_reached": f"{np.mean([o.reached for o in found]):.6g}", "bill_if_known_usd": f"{known:.5g}",
            })  # fmt: skip
            print(rows[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    lines = []
    for name in BAD:
        mine = [row for row in rows if row["candidate"] == name and row["rule"] == OURS]
        lines.append({
            "line": f"rolled back by itself: {name}", "asked": "1", "measured": mine[0]["aborted"], "low": "",
            "high": "", "met": float(str(mine[0]["aborted"])) == 1.0,
        })  # fmt: skip
    for rule in list(RULES)[1:]:
        less = sum(losses[name, rule] - losses[name, OURS] for name in BAD)
        mean = interval(less)
        lines.append({
            "line": f"dollars that {OURS} loses less than {rule} on one of each bad version", "asked": "> 0",
            **{k: f"{v:.4g}" for k, v in zip(("measured", "low", "high"), mean.values(), strict=True)},
            "met": bool(mean["low"] > 0),
        })  # fmt: skip
    for line in lines:
        print(line)
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(lines))
    facts = provenance("rollback", sys.argv, started, {"rollback": round(time.perf_counter() - began, 1)})
    facts |= {"seed": options.seed, "seeds": len(worlds)}
    write_whole(options.out / "run.json", json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
