"""Which pools a service's replicas are in, for policies that choose among several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from pilotage.control.policy import Decision


class Fleet:
    """The pools of a service's replicas, from the oldest to the youngest, as far as can be known.

    An observation counts replicas, and does not say where they are. So orders are remembered. What goes is taken to
    be the youngest, as clusters and the engine do it; what was not ordered here is taken to be where orders went
    last, and at first in the preferred pool.

    A decision names one pool for its orders and none for its releases. A policy that wants replicas in two pools
    orders in one now and in the other when it decides again, and of a pool's surplus only what is youngest can go.
    """

    def __init__(self, pools: Sequence[str]) -> None:
        self._pools = tuple(pools)
        self._last = self._pools[0]
        self._replicas: list[str] = []

    def settle(self, replicas: int) -> None:
        """Brings the memory in line with the number of replicas that was observed."""
        del self._replicas[replicas:]
        self._replicas += [self._last] * (replicas - len(self._replicas))

    @property
    def counts(self) -> dict[str, int]:
        """Replicas per pool, in the service's order of pools."""
        return {pool: self._replicas.count(pool) for pool in self._pools}

    def order(self, pool: str, count: int, reason: str) -> Decision:
        """Orders replicas in a pool."""
        self._last = pool
        self._replicas += [pool] * count
        return Decision(order=count, pool=pool, reason=reason)

    def release(self, count: int, reason: str) -> Decision:
        """Releases the youngest replicas."""
        count = min(count, len(self._replicas))
        del self._replicas[len(self._replicas) - count :]
        return Decision(release=count, reason=reason)

    def release_surplus(self, surplus: Mapping[str, int], reason: str) -> Decision:
        """Releases of each pool's surplus what goes before any replica that has to stay."""
        left, count = dict(surplus), 0
        while count < len(self._replicas) and left[self._replicas[-1 - count]] > 0:
            left[self._replicas[-1 - count]] -= 1
            count += 1
        return self.release(count, reason)

    def move(self, pool: str, count: int, reason: str) -> Decision:
        """`count` replicas in one pool and none elsewhere: those elsewhere go as the new ones are ordered."""
        present = len(self._replicas)
        if self.counts[pool] < present:  # the youngest go first, so all have to go
            self._replicas.clear()
            return replace(self.order(pool, count, reason), release=present)
        if count < present:
            return self.release(present - count, reason)
        return self.order(pool, count - present, reason)
