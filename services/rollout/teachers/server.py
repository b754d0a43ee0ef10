"""The HTTP interface of one teacher's server: few requests at once, tried again until it answers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import orjson

CONCURRENCY = 32
"""Requests at once; a server computes them in batches of its own."""
ATTEMPT_S = 300.0
"""How long one attempt may take: a server may have a queue."""
CONNECT_S = 30.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
MAX_ANSWER_BYTES = 256 << 20
_AGAIN = frozenset({408, 425, 429, *range(500, 600)})
"""Statuses after which another attempt may succeed."""
_LOST = (aiohttp.ClientError, ConnectionError, TimeoutError, asyncio.IncompleteReadError)


class TeacherFailed(RuntimeError):
    """A teacher did not answer in time; another attempt may succeed."""


class TeacherRefused(ValueError):
    """A teacher's server refuses what it is asked, and would again."""


@dataclasses.dataclass(slots=True)
class TeacherWait:
    """Requests that wait for one teacher. Times are Unix seconds."""

    since_unix_s: float
    requests: int = 0
    error: str = ""
    """Why the last attempt failed; empty before the first ends."""
    failures: int = 0
    """Attempts in a row that failed."""


class TeacherServer:
    """Asks one server; `open` first."""

    def __init__(self, name: str, url: str, key: str | None = None, patience_s: float = 600.0) -> None:
        """`url` is that of generations, or the server's own. `key` is sent as a bearer token.

        A request is tried again for `patience_s`.
        """
        self.name = name
        self.url = generation_url(url)
        self.patience_s = patience_s
        self.wait: TeacherWait | None = None
        """None while nobody waits."""
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._slots = asyncio.Semaphore(CONCURRENCY)
        self._session: aiohttp.ClientSession | None = None

    def __str__(self) -> str:
        return f"teacher {self.name} at {self.url}"

    async def open(self) -> None:
        """Open the connection pool, which belongs to the running event loop."""
        timeout = aiohttp.ClientTimeout(total=ATTEMPT_S, sock_connect=CONNECT_S)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONCURRENCY, keepalive_timeout=2.0),
            timeout=timeout,
            headers=self._headers,
            json_serialize_bytes=orjson.dumps,
        )

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()

    async def generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer of POST /generate. Raises TeacherFailed and TeacherRefused."""
        return await self.ask("POST", self.url, body)

    async def ask(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call until it answers. Raises TeacherRefused for a refusal, TeacherFailed when its patience is over."""
        async with self._waiting() as wait, self._slots:
            end, pause_s = time.monotonic() + self.patience_s, FIRST_PAUSE_S
            while True:
                try:
                    answer = await self._attempt(method, url, body)
                except _LOST as error:
                    wait.failures += 1
                    wait.error = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                else:
                    wait.failures, wait.error, wait.since_unix_s = 0, "", time.time()
                    return answer
                if time.monotonic() + pause_s > end:
                    raise TeacherFailed(f"{self} did not answer for {self.patience_s:g} s: {wait.error}")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def sibling(self, path: str) -> str:
        """The URL of another path of the same server."""
        return self.url.removesuffix("/generate") + path

    @contextlib.asynccontextmanager
    async def _waiting(self) -> AsyncIterator[TeacherWait]:
        wait = self.wait = self.wait or TeacherWait(time.time())
        wait.requests += 1
        try:
            yield wait
        finally:
            wait.requests -= 1
            if not wait.requests:
                self.wait = None

    async def _attempt(self, method: str, url: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        if self._session is None:
            raise RuntimeError(f"not connected to {self}")
        async with self._session.request(method, url, json=body, allow_redirects=False) as response:
            content = await self._read(response)
            if response.status in _AGAIN:
                raise ConnectionError(f"it answered {response.status}: {_message(content)}")
            if response.status != 200:
                raise TeacherRefused(f"{self} answered {url} with {response.status}: {_message(content)}")
        try:
            answer = orjson.loads(content)
        except ValueError as error:
            raise TeacherRefused(f"{self} answered {url} with no JSON: {_message(content)}") from error
        if not isinstance(answer, dict):
            raise TeacherRefused(f"{self} answered {url} with a JSON {type(answer).__name__} instead of an object")
        return answer

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        pieces, size = [], 0
        async for piece in response.content.iter_any():
            pieces.append(piece)
            size += len(piece)
            if size > MAX_ANSWER_BYTES:
                raise TeacherRefused(f"{self} answered with more than {MAX_ANSWER_BYTES >> 20} MiB")
        return b"".join(pieces)


def generation_url(url: str) -> str:
    """The URL of generations of a server that is named by it, or by its own."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    return urlunsplit(parts._replace(path=path or "/generate"))


def _message(content: bytes) -> str:
    return content[:300].decode(errors="replace").strip()
