"""A measured case: what was deployed, what was sent, what came back, and what one request at a time costs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

LATE_S = 0.005  # sent later than this: it loaded the server, but its latency is the generator's too
ROUTED_S = 1.5  # from the end of a replica's constructor until a busy router sends to it (idle: 0.3)
LOAD_WINDOW_S = 10
ONSET_S = 5.0  # of an overload: the router's tasks fall into step


@dataclass(frozen=True)
class Deployment:
    """The configuration that Ray Serve ran."""

    ready_s: tuple[float, ...]  # when each replica can be routed to; below zero: from the start
    base_s: float
    per_item_s: float
    max_batch: int
    wait_s: float
    max_ongoing: int

    @property
    def batches(self) -> bool:
        """Whether a batch stays open for more; with a wait of 0, for the time that closing it takes."""
        return self.max_batch > 1

    def utilisation(self, rate_rps: float, overheads: Overheads) -> float:
        """Of one replica. Batches close on their own clock: the rate makes their size, not the backlog."""
        size = min(1 + rate_rps * overheads.window_s, self.max_batch) if self.batches else 1.0
        return rate_rps / size * (self.base_s + self.per_item_s * size + overheads.batch_s)

    def capacity_rps(self, overheads: Overheads) -> float:
        """The rate of one replica at which its utilisation is 1, by bisection."""
        low, high = 0.0, self.max_batch / (self.base_s + self.per_item_s * self.max_batch)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.utilisation(middle, overheads) < 1 else (low, middle)
        return low


@dataclass(frozen=True)
class Overheads:
    """What a request costs beyond its service time and the nominal wait, from requests that met no other."""

    window_s: float  # how long a batch really stays open: the wait and the timer's lateness
    batch_s: float  # of the server, per batch
    request_s: np.ndarray  # quantiles of the delay on the way, outside the server; equally spaced


@dataclass(frozen=True)
class Recording:
    name: str
    deployment: Deployment
    low_load_ms: dict[str, float]  # medians of the parts of a request, one at a time
    nominal_ms: float  # service time of a batch of one
    table: pd.DataFrame  # case.detail.csv in order of sending

    @property
    def send_s(self) -> np.ndarray:
        return self.table["sent_s"].to_numpy()

    @property
    def on_time(self) -> np.ndarray:
        """Requests whose latency is compared: answered, and sent when they should have been."""
        answered = np.isfinite(self.table["done_s"].to_numpy()) & (self.table["ok"].to_numpy() == 1)
        return answered & ((self.table["sent_s"] - self.table["scheduled_s"]).to_numpy() <= LATE_S)

    @property
    def latency_s(self) -> np.ndarray:
        return (self.table["done_s"] - self.table["sent_s"]).to_numpy()

    def level_ms(self) -> float:
        """The delay of one request on the way, by the low-load medians."""
        parts = self.low_load_ms
        way = parts["client_to_handler"] + parts["batch_end_to_client"]
        return way if self.deployment.batches else way + parts["handler_to_batch_start"]

    def idle_ratios(self) -> np.ndarray:
        """The same delay of every request that met an empty system, relative to the level."""
        table = self.table
        done = np.maximum.accumulate(table["done_s"].fillna(math.inf).to_numpy())
        alone = np.concatenate([[True], done[:-1] < table["sent_s"].to_numpy()[1:]])
        way = table["handler_in_s"] - table["sent_s"] + table["done_s"] - table["batch_end_s"]
        if not self.deployment.batches:
            way += table["batch_start_s"] - table["handler_in_s"]
        return way.to_numpy()[alone & self.on_time] * 1e3 / self.level_ms()

    def load(self, overheads: Overheads) -> pd.DataFrame:
        """By the second: what is offered, what the ready replicas can serve, what must be left over."""
        seconds = np.arange(math.floor(self.send_s[-1]) + 1)
        offered = np.bincount(np.maximum(self.send_s, 0).astype(int), minlength=len(seconds))[seconds]
        ready = np.sum([np.clip(seconds + 1 - at, 0, 1) for at in self.deployment.ready_s], axis=0)
        capacity = ready * self.deployment.capacity_rps(overheads)
        backlog, left = np.zeros(len(seconds)), 0.0
        for k in range(len(seconds)):
            backlog[k] = left = max(0.0, left + offered[k] - capacity[k])
        return pd.DataFrame({"offered": offered, "capacity": capacity, "ready": ready, "backlog": backlog})

    def overloads(self, overheads: Overheads) -> list[tuple[float, float]]:
        """Spans in which more is offered than can be served and every slot is taken: told by rates alone.

        The slots are taken once the backlog that even a perfect router would have exceeds them.
        """
        load = self.load(overheads)
        offered = load["offered"].rolling(LOAD_WINDOW_S, center=True, min_periods=1).mean()
        full = load["backlog"] > self.deployment.max_ongoing * load["ready"]
        spans: list[tuple[float, float]] = []
        for second in np.flatnonzero(full & (offered > load["capacity"])):
            if spans and second <= spans[-1][1] + LOAD_WINDOW_S:
                spans[-1] = (spans[-1][0], second + 1.0)
            else:
                spans.append((float(second), second + 1.0))
        return [(start + ONSET_S, end) for start, end in spans if end - start >= 2 * ONSET_S]


def read(path: Path) -> Recording:
    """A recording from its case.json, with case.detail.csv beside it."""
    record = json.loads(path.read_text())
    config, low = record["config"], record["low_load"]
    table = pd.read_csv(path.with_name(path.stem + ".detail.csv")).sort_values("sent_s", kind="stable")
    return Recording(
        name=record["case"],
        deployment=Deployment(
            ready_s=_ready(record),
            base_s=config["a"],
            per_item_s=config["b"],
            max_batch=config["max_batch"],
            wait_s=config["wait"],
            max_ongoing=config["max_ongoing"],
        ),
        low_load_ms=low["parts_ms_p50"],
        nominal_ms=low["nominal_ms_excl_batch_wait"],
        table=table.reset_index(drop=True),
    )


def _ready(record: dict[str, Any]) -> tuple[float, ...]:
    ends = [event["ctor_end_s"] for event in record.get("replica_events", [])]
    ready = [end if end < 0 else end + ROUTED_S for end in ends]
    missing = record["config"]["replicas"] - sum(end < 0 for end in ends)
    return tuple(sorted([-1.0] * max(missing, 0) + ready))


def find(folder: Path) -> list[Path]:
    """The case files of a folder of traces, or of a folder that holds cases itself."""
    for place in (folder / "fidelity" / "ray_serve", folder):
        paths = sorted(p for p in place.glob("*.json") if p.with_name(p.stem + ".detail.csv").exists())
        if paths:
            return paths
    raise SystemExit(
        f"error: no NAME.json with NAME.detail.csv in {folder} or in fidelity/ray_serve below it"
    )
