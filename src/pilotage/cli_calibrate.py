"""The commands that bring a fleet's own history into the simulator: calibrate, rehearse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pilotage.console import AsJson, fail, print_json
from pilotage.world.spec import SpecError

if TYPE_CHECKING:
    from pilotage.live.calibrate import Fit, Fleet, Known
    from pilotage.live.generations import Generations
    from pilotage.live.history import Recording
    from pilotage.rehearse import Check
    from pilotage.scenario import Scenario
    from pilotage.workers import Workers
    from pilotage.world.pools import Pool

app = typer.Typer()
_screen = Console(stderr=True)

Config = Annotated[Path, typer.Argument(help="a TOML file of a fleet; see docs/calibrate.md")]
Tables = Annotated[
    Path | None, typer.Option("--data", envvar="PILOTAGE_DATA", help="folder of the price tables")
]
Out = Annotated[Path, typer.Option("--out", help="folder for scenario.toml and the traffic")]


def _calibrated(
    fleet: Fleet, pools: Sequence[Pool], out: Path, workers: Workers, silent: bool
) -> tuple[Scenario, list[tuple[Known, Recording, Fit]], list[Check], list[dict[str, Any]]]:
    from pilotage.live.calibrate import read_and_fit
    from pilotage.live.history import HistoryError
    from pilotage.live.registries import RegistryError
    from pilotage.rehearse import as_toml, check, scenario_of
    from pilotage.results import write_whole

    found, versions = [], []
    with _screen.status("") as status:
        step = (lambda _: None) if silent else status.update
        step(f"reading the history of {len(fleet.services)} services")
        try:
            tasks = [(fleet.prometheus, one.name, one.slo_ms / 1e3) for one in fleet.services]
            fits = workers.map(read_and_fit, tasks)
            for service, (history, fitted) in zip(fleet.services, fits, strict=True):
                known, of_registry = fleet.known(service)
                versions.append(of_registry)
                found.append((known, history, fitted))
        except (HistoryError, RegistryError) as error:
            fail(str(error), 1)
        scenario = scenario_of(fleet, pools, found, out / "traffic")
        write_whole(out / "scenario.toml", as_toml(scenario))
        step("replaying what was recorded")
        checks = check(scenario, found, workers)
    return scenario, found, checks, _as_dict(found, checks, versions)


def _as_dict(
    found: list[tuple[Known, Recording, Fit]], checks: list[Check], versions: list[Generations | None]
) -> list[dict[str, Any]]:
    rows = []
    for (known, _, fitted), judged, of_registry in zip(found, checks, versions, strict=True):
        numbers = {
            name: dict(zip(("value", "low", "high"), getattr(fitted, name), strict=True))
            for name in ("rate_rps", "base_ms", "per_item_ms", "start_up_s")
        }
        rows.append(
            {
                "service": known.name, "fit": numbers | {"noise_cv": fitted.noise_cv}, "recorded": judged.recorded,
                "predicted": judged.predicted, "good": judged.good, "misfits": list(judged.misfits),
                "notes": [*fitted.notes, *(of_registry.notes if of_registry else ())],
                "versions": of_registry and of_registry.as_dict(),
            }
        )  # fmt: skip
    return rows


def _show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        fitted = row["fit"]
        print(f"{row['service']}: {'good' if row['good'] else 'NOT GOOD'}")
        for name, unit in (("rate_rps", ""), ("base_ms", ""), ("per_item_ms", ""), ("start_up_s", "")):
            value = fitted[name]
            print(f"  {name} {value['value']:.4g} ({value['low']:.4g} to {value['high']:.4g}){unit}")
        print(f"  noise_cv {fitted['noise_cv']:.3g}")
        for name in row["recorded"]:
            scale, unit = (1e3, " ms") if name.startswith("p") else (1.0, "")
            seen, said = scale * row["recorded"][name], scale * row["predicted"][name]
            print(
                f"  {name}: {seen:.4g}{unit} recorded, {said:.4g}{unit} predicted ({100 * (said / seen - 1):+.2g} %)"
            )
        if row["versions"]:
            _show_versions(row["versions"])
        for what in row["misfits"]:
            print(f"  misfit: {what}")
        for note in row["notes"]:
            print(f"  note: {note}")


def _show_versions(known: dict[str, Any]) -> None:
    """One line of what the registry knows."""
    parts = [
        f"{known['versions']} versions, {len(known['promoted'])} promoted, live: {known['live'] or 'not known'}"
    ]
    for name in ("accuracy", "base_error", "worse"):
        if value := known[name]:
            parts.append(f"{name} {value['value']:.4g} ({value['low']:.4g} to {value['high']:.4g})")
    print(f"  {'; '.join(parts)}")


@app.command()
def calibrate(
    config: Config, data: Tables = None, out: Out = Path("calibrated"), as_json: AsJson = False
) -> None:
    """Fit a scenario to a fleet's own history, and judge the fit by a replay; exit code 3 if it is not good."""
    from pilotage.live.calibrate import Fleet
    from pilotage.rehearse import workers_for

    fleet = Fleet.load(config)
    with workers_for(fleet) as workers:
        pools = fleet.priced(data or config.parent)
        _, _, checks, rows = _calibrated(fleet, pools, out, workers, as_json)
    if as_json:
        print_json({"scenario": str(out / "scenario.toml"), "services": rows})
    else:
        _show(rows)
        print(f"scenario: {out / 'scenario.toml'}, traffic below {out / 'traffic'} (give it as --data)")
    if not all(judged.good for judged in checks):
        raise typer.Exit(3)


@app.command()
def rehearse(
    config: Config,
    policy: Annotated[
        list[str] | None, typer.Option("--policy", help="policies instead of the file's; repeatable")
    ] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="also where the fit is not good")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    data: Tables = None,
    out: Out = Path("calibrated"),
    as_json: AsJson = False,
) -> None:
    """What other policies would have cost on the recorded traffic, and how sure that is."""
    from pilotage.control.learned import policy_from
    from pilotage.live.calibrate import Fleet
    from pilotage.rehearse import rehearse as run
    from pilotage.rehearse import workers_for

    fleet = Fleet.load(config)
    named = policy or list(fleet.policies)
    policies = [(name, policy_from(name)) for name in named]
    if len(set(named)) < len(named):
        raise SpecError(f"--policy {', '.join(named)}: one is given twice; give each policy once")
    with workers_for(fleet) as workers:
        pools = fleet.priced(data or config.parent)
        scenario, found, checks, rows = _calibrated(fleet, pools, out, workers, as_json)
        if not all(judged.good for judged in checks) and not anyway:
            if as_json:
                print_json({"services": rows, "policies": None})
            else:
                _show(rows)
            fail(
                "the fit is not good: what it says of other policies would not be either; "
                "--anyway says it all the same",
                3,
            )
        costs = run(scenario, found, policies, seed, workers)
    if as_json:
        print_json({"services": rows, "policies": costs})
        return
    hours = scenario.ticks * scenario.tick_s / 3600
    table = Table(title=f"{hours:.4g} h of recorded traffic, dollars", box=SIMPLE_HEAD, title_justify="left")
    for name in (
        "policy",
        "total",
        "range over the fit's uncertainty",
        "nodes",
        "missed",
        "in time",
        "p95 ms",
    ):
        table.add_column(name)
    for row in sorted(costs, key=lambda row: row["total_usd"]["mean"]):
        total, usd = row["total_usd"], row["usd"]
        table.add_row(
            row["policy"], f"{total['mean']:,.2f}", f"{total['low']:,.2f}–{total['high']:,.2f}", f"{usd['nodes']:,.2f}",
            f"{usd['late'] + usd['dropped']:,.2f}", f"{100 * row['slo_attainment']:.2f} %",
            f"{row['latency_ms']['p95']:,.0f}",
        )  # fmt: skip
    Console().print(table)
