"""The configuration of steering, and what is made of it: which services, by which policies, seen and scaled by what.

    scenario = "fleet.toml"         # what the services are: pools, latency laws, objectives, prices
    ledger = "steer-ledger"
    policy = "hpa"

    [monitor]
    kind = "prometheus"
    url = "https://prometheus.monitoring:9090"
    metrics = "vllm"
    token_file = "/var/run/secrets/prometheus/token"

    [target]
    kind = "dry-run"

    [services.ranker]
    policy = "learned"
    label = "ranker-v2"

    [guard]
    required = ["arrival_rate"]
    max_order = 4

Paths are relative to the file. Secrets are never in it: `token_file`, `token_env` and the like say where they are.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta

from pilotage import scenario
from pilotage.control.guard import Check, Guard
from pilotage.control.learned import policy_from
from pilotage.control.policy import Policy, Situation
from pilotage.live.entries import Actor
from pilotage.live.lease import Lease, SharedLease
from pilotage.live.monitors import Monitor, Prometheus
from pilotage.live.promql import Subject
from pilotage.live.recordings import Recording
from pilotage.live.targets import Scaled, target_of
from pilotage.world.pools import Pool
from pilotage.world.services import Service
from pilotage.world.spec import Name, NonNegative, Positive, Spec, SpecError, closest, decode, read_toml

Mode = Literal["shadow", "advise", "act"]
_LONGEST_REASON: Final = 200


class Steered(Spec, frozen=True, kw_only=True):
    """One service: its policy (None: that of all), and what its metrics call it (None: its name)."""

    policy: str | None = None
    label: Annotated[str, Meta(min_length=1, max_length=250)] | None = None


class SteerConfig(Spec, frozen=True, kw_only=True):
    """A file as above. `scenario` is a shipped environment or a file; `services` are those to steer (none: all of it).

    Modes: *shadow* says what it would do, *advise* asks first (at the terminal, or through the file `answers`), *act*
    does it. `tick_s` is by default the scenario's. A policy that has not decided within `decide_within_s` has failed.
    Policies know the arrival rates of the `history_h` before the start. `record` is a file to which all observations
    are added, `listen` is where `/metrics` and `/healthz` are served. With a target `kubernetes`, `lease` makes this
    the one writer of its fleet, whichever host and ledger others have.
    """

    scenario: str
    ledger: str
    monitor: Prometheus | Recording
    target: dict[str, Any] = msgspec.field(default_factory=lambda: {"kind": "dry-run"})
    mode: Mode = "shadow"
    policy: str = "hpa"
    services: dict[Name, Steered] = msgspec.field(default_factory=dict)
    guard: Guard = Guard()
    lease: SharedLease | None = None
    tick_s: Annotated[float, Meta(gt=0, le=3600)] | None = None
    decide_within_s: Positive = 5.0
    history_h: NonNegative = 24.0
    record: str | None = None
    answers: str | None = None
    listen: str | None = None


@dataclass(frozen=True)
class Setup:
    """A configuration that was read and found valid, and what it names. `files` are those that it was read from."""

    config: SteerConfig
    services: tuple[Service, ...]
    pools: dict[str, Pool]
    tick_s: float
    policies: tuple[Policy, ...]
    actors: tuple[Actor, ...]
    subjects: tuple[Subject, ...]
    target: Any
    ledger: Path
    files: tuple[Path, ...]

    @functools.cached_property
    def names(self) -> list[str]:
        return [service.name for service in self.services]

    @property
    def history_ticks(self) -> int:
        return int(self.config.history_h * 3600 / self.tick_s)

    def situations(self, history_rps: Sequence[np.ndarray] | None = None) -> list[Situation]:
        """What policies know at the start; without a history, nothing of the past."""
        past = history_rps or [np.zeros(0)] * len(self.services)
        return [
            Situation(service=service, pools=self.pools, tick_s=self.tick_s, history_rps=rates)
            for service, rates in zip(self.services, past, strict=True)
        ]

    def monitor(self) -> Monitor:
        return self.config.monitor.begin(self.subjects)

    def begin_target(self, lease: Lease | None = None) -> Scaled:
        """The target; with a lease, what can write only while that is held."""
        begun: Scaled = self.target.begin(lease)
        return begun

    def fingerprint(self) -> tuple[Any, ...]:
        """Changes when one of the files does."""
        return tuple(_state(path) for path in self.files)


def load(path: Path, mode: Mode | None = None) -> Setup:
    """What a configuration file says; a SpecError says what is wrong, where, and what would be valid."""
    folder = path.parent
    raw = read_toml(path, "a steer configuration")
    for part in ("monitor", "target", "guard"):
        if isinstance(raw.get(part), dict):
            raw[part] = {key: _beside(key, value, folder) for key, value in raw[part].items()}
    config = decode(raw, SteerConfig, str(path))
    config = config.replace(mode=mode or config.mode)
    at, files = folder / config.scenario, [path]
    if at.suffix == ".toml":
        files.append(at)
    world = scenario.load(at if at.suffix == ".toml" else config.scenario)
    named = {service.name: service for service in world.services}
    for name in config.services:
        if name not in named:
            raise SpecError(f"{path}: services: {name!r} is not in {config.scenario}; {closest(name, named)}")
    services = tuple(named[name] for name in config.services or named)
    tick_s = config.tick_s or world.tick_s
    chosen: dict[str, tuple[Policy, Actor]] = {}
    subjects = []
    texts = []
    for service in services:
        steered = config.services.get(service.name, Steered())
        texts.append(steered.policy or config.policy)
        subjects.append(Subject(steered.label or service.name, service.slo_s))
    for text in dict.fromkeys(texts):
        chosen[text] = _policy(text, folder, f"{path}: policy")
        files += _files_of(text, folder)
    labels = [one.label for one in subjects]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise SpecError(f"{path}: services: label {twice[0]!r} is used twice; labels must differ")
    setup = Setup(
        config=config,
        services=services,
        pools=world.pool_by_name,
        tick_s=tick_s,
        policies=tuple(chosen[text][0] for text in texts),
        actors=tuple(chosen[text][1] for text in texts),
        subjects=tuple(subjects),
        target=target_of(config.target, f"{path}: target"),
        ledger=folder / config.ledger,
        files=tuple(files),
    )
    if config.lease is not None and config.target.get("kind") != "kubernetes":
        raise SpecError(
            f"{path}: lease: the target is {config.target.get('kind')!r}; valid with 'kubernetes' only"
        )
    Check(config.guard, setup.situations())  # limits that no service can have are found now
    return setup


def _beside(key: str, value: Any, folder: Path) -> Any:
    """A value of a table; the path of a file becomes that of one beside the configuration, unless it is absolute."""
    names_file = key == "path" or key.endswith("_file") or (key == "metrics" and str(value).endswith(".toml"))
    return str(folder / value) if names_file and isinstance(value, str) else value


def _policy(text: str, folder: Path, where: str) -> tuple[Policy, Actor]:
    beside = folder / text
    try:
        policy = policy_from(str(beside) if beside.exists() else text)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    digest = hashlib.sha256(msgspec.json.encode(policy)).hexdigest()
    name = text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."
    return policy, Actor(kind="policy", name=name, digest=digest)


def _files_of(text: str, folder: Path) -> list[Path]:
    """The files of a policy that is one: when they change, it is read again."""
    beside = folder / text
    if beside.is_dir():
        return sorted(path for path in beside.iterdir() if path.is_file())
    return [beside] if beside.is_file() else []


def _state(path: Path) -> Any:
    try:
        state = path.stat()
    except OSError as error:
        return path, error.errno
    return path, state.st_mtime_ns, state.st_size, state.st_ino
