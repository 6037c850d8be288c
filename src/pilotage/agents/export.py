"""Handing a policy over: the bundle that `control.bundle` opens, with what it needs and what is known of it.

Any scaling policy can be exported: rules and tuned rules as they are, trees, and networks as ONNX. What SB3 trained
(`agents.train`) is a network by then, its normalisation included, so that no pickle is read or written. The self-test
is taken from the policy's own runs in the simulator, and holds only decisions that double precision, NumPy's and ONNX
Runtime's single precision agree on. A bundle is written whole or not at all, and opened once before it is in place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from pilotage import __version__
from pilotage.agents.card import card
from pilotage.control.bundle import (
    CARD,
    MANIFEST,
    POLICY,
    SCHEMA,
    SELFTEST,
    SIGNATURE,
    Bundle,
    File,
    Input,
    Judged,
    Manifest,
    NetworkTable,
    configured_key,
    networks_in,
    open_bundle,
    signature_of,
    with_part,
)
from pilotage.control.foresight import LEVELS, Foresight
from pilotage.control.guard import Guard
from pilotage.control.handover import Bundled
from pilotage.control.intake import table
from pilotage.control.learned import Learned, contract
from pilotage.control.network import Network
from pilotage.control.onnx_network import FEW_ROWS, decode, encode
from pilotage.control.outlook import INPUTS, REFERENCES
from pilotage.control.policy import FEATURES, Decision, Observation, Policy, Situation, values_of
from pilotage.control.scaling import describe
from pilotage.control.selftest import Case, Ordered, Probe, SelfTest
from pilotage.control.steer import Helm, steer
from pilotage.engine.cluster import Cluster, World
from pilotage.engine.run import at_tick, tick_of
from pilotage.scenario import Scenario
from pilotage.world.arrivals import Handover, Poisson
from pilotage.world.spec import Spec, SpecError

ACTION: Final[dict[str, str]] = {
    "order": "replicas to order now; they serve after boot and load",
    "release": "replicas to release now, the youngest first",
    "max_batch": "the batch-size limit from now on; null: as it is",
    "pool": "where ordered replicas go; null: the service's first pool",
    "variant": "the build that the service is rolled over to; null: as it is",
    "batch_wait_s": "how long a batch that is not full waits, in seconds; null: as it is",
    "chunk_tokens": "how many tokens an iteration of an LLM server may have; null: as it is",
}
_NAMES: Final = tuple(feature.name for feature in FEATURES)
_TICKS, _SERVICES, _PROBES = 40, 3, 16  # of the self-test
_MISSING: Final = 0.1  # share of measurements that a case of the self-test leaves out


def export(
    policy: Policy,
    out: Path,
    scenarios: Sequence[Scenario],
    *,
    name: str = "",
    guard: Guard | None = None,
    judged: Sequence[Judged] = (),
    provenance: Mapping[str, str | int | float | None] | None = None,
    explanation: str = "",
    runs: int = 2,
    key: bytes | None = None,
) -> Bundle:
    """Writes a policy's bundle into the new folder `out`, and opens it.

    `scenarios` are what it was judged on: the ranges that measurements had there are noted, from `runs` runs each,
    and the first gives the self-test. `judged` are figures, `provenance` says where the policy comes from,
    `explanation` is a summary in words for the card. With a key (given, or configured) the bundle is signed.
    Raises SpecError if `out` is there already.
    """
    if os.path.lexists(out):
        raise SpecError(f"--out {out}: is there already; give a folder that does not exist yet")
    if not scenarios:
        raise SpecError(
            "an export needs an environment: without one there is nothing to test the bundle with"
        )
    if isinstance(policy, Bundled):
        policy = policy.policy
    guard, key = guard or Guard(), configured_key() if key is None else key
    networks = {_file(path): (path, owner, network) for path, owner, network in networks_in(policy)}
    contents = {file: encode(network) for file, (_, _, network) in networks.items()}
    runnable = policy
    plain = msgspec.to_builtins(policy)
    for file, (path, _, _) in networks.items():
        runnable = with_part(runnable, path, decode(contents[file]))
        *above, last = path
        at = plain
        for step in above:
            at = at[step]
        at[last] = {"onnx": file}
    contents[POLICY] = _json(plain)
    watched = [watch(policy, scenario, guard, runs) for scenario in scenarios]
    rows = table(_seen(watched))
    handed = Bundled(policy=runnable, observation=rows, guard=guard)
    exact = Bundled(policy=policy, observation=rows, guard=guard)
    contents[SELFTEST] = _json(_selftest(handed, exact, watched[0], contents, list(networks)))
    contents[CARD] = card(
        name or describe(policy), policy, guard, rows, judged, provenance or {}, explanation
    ).encode()
    manifest = Manifest(
        schema=SCHEMA,
        policy=name or describe(policy),
        kind=str(policy.__struct_config__.tag),
        observation=rows,
        action=ACTION,
        networks={
            file: _described(decode(contents[file]), owner) for file, (_, owner, _) in networks.items()
        },
        guard=guard,
        provenance={"pilotage": __version__, **(provenance or {})},
        evaluation=tuple(judged),
        files={
            file: File(sha256=hashlib.sha256(raw).hexdigest(), size=len(raw))
            for file, raw in sorted(contents.items())
        },
    )
    contents[MANIFEST] = _json(manifest)
    contents[SIGNATURE] = signature_of(contents[MANIFEST], key)
    return _write(out, contents, key)


def _write(out: Path, contents: Mapping[str, bytes], key: bytes | None) -> Bundle:
    """All files, in a folder that gets its name only when it has been opened like any other bundle."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise SpecError(f"--out {out}: cannot be written: {error.strerror}; give a writable place") from None
    try:
        for file, raw in contents.items():
            (part / file).write_bytes(raw)
        bundle = open_bundle(part, key)
        part.chmod(0o755)
        part.rename(out)
    except BaseException:
        shutil.rmtree(part)
        raise
    return replace(bundle, path=out)


def _json(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


# --- networks ----------------------------------------------------------------------------------------------------
def _file(path: Sequence[str]) -> str:
    return ".".join(["policy", *path[:-1], "onnx"])


def _described(network: Network, owner: Spec) -> NetworkTable:
    outputs: Sequence[str]
    if isinstance(owner, Foresight):
        inputs = INPUTS
        scales = [f"{level}: {what}" for level in LEVELS for what in ("log scale", "margin")]
        outputs = [
            *(f"{level}: weight of {r}" for level in LEVELS for r in REFERENCES),
            *scales,
            "keep above order",
        ]
    elif isinstance(owner, Learned):
        inputs, outputs = contract(owner.base)
    else:
        inputs = tuple(f"input {k}" for k in range(len(network.mean)))
        outputs = [f"output {k}" for k in range(len(network.biases[-1]))]
    rows = zip(inputs, network.mean, network.scale, strict=True)
    return NetworkTable(
        inputs=tuple(Input(name=name, mean=mean, scale=scale) for name, mean, scale in rows),
        outputs=tuple(outputs),
        clip=network.clip,
    )


# --- what it was seen to do --------------------------------------------------------------------------------------
class Watched(msgspec.Struct, frozen=True):
    """Situations of all services of some runs, and what was then measured of them, tick by tick."""

    situations: list[Situation]
    seen: list[list[Observation]]


def watch(policy: Policy, scenario: Scenario, guard: Guard, runs: int) -> Watched:
    """What a policy comes to see in a scenario where it decides; models do not decay."""
    lasting = scenario.replace(services=tuple(s.replace(lifecycle=None) for s in scenario.services))
    cluster = Cluster(at_tick(lasting, tick_of(lasting, policy)), [World(3_000_000 + k) for k in range(runs)])
    services = len(lasting.services)
    situations = [cluster.situation(w, s) for w in range(runs) for s in range(services)]
    seen: list[list[Observation]] = []

    def record(_: int, observations: Sequence[Observation], __: Sequence[Decision]) -> None:
        seen.append(list(observations))

    steer(cluster, Helm([policy] * len(situations), situations, guard), cluster.scenario.ticks, record)
    return Watched(situations, seen)


def _seen(watched: Sequence[Watched]) -> dict[str, tuple[float, float]]:
    """The range of every feature that was ever known."""
    values = np.concatenate([[o.values for o in row] for one in watched for row in one.seen])
    return {
        name: (float(values[known, k].min()), float(values[known, k].max()))
        for k, name in enumerate(_NAMES)
        if (known := ~np.isnan(values[:, k])).any()
    }


def _selftest(
    handed: Bundled, exact: Bundled, watched: Watched, contents: Mapping[str, bytes], networks: Sequence[str]
) -> SelfTest:
    rng = np.random.default_rng(0)
    cases = []
    for service in range(min(_SERVICES, len(watched.situations))):
        for blank in (False, True):
            case = _case(watched, service, rng if blank else None)
            cases.append(_agreed(case, handed, exact, bool(networks)))
    probes = {}
    for file in networks:
        network = decode(contents[file])
        mean, scale = np.array(network.mean), np.array(network.scale)
        inputs = mean + scale * rng.normal(0, 2, (_PROBES, len(mean)))
        outputs = network.forward().by_numpy(inputs)
        probes[file] = Probe(
            inputs=tuple(map(tuple, inputs.tolist())), outputs=tuple(map(tuple, outputs.tolist()))
        )
    return SelfTest(features=_NAMES, cases=tuple(c for c in cases if c is not None), probes=probes)


def _case(watched: Watched, service: int, rng: np.random.Generator | None) -> Case:
    """The first ticks of a service, with some measurements left out if there is a generator; decisions to come."""
    situation, seen = watched.situations[service], [row[service] for row in watched.seen[:_TICKS]]
    own = situation.service
    if not isinstance(own.traffic, Handover):
        own = own.replace(traffic=Poisson(rate_rps=1.0))  # which no policy knows
    values = values_of(seen)
    if rng is not None:
        values = np.where(rng.random(values.shape) < _MISSING, np.nan, values)
    return Case(
        service=own,
        pools=tuple(situation.pools.values()),
        tick_s=situation.tick_s,
        history_rps=tuple(situation.history_rps.tolist()),
        now_s=tuple(one.now_s for one in seen),
        values=tuple(tuple(None if v != v else v for v in row) for row in values.tolist()),
        decisions=(Ordered(),) * len(seen),
    )


def _agreed(case: Case, handed: Bundled, exact: Bundled, rounds: bool) -> Case | None:
    """The case with its decisions, up to the first tick at which rounding would matter; None if that is the first."""
    problem = case.problem(_NAMES)
    if problem is not None:
        raise SpecError(f"the self-test would be refused: {problem}; give another environment")
    copies = FEW_ROWS + 1 if rounds else 1
    ways = (
        [handed.begin(case.situation), exact.begin(case.situation)]
        if rounds
        else [handed.begin(case.situation)]
    )
    many = handed.begin_together([case.situation] * copies)
    decisions = []
    for seen in case.observations(_NAMES):
        found = {Ordered.of(way.decide(seen)) for way in ways} | {Ordered.of(many.decide([seen] * copies)[0])}
        if len(found) > 1:
            break
        decisions.append(found.pop())
    if not decisions:
        return None
    n = len(decisions)
    return msgspec.structs.replace(
        case, now_s=case.now_s[:n], values=case.values[:n], decisions=tuple(decisions)
    )
