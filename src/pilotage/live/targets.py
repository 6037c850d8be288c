"""Targets: where versions run.

What a target must do to take part in promotion and rollback, and the one that only says what it would do.
"""

from __future__ import annotations

from typing import Protocol

from pilotage.live.registries import Version


class TargetError(Exception):
    """A target did not do what was asked."""


class Target(Protocol):
    """Where services run. Errors are `TargetError`s; `deploy` may be repeated."""

    def running(self, service: str) -> str | None:
        """The version that serves now."""
        ...

    def deploy(self, service: str, version: Version) -> str:
        """Makes a version serve, and says in one sentence what was done."""
        ...


class DryRun:
    """Touches nothing: remembers, while the process lives, what would run."""

    def __init__(self) -> None:
        self._running: dict[str, str] = {}

    def running(self, service: str) -> str | None:
        return self._running.get(service)

    def deploy(self, service: str, version: Version) -> str:
        before = self._running.get(service)
        self._running[service] = version.version
        return f"would replace version {before} of {service} by {version.version} ({version.artifact or 'no artifact'})"
