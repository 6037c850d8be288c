"""The command of the leaderboard: every policy in every serving environment, and bundles that are added."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pilotage.console import AsJson, print_json
from pilotage.world.spec import SpecError

app = typer.Typer()


@app.command()
def leaderboard(
    add: Annotated[
        list[str] | None, typer.Option("--add", help="NAME=BUNDLE, a policy that takes part; repeatable")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="the board's folder; what has been run there is not run again")
    ] = Path("results/leaderboard"),
    env: Annotated[
        list[str] | None, typer.Option("--env", help="only these environments; repeatable (default: all)")
    ] = None,
    runs: Annotated[int, typer.Option(min=2, help="paired runs of each policy in each environment")] = 4,
    hours: Annotated[float | None, typer.Option(min=0.01, help="at most, of a run (default: 1)")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="folder of traces (PILOTAGE_DATA)")] = None,
    as_json: AsJson = False,
) -> None:
    """Rank all policies, in dollars over those of hpa, and write table.csv and a page; adds bundles of yours."""
    from pilotage.leaderboard import HOURS, SEED, entrants, environments, play, shortened, table, write_board
    from pilotage.results import provenance, write_whole
    from pilotage.world.spec import closest

    added = {}
    for text in add or ():
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise SpecError(f"--add {text!r}: not of the form NAME=BUNDLE")
        added[name] = Path(path)
    policies = entrants(added)
    scenarios = environments(data)
    if env is not None:
        known = {one.name: one for one in scenarios}
        for name in env:
            if name not in known:
                raise SpecError(f"--env {name!r}: is not on the board here; {closest(name, known)}")
        scenarios = [known[name] for name in dict.fromkeys(env)]
    if hours is not None:
        scenarios = [shortened(one, hours) for one in scenarios]
    started, began = datetime.now(UTC), time.process_time()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"--out {out}: cannot be written: {error.strerror}; give a writable folder") from None
    screen = Console(stderr=True)
    with screen.status("", spinner="dots") as status:
        rows = play(
            out, scenarios, policies, runs=runs, step=lambda text: None if as_json else status.update(text)
        )
    record = provenance("leaderboard", sys.argv[1:], started, {"cpu": round(time.process_time() - began, 1)})
    record |= {
        "seeds": [SEED + k for k in range(runs)],
        "scenarios": {one.name: one.digest() for one in scenarios},
    }
    board = write_board(out, rows, record, hours=hours or HOURS)
    write_whole(out / "run.json", json.dumps(record, indent=1) + "\n")
    if as_json:
        print_json({"envs": [one.name for one in scenarios], "runs": runs, "rows": table(board)})
        return
    shown = Table(
        title=f"dollars over those of hpa, {len(scenarios)} environments", box=SIMPLE_HEAD, pad_edge=False
    )
    for name in ("policy", "score", "95 %", "ran in", "worst"):
        shown.add_column(name, justify="left" if name in ("policy", "worst") else "right", no_wrap=True)
    for one in board:
        where, cell = one.worst
        score = (f"{one.score:.3f}", f"{one.low:.3f}–{one.high:.3f}") if one.complete else ("–", "–")
        shown.add_row(one.name, *score, f"{one.ran}/{len(one.cells)}", f"{where} {cell.ratio:.2f}")
    Console().print(shown)
    print(f"page: {out / 'index.html'}")
