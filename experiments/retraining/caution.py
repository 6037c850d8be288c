"""By which margin the network of a learned policy has to say yes before it retrains (see `Settings.margin`).

`caution.py --data DIR --out DIR`: what `run.py` has trained, the margin taken off again, is followed with every margin
on deployments at random, and on the first 40 % of the real streams at three prices: from the first version on without
a past, and on their last 60 % with the rest as the past. Chosen is the margin with the least cost over the oracle's on
deployments at random among those with which, on all that was seen of real streams, the policy costs at most 1.02 times
never where the oracle never retrains. What `run.py` judges, the last 60 %, is not read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from run import PREFIX, PRICES
from streams import STREAMS, errors_of, probe_of

from pilotage.agents.retraining import Settings, cautious, followed, streams_at_random
from pilotage.control.learned_retraining import LearnedRetraining
from pilotage.control.lifecycle import retraining_from
from pilotage.engine.lifetimes import Stream
from pilotage.results import as_csv, write_whole

MARGINS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
HARM = 1.02


def pasts(data: Path, work: Path) -> list[Stream]:
    """The first 40 % of every stream, from its start and from its 40 % on."""
    out = []
    for name, (_, size, _) in STREAMS.items():
        matrix, probe = errors_of(name, data, work), probe_of(name, data, work, 0)
        end = int(PREFIX * len(matrix))
        for begin in (0, int(PREFIX * end)):
            out += [Stream.of(matrix[:end, :end], probe[:end], begin, x * size, size) for x in PRICES]
    return out


def judged(policy: LearnedRetraining, streams: list[Stream]) -> dict[str, float]:
    """Cost over the oracle's, and over never where the oracle never retrains."""
    cost = np.array([followed(policy, one) for one in streams])
    least = np.array([one.oracle_usd for one in streams])
    never = np.array([one.errors[0].sum() for one in streams])
    free = np.isclose(never, least)
    return {
        "over_oracle": float(np.exp(np.log(cost / least).mean())),
        "worst": float((cost / least).max()),
        "harm": float((cost / never)[free].mean()),
        "harm_worst": float((cost / never)[free].max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/retraining"))
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    trained = retraining_from(str(options.out / "retraining.json"))
    assert isinstance(trained, LearnedRetraining)
    trained = cautious(trained, -Settings().margin)
    sets = {
        "at random": streams_at_random(
            np.random.default_rng([options.seed, 9]), 100 if options.quick else 1200
        ),
        "first 40 %": pasts(options.data, options.out / "work"),
    }
    rows: list[dict[str, object]] = []
    for margin in MARGINS:
        policy = cautious(trained, margin)
        for name, streams in sets.items():
            figures = {k: f"{v:.5g}" for k, v in judged(policy, streams).items()}
            rows.append({"margin": margin, "deployments": name, **figures})
            print(rows[-1], flush=True)
    harmless = [
        r["margin"] for r in rows if r["deployments"] != "at random" and float(str(r["harm_worst"])) <= HARM
    ]
    left = [r for r in rows if r["deployments"] == "at random" and r["margin"] in harmless]
    chosen = min(left, key=lambda r: float(str(r["over_oracle"])))["margin"] if left else None
    for row in rows:
        row["chosen"] = row["margin"] == chosen
    print(f"margin {chosen}")
    write_whole(options.out / "caution.csv", as_csv(rows))


if __name__ == "__main__":
    main()
