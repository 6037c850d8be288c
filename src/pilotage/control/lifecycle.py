"""Retraining policies by name, what a detector makes of one, and when their jobs run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from msgspec import Meta

from pilotage.control.detection import Detection, ErrorRise, Library
from pilotage.control.learned import policy_from
from pilotage.control.learned_retraining import LearnedRetraining
from pilotage.control.policy import Policy
from pilotage.control.retraining import (
    NO_PAST,
    CaraCt,
    CaraT,
    ErrorThreshold,
    ForecastQuantile,
    FreshSki,
    InputDrift,
    Never,
    Paired,
    Past,
    Periodic,
    Retrainer,
    Retraining,
    Seen,
    SkiRental,
    Stakes,
)
from pilotage.world.spec import decode, named, read_json

SHIPPED: Final = "learned-retraining"


class OffPeak(Retraining, frozen=True, kw_only=True, tag="off-peak"):
    """Another policy (as a command-line argument names it), whose retrainings wait until the cluster's load is at
    most `load` times its mean of the last day, but no longer than `patience_batches`: a training job on nodes that
    serving needs is dear. With `make_room` a job that finds no node gets one from serving: while it waits no service
    orders replicas, and the one that has most gives one up."""

    policy: str = SHIPPED
    load: Annotated[float, Meta(ge=0.1, le=2)] = 0.8
    patience_batches: Annotated[int, Meta(ge=1, le=1000, extra={"log": True})] = 12
    make_room: bool = True

    @property
    def makes_room(self) -> bool:
        return self.make_room

    def __post_init__(self) -> None:
        retraining_from(self.policy)

    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        return _OffPeak(self, retraining_from(self.policy).begin(stakes, past))


class _OffPeak:
    def __init__(self, policy: OffPeak, inner: Retrainer) -> None:
        self._policy, self._inner = policy, inner
        self._waited: int | None = None

    def decide(self, seen: Seen) -> bool:
        if self._waited is None:
            if not self._inner.decide(seen):
                return False
            self._waited = 0
        quiet = not seen.load > self._policy.load  # unknown counts as quiet
        self._waited += 1
        if not quiet and self._waited <= self._policy.patience_batches:
            return False
        self._waited = None
        return True


class Triggered(Retraining, frozen=True, kw_only=True, tag="triggered"):
    """When a change detector alarms on the deployed version's errors; it begins anew with every version.

    `detector` is pilotage's own that needs no usual rate, or one of river's; `setting` is its sensitivity (None: its
    own). It asks nothing about the price: alone it retrains as often where that is dear as where it is cheap.
    """

    detector: Literal["error-rise", "ADWIN", "PageHinkley", "KSWIN", "DDM", "HDDMA", "HDDMW"] = "error-rise"
    setting: Annotated[float, Meta(gt=0)] | None = None

    @property
    def detection(self) -> Detection:
        if self.detector != "error-rise":
            return Library(name=self.detector, setting=self.setting)
        return ErrorRise() if self.setting is None else ErrorRise(false_alarms_per_10k=self.setting)

    def begin(self, stakes: Stakes, past: Past = NO_PAST) -> Retrainer:
        return _Triggered(self.detection, stakes.batch_size)


class _Triggered:
    def __init__(self, detection: Detection, batch_size: int) -> None:
        self._detection, self._batch_size = detection, batch_size
        self._detector, self._fed = detection.begin(), 0

    def decide(self, seen: Seen) -> bool:
        if len(seen.errors) < self._fed or seen.age == 0:
            self._detector, self._fed = self._detection.begin(), 0
        flag = False
        for errors in seen.errors[self._fed :]:
            flag = self._detector.update(int(errors), self._batch_size).flag
        self._fed = len(seen.errors)
        return flag


KINDS: Final[tuple[type[Retraining], ...]] = (
    Never, Periodic, ErrorThreshold, InputDrift, CaraT, CaraCt, SkiRental, FreshSki, Paired, ForecastQuantile,
    Triggered, OffPeak,
)  # fmt: skip
BY_NAME: Final = {str(kind.__struct_config__.tag): kind for kind in KINDS}


def retraining_from(text: str) -> Retraining:
    """The policy that a command-line argument names: a name, a name with parameters (`fresh-ski:factor=2`), what is
    shipped (`learned-retraining`), or a `retraining.json`."""
    if text == SHIPPED:
        return _read(Path(__file__).with_name("learned_retraining.json"))
    if text.endswith(".json"):
        return _read(Path(text))
    return named(text, BY_NAME, "retraining", f"{SHIPPED}, or a retraining.json")


def fleet_from(text: str) -> tuple[Policy, Retraining]:
    """The scaling and the retraining policy that a command-line argument names, joined by `+`: `hpa+ski-rental`.
    Without the second, models are never retrained."""
    scaling, plus, retraining = text.rpartition("+")
    if not plus:
        return policy_from(text), Never()
    return policy_from(scaling), retraining_from(retraining)


def _read(path: Path) -> LearnedRetraining:
    return decode(read_json(path, "the path of a retraining.json"), LearnedRetraining, str(path))
