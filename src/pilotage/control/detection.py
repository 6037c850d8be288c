"""Whether a model errs more than it used to: change detectors on streams of right and wrong answers.

A detector takes batches of labelled answers, of any size down to one, and says how strong the evidence of a rise is and
whether it alarms. river's detectors serve as they are (`Library`); what no library has is a detector that does not
know the usual error rate, needs no tuning, and keeps a stated rate of false alarms (`ErrorRise`).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal, NamedTuple, Protocol

import numpy as np
from msgspec import Meta

from pilotage.world.spec import Spec, SpecError

_RATES: Final = 128  # candidates for the usual error rate
_MOST: Final = 700.0  # log of a score that stays finite


class Verdict(NamedTuple):
    """What a detector says after a batch: `score` is evidence over the threshold, `flag` whether it alarms."""

    score: float
    flag: bool


class Detector(Protocol):
    """A detector on one stream. After an alarm it goes on by itself; for a new model version, begin a new one."""

    def update(self, errors: int, count: int = 1) -> Verdict:
        """`errors` of `count` labelled answers were wrong. No answers, no evidence: a gap changes nothing."""
        ...


class Detection(Spec, frozen=True, kw_only=True, tag_field="kind"):
    """A way to detect."""

    def begin(self) -> Detector:
        raise NotImplementedError


class ErrorRise(Detection, frozen=True, kw_only=True, tag="error-rise"):
    """A rise of an error rate that is not known before, at no more than a stated rate of false alarms.

    A Bayesian mixture of Shiryaev-Roberts statistics: the sum, over every answer at which the rate may have risen,
    of the likelihood ratio of "it rose there" to "it never rose". The usual rate has Jeffreys' prior on a grid that is
    even in arcsin(sqrt(rate)), where the noise of an estimate is the same at every rate; a rise is one of `rises` on
    that scale (at a rate of 10 %: 0.06 is 4 points, 0.12 is 8, 0.24 is 18), each as likely. The statistic less the
    number of answers is a martingale as long as nothing changes, so that, on average over the prior, an alarm above
    10,000 / `false_alarms_per_10k` comes that seldom or more so (Pollak, Annals of Statistics 13, 1985): with large
    batches ask for few. A batch is one step: a rise is sought at its start. An answer costs the same work however many
    came before it. Rises of less than about half the smallest go unseen, as do falls; both become what is usual. After
    an alarm the evidence starts at nothing; what is usual is kept, so that a rise that stays is reported again and
    again, until it has become usual. The first batch only says what is usual.
    """

    false_alarms_per_10k: Annotated[float, Meta(gt=0, le=100, extra={"log": True})] = 0.5
    rises: Annotated[tuple[Annotated[float, Meta(gt=0, le=1)], ...], Meta(min_length=1)] = (0.06, 0.12, 0.24)

    def begin(self) -> Detector:
        return _ErrorRise(self)


class _ErrorRise:
    def __init__(self, spec: ErrorRise) -> None:
        angle = (np.arange(_RATES) + 0.5) / _RATES * math.pi / 2
        risen = np.minimum(angle + np.array(spec.rises)[:, None], (1 - 0.25 / _RATES) * math.pi / 2)
        self._wrong, self._right = 2 * np.log(np.sin(angle)), 2 * np.log(np.cos(angle))
        self._risen_wrong, self._risen_right = 2 * np.log(np.sin(risen)), 2 * np.log(np.cos(risen))
        self._log_threshold = math.log(1e4 / spec.false_alarms_per_10k)
        # logs of likelihoods of all answers: without a rise, by usual rate; with one, summed over its starts
        self._unchanged = np.zeros(_RATES)
        self._changed = np.full(risen.shape, -math.inf)
        self._any = False

    def update(self, errors: int, count: int = 1) -> Verdict:
        right = _checked(errors, count)
        if count:
            if self._any:
                starting = self._unchanged + math.log(count / len(self._changed))
                self._changed = np.logaddexp(self._changed, starting)
            self._any = True
            self._unchanged += errors * self._wrong + right * self._right
            self._changed += errors * self._risen_wrong + right * self._risen_right
        evidence = _log_sum(self._changed) - _log_sum(self._unchanged) - self._log_threshold
        if evidence >= 0:
            self._changed[:] = -math.inf
        return Verdict(math.exp(min(evidence, _MOST)), evidence >= 0)


def _log_sum(logs: np.ndarray) -> float:
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).sum())) if top > -math.inf else top


class Cusum(Detection, frozen=True, kw_only=True, tag="cusum"):
    """Page's CUSUM of log-likelihood ratios (Biometrika 41, 1954) where the usual rate is known: a rise by `rise`."""

    usual_rate: Annotated[float, Meta(gt=0, lt=1)]
    rise: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    threshold: Annotated[float, Meta(gt=0, le=100, extra={"log": True})] = 7.0

    def __post_init__(self) -> None:
        if self.usual_rate + self.rise >= 1:
            raise SpecError(
                f"cusum: usual_rate {self.usual_rate} and rise {self.rise} make a rate of 1 or more; valid: a rise "
                f"below {1 - self.usual_rate:.4g}"
            )

    def begin(self) -> Detector:
        return _Cusum(self)


class _Cusum:
    def __init__(self, spec: Cusum) -> None:
        usual, risen = spec.usual_rate, spec.usual_rate + spec.rise
        self._wrong, self._right = math.log(risen / usual), math.log((1 - risen) / (1 - usual))
        self._threshold, self._sum = spec.threshold, 0.0

    def update(self, errors: int, count: int = 1) -> Verdict:
        right = _checked(errors, count)
        self._sum = max(0.0, self._sum + errors * self._wrong + right * self._right)
        score = self._sum / self._threshold
        if score > 1:
            self._sum = 0.0
        return Verdict(score, score > 1)


class Library(Detection, frozen=True, kw_only=True, tag="library"):
    """A detector of river (extra `learn`) as it is, and its behaviour after an alarm.

    `setting` is the one number that makes it more or less sensitive, river's own unless given: see `SETTINGS`; the rest
    is river's default, but that Page-Hinkley looks for rises only. Answers come one at a time, the errors of a batch
    spread evenly over it. The score is 1 at an alarm and 0 otherwise: river gives none. KSWIN is not made for answers
    of 0 or 1 and hardly ever alarms on them.
    """

    name: Literal["ADWIN", "PageHinkley", "KSWIN", "DDM", "HDDMA", "HDDMW"]
    setting: Annotated[float, Meta(gt=0)] | None = None

    def begin(self) -> Detector:
        return _Library(self)


SETTINGS: Final = {
    "ADWIN": "delta", "PageHinkley": "threshold", "KSWIN": "alpha", "DDM": "drift_threshold",
    "HDDMA": "drift_confidence", "HDDMW": "drift_confidence",
}  # fmt: skip


_ALWAYS: Final[dict[str, dict[str, Any]]] = {"PageHinkley": {"mode": "up"}, "KSWIN": {"seed": 0}}


class _Library:
    def __init__(self, spec: Library) -> None:
        try:
            from river import drift
        except ImportError:
            raise SpecError(f"{spec.name} needs river: install pilotage[learn], or use error-rise") from None
        kind = getattr(drift, spec.name, None) or getattr(drift.binary, spec.name)
        given: dict[str, Any] = dict(_ALWAYS.get(spec.name, {}))
        if spec.setting is not None:
            given[SETTINGS[spec.name]] = spec.setting
        self._river: Any = kind(**given)

    def update(self, errors: int, count: int = 1) -> Verdict:
        _checked(errors, count)
        flag, so_far = False, 0
        for k in range(1, count + 1):
            now = k * errors // count
            self._river.update(now - so_far)
            flag, so_far = flag or self._river.drift_detected, now
        return Verdict(float(flag), flag)


def _checked(errors: int, count: int) -> int:
    """The number of right answers."""
    if not 0 <= errors <= count:
        raise ValueError(
            f"{errors} errors of {count} answers; valid: 0 to {count} errors, counts of 0 and more"
        )
    return count - errors
