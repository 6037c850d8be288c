"""An HTTP API of a target: one connection that is kept, TLS, a bearer token that may change, and bounded time.

The standard library's client, because a controller is to stay small and asks one server one thing at a time. Tokens
come from a file, read at every request (Kubernetes replaces them while a process lives), or from an environment
variable; they go into one header and nowhere else.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple
from urllib.parse import urlsplit

from msgspec import Meta

from pilotage.live.lease import Lease, LeaseError
from pilotage.live.secrets import without_secrets
from pilotage.live.targets import TargetError
from pilotage.world.spec import Positive, Spec, SpecError

MAX_ANSWER_BYTES: Final = 256 * 2**20  # a list of ten thousand objects has some tens of MB
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
        if self.token_env:
            found = os.environ.get(self.token_env, "")
            where = f"environment variable {self.token_env}"
        elif self.token_file:
            where = f"token file {self.token_file}"
            try:
                found = Path(self.token_file).read_text()
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not text"
                raise TargetError(f"{where} cannot be read: {reason}") from None
        else:
            return None
        if not re.fullmatch(r"[\x21-\x7e]+", found.strip()):
            raise TargetError(f"{where} holds no token; valid: one line of printable characters")
        return found.strip()


class Api:
    """Asks one endpoint. Safe to use from several threads, which wait for each other. With a lease, nothing is written
    that could come from a holder who has lost it."""

    def __init__(self, endpoint: Endpoint, lease: Lease | None = None) -> None:
        self.endpoint, self._lease = endpoint, lease
        self._where = urlsplit(endpoint.url)
        self._lock = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None

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
        text = text.replace(token, "[withheld]") if token else text
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        shown: str = without_secrets(text)
        return shown if len(shown) <= 400 else shown[:400] + "…"

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
        with self._lock:
            while True:
                kept = self._connection is not None
                try:
                    return self._exchange(method, path, payload, headers, within_s)
                except (OSError, http.client.HTTPException, ValueError) as error:
                    self._drop()
                    if kept and isinstance(error, ConnectionError):
                        continue  # the server had closed the connection that was kept: that is not a fault
                    raise NoAnswerError(f"no answer: {_why(error)}") from None

    def _exchange(
        self, method: str, path: str, payload: bytes | None, headers: dict[str, str], within_s: float
    ) -> tuple[int, float, bytes]:
        connection = self._connection or self._open(within_s)
        self._connection = connection
        assert connection.sock is not None
        connection.sock.settimeout(within_s)
        end_s = time.monotonic() + within_s
        # the time-out of a socket is for one read; a server that drips bytes is cut off by the clock
        late = threading.Timer(within_s, _cut, [connection.sock])
        late.daemon = True
        late.start()
        try:
            connection.request(method, self._where.path.rstrip("/") + path, payload, headers)
            answer = connection.getresponse()
            text = answer.read(MAX_ANSWER_BYTES + 1)
            if len(text) > MAX_ANSWER_BYTES:
                raise http.client.HTTPException(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
            if answer.will_close:
                self._drop()
            return answer.status, _seconds(answer.headers.get("Retry-After")), text
        except (OSError, http.client.HTTPException, ValueError):
            if time.monotonic() >= end_s:
                raise TimeoutError from None
            raise
        finally:
            late.cancel()

    def _open(self, within_s: float) -> http.client.HTTPConnection:
        host, port = str(self._where.hostname), self._where.port
        connection: http.client.HTTPConnection
        if self._where.scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=within_s, context=self._context())
        else:
            connection = http.client.HTTPConnection(host, port, timeout=within_s)
        connection.connect()
        assert connection.sock is not None
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _context(self) -> ssl.SSLContext:
        spec = self.endpoint
        try:
            context = ssl.create_default_context(cafile=spec.ca_file)
            if spec.cert_file and spec.key_file:
                context.load_cert_chain(spec.cert_file, spec.key_file)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(filter(None, (spec.ca_file, spec.cert_file, spec.key_file)))
            raise TargetError(f"certificates cannot be read ({files}): {error.strerror or error}") from None
        return context

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


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


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it took too long"
    return str(error) or type(error).__name__


def _seconds(text: str | None) -> float:
    """Retry-After in seconds; a date, which neither Kubernetes nor Ray sends, counts as nothing said."""
    return min(float(text), 3600.0) if text is not None and re.fullmatch(r"\d{1,6}", text.strip()) else 0.0


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(
            sock, socket.SHUT_RDWR
        )  # below TLS, whose own farewell is not for another thread


def loopback(host: str) -> bool:
    """Whether what is sent there stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
