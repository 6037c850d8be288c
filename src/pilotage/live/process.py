"""Steering as a process: it holds the lease, answers signals, and serves its own state."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pilotage.control.steer import steer
from pilotage.live.advice import AnswerFile, Answers, Terminal
from pilotage.live.lease import FileLease, Lease, Leases
from pilotage.live.status import Log, Status, serve
from pilotage.live.steer_config import Mode, Setup, load
from pilotage.live.steering import Steering


def run(path: Path, mode: Mode | None = None, ticks: int | None = None, log: Log | None = None) -> Status:
    """Steers by a configuration file until it is told to stop (SIGTERM, SIGINT), a recording is over, or so many ticks
    have passed. SIGHUP reads the configuration again. Raises SpecError for bad input, LeaseError for a lease that is
    somebody else's or was lost. A lease of the cluster is waited for."""
    log = log or Log()
    setup = load(path, mode)
    lease = _lease(setup, log)
    lease.acquire()
    server = None
    try:
        answers = _answers(setup, path)
        steering = Steering(setup, log=log, reload=lambda: load(path, mode), lease=lease, answers=answers)
        with _signals(steering, log):
            if setup.config.listen:
                server = serve(steering.status, setup.config.listen)
            collect_seldom()
            log("started", mode=setup.config.mode, services=len(setup.services), tick_s=setup.tick_s)
            steer(steering, steering, ticks, going=steering.going)
        steering.journal.note([])
        steering.journal.catch_up()
        log("stopped", ticks=steering.status.ticks, ledger_waiting=steering.journal.waiting)
        if steering.lost is not None:
            raise steering.lost
        return steering.status
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
        lease.release()


def collect_seldom() -> None:
    """Spares ticks the garbage collector: what is there now stays, so that it need not be looked through again, and a
    tick makes some thousands of objects that go without its help."""
    gc.freeze()
    gc.set_threshold(20_000)


def _lease(setup: Setup, log: Log) -> Lease:
    """The ledger's lock, and the cluster's lease if there is to be one."""
    lock, shared = FileLease(setup.ledger / "steer.lock"), setup.config.lease
    if shared is None:
        return lock
    from pilotage.live.kubernetes_lease import KubernetesLease  # the client of an outside system

    def tell(what: str) -> None:
        log("lease", why=what)

    return Leases(lock, KubernetesLease(shared, setup.target, setup.target.namespace, tell=tell))


def _answers(setup: Setup, path: Path) -> Answers | None:
    if setup.config.mode != "advise":
        return None
    return AnswerFile(path.parent / setup.config.answers) if setup.config.answers else Terminal()


@contextmanager
def _signals(steering: Steering, log: Log) -> Iterator[None]:
    """Signals do no more than leave word: a tick that has begun is finished."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = {
        signal.SIGTERM: steering.stop.set,
        signal.SIGINT: steering.stop.set,
        signal.SIGHUP: steering.reload_asked.set,
    }
    before = {which: signal.signal(which, lambda *_, do=do: do()) for which, do in asked.items()}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
