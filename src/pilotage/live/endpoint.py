"""An HTTP API of a target, in JSON: where it is, who asks, and what is tried again for how long (`wire` says how)."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable
from typing import Annotated, Any, Final, NamedTuple
from urllib.parse import urlsplit

from msgspec import Meta

from pilotage.live.lease import Lease, LeaseError
from pilotage.live.targets import TargetError
from pilotage.live.wire import (
    MAX_ANSWER_BYTES,
    Request,
    UnusableError,
    Wire,
    WireError,
    clean,
    loopback,
    secret_of,
)
from pilotage.world.spec import Positive, Spec, SpecError

_AGAIN: Final = frozenset({429, 500, 502, 503, 504})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


class NoAnswerError(TargetError):
    """No answer within the time, or none that can be relied on: what was asked may or may not have happened."""


class Answer(NamedTuple):
    """A status and a JSON body (None: there was none)."""

    status: int
    body: Any


class Endpoint(Spec, frozen=True, kw_only=True):
    """Where an API is and how to prove who asks. `timeout_s` bounds one request, `budget_s` all requests of one call.

    `ca_file` holds the certificates to trust (None: the system's); `cert_file` and `key_file` are a client's own. The
    token is in `token_file` or in the environment variable `token_env`; it is never sent in the clear beyond loopback.
    """

    url: Annotated[str, Meta(pattern=r"^https?://[^@\s?#]+$")]
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    token_file: str | None = None
    token_env: str | None = None
    timeout_s: Positive = 5.0
    budget_s: Positive = 20.0

    def __post_init__(self) -> None:
        where = urlsplit(self.url)
        try:
            _ = where.port
        except ValueError as error:
            raise SpecError(f"url {self.url!r}: {error}") from None
        if where.hostname is None:
            raise SpecError(f"url {self.url!r} has no host; valid: as https://10.0.0.1:6443")
        if self.token_file and self.token_env:
            raise SpecError("token_file and token_env are both given; give one")
        if bool(self.cert_file) != bool(self.key_file):
            raise SpecError("cert_file and key_file belong together; give both or neither")
        if (self.token_file or self.token_env) and where.scheme == "http" and not loopback(where.hostname):
            raise SpecError(f"url {self.url!r}: a token would be sent in the clear; valid: https://")

    def token(self) -> str | None:
        """The bearer token as it is now, or a TargetError that names where it should be."""
        try:
            return secret_of(self.token_env, self.token_file, "no token")
        except UnusableError as error:
            raise TargetError(f"token: {error}") from None


class Api:
    """Asks one endpoint. Safe to use from several threads, which wait for each other. With a lease, nothing is written
    that could come from a holder who has lost it."""

    def __init__(self, endpoint: Endpoint, lease: Lease | None = None) -> None:
        self.endpoint, self._lease = endpoint, lease
        self._where = urlsplit(endpoint.url)
        self._wire = Wire(endpoint.url, endpoint.ca_file, endpoint.cert_file, endpoint.key_file)

    def deadline(self) -> float:
        """Until when a call that begins now may take, on the monotonic clock."""
        return time.monotonic() + self.endpoint.budget_s

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        deadline_s: float,
        content: str = "application/json",
    ) -> Answer:
        """The answer, whatever its status, but not before trying again what may pass: 429 (after as long as it says),
        5xx, no answer, and 401 once, as a token may just have been replaced. Only for what may be repeated.

        Raises NoAnswerError when the deadline is near and the last try had no answer or such a status.
        """
        pause_s, refused = _FIRST_PAUSE_S, False
        while True:
            if self._lease is not None and method != "GET":
                try:
                    self._lease.check()
                except LeaseError as error:
                    raise TargetError(f"not tried: {error}") from None
            try:
                status, after_s, text = self._once(method, path, body, deadline_s, content)
                if status not in _AGAIN and (status != 401 or refused):
                    return Answer(status, _parsed(text))
                refused = refused or status == 401
                why = f"answered {status}{said(text)}"
            except NoAnswerError as error:
                after_s, why = 0.0, str(error)
            wait_s = max(pause_s, after_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            if time.monotonic() + wait_s >= deadline_s:
                raise NoAnswerError(
                    f"{self._where.hostname}: {method} {path}: {self.clean(why)}"
                    + (f"; it asks to wait {after_s:g} s" if after_s else "")
                )
            time.sleep(wait_s)

    def clean(self, text: str) -> str:
        """Text from a server, fit for a log: one line, short, without secrets."""
        token = None
        with contextlib.suppress(TargetError):
            token = self.endpoint.token()
        return clean(text, token)

    def _once(
        self, method: str, path: str, body: Any, deadline_s: float, content: str
    ) -> tuple[int, float, bytes]:
        within_s = min(self.endpoint.timeout_s, deadline_s - time.monotonic())
        if within_s <= 0:
            raise NoAnswerError("no time is left")
        headers = {"Accept": "application/json", "User-Agent": "pilotage"}
        token = self.endpoint.token()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        payload = None if body is None else json.dumps(body).encode()
        if payload is not None:
            headers["Content-Type"] = content
        try:
            answer = self._wire.exchange(Request(method, path, payload, headers, within_s, MAX_ANSWER_BYTES))
        except UnusableError as error:
            raise TargetError(str(error)) from None
        except WireError as error:
            raise NoAnswerError(str(error)) from None
        return answer.status, _seconds(answer.headers.get("Retry-After")), answer.text


def said(body: Any) -> str:
    """What an error says in words, as `: words`, if it says anything: the message of a Kubernetes Status, or text."""
    if isinstance(body, bytes):
        body = _parsed(body)
    text = body.get("message") if isinstance(body, dict) else body
    return f": {text}" if isinstance(text, str) and text else ""


def must(answer: Answer, what: str, clean: Callable[[str], str]) -> Any:
    """The body of a successful answer, or a TargetError that says what was asked and what came back."""
    if 200 <= answer.status < 300:
        return answer.body
    raise TargetError(clean(f"{what}: answered {answer.status}{said(answer.body)}"))


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return text[:2000].decode(errors="replace")


def _seconds(text: str | None) -> float:
    """Retry-After in seconds; a date, which neither Kubernetes nor Ray sends, counts as nothing said."""
    return min(float(text), 3600.0) if text is not None and re.fullmatch(r"\d{1,6}", text.strip()) else 0.0
