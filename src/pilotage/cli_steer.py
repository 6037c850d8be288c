"""The command that steers a live fleet. It loads neither simulator nor trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from pilotage.console import AsJson, fail, print_json

app = typer.Typer()


@app.command()
def steer(
    config: Annotated[Path, typer.Argument(help="a steer configuration (TOML); see docs/steer.md")],
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode", help="shadow, advise or act, instead of the configuration's (default: shadow)"
        ),
    ] = None,
    ticks: Annotated[
        int | None, typer.Option("--ticks", min=1, help="stop after so many (default: when it is told to)")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="say whether the configuration is valid")] = False,
    as_json: AsJson = False,
) -> None:
    """Steer a live fleet: read, decide, guard, apply, record. Without --mode nothing is changed.

    Logs are JSON lines on stderr. SIGTERM finishes the tick and stops, SIGHUP reads the configuration again.
    """
    from pilotage.live.entries import LedgerError
    from pilotage.live.lease import LeaseError
    from pilotage.live.monitors import MonitorError
    from pilotage.live.process import run
    from pilotage.live.steer_config import load
    from pilotage.world.spec import SpecError

    if mode not in (None, "shadow", "advise", "act"):
        raise SpecError(f"--mode {mode!r} does not exist; valid: shadow, advise, act")
    chosen = cast("Literal['shadow', 'advise', 'act'] | None", mode)
    if check:
        setup = load(config, chosen)
        setup.monitor()
        setup.begin_target()
        shown = {
            "mode": setup.config.mode,
            "services": setup.names,
            "tick_s": setup.tick_s,
            "ledger": str(setup.ledger),
        }
        if as_json:
            print_json(shown)
        else:
            print(
                f"valid: {len(setup.names)} services, mode {setup.config.mode}, a tick every {setup.tick_s:g} s"
            )
        return
    try:
        status = run(config, chosen, ticks)
    except LedgerError as error:
        fail(str(error), 3)
    except (LeaseError, MonitorError) as error:
        fail(str(error), 1)
    result = {
        "mode": status.mode,
        "ticks": status.ticks,
        "outcomes": dict(status.outcomes),
        "errors": dict(status.errors),
        "interventions": dict(status.interventions),
        "usd": {name: round(usd, 6) for name, usd in status.usd.items()},
        "ledger_waiting": status.waiting,
    }
    if as_json:
        print_json(result)
        return
    outcomes = ", ".join(f"{count} {name}" for name, count in status.outcomes.items()) or "no decision"
    print(
        f"{status.ticks} ticks in mode {status.mode}: {outcomes}; replicas cost {status.usd['actual']:.4f} USD, "
        f"as wanted {status.usd['wanted']:.4f} USD"
    )
