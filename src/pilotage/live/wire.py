"""HTTP to one server: a connection that is kept, TLS, credentials that may change, and bounded time and size.

The standard library's client, because a controller is to stay small and asks one server one thing at a time. Secrets
come from a file, read at every request (Kubernetes replaces them while a process lives), or from an environment
variable; they go into one header and nowhere else.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from pilotage.live.secrets import without_secrets

MAX_ANSWER_BYTES: Final = 256 * 2**20  # a list of ten thousand objects has some tens of MB
_LONGEST: Final = 400  # characters of what a server says that go into a log


class WireError(Exception):
    """No answer, or none that can be relied on: what was asked may or may not have happened."""


class UnusableError(WireError):
    """Nothing was asked: certificates, or a secret, are not where they should be, or the server's is not trusted."""


class Request(NamedTuple):
    """What is asked, and the time and bytes that the answer may take; `path` is below the URL's own."""

    method: str
    path: str
    payload: bytes | None
    headers: dict[str, str]
    within_s: float
    most: int


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    text: bytes


class Wire:
    """To the server of a URL. Safe to use from several threads, which wait for each other.

    `ca_file` holds the certificates to trust (None: the system's); `cert_file` and `key_file` are a client's own.
    """

    def __init__(
        self, url: str, ca_file: str | None = None, cert_file: str | None = None, key_file: str | None = None
    ) -> None:
        self._where = urlsplit(url)
        self._files = ca_file, cert_file, key_file
        self._lock = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None

    def exchange(self, request: Request) -> Reply:
        """The whole answer, whatever its status. WireError."""
        with self._lock:
            while True:
                kept = self._connection is not None
                try:
                    return self._exchange(request)
                except (OSError, http.client.HTTPException, ValueError) as error:
                    self._drop()
                    if kept and isinstance(error, ConnectionError):
                        continue  # the server had closed the connection that was kept: that is not a fault
                    raise WireError(f"no answer: {_why(error)}") from None
                except WireError:
                    self._drop()
                    raise

    def _exchange(self, request: Request) -> Reply:
        method, path, payload, headers, within_s, most = request
        connection = self._connection or self._open(within_s)
        self._connection = connection
        assert connection.sock is not None
        connection.sock.settimeout(within_s)
        end_s, answer = time.monotonic() + within_s, None
        # the time-out of a socket is for one read; a server that drips bytes is cut off by the clock
        late = threading.Timer(within_s, _cut, [connection.sock])
        late.daemon = True
        late.start()
        try:
            connection.request(method, self._where.path.rstrip("/") + path, payload, headers)
            answer = connection.getresponse()
            text = answer.read(most + 1)
            if len(text) > most:
                raise WireError(f"the answer is longer than {most / 2**20:g} MiB")
            if answer.length:
                raise http.client.IncompleteRead(text, answer.length)
            if answer.will_close:
                self._drop()
            return Reply(answer.status, answer.headers, text)
        except (OSError, http.client.HTTPException, ValueError):
            if time.monotonic() < end_s:
                raise
            if answer is not None:
                raise WireError(f"no whole answer within {within_s:.3g} s") from None
            raise TimeoutError from None
        finally:
            late.cancel()

    def _open(self, within_s: float) -> http.client.HTTPConnection:
        host, port = str(self._where.hostname), self._where.port
        connection: http.client.HTTPConnection
        if self._where.scheme == "https":
            connection = http.client.HTTPSConnection(host, port, timeout=within_s, context=self._context())
        else:
            connection = http.client.HTTPConnection(host, port, timeout=within_s)
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:  # which it will not be a moment later, either
            raise UnusableError(f"{host}: its certificate is not trusted: {error}") from None
        assert connection.sock is not None
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _context(self) -> ssl.SSLContext:
        ca_file, cert_file, key_file = self._files
        try:
            context = ssl.create_default_context(cafile=ca_file)
            if cert_file and key_file:
                context.load_cert_chain(cert_file, key_file)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(filter(None, self._files))
            raise UnusableError(f"certificates cannot be read ({files}): {error.strerror or error}") from None
        return context

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def secret_of(variable: str | None, file: str | None, nothing: str, spaces: bool = False) -> str | None:
    """The secret in an environment variable or a file as it is now; None where neither is named.

    UnusableError, which says where it should be, if it cannot be read or `nothing` like one is there.
    """
    if variable:
        found, where = os.environ.get(variable, ""), f"environment variable {variable}"
    elif file:
        where = f"file {file}"
        try:
            found = Path(file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UnusableError(f"{where} cannot be read: {reason}") from None
    else:
        return None
    if not re.fullmatch(rf"[\x{20 if spaces else 21}-\x7e]+", found.strip()):
        raise UnusableError(f"{where} holds {nothing}; valid: one line of printable characters")
    return found.strip()


def clean(text: str, secret: str | None) -> str:
    """Text from a server, fit for a log: one line, short, without secrets."""
    text = text.replace(secret, "[withheld]") if secret else text
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    shown: str = without_secrets(text)
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "…"


def loopback(host: str) -> bool:
    """Whether what is sent there stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it took too long"
    return str(error) or type(error).__name__


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(
            sock, socket.SHUT_RDWR
        )  # below TLS, whose own farewell is not for another thread
