"""What an exported policy must still decide where it is opened: observations, and the decisions that are expected.

Arithmetic differs between machines in the last place, so the export keeps only what single and double precision
decide alike. Situations and observations come out of a file that somebody may have forged: what would take long or
fill the memory is refused before the policy is asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Final

import numpy as np
from msgspec import Meta

from pilotage.control.policy import FEATURES, INDEX, Decision, Observation, Policy, Situation
from pilotage.world.pools import Pool
from pilotage.world.services import Service
from pilotage.world.spec import Spec

_LARGEST: Final = 1e7  # of any measurement
_MOST_LOAD: Final = 1e3  # replicas at full batches
_LONGEST_START_S: Final = 6 * 3600.0
_RATES: Final = (INDEX["arrival_rate"], INDEX["arrival_peak"])


class Ordered(Spec, frozen=True, kw_only=True, omit_defaults=True):
    """A decision without its reason."""

    order: int = 0
    release: int = 0
    max_batch: int | None = None
    pool: str | None = None
    variant: str | None = None
    batch_wait_s: float | None = None
    chunk_tokens: int | None = None

    @classmethod
    def of(cls, decision: Decision) -> Ordered:
        limit = None if decision.max_batch is None else int(decision.max_batch)
        chunk = None if decision.chunk_tokens is None else int(decision.chunk_tokens)
        return cls(
            order=int(decision.order), release=int(decision.release), max_batch=limit,
            pool=decision.pool, variant=decision.variant, batch_wait_s=decision.batch_wait_s, chunk_tokens=chunk,
        )  # fmt: skip


class Case(Spec, frozen=True, kw_only=True):
    """A service, what was measured of it at successive ticks (None: missing), and what is then decided."""

    service: Service
    pools: Annotated[tuple[Pool, ...], Meta(min_length=1, max_length=32)]
    tick_s: Annotated[float, Meta(ge=1, le=3600)]
    history_rps: Annotated[tuple[float, ...], Meta(max_length=20_000)]
    now_s: Annotated[tuple[float, ...], Meta(min_length=1, max_length=1000)]
    values: tuple[tuple[float | None, ...], ...]
    decisions: tuple[Ordered, ...]

    @property
    def situation(self) -> Situation:
        pools = {pool.name: pool for pool in self.pools}
        return Situation(self.service, pools, self.tick_s, np.array(self.history_rps, float))

    def observations(self, features: tuple[str, ...]) -> list[Observation]:
        """One per tick; `features` names the columns of `values`."""
        seen = np.full((len(self.values), len(FEATURES)), np.nan)
        for k, row in enumerate(self.values):
            seen[k, [INDEX[name] for name in features]] = [math.nan if v is None else v for v in row]
        return [
            Observation(now_s, values, np.zeros(len(FEATURES)))
            for now_s, values in zip(self.now_s, seen, strict=True)
        ]

    def problem(self, features: tuple[str, ...]) -> str | None:
        """What makes no sense, or would take long; None if all is well."""
        service, known = self.service, {pool.name for pool in self.pools}
        if not len(self.now_s) == len(self.values) == len(self.decisions):
            return "times, measurements and decisions differ in number"
        if any(len(row) != len(features) for row in self.values):
            return f"a row of measurements has not {len(features)} values"
        measured = (v for row in self.values for v in row if v is not None)
        numbers = [*self.history_rps, *self.now_s, *measured]
        if not all(abs(v) <= _LARGEST for v in numbers):
            return f"a number is beyond {_LARGEST:g}"
        missing = {*service.pools, *(name for v in service.variants for name in v.latency)} - known
        if missing:
            return f"pool {min(missing)!r} is not described"
        if service.server.max_batch > 4096 or service.server.batches_in_flight > 4096:
            return "batches are larger, or more, than 4096"
        if service.max_replicas > 1_000_000 or len(service.variants) > 32:
            return "it has too many replicas or variants"
        longest = max(pool.boot_s for pool in self.pools) + max(v.start_up_s for v in service.variants)
        if not longest <= _LONGEST_START_S:
            return f"a replica takes {longest:g} s to start; valid: at most {_LONGEST_START_S:g}"
        rates = [k for k, name in enumerate(features) if INDEX[name] in _RATES]
        busiest = max([0.0, *self.history_rps, *(row[k] or 0.0 for row in self.values for k in rates)])
        capacity = self.situation.capacity_rps()
        if not capacity > 0 or not busiest / capacity <= _MOST_LOAD:
            return f"a load of {busiest:g} on replicas of {capacity:g} requests/s; valid: {_MOST_LOAD:g} replicas"
        return None


class Probe(Spec, frozen=True, kw_only=True):
    """Inputs of a network and what it says of them; shapes (rows, inputs) and (rows, outputs)."""

    inputs: tuple[tuple[float, ...], ...]
    outputs: tuple[tuple[float, ...], ...]


class SelfTest(Spec, frozen=True, kw_only=True):
    """Cases of one policy; `features` names the columns of their measurements. Of the policy's networks, by file, the
    outputs may differ by `tolerance`."""

    features: Annotated[tuple[str, ...], Meta(max_length=64)]
    cases: Annotated[tuple[Case, ...], Meta(min_length=1, max_length=64)]
    probes: dict[str, Probe]
    tolerance: Annotated[float, Meta(gt=0, le=1e-3)] = 1e-4

    def problem(self, policy: Policy, networks: Mapping[str, Any]) -> str | None:
        """What a policy decides otherwise than it should; None if it is as it was."""
        for name in self.features:
            if name not in INDEX:
                return f"feature {name!r} cannot be measured here"
        if self.probes.keys() != networks.keys():
            return "it does not test the networks of this policy"
        for name, network in networks.items():
            found = self._differs(self.probes[name], network)
            if found is not None:
                return f"{name} {found}"
        for number, case in enumerate(self.cases):
            found = case.problem(self.features) or self._replayed(policy, case)
            if found is not None:
                return f"case {number}: {found}"
        return None

    def _differs(self, probe: Probe, network: Any) -> str | None:
        inputs, outputs = len(network.mean), len(network.biases[-1])
        if not probe.inputs or len(probe.inputs) != len(probe.outputs):
            return "is not tested"
        if any(len(row) != inputs for row in probe.inputs) or any(
            len(row) != outputs for row in probe.outputs
        ):
            return "is tested in another shape than it has"
        rows, expected = np.array(probe.inputs), np.array(probe.outputs)
        forward = network.forward()
        for count in (1, len(rows)):  # one row and many may go different ways
            off = float(np.abs(forward(rows[:count]) - expected[:count]).max())
            if not off <= self.tolerance:
                return f"says something else than it should: the difference is {off:.3g}"
        return None

    def _replayed(self, policy: Policy, case: Case) -> str | None:
        try:
            controller = policy.begin(case.situation)
            for tick, seen in enumerate(case.observations(self.features)):
                found, expected = Ordered.of(controller.decide(seen)), case.decisions[tick]
                if found != expected:
                    return f"at tick {tick} it decides {found}; expected: {expected}"
        except Exception as error:  # a policy that fails where it worked is not what it was
            return f"it fails: {type(error).__name__}: {error}"
        return None
