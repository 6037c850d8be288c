"""Scenario files: one TOML says what a cluster is, and its stem names the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pilotage.world.arrivals import Handover
from pilotage.world.faults import AtNotice, Outage, RandomOutages
from pilotage.world.pools import Pool
from pilotage.world.servers import Variant
from pilotage.world.services import Service
from pilotage.world.spec import Name, NonNegative, Positive, Spec, SpecError, closest, decode, read_toml


class Interference(Spec, frozen=True, kw_only=True):
    """Every replica of `neighbour` on the same node makes the batches of `service` take `slowdown` times as long."""

    service: Name
    neighbour: Name
    slowdown: Annotated[float, Meta(ge=1, le=100)]


class Placement(Spec, frozen=True, kw_only=True):
    """Which node a replica goes to: the rule of `engine.placement` that scores the nodes it fits on, and its weights
    (none: the rule's own, or those that are shipped).

    `at_notice` is what becomes of the replicas of a node that was told to go. "drain", as Kubernetes' termination
    handlers do: they take no more requests from then on. "replace-first": they serve until the replicas ordered in
    their place are ready, at most until `Spot.grace_s` before the node goes. Not given: "drain"; for a
    learned placement that has no weights of its own what was shipped with them.
    """

    rule: Literal[
        "first-fit",
        "best-fit",
        "least-allocated",
        "most-allocated",
        "balanced",
        "kubernetes",
        "cheapest",
        "spread",
        "linear",
        "learned-placement",
    ] = "first-fit"
    weights: tuple[float, ...] = ()
    at_notice: AtNotice | None = None


class Scenario(Spec, frozen=True, kw_only=True):
    """Pools, services, and how long a run lasts.

    Policies decide every `tick_s`. A run starts at `start_h` on the traffic's clock (0 is Monday 00:00, or
    the first row of a trace), lasts `horizon_h`, and its policies know the arrival rates of the `history_h`
    before it. `name` and `data` (the folder of the traces) are set by `load`, not by the file.
    """

    title: str
    pools: Annotated[tuple[Pool, ...], Meta(min_length=1)]
    services: Annotated[tuple[Service, ...], Meta(min_length=1)]
    tick_s: Annotated[float, Meta(gt=0, le=3600)] = 15.0
    horizon_h: Positive = 4.0
    start_h: NonNegative = 0.0
    history_h: NonNegative = 0.0
    placement: Placement = Placement()
    interference: tuple[Interference, ...] = ()
    outages: tuple[Outage, ...] = ()
    random_outages: RandomOutages | None = None
    name: str = ""
    data: str | None = None

    def __post_init__(self) -> None:
        for what, names in (
            ("pool", [p.name for p in self.pools]),
            ("service", [s.name for s in self.services]),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise SpecError(
                        f"{what} name {name!r} is used {names.count(name)} times; names must differ"
                    )
        pools = [p.name for p in self.pools]
        for service in self.services:
            for name in service.pools:
                if name not in pools:
                    raise SpecError(f"service {service.name!r} wants pool {name!r}; {closest(name, pools)}")
            self._check_laws(service)
            self._check_placeable(service)
            self._check_training(service)
        zones = sorted({zone for pool in self.pools for zone in pool.zones})
        for outage in self.outages:
            if outage.zone not in zones:
                raise SpecError(
                    f"outage of zone {outage.zone!r}, which no pool has; {closest(outage.zone, zones)}"
                )
        self._check_interference()
        self._check_handovers()
        if self.ticks < 1:
            raise SpecError(f"horizon_h {self.horizon_h} is shorter than one tick of {self.tick_s} s")

    def _check_laws(self, service: Service) -> None:
        """Latency laws stand for pools that exist and cover every batch size."""
        pools = self.pool_by_name
        for variant in service.variants:
            where = f"service {service.name!r}: variant {variant.name!r}"
            for name, law in variant.latency.items():
                if name not in pools:
                    raise SpecError(f"{where} has a latency law for pool {name!r}; {closest(name, pools)}")
                try:
                    service.batch_times_s(law)
                except SpecError as error:
                    raise SpecError(f"{where}, latency on pool {name!r}: {error}") from None

    def _check_placeable(self, service: Service) -> None:
        """Zones exist; every variant has a pool and every pool a variant; the least number of replicas fits."""
        where = f"service {service.name!r}"
        pools = [self.pool_by_name[name] for name in service.pools]
        zones = sorted({zone for pool in pools for zone in pool.zones})
        for zone in service.zones or ():
            if zone not in zones:
                raise SpecError(
                    f"{where} wants zone {zone!r}, which none of its pools has; {closest(zone, zones)}"
                )
        obstacles = {
            (variant.name, pool.name): _obstacle(service, variant, pool)
            for variant in service.variants
            for pool in pools
        }
        for variant in service.variants:
            why = [obstacles[variant.name, pool.name] for pool in pools]
            if all(why):
                raise SpecError(
                    f"{where}: variant {variant.name!r} can be placed nowhere: {'; '.join(why)}; "
                    "valid: a latency law for one of its pools, a zone that pool has, a node on which it fits"
                )
        for pool in pools:
            why = [obstacles[variant.name, pool.name] for variant in service.variants]
            if all(why):
                raise SpecError(
                    f"{where} lists pool {pool.name!r}, which can take none of its variants: {'; '.join(why)}; "
                    "leave the pool out, or give it a zone of the service and nodes on which a variant fits"
                )
        room = sum(
            pool.max_nodes
            * max(
                service.replicas_on_node(variant, pool)
                for variant in service.variants
                if not obstacles[variant.name, pool.name]
            )
            for pool in pools
        )
        if service.min_replicas > room:
            raise SpecError(
                f"{where}: min_replicas is {service.min_replicas}, but its pools have room for at most {room} "
                "replicas; raise max_nodes, max_per_node or the nodes' resources, or lower min_replicas"
            )

    def _check_training(self, service: Service) -> None:
        """The pool of a service's retrainings exists, and a job fits on its nodes."""
        if service.lifecycle is None:
            return
        training, pools = service.lifecycle.training, self.pool_by_name
        where = f"service {service.name!r}: lifecycle: training"
        if training.pool not in pools:
            raise SpecError(f"{where} wants pool {training.pool!r}; {closest(training.pool, list(pools))}")
        node = pools[training.pool].node
        if node and training.resources and (short := training.resources.shortfall(node)):
            raise SpecError(
                f"{where}: a node of {training.pool!r} has {', '.join(short)} that a job needs; "
                "give the job less, or a pool with larger nodes"
            )

    def _check_handovers(self) -> None:
        """Every prefill service comes before the one decode service that takes over from it, with the same tokens."""
        giving = {s.name: s for s in self.services if s.llm is not None and s.llm.role == "prefill"}
        taken: set[str] = set()
        known: list[str] = []
        for service in self.services:
            if isinstance(service.traffic, Handover):
                where, name = f"service {service.name!r}: traffic 'handover'", service.traffic.service
                free = [one for one in known if one in giving and one not in taken]
                if name not in free:
                    raise SpecError(
                        f"{where} from {name!r}; valid: a prefill service before it from which no other takes over"
                        + (f": {', '.join(free)}" if free else "; there is none")
                    )
                if service.tokens != giving[name].tokens:
                    raise SpecError(
                        f"{where}: its tokens differ from those of {name!r}; they must be the same"
                    )
                taken.add(name)
            known.append(service.name)
        for name in giving:
            if name not in taken:
                raise SpecError(
                    f"service {name!r} has llm.role 'prefill', but no service has traffic of kind 'handover' from it"
                )

    def _check_interference(self) -> None:
        services = [s.name for s in self.services]
        pairs = set()
        for pair in self.interference:
            for name in (pair.service, pair.neighbour):
                if name not in services:
                    raise SpecError(f"interference names service {name!r}; {closest(name, services)}")
            if (pair.service, pair.neighbour) in pairs:
                raise SpecError(
                    f"interference of {pair.neighbour!r} with {pair.service!r} is given twice; give it once"
                )
            pairs.add((pair.service, pair.neighbour))

    @property
    def ticks(self) -> int:
        """Control ticks of one run."""
        return int(self.horizon_h * 3600 / self.tick_s + 1e-9)

    @property
    def pool_by_name(self) -> dict[str, Pool]:
        return {pool.name: pool for pool in self.pools}

    def digest(self) -> str:
        """sha256 of everything that determines the simulation, in hexadecimal."""
        import hashlib

        plain = msgspec.to_builtins(self.replace(data=None))
        for service in plain[
            "services"
        ]:  # what a service does not have leaves its scenario's digest as it was
            for name in ("llm", "tokens"):
                if service[name] is None:
                    del service[name]
            if "llm" in service and service["llm"]["role"] == "unified":
                del service["llm"]["role"]
        return hashlib.sha256(msgspec.json.encode(plain, order="sorted")).hexdigest()


def _obstacle(service: Service, variant: Variant, pool: Pool) -> str:
    """Why no replica of a variant can be on the nodes of a pool; empty if one can."""
    if pool.name not in variant.latency:
        return f"{variant.name!r} has no latency law for {pool.name!r}"
    if service.zones is not None and not set(service.zones) & set(pool.zones):
        return f"{pool.name!r} is in {', '.join(pool.zones)}, not in {', '.join(service.zones)}"
    if pool.node and variant.resources and (short := variant.resources.shortfall(pool.node)):
        return f"a node of {pool.name!r} has {', '.join(short)} that {variant.name!r} needs"
    return ""


def folder() -> Path:
    """Where the shipped environments are: inside the wheel, or at the top of a source checkout."""
    inside = Path(__file__).parent / "envs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "envs"


def shipped() -> list[str]:
    """The stems of the shipped environments, sorted."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def data_folder(data: str | Path | None = None) -> Path | None:
    """The folder of traces: what was given, else PILOTAGE_DATA, else none. It must exist if it is named."""
    named = data if data is not None else os.environ.get("PILOTAGE_DATA")
    if not named:
        return None
    path = Path(named)
    if not path.is_dir():
        source = "--data" if data is not None else "PILOTAGE_DATA"
        raise SpecError(f"{source}: {str(named)!r} is not a directory; give the folder that holds the traces")
    return path


def load(env: str | Path, data: str | Path | None = None) -> Scenario:
    """The scenario of a shipped environment (by stem) or of a TOML file (by path).

    Raises SpecError with the file, the place in it, what is wrong and what would be valid.
    """
    path = Path(env)
    if path.suffix != ".toml" and not path.is_file():
        stem = str(env).removeprefix("pilotage/").removesuffix("-v0")
        path = folder() / f"{stem}.toml"
        if stem not in shipped():
            raise SpecError(
                f"environment {stem!r} does not exist; {closest(stem, shipped())}; or give a .toml file"
            )
    raw = read_toml(path, "a scenario file")
    for key in ("name", "data"):
        if key in raw:
            raise SpecError(
                f"{path}: {key!r} is not a key of a scenario file; the file's name and --data set it"
            )
    scenario = decode(raw, Scenario, str(path))
    traces = data_folder(data)
    return scenario.replace(name=path.stem, data=str(traces) if traces else None)


def json_schema() -> dict[str, Any]:
    """The JSON schema of scenario files, for editors (`pilotage envs --schema`)."""
    schema = msgspec.json.schema(Scenario)
    properties = schema["$defs"]["Scenario"]["properties"]
    del properties["name"], properties["data"]
    return schema
