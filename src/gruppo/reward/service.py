"""Requests to a grading service: many at once, within limits, and none that is waited for for ever.

``Service`` is what a recipe says of a service, ``Client`` posts JSON to it. Threads only wait for
sockets. A key comes from an environment variable and goes into one header; no text that leaves
this module holds it. Redirects are not followed, because they would take the key along. What an
answer means is judged by the callers.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cache, partial
from hashlib import blake2b
from http.client import HTTPException
from typing import ClassVar
from urllib.parse import urlsplit

from gruppo.reward.transport import Calls, Reply

_KEY = re.compile(r"[\x21-\x7e]+")
_LONGEST_PAUSE_S = 60.0
_EXCERPT = 200
# Statuses that may be otherwise in a moment; all others are final.
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """Where a grading service is, and how it is to be treated.

    ``url`` begins with http:// or https://. ``key_env`` names the environment variable that holds
    its key, which is sent as ``Authorization: Bearer ...``; the key itself is nowhere recorded.
    An answer is waited for ``timeout_s`` seconds, all requests of one call ``deadline_s``. What
    fails for a moment (no connection, no answer, status 408, 425, 429, 500, 502 to 504) is tried
    again up to ``retries`` times, after ``backoff_s`` seconds (twice as many each time, at most a
    minute) or when the service says so (Retry-After). ``concurrency`` requests are under way at
    once, at most ``per_minute`` are begun in a minute (None: no limit), and no more than
    ``max_reply_kib`` of an answer are read.

    Raises:
        ValueError: no usable URL, or a limit that is not positive.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    url: str
    key_env: str | None = None
    timeout_s: float = 60.0
    deadline_s: float = 600.0
    retries: int = 4
    backoff_s: float = 0.5
    concurrency: int = 8
    per_minute: float | None = None
    max_reply_kib: int = 1024

    def __post_init__(self) -> None:
        _check_url(self.url)
        for name, value in (
            ("timeout_s", self.timeout_s),
            ("deadline_s", self.deadline_s),
            ("backoff_s", self.backoff_s),
            ("concurrency", self.concurrency),
            ("per_minute", self.per_minute),
            ("max_reply_kib", self.max_reply_kib),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"service.{name} = {value}: it must be positive and finite")
        if self.retries < 0:
            raise ValueError(f"service.retries = {self.retries}: it must be 0 or more")
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.key_env):
            # it is not repeated: somebody may have put the key itself here
            raise ValueError(
                "service.key_env must be the name of an environment variable, such as JUDGE_KEY"
            )

    def key(self) -> str | None:
        """The key, or None if there is none to send.

        Raises:
            ValueError: the variable is not set, or holds what no key can be.
        """
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not _KEY.fullmatch(key):
            state = "holds spaces or other characters no key has" if key else "is not set"
            raise ValueError(
                f"service.key_env = {self.key_env!r}: this environment variable {state}; export it"
            )
        return key


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_ok = urlsplit(""), False
    if parts.username is not None or parts.password is not None:
        raise ValueError("service.url holds a user or password: name the key's variable in key_env")
    usable = parts.scheme in ("http", "https") and parts.hostname and not parts.fragment
    if not (usable and port_ok and url.isascii() and url.isprintable() and " " not in url):
        raise ValueError(f"service.url = {url!r}: must read http://host:port/path (or https)")


@dataclass(frozen=True, slots=True)
class Lost:
    """A request without a usable answer: a short kind, and what there is to say of it."""

    kind: str
    text: str


class Pacer:
    """Hands out the times at which requests may begin. Safe in threads."""

    def __init__(self, per_minute: float | None) -> None:
        """Evenly spaced, ``per_minute`` of them; None: at once."""
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = -math.inf
        self._lock = threading.Lock()

    def reserve(self, now: float, most: float) -> float | None:
        """Take the next free time; return the seconds until then.

        None, and nothing is taken, where they would be ``most`` or more: whoever does not come
        leaves the time to others.

        >>> pacer = Pacer(60)
        >>> [pacer.reserve(now, 1.5) for now in (0.0, 0.0, 0.0, 0.5, 2.0, 10.0)]
        [0.0, 1.0, None, None, 0.0, 0.0]
        """
        with self._lock:
            begin = max(now, self._next)
            if begin - now >= most:
                return None
            self._next = begin + self._gap
        return begin - now

    def hold(self, until: float) -> None:
        """Let no request begin before ``until``: the service asked for a pause."""
        with self._lock:
            self._next = max(self._next, until)


def pause(attempt: int, base: float, share: float) -> float:
    """Seconds before another attempt: exponential, half of them fixed and half by ``share``.

    >>> [pause(attempt, 0.5, 1.0) for attempt in (0, 1, 2, 9)], pause(1, 0.5, 0.0)
    ([0.5, 1.0, 2.0, 60.0], 0.5)
    """
    return min(base * 2.0**attempt, _LONGEST_PAUSE_S) * (0.5 + 0.5 * share)


def retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date; None if it says nothing.

    >>> from datetime import timezone
    >>> now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=timezone.utc)
    >>> retry_after("1.5", now), retry_after("Thu, 01 Jan 2026 12:00:30 GMT", now)
    (1.5, 30.0)
    >>> retry_after("soon", now), retry_after("-3", now)
    (None, 0.0)
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - now).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


class Client:
    """Posts JSON to one service. Several rewards that name the same service share one."""

    def __init__(self, service: Service) -> None:
        """Connect to nothing yet."""
        self._service = service
        self._pacer = Pacer(service.per_minute)

    def post_all(self, path: str, bodies: Sequence[bytes]) -> list[bytes | Lost]:
        """Post every body to the service's URL with ``path`` added; answers in order.

        Raises:
            ValueError: the key is not there.
        """
        key = self._service.key()
        batch = _Batch(deadline=time.monotonic() + self._service.deadline_s)
        calls = Calls(self._service.url.rstrip("/") + path if path else self._service.url, key)
        one = partial(self._post, calls, batch, _hider(key))
        with ThreadPoolExecutor(max(1, min(self._service.concurrency, len(bodies)))) as threads:
            try:
                return list(threads.map(one, bodies))
            except BaseException:  # Ctrl-C: nobody will read the answers
                batch.ended.set()
                threads.shutdown(wait=False, cancel_futures=True)
                calls.abort()
                raise

    def _post(
        self, calls: Calls, batch: _Batch, hide: Callable[[str], str], body: bytes
    ) -> bytes | Lost:
        """One body, tried again as the service allows."""
        service, lost = self._service, Lost("deadline", "not tried within service.deadline_s")
        for attempt in range(service.retries + 1):
            turn = self._pacer.reserve(time.monotonic(), batch.left)
            if turn is None or not batch.wait(turn):
                break
            seconds = min(service.timeout_s, batch.left)
            try:
                reply = calls.post(body, seconds=seconds, most=service.max_reply_kib * 1024)
            except (OSError, HTTPException, ValueError) as error:
                late = isinstance(error, TimeoutError)
                about = f"no answer within {seconds:.3g} s" if late else f"{type(error).__name__}"
                text = about if late else f"{about}: {error}"
                lost, asked = Lost("timeout" if late else "connection", hide(text)[:300]), None
            else:
                if reply.status == 200:
                    return reply.body if reply.whole else _too_long(service)
                lost, asked = _refusal(reply, hide), retry_after(reply.retry_after, _now())
                if reply.status not in _TRANSIENT:
                    return lost
            if attempt < service.retries and not self._rest(batch, body, attempt, asked):
                break
        return lost

    def _rest(self, batch: _Batch, body: bytes, attempt: int, asked: float | None) -> bool:
        """Wait before another attempt; False if the deadline would pass meanwhile."""
        if asked is not None:  # the others wait as well, and later calls no longer than one call
            self._pacer.hold(time.monotonic() + min(asked, self._service.deadline_s))
            return asked < batch.left
        digest = blake2b(body + bytes([attempt % 256]), digest_size=4).digest()
        share = int.from_bytes(digest, "big") / 2**32  # no two requests come back at once
        return batch.wait(pause(attempt, self._service.backoff_s, share))


@dataclass(frozen=True, slots=True)
class _Batch:
    """The deadline of one call, and whether it was abandoned."""

    deadline: float
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def wait(self, seconds: float) -> bool:
        """Sleep; False (and no sleep) if the deadline comes first or the call was abandoned."""
        if seconds >= self.left:
            return False
        return not self.ended.wait(seconds) if seconds > 0 else not self.ended.is_set()


def _too_long(service: Service) -> Lost:
    return Lost("oversize", f"the answer is longer than {service.max_reply_kib} KiB")


def _refusal(reply: Reply, hide: Callable[[str], str]) -> Lost:
    text = hide(reply.body[:4096].decode("utf-8", "replace"))
    return Lost(f"http_{reply.status}", f"status {reply.status}: {text[:_EXCERPT]!r}")


def _hider(key: str | None) -> Callable[[str], str]:
    return (lambda text: text) if key is None else (lambda text: text.replace(key, "[key]"))


def _now() -> datetime:
    return datetime.now().astimezone()


@cache
def client(service: Service) -> Client:
    """The one client of a service: its rate limit holds for all who use it."""
    return Client(service)


def describe_lost(lost: Lost, service: Service) -> Mapping[str, str]:
    """The failure's kind and text, with the service's address."""
    return {"kind": f"service_{lost.kind}", "text": f"{service.url}: {lost.text}"}
