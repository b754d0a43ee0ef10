"""The controller as a program gives its Redis back, and says what is wrong with it."""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import socket

import pytest

from miles.queue import RedisServer, connect_async
from miles.queue.redis_lease import KEY
from miles.rpc import ExitCode, ServiceExit
from miles.services.controller.__main__ import serve


def arguments(server: RedisServer, port: int = 0, address_file: pathlib.Path | None = None) -> argparse.Namespace:
    listen = f"127.0.0.1:{port}"
    return argparse.Namespace(listen=listen, redis_url=server.url, log_dir=None, address_file=address_file)


async def test_the_lease_is_given_back_when_it_stops_and_when_it_cannot_start(tmp_path: pathlib.Path) -> None:
    with RedisServer(tmp_path / "redis") as server, socket.create_server(("127.0.0.1", 0)) as taken:
        client = await connect_async(server.url)
        with pytest.raises(ServiceExit) as refused:
            await serve(arguments(server, taken.getsockname()[1]))
        assert refused.value.code is ExitCode.PORT_IN_USE
        assert not await client.exists(KEY)
        serving = asyncio.create_task(serve(arguments(server, address_file=tmp_path / "address")))
        async with asyncio.timeout(60):
            while not (tmp_path / "address").exists():  # noqa: ASYNC110 (a file)
                await asyncio.sleep(0.05)
        assert await client.exists(KEY)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert not await client.exists(KEY)
        await client.rpush(KEY, "another application's")
        with pytest.raises(ServiceExit, match="miles:controller in Redis is a list") as unsuitable:
            await serve(arguments(server))
        assert unsuitable.value.code is ExitCode.REDIS_UNSUITABLE
        await client.aclose()
