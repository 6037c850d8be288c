"""InferLine's tuner: traffic envelopes.

Origin: Crankshaw et al., SoCC'20 (arXiv 1812.01776); its code is not public. The definition of the envelope is the
paper's; the provisioning rules are as recalled from it, unverified. A service is a pipeline of one model.

The functions take time stamps, as the paper does. A monitor reports counts, so that the policy's shortest window is
its tick of 1 s; windows below that, the paper's first few, are not seen.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from msgspec import Meta

from pilotage.control.policy import Controller, Decision, Observation, Policy, Situation

TICK_S = 1.0
LONGEST_S = 60.0
QUIET_S = 15.0  # scaling down waits for so long after a change
RECENT_S, PEAK_S = 30.0, 5.0  # and looks at the busiest PEAK_S of so long a past


def windows(first_s: float, longest_s: float = LONGEST_S) -> np.ndarray:
    """Window lengths: the service time, doubled up to a minute."""
    count = max(0, math.floor(math.log2(longest_s / first_s) + 1e-9)) + 1
    lengths: np.ndarray = first_s * 2.0 ** np.arange(count)
    return lengths


def envelope(arrival_s: np.ndarray, windows_s: Sequence[float] | np.ndarray) -> np.ndarray:
    """The largest count of arrivals in any closed window of each length; shape (windows,)."""
    after = [np.searchsorted(arrival_s, arrival_s + w * (1 + 1e-12), side="right") for w in windows_s]
    here = np.arange(len(arrival_s))
    return np.array([int(np.max(k - here, initial=0)) for k in after])


def envelope_of_counts(counts: np.ndarray, widths: Sequence[int] | np.ndarray) -> np.ndarray:
    """The largest sum of so many adjacent counts, for each width; shape (widths,). 0 where there are fewer."""
    total = np.r_[0.0, np.cumsum(counts)]
    return np.array([np.max(total[w:] - total[:-w], initial=0.0) for w in widths])


def scale_up(
    rates_rps: np.ndarray,
    sample_rps: np.ndarray,
    present: int,
    *,
    scale_factor: float,
    throughput_rps: float,
    provisioning: float,
) -> int:
    """Replicas of a model, never below `present`, where some window's rate exceeds the sample's.

    `scale_factor` is the model's queries per query of the pipeline, `throughput_rps` what one replica does at the
    planned batch size, `provisioning` the share of the planned replicas that the sample's mean rate keeps busy.
    """
    exceeded = rates_rps[rates_rps > sample_rps]
    if not len(exceeded):
        return present
    return max(present, _staffed(float(exceeded.max()), scale_factor, throughput_rps, provisioning))


def scale_down(
    rate_rps: float,
    present: int,
    quiet_s: float,
    *,
    scale_factor: float,
    throughput_rps: float,
    provisioning: float,
) -> int:
    """Replicas of a model, never above `present`, `quiet_s` after the last change.

    `rate_rps` is the busiest recent rate, `provisioning` the least over the pipeline's models.
    """
    if quiet_s < QUIET_S:
        return present
    return min(present, _staffed(rate_rps, scale_factor, throughput_rps, provisioning))


def _staffed(rate_rps: float, scale_factor: float, throughput_rps: float, provisioning: float) -> int:
    return math.ceil(rate_rps * scale_factor / (throughput_rps * provisioning) - 1e-9)


def planned(envelope: np.ndarray, windows_s: np.ndarray, throughput_rps: float, spare_s: float) -> int:
    """The least number of replicas that let nothing of an envelope wait for more than `spare_s`.

    By network calculus, what came in a window waits until the replicas have worked off the excess over it.
    """
    need = envelope / (throughput_rps * (windows_s + spare_s))
    return max(1, math.ceil(float(need.max(initial=0.0)) - 1e-9))


class InferLine(Policy, frozen=True, kw_only=True, tag="inferline"):
    """The tuner with the paper's windows, planned on the last `sample_s` before the run.

    The paper plans with a search over simulations; here the plan is `planned`: the least count that meets the
    objective for the sample's envelope. Without a past, the first minute of the run is the sample, and until then
    nothing changes. `headroom` multiplies the provisioning ratio: less leaves more spare replicas than planned.
    """

    sample_s: Annotated[float, Meta(ge=60, le=86400, extra={"log": True})] = 3600.0
    headroom: Annotated[float, Meta(ge=0.3, le=1.5)] = 1.0

    def begin(self, situation: Situation) -> Controller:
        return _InferLine(self, situation)

    def period_s(self) -> float:
        return TICK_S


class _InferLine:
    def __init__(self, policy: InferLine, situation: Situation) -> None:
        tick_s = situation.tick_s
        self._policy, self._tick_s = policy, tick_s
        self._capacity = situation.capacity_rps()
        batch_s = float(situation.batch_times_s()[-1])
        self._spare_s = max(0.0, situation.service.slo_s - batch_s)
        self._windows = windows(max(tick_s, batch_s))
        self._widths = np.maximum(1, np.round(self._windows / tick_s)).astype(int)
        self._windows = self._widths * tick_s
        self._counts: deque[float] = deque(maxlen=int(self._widths[-1]))
        self._peak = max(1, round(PEAK_S / tick_s))
        self._recent = max(1, round(RECENT_S / tick_s))
        self._changed_s = -math.inf
        self._planned = False
        past = situation.history_rps[-round(policy.sample_s / tick_s) :] * tick_s
        self._counts.extend(past[-int(self._widths[-1]) :].tolist())
        if len(past) >= self._widths[-1]:
            self._plan(past)

    def _plan(self, counts: np.ndarray) -> None:
        sample = envelope_of_counts(counts, self._widths)
        count = planned(sample, self._windows, self._capacity, self._spare_s)
        load = float(np.mean(counts)) / self._tick_s / self._capacity
        self._sample_rps = sample / self._windows
        self._provisioning = min(1.0, max(0.05, load / count)) * self._policy.headroom
        self._planned = True

    def decide(self, seen: Observation) -> Decision:
        rate, present = seen["arrival_rate"], seen.replicas
        if not math.isnan(rate):
            self._counts.append(rate * self._tick_s)
        counts = np.array(self._counts)
        if not self._planned and len(counts) == self._counts.maxlen:
            self._plan(counts)
        if not self._planned or not seen.counted or len(counts) == 0:
            return Decision(reason="no sample yet")
        model = {
            "scale_factor": 1.0,
            "throughput_rps": self._capacity,
            "provisioning": self._provisioning,
        }
        rates = envelope_of_counts(counts, self._widths) / self._windows
        count, why = scale_up(rates, self._sample_rps, present, **model), "the envelope is exceeded"
        if count == present and len(counts) >= self._recent:
            busiest = envelope_of_counts(counts[-self._recent :], [self._peak])[0]
            quiet_s = seen.now_s - self._changed_s
            count = scale_down(float(busiest) / (self._peak * self._tick_s), present, quiet_s, **model)
            why = "within the envelope"
        count = max(count, 1)
        if count != present:
            self._changed_s = seen.now_s
        return Decision.towards(count, seen, reason=why)
