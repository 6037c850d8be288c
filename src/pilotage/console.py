"""What commands ask and print alike: options, one JSON object, one line about what is wrong, a bar, a table."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from pilotage.world.spec import SpecError

if TYPE_CHECKING:
    from pilotage.scenario import Scenario

screen = Console(stderr=True)

Env = Annotated[str, typer.Argument(help="a shipped environment (see `pilotage envs`) or a scenario file")]
Data = Annotated[Path | None, typer.Option("--data", help="folder of traces (default: PILOTAGE_DATA)")]
Hours = Annotated[float | None, typer.Option("--hours", help="length of the run instead of the scenario's")]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="where runs are made: local[:N] processes, tcp://… (Dask), ray, ray://… (default: here)",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


def fail(message: str, code: int) -> NoReturn:
    """Ends the process: 1 for a run that failed, 2 for bad input, 3 for a verification that failed."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def print_json(value: Any) -> None:
    """JSON on stdout; what is unknown (NaN) is null, as JSON has no NaN."""
    print(json.dumps(_known(value), indent=2, allow_nan=False))


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _known(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_known(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scenario_of(env: str, data: Path | None, hours: float | None, placement: str | None = None) -> Scenario:
    from pilotage.scenario import load

    scenario = load(env, data)
    if placement is not None:
        from pilotage.engine.cluster import placement_from

        scenario = scenario.replace(placement=placement_from(placement))
    if hours is not None:
        if not (math.isfinite(hours) and hours > 0):
            raise SpecError(f"--hours {hours}: must be a positive number")
        scenario = scenario.replace(horizon_h=hours)
    return scenario


def writable(folder: Path) -> Path:
    """Makes sure, before hours of work, that results can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".pilotage-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SpecError(
            f"--out {folder}: cannot be written: {error.strerror}; give a writable folder"
        ) from None
    return folder


class progress:  # noqa: N801  (used as a function)
    """A bar on stderr: what is being done, and where that says `k/n`, for how long still. Silent with --json."""

    def __init__(self, silent: bool) -> None:
        looks = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeRemainingColumn(),
        )
        self._bar = None if silent else Progress(*looks, console=screen, transient=True)
        self._doing = ""

    def __enter__(self) -> Callable[[str], None]:
        if self._bar is None:
            return lambda _: None
        self._task = self._bar.add_task("", total=None)
        self._bar.start()
        return self._step

    def _step(self, text: str) -> None:
        assert self._bar is not None
        counted = re.search(r"([\d,]+)/([\d,]+)", text)
        doing = text[: counted.start()] if counted else text
        if doing != self._doing:  # the time that is left is that of what is being done now
            self._bar.reset(self._task, total=None)
            self._doing = doing
        done, total = (float(k.replace(",", "")) for k in counted.groups()) if counted else (0.0, None)
        self._bar.update(self._task, description=text, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def table_of(result: dict[str, Any]) -> Table:
    group = result.get("group", result["env"])
    title = f"{group}: {result['hours']:g} h x {len(result['seeds'])} runs, dollars per run"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    decays = any(row["usd"]["errors"] + row["usd"]["retraining"] for row in result["policies"])
    models = ("errors", "retraining") if decays else ()
    for name in ("policy", "total", "95 %", "missed", *models, "in time", "p95 ms", "x bound"):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in result["policies"]:
        total, over = row["total_usd"], row["over_bound"]
        known = not math.isnan(total["low"])
        table.add_row(
            row["policy"],
            f"{total['mean']:,.2f}",
            f"{total['low']:,.1f}–{total['high']:,.1f}" if known else "–",
            f"{row['usd']['late'] + row['usd']['dropped']:,.2f}",
            *(f"{row['usd'][name]:,.2f}" for name in models),
            f"{100 * row['slo_attainment']:.2f} %",
            f"{row['latency_ms']['p95']:,.0f}",
            f"{over['mean']:.2f}" if over else "–",
        )
    if result["bound_usd"]:
        table.caption = (
            f"clairvoyant: lower bound {result['bound_usd']['lower']:,.2f}, "
            f"schedule {result['bound_usd']['schedule']:,.2f}"
        )
    return table
