"""Whatever breaks while a fleet is steered: what is safe is done, nothing is lost, and the loop goes on."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from experiments.steer.soak import Chaos, Fleet, Soak, audit, setup_of, soak
from pilotage.control.policy import INDEX, Controller, Decision, Observation, Policy, Situation
from pilotage.control.scaling import Schedule
from pilotage.control.steer import steer
from pilotage.live.clock import Clock
from pilotage.live.entries import Entry, Record
from pilotage.live.lease import FileLease, LeaseError
from pilotage.live.ledger import Ledger
from pilotage.live.monitors import Prometheus, Reading
from pilotage.live.status import Log
from pilotage.live.steering import Steering
from pilotage.live.targets import ScaleOrder, TargetError
from tests.live import prometheus as real
from tests.live.prometheus import found, needs_prometheus, send, serving
from tests.live.test_steer import entries, steering

REQUIRED = {"guard": {"required": ["arrival_rate"], "stale_after_s": 60.0, "max_replicas": 20}}


# --- Prometheus --------------------------------------------------------------------------------------------------
class Five(Policy, frozen=True, kw_only=True, tag="five-in-a-test"):
    """Wants five replicas, whatever it sees."""

    def begin(self, situation: Situation) -> Controller:
        return _Five()


class _Five:
    def decide(self, seen: Observation) -> Decision:
        return Decision.towards(5, seen, reason="five")


def watched(folder: Path, url: str, **changes: object) -> Soak:
    """A fleet whose counts are its own and whose load a Prometheus sees."""
    setup = setup_of(folder, 2)
    monitor = Prometheus(**({"url": url, "timeout_s": 1.0} | changes))  # type: ignore[arg-type]
    config = setup.config.replace(monitor=monitor, **REQUIRED)
    fleet = Fleet(setup.names, seed=0, faults=False)
    made = Soak(
        replace(setup, config=config, policies=(Five(), Five())), log=Log(StringIO()), target=fleet,
        clock=Clock(lambda: fleet.monotonic_s),
    )  # fmt: skip
    made.fleet, made.rss_mib = fleet, []
    return made


def sample(service: str, rate: float | str, age_s: float = 2.0) -> list[tuple[str, str, float | str]]:
    return [
        ("arrival_rate", service, rate),
        ("age requests_total service", service, age_s),
        ("replicas_ready", service, 3),
    ]


BAD = {
    "slow": lambda h: time.sleep(1.5),
    "NaN": lambda h: send(h, 200, found(*sample("s0", "NaN"), *sample("s1", "NaN"))),
    "stale": lambda h: send(h, 200, found(*sample("s0", 50, 61), *sample("s1", 50, 61))),
    "empty": lambda h: send(h, 200, found()),
    "an error": lambda h: send(h, 503, b"no"),
    "in the future": lambda h: send(h, 200, found(*sample("s0", 50, -3600), *sample("s1", "x"), now_s=1e12)),
}


@pytest.mark.parametrize("what", BAD)
def test_a_prometheus_in_trouble_means_that_nothing_changes_until_it_is_well(
    tmp_path: Path, what: str
) -> None:
    ill = True

    def handle(handler: BaseHTTPRequestHandler, body: str) -> None:
        if ill:
            BAD[what](handler)
        else:
            send(handler, 200, found(*sample("s0", 50), *sample("s1", 50)))

    with serving(handle) as url:
        here = watched(tmp_path, url)
        steer(here, here, 2)
        assert here.fleet.writes == 0
        assert all(e["reason"].startswith("held: ") for e in entries(tmp_path))
        ill = False
        steer(here, here, 1)
    assert here.fleet.ordered == {"s0": 5, "s1": 5}
    assert audit(tmp_path / "ledger", 3, 2)["missing"] == 0


def test_of_partial_data_only_what_is_missing_is_held(tmp_path: Path) -> None:
    with serving(lambda h, b: send(h, 200, found(*sample("s0", 50)))) as url:
        here = watched(tmp_path, url)
        steer(here, here, 2)
    assert here.fleet.ordered == {"s0": 5, "s1": 3}


@needs_prometheus
def test_a_real_prometheus_that_dies_and_comes_back(tmp_path: Path) -> None:
    began = time.monotonic()

    def handle(handler: BaseHTTPRequestHandler, body: str) -> None:
        lines = []
        for name in ("s0", "s1"):
            lines.append(f'requests_total{{service="{name}"}} {50 * (time.monotonic() - began)}')
            lines.append(f'kube_deployment_status_replicas_ready{{deployment="{name}"}} 3')
        send(handler, 200, ("\n".join(lines) + "\n").encode(), "text/plain; version=0.0.4")

    folder = tmp_path / "prometheus"
    folder.mkdir()
    with serving(handle) as url:
        server = real.Prometheus(folder, [url.removeprefix("http://")])
        server.start()
        try:
            server.wait_for("min(count_over_time(requests_total[10s])) >= 3")
            here = watched(tmp_path, server.url, window_s=10.0, scrape_s=1.0, timeout_s=10.0)
            steer(here, here, 1)
            assert here.fleet.ordered == {"s0": 5, "s1": 5}
            here.fleet.ordered = {"s0": 4, "s1": 4}  # somebody else takes one
            server.stop()
            steer(here, here, 2)
            assert here.fleet.ordered == {"s0": 4, "s1": 4}
            server.start()
            server.wait_for("min(count_over_time(requests_total[10s])) >= 3")
            steer(here, here, 1)
            assert here.fleet.ordered == {"s0": 5, "s1": 5}
        finally:
            server.stop()
    assert here.status.errors["monitor"] == 2


# --- policies ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("order", "max_batch"),
    [(n, 4) for n in (10_000, math.nan, -5, 10**12, 1.5, "5", np.int64(10_000))]
    + [(0, math.nan), (0, -1), (0, "x")],
)
def test_a_policy_that_orders_nonsense_orders_nothing_out_of_bounds(
    tmp_path: Path, order: object, max_batch: object
) -> None:
    class Wild(Policy, frozen=True, kw_only=True, tag="wild-in-a-test"):
        def begin(self, situation: Situation) -> Controller:
            class Controls:
                def decide(self, seen: Observation) -> Decision:
                    return Decision(order=order, max_batch=max_batch, reason="wild\n\x1b[31m")  # type: ignore[arg-type]

            return Controls()

    here = steering(tmp_path, guard={"max_replicas": 12, "max_order": 3})
    here._helm = type(here._helm)((Wild(), Wild()), here.setup.situations(), here.setup.config.guard)
    steer(here, here, 5)
    counts = set(here.fleet.ordered.values())
    assert counts == ({12} if order == 10_000 else {3})
    assert audit(tmp_path / "ledger", 5, 2)["missing"] == 0


# --- targets -----------------------------------------------------------------------------------------------------
class Fails(Fleet):
    """A target that does half of what it is told, and says nothing of it."""

    def scale(self, orders: Sequence[ScaleOrder]) -> Sequence[str | TargetError]:
        if self.tick == 0:
            super().scale(orders[:1])
            raise TargetError("timed out; Authorization: Bearer abcdef0123456789 {\n}")
        return super().scale(orders)


def test_a_half_applied_tick_is_finished_by_the_next_from_what_is_there(tmp_path: Path) -> None:
    here = steering(tmp_path, targets=(5,))
    fleet = Fails(here.setup.names, seed=0, faults=False)
    here._monitor = here._target = here.fleet = fleet
    steer(here, here, 2)
    assert fleet.ordered == {"s0": 5, "s1": 5}
    mine = {name: [e for e in entries(tmp_path) if e["service"] == name] for name in ("s0", "s1")}
    assert [e["outcome"] for e in mine["s0"]] == ["intent", "failed", "kept"]  # it had been done
    assert [e["outcome"] for e in mine["s1"]] == ["intent", "failed", "intent", "applied"]
    text = (tmp_path / "ledger" / "ledger.jsonl").read_text() + here._log._out.getvalue()  # type: ignore[attr-defined]
    assert "abcdef0123456789" not in text
    assert "[withheld]" in text


def test_a_bug_of_ours_between_intent_and_result_is_settled_at_the_next_tick(tmp_path: Path) -> None:
    here = steering(tmp_path, targets=(5,))
    scale, here._scale = here._scale, lambda orders: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    steer(here, here, 1)
    assert here.status.errors["apply"] == 1
    here._scale = scale  # type: ignore[method-assign]
    steer(here, here, 1)
    assert here.fleet.ordered == {"s0": 5, "s1": 5}
    assert [e["outcome"] for e in entries(tmp_path) if e["service"] == "s0"] == [
        "intent", "abandoned", "intent", "applied",
    ]  # fmt: skip
    assert not Ledger(tmp_path / "ledger").open_intents()


def test_a_target_whose_counts_are_unknown_is_not_touched(tmp_path: Path) -> None:
    class Silent(Fleet):
        def counts(self, services: Sequence[str]) -> Mapping[str, int]:
            raise TargetError("no answer")

    here = steering(tmp_path, targets=(5,))
    here._target = silent = Silent(here.setup.names, seed=0, faults=False)
    steer(here, here, 2)
    assert silent.writes == 0
    assert here.status.errors["target"] == 2
    assert {e["reason"] for e in entries(tmp_path)} == {"held: replica counts are missing"}


# --- the disk ----------------------------------------------------------------------------------------------------
@contextmanager
def forked(what: Callable[[], None]) -> Iterator[int]:
    """Runs something in a child of this process; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            what()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    yield status


def test_with_a_full_disk_nothing_is_done_that_cannot_be_written_down(tmp_path: Path) -> None:
    here = steering(tmp_path, targets=(3, 5, 5, 5, 5))
    steer(here, here, 1)
    full = (tmp_path / "ledger" / "ledger.jsonl").stat().st_size + 200

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (full, hard))  # a file that cannot grow, as on a full disk
        steer(here, here, 2)
        assert here.fleet.writes == 0, "it acted"
        assert here.journal.waiting == 4
        assert here.status.errors["ledger"] > 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        steer(here, here, 2)
        assert here.fleet.ordered == {"s0": 5, "s1": 5}
        assert here.journal.waiting == 0

    with forked(limited) as status:
        assert status == 0
    assert audit(tmp_path / "ledger", 5, 2) | {"entries": 0} == {
        "entries": 0, "missing": 0, "double": 0, "intents": 2, "unsettled": 0, "broken": [],
    }  # fmt: skip
    assert sorted(e["outcome"] for e in entries(tmp_path) if e["outcome"] == "refused") == ["refused"] * 4


def test_what_memory_cannot_hold_of_a_long_outage_is_counted(tmp_path: Path) -> None:
    class Broken(Ledger):
        works = False

        def append(self, *records: Record, indexed: bool = True) -> list[Entry]:
            if not self.works:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().append(*records, indexed=indexed)

    here = steering(tmp_path, targets=(3,))
    here.journal.ledger, here.journal._most = Broken(tmp_path / "ledger"), 5
    steer(here, here, 6)
    assert (here.journal.waiting, here.journal.lost) == (5, 7)
    here.journal.ledger.works = True
    steer(here, here, 1)
    written = entries(tmp_path)
    assert [e["kind"] for e in written].count("gap") == 1
    assert "7 entries were lost" in next(e["reason"] for e in written if e["kind"] == "gap")
    assert here.journal.lost == 0


# --- one writer, and its death -----------------------------------------------------------------------------------
def test_of_two_who_steer_one_may_and_a_dead_one_makes_way(tmp_path: Path) -> None:
    path = tmp_path / "ledger" / "steer.lock"
    one, two = FileLease(path), FileLease(path)
    one.acquire()
    with pytest.raises(LeaseError, match=f"process {os.getpid()} on .* alive 0 s ago"):
        two.acquire()
    one.release()
    two.acquire()
    two.renew()
    path.unlink()
    with pytest.raises(LeaseError, match="removed or replaced"):
        two.renew()
    two.release()

    def die() -> None:
        FileLease(path).acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    with forked(die) as status:
        assert os.WTERMSIG(status) == signal.SIGKILL
    FileLease(path).acquire()


def test_who_has_lost_the_lease_stops(tmp_path: Path) -> None:
    here = steering(tmp_path)
    lease = FileLease(tmp_path / "ledger" / "steer.lock")
    lease.acquire()
    Here = type("Here", (Steering,), {})  # with the real wait
    here.__class__ = Here
    here._lease = lease
    here.setup = replace(here.setup, tick_s=0.01)
    (tmp_path / "ledger" / "steer.lock").unlink()
    steer(here, here, None, going=here.going)
    assert here.status.ticks == 1
    assert here.lost is not None
    lease.release()


class OnDisk:
    """A target that survives its controller: counts in a file, replaced whole. A word of every order is kept."""

    def __init__(self, folder: Path, step: Callable[[], None]) -> None:
        self._path, self._orders, self._step = folder / "counts.json", folder / "orders.log", step

    def counts(self, services: Sequence[str]) -> Mapping[str, int]:
        self._step()
        return json.loads(self._path.read_text())

    def scale(self, orders: Sequence[ScaleOrder]) -> Sequence[str | TargetError]:
        self._step()
        for order in orders:
            counts = json.loads(self._path.read_text()) | {order.service: order.replicas}
            part = self._path.with_suffix(".part")
            part.write_text(json.dumps(counts))
            part.replace(self._path)
            with self._orders.open("a") as file:
                file.write(f"{order.service} {order.replicas}\n")
            self._step()
        return ["done"] * len(orders)


class TwoMore(Policy, frozen=True, kw_only=True, tag="two-more-in-a-test"):
    """Orders two more than there are, until there are at least seven: doing it twice would be seen."""

    def begin(self, situation: Situation) -> Controller:
        return _TwoMore()


class _TwoMore:
    def decide(self, seen: Observation) -> Decision:
        return Decision(order=2 if seen.replicas < 7 else 0, reason="two more")


STEPS = 22


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_at_any_step_the_next_one_goes_on_from_what_is_there(tmp_path: Path, step: int) -> None:
    (tmp_path / "counts.json").write_text('{"s0": 3, "s1": 3}')
    setup = setup_of(tmp_path, 2)
    config = setup.config.replace(guard={"max_replicas": 20})
    setup = replace(setup, config=config, policies=(TwoMore(), TwoMore()))

    def begin(step: Callable[[], None]) -> Soak:
        fleet = Fleet(setup.names, seed=0, faults=False)  # its monitor always sees three: it lags for ever
        fleet.counts = None  # type: ignore[assignment]

        class Stepping(Ledger):
            def append(self, *records: Record, indexed: bool = True) -> list[Entry]:
                step()
                made = super().append(*records, indexed=indexed)
                step()
                return made

        target = OnDisk(tmp_path, step)
        made = Soak(
            setup, log=Log(StringIO()), monitor=fleet, target=target, clock=Clock(lambda: fleet.monotonic_s)
        )
        made.fleet, made.rss_mib = fleet, []
        made.journal.ledger = Stepping(setup.ledger)
        return made

    def die() -> None:
        left = step

        def count() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        here = begin(count)
        steer(here, here, 4)

    with forked(die) as status:
        died = os.WIFSIGNALED(status)
        assert died
    here = begin(lambda: None)
    steer(here, here, 4)
    assert json.loads((tmp_path / "counts.json").read_text()) == {"s0": 7, "s1": 7}
    orders = (tmp_path / "orders.log").read_text().split("\n")
    for name in ("s0", "s1"):
        mine = [int(line.split()[1]) for line in orders if line.startswith(name)]
        assert set(mine) <= {5, 7}  # 9 would be a double order
    ledger = Ledger(tmp_path / "ledger")
    assert ledger.verify().problem is None
    assert not ledger.open_intents()
    counted = audit(tmp_path / "ledger", 0, 2)
    assert counted["double"] == 0
    settlers = [e for e in entries(tmp_path) if e["actor"]["name"] == "settle after restart"]
    assert all(e["outcome"] in ("applied", "abandoned") for e in settlers)
    assert {e["outcome"] for e in entries(tmp_path)} >= {"intent", "applied", "kept"}


# --- everything at once ------------------------------------------------------------------------------------------
def test_a_soak_with_random_faults_loses_nothing_and_passes_no_limit(tmp_path: Path) -> None:
    found_ = soak(tmp_path, ticks=300, seed=int(os.environ.get("PILOTAGE_SEED", "11")))
    assert found_["faults"] > 3
    assert found_["interventions"] > 50
    assert found_["writes"] > 20
    for what in ("missing", "double", "unsettled", "waiting", "lost"):
        assert found_[what] == 0, what
    assert found_["past_limits"] == []
    assert found_["broken"] == []


def test_the_stand_in_would_notice_a_limit_that_is_passed(tmp_path: Path) -> None:
    fleet = Fleet(["s0"], seed=0, faults=False)
    fleet.scale([ScaleOrder(service="s0", replicas=21)])
    fleet.scale([ScaleOrder(service="s0", replicas=2)])
    assert len(fleet.past_limits) == 2
    assert Chaos(seed=1, share=1.0).begin(setup_of(tmp_path, 1).situations()[0]) is not None


def test_a_monitor_that_answers_nonsense_is_a_fault_and_no_more(tmp_path: Path) -> None:
    here = steering(tmp_path, targets=(5,))
    answers = [
        Reading.nothing(0.0, 7),
        Reading.nothing(math.nan, 2),
        Reading(0.0, np.zeros((2, 3)), np.zeros((2, 3))),
    ]
    here._monitor.read = lambda: answers.pop(0)  # type: ignore[method-assign]
    steer(here, here, 3)
    assert here.status.errors["monitor"] == 3
    assert here.fleet.writes == 0
    assert INDEX["arrival_rate"] == 0
    assert Schedule(targets=(5,)).targets == (5,)


def test_bad_input_to_the_command_is_one_line_and_a_code(tmp_path: Path) -> None:
    (tmp_path / "steer.toml").write_text("mode = 1\n")
    for arguments, code in (
        (("steer.toml",), 2),
        (("none.toml",), 2),
        (("steer.toml", "--mode", "reckless"), 2),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "pilotage", "steer", *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == code
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
