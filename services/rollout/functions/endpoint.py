"""An HTTP endpoint that speaks SGLang's /generate, for the functions of one job in this process.

It listens on the loopback address alone. The user name in the address that a function gets (`http://NAME@HOST:PORT`)
says which sample it generates, and nobody else knows it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator

from aiohttp import web

from miles.services.rollout.engines.base import EngineFailed
from miles.services.rollout.functions.calls import SampleCalls
from miles.services.rollout.functions.payload import PayloadError, TextTools, answer, read_call

HOST = "127.0.0.1"
_MOST_BYTES = 1 << 28


class GenerateEndpoint:
    """Serves the requests of samples that are registered. Use within one event loop."""

    def __init__(self, tools: TextTools) -> None:
        self.port = 0
        self._tools = tools
        self._calls: dict[str, SampleCalls] = {}

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Listen on a free port inside the block."""
        app = web.Application(client_max_size=_MOST_BYTES)
        app.add_routes([web.post("/generate", self._generate), web.get("/health", self._health)])
        # A function that is cancelled closes its connection, which cancels the request.
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await runner.setup()
        try:
            site = web.TCPSite(runner, HOST, 0)
            await site.start()
            self.port = runner.addresses[0][1]
            yield
        finally:
            await runner.cleanup()

    @contextlib.contextmanager
    def registered(self, calls: SampleCalls) -> Iterator[str]:
        """Serve the requests of a sample inside the block; yields the host of the address, with its user name."""
        name = secrets.token_hex(16)
        self._calls[name] = calls
        try:
            yield f"{name}:x@{HOST}"
        finally:
            del self._calls[name]

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _generate(self, request: web.Request) -> web.Response:
        calls = self._calls.get(_user(request))
        if calls is None:
            problem = (
                "this address belongs to no sample that is being generated; a function has to take sglang_router_ip "
                "and sglang_router_port from the args of each call"
            )
            return _refused(401, problem)
        began_s = time.monotonic()
        try:
            body = await request.json()
            call = read_call(body, self._tools)
            piece = await calls.run(call)
        except EngineFailed as error:
            return _refused(503, str(error))
        except ValueError as error:  # not JSON, a PayloadError, or the engine's own checks
            return _refused(400, str(error) if isinstance(error, PayloadError) else f"{type(error).__name__}: {error}")
        return web.json_response(answer(call, piece, self._tools, rid=str(body.get("rid") or ""), began_s=began_s))


def _user(request: web.Request) -> str:
    """Return the user name of basic authentication, which HTTP clients make of an address with a user name."""
    scheme, _, encoded = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(encoded).decode().partition(":")[0]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _refused(status: int, problem: str) -> web.Response:
    return web.json_response({"error": {"message": problem}}, status=status)
