"""Mutated bundles, and what a process does while it opens them.

A mutation changes one bundle in one way: bytes of a file, its length, its kind, its name, what the manifest says, or
values inside JSON. A *forged* one then has hashes and sizes made right again, as somebody could who has no key.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pilotage.control.bundle import MANIFEST, SIGNATURE, BundleError, open_bundle, signature_of

KEY = b"a key that no forger knows"
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.5, 1e-300, 1e300, "", "x", "../../etc/passwd",
    "/etc/passwd", "policy.onnx", "\u0000", "é" * 100, [], {}, [[]], {"onnx": "policy.onnx"}, {"kind": "static"},
    "x" * 5000, "__import__('os').system('id')",
)  # fmt: skip
WORDS = ("", "kind", "onnx", "x", "../x", "__class__", "network", "é" * 100)
RAW = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"{}",
    b"[]",
    b"null",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"NaN",
    b"1e999",
    b"{" * 200_000,
)
NAMES = (
    "policy.pkl", "..", "x/../y", "policy.base.onnx", "policy.evil.onnx", ".hidden", "MANIFEST.JSON",
    "policy.onnx.data", "model.py", "selftest.json.bak", "é.json",
)  # fmt: skip


def bytes_changed(raw: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, put in, taken out, repeated or cut off."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, how = rng.randrange(len(data) + 1), rng.randrange(6)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif how == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 9))
        elif how == 3:
            del data[at : at + rng.randint(1, 64)]
        elif how == 4:
            data[at:at] = data[max(0, at - rng.randint(1, 200)) : at]
        else:
            del data[at:]
    return bytes(data)


def value_changed(raw: bytes, rng: random.Random) -> bytes:
    """One value somewhere in a JSON file replaced, removed, doubled, or given another name."""
    try:
        value = json.loads(raw)
    except ValueError:
        return bytes_changed(raw, rng)
    at = value
    for _ in range(rng.randint(0, 8)):
        inside = [
            v for v in (at.values() if isinstance(at, dict) else at) if isinstance(v, (dict, list)) and v
        ]
        if not inside:
            break
        at = rng.choice(inside)
    if not at:
        return bytes_changed(raw, rng)
    keys: list[Any] = list(at) if isinstance(at, dict) else list(range(len(at)))
    key, how = rng.choice(keys), rng.randrange(4)
    if how == 0:
        del at[key]
    elif how == 1:
        at[rng.choice(WORDS) if isinstance(at, dict) else key] = at[key]
    elif how == 2 and isinstance(at[key], (int, float)) and not isinstance(at[key], bool):
        at[key] = at[key] * rng.choice((-1, 0, 10, 1e6, 1e30)) + rng.choice((0, 1, -1, 0.5))
    else:
        at[key] = rng.choice(ODD)
    return json.dumps(value).encode()


class Fuzz:
    """One sound bundle in `home`, which is mutated, opened and put right again, as often as wanted."""

    def __init__(self, bundle: Path, home: Path, seed: int) -> None:
        self.rng, self.folder = random.Random(seed), home / "bundle"
        self.home, self.outside = home, home / "outside"
        self.outside.write_bytes(b"untouched")
        shutil.copytree(bundle, self.folder)
        self.files = {p.name: p.read_bytes() for p in sorted(self.folder.iterdir())}
        self.changed: set[str] = set()

    def _put(self, name: str, raw: bytes) -> None:
        self.changed.add(name)
        (self.folder / name).write_bytes(raw)

    def mutate(self) -> str:
        """Changes the bundle; returns how."""
        ways: list[tuple[int, Callable[[], str]]] = [
            (40, self.some_bytes), (30, self.some_value), (10, self.whole_file), (6, self.kind_of_file),
            (6, self.names), (8, self.manifest_row),
        ]  # fmt: skip
        (how,) = self.rng.choices([way for _, way in ways], [weight for weight, _ in ways])
        return how()

    def some_bytes(self) -> str:
        name = self.rng.choice(list(self.files))
        self._put(name, bytes_changed(self.files[name], self.rng))
        return "bytes"

    def some_value(self) -> str:
        name = self.rng.choice([n for n in self.files if n.endswith(".json")])
        self._put(name, value_changed(self.files[name], self.rng))
        return "value"

    def whole_file(self) -> str:
        name = self.rng.choice(list(self.files))
        other = self.rng.choice([*RAW, *self.files.values(), self.rng.randbytes(1000)])
        self._put(name, other)
        return "whole file"

    def kind_of_file(self) -> str:
        name = self.rng.choice(list(self.files))
        path = self.folder / name
        path.unlink()
        self.changed.add(name)
        how = self.rng.randrange(6)
        if how == 0:
            path.symlink_to(self.outside)
        elif how == 1:
            os.mkfifo(path)
        elif how == 2:
            path.mkdir()
        elif how == 3:
            path.symlink_to(path)
        elif how == 4:
            with path.open("wb") as file:
                file.truncate(2**27)  # 128 MiB, none of it on disk
        return "kind of file"

    def names(self) -> str:
        name = self.rng.choice(NAMES)
        if "/" in name or name == "..":
            return self.manifest_row()
        self._put(name, self.rng.choice([b"", b"print(1)", *self.files.values()]))
        return "names"

    def manifest_row(self) -> str:
        manifest = json.loads(self.files[MANIFEST])
        files = manifest["files"]
        name = self.rng.choice(list(files))
        how = self.rng.randrange(4)
        if how == 0:
            files[self.rng.choice(NAMES)] = files.pop(name)
        elif how == 1:
            files[self.rng.choice(("../outside", "/etc/passwd", *NAMES))] = files[name]
        elif how == 2:
            files[name] = {
                "sha256": self.rng.choice(("", "0" * 64, 7)),
                "size": self.rng.choice((0, -1, 2**40)),
            }
        else:
            manifest["schema"] = self.rng.choice((0, 2, 999, "1", None, 1.5))
        self._put(MANIFEST, json.dumps(manifest).encode())
        return "manifest"

    def forge(self) -> None:
        """Makes hashes and sizes right again, as far as the manifest can still be read."""
        if not (self.folder / MANIFEST).is_file():
            return
        try:
            manifest = json.loads((self.folder / MANIFEST).read_bytes())
            for name, row in manifest["files"].items():
                if name in self.changed and name in self.files and (self.folder / name).is_file():
                    raw = (self.folder / name).read_bytes()
                    row |= {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return
        raw = json.dumps(manifest).encode()
        self._put(MANIFEST, raw)
        if SIGNATURE not in self.changed:
            self._put(SIGNATURE, signature_of(raw, None))

    def restore(self) -> None:
        for name in self.changed:
            path = self.folder / name
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
            if name in self.files:
                path.write_bytes(self.files[name])
        self.changed.clear()

    @property
    def same(self) -> bool:
        """Whether the bundle is what it was, byte for byte."""
        names = sorted(path.name for path in self.folder.iterdir())
        return names == sorted(self.files) and all(
            not (self.folder / n).is_symlink() and (self.folder / n).read_bytes() == self.files[n]
            for n in names
        )

    def once(self, forged: bool, key: bytes | None) -> tuple[str, str, str]:
        """One mutation: how, what became of it (refused, same, loaded, or crashed), and the reason."""
        how = self.mutate()
        if forged:
            self.forge()
        try:
            with watched(self.home):
                open_bundle(self.folder, key)
        except BundleError as error:
            outcome, why = "refused", str(error).partition(": ")[2]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome, why = "crashed", f"{type(error).__name__}: {error}"
        else:
            outcome, why = ("same" if self.same else "loaded"), ""
        if self.outside.read_bytes() != b"untouched":
            outcome, why = "crashed", "a file outside was written"
        self.restore()
        return how, outcome, why


class ForbiddenError(BaseException):
    """Something that opening a bundle must never do."""


_watching: list[Path] = []
_FORBIDDEN = (
    "exec", "compile", "code.__new__", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.remove",
    "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate", "os.putenv",
    "pickle.find_class", "shutil.rmtree", "subprocess.Popen", "socket.connect", "socket.bind", "ctypes.dlopen",
    "marshal.loads", "sqlite3.connect",
)  # fmt: skip


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in _FORBIDDEN:
        raise ForbiddenError(f"{event} {arguments!r:.200}")
    if (
        event == "open"
        and isinstance(arguments[2], int)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        raise ForbiddenError(f"opens {arguments[0]!r:.200} to write")


class watched:  # noqa: N801  (used as a function)
    """While it lasts, whatever runs code, writes, or goes out of the process raises ForbiddenError.

    Python reports these events itself (PEP 578). Modules that are imported late run their code, so import first.
    """

    _hooked = False

    def __init__(self, home: Path) -> None:
        self._home = home

    def __enter__(self) -> None:
        if not watched._hooked:
            sys.addaudithook(_hook)
            watched._hooked = True
        _watching.append(self._home)

    def __exit__(self, *_: object) -> None:
        _watching.pop()
