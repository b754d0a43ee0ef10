"""Tells a Redis server that cannot be reached yet from one that will never serve, and names the cause."""

from __future__ import annotations

import logging
import socket
import ssl
import time
import urllib.parse
from collections.abc import Iterator

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)

from miles.certificates import speaks_tls
from miles.queue.errors import RedisRefused
from miles.redis_url import without_password

log = logging.getLogger(__name__)

LOADING_DEADLINE_S = 600.0
"""How long a server may take to read its data."""
_REPEAT_S = 10.0
_PASSING = ("LOADING", "BUSY ", "TRYAGAIN", "MASTERDOWN", "CLUSTERDOWN", "MISCONF", "NOREPLICAS", "OOM")
"""Beginnings of errors of a server that is busy, full or being repaired."""
_NO_SUCH_HOST = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
_CLOSED = "closed by server"


def why_never(error: Exception) -> str | None:
    """Return why a server that answered with this error, or could not be connected to, never will serve.

    None when it may: a server that starts, loads its data, is full, or moves.
    """
    if "without any password" in str(error) or "no password is set" in str(error):
        return "it has no password, and the address has one; leave that out"  # a ConnectionError like any other
    match error:
        case AuthenticationError() if "required" in str(error):
            return "it wants a password, and the address has none; put it there, between redis://: and @HOST"
        case AuthenticationError():
            return f"it refuses user and password ({error})"
        case NoPermissionError():
            return f"its user may not do what the queue needs ({error}); allow the user ~miles:* and +@all"
        case InvalidResponse():
            return "what listens there is no Redis server; check host and port"
        case OutOfMemoryError() | BusyLoadingError():
            return None
        case ResponseError() if not str(error).startswith(_PASSING):
            return str(error)
    if type(error) is RedisError:  # of the client itself, about a parameter of the address
        return str(error)
    return next(filter(None, map(_why_not_connected, _causes(error))), None)


class Patience:
    """Decides after each failed attempt to connect whether to try again."""

    def __init__(self, url: str, deadline_s: float) -> None:
        self._shown = without_password(url)
        parts = urllib.parse.urlsplit(url)
        self._in_the_clear, self._encrypted = parts.scheme == "redis", parts.scheme == "rediss"
        self._place = urllib.parse.unquote(parts.hostname or ""), parts.port or 6379
        self._deadline_s = deadline_s
        self._began_s = time.monotonic()
        self._said_s: float | None = None
        self._closed = 0

    def after(self, error: Exception) -> None:
        """Return when it makes sense to try again; blocks for seconds at most.

        Raises RedisRefused for a cause that waiting cannot remove, and ConnectionError after the deadline.
        """
        if (problem := why_never(error)) is not None:
            raise RedisRefused(f"Redis at {self._shown} cannot be used: {problem}") from error
        if self._encrypted and any(isinstance(cause, FileNotFoundError) for cause in _causes(error)):
            problem = f"Redis at {self._shown} cannot be used: a file of its ssl_ parameters is not there"
            raise RedisRefused(problem) from error
        self._closed += _CLOSED in str(error).lower() or "reset" in str(error).lower()
        if self._closed == 2 and self._in_the_clear and speaks_tls(*self._place):
            problem = f"Redis at {self._shown} cannot be used: it speaks TLS; write rediss://"
            raise RedisRefused(problem) from error
        now_s = time.monotonic()
        loads = isinstance(error, BusyLoadingError)
        limit_s = max(self._deadline_s, LOADING_DEADLINE_S) if loads else self._deadline_s
        if now_s - self._began_s >= limit_s:
            message = f"Redis at {self._shown} did not answer for {limit_s:.0f} s: {error}"
            raise ConnectionError(message) from error
        if self._said_s is None or now_s - self._said_s >= _REPEAT_S:
            self._said_s = now_s
            log.warning("waiting up to %.0f s for Redis at %s: %s", limit_s, self._shown, error)


def _why_not_connected(cause: BaseException) -> str | None:
    match cause:
        case ssl.SSLCertVerificationError():
            return f"its certificate is not accepted ({cause.verify_message}); see ssl_ca_certs in docs/queue.md"
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
            return None
        case ssl.SSLError() if cause.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
            return "it does not speak TLS; write redis://, or give its TLS port"
        case ssl.SSLError():
            return f"no TLS connection comes about: {cause.reason or cause}"
        case socket.gaierror() if cause.errno in _NO_SUCH_HOST:
            return "there is no such host"
        case PermissionError():
            return "this user may not open it (permission denied)"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


RETRIED = (RedisError, OSError)
"""What `Patience.after` judges."""
