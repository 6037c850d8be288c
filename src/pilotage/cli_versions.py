"""The commands of version control, which load neither simulator nor trainers."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pilotage.console import AsJson, fail, print_json
from pilotage.world.spec import SpecError

if TYPE_CHECKING:
    from pilotage.control.fairness import FairnessGate
    from pilotage.live.entries import Entry
    from pilotage.live.registries import Registry, Version
    from pilotage.live.versions import Versions

app = typer.Typer()

Service = Annotated[str, typer.Argument(help="the service's name")]
Home = Annotated[
    Path,
    typer.Option("--home", envvar="PILOTAGE_HOME", help="folder of the ledger, and of versions by default"),
]
Where = Annotated[
    str | None,
    typer.Option(
        "--registry",
        envvar="PILOTAGE_REGISTRY",
        help="URL of an MLflow server, or a folder (default: --home)",
    ),
]
Gate = Annotated[
    str,
    typer.Option(
        "--gate", help="the bias gate and its limits, as fairness-gate:wider_gap=0.02,small_groups=hold"
    ),
]
TargetFile = Annotated[
    Path | None,
    typer.Option(
        "--target",
        help="TOML file with the [target] that serves the model, as for `steer`; without one it follows the alias",
    ),
]
_HOME = Path(".pilotage")
_GATE = "fairness-gate:small_groups=report"


def _versions(home: Path, registry: str | None, gate: str = _GATE, target: Path | None = None) -> Versions:
    from pilotage.live.ledger import Ledger
    from pilotage.live.versions import Versions

    serving = None
    if target is not None:
        from pilotage.live.targets import target_of
        from pilotage.world.spec import read_toml

        found = read_toml(target, "a file with a [target]")
        serving = target_of(found.get("target"), f"{target}: target").begin()
    return Versions(Ledger(home), _registry(home, registry), serving, gate=_gate(gate))


def _gate(text: str) -> FairnessGate:
    from pilotage.control.fairness import FairnessGate
    from pilotage.world.spec import named

    return named(text, {"fairness-gate": FairnessGate}, "--gate", "nothing, for the default")


def _registry(home: Path, registry: str | None) -> Registry:
    from pilotage.live.registries import Folder
    from pilotage.world.spec import decode

    if registry and "://" in registry:
        from pilotage.live.mlflow_server import MlflowServer

        return decode({"kind": "mlflow", "url": registry}, MlflowServer, "--registry")
    return Folder(path=registry or str(home))


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Errors of registries end with code 1, a ledger that is not what it was with 3."""
    from pilotage.live.entries import LedgerError
    from pilotage.live.registries import RegistryError
    from pilotage.live.targets import TargetError

    try:
        yield
    except (RegistryError, TargetError) as error:
        fail(str(error), 1)
    except LedgerError as error:
        fail(str(error), 3)


@app.command()
def history(
    service: Service,
    at: Annotated[
        str | None, typer.Option("--at", help="what was live then: ISO 8601, UTC if no zone is given")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="check every entry of the ledger; exit code 3 if it was changed")
    ] = False,
    head: Annotated[
        list[str] | None,
        typer.Option("--head", help="NUMBER:HASH of an entry that was kept elsewhere; repeatable"),
    ] = None,
    alias: Annotated[str, typer.Option(help="the alias that --at asks for")] = "champion",
    last: Annotated[int, typer.Option(min=1, help="how many entries to show")] = 20,
    home: Home = _HOME,
    registry: Where = None,
    as_json: AsJson = False,
) -> None:
    """What happened to a service's versions, what was live at a time, and whether the record is intact."""
    import msgspec

    from pilotage.live.registries import RegistryError

    with _reported():
        versions = _versions(home, registry)
        if not verify and not (home / "ledger.jsonl").exists():
            raise SpecError(f"--home {home}: holds no ledger; give the folder that `pilotage track` wrote to")
        result: dict[str, Any] = {"service": service, "alias": alias}
        if verify:
            try:
                own, others = versions.anchors(service)
                more = [f"the registry also names ledger {name}..." for name in others]
            except RegistryError as error:
                own, more = [], [f"what the registry says of the ledger was not checked: {error}"]
            found = versions.ledger.verify([*own, *(head or [])])
            result["verification"] = msgspec.to_builtins(found.replace(notes=(*found.notes, *more)))
        if at is not None:
            result["live"] = msgspec.to_builtins(versions.live_at(service, _time(at), alias))
        if not verify and at is None:
            result["entries"] = [_row(entry) for entry in versions.ledger.entries(service, last=last)]
            if not result["entries"]:
                raise SpecError(f"{service!r}: the ledger in {home} knows no such service")
    if as_json:
        print_json(result)
    else:
        _show(result)
    if verify and found.problem is not None:
        fail(f"{home / 'ledger.jsonl'}: {found.problem}", 3)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="SERVICE:VERSION or SERVICE@ALIAS, as fraud:3 or fraud@champion")],
    b: Annotated[str, typer.Argument(help="the other one")],
    gate: Gate = _GATE,
    home: Home = _HOME,
    registry: Where = None,
    as_json: AsJson = False,
) -> None:
    """Two versions side by side, with a recommendation and its reasons."""
    import msgspec

    from pilotage.live.compare import compare as side_by_side

    with _reported():
        where = _registry(home, registry)
        result = side_by_side(_named(where, a), _named(where, b), _gate(gate))
    if as_json:
        print_json(msgspec.to_builtins(result))
        return
    for part, rows in (("", result.metrics), *result.slices.items()):
        for row in rows:
            one, other = (f"{m.value:.4g}" if m else "-" for m in (row.a, row.b))
            sure = f" [{row.low:.4g}, {row.high:.4g}]" if row.low is not None else ""
            change = f"{row.difference:+.4g}{sure}" if row.difference is not None else "-"
            print(f"{part + ' ' if part else ''}{row.metric}: {one} -> {other}, {change}, {row.verdict}")
    for check in result.gate.checks:
        told = "within its limit" if check.passed else "not shown to be within its limit"
        print(f"{check.feature}, {check.what}: {check.champion:.4g} -> {check.candidate:.4g}, {told}")
    if result.attention is not None:
        print(f"what they look at: {100 * result.attention.moved:.1f} % of all contributions have moved")
        for name, (share_a, share_b) in list(result.attention.inputs.items())[:5]:
            print(f"  {name}: {100 * share_a:.1f} % -> {100 * share_b:.1f} %")
    for what, (one, other) in result.lineage.items():
        print(f"{what}: {one or '-'} -> {other or '-'}")
    words = {"a": f"keep {result.a}", "b": f"prefer {result.b}", "undecided": "undecided: keep what runs"}
    print(f"recommendation: {words[result.recommendation]}; " + "; ".join(result.reasons))


@app.command()
def promote(
    service: Service,
    version: Annotated[str, typer.Argument(help="the version that is to serve")],
    reason: Annotated[str, typer.Option(help="why; kept in the ledger")] = "promotion by hand",
    override: Annotated[
        str | None, typer.Option(help="why the bias gate should not stop it; kept in the ledger")
    ] = None,
    alias: Annotated[str, typer.Option()] = "champion",
    gate: Gate = _GATE,
    target: TargetFile = None,
    home: Home = _HOME,
    registry: Where = None,
    as_json: AsJson = False,
) -> None:
    """Let a version serve in the champion's place, if the bias gate has nothing against it."""
    from pilotage.live.tracking import whoever

    with _reported():
        versions = _versions(home, registry, gate, target)
        done = versions.promote(
            service, version, actor=whoever(), reason=reason, alias=alias, override=override
        )
    if as_json:
        print_json(_row(done))
    else:
        _moved(service, alias, done)


@app.command()
def rollback(
    service: Service,
    to: Annotated[
        str | None, typer.Option("--to", help="version to go back to (default: the one before)")
    ] = None,
    reason: Annotated[str, typer.Option(help="why; kept in the ledger")] = "rollback by hand",
    alias: Annotated[str, typer.Option()] = "champion",
    target: TargetFile = None,
    home: Home = _HOME,
    registry: Where = None,
    as_json: AsJson = False,
) -> None:
    """Go back to the version before, or to any earlier one, and say what was done."""
    from pilotage.live.tracking import whoever

    with _reported():
        versions = _versions(home, registry, target=target)
        done = versions.rollback(service, to, actor=whoever(), reason=reason, alias=alias)
    if as_json:
        print_json(_row(done))
        return
    _moved(service, alias, done)


@app.command(context_settings={"ignore_unknown_options": True})
def track(
    service: Annotated[str, typer.Option("--service", help="the service that is trained")],
    command: Annotated[list[str], typer.Argument(help="the command, after --")],
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="file or folder it trains on; repeatable")
    ] = None,
    artifact: Annotated[
        Path | None, typer.Option("--artifact", help="file or folder of the model it makes")
    ] = None,
    home: Home = _HOME,
    registry: Where = None,
    as_json: AsJson = False,
) -> None:
    """Run a training and register what it made, with code, data, parameters, environment and metrics."""
    from pilotage.live.tracking import run

    with _reported():
        try:
            done = run(
                service, command, _versions(home, registry), data=data or [], artifact=artifact,
                out=sys.stderr if as_json else sys.stdout,
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            fail(f"{command[0]}: ended with code {error.returncode}; no version was registered", 1)
    if as_json:
        print_json({"service": service, "version": done.registered})
    else:
        print(f"registered {service}:{done.registered}")


def _moved(service: str, alias: str, done: Entry) -> None:
    print(
        f"{service}@{alias}: version {done.expected_version} -> {done.new_version}, entry {done.seq} of the ledger; "
        f"target: {done.response.get('target', 'follows the alias')}"
    )


def _named(registry: Registry, text: str) -> Version:
    service, colon, version = text.rpartition(":")
    if not colon:
        service, at, alias = text.rpartition("@")
        if not at:
            raise SpecError(f"{text!r}: not a version; valid: SERVICE:VERSION or SERVICE@ALIAS")
        aliases = registry.aliases(service)
        if alias not in aliases:
            raise SpecError(f"{text}: no such alias; valid: {', '.join(sorted(aliases)) or 'none yet'}")
        version = aliases[alias]
    return registry.version(service, version)


def _time(text: str) -> str:
    from pilotage.live.entries import utc

    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise SpecError(
            f"--at {text!r}: not a time; valid: ISO 8601, as 2026-11-27T14:00 or 2026-11-27T14:00+01:00"
        ) from None
    return utc(time if time.tzinfo else time.replace(tzinfo=UTC))


def _row(entry: Entry) -> dict[str, Any]:
    """An entry as it is printed."""
    import msgspec

    return msgspec.to_builtins(entry) | {"hash": entry.hash}


def _show(result: dict[str, Any]) -> None:
    for entry in result.get("entries", []):
        move = f" {entry['alias']}: {entry.get('expected_version')} ->" if "alias" in entry else " version"
        what = f"{move} {entry.get('new_version')}"
        if "to" in entry.get("decision", {}):  # of a fleet that is steered
            what = f" replicas: {entry['decision'].get('from')} -> {entry['decision']['to']}"
        print(
            f"{entry['seq']:>6} {entry['time'][:19]}Z {entry['kind']} {entry['outcome']}{what} "
            f"by {entry['actor']['name']}: {entry['reason']}"
        )
    if "live" in result:
        live = result["live"]
        if live["version"] is None:
            print(f"{live['service']}@{live['alias']}: nothing was live at {live['at']}")
        else:
            print(
                f"{live['service']}@{live['alias']}: version {live['version']} since {live['since']}, by "
                f"{live['actor']['name']}: {live['reason']} (entry {live['entry']})"
            )
        if live["in_doubt"] is not None:
            print(
                f"in doubt: a move to version {live['in_doubt']} was under way and its result not yet known"
            )
    if "verification" in result:
        found = result["verification"]
        for note in found.get("notes", []):
            print(f"note: {note}")
        if found["problem"] is None:
            print(
                f"intact: {found['entries']} entries; keep this elsewhere: {found['entries'] - 1}:{found['head']}"
            )
