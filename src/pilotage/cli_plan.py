"""The command that plans deployments: what to run where, why, and the manifests that say so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pilotage.console import AsJson, fail, print_json
from pilotage.world.spec import SpecError, closest

if TYPE_CHECKING:
    from pilotage.plan.together import FleetPlan

app = typer.Typer()
_screen = Console(stderr=True)


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="a TOML file of pools and models; see docs/plan.md")],
    rate: Annotated[
        float | None, typer.Option("--rate", help="requests per second (default: the file's)")
    ] = None,
    slo_ms: Annotated[
        float | None, typer.Option("--slo-ms", help="latency objective (default: the file's)")
    ] = None,
    platform: Annotated[str, typer.Option(help="kubernetes, kserve or ray-serve")] = "kubernetes",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="folder for the manifests")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose pool, variant, batch, replicas and autoscaler for a model, and say why; several models share pools."""
    from pilotage.live.manifests import Platform, as_yaml
    from pilotage.plan.advice import Plan, Refusal, advise
    from pilotage.plan.requirements import Requirements
    from pilotage.plan.together import plan_together

    platforms: tuple[Platform, ...] = get_args(Platform)
    if platform not in platforms:
        raise SpecError(f"--platform {platform!r}: does not exist; {closest(platform, platforms)}")
    chosen = platforms[platforms.index(platform)]
    for option, value in (("--rate", rate), ("--slo-ms", slo_ms)):
        if value is not None and not 0 < value < float("inf"):
            raise SpecError(f"{option} {value}: must be a positive number")
    asked = Requirements.load(model, rate, slo_ms)
    found: Plan | FleetPlan | Refusal
    with _screen.status("") as status:
        step = (lambda _: None) if as_json else status.update
        if len(asked.models) == 1:
            found = advise(asked, asked.models[0], platform=chosen, seed=seed, step=step)
        else:
            found = plan_together(asked, platform=chosen, seed=seed, step=step)
    if isinstance(found, Refusal):
        if as_json:
            print_json(found.as_dict())
            raise typer.Exit(1)
        fail(str(found), 1)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        names = [m.name for m in asked.models]
        all_manifests = [found.manifests()] if isinstance(found, Plan) else found.manifests
        for name, documents in zip(names, all_manifests, strict=True):
            (out / f"{name}.yaml").write_text(as_yaml(documents))
    if as_json:
        print_json(found.as_dict())
        return
    rows = found.as_dict()
    _show_one(rows) if len(asked.models) == 1 else _show_fleet(rows)
    if out is not None:
        print(f"manifests: {', '.join(str(out / f'{m.name}.yaml') for m in asked.models)}")


def _table(title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, title_justify="left")
    for name in columns.values():
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_text(row[key]) for key in columns))
    Console().print(table)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_CHOICE = {
    "pool": "pool", "variant": "variant", "max_batch": "batch", "batch_wait_ms": "wait ms", "replicas": "replicas",
    "usd_per_hour": "$/h", "p99_ms": "p99 ms", "accuracy": "accuracy",
}  # fmt: skip


def _show_one(plan: dict[str, Any]) -> None:
    c, scaling = plan["choice"], plan["autoscaling"]
    print(
        f"{plan['model']}: {c['variant']} on {c['pool']} ({plan['environment']}), batches of {c['max_batch']}, "
        f"wait {c['batch_wait_ms']:g} ms, {_text(c['replicas'])} replicas: {c['usd_per_hour']:.4g} $/h, "
        f"p99 {c['p99_ms']:.4g} ms"
    )
    print(
        f"autoscaler ({scaling['platform']}): {scaling['min_replicas']} to {scaling['max_replicas']} replicas, "
        f"{scaling['target_concurrency']:g} requests in each"
    )
    print(f"why: {plan['reason']}")
    seen = plan["verified"]
    verdict = "meets" if seen["meets"] else "MISSES"
    print(
        f"on other seeds with the autoscaler it {verdict} the objective: {100 * seen['in_time']:.4g} % in time, "
        f"p99 {seen['p99_ms']:.4g} ms, {seen['usd_per_hour']:.4g} $/h"
    )
    for note in plan["notes"]:
        print(f"note: {note}")
    _table("alternatives that nothing beats in all of dollars, latency and accuracy", plan["pareto"], _CHOICE)
    columns = {"pool": "pool", "variant": "variant", "max_batch": "batch", "why_not": "why not"}
    _table("why the others lost", plan["runners_up"], columns)
    columns = {"what_if": "what if", "plan": "then", "usd_per_hour": "$/h", "stays": "the plan as it is"}
    _table("sensitivity", plan["sensitivity"], columns)


def _show_fleet(plan: dict[str, Any]) -> None:
    print(
        f"together {plan['usd_per_hour']:.4g} $/h on shared nodes; each on nodes of its own "
        f"{plan['apart_usd_per_hour']:.4g} $/h ({plan['combinations']} combinations packed, "
        f"{plan['simulated']} simulated)"
    )
    rows = [
        {"model": m["model"], **m["choice"], **{f"other_{k}": v for k, v in m["verified"].items()}}
        for m in plan["models"]
    ]
    columns = {"model": "model", **_CHOICE, "other_in_time": "in time, other seeds"}
    del columns["usd_per_hour"]
    _table("", rows, columns)
    columns = {"what_if": "what if", "plan": "then", "usd_per_hour": "$/h", "stays": "the plan as it is"}
    _table("sensitivity", plan["sensitivity"], columns)
