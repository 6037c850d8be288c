"""Monitors: what observes running services. What is missing is NaN, and every value has an age.

`prometheus` asks a Prometheus server (see `promql` for how); `recording` (see `recordings`) replays what was observed
before. A monitor is a frozen specification (the `[monitor]` table of a steer configuration, told apart by `kind`);
`begin()` gives what reads. Nothing that a monitor meets stops a loop: what could not be read raises `MonitorError`.
"""

from __future__ import annotations

import math
import time
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Protocol
from urllib.parse import urlencode, urlsplit

import msgspec
import numpy as np
from msgspec import Meta

from pilotage.control.policy import FEATURES, INDEX
from pilotage.live import promql
from pilotage.live.wire import Request, UnusableError, Wire, WireError, clean, loopback, secret_of
from pilotage.world.spec import Positive, Spec, SpecError

MONDAY_S: Final = 4 * 86400.0  # the first Monday 00:00 (UTC) of Unix time, where a service's clock has its 0
MOST_POINTS: Final = 11_000  # that Prometheus answers per series of a range query
_MOST_SAMPLES: Final = 400_000  # that we ask for at once


class MonitorError(Exception):
    """Nothing could be read; the message says why, without secrets."""


class QueryError(MonitorError):
    """The server answered that it cannot answer this query."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was seen of all services at one time: values and their ages in seconds, of shape (services, len(FEATURES)).

    `now_s` is the time on the services' clock (0 is Monday 00:00). A value that is missing is NaN.
    """

    now_s: float
    values: np.ndarray
    age_s: np.ndarray

    @staticmethod
    def nothing(now_s: float, services: int) -> Reading:
        shape = (services, len(FEATURES))
        return Reading(now_s, np.full(shape, np.nan), np.full(shape, np.inf))


class Monitor(Protocol):
    """A monitor at work. `replays`: it says itself how many replicas there are, and when it is over."""

    replays: bool

    def read(self) -> Reading | None:
        """What is seen now; None when there is nothing more to come. Raises MonitorError."""
        ...

    def history_rps(self, ticks: int, tick_s: float) -> np.ndarray:
        """Past arrival rates, oldest first, NaN where unknown; shape (services, at most ticks)."""
        ...


class Prometheus(Spec, frozen=True, kw_only=True, tag_field="kind", tag="prometheus"):
    """A Prometheus server, or what speaks its HTTP API.

    `metrics` names what serves (`pilotage`, `vllm`, `triton`, `ray-serve`, `kserve`, `mlserver`) or a TOML file with a
    table `features`; `queries` changes the PromQL of single features, and `matchers` are labels that all series
    must have. Rates are over `window_s`; the server scrapes every `scrape_s`.

    Credentials come from the environment or from files, read anew for every request: a bearer token, or the password
    of `user`. They are not sent in the clear beyond loopback. `ca_file` holds the certificates to trust (None: those of
    the system, or of SSL_CERT_FILE); `cert_file` and `key_file` are our own. A request takes at most `timeout_s`.
    """

    url: Annotated[str, Meta(pattern=r"^https?://[^@\s?#]+$")]
    metrics: str = "pilotage"
    queries: dict[str, str] = msgspec.field(default_factory=dict)
    matchers: dict[str, str] = msgspec.field(default_factory=dict)
    window_s: Positive = 60.0
    scrape_s: Positive = 15.0
    timeout_s: Annotated[float, Meta(gt=0, le=600)] = 5.0
    max_mib: Positive = 64.0
    token_env: str | None = None
    token_file: str | None = None
    user: str | None = None
    password_env: str | None = None
    password_file: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def __post_init__(self) -> None:
        given = [n for n in ("token_env", "token_file", "password_env", "password_file") if getattr(self, n)]
        if len(given) > 1:
            raise SpecError(f"{' and '.join(given)} are given; give one")
        if bool(self.user) != any(name.startswith("password") for name in given):
            raise SpecError("user and password_env or password_file belong together; give both or neither")
        if bool(self.cert_file) != bool(self.key_file):
            raise SpecError("cert_file and key_file belong together; give both or neither")
        host = urlsplit(self.url)
        if given and host.scheme == "http" and not loopback(host.hostname or ""):
            raise SpecError(f"url {self.url!r}: credentials would be sent in the clear; valid: https://")
        promql.check_labels(self.matchers)
        promql.templates(self.metrics, self.queries)

    def secret(self) -> str | None:
        """The token or password as it is now; MonitorError if it is not where it should be."""
        variable, file = self.token_env or self.password_env, self.token_file or self.password_file
        try:
            return secret_of(variable, file, "none", spaces=True)
        except UnusableError as error:
            raise MonitorError(f"credentials: {error}") from None

    def begin(self, subjects: Sequence[promql.Subject]) -> PrometheusMonitor:
        return PrometheusMonitor(self, subjects)


class _Sample(msgspec.Struct):
    metric: dict[str, str]
    value: tuple[float, str] = (0.0, "NaN")
    values: list[tuple[float, str]] = []


class _Data(msgspec.Struct):
    result: list[_Sample]


class _Answer(msgspec.Struct):
    status: str
    data: _Data | None = None
    error: str = ""


class PrometheusMonitor:
    """Asks everything of all services in one query, so that all values are of one instant, and of the server's clock.

    If the server refuses that query, it is asked for one feature at a time, and `refused` says which it refuses.
    """

    replays = False

    def __init__(self, spec: Prometheus, subjects: Sequence[promql.Subject]) -> None:
        for path in filter(None, (spec.ca_file, spec.cert_file, spec.key_file)):
            if not Path(path).is_file():
                raise SpecError(f"monitor: {path}: there is no such file")
        self.spec, self._subjects = spec, subjects
        self._rows = {one.label: row for row, one in enumerate(subjects)}
        self._questions = {
            name: promql.question(text, subjects, spec.matchers, spec.window_s, spec.scrape_s)
            for name, text in promql.templates(spec.metrics, spec.queries).items()
        }
        sources = dict.fromkeys(source for q in self._questions.values() for source in q.sources)
        self._ages = {source: promql.age_of(source, subjects, spec.matchers) for source in sources}
        self.refused: dict[str, str] = {}
        self._apart = False
        self._wire = Wire(spec.url, spec.ca_file, spec.cert_file, spec.key_file)
        self._decode = msgspec.json.Decoder(_Answer).decode

    def read(self) -> Reading:
        asked = {name: q.expression for name, q in self._questions.items() if name not in self.refused}
        asked |= {f"age {metric} {label}": text for (metric, label), text in self._ages.items()}
        deadline_s = time.monotonic() + 2 * self.spec.timeout_s
        if not self._apart:
            try:
                return self._reading(self._instant(promql.together(asked), deadline_s))
            except QueryError:
                pass
        samples: list[_Sample] = []
        refused: dict[str, str] = {}
        for name, expression in asked.items():
            try:
                samples += self._instant(promql.together({name: expression}), deadline_s)
            except QueryError as error:
                refused[name] = str(error)
        if len(refused) == len(asked):
            raise MonitorError(f"every query is refused, as {next(iter(refused.values()))}")
        self.refused |= {name: why for name, why in refused.items() if name in self._questions}
        self._ages = {(m, b): text for (m, b), text in self._ages.items() if f"age {m} {b}" not in refused}
        self._apart = not refused  # each alone is well, but not all at once
        return self._reading(samples)

    def _reading(self, samples: Sequence[_Sample]) -> Reading:
        known: dict[str, np.ndarray] = {}
        twice: set[tuple[str, int]] = set()
        seen: set[tuple[str, int]] = set()
        now_s = math.nan
        for sample in samples:
            asked = sample.metric.get("asked", "")
            number = _number(sample.value[1])
            if asked == "now":
                now_s = number
                continue
            row = self._rows.get(sample.metric.get("service", ""))
            if row is None:
                continue
            (twice if (asked, row) in seen else seen).add((asked, row))
            known.setdefault(asked, np.full(len(self._subjects), np.nan))[row] = number
        if not math.isfinite(now_s):
            raise MonitorError(f"{self.spec.url}: the answer does not say what time it is")
        for asked, row in twice:  # two series that both claim to be the service's: neither is believed
            known[asked][row] = np.nan
        reading = Reading.nothing(now_s - MONDAY_S, len(self._subjects))
        for name, question in self._questions.items():
            values = known.get(name)
            if values is None:
                continue
            ages = [known.get(f"age {metric} {label}") for metric, label in question.sources]
            at = INDEX[name]
            with np.errstate(invalid="ignore"):
                # nothing here can be negative; rounding can make nothing a little less
                reading.values[:, at] = np.where(values < -1e-9, np.nan, np.maximum(values, 0))
            oldest = [np.full(len(values), np.inf) if age is None else age for age in ages]
            age_s = np.max(oldest, axis=0) if oldest else np.zeros(len(values))
            unknown = np.isnan(age_s) | (age_s < -1)  # what is dated ahead is not to be relied on
            reading.age_s[:, at] = np.where(unknown, np.inf, np.maximum(age_s, 0))
        reading.age_s[np.isnan(reading.values)] = np.inf
        return reading

    def history_rps(self, ticks: int, tick_s: float) -> np.ndarray:
        question = self._questions.get("arrival_rate")
        if question is None or ticks < 1:
            return np.zeros((len(self._subjects), 0))
        spec = self.spec
        now_s = self._reading(self._instant(promql.together({}), time.monotonic() + spec.timeout_s)).now_s
        end_s = math.floor((now_s + MONDAY_S) / tick_s) * tick_s
        found = np.full((len(self._subjects), ticks), np.nan)
        template = promql.templates(spec.metrics, spec.queries)["arrival_rate"]
        points = min(ticks, MOST_POINTS - 1)
        chunk = max(1, _MOST_SAMPLES // points)
        for first in range(0, len(self._subjects), chunk):
            mine = self._subjects[first : first + chunk]
            text = promql.question(template, mine, spec.matchers, spec.window_s, spec.scrape_s).expression
            for late in range(0, ticks, points):
                many = min(points, ticks - late)
                until_s = end_s - late * tick_s
                since_s = until_s - (many - 1) * tick_s
                form = {
                    "query": text,
                    "start": f"{since_s:.3f}",
                    "end": f"{until_s:.3f}",
                    "step": f"{tick_s:g}",
                }
                for sample in self._ask("query_range", form, time.monotonic() + 2 * spec.timeout_s):
                    row = self._rows.get(sample.metric.get("service", ""))
                    if row is None:
                        continue
                    for at_s, value in sample.values:
                        at = ticks - 1 - round((end_s - at_s) / tick_s)
                        if 0 <= at < ticks and _number(value) >= 0:
                            found[row, at] = _number(value)
        return found

    # --- the HTTP API ----------------------------------------------------------------------------------------
    def _instant(self, expression: str, deadline_s: float) -> list[_Sample]:
        return self._ask("query", {"query": expression}, deadline_s)

    def _ask(self, what: str, form: dict[str, str], deadline_s: float) -> list[_Sample]:
        """What a query finds. A refusal of our credentials is answered once with those that are there now."""
        body = urlencode(form | {"timeout": f"{self.spec.timeout_s:g}s"})
        status, text = self._post(f"/api/v1/{what}", body, deadline_s)
        if status == 401:
            status, text = self._post(f"/api/v1/{what}", body, deadline_s)
        try:
            answer = self._decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError):
            answer = None
        if answer is not None and answer.status == "success" and answer.data is not None and status == 200:
            return answer.data.result
        said = self._clean(answer.error if answer is not None else text[:300].decode(errors="replace"))
        if status in (400, 422):
            raise QueryError(f"{self.spec.url}: query refused ({status}): {said}")
        raise MonitorError(f"{self.spec.url}: answered {status}: {said}")

    def _post(self, path: str, body: str, deadline_s: float) -> tuple[int, bytes]:
        within_s = min(self.spec.timeout_s, deadline_s - time.monotonic())
        if within_s <= 0:
            raise MonitorError(f"{self.spec.url}: no time is left to ask")
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        secret = self.spec.secret()
        if secret and self.spec.user:
            headers["Authorization"] = "Basic " + b64encode(f"{self.spec.user}:{secret}".encode()).decode()
        elif secret:
            headers["Authorization"] = f"Bearer {secret}"
        try:
            most = int(self.spec.max_mib * 2**20)
            answer = self._wire.exchange(Request("POST", path, body.encode(), headers, within_s, most))
        except WireError as error:
            raise MonitorError(f"{self.spec.url}: {self._clean(str(error))}") from None
        return answer.status, answer.text

    def _clean(self, text: str) -> str:
        """What a server said, fit for a log: one short line, without our credentials or other secrets."""
        try:
            secret = self.spec.secret()
        except MonitorError:
            secret = None
        return clean(text, secret)


def _number(text: str) -> float:
    """A sample's value; NaN for what is not finite."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
