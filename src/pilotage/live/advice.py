"""Asking before acting: the changes of a tick are shown with their reasons, and made if somebody says yes in time."""

from __future__ import annotations

import json
import select
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pilotage.world.spec import SpecError

_LOOK_EVERY_S = 0.1


class Answers(Protocol):
    """Whoever says yes or no."""

    def ask(self, advice: str, lines: Sequence[str], within_s: float, stop: threading.Event) -> bool:
        """Whether this advice, by its name, is taken; what is not answered in time is not."""
        ...


class Terminal:
    """Asks whoever sits at the terminal."""

    def __init__(self) -> None:
        if not sys.stdin.isatty():
            raise SpecError(
                "mode 'advise' has nobody to ask: run it at a terminal, or give the file 'answers'"
            )

    def ask(self, advice: str, lines: Sequence[str], within_s: float, stop: threading.Event) -> bool:
        shown = "\n".join(_printable(line) for line in lines)
        sys.stderr.write(f"\nadvice {advice}:\n{shown}\ndo it? [y/N, {within_s:.0f} s] ")
        sys.stderr.flush()
        ends_s = time.monotonic() + within_s
        while time.monotonic() < ends_s and not stop.is_set():
            if select.select([sys.stdin], [], [], _LOOK_EVERY_S)[0]:
                return sys.stdin.readline().strip().lower() in ("y", "yes")
        return False


class AnswerFile:
    """Writes advice to FILE.advice.json, and takes it if FILE then holds its name: an old yes is not for new advice."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, advice: str, lines: Sequence[str], within_s: float, stop: threading.Event) -> bool:
        shown = {"advice": advice, "within_s": within_s, "changes": list(lines)}
        part = self._path.with_name(self._path.name + ".part")
        try:
            part.write_text(json.dumps(shown, indent=1) + "\n")
            part.replace(self._path.with_name(self._path.name + ".advice.json"))
        except OSError:
            return False
        ends_s = time.monotonic() + within_s
        while time.monotonic() < ends_s and not stop.wait(_LOOK_EVERY_S):
            try:
                with self._path.open() as file:
                    if file.read(len(advice) + 100).strip() == advice:
                        return True
            except (OSError, UnicodeDecodeError):
                continue
        return False


def _printable(line: str) -> str:
    """Text that cannot steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in line)
