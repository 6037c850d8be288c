"""Where runs are made: in this process, in processes of this machine, or on a Dask or Ray cluster.

Runs do not know of each other, so they can be made anywhere in any order, and the results are those of one process, to
the bit. Local processes and Dask are joblib's; Ray's own tasks are used instead of its joblib backend, which gives
results only when all are there, and so loses all with one worker. What belongs here is the fan-out alone: what a task
is, and what its result means, the caller knows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from pilotage.control.policy import Policy
from pilotage.control.retraining import Retraining
from pilotage.engine.cluster import World
from pilotage.engine.run import Run, simulate
from pilotage.scenario import Scenario
from pilotage.world.spec import SpecError

ATTEMPTS: Final = 4  # of a task whose worker dies
_VALID: Final = "local, local:N, tcp://HOST:PORT or tls://HOST:PORT (Dask), ray, ray://HOST:PORT"


class Workers:
    """What makes runs; `cluster` says where: None is this process, on all its cores.

    `local` and `local:N` are processes of this machine; an address that starts with `tcp://` or `tls://` is a Dask
    scheduler's; `ray` is the Ray cluster that this machine belongs to, `ray://` a Ray client server. A worker that
    dies costs its tasks, which are done again elsewhere, up to four times in all. Workers need this package in the
    same version, and the same paths to traces. Raises SpecError where the address is none, or nothing answers there.
    """

    def __init__(self, cluster: str | None = None) -> None:
        kind, _, rest = (cluster or "").partition(":")
        if cluster is not None and not (
            kind in ("local", "tcp", "tls", "ray") and (rest or kind in ("local", "ray"))
        ):
            raise SpecError(f"cluster {cluster!r}: is no cluster; valid: {_VALID}")
        self._kind, self._client = kind, None
        if kind == "local":
            if rest and not (rest.isdecimal() and int(rest) > 0):
                raise SpecError(f"cluster {cluster!r}: {rest!r} is no number of processes; valid: {_VALID}")
            self.count = int(rest) if rest else os.cpu_count() or 1
        elif kind in ("tcp", "tls"):
            self._client, self.count = _dask(str(cluster))
        elif kind == "ray":
            self.count = _ray(str(cluster))
        else:
            self.count = 1

    def map(self, function: Callable[..., Any], tasks: Sequence[Sequence[Any]]) -> list[Any]:
        """`function(*task)` of every task, in their order. What a function raises is raised here."""
        if self._kind == "":
            return [function(*task) for task in tasks]
        if self._kind == "ray":
            import ray

            remote = ray.remote(max_retries=ATTEMPTS - 1)(function)
            answers: list[Any] = ray.get([remote.remote(*task) for task in tasks])
            return answers
        found: dict[int, Any] = {}
        for attempt in range(ATTEMPTS):
            missing = [k for k in range(len(tasks)) if k not in found]
            try:
                with joblib.parallel_config("loky" if self._kind == "local" else "dask", n_jobs=self.count):
                    work = (joblib.delayed(_numbered)(k, function, tasks[k]) for k in missing)
                    for k, answer in joblib.Parallel(return_as="generator_unordered")(work):
                        found[k] = answer
                break
            except TerminatedWorkerError:  # Dask does this itself
                if attempt == ATTEMPTS - 1:
                    raise
        return [found[k] for k in range(len(tasks))]

    def simulate(
        self,
        scenario: Scenario,
        policies: Sequence[Policy | Sequence[Policy]],
        worlds: Sequence[World],
        *,
        retraining: Sequence[Retraining | Sequence[Retraining]] | Retraining | None = None,
        **options: Any,
    ) -> list[Run]:
        """`engine.run.simulate`, with the worlds divided among the workers."""
        if self._kind == "":
            threads = os.cpu_count() or 1
            return simulate(scenario, policies, worlds, retraining=retraining, threads=threads, **options)
        if isinstance(retraining, Retraining):
            retraining = [retraining] * len(worlds)
        # two parts for each worker, so that one that is quicker gets more to do
        size = math.ceil(len(worlds) / (2 * self.count))
        parts = [slice(k, k + size) for k in range(0, len(worlds), size)]
        tasks = [
            (scenario, policies[p], worlds[p], None if retraining is None else retraining[p], options)
            for p in parts
        ]
        return [run for runs in self.map(_simulated, tasks) for run in runs]

    def close(self) -> None:
        """Lets go of the cluster, which goes on."""
        if self._client is not None:
            self._client.close()
        elif self._kind == "ray":
            import ray

            ray.shutdown()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _numbered(k: int, function: Callable[..., Any], task: Sequence[Any]) -> tuple[int, Any]:
    return k, function(*task)


def _simulated(
    scenario: Scenario,
    policies: Sequence[Policy | Sequence[Policy]],
    worlds: Sequence[World],
    retraining: Sequence[Retraining | Sequence[Retraining]] | None,
    options: dict[str, Any],
) -> list[Run]:
    return simulate(scenario, policies, worlds, retraining=retraining, **options)


def _dask(address: str) -> tuple[Any, int]:
    """A client of a Dask scheduler and its number of worker threads; joblib finds the client by itself."""
    from distributed import Client

    try:
        client = Client(address, timeout="10s")
    except OSError as error:
        raise SpecError(
            f"cluster {address!r}: no Dask scheduler answers ({error}); start one with `dask scheduler`"
        ) from None
    threads = sum(client.nthreads().values())
    if not threads:
        client.close()
        raise SpecError(f"cluster {address!r}: the scheduler has no workers; start some with `dask worker`")
    return client, threads


def _ray(address: str) -> int:
    """Joins a Ray cluster; its number of processors."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    try:
        ray.init("auto" if address == "ray" else address, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise SpecError(
            f"cluster {address!r}: no Ray cluster answers ({error}); start one with `ray start --head`"
        ) from None
    return int(ray.cluster_resources().get("CPU", 1))
