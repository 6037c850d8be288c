"""Does `pilotage plan` find the cheapest deployment, does it hold, and how long does it take?

20 cases (`cases.toml`): pools with the prices of real machines, three models of several builds, steady, bursty and
daily load. Every plan is set beside the exhaustive optimum (every size of every configuration that the file allows,
from a tenth below what full batches could carry, simulated on the same traffic and judged in the same way; a
configuration is left once its size alone costs more than what has been found), and simulated anew on other seeds, for
twice as long, under the platform's autoscaler. The manifests of three platforms are validated: KServe's against its CRD
(`--data`), Kubernetes' and Ray Serve's against the types of their packages, where these are installed.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

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


def validators(data: Path | None) -> dict[str, Callable[[list[dict[str, Any]]], None]]:
    """What checks the manifests of a platform, of those whose schema is here."""
    found: dict[str, Callable[[list[dict[str, Any]]], None]] = {}
    schema = data / "schemas" / "kserve-inferenceservice-v1beta1.strict.schema.json.gz" if data else None
    if schema and schema.is_file():
        import jsonschema

        kserve = jsonschema.Draft202012Validator(json.loads(gzip.decompress(schema.read_bytes())))
        found["kserve"] = lambda documents: kserve.validate(documents[0])
    try:
        from kubernetes import client

        kinds = {
            "Deployment": client.V1Deployment,
            "Service": client.V1Service,
            "HorizontalPodAutoscaler": client.V2HorizontalPodAutoscaler,
        }
        found["kubernetes"] = lambda documents: [kinds[d["kind"]].model_validate(d) for d in documents]
    except ImportError:
        pass
    try:
        from ray.serve.schema import ServeDeploySchema

        found["ray-serve"] = lambda documents: ServeDeploySchema.model_validate(documents[0])
    except ImportError:
        pass
    return found


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    """What there is so far."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_whole(out / "table.csv", as_csv([dict.fromkeys(columns, "") | row for row in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("PILOTAGE_DATA"), help="folder with schemas/"
    )
    parser.add_argument("--out", type=Path, default=Path("results/plan"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="every fifth case")
    parser.add_argument(
        "--resume", action="store_true", help="keep the cases that stand in table.csv already"
    )
    options = parser.parse_args()
    started, lasted = datetime.now(UTC), {}
    options.out.mkdir(parents=True, exist_ok=True)
    checks = validators(Path(options.data) if options.data else None)
    rows: list[dict[str, Any]] = []
    if options.resume and (options.out / "table.csv").is_file():
        with (options.out / "table.csv").open() as file:
            rows = list(csv.DictReader(file))
    taken_over = [int(row["case"]) for row in rows]
    for k, (asked, model) in list(enumerate(cases()))[:: 5 if options.quick else 1]:
        if k + 1 in taken_over:
            continue
        began, cpu = time.perf_counter(), time.process_time()
        plan = advise(asked, model, seed=options.seed)
        took_s, took_cpu_s = time.perf_counter() - began, time.process_time() - cpu
        best, simulated = exhaustive(asked, model, options.seed)
        whole = {
            "case_seconds": f"{time.perf_counter() - began:.1f}",
            "case_cpu_seconds": f"{time.process_time() - cpu:.1f}",
        }
        if not isinstance(plan, Plan) or best is None:
            rows.append(
                {"case": k + 1, "model": model.name, "plan": str(plan), "seconds": f"{took_s:.1f}", **whole}
            )
            print(rows[-1], flush=True)
            lasted[f"case {k + 1}"] = round(time.perf_counter() - began, 1)
            continue
        for platform, check in checks.items():
            check(plan.manifests(platform))
        judge = Trials(
            asked, model, platform="kubernetes", seed=options.seed + JUDGE_SEED, runs=JUDGE_RUNS, longer=2.0
        )
        c = plan.chosen.configuration
        again = judge.run(c, plan.chosen.size, policy_of(plan.scaling), judge.start(c, plan.scaling))
        fixed = judge.outcome(c, plan.chosen.size) if model.steady else again
        rows.append(
            {
                "case": k + 1, "model": model.name, "traffic": model.traffic.label, "slo_ms": model.slo_ms,
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
                "pareto": len(plan.pareto), "seconds": f"{took_s:.1f}", "cpu_seconds": f"{took_cpu_s:.1f}",
                **whole, "schemas_passed": " ".join(checks),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
        lasted[f"case {k + 1}"] = round(time.perf_counter() - began, 1)
        _write(options.out, rows)
    planned = [row for row in rows if row.get("over_optimum")]
    over = np.array([float(row["over_optimum"]) for row in planned])
    met = sum(str(row["meets"]) == "True" for row in planned)
    lines = [
        ("cost over the exhaustive optimum, worst case", "<= 0.03", float(over.max()), over.max() <= 0.03),
        ("cases that meet the objective on other seeds", f"{len(rows)}", met, met == len(rows)),
        ("seconds per plan, slowest", "<= 20", max(float(r["seconds"]) for r in rows),
         max(float(r["seconds"]) for r in rows) <= 20),
        ("processor seconds per plan, slowest", "<= 40 (20 s on 2 cores)",
         max(float(r.get("cpu_seconds") or math.inf) for r in rows),
         max(float(r.get("cpu_seconds") or math.inf) for r in rows) <= 40),
    ]  # fmt: skip
    for platform in PLATFORMS:
        passed = sum(platform in r["schemas_passed"].split() for r in planned)
        lines.append(
            (f"manifests that pass {platform}'s schema", f"{len(rows)}",
             passed if platform in checks else f"{passed}; schema not installed", passed == len(rows))
        )  # fmt: skip
    acceptance = [
        {"line": line, "asked": want, "measured": got if isinstance(got, (int, str)) else f"{got:.5g}",
         "low": "", "high": "", "met": bool(ok)}
        for line, want, got, ok in lines
    ]  # fmt: skip
    for row in acceptance:
        print(row)
    _write(options.out, rows)
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    record = provenance("plan", sys.argv, started, lasted)
    record |= {
        "taken_over": taken_over,
        "seed": options.seed,
        "quick": options.quick,
        "load_average": os.getloadavg(),
    }
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
