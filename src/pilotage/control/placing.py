"""A learned placement as it is kept and handed over: prices by name, in plain JSON.

The score of a (replica, node) pair is minus the sum of weights times terms, each in dollars per hour;
`engine.placement.TERMS` says what they mean and computes them from what a scheduler can measure. Names stand beside the
weights, so that a file that was made for other terms is refused and not misread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Self

import msgspec
from msgspec import Meta

from pilotage.world.faults import AtNotice
from pilotage.world.spec import Spec, SpecError, closest, decode, read_json

FILE: Final = "placement.json"


class LearnedPlacement(Spec, frozen=True, kw_only=True, tag="learned-placement"):
    """Weights by term, and what is done at a spot notice (`scenario.Placement.at_notice`); `trained` says with what
    settings and how well on validation."""

    terms: Annotated[tuple[str, ...], Meta(min_length=1)]
    weights: Annotated[tuple[float, ...], Meta(min_length=1)]
    at_notice: AtNotice = "drain"
    trained: dict[str, float] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.terms) != len(self.weights):
            raise SpecError(
                f"a learned placement has {len(self.weights)} weights for {len(self.terms)} terms; give one for each"
            )
        for name, weight in zip(self.terms, self.weights, strict=True):
            if self.terms.count(name) > 1 or not math.isfinite(weight):
                raise SpecError(
                    f"weight {weight} of term {name!r}: give every term once, and a finite number"
                )

    def weights_of(self, terms: Sequence[str]) -> tuple[float, ...]:
        """The weights in the order of `terms`. Raises SpecError where the two are not the same terms."""
        for name in self.terms:
            if name not in terms:
                raise SpecError(
                    f"a learned placement weighs {name!r}, which does not exist; {closest(name, terms)}"
                )
        for name in terms:
            if name not in self.terms:
                raise SpecError(f"a learned placement has no weight for {name!r}; train it anew")
        return tuple(self.weights[self.terms.index(name)] for name in terms)

    def save(self, folder: Path) -> None:
        """Writes `placement.json`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{FILE}.part"
        part.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        part.replace(folder / FILE)

    @classmethod
    def read(cls, path: Path) -> Self:
        """From a file, or from the folder of a training. Raises SpecError with the path and what is wrong."""
        path = path / FILE if path.is_dir() else path
        return decode(read_json(path, f"a {FILE} or the folder that holds one"), cls, str(path))


def shipped() -> LearnedPlacement:
    """The placement that comes with the package; `experiments/placement/run.py` trained it."""
    return LearnedPlacement.read(Path(__file__).with_name(FILE))
