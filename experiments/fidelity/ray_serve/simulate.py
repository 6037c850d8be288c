"""The one place where a recorded case meets the simulator."""

from __future__ import annotations

import numpy as np
from recording import Deployment, Overheads
from reference import Simulation


def simulate_case(
    config: Deployment, send_times: np.ndarray, overheads: Overheads, seed: int
) -> dict[str, np.ndarray]:
    """Latency and batch size of every request, when these requests are sent to that deployment."""
    return Simulation(config, send_times, overheads, seed).run()
