"""Learned scaling of LLM services against tuned rules, on `llm-chat` and `llm-mixed`.

`run.py --data DIR --out DIR`: (1) two training runs fine-tune the shipped policy on what hindsight tells of windows
of LLM traffic: the 18 minutes of the Azure trace before `llm-chat` begins, at other rates, ServeGen's clients and
synthetic traffic, with log-normal tokens; the one that is better on windows of validation is kept. (2) Everybody is
tuned on training windows, in dollars. On `llm-chat` rules have so many trials in the engine; `anticipate` and the
learned policies, whose levels hindsight can price, have theirs there, and stay as they are where that is better on
validation. On `llm-mixed` all have the same trials in the engine. The learned policy and `anticipate` also choose batch
limits and tokens of an iteration: those of the shipped `configured` network, which has seen neither service
(`experiments/scaling/configure.py --llm`), or those of the deployment, whichever is cheaper on the training windows,
scaled by two numbers, which have as many trials as a rule has on `llm-chat`, and half of the policy's own on
`llm-mixed`. Production rules leave the servers as they are deployed. What is cheapest in dollars need not serve as many
in time, so the learned policy's margin is then raised until it does as well on the training windows as those that it
is compared with: the production rule that is cheapest there, and `anticipate`, both as tuned. (3) All meet the
environments' own traffic, none of which was trained or tuned on: the rest of the trace on paired seeds, and another
day of `llm-mixed`. Which learned policy is compared was chosen by (2); the rule is the one that turns out cheapest in
(3), and beside it stands `anticipate`, which reads the learned policy's own features, with or without chosen batches,
whichever is cheaper. Intervals are 95 %, by bootstrap over paired runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from pilotage.agents.domain import busy_rps, capacity_rps, log_uniform, sized, traffic_at_random
from pilotage.agents.hindsight import Settings, joined, look_back, ratios, search, train
from pilotage.agents.tune import candidate_of, space, tune
from pilotage.control.configuring import Configured
from pilotage.control.foresight import Anticipate, Foresight
from pilotage.control.guard import Guard
from pilotage.control.learned import CONFIGURED, policy_from
from pilotage.control.policy import Policy
from pilotage.control.scaling import describe, parse
from pilotage.engine.cluster import World, recorded
from pilotage.engine.run import Run, simulate
from pilotage.evaluate import interval, ratio_interval
from pilotage.metrics import attainment
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Scenario, load
from pilotage.world.arrivals import Gamma, Scale, Segment, Splice, Traffic
from pilotage.world.tokens import RandomTokens

RULES = (
    "saturation",
    "hpa:metric=kv_usage",
    "wva",
    "predictive",
)  # what is run in production, and our own forecast
OWN = "anticipate"  # the rule on the features of the learned policy
SHIPPED, TRAINED = "learned", "learned on LLM services"
CHAT, MIXED = "llm-chat", "llm-mixed"
DAY_S, HOUR_S = 86400.0, 3600.0
RUNS = 2  # of training
WINDOWS = {"train": 16, "validate": 6}  # of each run
SEARCHED = 40  # trials in hindsight
TRIALS = {CHAT: 10, MIXED: 20}  # in the engine
TUNED_ON = 8  # training windows of the chat service
# hours of the first day; the environment's own begin on the second
MIXED_TRAINING_H = (1.0, 5.0, 9.0, 13.0, 17.0, 21.0)
MIXED_TEST_H = (31.0, 25.0, 36.0, 41.0)  # the first is where the environment begins
SEEDS = {CHAT: 6, MIXED: len(MIXED_TEST_H)}  # paired test runs
TEST_SEED = 800_000
AS_MANY = "tuned, as many in time"
MOST, MARGIN_STEP = 1.5, 0.1  # margins, in replicas
CHOSEN = "batches chosen"


def training_scenario(data: Path) -> Scenario:
    """The chat service with tokens of the same means, a quarter of an hour at a time."""
    scenario = load(CHAT, data)
    tokens = RandomTokens(
        prompt_mean=1155.0, prompt_cv=0.95, output_mean=211.0, output_cv=0.8, max_tokens=8000
    )
    service = scenario.services[0].replace(tokens=tokens, max_replicas=16)
    return scenario.replace(services=(service,), horizon_h=0.25)


def window(rng: np.random.Generator, data: Path, scenario: Scenario, kind: str) -> World:
    """A window of the trace's past at a third to 4/3 of the rate, or of traffic that needs 2 to 9 replicas at most."""
    if kind == "past":
        own = scenario.services[0].traffic
        assert isinstance(own, Scale)
        past = own.replace(factor=own.factor * log_uniform(rng, 1 / 3, 4 / 3))
        # all of it lies before the environment's own start
        start_s = float(round(rng.uniform(30, 1080 - scenario.horizon_h * HOUR_S)))
        return World(int(rng.integers(2**31)), start_s, (past,))
    start_s = 60 * round(rng.uniform(1.1, 6.5) * DAY_S / 60)
    end_s = start_s + scenario.horizon_h * HOUR_S + 60
    replicas, capacity = log_uniform(rng, 2, 9), capacity_rps(scenario)
    if kind == "synthetic":
        of = str(rng.choice(["diurnal", "diurnal", "flash"]))
        traffic = traffic_at_random(rng, of, replicas * capacity, end_s)
    else:
        source = clients(rng, data, start_s - 2 * HOUR_S, end_s)
        traffic = sized(source, busy_rps(source, data, start_s - HOUR_S, end_s), replicas, capacity)
    return World(int(rng.integers(2**31)), start_s, (traffic,))


def clients(rng: np.random.Generator, data: Path, from_s: float, to_s: float) -> Traffic:
    """Some clients of ServeGen's larger model together: their rates of every 10 minutes, and gaps as irregular as
    theirs are on average."""
    table = pd.read_csv(data / "arrivals/servegen/language_m-mid_rates_day00-06.csv.gz")
    table = table[(table["t_s"] > from_s - 600) & (table["t_s"] < to_s)]
    busy = table.groupby("client")["rate_rps"].sum()
    chosen = rng.choice(busy.index[busy > busy.quantile(0.5)], int(rng.integers(1, 7)), replace=False)
    rows = table[table["client"].isin(chosen)]
    segments = [Segment(source=Gamma(rate_rps=1e-3, cv=1.0), duration_s=600 * max(from_s // 600, 1))]
    for t in np.arange(600 * max(from_s // 600, 1), to_s + 600, 600):
        now = rows[rows["t_s"] == t]
        rate = max(float(now["rate_rps"].sum()), 1e-3)
        share = now["rate_rps"] / rate
        cv = float(np.sqrt((share * now["cv"] ** 2).sum())) if len(now) else 1.0
        segments.append(Segment(source=Gamma(rate_rps=rate, cv=float(np.clip(cv, 0.5, 4))), duration_s=600.0))
    return Splice(segments=tuple(segments))


def windows(data: Path, seed: int, run: int, split: str, count: int) -> list[World]:
    rng = np.random.default_rng([seed, run, len(split)])
    kinds = ("past", "synthetic", "past", "clients")
    return [window(rng, data, training_scenario(data), kinds[k % len(kinds)]) for k in range(count)]


def learn(data: Path, seed: int, counts: dict[str, int], epochs: int, run: int) -> dict[str, Any]:
    """One training run: hindsight of its own windows, then the shipped network goes on learning."""
    began, cpu = time.perf_counter(), time.process_time()
    scenario = training_scenario(data)
    tables = {
        split: look_back(scenario, windows(data, seed, run, split, count)) for split, count in counts.items()
    }
    start = policy_from(SHIPPED)
    assert isinstance(start, Foresight)
    settings = Settings(
        epochs=epochs, windows_per_batch=6, learning_rate=5e-4, dropout=0.05, ticks=scenario.ticks,
        price_spread=0.4, seed=run,
    )  # fmt: skip
    policy, curve = train(tables["train"], tables["validate"], settings, start=start.network)
    lasted = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - began}
    print(f"training run {run}: {curve[0]:.3f} -> {min(curve):.3f} over hindsight, {lasted}", flush=True)
    return {"policy": policy, "curve": curve, "tables": tables, **lasted}


def tuning_windows(env: str, data: Path, seed: int) -> tuple[Scenario, list[list[World]]]:
    """What everybody is tuned on, in groups."""
    if env == CHAT:
        scenario = training_scenario(data)
        found = windows(data, seed, 0, "train", TUNED_ON)
    else:
        scenario = load(MIXED).replace(horizon_h=0.6)
        found = [World(seed + k, h * HOUR_S) for k, h in enumerate(MIXED_TRAINING_H)]
    return scenario, [[world] for world in recorded(scenario, found)]


def tuned(
    data: Path, seed: int, trials: dict[str, int], task: tuple[str, str, Policy, Policy | None]
) -> tuple[Policy, list[float]]:
    """The best of a contender's trials on an environment's training windows."""
    env, name, policy, start = task
    began, cpu = time.perf_counter(), time.process_time()
    scenario, groups = tuning_windows(env, data, seed)
    apart = env == MIXED and isinstance(
        policy, Foresight | Anticipate | Configured
    )  # levels, and then batches
    count = trials[env] // (2 if apart else 1)
    study = tune(policy, scenario, groups, trials=count, seed=seed, starts=[start] if start else [])
    best = candidate_of(policy, study.best_params)
    values = [float(t.values[0]) for t in study.trials if t.values]
    print(
        f"{env}: {name}: {values[0]:.2f} -> {min(values):.2f} $, {time.process_time() - cpu:.0f} s CPU, "
        f"{time.perf_counter() - began:.0f} s: {describe(best)}",
        flush=True,
    )
    return best, values


def trained_on(data: Path, seed: int, task: tuple[str, str, Policy]) -> tuple[float, float]:
    """Dollars and share in time of one contender on an environment's training windows."""
    env, _, policy = task
    scenario, groups = tuning_windows(env, data, seed)
    worlds = [world for group in groups for world in group]
    runs = simulate(scenario, [policy] * len(worlds), worlds, guard=Guard())
    return sum(run.total_usd for run in runs), in_time(runs)


def choosing(policy: Policy, network: bool) -> Configured:
    """The same policy of replicas, which chooses the batches of LLM services as well: by the shipped network, or those
    of the deployment, to be scaled."""
    shipped = policy_from(CONFIGURED)
    assert isinstance(shipped, Configured)
    assert isinstance(policy, Foresight | Anticipate)
    return Configured(llm_network=shipped.llm_network if network else None, replicas=policy)


def chosen_batches(
    data: Path, seed: int, trials: dict[str, int], task: tuple[str, str, Policy]
) -> tuple[bool, Configured, list[float]]:
    """The cheaper of both ways to choose batches on an environment's training windows, with the best of its trials."""
    env, name, policy = task
    ways = {network: choosing(policy, network) for network in (False, True)}
    usd = {network: trained_on(data, seed, (env, name, way))[0] for network, way in ways.items()}
    network = min(usd, key=lambda network: usd[network])
    best, values = tuned(data, seed, trials, (env, f"{name}, {CHOSEN}", ways[network], None))
    assert isinstance(best, Configured)
    return network, best, values


def with_margin(policy: Configured, margin: float) -> Configured:
    assert isinstance(policy.replicas, Foresight)
    return policy.replace(replicas=policy.replicas.replace(margin=margin))


def matched(data: Path, seed: int, task: tuple[str, Configured, float]) -> tuple[float, float]:
    """The least margin of a learned policy with which so large a share is in time on an environment's training windows,
    or the one that serves most in time, and the share."""
    env, policy, asked = task
    assert isinstance(policy.replicas, Foresight)
    best = policy.replicas.margin, 0.0
    for margin in np.append(np.arange(policy.replicas.margin, MOST, MARGIN_STEP), MOST).tolist():
        _, reached = trained_on(data, seed, (env, "", with_margin(policy, margin)))
        print(f"{env}: margin {margin:.3f}: {reached:.6f} in time, of {asked:.6f}", flush=True)
        best = max(best, (margin, reached), key=lambda found: found[1])
        if reached >= asked:
            break
    return best


def test_worlds(env: str, data: Path, seed: int, count: int) -> tuple[Scenario, list[World]]:
    scenario = load(env, data)
    hours = MIXED_TEST_H if env == MIXED else (None,) * count
    found = [
        World(TEST_SEED + 1000 * seed + k, None if hour is None else hour * HOUR_S)
        for k, hour in enumerate(hours[:count])
    ]
    return scenario, recorded(scenario, found)


def judged(data: Path, seed: int, seeds: dict[str, int], task: tuple[str, str, Policy]) -> list[Run]:
    """One policy over an environment's test runs."""
    env, name, policy = task
    scenario, worlds = test_worlds(env, data, seed, seeds[env])
    runs = simulate(scenario, [policy] * len(worlds), worlds, guard=Guard(), label=name)
    print(f"{env}: {name}: {[round(run.total_usd, 2) for run in runs]}", flush=True)
    return runs


def in_time(runs: Sequence[Run]) -> float:
    """Share of all requests of some runs that met every objective."""

    def count(*names: str) -> float:
        return float(sum(run.totals[name].sum() for run in runs for name in names))

    served = count("served")
    lost = count("rejected", "timed_out", "abandoned", "lost", "overdue")
    return attainment(served - count("late"), served + lost)


def compared(env: str, learned: str, runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """The acceptance lines of an environment: learned against the cheapest rule, and against the rule on its own
    features."""
    usd = {name: np.array([run.total_usd for run in of]) for name, of in runs.items()}
    share = {name: np.array([in_time([run]) for run in of]) for name, of in runs.items()}
    lines = []
    for rules in ([f"{name}, tuned" for name in RULES], [f"{OWN}, tuned", f"{OWN}, tuned, {CHOSEN}"]):
        best = min(rules, key=lambda name: usd[name].mean())
        ratio = ratio_interval(usd[learned], usd[best])
        saved = {"mean": 1 - ratio["mean"], "low": 1 - ratio["high"], "high": 1 - ratio["low"]}
        more = interval(share[learned] - share[best])
        lines += [
            (f"{env}: saving of '{learned}' over '{best}'", "> 0, interval", saved, saved["low"] > 0),
            (f"{env}: requests in time, '{learned}' less '{best}'", ">= 0", more, more["mean"] >= 0),
        ]
    return [
        {"line": line, "asked": asked, "measured": f"{of['mean']:.5g}", "low": f"{of['low']:.5g}",
         "high": f"{of['high']:.5g}", "met": bool(met)}
        for line, asked, of, met in lines
    ]  # fmt: skip


def learn_and_tune(
    pool: ProcessPoolExecutor, options: argparse.Namespace, envs: tuple[str, ...], lap: Callable[[str], None]
) -> dict[str, Any]:
    """Stages (1) and (2); what stage (3) needs of them, in plain values."""
    data, seed, quick = options.data.resolve(), options.seed, options.quick
    counts = {"train": 4, "validate": 2} if quick else WINDOWS
    trials = dict.fromkeys(TRIALS, 2) if quick else TRIALS
    contenders: dict[str, Policy] = {name: parse(name) for name in (*RULES, OWN)}
    contenders[SHIPPED] = policy_from(SHIPPED)
    trainings: list[dict[str, Any]] = []
    if options.policy is None:
        trainings = list(pool.map(partial(learn, data, seed, counts, 3 if quick else 30), range(RUNS)))
        table, validation = (joined([t["tables"][split] for t in trainings]) for split in counts)

        def validated(policy: Foresight | Anticipate) -> float:
            return float(np.exp(np.log(ratios(policy, validation)).mean()))

        contenders[TRAINED] = trained = min((t["policy"] for t in trainings), key=validated)
        write_whole(options.out / "policy.json", msgspec.json.encode(trained).decode())
    elif options.policy != SHIPPED:
        contenders[TRAINED] = policy_from(options.policy)
    lap("train")

    best: dict[tuple[str, str], tuple[Policy, list[float]]] = {}
    searched, value = {}, {}
    for name, policy in contenders.items():
        if trainings and isinstance(policy, Foresight | Anticipate):
            searched[name], values = search(policy, table, trials=4 if quick else SEARCHED, seed=seed)
            better = min((policy, searched[name]), key=validated)
            best[CHAT, name], value[CHAT, name] = (better, values), validated(better)
            print(f"{name}: {validated(policy):.4f} over hindsight as it is, {validated(better):.4f} tuned")
    tasks = [
        (env, name, policy, searched.get(name) if name == OWN else None)
        for env in envs
        for name, policy in contenders.items()
        if (env, name) not in best
    ]
    found = list(pool.map(partial(tuned, data, seed, trials), tasks))
    best |= {(env, name): one for (env, name, *_), one in zip(tasks, found, strict=True)}
    value |= {where: min(values) for where, (_, values) in best.items() if where not in value}
    learned = [name for name in (SHIPPED, TRAINED) if name in contenders]
    lap("tune")

    chosen = {env: min(learned, key=lambda name: value[env, name]) for env in envs}
    choosers = [(env, name) for env in envs for name in (OWN, chosen[env])]
    scaled = dict(
        zip(
            choosers,
            pool.map(partial(chosen_batches, data, seed, trials), [(*of, best[of][0]) for of in choosers]),
            strict=True,
        )
    )
    lap("batches")

    rules = [(env, name, best[env, name][0]) for env in envs for name in (*RULES, OWN)]
    on_training = dict(
        zip([one[:2] for one in rules], pool.map(partial(trained_on, data, seed), rules), strict=True)
    )
    cheapest = {env: min(RULES, key=lambda name: on_training[env, name][0]) for env in envs}
    asked = {env: max(on_training[env, name][1] for name in (cheapest[env], OWN)) for env in envs}
    raised = pool.map(
        partial(matched, data, seed),
        [(env, scaled[env, chosen[env]][1], asked[env]) for env in envs],
    )
    lap("match")
    return {
        "training": [{k: t[k] for k in ("cpu_s", "wall_s", "curve")} for t in trainings],
        "trials": {env: {name: best[env, name][1] for name in contenders} for env in envs},
        "chosen": chosen,
        "batches": {
            env: {
                name: {
                    "network": network,
                    "trials": values,
                    "fields": {f: getattr(best, f) for f in space(best)},
                }
                for (where, name), (network, best, values) in scaled.items()
                if where == env
            }
            for env in envs
        },
        "matched": {
            env: {"rule": cheapest[env], "in_time_asked": asked[env], "margin": margin, "in_time": reached}
            for env, (margin, reached) in zip(envs, raised, strict=True)
        },
        "fields": {
            env: {
                name: {field: getattr(best[env, name][0], field) for field in space(policy)}
                for name, policy in contenders.items()
            }
            for env in envs
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/llm_scaling"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--env", choices=(CHAT, MIXED), help="only this one")
    parser.add_argument(
        "--policy",
        help="with --env llm-mixed: a policy.json, or `learned`: nothing is trained, and everybody starts as it is",
    )
    parser.add_argument(
        "--tuned", action="store_true", help="judge what policy.json and tuned.json in --out say"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    seeds = {CHAT: 2, MIXED: 2} if options.quick else SEEDS
    envs = (CHAT, MIXED) if options.env is None else (options.env,)
    if options.policy and envs != (MIXED,):
        parser.error(
            "--policy belongs to --env llm-mixed: what is tuned on llm-chat needs the training's tables"
        )
    data, started, began, lasted = options.data.resolve(), datetime.now(UTC), time.perf_counter(), {}

    def lap(name: str) -> None:
        lasted[name] = round(time.perf_counter() - began - sum(lasted.values()), 1)

    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "tuned.json"
    with ProcessPoolExecutor(options.workers) as pool:
        if not options.tuned:
            found = learn_and_tune(pool, options, envs, lap)
            write_whole(kept, json.dumps(found, indent=1) + "\n")
        found = json.loads(kept.read_text())
        base = {SHIPPED: SHIPPED, TRAINED: options.policy or str(options.out / "policy.json")}
        plans: list[tuple[str, str, Policy]] = []
        for env in envs:
            for name, fields in found["fields"][env].items():
                policy: Policy = policy_from(base.get(name, name)).replace(**fields)
                plans.append((env, f"{name}, tuned", policy))
                if (batches := found["batches"][env].get(name)) is not None:
                    scaled = choosing(policy, batches["network"]).replace(**batches["fields"])
                    plans.append((env, f"{name}, tuned, {CHOSEN}", scaled))
                if name == found["chosen"][env]:
                    as_many = with_margin(scaled, found["matched"][env]["margin"])
                    plans.append((env, f"{name}, {AS_MANY}", as_many))
            plans.append((env, f"{SHIPPED}, as it is", policy_from(SHIPPED)))
        judge = partial(judged, data, options.seed, seeds)
        runs = {plan[:2]: of for plan, of in zip(plans, pool.map(judge, plans), strict=True)}
        lap("judge")

    rows, acceptance = [], []
    for (env, name, policy), of in zip(plans, runs.values(), strict=True):
        items = np.mean([run.usd.sum(axis=0) for run in of], axis=0)
        total = interval(np.array([run.total_usd for run in of]))
        rows.append(
            {
                "env": env, "policy": name, "runs": len(of), "usd": f"{total['mean']:.5g}",
                "low": f"{total['low']:.5g}", "high": f"{total['high']:.5g}", "node_usd": f"{items[0]:.5g}",
                "late_usd": f"{items[1]:.5g}", "dropped_usd": f"{items[2]:.5g}",
                "in_time": f"{np.mean([in_time([run]) for run in of]):.6f}", "parameters": describe(policy),
            }
        )  # fmt: skip
    for env in envs:
        mine = {name: of for (where, name), of in runs.items() if where == env}
        acceptance += compared(env, f"{found['chosen'][env]}, {AS_MANY}", mine)
    for k, one in enumerate(found["training"]):
        acceptance.append(
            {"line": f"training run {k} on {CHAT}'s service, minutes on one core", "asked": "<= 10",
             "measured": f"{one['cpu_s'] / 60:.3g}", "low": "", "high": "", "met": one["cpu_s"] <= 600}
        )  # fmt: skip
    for row in (*rows, *acceptance):
        print(row)
    write_whole(options.out / "table.csv", as_csv(rows))
    write_whole(options.out / "acceptance.csv", as_csv(acceptance))
    record = provenance("llm_scaling", sys.argv, started, lasted)
    record |= {"seed": options.seed, "test_runs": {env: seeds[env] for env in envs}}
    record["scenarios"] = {env: load(env, data).digest() for env in envs}
    write_whole(options.out / "run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
