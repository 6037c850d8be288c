"""Scenario files: one TOML says what a cluster is, and its stem names the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pilotage.world.pools import Pool
from pilotage.world.services import Service
from pilotage.world.spec import NonNegative, Positive, Spec, SpecError, closest, decode, read_toml


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
            for variant in service.variants:
                for law in variant.latency.values():
                    law.batch_times_s(service.server.max_batch)
        if self.ticks < 1:
            raise SpecError(f"horizon_h {self.horizon_h} is shorter than one tick of {self.tick_s} s")

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

        return hashlib.sha256(msgspec.json.encode(self.replace(data=None), order="sorted")).hexdigest()


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
