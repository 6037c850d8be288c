"""The commands of bundles: export a policy, verify a bundle. Verifying loads neither simulator nor trainers."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pilotage.console import AsJson, fail, print_json
from pilotage.world.spec import SpecError

if TYPE_CHECKING:
    from pilotage.control.bundle import Bundle, Judged
    from pilotage.control.policy import Policy

app = typer.Typer()

KeyFile = Annotated[
    Path | None, typer.Option("--key", help="file with the signing key (default: PILOTAGE_BUNDLE_KEY)")
]


@app.command()
def export(
    policy: Annotated[
        str,
        typer.Argument(
            help="name, name:field=value,…, .toml file, folder of a training, or .zip that stable-baselines3 saved"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="the bundle: a folder that does not exist yet")],
    env: Annotated[
        list[str] | None, typer.Option("--env", help="environment it is judged on; repeatable (quickstart)")
    ] = None,
    baseline: Annotated[str, typer.Option(help="the policy it is compared with")] = "hpa",
    seeds: Annotated[int, typer.Option(min=1, help="paired runs in each environment")] = 5,
    hours: Annotated[float | None, typer.Option(help="length of a run instead of the environment's")] = None,
    guard: Annotated[
        Path | None, typer.Option("--guard", help="TOML file with limits on what it may order")
    ] = None,
    explanation: Annotated[
        Path | None,
        typer.Option("--explanation", help="explanation.json of `pilotage explain`, or a text, for the card"),
    ] = None,
    key: KeyFile = None,
    register: Annotated[
        str | None, typer.Option("--register", help="MLflow server to register the bundle in")
    ] = None,
    model: Annotated[str | None, typer.Option(help="its name there (default: the folder's)")] = None,
    run: Annotated[str | None, typer.Option("--run", help="MLflow run that trained it, for lineage")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="folder of traces (PILOTAGE_DATA)")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a policy as a bundle that runs anywhere: judged, described, with a self-test."""
    from pilotage.agents.export import export as write
    from pilotage.control.bundle import configured_key
    from pilotage.control.guard import Guard
    from pilotage.control.learned import policy_from
    from pilotage.scenario import load
    from pilotage.world.spec import decode, read_toml

    if policy.endswith(".zip"):
        from pilotage.agents.saved_model import read_model

        chosen: Policy = read_model(Path(policy))
    else:
        chosen = policy_from(policy)
    limits = Guard()
    if guard is not None:
        limits = decode(read_toml(guard, "a file with limits"), Guard, str(guard))
    scenarios = []
    for name in env or ["quickstart"]:
        scenario = load(name, data)
        scenarios.append(scenario if hours is None else scenario.replace(horizon_h=hours))
    words = "" if explanation is None else _explained(explanation)
    bundle = write(
        chosen, out, scenarios, name=Path(policy).name if Path(policy).exists() else policy, guard=limits,
        judged=[_judged(policy, chosen, baseline, policy_from(baseline), s, seeds) for s in scenarios],
        provenance=_provenance(policy), explanation=words, key=configured_key(key),
    )  # fmt: skip
    registered = None if register is None else _register(bundle, register, model or out.name, run)
    if as_json:
        print_json(_shown(bundle) | {"registered": registered})
        return
    print(f"bundle: --policy {out}")
    if registered:
        print(f"registered: {registered}")


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="the folder of a bundle")],
    key: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Check a bundle whole: files, hashes, schema, signature, self-test; exit code 3 and the reason if not sound."""
    from pilotage.control.bundle import configured_key, open_bundle

    found = _shown(open_bundle(bundle, configured_key(key)))
    if as_json:
        print_json(found)
        return
    signed = {
        True: "signed with the configured key",
        False: "not signed",
        None: "signed; no key to check it with",
    }
    print(f"{bundle}: sound; {signed[found['signed']]}")
    print(f"policy: {found['policy']}, manifest sha256 {found['digest']}")


def _explained(path: Path) -> str:
    """Why it decides as it does, for the card."""
    from pilotage.measurements import read_explanation

    if path.suffix == ".json":
        return read_explanation(path).words
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--explanation {path}: cannot be read: {error}") from None


def _shown(bundle: Bundle) -> dict[str, Any]:
    import msgspec

    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "policy": manifest.policy,
        "kind": manifest.kind,
        "schema": manifest.schema,
        "digest": bundle.digest,
        "signed": bundle.signed,
        "files": {name: msgspec.to_builtins(file) for name, file in manifest.files.items()},
        "provenance": manifest.provenance,
        "evaluation": msgspec.to_builtins(manifest.evaluation),
    }


def _judged(label: str, policy: Any, baseline: str, rule: Any, scenario: Any, seeds: int) -> Judged:
    """Both policies in the same worlds, which are those of `pilotage evaluate`."""
    from pilotage.control.bundle import Judged
    from pilotage.control.guard import Guard
    from pilotage.engine.cluster import World
    from pilotage.engine.run import simulate
    from pilotage.evaluate import compare

    worlds = [World(seed) for seed in range(seeds)]
    runs = [
        (name, simulate(scenario, [one] * seeds, worlds, guard=Guard()))
        for name, one in (("baseline", rule), ("policy", policy))
    ]
    found = compare(scenario, runs)
    row, versus = found["policies"][1], found["versus"][0]["saving"]
    total, p95 = row["total_usd"], row["latency_ms"]["p95"]

    def known(value: float) -> float | None:
        return value if value == value else None

    return Judged(
        env=scenario.name, hours=found["hours"], runs=seeds, usd=row["usd"], total_usd=total["mean"],
        total_usd_low=known(total["low"]), total_usd_high=known(total["high"]), attainment=row["slo_attainment"],
        latency_p95_ms=known(p95), baseline=baseline, saving=versus["mean"], saving_low=known(versus["low"]),
        saving_high=known(versus["high"]),
    )  # fmt: skip


def _provenance(policy: str) -> dict[str, str | int | float | None]:
    """Where a policy comes from, as far as its argument says: a training's folder has its curve."""
    from pilotage.live.tracking import code

    path = Path(policy)
    found: dict[str, str | int | float | None] = {"argument": path.name if path.exists() else policy}
    revision = code()
    found |= {"commit": revision.revision or None, "uncommitted_changes": revision.dirty}
    for file in (path, path / "policy.json"):
        if file.is_file():
            found["source_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    if policy == "learned":
        found["trained_by"] = "experiments/scaling/learn.py, on services and traffic at random"
    curve = path / "learning_curve.csv"
    if curve.is_file():
        with curve.open() as lines:
            rows = list(csv.DictReader(lines))
        if rows:
            best = min(rows, key=lambda row: float(row["validation_usd"]))
            found |= {
                "trained_steps": int(rows[-1]["steps"]),
                "best_at_steps": int(best["steps"]),
                "validation_usd": float(best["validation_usd"]),
                "validation_usd_of_its_base": float(best["base_usd"]),
            }
    return found


def _register(bundle: Bundle, url: str, model: str, run: str | None) -> str:
    from pilotage.live.bundles import register
    from pilotage.live.registries import RegistryError

    try:
        return register(bundle, url, model, run)
    except RegistryError as error:
        fail(str(error), 1)
