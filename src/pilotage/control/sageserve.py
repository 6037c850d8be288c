"""SageServe: an hourly integer programme on the forecast, and gates on utilisation in between.

Origin: kjain1810/SageServe `long_term_allocation.py`, `arbiter.py`. The programme is solved with SciPy's HiGHS, where
upstream uses CBC. Upstream forecasts are read from files; here they are `forecast.Horizon`'s. Its gates look at the
memory that the requests in an LLM endpoint take, here at their places in batches that are taken; its instances come
from and go to a spot pool, which here is any other user of the nodes. A service is one model in one region, its pools
are the types of GPU.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from pilotage.control.fleet import Fleet
from pilotage.control.forecast import Horizon
from pilotage.control.policy import Controller, Decision, Observation, Pace, Policy, Situation

Gates = Literal["reactive", "lt-u", "lt-ua"]
FROM_MIN, TO_MIN = 20, 60  # the minutes ahead that a plan must cover


def allocation(
    present: Sequence[int],
    capacity: Sequence[float],
    usd: Sequence[float],
    start_usd: Sequence[float],
    demand: float,
) -> list[int]:
    """Changes d >= -present by type that cover the demand at the least `sum(usd d + start_usd max(d, 0))`."""
    # slow to load, and no other policy wants it
    from scipy.optimize import Bounds, LinearConstraint, milp

    n = len(present)
    # columns: d, and the part of it that is above 0
    cost = np.r_[np.asarray(usd, float), np.asarray(start_usd, float)]
    covers = LinearConstraint(np.r_[capacity, np.zeros(n)], demand - float(np.dot(present, capacity)))
    above = LinearConstraint(np.hstack([-np.eye(n), np.eye(n)]), 0.0)
    bounds = Bounds(np.r_[-np.asarray(present, float), np.zeros(n)], np.inf)
    found = milp(cost, constraints=[covers, above], bounds=bounds, integrality=np.ones(2 * n))
    return [round(d) for d in found.x[:n]]


def gate(
    kind: Gates,
    utilization: float,
    pending: int,
    *,
    surprise: float = 0.0,
    up_above: float = 0.5,
    down_below: float = 0.25,
    urgent_above: float = 0.9,
    surprise_above: float = 5.0,
) -> tuple[int, int]:
    """The change to make now (1, 0, -1), and what is left of the plan's pending change.

    `surprise` is the observed over the predicted load of the minute, which LT-UA looks at in place of urgency. What
    is added beyond the plan is owed back to it.
    """
    if kind == "reactive":
        return (utilization > up_above) - (utilization < down_below), pending
    if pending > 0 and utilization > up_above:
        return 1, pending - 1
    if pending < 0 and utilization < down_below:
        return -1, pending + 1
    urgent = surprise > surprise_above if kind == "lt-ua" else utilization > urgent_above
    return (1, -1) if pending == 0 and urgent else (0, pending)


class SageServe(Policy, frozen=True, kw_only=True, tag="sageserve"):
    """SageServe with upstream's thresholds, hourly plans, and a starting cost 15 times the running one.

    `gates` are upstream's: *reactive* (no plan), *lt-u* and *lt-ua*. Upstream checks them at every request, here
    every `check_interval_s`.
    """

    gates: Gates = "lt-u"
    up_above: Annotated[float, Meta(ge=0.1, le=0.95)] = 0.5
    down_below: Annotated[float, Meta(ge=0.0, le=0.8)] = 0.25
    urgent_above: Annotated[float, Meta(ge=0.5, le=1.0)] = 0.9
    surprise_above: Annotated[float, Meta(ge=1.0, le=10.0)] = 5.0
    demand_factor: Annotated[float, Meta(ge=0.5, le=3.0)] = 1.0
    start_cost: Annotated[float, Meta(ge=0.0, le=100.0)] = 15.0
    plan_interval_s: Annotated[float, Meta(gt=0, le=86400)] = 3600.0
    check_interval_s: Annotated[float, Meta(gt=0, le=3600)] = 15.0

    def begin(self, situation: Situation) -> Controller:
        return _SageServe(self, situation)

    def period_s(self) -> float:
        return self.check_interval_s


class _SageServe:
    def __init__(self, policy: SageServe, situation: Situation) -> None:
        service = situation.service
        self._policy = policy
        self._pools, self._fleet = service.pools, Fleet(service.pools)
        self._capacity = [situation.capacity_rps(name) for name in service.pools]
        self._usd = [situation.pools[name].price_usd_per_hour for name in service.pools]
        self._places, self._start_up_s = situation.concurrency, situation.start_up_s
        # row 0 is the coming minute, for the comparison with what came
        leads_s = 60.0 * np.r_[1, np.arange(FROM_MIN, TO_MIN + 1)]
        self._horizon = Horizon(situation.tick_s, leads_s, situation.history_rps)
        self._known = len(situation.history_rps) > 0
        self._minute: deque[float] = deque(maxlen=max(1, round(60 / situation.tick_s)))
        self._predicted: deque[float] = deque(maxlen=self._minute.maxlen)
        self._plans = Pace(policy.plan_interval_s, situation.tick_s)
        self._checks = Pace(policy.check_interval_s, situation.tick_s)
        self._pending = np.zeros(len(service.pools), int)
        self._busy_until_s = -math.inf

    def decide(self, seen: Observation) -> Decision:
        p, rate = self._policy, seen["arrival_rate"]
        places = self._places * max(1.0, seen["replicas_ready"])
        utilization = seen["concurrency"] / places
        if not math.isnan(rate):
            self._horizon.update(rate)
            self._minute.append(rate)
            self._known = True
        if not (seen.counted and self._known):
            return Decision(reason="no metrics")
        # a forecast for a minute ahead is compared when its minute is over
        predicted = self._predicted[0] if self._predicted else math.inf
        self._predicted.append(float(self._horizon.rates_rps[0]))
        self._fleet.settle(seen.replicas)
        if p.gates != "reactive" and self._plans.due(seen.now_s):
            demand = p.demand_factor * float(self._horizon.rates_rps[1:].max())
            start_usd = [p.start_cost * usd for usd in self._usd]
            present = list(self._fleet.counts.values())
            self._pending = np.array(allocation(present, self._capacity, self._usd, start_usd, demand))
        if not self._checks.due(seen.now_s) or seen.now_s < self._busy_until_s or math.isnan(utilization):
            return Decision(reason="a change is under way")
        observed = float(np.mean(self._minute)) if self._minute else 0.0
        pending = int(self._pending.sum())
        change, left = gate(
            p.gates,
            utilization,
            pending,
            surprise=observed / max(predicted, 1e-9),
            up_above=p.up_above,
            down_below=p.down_below,
            urgent_above=p.urgent_above,
            surprise_above=p.surprise_above,
        )
        reason = f"{pending:+d} to go, {utilization:.0%} of the places taken"
        if change == 0:
            return Decision(reason=reason)
        k = int(np.argmax(change * self._pending))  # where the plan wants it most
        self._pending[k] += left - pending
        if change < 0:
            return self._fleet.release(1, reason)
        self._busy_until_s = seen.now_s + self._start_up_s
        return self._fleet.order(self._pools[k], 1, reason)
