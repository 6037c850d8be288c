"""Monitors: the right numbers from a real Prometheus, missing values from a bad one, and no name taken as code."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotage.control.policy import FEATURES, INDEX
from pilotage.live import promql
from pilotage.live.monitors import MONDAY_S, MonitorError, Prometheus, Reading
from pilotage.live.promql import SHIPPED, Subject
from pilotage.live.recordings import Recorder, Recording
from pilotage.world.spec import SpecError, decode, read_toml
from tests.live import prometheus as stand_in
from tests.live.prometheus import PROMTOOL, found, needs_prometheus, query_of, send, serving

SYSTEMS = sorted(read_toml(SHIPPED, "metrics"))
HOSTILE = [
    'x"} or vector(1e9) or up{a="', "a|b", ".*", "a\nb", "tab\there", "back\\slash", "it's", "$window", "$1", "{{.V}}",
    "ranker", "ünï-☃", "\x1b[31mred", "../../etc/passwd", "a" * 250,
]  # fmt: skip


def subjects(*labels: str, slo_s: float = 0.5) -> list[Subject]:
    return [Subject(label, slo_s) for label in labels]


# --- PromQL ------------------------------------------------------------------------------------------------------
def test_one_expression_asks_for_all_services_where_aggregations_allow_it() -> None:
    def asked(template: str) -> str:
        return promql.question(template, subjects("a", "b.c"), {}, 60, 15).expression

    assert asked("sum(rate(m{service='$service'}[$window]))") == (
        'sum by (service) (rate(m{service=~"a|b\\\\.c"}[60s]))'
    )
    assert asked("histogram_quantile(0.95, sum by (le) (rate(m_bucket{model='$service'}[$window])))") == (
        'histogram_quantile(0.95, sum by (service, le) (label_replace(rate(m_bucket{model=~"a|b\\\\.c"}[60s]), '
        '"service", "$1", "model", "(?s)(.*)")))'
    )
    assert asked("m{service='$service'}") == (
        'label_replace(m{service=~"a"}, "service", "a", "", "") or label_replace(m{service=~"b\\\\.c"}, "service", '
        '"b.c", "", "")'
    )
    both = promql.question(
        "sum(m_bucket{service='$service',le='$slo'})",
        [Subject("a", 1.0), Subject("b", 0.25), Subject("c", 1.0)], {"namespace": 'p"'}, 60, 15,
    )  # fmt: skip
    assert both.expression == (
        '(sum by (service) (m_bucket{service=~"a|c",le=~"1|1\\\\.0",namespace="p\\""})) or '
        '(sum by (service) (m_bucket{service=~"b",le=~"0\\\\.25",namespace="p\\""}))'
    )
    assert both.sources == (("m_count", "service"),)


@given(st.text(min_size=1, max_size=40))
def test_a_label_stays_within_its_quotes(text: str) -> None:
    quoted = promql.quoted(text)
    assert re.fullmatch(r'"(?:[^"\\\n]|\\.)*"', quoted)
    back = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"'}
    plain = re.sub(
        r"\\U([0-9a-f]{8})|\\(.)", lambda m: chr(int(m[1], 16)) if m[1] else back[m[2]], quoted[1:-1]
    )
    assert plain == text


@pytest.mark.parametrize("system", SYSTEMS)
def test_shipped_mappings_measure_what_policies_need(system: str) -> None:
    known = promql.templates(system, {})
    assert {"arrival_rate", "replicas_ready"} <= set(known) <= set(INDEX)
    if system == "pilotage":
        assert set(known) == set(INDEX)


@needs_prometheus
@pytest.mark.parametrize("system", SYSTEMS)
def test_prometheus_own_parser_takes_every_expression_with_hostile_names(system: str, tmp_path: Path) -> None:
    here = [Subject(label, 0.5 + 0.5 * (k % 2)) for k, label in enumerate(HOSTILE)]
    questions = {
        n: promql.question(t, here, {"ns": "p"}, 60, 15) for n, t in promql.templates(system, {}).items()
    }
    asked = {name: q.expression for name, q in questions.items()}
    asked |= {f"age {s}": promql.age_of(s, here, {}) for q in questions.values() for s in q.sources}
    asked["per service"] = promql.question("m{a='$service'}", here, {}, 60, 15).expression
    rules = [{"record": "all", "expr": promql.together(asked)}]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "g", "rules": rules}]}))
    done = subprocess.run(
        [str(PROMTOOL), "check", "rules", "rules.yml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": {"arrival_rat": "sum(m{service='$service'})"}}, "did you mean 'arrival_rate'"),
        ({"queries": {"arrival_rate": "sum(m{service='$servce'})"}}, "did you mean 'service'"),
        ({"queries": {"arrival_rate": "sum(m)"}}, "does not select a service"),
        ({"queries": {"arrival_rate": "sum(m{a='$service'}) + $service"}}, "only stand as a label's value"),
        ({"queries": {"arrival_rate": "sum(m{a='$service',b='$slo'})"}}, "only stand as le"),
        ({"metrics": "vlm"}, "did you mean 'vllm'"),
        ({"matchers": {'a="b"} or up{': "x"}}, "not a label's name"),
        ({"url": "http://user:pass@host"}, "matching regex"),
        ({"url": "http://prometheus:9090", "token_env": "T"}, "in the clear"),
        ({"url": "http://127.example.org:9090", "token_env": "T"}, "in the clear"),
        ({"token_env": "T", "token_file": "f"}, "give one"),
        ({"user": "me"}, "belong together"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_would(changes: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        decode({"kind": "prometheus", "url": "http://127.0.0.1:1"} | changes, Prometheus, "monitor")


# --- a server that misbehaves ------------------------------------------------------------------------------------
FRESH = ("age requests_total service", 2.0)


def reading_of(*samples: tuple[str, str, float | str], labels: tuple[str, ...] = ("a", "b")) -> Reading:
    with serving(lambda handler, body: send(handler, 200, found(*samples))) as url:
        return Prometheus(url=url).begin(subjects(*labels)).read()


def test_values_have_ages_and_what_is_missing_is_missing() -> None:
    reading = reading_of(
        ("arrival_rate", "a", 12.5), ("age requests_total service", "a", 7), ("arrival_rate", "b", "NaN"),
        ("age requests_total service", "b", 3), ("drop_rate", "a", "+Inf"), ("queue_length", "a", 4),
        ("in_flight", "a", -3), ("utilization", "a", "-1e-12"), ("age busy_seconds_total service", "a", 1),
        ("age replica_slots_ready service", "a", 200), ("arrival_rate", "somebody else", 1e9),
    )  # fmt: skip
    assert reading.now_s == 1e9 - MONDAY_S
    at = INDEX["arrival_rate"]
    assert (reading.values[0, at], reading.age_s[0, at]) == (12.5, 7)
    assert math.isnan(reading.values[1, at])
    assert math.isnan(reading.values[0, INDEX["drop_rate"]])
    assert (reading.values[0, INDEX["queue_length"]], reading.age_s[0, INDEX["queue_length"]]) == (
        4,
        math.inf,
    )
    assert math.isnan(reading.values[0, INDEX["in_flight"]])
    assert (reading.values[0, INDEX["utilization"]], reading.age_s[0, INDEX["utilization"]]) == (0, 200)
    assert np.isnan(reading.values).sum() == reading.values.size - 3


def test_two_series_that_claim_to_be_one_are_not_believed() -> None:
    reading = reading_of(("arrival_rate", "a", 1), ("arrival_rate", "a", 2), ("arrival_rate", "b", 3))
    assert math.isnan(reading.values[0, INDEX["arrival_rate"]])
    assert reading.values[1, INDEX["arrival_rate"]] == 3


def test_a_query_that_is_refused_costs_its_feature_only() -> None:
    asked = []

    def handle(handler: BaseHTTPRequestHandler, body: str) -> None:
        query = query_of(body)
        asked.append(query)
        if "rate(busy_seconds_total{" in query:
            send(handler, 422, b'{"status":"error","errorType":"execution","error":"many-to-many matching"}')
        else:
            send(handler, 200, found(*[("arrival_rate", "a", 5)] * ('"arrival_rate"' in query)))

    with serving(handle) as url:
        monitor = Prometheus(url=url).begin(subjects("a"))
        assert monitor.read().values[0, INDEX["arrival_rate"]] == 5
        assert list(monitor.refused) == ["utilization"]
        assert "many-to-many" in monitor.refused["utilization"]
        asked.clear()
        monitor.read()
        assert len(asked) == 1  # and from then on it is one round trip again


def drip(handler: BaseHTTPRequestHandler, body: str) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def redirect(handler: BaseHTTPRequestHandler, body: str) -> None:
    handler.send_response(302)
    handler.send_header("Location", "/elsewhere")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def cut_short(handler: BaseHTTPRequestHandler, body: str) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "999")
    handler.end_headers()
    handler.wfile.write(b"x")
    handler.close_connection = True


FAULTS = {
    "503": (lambda h, b: send(h, 503, b"overloaded"), "answered 503: overloaded"),
    "not JSON": (lambda h, b: send(h, 200, b"<html>"), "answered 200: <html>"),
    "a redirect": (redirect, "answered 302"),
    "no time": (lambda h, b: send(h, 200, b'{"status":"success","data":{"result":[]}}'), "what time it is"),
    "silence": (lambda h, b: time.sleep(1.0), "no answer"),
    "a drip": (drip, "no whole answer"),
    "too much": (lambda h, b: send(h, 200, b" " * 3_000_000), "longer than 1 MiB"),
    "cut short": (cut_short, "no answer"),
    "lines": (lambda h, b: send(h, 500, b'a\n{"event":"forged"}\x1b[2J'), 'answered 500: a \\{"event"'),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_server_in_trouble_is_one_error_in_bounded_time(what: str) -> None:
    handle, message = FAULTS[what]
    with serving(handle) as url:
        monitor = Prometheus(url=url, timeout_s=0.4, max_mib=1.0).begin(subjects("a"))
        began = time.monotonic()
        with pytest.raises(MonitorError, match=message) as caught:
            monitor.read()
        assert time.monotonic() - began < 5
        assert str(caught.value).isprintable()


def test_a_server_that_is_down_is_one_error() -> None:
    with pytest.raises(MonitorError, match="no answer"):
        Prometheus(url="http://127.0.0.1:9", timeout_s=1).begin(subjects("a")).read()


def test_a_token_that_expires_is_read_anew_and_is_in_no_message(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first-5ecret\n")
    valid, seen = "first-5ecret", []

    def handle(handler: BaseHTTPRequestHandler, body: str) -> None:
        said = handler.headers.get("Authorization", "")
        seen.append(said)
        if said == f"Bearer {valid}":
            send(handler, 200, found(("arrival_rate", "a", 5)))
            return
        if said == "Bearer first-5ecret":
            token.write_text("second-5ecret")  # whoever renews it does so while we ask
        send(handler, 401, json.dumps({"status": "error", "error": f"no such token: {said}"}).encode())

    with serving(handle) as url:
        monitor = Prometheus(url=url, token_file=str(token)).begin(subjects("a"))
        monitor.read()
        valid = "second-5ecret"
        assert monitor.read().values[0, INDEX["arrival_rate"]] == 5
        assert seen == ["Bearer first-5ecret", "Bearer first-5ecret", "Bearer second-5ecret"]
        valid = "third"
        with pytest.raises(MonitorError) as caught:
            monitor.read()
        assert "5ecret" not in str(caught.value)
        assert "[withheld]" in str(caught.value)
        token.unlink()
        with pytest.raises(MonitorError, match="cannot be read"):
            monitor.read()


def test_a_password_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def handle(handler: BaseHTTPRequestHandler, body: str) -> None:
        seen.append(handler.headers.get("Authorization"))
        send(handler, 200, found())

    with serving(handle) as url:
        monitor = Prometheus(url=url, user="me", password_env="PILOTAGE_TEST_PW").begin(subjects("a"))
        with pytest.raises(MonitorError, match="environment variable PILOTAGE_TEST_PW holds none"):
            monitor.read()
        monkeypatch.setenv("PILOTAGE_TEST_PW", "pw")
        monitor.read()
    assert seen == ["Basic bWU6cHc="]


# --- the real one ------------------------------------------------------------------------------------------------
def exposition(elapsed_s: float) -> bytes:
    """Metrics of services with hostile names: service k gets 10 (k + 1) requests per second and has k + 1 replicas."""
    lines = []
    for k, label in enumerate(HOSTILE):
        quoted = label.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
        rate = 10 * (k + 1)
        lines += [
            f'requests_total{{service="{quoted}"}} {rate * elapsed_s}',
            f'responses_total{{service="{quoted}",outcome="served"}} {rate * elapsed_s}',
            f'latency_seconds_bucket{{service="{quoted}",le="0.25"}} {0.5 * rate * elapsed_s}',
            f'latency_seconds_bucket{{service="{quoted}",le="0.5"}} {0.8 * rate * elapsed_s}',
            f'latency_seconds_bucket{{service="{quoted}",le="1.0"}} {rate * elapsed_s}',
            f'latency_seconds_bucket{{service="{quoted}",le="+Inf"}} {rate * elapsed_s}',
            f'latency_seconds_count{{service="{quoted}"}} {rate * elapsed_s}',
            f'latency_seconds_sum{{service="{quoted}"}} {0.3 * rate * elapsed_s}',
            f'kube_deployment_status_replicas_ready{{deployment="{quoted}"}} {k + 1}',
            f'queue_length{{service="{quoted}"}} {2 * k}',
        ]
    return ("\n".join(lines) + "\n").encode()


def history(until_s: float, hours: float, step_s: float) -> str:
    """Requests in OpenMetrics text: 30 per second, with a gap of ten minutes an hour before the end."""
    lines = ["# TYPE requests counter"]
    start_s = until_s - hours * 3600
    for k in range(int(hours * 3600 / step_s)):
        at_s = start_s + k * step_s
        if not until_s - 4200 < at_s < until_s - 3600:
            lines.append(f'requests_total{{service="ranker"}} {30 * k * step_s} {at_s}')
    return "\n".join([*lines, "# EOF", ""])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stand_in.Prometheus]:
    if PROMTOOL is None or stand_in.PROMETHEUS is None:
        pytest.skip("prometheus is not installed: apt install prometheus")
    began = time.monotonic()
    until_s = math.floor(time.time() / 7200) * 7200 - 7200

    def handle(handler: BaseHTTPRequestHandler, body: str) -> None:
        send(handler, 200, exposition(time.monotonic() - began), "text/plain; version=0.0.4")

    with serving(handle) as url:
        real = stand_in.Prometheus(
            tmp_path_factory.mktemp("prometheus"), [url.removeprefix("http://")], history(until_s, 6, 15)
        )
        real.start()
        try:
            real.wait_for(
                "min(count_over_time(requests_total[10s])) >= 8"
            )  # it begins to scrape after some seconds
            yield real
        finally:
            real.stop()


@needs_prometheus
def test_a_real_prometheus_gives_each_service_its_own_numbers_in_one_round_trip(server) -> None:
    spec = Prometheus(url=server.url, window_s=10, scrape_s=1)
    monitor = spec.begin([*subjects(*HOSTILE), Subject("absent", 0.5)])
    rounds, ask = [], monitor._ask
    monitor._ask = lambda *a: rounds.append(a) or ask(*a)  # type: ignore[method-assign]
    reading = monitor.read()
    assert len(rounds) == 1
    assert not monitor.refused
    assert abs(reading.now_s + MONDAY_S - time.time()) < 5
    k = np.arange(len(HOSTILE))

    def column(name: str) -> np.ndarray:
        return reading.values[: len(HOSTILE), INDEX[name]]

    np.testing.assert_allclose(column("arrival_rate")[0], 10, rtol=0.5)  # scrapes are late on a busy machine
    np.testing.assert_allclose(column("arrival_rate") / column("arrival_rate")[0], k + 1, rtol=1e-6)
    np.testing.assert_allclose(column("attainment"), 0.8, rtol=0.02)
    np.testing.assert_allclose(column("latency_mean"), 0.3, rtol=0.02)
    np.testing.assert_allclose(column("latency_p95"), 0.875, rtol=0.02)  # within the last bucket
    np.testing.assert_array_equal(column("replicas_ready"), k + 1)
    np.testing.assert_array_equal(column("queue_length"), 2 * k)
    assert (reading.age_s[: len(HOSTILE), INDEX["arrival_rate"]] < 5).all()
    assert np.isnan(column("utilization")).all()  # nobody exports it
    assert np.isnan(reading.values[-1]).all()
    assert np.isinf(reading.age_s[-1]).all()


@needs_prometheus
def test_history_comes_from_what_promtool_loaded_with_its_gap(server) -> None:
    monitor = Prometheus(url=server.url, window_s=60).begin(subjects("ranker", "absent"))
    rates = monitor.history_rps(ticks=int(12 * 3600 / 15), tick_s=15.0)
    assert rates.shape == (2, 2880)
    assert np.isnan(rates[1]).all()
    known = rates[0][~np.isnan(rates[0])]
    old = known[5 : int(4 * 3600 / 15)]  # a rate begins low where a series does
    np.testing.assert_allclose(old, 30, rtol=0.01)
    at = np.flatnonzero(~np.isnan(rates[0]))
    gaps = np.diff(at)
    assert gaps.max() >= 30  # ten minutes are 40 ticks, less the window


# --- recordings --------------------------------------------------------------------------------------------------
def test_what_was_recorded_is_replayed_in_every_format(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = ["a", 'b"\n', "c"]
    written = []
    recorder = Recorder(tmp_path / "seen.jsonl", labels)
    for tick in range(5):
        values = rng.random((3, len(FEATURES)))
        values[rng.random(values.shape) < 0.3] = np.nan
        ages = np.where(np.isnan(values), np.inf, rng.integers(0, 3, values.shape).astype(float))
        written.append(Reading(15.0 * tick, values, ages))
        recorder.write(written[-1])
    import pandas

    table = pandas.read_json(tmp_path / "seen.jsonl", lines=True, precise_float=True)
    table.to_csv(tmp_path / "seen.csv", index=False)
    table.to_parquet(tmp_path / "seen.parquet")
    for name in ("seen.jsonl", "seen.csv", "seen.parquet"):
        replay = Recording(path=str(tmp_path / name)).begin(subjects(*labels))
        for reading in written:
            again = replay.read()
            assert again is not None
            assert again.now_s == reading.now_s
            np.testing.assert_allclose(again.values, reading.values, rtol=1e-12)
            np.testing.assert_array_equal(again.age_s, reading.age_s)
        assert replay.read() is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"now_s": 1, "service": "a"}\nnot json\n', "line 2: not a JSON object"),
        ('{"now_s": 2, "service": "a"}\n{"now_s": 1, "service": "a"}\n', "time goes back from 2 to 1"),
        ('{"now_s": 1, "service": "a", "arrival_rate": "many"}\n', "row 1: arrival_rate of 'many'"),
        ('{"service": "a"}\n', "now_s nan; valid"),
    ],
)
def test_a_recording_that_is_broken_says_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    replay = Recording(path=str(tmp_path / "r.jsonl")).begin(subjects("a"))
    with pytest.raises(MonitorError, match=re.escape(message)):
        list(iter(replay.read, None))
    with pytest.raises(SpecError, match="no such file"):
        Recording(path=str(tmp_path / "none.jsonl")).begin(subjects("a"))
