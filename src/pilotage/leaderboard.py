"""The leaderboard: every scaling policy in every serving environment, on the same paired runs, as a table and a page.

`runs.csv` keeps a row for every environment, policy and seed. What is there, of the same policy in the same scenario,
is not run again: a policy that is added costs its own runs and no others. The score of a policy is the geometric mean,
over environments, of its dollars over those of the baseline in the same runs; its 95 % interval is a bootstrap over the
runs of every environment, so it is about luck within these environments and says nothing of others. Environments whose
models decay are left out: there retraining decides, which has experiments of its own.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

import jinja2
import msgspec
import numpy as np

from pilotage.control.bundle import open_bundle
from pilotage.control.guard import Guard
from pilotage.control.learned import CONFIGURED, SHIPPED, policy_from
from pilotage.control.policy import Policy
from pilotage.control.scaling import Scaling
from pilotage.engine.cluster import World
from pilotage.engine.run import Run, simulate
from pilotage.evaluate import RESAMPLES
from pilotage.measurements import TIMES, attained, fixed, money, percent
from pilotage.metrics import ITEMS, attainment
from pilotage.results import as_csv, write_whole
from pilotage.scenario import Scenario, load, shipped
from pilotage.world.spec import SpecError

BASELINE: Final = "hpa"
SEED: Final = 4_000_000  # apart from the seeds that training, tuning and `evaluate` use
RUNS: Final = 4  # of each policy in each environment
HOURS: Final = 1.0  # at most, of a run; longer where an outage comes later
_OWN_NUMBERS: Final = {
    "static",
    "schedule",
    "foresight",
}  # nothing without a service's own numbers, or a network
_LEAST: Final = 1e-6  # ratio, where a policy costs nothing
COUNTED: Final = ("served", "late", "overdue", "rejected", "timed_out", "abandoned", "lost")
COLUMNS: Final = ("env", "policy", "seed", "scenario_sha256", "policy_sha256", "submitted", "total_usd",
                  *(f"{item}_usd" for item in ITEMS), "in_time", "finished", "cpu_s", "note")  # fmt: skip


class Entrant(NamedTuple):
    """A policy on the board, under a name."""

    name: str
    policy: Policy
    sha256: str  # of the policy, or of the manifest of the bundle that was submitted
    submitted: bool


def environments(data: Path | None) -> list[Scenario]:
    """The serving environments that can be run here; those of recorded traffic need `data`."""
    found = [load(env, data) for env in shipped()]
    serving = [one for one in found if all(service.lifecycle is None for service in one.services)]
    return [shortened(one, HOURS) for one in serving if one.data or not _recorded(one)]


def shortened(scenario: Scenario, hours: float) -> Scenario:
    """A scenario of at most so many hours, or of an hour more than its last outage, which is what it is there for."""
    ends = [outage.start_h + outage.duration_h + 1.0 for outage in scenario.outages]
    shorter: Scenario = scenario.replace(horizon_h=min(max([hours, *ends]), scenario.horizon_h))
    return shorter


def _recorded(scenario: Scenario) -> bool:
    text = msgspec.json.encode(scenario.services)
    return b'"kind":"trace"' in text or b'"kind":"counts"' in text


def entrants(added: Mapping[str, Path]) -> list[Entrant]:
    """All policies with names that need no parameters, then the bundles that are added, by the names they get.

    Raises BundleError if one is not sound, SpecError if its name will not do.
    """
    names = [str(one.__struct_config__.tag) for one in Scaling.__args__]
    own = [name for name in (*names, SHIPPED, CONFIGURED) if name not in _OWN_NUMBERS]
    for name, path in added.items():
        if name in own:
            raise SpecError(
                f"--add {name}: is on the board already; give another name, as in my-{name}={path}"
            )
        if not re.fullmatch(r"[\w.+-]{1,40}", name):
            raise SpecError(f"--add {name!r}: not a name; valid: 1 to 40 letters, digits, dots, - and _")
    found = [(name, policy_from(name)) for name in own]
    board = [
        Entrant(name, policy, hashlib.sha256(msgspec.json.encode(policy)).hexdigest(), False)
        for name, policy in found
    ]
    for name, path in added.items():
        bundle = open_bundle(path)
        board.append(Entrant(name, bundle.policy, bundle.digest, True))
    return board


def play(
    folder: Path,
    scenarios: Sequence[Scenario],
    policies: Sequence[Entrant],
    *,
    runs: int = RUNS,
    step: Callable[[str], None] = lambda _: None,
) -> list[dict[str, str]]:
    """Runs what `runs.csv` of the folder lacks, and returns all its rows; policies that were added before stay."""
    known = {(row["env"], row["policy"], row["seed"]): row for row in _read(folder / "runs.csv")}
    digests = {scenario.name: scenario.digest() for scenario in scenarios}
    rows = {
        key: row for key, row in known.items() if digests.get(row["env"]) in (None, row["scenario_sha256"])
    }
    seeds = [SEED + k for k in range(runs)]
    for entrant in policies:
        for scenario in scenarios:
            keys = [(scenario.name, entrant.name, str(seed)) for seed in seeds]
            if all(key in rows and rows[key]["policy_sha256"] == entrant.sha256 for key in keys):
                continue
            step(f"{entrant.name} in {scenario.name}")
            for key, row in zip(keys, _played(scenario, entrant, seeds), strict=True):
                rows[key] = {name: str(value) for name, value in row.items()}
            write_whole(folder / "runs.csv", as_csv(list(rows.values())))
    return [row for row in rows.values() if int(row["seed"]) in seeds and row["env"] in digests]


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and tuple(rows[0]) != COLUMNS:
        raise SpecError(f"{path}: not the runs of this leaderboard; give --out another folder")
    return rows


def _played(scenario: Scenario, entrant: Entrant, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each run; where the policy cannot run, one that says why."""
    same = dict(zip(COLUMNS, (scenario.name, entrant.name), strict=False)) | {
        "scenario_sha256": scenario.digest(),
        "policy_sha256": entrant.sha256,
        "submitted": entrant.submitted,
    }
    began = time.process_time()
    try:
        done: Sequence[Run] = simulate(
            scenario, [entrant.policy] * len(seeds), [World(seed) for seed in seeds], guard=Guard()
        )
    except ValueError as error:
        nothing = dict.fromkeys(COLUMNS, "")
        return [nothing | same | {"seed": seed, "note": str(error)[:200]} for seed in seeds]
    cpu_s = (time.process_time() - began) / len(seeds)
    rows = []
    for seed, run in zip(seeds, done, strict=True):
        total = {name: float(run.totals[name].sum()) for name in COUNTED}
        dropped = sum(total[name] for name in ("rejected", "timed_out", "abandoned", "lost"))
        items = dict(
            zip((f"{item}_usd" for item in ITEMS), run.usd.sum(axis=0).round(6).tolist(), strict=True)
        )
        found = same | items | {
            "seed": seed, "total_usd": round(run.total_usd, 6), "in_time": int(total["served"] - total["late"]),
            "finished": int(total["served"] + dropped + total["overdue"]), "cpu_s": round(cpu_s, 3), "note": "",
        }  # fmt: skip
        rows.append({name: found[name] for name in COLUMNS})
    return rows


# --- the standing ------------------------------------------------------------------------------------------
class Cell(NamedTuple):
    """A policy in an environment: dollars per run, the same over the baseline's with its interval, and how many of the
    requests were in time. `note` says why it did not run."""

    usd: float
    ratio: float
    low: float
    high: float
    in_time: float
    note: str = ""

    @property
    def verdict(self) -> str:
        return (
            "cheaper" if self.high < 1 else "dearer" if self.low > 1 else "no clear difference"
        )  # NaN: not run


NOT_RUN: Final = Cell(math.nan, math.nan, math.nan, math.nan, math.nan)


class Standing(NamedTuple):
    """A policy on the board. `score` is NaN unless it ran in every environment."""

    name: str
    submitted: bool
    digest: str
    score: float
    low: float
    high: float
    cells: dict[str, Cell]

    @property
    def complete(self) -> bool:
        """Whether it ran in every environment, and so has a score."""
        return not math.isnan(self.score)

    @property
    def worst(self) -> tuple[str, Cell]:
        """Where it does worst against the baseline."""
        return max(((e, c) for e, c in self.cells.items() if not c.note), key=lambda pair: pair[1].ratio)

    @property
    def ran(self) -> int:
        return sum(not cell.note for cell in self.cells.values())

    @property
    def latest(self) -> tuple[str, Cell]:
        """Where the smallest share of requests was in time."""
        return min(((e, c) for e, c in self.cells.items() if not c.note), key=lambda pair: pair[1].in_time)


def standings(rows: Sequence[Mapping[str, str]], seed: int = 0) -> list[Standing]:
    """Policies by their score, the best first; those that did not run everywhere come last."""
    by: dict[str, dict[str, list[Mapping[str, str]]]] = {}
    for row in rows:
        by.setdefault(row["policy"], {}).setdefault(row["env"], []).append(row)
    for places in by.values():
        for found in places.values():
            found.sort(key=lambda row: int(row["seed"]))
    envs = sorted(by[BASELINE])
    rng = np.random.default_rng(seed)
    first = {env: _usd(by[BASELINE][env]) for env in envs}
    picks = {env: rng.integers(0, len(first[env]), (RESAMPLES, len(first[env]))) for env in envs}
    board = []
    for name, places in by.items():
        cells, draws = {}, []
        for env in envs:
            found = places.get(env, [])
            if not found or found[0]["note"]:
                cells[env] = NOT_RUN._replace(note=found[0]["note"] if found else "not run")
                continue
            usd, base = _usd(found), first[env]
            if not base.sum():
                cells[env] = NOT_RUN._replace(note=f"{BASELINE} cost nothing in these runs")
                continue
            below = base[picks[env]].sum(axis=1)
            drawn = (usd[picks[env]].sum(axis=1) / np.where(below > 0, below, np.nan))[below > 0]
            draws.append(np.log(np.resize(np.maximum(drawn, _LEAST), RESAMPLES)))
            low, high = np.quantile(drawn, [0.025, 0.975])
            share = attainment(*(sum(float(row[k]) for row in found) for k in ("in_time", "finished")))
            cells[env] = Cell(usd.mean(), usd.sum() / base.sum(), float(low), float(high), share)
        if not draws:
            continue
        score = low = high = math.nan
        if len(draws) == len(envs):
            score = math.exp(np.mean([math.log(max(cell.ratio, _LEAST)) for cell in cells.values()]))
            low, high = np.exp(np.quantile(np.mean(draws, axis=0), [0.025, 0.975])).tolist()
        any_row = next(iter(places.values()))[0]
        board.append(
            Standing(name, any_row["submitted"] == "True", any_row["policy_sha256"], score, low, high, cells)
        )
    return sorted(
        board, key=lambda one: (not one.complete, one.score if one.complete else -one.ran, one.name)
    )


def _usd(rows: Sequence[Mapping[str, str]]) -> np.ndarray:
    return np.array([float(row["total_usd"]) for row in rows])


def table(board: Sequence[Standing]) -> list[dict[str, Any]]:
    """The board as rows: for every policy its score (environment `all`), and each environment."""

    def shown(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.5g}"

    out = []
    for place, one in enumerate(board, 1):
        same = {"place": place if one.complete else "", "policy": one.name, "submitted": one.submitted}
        out.append(
            same | {"env": "all", "usd": "", "over_hpa": shown(one.score), "low": shown(one.low),
                    "high": shown(one.high), "attainment": shown(one.latest[1].in_time), "note": ""}
        )  # fmt: skip
        out += [
            same | {"env": env, "usd": shown(cell.usd), "over_hpa": shown(cell.ratio), "low": shown(cell.low),
                    "high": shown(cell.high), "attainment": shown(cell.in_time), "note": cell.note}
            for env, cell in one.cells.items()
        ]  # fmt: skip
    return out


def write_board(
    folder: Path,
    rows: Sequence[Mapping[str, str]],
    run: Mapping[str, Any],
    *,
    hours: float = HOURS,
    seed: int = 0,
) -> list[Standing]:
    """Writes `table.csv` and `index.html`, one self-contained page in the style of the report.

    `run` is the provenance of the rows, `hours` the length of a run, `seed` that of the bootstrap.
    """
    board = standings(rows, seed)
    write_whole(folder / "table.csv", as_csv(table(board)))
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"money": money, "percent": percent, "attained": attained, "fixed": fixed}
    package = files("pilotage")
    style = re.search(
        r"<style>\n(.*?)</style>", package.joinpath("report.html.j2").read_text("utf-8"), re.DOTALL
    )
    assert style is not None
    page = environment.from_string(package.joinpath("leaderboard.html.j2").read_text("utf-8")).render(
        style=style[1],
        board=board,
        envs=list(board[0].cells),
        best={env: min(o.cells[env].usd for o in board if not o.cells[env].note) for env in board[0].cells},
        runs=len({row["seed"] for row in rows}),
        hours=hours,
        baseline=BASELINE,
        run=dict.fromkeys(("command", "commit", "dirty", "seeds", "started_at", "versions")) | dict(run),
        times=TIMES,
    )
    write_whole(folder / "index.html", page)
    return board
