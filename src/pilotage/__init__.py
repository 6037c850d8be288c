"""pilotage learns, proves and ships deployment policies for fleets of machine-learning models.

What belongs in which package, and which may import which, is drawn in `docs/architecture.md`. Importing
`pilotage.env` registers the shipped environments with Gymnasium; nothing else happens at import.

The names in `__all__` are the public interface: they stay what they are within a major version. Each is loaded when it
is first asked for, so that a process that only steers loads no simulator.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pilotage.agents.bound import bound as bound
    from pilotage.agents.export import export as export
    from pilotage.control.bundle import BundleError as BundleError
    from pilotage.control.bundle import open_bundle as open_bundle
    from pilotage.control.guard import Guard as Guard
    from pilotage.control.learned import policy_from as policy_from
    from pilotage.control.policy import FEATURES as FEATURES
    from pilotage.control.policy import Controller as Controller
    from pilotage.control.policy import Decision as Decision
    from pilotage.control.policy import Observation as Observation
    from pilotage.control.policy import Policy as Policy
    from pilotage.control.policy import Situation as Situation
    from pilotage.engine.cluster import World as World
    from pilotage.engine.run import Run as Run
    from pilotage.engine.run import simulate as simulate
    from pilotage.evaluate import compare as compare
    from pilotage.scenario import Scenario as Scenario
    from pilotage.scenario import load as load
    from pilotage.world.spec import SpecError as SpecError

__version__ = "0.1.0"

_HOMES = {
    "BundleError": "control.bundle",
    "Controller": "control.policy",
    "Decision": "control.policy",
    "FEATURES": "control.policy",
    "Guard": "control.guard",
    "Observation": "control.policy",
    "Policy": "control.policy",
    "Run": "engine.run",
    "Scenario": "scenario",
    "Situation": "control.policy",
    "SpecError": "world.spec",
    "World": "engine.cluster",
    "bound": "agents.bound",
    "compare": "evaluate",
    "export": "agents.export",
    "load": "scenario",
    "open_bundle": "control.bundle",
    "policy_from": "control.learned",
    "simulate": "engine.run",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pilotage' has no attribute {name!r}")
    return getattr(import_module(f"pilotage.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
