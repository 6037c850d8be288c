"""Learned choice of pool, variant, batch limit and batch wait, on deployments and windows that it was not trained on.

`configure.py --out DIR` prices candidates of deployments at random with the shipped policy of replicas
(`pilotage.agents.configuring`), trains the network on them and judges it on fresh deployments: dollars of the learned
choice, run as a policy that orders what it chose, over those of the same policy of replicas with the configuration as
deployed, with the one that a rule of thumb picks (full batches within half of the objective, then the least rent), and
with the best fixed one in hindsight, of all candidates. The first quarter of an hour, in which the policy deploys
what it chose and the others have it already, does not count for anybody. With `--llm` the same for LLM services, whose
iterations have a budget of tokens in the place of a wait; of their candidates `LLM_PRICED` are drawn by chance.
Intervals are 95 %, by bootstrap over deployments. `--policy FILE` trains nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from pilotage.agents.configuring import (
    Priced,
    Settings,
    deployment_at_random,
    llm_deployment_at_random,
    priced,
    regrets,
    rule_of_thumb,
    train,
)
from pilotage.control.configuring import Configured
from pilotage.control.foresight import Foresight
from pilotage.control.guard import Guard
from pilotage.control.learned import CONFIGURED, SHIPPED, policy_from
from pilotage.engine.run import bill, simulate
from pilotage.evaluate import interval
from pilotage.results import as_csv, provenance, write_whole
from pilotage.scenario import Scenario

TEST, TEST_H, WARM_UP_H, AT_ONCE = 24, 1.75, 0.25, 4
TRAIN_SEED, TEST_SEED = 3_000, 800_000
QUICK = Settings(services=16, validation=8, candidates=6, hours=0.5, epochs=60)
# LLM services take longer to simulate, and have more to choose from
LLM = Settings(services=400, validation=60, candidates=14, hours=0.4, epochs=160, weight_decay=1.0)
LLM_TEST_H, LLM_PRICED = 0.75, 36


def stem(llm: bool) -> str:
    """How the names of what is written begin."""
    return "configure_llm" if llm else "configure"


def drawn(llm: bool, seed: int, numbers: range, hours: float, start_h: float) -> list[Scenario]:
    """Deployments at random, each of a generator of its own."""
    draw = llm_deployment_at_random if llm else deployment_at_random
    return [draw(np.random.default_rng([seed, k]), hours).replace(start_h=start_h) for k in numbers]


def learned_from(
    llm: bool, seed: int, settings: Settings, replicas: Foresight, work: Path, task: tuple[int, int, str]
) -> list[Priced]:
    """What candidates of some deployments, of training or validation, cost."""
    k, count, what = task
    began = time.perf_counter()
    return priced(
        drawn(llm, seed + k, range(count), settings.hours, 30.0), replicas, seed + k, most=settings.candidates,
        kept=work / f"{stem(llm)}-{what}-{settings.seed}-{count}.json",
        progress=lambda n: print(f"{what}: {n} candidates, {time.perf_counter() - began:.0f} s", flush=True),
    )  # fmt: skip


def live_usd(policy: Configured, one: Priced) -> float:
    """Dollars of the policy in the engine, on the deployment with all its pools and variants."""
    empty = one.scenario.services[0].replace(
        initial_replicas=0
    )  # what moving there costs is not the question
    scenario = one.scenario.replace(services=(empty,))
    run = simulate(scenario, [policy], [one.world], guard=Guard(), keep_timeline=True)[0]
    assert run.timeline is not None
    return float(bill(run.timeline[round(WARM_UP_H * 3600 / scenario.tick_s) :], scenario).sum())


def judge(
    llm: bool,
    policy: Configured,
    replicas: Foresight,
    seed: int,
    count: int,
    hours: float,
    work: Path,
    first: int,
) -> list[dict]:
    """What is compared, in dollars, on a few of the test's deployments."""
    numbers = range(first, min(first + AT_ONCE, count))
    tests = priced(
        drawn(llm, TEST_SEED + seed, numbers, hours, 54.0), replicas, TEST_SEED + seed + first,
        most=LLM_PRICED if llm else None, warm_up_h=WARM_UP_H,
        kept=work / f"{stem(llm)}-test-{seed}-{hours:g}-{first}.json",
    )  # fmt: skip
    rows = []
    for k, one in zip(numbers, tests, strict=True):
        at = {option: float(usd) for option, usd in zip(one.options, one.usd, strict=True)}
        chosen = policy.choose(one.situation, one.options)
        best = min(at, key=lambda option, at=at: at[option])
        paid = {
            "deployed": at[one.options[0]],
            "rule_of_thumb": at[rule_of_thumb(one.situation, one.options)],
            "chosen_once": at[chosen],
            "configured": live_usd(policy, one),
            "best_fixed": at[best],
        }
        rows.append(
            {"deployment": k, "candidates": len(at)}
            | {f"{name}_usd": f"{value:.5g}" for name, value in paid.items()}
            | {f"{name}_is": f"{o.variant} on {o.pool}; {o.max_batch} "
               + (f"within {1e3 * o.batch_wait_s:.0f} ms" if o.chunk_tokens is None else f"and {o.chunk_tokens} tokens")
               for name, o in (("deployed", one.options[0]), ("chosen", chosen), ("best", best))}
        )  # fmt: skip
    return rows


def saved(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """1 less the geometric mean of ours over theirs, with its interval."""
    found = interval(np.log(ours / theirs))
    low, high = -np.expm1(found["high"]), -np.expm1(found["low"])
    return {"mean": float(-np.expm1(found["mean"])), "low": float(low), "high": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="not needed: nothing here reads a trace")
    parser.add_argument("--llm", action="store_true", help="of LLM services")
    parser.add_argument("--out", type=Path, default=Path("results/scaling"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", type=Path, help="a configured.json: judge it, train nothing")
    parser.add_argument("--deployments", type=int, default=TEST, help="to judge on")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started, began, lasted = datetime.now(UTC), time.perf_counter(), {}

    def lap(name: str) -> None:
        lasted[name] = round(time.perf_counter() - began - sum(lasted.values()), 1)

    work, replicas, named = options.out / "work", policy_from(SHIPPED), stem(options.llm)
    assert isinstance(replicas, Foresight)
    if options.policy:
        policy = msgspec.json.decode(options.policy.read_bytes(), type=Configured)
    else:
        settings = QUICK if options.quick else LLM if options.llm else Settings()
        settings = msgspec.structs.replace(settings, seed=options.seed)
        seed = TRAIN_SEED + 10 * options.seed
        parts = 4 if options.llm else 1  # of training, which are priced side by side
        tasks = [(2, settings.validation, "validation")]
        tasks += [(1 + 2 * k, settings.services // parts, f"training-{k}") for k in range(parts)]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            one_task = partial(learned_from, options.llm, seed, settings, replicas, work)
            judged, *learned = pool.map(one_task, tasks)
        learn = [one for part in learned for one in part]
        lap("pricing")
        network, curve = train(learn, judged, settings)
        rows = [{"epoch": 10 * k, "validation_regret": f"{regret:.5g}"} for k, regret in enumerate(curve)]
        rows.append({"epoch": "as deployed", "validation_regret": f"{regrets(judged)[:, 0].mean():.5g}"})
        write_whole(options.out / f"{named}_learning.csv", as_csv(rows))
        shipped = policy_from(CONFIGURED)
        assert isinstance(shipped, Configured)
        # that of LLM services stands beside the one for servers that batch
        policy = shipped.replace(llm_network=network) if options.llm else Configured(network=network)
        kept = options.out / ("configured_llm.json" if options.llm else "configured.json")
        write_whole(kept, msgspec.json.encode(policy).decode() + "\n")
        lap("training")

    count, hours = (4, 1.0) if options.quick else (options.deployments, LLM_TEST_H if options.llm else TEST_H)
    one_part = partial(judge, options.llm, policy, replicas, options.seed, count, hours, work)
    rows = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for part in pool.map(one_part, range(0, count, AT_ONCE)):
            rows += part
            print(f"test: {len(rows)} deployments, {time.perf_counter() - began:.0f} s", flush=True)
    lap("test")
    usd = {name: np.array([float(str(row[f"{name}_usd"])) for row in rows])
           for name in ("deployed", "rule_of_thumb", "chosen_once", "configured", "best_fixed")}  # fmt: skip
    acceptance = []
    for line, ours, theirs in (
        ("saving over the configuration as deployed", "configured", "deployed"),
        ("saving over the rule of thumb", "configured", "rule_of_thumb"),
        ("saving over the best fixed configuration in hindsight", "configured", "best_fixed"),
        ("saving of the first choice, kept, over the configuration as deployed", "chosen_once", "deployed"),
    ):
        found = saved(usd[ours], usd[theirs])
        figures = {name: f"{found[name]:.5g}" for name in ("mean", "low", "high")}
        acceptance.append(
            {
                "line": line,
                "asked": "> 0",
                "measured": figures.pop("mean"),
                **figures,
                "met": found["low"] > 0,
            }
        )
        print(acceptance[-1])
    write_whole(options.out / f"{named}.csv", as_csv(rows))
    write_whole(options.out / f"{named}_acceptance.csv", as_csv(acceptance))
    record = provenance("scaling/configure", sys.argv, started, lasted)
    record |= {"seed": options.seed, "deployments": count}
    write_whole(options.out / f"{named}_run.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
