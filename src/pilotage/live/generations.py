"""What a registry knows of a service's versions: what is live, how good each was, which were promoted, and how often.

A registry does not say how a version decays in service, so drift is not fitted; what versions were worth when they
were made is. A version is called worse if its error is a quarter above the median's, and by more than chance allows
where the number of examples is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np

from pilotage.live.compare import interval, wilson
from pilotage.live.registries import CHAMPION, MOVED, Measure, Registry, Version
from pilotage.world.lifecycle import Lifecycle

Estimate = tuple[float, float, float]  # value, low, high

WORSE: Final = 1.25  # times the median's error
FEWEST: Final = 5  # measured versions, below which nothing is said of a version as such


@dataclass(frozen=True, slots=True)
class Generations:
    """A service's versions, each number as (value, low, high) with a 95 % interval, or None where it is not known.

    `accuracy` is that of the version that is live. Of versions that are not worse, `base_error` is the mean share of
    wrong answers, and `luck_cv` how far they differ beyond what chance explains; `worse` is the share of the others,
    and `worse_by` how many times the median's error those have.
    """

    live: str | None
    versions: int
    promoted: tuple[str, ...]
    days_between: float | None
    accuracy: Estimate | None
    base_error: Estimate | None
    luck_cv: float | None
    worse: Estimate | None
    worse_by: float | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; estimates as objects."""

        def told(value: Any) -> Any:
            return (
                dict(zip(("value", "low", "high"), value, strict=True)) if isinstance(value, tuple) else value
            )

        found = {
            name: told(getattr(self, name))
            for name in ("live", "versions", "days_between", "accuracy", "base_error", "luck_cv", "worse", "worse_by")
        }  # fmt: skip
        return found | {"promoted": list(self.promoted)}

    def fitted(self, life: Lifecycle) -> Lifecycle:
        """A lifecycle with what is known of the versions in the place of what was assumed."""
        if self.base_error is None or self.worse is None or not 0 < self.base_error[0] < 1:
            return life
        error = self.base_error[0]
        decay = life.decay.replace(
            base_error=error, worst_error=max(error, life.decay.worst_error), luck_cv=self.luck_cv
        )
        training = life.training.replace(
            worse=self.worse[0],
            worse_by=life.training.worse_by if self.worse_by is None else self.worse_by,
        )
        changed: Lifecycle = life.replace(decay=decay, training=training)
        return changed


def generations(registry: Registry, model: str, metric: str, start_s: float, end_s: float) -> Generations:
    """What is known of a model whose `metric` is the share of right answers; the history is from `start_s` to `end_s`.

    RegistryError where the registry fails. An unknown model, a version without the metric, one that says nothing of
    its examples, and a promotion within the history are said in `notes`.
    """
    versions = registry.versions(model)
    champion = registry.aliases(model).get(CHAMPION)
    notes = []
    if not versions:
        notes.append(f"the registry has no model {model!r}")
    elif champion is None:
        notes.append(f"no version of {model!r} has the alias {CHAMPION!r}: what is live is not known")
    promoted = [v for v in versions if v.version == champion or f"{MOVED}.{CHAMPION}" in v.tags]
    fresh = [v.version for v in promoted if start_s <= _unix_s(v) <= end_s]
    if fresh:
        notes.append(
            f"{', '.join(f'version {one}' for one in fresh)} was made and promoted within the history: the law may be "
            "that of two versions"
        )
    measured = [(v.version, v.metrics[metric]) for v in versions if _is_share(v.metrics.get(metric))]
    if len(measured) < len(versions):
        notes.append(
            f"{len(versions) - len(measured)} of {len(versions)} versions have no {metric!r} between 0 and 1"
        )
    live = dict(measured).get(champion or "")
    accuracy = None
    if live is not None:
        sure = interval(metric, live)
        accuracy = (live.value, *(sure or (live.value, live.value)))
        if sure is None:
            notes.append(f"how many examples {metric!r} was measured on is not known: it has no interval")
    made_s = np.array(sorted(map(_unix_s, versions)))
    days = float(np.diff(made_s).mean() / 86400) if len(made_s) > 1 else None
    enough = len(measured) >= FEWEST
    base_error, luck_cv, worse, worse_by = (
        _spread([measure for _, measure in measured]) if enough else (None, None, None, None)
    )
    return Generations(
        live=champion,
        versions=len(versions),
        promoted=tuple(v.version for v in promoted),
        days_between=days,
        accuracy=accuracy,
        base_error=base_error,
        luck_cv=luck_cv,
        worse=worse,
        worse_by=worse_by,
        notes=tuple(notes),
    )


def _spread(measures: Sequence[Measure]) -> tuple[Estimate, float, Estimate, float | None]:
    """Base error, luck, share of worse versions, and how much worse those are."""
    errors = np.array([1 - one.value for one in measures])
    n = np.array([one.n or np.inf for one in measures])
    typical = float(np.median(errors))
    chance = np.sqrt(typical * (1 - typical) / n)
    bad = errors > np.maximum(WORSE * typical, typical + 1.96 * chance)
    good = errors[~bad]
    mean = float(good.mean())
    from scipy.special import stdtrit  # large, and of no use where no registry is asked

    half = float(stdtrit(len(good) - 1, 0.975) * good.std(ddof=1) / np.sqrt(len(good)))
    luck = float(np.sqrt(max(0.0, good.var(ddof=1) - (chance[~bad] ** 2).mean())))
    share = float(bad.mean())
    return (
        (mean, max(0.0, mean - half), min(1.0, mean + half)),
        luck / mean if mean else 0.0,
        (share, *wilson(share, len(errors))),
        float(errors[bad].mean() / typical) if bad.any() and typical else None,
    )


def _is_share(measure: Measure | None) -> bool:
    return measure is not None and 0 <= measure.value <= 1


def _unix_s(version: Version) -> float:
    when = datetime.fromisoformat(version.created)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
