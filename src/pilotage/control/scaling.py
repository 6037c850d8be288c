"""Scaling policies: how many replicas a service should have.

Each is a frozen specification; numeric fields with both a lower and an upper bound are what Bayesian
optimisation searches (`tunable`), on a logarithmic scale where the annotation says so.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.control.autopilot import Autopilot
from pilotage.control.decisions import Decisions
from pilotage.control.faro import Faro
from pilotage.control.forecast import LoadTracker
from pilotage.control.foresight import Anticipate, Foresight
from pilotage.control.hpa import Hpa
from pilotage.control.inferline import InferLine
from pilotage.control.keda import Keda
from pilotage.control.kpa import Kpa
from pilotage.control.mark import Mark
from pilotage.control.policy import (
    INDEX,
    Alone,
    Controller,
    Decision,
    Observation,
    Policy,
    Situation,
    Together,
    columns_of,
    replicas_of,
)
from pilotage.control.queueing import little, square_root_staffing, staffing_for_wait
from pilotage.control.queueing import staffing as erlang_staffing
from pilotage.control.ray_serve import RayServe
from pilotage.control.sageserve import SageServe
from pilotage.control.saturation import Saturation
from pilotage.control.seasonal import PredictiveSeasonal
from pilotage.control.wva import Wva
from pilotage.world.spec import Count, Name, Spec, SpecError, closest, decode, named, read_toml

_LOG = {"log": True}
_ARRIVALS = [INDEX["arrival_rate"], INDEX["arrival_peak"]]
ScaleDownDelay = Annotated[float, Meta(ge=15, le=3600, extra=_LOG)]


class Static(Policy, frozen=True, kw_only=True, tag="static"):
    """Always the same number of replicas, of one variant (the one that is live, unless it is named)."""

    replicas: Annotated[int, Meta(ge=0, le=64)] = 4
    variant: Name | None = None

    def begin(self, situation: Situation) -> Controller:
        names = [variant.name for variant in situation.service.variants]
        if self.variant is not None and self.variant not in names:
            raise SpecError(
                f"static: variant {self.variant!r} does not exist; {closest(self.variant, names)}"
            )
        return _Targets([self.replicas], self.variant)


class Schedule(Policy, frozen=True, kw_only=True, tag="schedule"):
    """Target k at tick k, the last one for good: how a plan that was made elsewhere is carried out."""

    targets: Annotated[tuple[Count, ...], Meta(min_length=1)]

    def begin(self, situation: Situation) -> Controller:
        return _Targets(self.targets)


class _Targets:
    def __init__(self, targets: Sequence[int], variant: str | None = None) -> None:
        self._targets, self._variant, self._tick = targets, variant, -1

    def decide(self, seen: Observation) -> Decision:
        self._tick += 1
        target = self._targets[min(self._tick, len(self._targets) - 1)]
        return Decision.towards(target, seen, variant=self._variant, reason="schedule")


class Staffing(Policy, frozen=True, kw_only=True, tag="staffing"):
    """Staffing for the load that is there: R replicas at full batches, and a margin.

    `little`: R over `target_utilization`. `square-root`: ceil(R + beta sqrt(R)) (Halfin & Whitt 1981). `erlang-c`:
    the least count at which at most `delay_probability` of the requests wait. `wait`: the least count at which all
    but so many wait for no longer than the objective leaves beside a full batch, if full batches are what waits. R is
    the highest mean rate of the last `window_s` over capacity. Scaling down waits until the target has been lower
    for `scale_down_delay_s`.
    """

    rule: Literal["little", "square-root", "erlang-c", "wait"] = "square-root"
    beta: Annotated[float, Meta(ge=0, le=5)] = 1.5
    target_utilization: Annotated[float, Meta(ge=0.2, le=1)] = 0.7
    delay_probability: Annotated[float, Meta(gt=0, lt=1)] = 0.05
    window_s: Annotated[float, Meta(ge=15, le=1800, extra=_LOG)] = 120.0
    scale_down_delay_s: ScaleDownDelay = 300.0

    def begin(self, situation: Situation) -> Controller:
        return _Staffing(self, situation)


class _Staffing:
    def __init__(self, policy: Staffing, situation: Situation) -> None:
        self._policy = policy
        self._capacity = situation.capacity_rps()
        batch_s = float(situation.batch_times_s()[-1])
        self._longest_wait = max(0.0, situation.service.slo_s / batch_s - 1)
        self._loads: deque[float] = deque(maxlen=max(1, round(policy.window_s / situation.tick_s)))
        self._held: deque[int] = deque(maxlen=max(1, round(policy.scale_down_delay_s / situation.tick_s)))

    def decide(self, seen: Observation) -> Decision:
        rate = seen["arrival_rate"]
        if not math.isnan(rate):
            self._loads.append(rate / self._capacity)
        if not self._loads:
            return Decision(reason="no load known yet")
        load = max(self._loads)
        self._held.append(self._staffed(load))
        return Decision.towards(max(self._held), seen, reason=f"load {load:.2f} replicas")

    def _staffed(self, load: float) -> int:
        p = self._policy
        if p.rule == "little":
            return little(load, p.target_utilization)
        if p.rule == "square-root":
            return square_root_staffing(load, p.beta)
        if p.rule == "erlang-c":
            return erlang_staffing(load, p.delay_probability)
        return staffing_for_wait(load, 1 - p.delay_probability, self._longest_wait)


class Predictive(Policy, frozen=True, kw_only=True, tag="predictive"):
    """Forecast the load at the end of the start-up delay, and staff for it now.

    The need is `R + beta sqrt(R) + margin`, where R is the larger of the present level and the forecast one
    start-up delay (and `lead_margin_s`) ahead, plus `z` times the forecast's error, in replicas at full
    batches. Scaling down waits until the need has been lower for `scale_down_delay_s`. The forecast is
    `forecast.LoadTracker`'s.
    """

    beta: Annotated[float, Meta(ge=0, le=2)] = 0.8
    z: Annotated[float, Meta(ge=0, le=3)] = 1.0
    margin: Annotated[float, Meta(ge=0, le=1)] = 0.0
    peak_weight: Annotated[float, Meta(ge=0, le=1)] = 0.0
    level_s: Annotated[float, Meta(ge=15, le=600, extra=_LOG)] = 60.0
    trend_s: Annotated[float, Meta(ge=60, le=3600, extra=_LOG)] = 600.0
    damping: Annotated[float, Meta(ge=0, le=0.99)] = 0.9
    seasonal_weight: Annotated[float, Meta(ge=0, le=1)] = 0.5
    lead_margin_s: Annotated[float, Meta(ge=0, le=300)] = 15.0
    scale_down_delay_s: ScaleDownDelay = 300.0

    def begin(self, situation: Situation) -> Controller:
        return Alone(_Predictive(self, [situation]))

    def begin_together(self, situations: Sequence[Situation]) -> Together:
        return _Predictive(self, situations)

    def tracker(self, situations: Sequence[Situation]) -> LoadTracker:
        """A load tracker with one row per situation, as this policy wants it."""
        return LoadTracker(
            situations[0].tick_s,
            np.array([s.start_up_s + self.lead_margin_s for s in situations]),
            [s.history_rps for s in situations],
            level_s=self.level_s,
            trend_s=self.trend_s,
            damping=self.damping,
            seasonal_weight=self.seasonal_weight,
            error_s=1800.0,
        )

    def need(self, tracker: LoadTracker, capacity_rps: np.ndarray) -> np.ndarray:
        """Replicas that the tracked load needs, before rounding; shape (rows,)."""
        load = np.maximum(tracker.fast, tracker.forecast)
        load = load + self.peak_weight * np.maximum(tracker.highest(300.0) - load, 0.0)
        load = (load + self.z * tracker.forecast_error) / capacity_rps
        return load + self.beta * np.sqrt(load) + self.margin


class _Predictive:
    def __init__(self, policy: Predictive, situations: Sequence[Situation]) -> None:
        self._policy = policy
        self._capacity = np.array([s.capacity_rps() for s in situations])
        self._tracker = policy.tracker(situations)
        longest = int(policy.scale_down_delay_s / situations[0].tick_s) + 1
        self._held: deque[np.ndarray] = deque(maxlen=longest)
        self._first = True

    def decide(self, seen: Sequence[Observation]) -> Decisions:
        if not self._first:  # the first observation is older than the run; the history has it
            rate_rps, peak_rps = columns_of(seen, _ARRIVALS).T
            self._tracker.update(rate_rps, peak_rps)
        self._first = False
        need = self._policy.need(self._tracker, self._capacity)
        self._held.append(np.ceil(np.maximum(need, 0.0) - 1e-9))
        target = np.max(self._held, axis=0).astype(int)
        return Decisions.towards(
            target, replicas_of(seen), lambda row: f"forecast needs {need[row]:.2f} replicas"
        )


Scaling = (
    Static
    | Schedule
    | Hpa
    | Kpa
    | Keda
    | RayServe
    | Staffing
    | Predictive
    | PredictiveSeasonal
    | InferLine
    | Faro
    | Mark
    | SageServe
    | Saturation
    | Wva
    | Autopilot
    | Anticipate
    | Foresight
)
_BY_NAME: dict[str, type[Policy]] = {t.__struct_config__.tag: t for t in Scaling.__args__}


@dataclass(frozen=True, slots=True)
class Bounds:
    """The range of a tunable parameter."""

    low: float
    high: float
    log: bool
    integer: bool


def tunable(policy: type[Spec]) -> dict[str, Bounds]:
    """The numeric fields of a policy that declare a lower and an upper bound."""
    out: dict[str, Bounds] = {}
    for name, hint in get_type_hints(policy, include_extras=True).items():
        for meta in getattr(hint, "__metadata__", ()):
            low = meta.ge if meta.ge is not None else meta.gt
            high = meta.le if meta.le is not None else meta.lt
            if low is None or high is None or hint.__origin__ not in (int, float):
                continue
            inside = 1e-6 * (high - low)  # open ends
            low, high = low + inside * (meta.ge is None), high - inside * (meta.le is None)
            out[name] = Bounds(low, high, bool((meta.extra or {}).get("log")), hint.__origin__ is int)
    return out


def parse(text: str) -> Policy:
    """`hpa`, `hpa:target_utilization=0.6,min_replicas=2`, or the path of a TOML file with a `kind`."""
    if text.endswith(".toml"):
        return decode(read_toml(Path(text), "a policy file"), Scaling, text)  # type: ignore[arg-type]
    if text.endswith(".zip"):
        raise SpecError(
            f"policy {text!r}: a saved model; `pilotage export {text} --out BUNDLE` makes a policy of it"
        )
    return named(text, _BY_NAME, "policy", "a .toml file or a folder")


def describe(policy: Spec) -> str:
    """The policy as a command-line argument: its name and the fields that differ from their defaults.

    Of a field that is a policy or a network of its own only the kind is said, in angle brackets.
    """
    fields = msgspec.structs.asdict(policy)
    default = {f.name: f.default for f in msgspec.structs.fields(policy)}
    parts = [
        f"{k}=<{type(v).__name__.lower()}>" if isinstance(v, Spec) else f"{k}={v}"
        for k, v in fields.items()
        if v != default[k]
    ]
    return str(policy.__struct_config__.tag) + (":" + ",".join(parts) if parts else "")
