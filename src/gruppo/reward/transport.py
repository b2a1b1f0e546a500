"""One HTTP POST with a deadline that holds, also against a server that sends a byte a minute.

Socket timeouts count from the last byte, so a clock of its own cuts the connection. No redirects,
no compression, no cookies. Proxies of the environment are used, but not for this machine.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.request
from base64 import b64encode
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from urllib.parse import SplitResult, unquote, urlsplit

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: status, the Retry-After header, and the body (``whole``: all of it)."""

    status: int
    retry_after: str | None
    body: bytes
    whole: bool


class Calls:
    """The POSTs to one URL with one key; ``abort`` cuts those that are under way."""

    def __init__(self, url: str, key: str | None) -> None:
        """Connect to nothing yet."""
        self._url = url
        self._headers = {"Content-Type": "application/json", "User-Agent": "gruppo"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._live: set[_Line] = set()
        self._lock = threading.Lock()

    def post(self, body: bytes, *, seconds: float, most: int) -> Reply:
        """Post ``body``; read at most ``most`` bytes of the answer.

        Raises:
            TimeoutError: the answer was not complete within ``seconds``.
            OSError, HTTPException, ValueError: no connection, or no HTTP.
        """
        late = threading.Event()
        connection, target, headers = _connect(urlsplit(self._url), seconds)
        line = _Line(connection)
        clock = threading.Timer(seconds, lambda: (late.set(), line.cut()))
        clock.daemon = True
        with self._lock:
            self._live.add(line)
        clock.start()
        try:
            line.connect()
            if late.is_set():  # the clock ran out before there was a connection to cut
                raise TimeoutError(f"no connection within {seconds:g} s")
            connection.request("POST", target, body, {**self._headers, **headers})
            reply = _read(connection.getresponse(), most)
        except Exception as error:
            if late.is_set():
                raise TimeoutError(f"no answer within {seconds:g} s") from error
            raise
        finally:
            clock.cancel()
            with self._lock:
                self._live.discard(line)
            connection.close()
        if late.is_set():  # the cut may look like the end of a body of unknown length
            raise TimeoutError(f"no answer within {seconds:g} s")
        return reply

    def abort(self) -> None:
        """Cut every connection."""
        with self._lock:
            live = list(self._live)
        for line in live:
            line.cut()


class _Line:
    """A connection that another thread can end: whoever reads from it returns at once."""

    def __init__(self, connection: HTTPConnection) -> None:
        self._connection = connection
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        """Connect, and hold the socket: the connection forgets it when a body has no length."""
        self._connection.connect()
        self._socket = self._connection.sock

    def cut(self) -> None:
        """End it, if it is connected."""
        found = self._socket or self._connection.sock
        if found is not None:
            with contextlib.suppress(OSError):
                # of the plain socket: the TLS one would unwrap itself under the reader
                socket.socket.shutdown(found, socket.SHUT_RDWR)


def _read(response: HTTPResponse, most: int) -> Reply:
    parts, size = [], 0
    while size <= most and (part := response.read(min(_CHUNK, most + 1 - size))):
        parts.append(part)
        size += len(part)
    body = b"".join(parts)
    whole = len(body) <= most
    return Reply(response.status, response.headers.get("Retry-After"), body[:most], whole)


def _connect(url: SplitResult, seconds: float) -> tuple[HTTPConnection, str, dict[str, str]]:
    """A connection, the request's target and further headers; through a proxy where one is set."""
    host = url.hostname or ""
    secure = url.scheme == "https"
    kind = HTTPSConnection if secure else HTTPConnection
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    proxy = _proxy(url.scheme, host)
    if proxy is None:
        return kind(host, url.port, timeout=seconds), target, {}
    login = {}
    if proxy.username is not None:
        pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        login["Proxy-Authorization"] = "Basic " + b64encode(pair.encode()).decode()
    connection = kind(proxy.hostname or "", proxy.port, timeout=seconds)
    if secure:
        connection.set_tunnel(host, url.port, login)
        return connection, target, {}
    return connection, f"http://{url.netloc}{target}", login


def _proxy(scheme: str, host: str) -> SplitResult | None:
    if host in _LOOPBACK or urllib.request.proxy_bypass(host):
        return None
    address = urllib.request.getproxies().get(scheme)
    if not address:
        return None
    return urlsplit(address if "://" in address else f"http://{address}")
