"""What the simulator says of a replica that was profiled, beside what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from pilotage.control.scaling import Schedule
from pilotage.engine.cluster import Recorded, World
from pilotage.engine.run import simulate
from pilotage.metrics import quantiles_s
from pilotage.scenario import Scenario
from pilotage.world.arrivals import Poisson
from pilotage.world.pools import Pool
from pilotage.world.servers import BatchServer
from pilotage.world.services import Service

if TYPE_CHECKING:
    from pilotage.live.openloop import Load
    from pilotage.live.profile import Profile

HOLDS: Final = 0.2


def predict_ms(found: Profile, due_s: np.ndarray, quantiles: tuple[float, ...]) -> np.ndarray:
    """Quantiles of latency in ms, where requests of one row come to one replica at these times (seconds, sorted)."""
    tick_s = 1.0
    ticks = int(due_s[-1] / tick_s) + 10
    service = Service(
        name="profiled",
        traffic=Poisson(rate_rps=1.0),  # not used: the world brings its own
        slo_ms=1e6,
        pools=("here",),
        variants=(found.variant("here").replace(load_s=0.0, load_cv=0.0, resources=None),),
        server=BatchServer(batches_in_flight=found.slots, overhead_ms=found.overhead_ms),
    )
    scenario = Scenario(
        title="one replica",
        pools=(Pool(name="here", price_usd_per_hour=0.0),),
        services=(service,),
        tick_s=tick_s,
        horizon_h=ticks * tick_s / 3600,
    )
    worlds = [World(seed, 0.0, (Recorded(due_s),)) for seed in range(5)]
    runs = simulate(scenario, [Schedule(targets=(1,))] * len(worlds), worlds)
    return 1e3 * quantiles_s(sum(run.histogram[0] for run in runs), quantiles)


def beside(found: Profile, loads: dict[float, list[Load]]) -> list[dict[str, float]]:
    """At each load, by its rate, the 95th percentile in ms as measured and as the simulator says it."""
    rows = []
    for rate, stretches in loads.items():
        due, start_s = [], 0.0
        for load in stretches:  # one after the other, a second apart
            due.append(start_s + load.due_s)
            start_s = float(due[-1][-1]) + 1.0 if len(load.due_s) else start_s
        seen = np.concatenate([load.latency_s for load in stretches])
        if np.isfinite(seen).any():
            said = float(predict_ms(found, np.concatenate(due), (0.95,))[0])
            measured = 1e3 * float(np.nanquantile(seen, 0.95))
            rows.append({"rate_rps": rate, "measured_ms": measured, "predicted_ms": said})
    return rows


def holds(fits: Sequence[dict[str, float]]) -> bool:
    """Whether a law gives back what it was fitted to, within HOLDS at every load."""
    return all(abs(row["predicted_ms"] / row["measured_ms"] - 1) <= HOLDS for row in fits)


def draw_fit(found: Profile, path: Path) -> None:
    """A figure of the law and of what was measured: times of all batches, their means with intervals, the fit."""
    from pilotage.figures import INKS, STYLE, Figure, FigureCanvasAgg, matplotlib

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        rng = np.random.default_rng(0)
        for p in found.points:
            times = p.times_ms[:200]
            at = p.batch + 0.15 * rng.uniform(-1, 1, len(times))
            axes.plot(at, times, ".", color=INKS["slate"], markersize=2, alpha=0.4, rasterized=False)
        batches = np.array([p.batch for p in found.points])
        means = np.array([p.mean_ms for p in found.points])
        bars = np.array([[p.mean_ms - p.low_ms, p.high_ms - p.mean_ms] for p in found.points]).T
        axes.errorbar(
            batches,
            means,
            yerr=np.maximum(bars, 0),
            fmt="o",
            color=INKS["ink"],
            markersize=4,
            label="measured mean, 95 %",
        )
        fixed, variable = found.law.batch_times_s(int(batches[-1]))
        law = 1e3 * (fixed + variable)[1:] + found.overhead_ms
        axes.plot(
            np.arange(1, len(law) + 1),
            law,
            color=INKS["blue"],
            label=f"{type(found.law).__name__.lower()} law",
        )
        top = max(float(law.max()), float(max(np.quantile(p.times_ms, 0.99) for p in found.points)))
        axes.set_ylim(0, 1.1 * top)
        axes.set_xlabel("requests in the batch")
        axes.set_ylabel("time, ms")
        axes.set_title(f"{found.name}: affine law within {100 * found.misfit:.2g} %")
        axes.legend()
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def as_toml(found: Profile, pool: str, accuracy: float) -> str:
    """The variant as a block of a scenario's or a plan's file."""
    variant = found.variant(pool, accuracy)
    law = variant.latency[pool]
    fields = {
        name: value
        for name, value in msgspec.to_builtins(law).items()
        if name != "kind" and value is not None
    }
    shown = ", ".join(f"{name} = {_plain(value)}" for name, value in fields.items())
    lines = [
        f"# measured by pilotage profile; base {_interval(found.base_ms)} ms, "
        f"per item {_interval(found.per_item_ms)} ms",
        *(f"# {note}" for note in found.notes),
        "[[services.variants]]  # in a file of `pilotage plan`: [[models.variants]]",
        f'name = "{variant.name}"',
        f"accuracy = {variant.accuracy:g}",
    ]
    if variant.load_s:
        lines += [f"load_s = {variant.load_s:g}", f"load_cv = {variant.load_cv:g}"]
    if variant.resources is not None:
        lines.append(
            f"resources = {{cpu = {variant.resources.cpu:g}, memory_gib = {variant.resources.memory_gib:g}}}"
        )
    kind = type(law).__struct_config__.tag
    lines.append(f'latency.{pool} = {{kind = "{kind}", {shown}}}')
    if found.overhead_ms or found.slots > 1:
        lines.append(
            f"# server = {{batches_in_flight = {found.slots}, overhead_ms = {found.overhead_ms:.4f}}}"
        )
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    """As TOML has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_plain(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return f"{value:.6g}"


def _interval(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.4g} ({value[1]:.4g} to {value[2]:.4g})"
