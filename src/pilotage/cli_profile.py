"""The command that measures a model: its latency law, load time and memory, as a variant ready for a scenario."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console

from pilotage.console import AsJson, fail, print_json
from pilotage.world.spec import SpecError

app = typer.Typer()
_screen = Console(stderr=True)


@app.command()
def profile(
    target: Annotated[
        str | None, typer.Argument(help="a .onnx or .skops file, or the URL of a KServe V2 server")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="the model's name on the server, or on Hugging Face")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=1024)] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, help="how long batches are measured")] = 10.0,
    warm_up_s: Annotated[float, typer.Option(min=0.1, help="within which times must come to rest")] = 30.0,
    load: Annotated[
        list[float] | None,
        typer.Option(help="requests/s of an open loop, beside the simulator's prediction; repeatable"),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="of ONNX Runtime")] = 1,
    cpu: Annotated[int | None, typer.Option(min=0, help="the CPU to which this process is pinned")] = None,
    pool: Annotated[str, typer.Option(help="the pool for which the law is written")] = "cpu",
    accuracy: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="folder for variant.toml and the figure")] = None,
    estimator: Annotated[
        str | None, typer.Option("--from", help="aisimulate: estimate an LLM's iterations, measure nothing")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="aisimulate's name of the system: h100_sxm")] = None,
    backend: Annotated[str, typer.Option(help="vllm, sglang or trtllm, for aisimulate")] = "vllm",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs of a replica, for aisimulate")] = 1,
    python: Annotated[
        str | None, typer.Option(help="a Python that has aisimulate (default: this one)")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model's time against batch size, its load time and memory, with intervals.

    With `--from aisimulate`, estimate the iteration law of an LLM on hardware that is not here.
    """
    if estimator is not None:
        if estimator != "aisimulate" or model is None or hardware is None or target is not None:
            raise SpecError(
                "--from: valid: --from aisimulate --model NAME --hardware SYSTEM, and no file or URL"
            )
        _estimate(model, hardware, backend, tensor_parallel, python, pool, out, as_json)
        return
    if target is None:
        raise SpecError(
            "nothing to measure; give a .onnx or .skops file, the URL of a server, or --from aisimulate"
        )
    from pilotage.live.openloop import open_loop
    from pilotage.live.profile import pin
    from pilotage.live.profile import profile as measure
    from pilotage.live.profiled import ProfileError, open_model
    from pilotage.predicted import as_toml, beside, draw_fit, holds, predict_ms

    for rate in load or []:
        if not 0 < rate < 1e5:
            raise SpecError(f"--load {rate}: must be a positive number of requests per second")
    pinned = pin(cpu)
    rows: list[dict[str, Any]] = []
    try:
        with _screen.status("") as status:
            step = (lambda _: None) if as_json else status.update
            step(f"opening {target}")
            opened = open_model(target, model=model, threads=threads)
            found = measure(
                opened, target, max_batch=max_batch, seconds=seconds, threads=threads, seed=seed,
                warm_up_s=warm_up_s, step=step,
            )  # fmt: skip
            for rate in load or []:
                step(f"open loop at {rate:g} requests/s")
                seen = open_loop(opened, rate, seconds, seed=seed)
                if not len(seen.due_s):
                    raise SpecError(
                        f"--load {rate}: no request is due within {seconds:g} s; give more --seconds"
                    )
                said = predict_ms(found, seen.due_s, (0.5, 0.95, 0.99))
                rows.append(
                    {
                        "rate_rps": rate,
                        "measured_ms": {f"p{p}": seen.quantile_ms(p / 100) for p in (50, 95, 99)},
                        "predicted_ms": {f"p{p}": float(v) for p, v in zip((50, 95, 99), said, strict=True)},
                        "failed": seen.failed,
                        "throttled": seen.throttled,
                        "generator_kept_up": seen.trustworthy,
                    }
                )
    except ProfileError as error:
        fail(str(error), 1)
    fits = beside(found, found.loads)
    text = as_toml(found, pool, accuracy)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "variant.toml").write_text(text)
        draw_fit(found, out / "fit.svg")
    if as_json:
        print_json(
            {
                "name": found.name,
                "law": type(found.law).__name__.lower(),
                "base_ms": dict(zip(("mean", "low", "high"), found.base_ms, strict=True)),
                "per_item_ms": dict(zip(("mean", "low", "high"), found.per_item_ms, strict=True)),
                "noise_cv": found.law.noise_cv,
                "idle": None if found.law.idle is None else msgspec.to_builtins(found.law.idle),
                "stalls": None if found.law.stalls is None else msgspec.to_builtins(found.law.stalls),
                "misfit": found.misfit,
                "load_s": found.load_s,
                "memory_gib": found.memory_gib,
                "overhead_ms": found.overhead_ms,
                "batches_in_flight": found.slots,
                "batches": [
                    {"batch": p.batch, "n": len(p.times_ms), "mean_ms": p.mean_ms, "low_ms": p.low_ms,
                     "high_ms": p.high_ms, "p99_ms": float(np.quantile(p.times_ms, 0.99)), "outliers": p.outliers}
                    for p in found.points
                ],
                "loads": rows,
                "loads_fitted": fits,
                "holds": holds(fits),
                "notes": [*found.notes, *([pinned] if pinned else [])],
            }
        )  # fmt: skip
        return
    print(text, end="")
    if pinned:
        print(f"# {pinned}")
    for p in found.points:
        print(
            f"# batch {p.batch}: {p.mean_ms:.4g} ms ({p.low_ms:.4g} to {p.high_ms:.4g}), {len(p.times_ms)} times"
        )
    for fit in fits:
        print(
            f"# fitted at {fit['rate_rps']:.4g} requests/s: p95 {fit['measured_ms']:.4g} ms measured, "
            f"{fit['predicted_ms']:.4g} by the law"
        )
    if not holds(fits):
        print(
            "# the law does not hold: it does not give back the loads that it was fitted to; do not plan with it"
        )
    for row in rows:
        seen_ms, said_ms = row["measured_ms"], row["predicted_ms"]
        kept = "" if row["generator_kept_up"] else "; the generator was late: not to be trusted"
        print(
            f"# {row['rate_rps']:g} requests/s: p95 {seen_ms['p95']:.4g} ms measured, "
            f"{said_ms['p95']:.4g} predicted{kept}"
        )
    if out is not None:
        print(f"# variant: {out / 'variant.toml'}, figure: {out / 'fit.svg'}")


def _estimate(
    model: str, hardware: str, backend: str, tensor_parallel: int, python: str | None, pool: str, out: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """The variant of an LLM as aisimulate estimates it, and the profile beside it."""
    import sys

    from pilotage.agents.estimates import estimated
    from pilotage.agents.profiling import as_toml, save_profile

    with _screen.status("" if as_json else f"estimating {model} on {hardware}"):
        found = estimated(
            model, hardware, backend=backend, tensor_parallel=tensor_parallel, python=python or sys.executable
        )
    plain = msgspec.to_builtins(found)
    if as_json:
        print_json(plain)
    fit = ", ".join(f"{name} {share:.1%}" for name, share in found.errors.items())
    text = (
        f"# {found.model} on {found.hardware}, {found.engine}, tensor parallel {found.tensor_parallel}\n"
        f"# {found.source}\n# error of the law: {fit}\n# {found.caveat}\n"
        f'[[services.variants]]\nname = "estimated"\n\n'
        + as_toml(plain["law"], f"services.variants.latency.{pool}")
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "variant.toml").write_text(text)
        save_profile(found, out / "profile.toml")
    if not as_json:
        print(text, end="")
