"""The one place where a recorded case meets the simulator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from recording import Deployment, Overheads

from pilotage.engine.cluster import Cluster, World
from pilotage.scenario import Scenario
from pilotage.world.arrivals import Poisson
from pilotage.world.pools import Pool
from pilotage.world.servers import Affine, BatchServer, Router, Variant
from pilotage.world.services import Service

TICK_S = 0.05  # replicas that start later are ready at a tick
PATIENCE_S = 1200.0  # after the last request; what is not served by then is left out


class Replay:
    """Traffic that is a list of times."""

    def __init__(self, times_s: np.ndarray) -> None:
        self.times_s, self.given = times_s, 0

    def begin(self, *_: object) -> Replay:
        return Replay(self.times_s)

    def until(self, end_s: float) -> np.ndarray:
        first, self.given = self.given, int(np.searchsorted(self.times_s, end_s))
        return self.times_s[first : self.given]


def simulate(
    deployment: Deployment, send_s: np.ndarray, overheads: Overheads, seeds: Sequence[int]
) -> np.ndarray:
    """Latency of every request in seconds, NaN if it is never served; shape (seeds, requests).

    `send_s` are the times at which they are sent, ascending.
    """
    early_s = min(0.0, send_s[0])  # a run starts at 0
    times_s, ready_s = send_s - early_s, np.array(deployment.ready_s) - early_s
    ticks = math.ceil((times_s[-1] + PATIENCE_S) / TICK_S)
    law = Affine(
        base_ms=(deployment.base_s + overheads.batch_s) * 1e3, per_item_ms=deployment.per_item_s * 1e3
    )
    server = BatchServer(
        max_batch=deployment.max_batch,
        batch_wait_ms=overheads.window_s * 1e3 if deployment.batches else 0.0,
        former="closed",
        routing="ray-serve",
        router=Router(max_ongoing_requests=deployment.max_ongoing),
        overhead_quantiles_ms=tuple((overheads.request_s * 1e3).tolist()),
    )
    replicas = len(ready_s)
    scenario = Scenario(
        title="replay of a measured case",
        tick_s=TICK_S,
        horizon_h=ticks * TICK_S / 3600,
        pools=(Pool(name="measured", price_usd_per_hour=0.0, max_nodes=replicas, boot_s=0.0),),
        services=(
            Service(
                name="measured",
                traffic=Poisson(rate_rps=1.0),  # in its place: the recorded times
                slo_ms=1e3,
                pools=("measured",),
                variants=(Variant(name="measured", latency={"measured": law}),),
                server=server,
                initial_replicas=int((ready_s <= 0).sum()),
                max_replicas=replicas,
            ),
        ),
    )
    worlds = [World(seed, traffic=(Replay(times_s),)) for seed in seeds]
    cluster = Cluster(scenario, worlds, read_ahead_s=ticks * TICK_S)  # all at once: numbers are places
    starts = np.bincount(np.maximum(np.ceil(ready_s / TICK_S), 0).astype(int))
    orders = cluster.no_orders()
    for tick in range(ticks):
        orders["order"] = starts[tick] if 0 < tick < len(starts) else 0
        cluster.advance(orders)
        if (cluster.totals["served"] == len(times_s)).all():
            break
    first = cluster.rows["storage_lo"]
    latency_s = cluster.messages["latency_s"][first[:, None] + np.arange(len(times_s))]
    return np.where(latency_s > 0, latency_s, math.nan)
