"""What is asked of a deployment: pools that may be used, models with their builds, load and objective."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

from msgspec import Meta

from pilotage.live.manifests import Artifact
from pilotage.world.arrivals import Gamma, Poisson, Traffic
from pilotage.world.pools import Pool
from pilotage.world.servers import BatchServer, Constant, RequestDemand, Variant
from pilotage.world.spec import (
    Name,
    NonNegative,
    Positive,
    PositiveCount,
    Probability,
    Spec,
    SpecError,
    closest,
    decode,
    read_toml,
)

REQUESTS_PER_RUN: Final = 20_000  # of steady traffic, where the file does not say how long a run lasts
SHORTEST_S, LONGEST_S = 600.0, 4 * 3600.0


class Model(Spec, frozen=True, kw_only=True):
    """A model to be deployed: its builds with their latency laws, what it is asked, and what must hold.

    At least a share of `attainment` of its requests must be served within `slo_ms` (0.99: the 99th percentile of
    latency is at most the objective, and what is dropped counts as late), by a variant whose accuracy is at least
    `min_accuracy`, in one of `environments` (None: wherever a variant has a latency law), for at most `usd_per_hour`.
    `server.max_batch` is the largest batch that is tried, `batch_waits_ms` are the waits.
    """

    name: Name
    variants: Annotated[tuple[Variant, ...], Meta(min_length=1)]
    traffic: Traffic | None = None
    slo_ms: Positive | None = None
    attainment: Annotated[float, Meta(ge=0.5, lt=1)] = 0.99
    min_accuracy: Probability = 0.0
    environments: Annotated[tuple[Name, ...], Meta(min_length=1)] | None = None
    usd_per_hour: Positive | None = None
    server: BatchServer = BatchServer(max_batch=32)
    batch_waits_ms: Annotated[tuple[NonNegative, ...], Meta(min_length=1)] = (0.0, 5.0, 20.0)
    demand: RequestDemand = Constant()
    min_replicas: PositiveCount = 1
    max_replicas: PositiveCount = 100
    max_per_node: PositiveCount | None = None
    artifact: Artifact = Artifact()

    def __post_init__(self) -> None:
        if self.min_replicas > self.max_replicas:
            raise SpecError(f"min_replicas {self.min_replicas} exceeds max_replicas {self.max_replicas}")
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise SpecError(f"variants {', '.join(names)}: one is named twice; names must differ")

    @property
    def steady(self) -> bool:
        """Whether the mean rate is constant, so that a fixed number of replicas can carry it."""
        return isinstance(self.traffic, (Poisson, Gamma))

    @property
    def batches(self) -> list[int]:
        """The batch limits that are tried: powers of two, and the largest."""
        most = self.server.max_batch
        return sorted({*(2**k for k in range(most.bit_length()) if 2**k <= most), most})

    def asked(self, rate_rps: float | None, slo_ms: float | None) -> Model:
        """The model under that load and objective; None leaves what the file says, which must say something."""
        changes: dict[str, Any] = {}
        if rate_rps is not None:
            traffic = self.traffic or Poisson(rate_rps=rate_rps)
            if not hasattr(traffic, "rate_rps"):
                raise SpecError(
                    f"--rate {rate_rps:g}: model {self.name!r} has {traffic.label}, whose rate is its own; leave "
                    "--rate out, or give traffic of kind poisson, gamma or diurnal"
                )
            changes["traffic"] = traffic.replace(rate_rps=rate_rps)
        elif self.traffic is None:
            raise SpecError(f"model {self.name!r} has no traffic; give --rate, or traffic in the file")
        if slo_ms is not None:
            changes["slo_ms"] = slo_ms
        elif self.slo_ms is None:
            raise SpecError(f"model {self.name!r} has no slo_ms; give --slo-ms, or slo_ms in the file")
        changed: Model = self.replace(**changes) if changes else self
        return changed


class Requirements(Spec, frozen=True, kw_only=True):
    """A file of `pilotage plan`: the pools there are, and the models to be placed on them.

    `environments` names groups of pools. A plan is judged on runs of `horizon_h` from `start_h` on the traffic's clock;
    without a horizon, steady traffic is judged on about 20 000 requests a run, and other traffic on 4 h.
    """

    title: str = ""
    pools: Annotated[tuple[Pool, ...], Meta(min_length=1)]
    models: Annotated[tuple[Model, ...], Meta(min_length=1)]
    environments: dict[Name, Annotated[tuple[Name, ...], Meta(min_length=1)]] = {}  # noqa: RUF012  (msgspec copies it)
    start_h: NonNegative = 0.0
    horizon_h: Positive | None = None

    def __post_init__(self) -> None:
        for what, names in (("pool", [p.name for p in self.pools]), ("model", [m.name for m in self.models])):
            if len(set(names)) < len(names):
                raise SpecError(f"{what}s {', '.join(names)}: one is named twice; names must differ")
        pools = [pool.name for pool in self.pools]
        for environment, members in self.environments.items():
            for name in members:
                if name not in pools:
                    raise SpecError(
                        f"environment {environment!r} has pool {name!r}, which does not exist; {closest(name, pools)}"
                    )
        for model in self.models:
            for name in model.environments or ():
                if name not in self.environments:
                    raise SpecError(
                        f"model {model.name!r} may run in {name!r}; "
                        f"{closest(name, self.environments) if self.environments else 'the file has no environments'}"
                    )
            for variant in model.variants:
                for name in variant.latency:
                    if name not in pools:
                        raise SpecError(
                            f"model {model.name!r}: variant {variant.name!r} has a latency law for pool {name!r}; "
                            f"{closest(name, pools)}"
                        )

    @staticmethod
    def load(path: Path, rate_rps: float | None = None, slo_ms: float | None = None) -> Requirements:
        """What a file asks, under another load and objective if they are given (then of each of its models)."""
        found = decode(read_toml(path, "a file of requirements"), Requirements, str(path))
        changed: Requirements = found.replace(models=tuple(m.asked(rate_rps, slo_ms) for m in found.models))
        return changed

    @property
    def pool_by_name(self) -> dict[str, Pool]:
        return {pool.name: pool for pool in self.pools}

    def allowed(self, model: Model) -> list[str]:
        """The names of the pools in which a model may run, in the file's order."""
        if model.environments is None:
            return [pool.name for pool in self.pools]
        inside = {name for environment in model.environments for name in self.environments[environment]}
        return [pool.name for pool in self.pools if pool.name in inside]

    def environment_of(self, pool: str) -> str:
        """The environment a pool belongs to, by the first that lists it; its own name if none does."""
        return next((name for name, pools in self.environments.items() if pool in pools), pool)

    def horizon_s(self, model: Model) -> float:
        """How long a run lasts, in whole seconds."""
        if self.horizon_h is not None:
            return self.horizon_h * 3600
        if isinstance(model.traffic, (Poisson, Gamma)):
            return float(round(min(max(REQUESTS_PER_RUN / model.traffic.rate_rps, SHORTEST_S), LONGEST_S)))
        return LONGEST_S
