"""A client that has not sent a whole request yet holds nothing for long."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from miles.gateway.connection import Connection


class _Impatient(Connection):
    head_s = 0.3


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(3 * _Impatient.head_s)  # answers are not bound by what heads are
    await PlainTextResponse("answer")(scope, receive, send)


@contextlib.asynccontextmanager
async def _served() -> AsyncIterator[tuple[str, int]]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(_app, http=_Impatient, ws="none", lifespan="off", log_config=None, timeout_keep_alive=30)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([listener]))
    try:
        yield listener.getsockname()[:2]
    finally:
        server.should_exit = True
        await serving


async def _answer(where: tuple[str, int], *parts: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*where)
    for part in parts:
        writer.write(part)
        await asyncio.sleep(0.05)
    async with asyncio.timeout(30):
        answer = await reader.read()
    writer.close()
    return answer


async def test_a_connection_without_a_request_is_closed() -> None:
    async with _served() as where:
        assert await _answer(where) == b""


async def test_half_a_head_is_answered_with_a_problem() -> None:
    async with _served() as where:
        answer = await _answer(where, b"GET / HTTP/1.1\r\nHost: a\r\n")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"application/problem+json" in answer


async def test_an_answer_may_take_longer_than_a_head_and_a_second_head_is_bound_too() -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\n"
    async with _served() as where:
        whole = await _answer(where, head, b"Connection: close\r\n\r\n")
        assert whole.endswith(b"answer")
        reader, writer = await asyncio.open_connection(*where)
        writer.write(head + b"\r\n")
        async with asyncio.timeout(30):
            assert (await reader.readuntil(b"answer")).startswith(b"HTTP/1.1 200")
            writer.write(head)
            assert (await reader.read()).startswith(b"HTTP/1.1 408")
        writer.close()
