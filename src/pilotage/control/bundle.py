"""Bundles: exported policies, verified before their first decision.

A bundle is a folder: `manifest.json`, `policy.json`, `policy.onnx` for every network of the policy, `selftest.json`,
`card.md`, and `manifest.sig`, which holds the SHA-256 of the manifest or, if it is signed, its HMAC-SHA256. The
manifest has the hash and size of all others, so that this covers everything. Nothing in a bundle is ever run as code:
JSON is decoded into frozen specifications, networks are read by `control.onnx_network`, and whatever is not exactly
what an export writes is refused with `BundleError`. Cheap checks come first: names, kinds and sizes of files before a
byte is read, the signature before anything is parsed, hashes before contents are looked at, the self-test last. Every
file is read once, and what was hashed is what is used.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from pilotage.control.guard import Guard
from pilotage.control.handover import Bundled
from pilotage.control.intake import Measured
from pilotage.control.learned import Saved
from pilotage.control.network import Network
from pilotage.control.onnx_network import OnnxNetwork
from pilotage.control.onnx_network import decode as network_from
from pilotage.control.policy import Policy
from pilotage.control.scaling import Scaling
from pilotage.control.selftest import SelfTest
from pilotage.world.spec import Spec, SpecError

SCHEMA: Final = 1
MANIFEST, SIGNATURE, POLICY, SELFTEST, CARD = (
    "manifest.json", "manifest.sig", "policy.json", "selftest.json", "card.md",
)  # fmt: skip
KEY: Final = "PILOTAGE_BUNDLE_KEY"  # the environment variable that holds a signing key
SHORTEST_KEY: Final = 16  # bytes
_MIB: Final = 2**20
_LARGEST: Final[Mapping[str, int]] = {
    MANIFEST: _MIB,
    SIGNATURE: 100,
    POLICY: 8 * _MIB,
    SELFTEST: 8 * _MIB,
    CARD: _MIB,
}
_LARGEST_NETWORK: Final = 64 * _MIB
_LARGEST_IN_ALL: Final = 96 * _MIB
_MOST_FILES: Final = 16
_DEEPEST: Final = 24  # levels of a policy
_NETWORK_NAME: Final = re.compile(r"policy(\.[a-z_]{1,40}){0,4}\.onnx")
_Hash = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Text = Annotated[str, Meta(max_length=4000)]
_Value = Annotated[str, Meta(max_length=4000)] | int | float | bool | None


class BundleError(SpecError):
    """A bundle that must not be used; the message says why."""

    exit_code = 3


class File(Spec, frozen=True, kw_only=True):
    """Hash and size in bytes of a file of a bundle."""

    sha256: _Hash
    size: Annotated[int, Meta(ge=0, le=_LARGEST_NETWORK)]


class Input(Spec, frozen=True, kw_only=True):
    """What a network sees in one place, and how it is normalised: (value - mean) / scale, clipped."""

    name: Annotated[str, Meta(max_length=64)]
    mean: float
    scale: float


class NetworkTable(Spec, frozen=True, kw_only=True):
    """What the inputs and outputs of a network are, in order; normalised inputs are clipped at +- `clip`."""

    inputs: tuple[Input, ...]
    outputs: tuple[Annotated[str, Meta(max_length=64)], ...]
    clip: float


class Judged(Spec, frozen=True, kw_only=True):
    """How a policy did in an environment, in dollars per run with 95 % intervals (None: of one run there is none)."""

    env: _Text
    hours: float
    runs: int
    usd: dict[str, float]
    total_usd: float
    total_usd_low: float | None
    total_usd_high: float | None
    attainment: float
    latency_p95_ms: float | None
    baseline: _Text
    saving: float
    saving_low: float | None
    saving_high: float | None


class Manifest(Spec, frozen=True, kw_only=True):
    """What is in a bundle, what the policy sees and orders, within which limits, where it comes from, how it did."""

    schema: int
    policy: _Text
    kind: Annotated[str, Meta(max_length=64)]
    observation: Annotated[tuple[Measured, ...], Meta(max_length=64)]
    action: dict[str, _Text]
    networks: dict[str, NetworkTable]
    guard: Guard
    provenance: dict[str, _Value]
    evaluation: Annotated[tuple[Judged, ...], Meta(max_length=64)]
    files: Annotated[dict[str, File], Meta(max_length=_MOST_FILES)]


class _Version(msgspec.Struct):
    schema: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle. `digest` is the hash of its manifest, and so of all of it; `signed` says whether a signature
    was checked (None: it has one, but no key is configured)."""

    path: Path
    digest: str
    signed: bool | None
    manifest: Manifest
    policy: Bundled
    card: str


def configured_key(file: Path | None = None) -> bytes | None:
    """The key in a file, or else in the environment; None if there is none. White space around it does not count."""
    if file is not None:
        try:
            raw, where = file.read_bytes(), str(file)
        except OSError as error:
            raise SpecError(f"{file}: cannot be read: {error.strerror}; give a file with a key") from None
    elif KEY in os.environ:
        raw, where = os.environ[KEY].encode(), KEY
    else:
        return None
    if len(key := raw.strip()) < SHORTEST_KEY:
        raise SpecError(
            f"{where}: a key of {len(key)} bytes; valid: at least {SHORTEST_KEY}, drawn at random"
        )
    return key


def signature_of(manifest: bytes, key: bytes | None) -> bytes:
    """What `manifest.sig` holds: a signature, or without a key a hash, which finds accidents but no forgery."""
    if key is None:
        return f"sha256 {hashlib.sha256(manifest).hexdigest()}\n".encode()
    return f"hmac-sha256 {hmac.new(key, manifest, hashlib.sha256).hexdigest()}\n".encode()


def is_bundle(path: str | Path) -> bool:
    """Whether a path is meant to be a bundle: a folder with a manifest."""
    return os.path.lexists(Path(path) / MANIFEST)


def open_bundle(path: str | Path, key: bytes | None = None) -> Bundle:
    """The bundle in a folder, verified whole. Raises BundleError with what is wrong.

    With a key (given, or in PILOTAGE_BUNDLE_KEY) a bundle that is not signed with it is refused.
    """
    path, key = Path(path), configured_key() if key is None else key
    try:
        return _open(path, key)
    except SpecError as error:
        raise BundleError(f"bundle {path}: {error}") from None
    except OSError as error:
        raise BundleError(f"bundle {path}: {error.filename or 'a file'}: {error.strerror}") from None


def _open(path: Path, key: bytes | None) -> Bundle:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sizes = _listed(folder)
        raw = _read(folder, MANIFEST, sizes.pop(MANIFEST))
        signed = _signed(folder, sizes, raw, key)
        manifest = _manifest(raw)
        if sizes != {name: file.size for name, file in manifest.files.items()}:
            raise BundleError(_differing(sizes, manifest.files))
        contents = {name: _read(folder, name, size) for name, size in sizes.items()}
    finally:
        os.close(folder)
    for name, file in manifest.files.items():
        if hashlib.sha256(contents[name]).hexdigest() != file.sha256:
            raise BundleError(f"{name}: its contents are not those in the manifest (sha256 differs)")
    policy, networks = _policy(contents, manifest)
    try:
        card = contents[CARD].decode()
    except UnicodeDecodeError:
        raise BundleError(f"{CARD}: is not text in UTF-8") from None
    bundled = Bundled(policy=policy, observation=manifest.observation, guard=manifest.guard)
    selftest: SelfTest = _typed(contents[SELFTEST], SelfTest, SELFTEST)
    problem = selftest.problem(bundled, networks)
    if problem is not None:
        raise BundleError(f"{SELFTEST}: {problem}")
    return Bundle(path, hashlib.sha256(raw).hexdigest(), signed, manifest, bundled, card)


# --- files -------------------------------------------------------------------------------------------------------
def _listed(folder: int) -> dict[str, int]:
    """The sizes of all files by name, of which none has been opened yet."""
    sizes: dict[str, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if len(sizes) == _MOST_FILES + 2:
                raise BundleError(f"it has more than {_MOST_FILES + 2} files")
            found = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                raise BundleError(f"{entry.name!r} is not a plain file; links and folders are not allowed")
            largest = _LARGEST.get(entry.name, _LARGEST_NETWORK)
            if entry.name not in _LARGEST and not _NETWORK_NAME.fullmatch(entry.name):
                raise BundleError(f"{entry.name!r} does not belong in a bundle")
            if found.st_size > largest:
                raise BundleError(f"{entry.name}: {found.st_size} bytes; valid: at most {largest}")
            sizes[entry.name] = found.st_size
    for name in (MANIFEST, SIGNATURE, POLICY, SELFTEST, CARD):
        if name not in sizes:
            raise BundleError(f"{name} is missing")
    if sum(sizes.values()) > _LARGEST_IN_ALL:
        raise BundleError(f"{sum(sizes.values())} bytes in all; valid: at most {_LARGEST_IN_ALL}")
    return sizes


def _read(folder: int, name: str, size: int) -> bytes:
    """The contents of a file that has the size it had when it was listed, and is still no link."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BundleError(f"{name}: is not a plain file")
        parts = []
        left = size + 1  # one more: to notice that it has grown
        while left > 0 and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
    if left != 1:
        raise BundleError(f"{name}: changed while it was read")
    return b"".join(parts)


def _signed(folder: int, sizes: dict[str, int], manifest: bytes, key: bytes | None) -> bool | None:
    """Takes the signature out of the list of files, and checks it: against the key, or else as a hash."""
    found = _read(folder, SIGNATURE, sizes.pop(SIGNATURE))
    if found.startswith(b"sha256 "):
        if key is not None:
            raise BundleError(
                "it is not signed, and a key is configured; valid: bundles signed with that key"
            )
        if found != signature_of(manifest, None):
            raise BundleError(f"{MANIFEST}: is not what {SIGNATURE} says (sha256 differs)")
        return False
    if not re.fullmatch(rb"hmac-sha256 [0-9a-f]{64}\n", found):
        raise BundleError(f"{SIGNATURE}: is no signature of a kind that is known here")
    if key is None:
        return None
    if not hmac.compare_digest(found, signature_of(manifest, key)):
        raise BundleError("its signature is not that of the configured key")
    return True


def _differing(sizes: Mapping[str, int], files: Mapping[str, File]) -> str:
    for name in sizes.keys() - files.keys():
        return f"{name!r} is not in the manifest"
    for name in files.keys() - sizes.keys():
        return f"{name!r} is in the manifest, but missing"
    name = next(name for name in sizes if sizes[name] != files[name].size)
    return f"{name}: {sizes[name]} bytes; the manifest says {files[name].size}"


# --- contents ----------------------------------------------------------------------------------------------------
def _typed(raw: bytes, kind: Any, name: str) -> Any:
    """A file of JSON as a specification. (Not by `world.spec.decode`, which looks for a remedy: nobody writes these by
    hand.) Types say how deep it may be nested, and the interpreter stops what goes too deep."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise BundleError(f"{name}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{name}: not valid JSON: {error}") from None
    except RecursionError:
        raise BundleError(f"{name}: is nested too deep") from None


def _manifest(raw: bytes) -> Manifest:
    version: _Version = _typed(raw, _Version, MANIFEST)
    if version.schema != SCHEMA:
        newer = "; a newer pilotage made it" if version.schema > SCHEMA else ""
        raise BundleError(f"{MANIFEST}: schema {version.schema}; valid here: {SCHEMA}{newer}")
    manifest: Manifest = _typed(raw, Manifest, MANIFEST)
    names = [row.name for row in manifest.observation]
    if len(set(names)) < len(names):
        raise BundleError(f"{MANIFEST}: a feature is named twice in the table of observations")
    return manifest


def _policy(contents: Mapping[str, bytes], manifest: Manifest) -> tuple[Policy, dict[str, OnnxNetwork]]:
    """The policy, and by file the networks in it that stand in files of their own."""
    raw = _typed(contents[POLICY], dict[str, Any], POLICY)
    places: dict[tuple[str, ...], str] = {}
    networks: dict[str, OnnxNetwork] = {}

    def read(at: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(at, dict):
            return at
        if len(path) > _DEEPEST:
            raise BundleError(f"{POLICY}: is nested deeper than {_DEEPEST} levels")
        if at.keys() != {"onnx"}:
            return {name: read(value, (*path, name)) for name, value in at.items()}
        name = at["onnx"]
        if not isinstance(name, str) or name not in contents or name in (POLICY, SELFTEST, CARD, *networks):
            raise BundleError(
                f"{POLICY}: {'.'.join(path)}: {name!r} is not a network of its own in this bundle"
            )
        try:
            network = networks[name] = network_from(contents[name])
        except SpecError as error:
            raise BundleError(f"{name}: {error}") from None
        _described(network, manifest.networks.get(name), name)
        places[path] = name
        plain = msgspec.structs.asdict(network)
        del plain["model"]
        return plain

    try:
        policy: Policy = msgspec.convert(read(raw, ()), Scaling | Saved)
    except msgspec.ValidationError as error:
        raise BundleError(f"{POLICY}: {error}") from None
    for path, _, network in networks_in(policy):
        if path not in places:
            raise BundleError(
                f"{POLICY}: {'.'.join(path)}: {len(network.mean)} inputs here; valid: an ONNX file"
            )
    spare = (contents.keys() | manifest.networks.keys()) - {POLICY, SELFTEST, CARD, *networks}
    if spare:
        raise BundleError(f"{min(spare)}: is not a network of the policy")
    for path, name in places.items():
        policy = with_part(policy, path, networks[name])
    if str(policy.__struct_config__.tag) != manifest.kind:
        raise BundleError(
            f"{POLICY}: is {policy.__struct_config__.tag!r}; the manifest says {manifest.kind!r}"
        )
    return policy, networks


def _described(network: OnnxNetwork, table: NetworkTable | None, name: str) -> None:
    """Refuses a network that the manifest describes otherwise."""
    if table is None:
        raise BundleError(f"{name}: the manifest does not say what its inputs are")
    means, scales = tuple(row.mean for row in table.inputs), tuple(row.scale for row in table.inputs)
    if (means, scales, table.clip) != (network.mean, network.scale, network.clip):
        raise BundleError(f"{name}: is not normalised as the manifest says")
    if len(table.outputs) != len(network.biases[-1]):
        raise BundleError(
            f"{name}: has {len(network.biases[-1])} outputs; the manifest says {len(table.outputs)}"
        )


def networks_in(spec: Spec, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Spec, Network]]:
    """Every network in a policy: the fields that lead to it, what it is a part of, and itself. One with a memory is
    left out: it has no ONNX form here, and stands in the policy's JSON."""
    found: list[tuple[tuple[str, ...], Spec, Network]] = []
    for field in spec.__struct_fields__:
        value = getattr(spec, field)
        if isinstance(value, Network) and value.memory is None:
            found.append(((*path, field), spec, value))
        elif isinstance(value, Spec):
            found += networks_in(value, (*path, field))
    return found


def with_part(spec: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of a specification with another value at a path of fields."""
    first, *rest = path
    return msgspec.structs.replace(
        spec, **{first: with_part(getattr(spec, first), rest, value) if rest else value}
    )
