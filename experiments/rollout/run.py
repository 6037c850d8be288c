"""What rules for a new version lose in dollars, the learned one among them, on rollouts that it has not seen.

A fifth of the versions are bad: more errors, slower, or wrong more often, 1.5 to 8 times; of the others half are a
little better in their answers. Labels come for a fifth of the answers, in most markets half an hour late. What is
decided lasts for two hours from the beginning, so exposure and delay are both dollars, and so is never deciding. The
loss is what is paid beside knowing the version at once. All rules judge the same rollouts; they are told the same
prices as far as they ask for any. `learned-rollout` was trained on rollouts at random (`agents.rollouts`), with other
seeds and ranges.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from pilotage.control.canary import ABORT, PROMOTE, Argo, EProcess, Flagger, Kayenta, Rule
from pilotage.control.rollout import AnySchedule, ExpectedDollars, FixedSteps, Sequential, begun, rollout_from
from pilotage.engine.rollouts import Cases, followed
from pilotage.evaluate import interval, ratio_interval
from pilotage.results import as_csv, provenance, write_whole

LEARNED, LABELLED = "learned-rollout", 0.2
PRICES = {
    "error_usd": 0.01,
    "slow_usd": 0.002,
    "wrong_usd": 0.002,
    "gain_usd": 2e-5,
    "prior_bad": 0.2,
    "horizon": 120,
}
# requests a minute, what a minute on trial costs, how late labels come, whether the baseline is a fresh one
MARKETS = {
    "20/min": (20, 0.0, 30, False),
    "200/min": (200, 0.0, 30, False),
    "200/min, prompt labels": (200, 0.0, 0, False),
    "200/min, fresh baseline, a trial costs": (200, 0.02, 30, True),
    "1000/min": (1000, 0.0, 30, False),
    "1000/min, fresh baseline, a trial costs": (1000, 0.1, 30, True),
}


def market(rng: np.random.Generator, runs: int, q: float, trial_usd: float, late: int, fresh: bool) -> Cases:
    """Rollouts of one kind of service: .5 % errors, 2 % slow, 10 % wrong, of which a fifth is labelled."""
    bad, better = rng.random(runs) < PRICES["prior_bad"], rng.random(runs) < 0.5
    ratios = np.ones((3, runs))
    ratios[2] = np.where(better & ~bad, rng.uniform(0.7, 1.0, runs), 1.0)
    worse = np.exp(rng.uniform(np.log(1.5), np.log(8), runs))
    which = rng.integers(0, 3, runs)
    ratios[which, np.arange(runs)] = np.where(bad, worse, ratios[which, np.arange(runs)])
    each = {name: np.full(runs, float(value)) for name, value in PRICES.items()}
    return Cases(
        requests=np.full(runs, float(q)), swing=np.full(runs, 0.3), period=np.full(runs, 60.0),
        phase=rng.uniform(0, 2 * np.pi, runs), fresh=np.full(runs, fresh),
        rates=np.tile(np.array([[0.005], [0.02], [0.1]]), runs), ratios=ratios, labelled=np.full(runs, LABELLED),
        label_delay=np.full(runs, late), trial_usd=np.full(runs, trial_usd), **each,
    )  # fmt: skip


def contenders(trial_usd: float) -> dict[str, tuple[Rule, AnySchedule | None]]:
    prices = ",".join(f"{name}={value:g}" for name, value in (PRICES | {"trial_usd": trial_usd}).items())
    money = ExpectedDollars(error_usd=PRICES["error_usd"], gain_usd=PRICES["gain_usd"])
    return {
        LEARNED: (rollout_from(f"{LEARNED}:{prices}"), None),
        "sequential, promoted at the deadline": (Sequential(at_deadline="promote"), FixedSteps()),
        "sequential, the likelier at the deadline": (Sequential(at_deadline="likelier"), FixedSteps()),
        "the same, share by expected dollars": (Sequential(at_deadline="likelier"), money),
        "e-process": (EProcess(), FixedSteps()),
        "flagger": (Flagger(threshold=5, max_slow=0.05), FixedSteps()),
        "argo-rollouts": (Argo(failure_limit=3, count=60), FixedSteps()),
        "kayenta": (Kayenta(every=10), FixedSteps()),
    }


def dollars(seed: int, runs: int) -> tuple[list[dict], dict[str, np.ndarray]]:
    """What rules lose beside knowing the version, by market; and, over the stakes, by rule, all rollouts one after the
    other."""
    rows: list[dict] = []
    lost: dict[str, list[np.ndarray]] = {}
    for k, (name, facts) in enumerate(MARKETS.items()):
        cases = market(np.random.default_rng([seed, 88, k]), runs, *facts)
        bad = cases.worth < 0
        for rule, (spec, schedule) in contenders(facts[1]).items():
            ends = followed(cases, *begun(spec, schedule), seed + k)
            found, usd = interval(ends["usd"]), ends["usd"]
            lost.setdefault(rule, []).append(usd / cases.stakes_usd)
            rows.append(
                {
                    "market": name, "rule": rule, "runs": runs, "usd": f"{found['mean']:.5g}",
                    "low": f"{found['low']:.5g}", "high": f"{found['high']:.5g}",
                    "over_stakes": f"{lost[rule][-1].mean():.5g}", "usd_bad": f"{usd[bad].mean():.5g}",
                    "usd_good": f"{usd[~bad].mean():.5g}",
                    "bad_aborted": f"{np.mean(ends['outcome'][bad] == ABORT):.4f}",
                    "good_aborted": f"{np.mean(ends['outcome'][~bad] == ABORT):.4f}",
                    "good_promoted": f"{np.mean(ends['outcome'][~bad] == PROMOTE):.4f}",
                    "minutes": f"{ends['minutes'].mean():.4g}",
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows, {rule: np.concatenate(parts) for rule, parts in lost.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads data")
    parser.add_argument("--out", type=Path, default=Path("results/rollout"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=500, help="rollouts per market")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    started, began = datetime.now(UTC), time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = 50 if options.quick else options.runs
    rows, lost = dollars(options.seed, runs)
    acceptance = []
    for rule, over_stakes in lost.items():
        if rule == LEARNED:
            continue
        # every rollout weighs as what is at stake in it, whatever the traffic is
        saved = ratio_interval(over_stakes - lost[LEARNED], over_stakes)
        acceptance.append({
            "line": f"what {LEARNED} loses less than {rule}, over what that loses", "asked": "> 0",
            **{k: f"{v:.4g}" for k, v in zip(("measured", "low", "high"), saved.values(), strict=True)},
            "met": bool(saved["low"] > 0),
        })  # fmt: skip
        print(acceptance[-1])
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    record = provenance("rollout", sys.argv, started, {"rollout": round(time.perf_counter() - began, 1)})
    record |= {"seed": options.seed, "runs": runs}
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
