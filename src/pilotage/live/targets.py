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


class Traffic(Protocol):
    """What sends requests to versions; `split` may be repeated, and its errors are `TargetError`s."""

    def split(self, service: str, challenger: Version | None, share: float) -> str:
        """Sends a share of a service's requests to a challenger beside what serves (None: to nobody else), and says in
        one sentence what was done."""
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

    def split(self, service: str, challenger: Version | None, share: float) -> str:
        if challenger is None:
            return f"would send all requests of {service} to version {self._running.get(service)}"
        return f"would send {share:.3g} of the requests of {service} to version {challenger.version}"
