"""Retraining policies by name, and when their jobs run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from pilotage.control.learned_retraining import LearnedRetraining
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
from pilotage.world.spec import SpecError, closest, decode

SHIPPED: Final = "learned-retraining"


class OffPeak(Retraining, frozen=True, kw_only=True, tag="off-peak"):
    """Another policy (as a command-line argument names it), whose retrainings wait until the cluster's load is at
    most `load` times its mean of the last day, but no longer than `patience_batches`: a training job on nodes that
    serving needs is dear."""

    policy: str = SHIPPED
    load: Annotated[float, Meta(ge=0.1, le=2)] = 0.8
    patience_batches: Annotated[int, Meta(ge=1, le=1000, extra={"log": True})] = 12

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


KINDS: Final[tuple[type[Retraining], ...]] = (
    Never, Periodic, ErrorThreshold, InputDrift, CaraT, CaraCt, SkiRental, FreshSki, Paired, ForecastQuantile, OffPeak,
)  # fmt: skip
BY_NAME: Final = {str(kind.__struct_config__.tag): kind for kind in KINDS}


def retraining_from(text: str) -> Retraining:
    """The policy that a command-line argument names: a name, a name with parameters (`fresh-ski:factor=2`), what is
    shipped (`learned-retraining`), or a `retraining.json`."""
    if text == SHIPPED:
        return _read(Path(__file__).with_name("learned_retraining.json"))
    if text.endswith(".json"):
        return _read(Path(text))
    name, _, rest = text.partition(":")
    if name not in BY_NAME:
        raise SpecError(
            f"retraining {name!r} does not exist; {closest(name, [*BY_NAME, SHIPPED])}; or a retraining.json"
        )
    fields: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise SpecError(f"retraining {text!r}: {part!r} is not of the form field=value")
        fields[key.strip()] = value.strip()
    return decode(fields, BY_NAME[name], f"retraining {text!r}", strict=False)


def _read(path: Path) -> LearnedRetraining:
    try:
        raw = json.loads(path.read_bytes())
        return msgspec.convert(raw, LearnedRetraining)
    except OSError as error:
        raise SpecError(
            f"{path}: cannot be read: {error.strerror}; give the path of a retraining.json"
        ) from None
    except (ValueError, msgspec.ValidationError) as error:
        raise SpecError(f"{path}: not a learned retraining policy: {error}") from None
