"""The HTTP interface of one SGLang server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import aiohttp
import orjson

from miles.services.rollout.engines.base import EngineFailed
from miles.services.rollout.engines.sglang.errors import ServerRefused
from miles.services.rollout.engines.sglang.requests.events import DONE, EventSplitter
from miles.telemetry.tracing import traced

KEEP_ALIVE_S = 2.0
"""The server closes a connection that was idle for 5 s; a call sent at that moment would be lost."""
_LOST = (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError)


class SglangApi:
    """Calls one server; `open` first. Streams end with EngineFailed when the server or the connection is lost."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._session: aiohttp.ClientSession | None = None
        self._streams: set[aiohttp.ClientResponse] = set()

    async def open(self) -> None:
        """Open the connection pool, which belongs to the running event loop."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), json_serialize_bytes=orjson.dumps
        )

    async def close(self) -> None:
        """Close every connection."""
        self.break_streams()
        if self._session is not None:
            await self._session.close()
            self._session = None

    def break_streams(self) -> None:
        """End every open stream with an error: the server is lost."""
        for response in list(self._streams):
            response.close()

    async def post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Call by POST. Raises ServerRefused for an error answer, EngineFailed when there is none in time."""
        return await self._call("POST", path, timeout_s, body)

    async def get(self, path: str, timeout_s: float) -> dict[str, Any]:
        """Call by GET. Raises like `post`."""
        return await self._call("GET", path, timeout_s, None)

    async def generate(
        self, body: Mapping[str, Any], on_accepted: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed response. Raises ValueError for a request that the server rejects as faulty.

        `on_accepted` is called once the server has the request, so that it can be aborted. Read all events: leaving a
        response before its end closes its connection.
        """
        try:
            async with self._opened().post(self._url("/generate"), json=body) as response:
                if response.status != 200:
                    raise ServerRefused("/generate", response.status, _message(await response.read()))
                self._streams.add(response)
                on_accepted()  # SGLang takes a request in, in the same step in which it begins the response
                with contextlib.ExitStack() as stack:
                    stack.callback(self._streams.discard, response)
                    splitter, done = EventSplitter(), False
                    async for piece in response.content.iter_any():
                        for data in splitter.feed(piece):
                            if data == DONE:
                                done = True
                            else:
                                yield _event(data)
                    if done:
                        return
        except _LOST as error:
            raise EngineFailed(f"the SGLang server at {self.address} was lost: {error!r}") from error
        raise EngineFailed(f"the SGLang server at {self.address} ended a response without its end")

    @traced("call SGLang", lambda _, method, path, *rest: path)
    async def _call(self, method: str, path: str, timeout_s: float, body: Mapping[str, Any] | None) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._opened().request(method, self._url(path), json=body, timeout=timeout) as response:
                content = await response.read()
                status = response.status
        except TimeoutError:
            raise EngineFailed(f"waited {timeout_s:g} s for SGLang at {self.address} to answer {path}") from None
        except _LOST as error:
            raise EngineFailed(f"the SGLang server at {self.address} was lost during {path}: {error!r}") from error
        if status != 200:
            raise ServerRefused(path, status, _message(content))
        answer = orjson.loads(content) if content[:1] == b"{" else {}
        if answer.get("success") is False:
            raise ServerRefused(path, status, _message(content))
        return dict(answer)

    def _url(self, path: str) -> str:
        return f"http://{self.address}{path}"

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise EngineFailed(f"not connected to the SGLang server at {self.address}")
        return self._session


def _event(data: bytes) -> dict[str, Any]:
    event = orjson.loads(data)
    error = event.get("error")
    if error is None:
        return dict(event)
    message = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    if isinstance(error, dict) and error.get("code") == 400 and "disconnected" not in message:
        raise ValueError(f"SGLang refuses the request: {message}")
    raise EngineFailed(f"SGLang ended the response: {message}")


def _message(content: bytes) -> str:
    """The message of an error answer."""
    try:
        answer = orjson.loads(content)
    except ValueError:
        return content[:500].decode(errors="replace")
    if isinstance(answer, dict):
        error = answer.get("error", answer.get("message", answer))
        return str(error.get("message", error)) if isinstance(error, dict) else str(error)
    return str(answer)
