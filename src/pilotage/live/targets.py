"""Targets: where services run, and what steering and promotion ask of them.

`Scaled` is what the steer loop needs, `Target` what promotion and rollback need; `kubernetes.Kubernetes` and
`ray_serve.RayServe` do both, and so does `DryRun`, which only says what it would do. A target is a frozen specification
(the `[target]` table of a steer configuration, told apart by `kind`); `begin()` gives what acts, and no longer than a
lease is held, where one is given.

    [target]
    kind = "dry-run"
    replicas = {ranker = 3}
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec
from msgspec import Struct

from pilotage.live.lease import Lease
from pilotage.live.registries import Version
from pilotage.world.spec import Count, PositiveCount, Spec, SpecError, closest, decode

MOST_REPLICAS: Final = 1000  # of one service; more is taken for a mistake


class TargetError(Exception):
    """A target did not do what was asked."""


class PausedError(TargetError):
    """A person has said that this service is not to be touched."""


class ScaleOrder(Struct, frozen=True, gc=False):
    """What a service is to have: so many replicas, and, where given, this batch limit, build and pool.

    It names a state and not a change, so that it can be repeated.
    """

    service: str
    replicas: int
    max_batch: int | None = None
    variant: str | None = None
    pool: str | None = None


class Scaled(Protocol):
    """What the steer loop needs of a target. Errors are `TargetError`s, and every call ends within a stated time."""

    def counts(self, services: Sequence[str]) -> Mapping[str, int]:
        """The replicas ordered now, whether or not they are ready; a service that is missing is unknown."""
        ...

    def scale(self, orders: Sequence[ScaleOrder]) -> Sequence[str | TargetError]:
        """One outcome per order: what was done, in a sentence, or why it was not. May be repeated."""
        ...


class Target(Protocol):
    """Where services run. Errors are `TargetError`s; `deploy` may be repeated."""

    def running(self, service: str) -> str | None:
        """The version that serves now."""
        ...

    def deploy(self, service: str, version: Version) -> str:
        """Makes a version serve, and says in one sentence what was done."""
        ...


class Traffic(Protocol):
    """What sends requests to versions; `split` may be repeated, and its errors are `TargetError`s."""

    def split(self, service: str, challenger: Version | None, share: float) -> str:
        """Sends a share of a service's requests to a challenger beside what serves (None: to nobody else), and says in
        one sentence what was done."""
        ...


def checked(order: ScaleOrder, most_replicas: int) -> ScaleOrder:
    """The order, or a TargetError if no policy in its right mind would give it."""
    for what, count, high in (
        ("replicas", order.replicas, most_replicas),
        ("max_batch", order.max_batch, 1024),
    ):
        low = 0 if what == "replicas" else 1
        if count is None and what == "max_batch":
            continue
        if type(count) is not int or not low <= count <= high:
            raise TargetError(f"{order.service}: {what} {count!r} is refused; valid: {low} to {high}")
    return order


def one_by_one(
    orders: Sequence[ScaleOrder], act: Callable[[ScaleOrder], str], most_replicas: int, deadline_s: float
) -> list[str | TargetError]:
    """The outcome of every order: one that fails does not stop the others, and after the deadline (on the monotonic
    clock) none is begun."""
    outcomes: list[str | TargetError] = []
    for order in orders:
        try:
            if time.monotonic() >= deadline_s:
                raise TargetError(f"{order.service}: not tried: the time for all orders was used up")
            outcomes.append(act(checked(order, most_replicas)))
        except TargetError as error:
            outcomes.append(error)
    return outcomes


class DryRun(Spec, frozen=True, kw_only=True, tag_field="kind", tag="dry-run"):
    """Touches nothing and says what would change. `replicas` are the counts to begin with; a service that is not among
    them is unknown until it is first scaled."""

    replicas: dict[str, Count] = msgspec.field(default_factory=dict)
    most_replicas: PositiveCount = MOST_REPLICAS

    def begin(self, lease: Lease | None = None) -> DryRunTarget:
        return DryRunTarget(self)


class DryRunTarget:
    """Remembers, while the process lives, what would run."""

    def __init__(self, spec: DryRun = DryRun()) -> None:  # noqa: B008  (it is frozen)
        self._most_replicas = spec.most_replicas
        self._settings: dict[str, dict[str, int | str]] = {
            service: {"replicas": count} for service, count in spec.replicas.items()
        }
        self._running: dict[str, str] = {}

    def counts(self, services: Sequence[str]) -> Mapping[str, int]:
        return {one: int(self._settings[one]["replicas"]) for one in services if one in self._settings}

    def scale(self, orders: Sequence[ScaleOrder]) -> Sequence[str | TargetError]:
        return one_by_one(orders, self._scale, self._most_replicas, float("inf"))

    def _scale(self, order: ScaleOrder) -> str:
        wanted = msgspec.structs.asdict(order)
        before = self._settings.setdefault(wanted.pop("service"), {})
        changes = {n: v for n, v in wanted.items() if v is not None and v != before.get(n)}
        said = ", ".join(
            f"{name} {before.get(name, 'unknown')} -> {value}" for name, value in changes.items()
        )
        before |= changes
        return f"would change {order.service}: {said}" if said else f"{order.service} is as ordered"

    def running(self, service: str) -> str | None:
        return self._running.get(service)

    def deploy(self, service: str, version: Version) -> str:
        before = self._running.get(service)
        self._running[service] = version.version
        return f"would replace version {before} of {service} by {version.version} ({version.artifact or 'no artifact'})"

    def split(self, service: str, challenger: Version | None, share: float) -> str:
        if challenger is None:
            return f"would send all requests of {service} to version {self._running.get(service)}"
        return f"would send {share:.3g} of the requests of {service} to version {challenger.version}"


_KINDS: Final = {  # the clients of outside systems are imported where one is used
    "dry-run": ("pilotage.live.targets", "DryRun"),
    "kubernetes": ("pilotage.live.kubernetes", "Kubernetes"),
    "ray-serve": ("pilotage.live.ray_serve", "RayServe"),
}


def target_of(raw: Any, where: str) -> Any:
    """The target that a table of a configuration describes, which `begin` makes. SpecError: it describes none."""
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if kind not in _KINDS:
        raise SpecError(f"{where}: kind {kind!r} does not exist; {closest(str(kind), _KINDS)}")
    module, name = _KINDS[kind]
    return decode(raw, getattr(importlib.import_module(module), name), where)
