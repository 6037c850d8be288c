"""The loop on live systems: modes, advice, recordings, configuration that changes, and what it says of itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.steer.soak import Fleet, Soak, audit, setup_of
from pilotage.control.policy import INDEX, Decision, Observation
from pilotage.control.scaling import Schedule
from pilotage.control.steer import steer
from pilotage.live.advice import AnswerFile, Terminal
from pilotage.live.clock import Clock
from pilotage.live.ledger import Ledger
from pilotage.live.monitors import Reading
from pilotage.live.recordings import Recording
from pilotage.live.status import Log, Status
from pilotage.live.steer_config import SteerConfig, load
from pilotage.live.steering import Steering
from pilotage.live.targets import ScaleOrder, TargetError
from pilotage.world.spec import SpecError
from tests.live.conftest import free_port
from tests.live.prometheus import found, query_of, send, serving

ROOT = Path(__file__).parents[2]


def steering(
    folder: Path, *, services: int = 2, targets: tuple[int, ...] = (5, 2, 6), **changes: object
) -> Soak:
    """A virtual fleet without faults, whose services are to have those replicas, tick by tick."""
    setup = setup_of(folder, services)
    config = setup.config.replace(**({"guard": {"max_replicas": 20}} | changes))
    fleet = Fleet(setup.names, seed=0, faults=False)
    made = Soak(
        replace(setup, config=config, policies=(Schedule(targets=targets),) * services),
        log=Log(StringIO()), monitor=fleet, target=fleet, clock=Clock(lambda: fleet.monotonic_s),
    )  # fmt: skip
    made.fleet, made.rss_mib = fleet, []
    return made


def entries(folder: Path) -> list[dict]:
    return [
        json.loads(line)["record"] for line in (folder / "ledger" / "ledger.jsonl").read_text().splitlines()
    ]


def test_acting_is_an_intent_and_a_result_and_what_stays_is_one_entry(tmp_path: Path) -> None:
    here = steering(tmp_path)
    steer(here, here, 4)
    assert here.fleet.ordered == {"s0": 6, "s1": 6}
    mine = [e for e in entries(tmp_path) if e["service"] == "s0"]
    assert [e["outcome"] for e in mine] == ["intent", "applied"] * 3 + ["kept"]
    assert [(e["decision"]["from"], e["decision"]["to"]) for e in mine if e["outcome"] == "intent"] == [
        (3, 5), (5, 2), (2, 6),
    ]  # fmt: skip
    first = mine[0]
    assert first["reason"] == "schedule"
    assert first["actor"]["kind"] == "policy"
    assert len(first["actor"]["digest"]) == 64
    assert first["economics"] == {"usd_per_hour": 3.0, "wanted_usd_per_hour": 5.0}
    assert first["evidence"]["arrival_rate"] > 0
    assert first["evidence"]["queue_length"] is None
    assert mine[1]["of"] == first["seq"]
    assert audit(tmp_path / "ledger", 4, 2) | {"entries": 0} == {
        "entries": 0, "missing": 0, "double": 0, "intents": 6, "unsettled": 0, "broken": [],
    }  # fmt: skip


def test_the_monitors_lag_orders_nothing_twice(tmp_path: Path) -> None:
    here = steering(tmp_path, targets=(8,))
    steer(here, here, 1)
    seen = here.read()[0]  # the monitor still sees the three that were ready
    assert (seen["replicas_ready"], seen["replicas_starting"], seen.replicas) == (3, 5, 8)


def test_shadow_says_what_it_would_do_and_cost_and_advice_needs_a_yes(tmp_path: Path) -> None:
    here = steering(tmp_path / "shadow", mode="shadow", targets=(5,))
    steer(here, here, 3)
    assert here.fleet.writes == 0
    assert {e["outcome"] for e in entries(tmp_path / "shadow")} == {"proposed"}
    assert here.status.usd == pytest.approx({"actual": 3 * 6 * 15 / 3600, "wanted": 3 * 10 * 15 / 3600})
    asked: list[Sequence[str]] = []

    class Answers:
        def ask(self, advice: str, lines: Sequence[str], within_s: float, stop: threading.Event) -> bool:
            asked.append(lines)
            return len(asked) == 2

    here = steering(tmp_path / "advise", mode="advise", targets=(5,))
    here._answers = Answers()
    steer(here, here, 3)
    assert asked[0] == [f"{name}: replicas 3 -> 5 (+2.00 USD/h): schedule" for name in ("s0", "s1")]
    assert here.fleet.writes == 1
    mine = [e for e in entries(tmp_path / "advise") if e["service"] == "s0"]
    assert [e["outcome"] for e in mine] == ["proposed", "intent", "applied", "kept"]
    assert mine[0]["response"] == {"target": "nobody said yes in time"}


def test_advice_by_file_is_taken_by_its_name_only(tmp_path: Path) -> None:
    answers, stop = AnswerFile(tmp_path / "answer"), threading.Event()

    def yes() -> None:
        while not (tmp_path / "answer.advice.json").exists():
            time.sleep(0.01)
        (tmp_path / "answer").write_text(
            json.loads((tmp_path / "answer.advice.json").read_text())["advice"] + "\n"
        )

    thread = threading.Thread(target=yes)
    thread.start()
    assert answers.ask("run:1", ["s0: 3 -> 5"], 10, stop)
    thread.join()
    assert not answers.ask("run:2", ["s0: 5 -> 8"], 0.3, stop)  # the old yes is still there
    assert not AnswerFile(tmp_path / "no" / "answer").ask("run:3", [], 0.2, stop)
    if not sys.stdin.isatty():
        with pytest.raises(SpecError, match="nobody to ask"):
            Terminal()


class WireTarget:
    """A target behind HTTP: counts are read by GET, orders are PUT."""

    def __init__(self, url: str) -> None:
        self._url = url

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self._url + path, data=body, method=method)
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read()

    def counts(self, services: Sequence[str]) -> Mapping[str, int]:
        return json.loads(self._ask("GET", "/counts"))

    def scale(self, orders: Sequence[ScaleOrder]) -> Sequence[str | TargetError]:
        return [
            self._ask("PUT", f"/{order.service}", str(order.replicas).encode()).decode() for order in orders
        ]


def keeping(decide: Callable, kept: list) -> Callable:
    def one(seen: Sequence[Observation]) -> list[Decision]:
        kept.append(decide(seen))
        return kept[-1]

    return one


def test_on_a_recording_shadow_decides_as_act_does_and_writes_nothing_on_the_wire(tmp_path: Path) -> None:
    watched = steering(tmp_path / "watched", record="seen.jsonl", mode="shadow")
    fleet = Fleet(watched.setup.names, seed=1)  # with faults, so that some of it is missing
    watched._monitor = watched._target = watched.fleet = fleet
    watched._clock = Clock(lambda: fleet.monotonic_s)
    steer(watched, watched, 60)
    lines: dict[str, list[str]] = {}
    said: dict[str, list] = {}
    for mode in ("shadow", "act"):
        methods = lines.setdefault(mode, [])
        counts = {"s0": 3, "s1": 3}

        def handle(handler: BaseHTTPRequestHandler, body: str, methods=methods, counts=counts) -> None:
            methods.append(handler.command)
            if handler.command == "PUT":
                counts[handler.path[1:]] = int(body)
            send(handler, 200, json.dumps(counts).encode())

        with serving(handle) as url:
            setup = setup_of(tmp_path / mode, 2, mode, policy="predictive")
            recording = Recording(path=str(tmp_path / "watched" / "seen.jsonl"))
            setup = replace(setup, config=setup.config.replace(monitor=recording))
            here = Steering(setup, log=Log(StringIO()), target=WireTarget(url))
            here.decide = keeping(here.decide, said.setdefault(mode, []))  # type: ignore[method-assign]
            steer(here, here, None, going=here.going)
    assert len(said["act"]) == 60
    assert said["shadow"] == said["act"]
    assert sum(d.order + d.release for tick in said["act"] for d in tick) > 0
    assert "PUT" in lines["act"]
    assert "PUT" not in lines["shadow"]


@given(
    jumps=st.lists(st.sampled_from([0.0, 3600.0, -3600.0, 86400.0 * 400]), max_size=5),
    steps=st.integers(1, 300),
)
def test_time_neither_leaps_nor_goes_back_whatever_the_clock_does(jumps: list[float], steps: int) -> None:
    monotonic, wall = 50.0, 1000.0
    clock = Clock(lambda: monotonic)
    last = clock.now(wall)
    for k in range(steps):
        monotonic += 15.0
        wall += 15.0 + (jumps[k] if k < len(jumps) else 0.0)
        now = clock.now(wall)
        assert 11.24 < now - last < 18.76
        last = now
    if sum(jumps) == 0 and steps > 3000:
        assert now == pytest.approx(wall)


def test_a_jump_of_an_hour_is_made_good_within_hours() -> None:
    monotonic, wall = 0.0, 0.0
    clock = Clock(lambda: monotonic)
    clock.now(wall)
    wall = 3600.0
    for _ in range(int(4 * 3600 / 15) + 2):
        monotonic += 15.0
        wall += 15.0
        now = clock.now(wall)
    assert now == pytest.approx(wall)


# --- configuration -----------------------------------------------------------------------------------------------
BASE = 'scenario = "fleet.toml"\nledger = "ledger"\n[monitor]\nkind = "recording"\npath = "empty.jsonl"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "[services.s7]\n", "'s7' is not in fleet.toml"),
        (BASE + '[target]\nkind = "kubernets"\n', "did you mean 'kubernetes'"),
        (BASE.replace('"recording"', '"recordng"'), "did you mean 'recording'"),
        (BASE.replace("ledger =", "legder ="), "did you mean 'ledger'"),
        ('policy = "hpaa"\n' + BASE, "did you mean 'hpa'"),
        ('mode = "acting"\n' + BASE, "valid|did you mean"),
        (BASE + '[services.s0]\nlabel = "x"\n[services.s1]\nlabel = "x"\n', "label 'x' is used twice"),
        (BASE + "[guard]\nmin_replicas = 30\nmax_replicas = 20\n", "min_replicas 30 exceeds"),
        (BASE + "[guard]\nmax_usd_per_hour = 0.5\n", "buys 0 replicas"),
        (BASE.replace("fleet.toml", "flet.toml"), "cannot be read"),
        ("a = [1, 2\n", "not valid TOML"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    setup_of(tmp_path, 2)
    (tmp_path / "steer.toml").write_text(text)
    with pytest.raises(SpecError, match=message):
        load(tmp_path / "steer.toml")


def test_a_new_configuration_is_taken_over_and_an_invalid_one_is_not(tmp_path: Path) -> None:
    log = StringIO()
    setup_of(tmp_path, 2)
    path = tmp_path / "steer.toml"
    path.write_text(BASE + "[guard]\nmax_replicas = 20\n")
    fleet = Fleet(["s0", "s1"], seed=0, faults=False)
    here = Soak(load(path), log=Log(log), reload=lambda: load(path), monitor=fleet, target=fleet)
    here.fleet, here.rss_mib = fleet, []
    steer(here, here, 2)
    helm, controllers = here._helm, here._helm._asked
    assert helm.check is not None
    path.write_text(BASE + "[guard]\nmax_replicas = 20\nhold = true\n")
    steer(here, here, 1)
    assert not here.setup.config.guard.hold  # it may still be being written
    steer(here, here, 1)
    assert here._helm is helm
    assert here._helm._asked is controllers  # what policies remember is kept
    assert entries(tmp_path)[-1]["reason"] == "held: everything: hold is set"
    for bad in (
        "not toml",
        BASE + '[guard]\nmax_replicas = "many"\n',
        BASE.replace('ledger = "ledger"', 'ledger = "x"'),
    ):
        path.write_text(bad)
        before = here.setup
        steer(here, here, 3)
        assert here.setup is before
    assert here.status.errors["reload"] == 3  # each once, not at every tick
    path.write_text('mode = "act"\npolicy = "predictive"\n' + BASE + "[guard]\nmax_replicas = 20\n")
    here.reload_asked.set()  # as SIGHUP does: at once
    steer(here, here, 1)
    assert here.setup.config.mode == "act"
    assert here._helm is not helm
    assert entries(tmp_path)[-1]["actor"]["name"] == "predictive"
    events = [json.loads(line)["event"] for line in log.getvalue().splitlines()]
    assert events.count("reloaded") == 2


# --- what it says of itself --------------------------------------------------------------------------------------
@given(st.dictionaries(st.text(max_size=10), st.text(max_size=50) | st.floats() | st.integers(), max_size=4))
def test_a_log_line_is_one_line_of_json_whatever_is_in_it(fields: dict) -> None:
    out = StringIO()
    Log(out)("event", **{f"x{name}": value for name, value in fields.items()})
    text = out.getvalue()
    assert text.count("\n") == 1
    assert text[:-1].isascii()
    assert text[:-1].isprintable()
    assert json.loads(text)["event"] == "event"


def test_the_loop_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Started by the command; scraped; its policy file spoilt, its configuration changed; stopped in good order."""
    setup_of(tmp_path, 2)
    port, secret = free_port(), "s3cr3t-bearer-of-the-fleet"
    (tmp_path / "policy.toml").write_text('kind = "staffing"\n')
    config = f"""scenario = "fleet.toml"
ledger = "ledger"
policy = "policy.toml"
tick_s = 0.3
listen = "127.0.0.1:{port}"
[monitor]
kind = "prometheus"
url = "URL"
token_env = "FLEET_TOKEN"
[target]
kind = "dry-run"
replicas = {{s0 = 3, s1 = 3}}
[services.s0]
label = '"}} or vector(1) or m{{a="\\n{{"event":"forged"}}'
[services.s1]
[guard]
required = ["arrival_rate"]
"""
    healthy = threading.Event()
    healthy.set()

    def handle(handler: BaseHTTPRequestHandler, body: str) -> None:
        if handler.headers.get("Authorization") != f"Bearer {secret}" or not healthy.is_set():
            send(
                handler, 500, f'broken\n{{"event": "forged"}} {handler.headers.get("Authorization")}'.encode()
            )
            return
        assert "arrival_rate" in query_of(body) or "vector(time())" in query_of(body)
        samples = [
            (f, "s1", v)
            for f, v in (("arrival_rate", 50), ("age requests_total service", 1), ("replicas_ready", 3))
        ]
        send(handler, 200, found(*samples, now_s=time.time()))

    def ask(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def until(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                if condition():
                    return
            except OSError:
                pass
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)

    def logged(event: str) -> list[dict]:
        whole = (tmp_path / "log").read_text().rpartition("\n")[0]
        lines = [json.loads(line) for line in whole.splitlines()]  # every line is JSON
        return [line for line in lines if line["event"] == event]

    with serving(handle) as url:
        (tmp_path / "steer.toml").write_text(config.replace("URL", url))
        with (tmp_path / "log").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "pilotage", "steer", "steer.toml", "--mode", "act", "--json"],
                cwd=tmp_path, stdout=subprocess.PIPE, stderr=out, env=os.environ | {"FLEET_TOKEN": secret},
            )  # fmt: skip
        try:
            until(lambda: len(logged("tick")) > 2)
            assert ask("/healthz")[0] == 200
            text = ask("/metrics")[1]
            assert "pilotage_steer_up 1.0" in text
            assert 'pilotage_steer_replicas{of="actual",service="s1"} 3.0' in text
            assert 'pilotage_steer_interventions_total{why="arrival_rate is missing or stale"}' in text
            assert ask("/etc/passwd")[0] == 404
            # a second one is told who steers
            second = subprocess.run(
                [sys.executable, "-m", "pilotage", "steer", "steer.toml", "--ticks", "1"],
                cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"FLEET_TOKEN": secret}, timeout=60,
            )  # fmt: skip
            assert second.returncode == 1
            assert f"another process steers with this ledger (process {process.pid} on" in second.stderr
            # the policy file is spoilt while it runs: what was loaded goes on
            (tmp_path / "policy.toml").write_text("kind = \x00")
            until(lambda: any("policy" in f["why"] for f in logged("fault") if f["part"] == "reload"))
            (tmp_path / "policy.toml").write_text('kind = "staffing"\nbeta = 2.0\n')
            process.send_signal(signal.SIGHUP)
            until(lambda: logged("reloaded"))
            healthy.clear()
            until(lambda: any(f["part"] == "monitor" for f in logged("fault")))
            healthy.set()
            ticks = len(logged("tick"))
            until(lambda: len(logged("tick")) > ticks + 2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
        assert process.stdout is not None
        result = json.loads(process.stdout.read())
        process.stdout.close()
    assert result["ticks"] == len(logged("tick"))
    assert result["ledger_waiting"] == 0
    assert logged("stopped")
    assert not logged("forged")
    ledger = Ledger(tmp_path / "ledger")
    assert ledger.verify().problem is None
    assert not ledger.open_intents()
    written = (tmp_path / "ledger" / "ledger.jsonl").read_text() + (tmp_path / "log").read_text()
    assert secret not in written
    held = ledger.entries("s0", last=1)[0]
    assert held.reason.startswith("held: ")  # nobody measures a service of that name


def test_health_is_lost_when_ticks_stop_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    status = Status("act", healthy_within_s=0.05)
    status.ticked(0.01)
    assert status.health()["ok"]
    time.sleep(0.1)
    assert not status.health()["ok"]


def test_a_tick_loads_no_simulator_and_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "experiments" / "steer" / "tick.py"), str(tmp_path)]
    done = subprocess.run(
        [*command, "200", "hpa", "act", "follows", "12"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    measured = json.loads(done.stdout)
    assert measured["heavy"] == []
    assert measured["rss_mib"] < 200
    assert 0 < measured["changed"] < 1
    assert (
        measured["cpu_ms"][0] < 150
    )  # an order of magnitude: the machine may be busy; results/steer has the figure


def test_the_default_is_to_touch_nothing() -> None:
    fields = {"scenario": "quickstart", "ledger": "l", "monitor": Recording(path="r.jsonl")}
    config = SteerConfig(**fields)  # type: ignore[arg-type]
    assert (config.mode, config.target) == ("shadow", {"kind": "dry-run"})


def test_in_a_dry_run_what_is_seen_stays_what_is_there(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, 1)
    here = Steering(setup, log=Log(StringIO()))
    reading = Reading.nothing(0.0, 1)
    reading.values[0, INDEX["replicas_ready"]] = 4
    here._target.scale([ScaleOrder(service="s0", replicas=9)])
    values, ages = reading.values.copy(), reading.age_s.copy()
    here._count(values, ages, here._counts())
    assert Observation(0.0, values[0], ages[0]).replicas == 4
    values = np.full_like(values, np.nan)
    here._count(values, ages, here._counts())
    assert Observation(0.0, values[0], ages[0]).replicas == 9  # nobody sees it: what was said is all there is
    assert Decision.towards(9, Observation(0.0, values[0], ages[0])).order == 0
