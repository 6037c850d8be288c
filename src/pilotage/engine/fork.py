"""Many futures of one present: copies of a world that go on with traffic, luck and orders of their own.

The state of a world is its slice of the cluster's arrays, so a copy is a copy of slices. Requests that are inside,
replicas and nodes come along as they are; what is drawn from now on (demand, noise, start-ups, routes) comes from the
copy's own seed, or from the world's where none is given. Deaths of nodes and closures that were drawn before stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pilotage.engine.cluster import Cluster, Recorded, World
from pilotage.scenario import Scenario

_BLOCKS = ("replicas", "ready", "slots", "tree", "trees", "routers")  # laid out world after world
_WORLDS = ("nodes", "summary", "in_zone", "cached", "candidate")  # the first axis is worlds


class Futures:
    """`len(seeds)` copies of one world, as a cluster; a seed of None is the world's own.

    `restart` puts them all to the present of a world of another cluster of the same scenario. The cluster's `totals`
    and `histograms` count from then on.
    """

    def __init__(self, scenario: Scenario, seeds: Sequence[int | None], threads: int = 1) -> None:
        silent = (Recorded(np.zeros(0)),) * len(scenario.services)
        worlds = [World(0 if seed is None else seed, 0.0, silent) for seed in seeds]
        self.cluster = Cluster(scenario.replace(history_h=0.0), worlds, threads=threads)
        self._own = np.array([seed is not None for seed in seeds])
        names = [name for name in self.cluster.params.dtype.names or () if name.startswith("seed_")]
        self._drawn = self.cluster.params[names].copy()
        self._nodes = self.cluster._state.seeds.copy()

    def restart(self, source: Cluster, world: int, arrivals_s: Sequence[Sequence[np.ndarray]]) -> Cluster:
        """The copies, at the present of `world`. `arrivals_s[k][s]` are the arrivals of service s in future k from the
        present on, ascending, in seconds since the start of the world's run; none come after them."""
        into = self.cluster
        w, s = into.shape
        theirs = slice(world * s, (world + 1) * s)
        past = source.rows["arrival_lo"][theirs]
        coming = np.array([[len(times) for times in one] for one in arrivals_s]).reshape(w * s)
        needed = np.tile(past, w) + coming
        if (needed > into._capacity).any():
            np.maximum.at(into._most, np.tile(np.arange(s), w), needed + needed // 4 + 64)
            into._capacity = np.tile(into._most, w)
            into._reserve()
        for name in _BLOCKS:
            _copy_block(
                getattr(source._state, name), len(source.worlds), world, getattr(into._state, name), w
            )
        for name in _WORLDS:
            getattr(into._state, name)[:] = getattr(source._state, name)[world]
        closures = source._state.closures[world]
        for k in range(w):
            into._close(k, closures)
        storage = into.rows[["storage_lo", "storage_hi"]].copy()
        into.rows[:] = np.tile(source.rows[theirs], w)
        into.rows[["storage_lo", "storage_hi"]] = storage
        for name in self._drawn.dtype.names or ():
            mine = np.repeat(self._own, s)
            into.params[name] = np.where(mine, self._drawn[name], np.tile(source.params[name][theirs], w))
        into._state.seeds[:] = np.where(self._own, self._nodes, source._state.seeds[world])
        routed = len(into.messages) > 0
        for r in range(w * s):
            row, lo, kept = into.rows[r], source.rows["storage_lo"][world * s + r % s], int(past[r % s])
            at = int(row["storage_lo"])
            into.arrival_storage[at : at + kept] = source.arrival_storage[lo : lo + kept]
            into.requests[at : at + kept] = source.requests[lo : lo + kept]
            if routed:
                into.messages[at : at + kept] = source.messages[lo : lo + kept]
            into.arrival_storage[at + kept : at + kept + coming[r]] = arrivals_s[r // s][r % s]
            row["arrival_hi"] = kept + coming[r]
        into.ticks[:] = source.ticks[world]
        into.totals[:] = np.zeros((), into.totals.dtype)
        into.histograms[:] = 0
        into.clock_s[:] = source.clock_s[world]
        into._start_s[:] = source._start_s[world]
        into._known_s[:] = np.inf  # nothing is read: what comes has been given
        into._dry_s = np.inf
        return into


def _copy_block(source: np.ndarray, worlds: int, world: int, into: np.ndarray, copies: int) -> None:
    """Copies a world's part of an array along its last axis into all parts of another."""
    size = source.shape[-1] // worlds
    part = source[..., world * size : (world + 1) * size]
    for k in range(copies):
        into[..., k * size : (k + 1) * size] = part
