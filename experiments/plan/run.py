"""Does `pilotage plan` find the cheapest deployment, does it hold, and how long does it take?

20 cases (`cases.toml`): pools with the prices of real machines, three models of several builds, steady, bursty and
daily load. Every plan is set beside the exhaustive optimum (every size of every configuration that the file allows,
from a tenth below what full batches could carry, simulated on the same traffic and judged in the same way; a
configuration is left once its size alone costs more than what has been found), and simulated anew on other seeds, for
twice as long, under the platform's autoscaler. The manifests of three platforms are validated: KServe's against its CRD
(`--data`), Kubernetes' against the types of its package, and Ray Serve's against those of the Ray in `.ray` (which does
not go together with what else is installed; `make ray`). What is not there is not validated; `acceptance.csv` says so.

A finished case is kept in `work/` with the commit it was made from, and is not run again from that commit: a run that
was interrupted goes on where it stopped. `run.json` says of every case where it comes from.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.live_loop.rayhead import RAY
from pilotage.live.manifests import PLATFORMS
from pilotage.plan.advice import Plan, advise
from pilotage.plan.requirements import Model, Requirements
from pilotage.plan.trials import Configuration, Outcome, Trials, policy_of, surely_below
from pilotage.results import as_csv, provenance, write_whole
from pilotage.world.spec import decode, read_toml

CASES = Path(__file__).with_name("cases.toml")
RHYTHM_H = (
    8.0,
    2.0,
)  # start and length of the runs of cases with a daily rhythm: the steep part of the morning
JUDGE_SEED, JUDGE_RUNS = 900_000, 10
Documents = list[dict[str, Any]]  # manifests of one deployment
# reads a list of Ray Serve configurations, and says of each what is wrong with it
VALIDATE_RAY = """
import json, sys
from ray.serve.schema import ServeDeploySchema
found = []
for config in json.load(sys.stdin):
    try:
        ServeDeploySchema.model_validate(config)
        found.append(None)
    except ValueError as error:
        found.append(str(error))
json.dump(found, sys.stdout)
"""


def cases() -> list[tuple[Requirements, Model]]:
    raw = read_toml(CASES, "the cases")
    models = {model["name"]: model for model in raw["models"]}
    found = []
    for case in raw["cases"]:
        model = models[case["model"]] | {key: value for key, value in case.items() if key != "model"}
        spec = {key: raw[key] for key in ("pools", "environments")} | {"models": [model]}
        asked = decode(spec, Requirements, str(CASES))
        if not asked.models[0].steady:
            asked = asked.replace(start_h=RHYTHM_H[0], horizon_h=RHYTHM_H[1])
        found.append((asked, asked.models[0]))
    return found


def least(trials: Trials, c: Configuration) -> int:
    """Where the exhaustive search begins: a tenth below what could serve the requests in full batches at no wait."""
    return max(1, math.floor(0.9 * trials.fewest(c)))


def exhaustive(asked: Requirements, model: Model, seed: int) -> tuple[Outcome | None, int]:
    """The cheapest of all, and how many deployments were simulated; the price of the nodes themselves ends a search."""
    trials = Trials(asked, model, platform="kubernetes", seed=seed)
    best: Outcome | None = None
    for c in trials.configurations():
        if trials.variant(c).accuracy < model.min_accuracy:
            continue
        sizes = (
            list(map(float, range(least(trials, c), trials.most(c) + 1))) if model.steady else trials.sizes(c)
        )
        for size in sizes:
            if model.steady and best and trials.fixed_usd(c, int(size)) >= best.usd_per_hour * (1 - 1e-9):
                break
            outcome = trials.outcome(c, size)
            cheaper = best is None or outcome.usd_per_hour < best.usd_per_hour
            if cheaper and surely_below(outcome.missed, 1 - model.attainment):
                best = outcome
            if not model.steady and best and outcome.usd_per_hour >= best.usd_per_hour:
                break
    return best, len(trials.known)


def wrong_by_platform(made: Sequence[dict[str, Documents]], data: Path | None) -> dict[str, list[str | None]]:
    """What is wrong with the manifests of each case (None: nothing), of the platforms whose schema is here."""
    found: dict[str, list[str | None]] = {}
    schema = data / "schemas" / "kserve-inferenceservice-v1beta1.strict.schema.json.gz" if data else None
    if schema and schema.is_file():
        import jsonschema

        kserve = jsonschema.Draft202012Validator(json.loads(gzip.decompress(schema.read_bytes())))
        found["kserve"] = [_wrong(kserve.validate, one["kserve"][:1]) for one in made]
    try:
        from kubernetes import client

        kinds = {
            "Deployment": client.V1Deployment,
            "Service": client.V1Service,
            "HorizontalPodAutoscaler": client.V2HorizontalPodAutoscaler,
        }
        found["kubernetes"] = [
            _wrong(lambda d: kinds[d["kind"]].model_validate(d), one["kubernetes"]) for one in made
        ]
    except ImportError:
        pass
    if (RAY / "bin" / "python").exists():
        configs = json.dumps([one["ray-serve"][0] for one in made])
        command = [str(RAY / "bin" / "python"), "-c", VALIDATE_RAY]
        done = subprocess.run(command, input=configs, capture_output=True, text=True, check=True)
        found["ray-serve"] = json.loads(done.stdout)
    return found


def _wrong(check: Callable[[dict[str, Any]], Any], documents: Documents) -> str | None:
    try:
        for document in documents:
            check(document)
    except Exception as error:  # each package has its own
        return f"{type(error).__name__}: {error}"
    return None


def judged(k: int, asked: Requirements, model: Model, seed: int) -> dict[str, Any]:
    """The row of a case, and its manifests by platform."""
    began, cpu = time.perf_counter(), time.process_time()
    plan = advise(asked, model, seed=seed)
    took_s, took_cpu_s = time.perf_counter() - began, time.process_time() - cpu
    best, simulated = exhaustive(asked, model, seed)
    whole = {
        "case_seconds": f"{time.perf_counter() - began:.1f}",
        "case_cpu_seconds": f"{time.process_time() - cpu:.1f}",
    }
    row = {
        "case": k,
        "model": model.name,
        "seconds": f"{took_s:.1f}",
        "cpu_seconds": f"{took_cpu_s:.1f}",
        **whole,
    }
    if not isinstance(plan, Plan) or best is None:
        return {"row": row | {"plan": str(plan)}, "manifests": None}
    judge = Trials(asked, model, platform="kubernetes", seed=seed + JUDGE_SEED, runs=JUDGE_RUNS, longer=2.0)
    c = plan.chosen.configuration
    again = judge.run(c, plan.chosen.size, policy_of(plan.scaling), judge.start(c, plan.scaling))
    fixed = judge.outcome(c, plan.chosen.size) if model.steady else again
    row = {
        "case": k, "model": model.name, "traffic": model.traffic.label, "slo_ms": model.slo_ms,
        "attainment": model.attainment, "configurations": len(judge.configurations()),
        "pool": c.pool, "variant": c.variant, "max_batch": c.max_batch, "batch_wait_ms": c.batch_wait_ms,
        "size": plan.chosen.size, "usd_per_hour": f"{plan.chosen.usd_per_hour:.5g}",
        "optimum_usd_per_hour": f"{best.usd_per_hour:.5g}",
        "over_optimum": f"{plan.chosen.usd_per_hour / best.usd_per_hour - 1:.5f}",
        "deployments_simulated": simulated, "in_time_other_seeds": f"{1 - again.missed.mean():.5f}",
        "in_time_fixed": f"{1 - fixed.missed.mean():.5f}",
        "usd_with_autoscaler": f"{again.usd_per_hour:.5g}",
        "meets": bool(again.missed.mean() <= 1 - model.attainment
                      and fixed.missed.mean() <= 1 - model.attainment),
        "pareto": len(plan.pareto), "seconds": f"{took_s:.1f}", "cpu_seconds": f"{took_cpu_s:.1f}", **whole,
    }  # fmt: skip
    return {"row": row, "manifests": {platform: plan.manifests(platform) for platform in PLATFORMS}}


def kept_or_made(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `path` holds, if it is of this commit and nothing was changed; or what is made now, and kept there."""
    started = datetime.now(UTC)
    now = provenance("plan", sys.argv, started, {})
    if path.is_file():
        known: dict[str, Any] = json.loads(path.read_text())
        if known["commit"] == now["commit"] != "" and not (known["dirty"] or now["dirty"]):
            print(f"{path} is of this commit", flush=True)
            return known
    made = make() | {name: now[name] for name in ("commit", "dirty", "started_at")}
    made["load_average"] = os.getloadavg()
    write_whole(path, json.dumps(made, indent=1) + "\n")
    print(made["row"], flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("PILOTAGE_DATA"), help="folder with schemas/"
    )
    parser.add_argument("--out", type=Path, default=Path("results/plan"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="every fifth case")
    options = parser.parse_args()
    started, lasted = datetime.now(UTC), {}
    work = options.out / "work" / f"seed-{options.seed}"
    work.mkdir(parents=True, exist_ok=True)
    made = []
    for k, (asked, model) in list(enumerate(cases(), 1))[:: 5 if options.quick else 1]:
        began = time.perf_counter()
        made.append(
            kept_or_made(work / f"case-{k}.json", lambda k=k, a=asked, m=model: judged(k, a, m, options.seed))
        )
        lasted[f"case {k}"] = round(time.perf_counter() - began, 1)
    rows = [one["row"] for one in made]
    deployed = [one for one in made if one["manifests"]]
    wrong = wrong_by_platform(
        [one["manifests"] for one in deployed], Path(options.data) if options.data else None
    )
    for k, one in enumerate(deployed):
        faults = {platform: found[k] for platform, found in wrong.items() if found[k] is not None}
        for platform, why in faults.items():
            print(f"case {one['row']['case']}: {platform}: {why}", flush=True)
        one["row"]["schemas_passed"] = " ".join(p for p in wrong if p not in faults)
    planned = [one["row"] for one in deployed]
    over = np.array([float(row["over_optimum"]) for row in planned])
    met = sum(row["meets"] for row in planned)
    slowest, slowest_cpu = (max(float(row[name]) for row in rows) for name in ("seconds", "cpu_seconds"))
    lines: list[tuple[str, str, Any, bool]] = [
        ("cost over the exhaustive optimum, worst case", "<= 0.03", float(over.max()), over.max() <= 0.03),
        ("cases that meet the objective on other seeds", f"{len(rows)}", met, met == len(rows)),
        ("seconds per plan, slowest", "<= 20", slowest, slowest <= 20),
        ("processor seconds per plan, slowest", "<= 40 (20 s on 2 cores)", slowest_cpu, slowest_cpu <= 40),
    ]
    for platform in PLATFORMS:
        if platform in wrong:
            passed = wrong[platform].count(None)
            lines.append(
                (f"manifests that pass {platform}'s schema", f"{len(rows)}", passed, passed == len(rows))
            )
        else:
            lines.append(
                (f"manifests that pass {platform}'s schema", f"{len(rows)}", "schema not here", False)
            )
    acceptance = [
        {"line": line, "asked": want, "measured": got if isinstance(got, (int, str)) else f"{got:.5g}",
         "low": "", "high": "", "met": bool(ok)}
        for line, want, got, ok in lines
    ]  # fmt: skip
    for row in acceptance:
        print(row)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_whole(options.out / "table.csv", as_csv([dict.fromkeys(columns, "") | row for row in rows]))
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    record = provenance("plan", sys.argv, started, lasted)
    record |= {"seed": options.seed, "quick": options.quick, "load_average": os.getloadavg()}
    record["cases"] = {
        one["row"]["case"]: {name: one[name] for name in ("commit", "dirty", "started_at", "load_average")}
        for one in made
    }
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
