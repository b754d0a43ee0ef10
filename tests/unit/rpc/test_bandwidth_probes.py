"""Connections for short messages carry no pings, which gRPC would send to measure the bandwidth."""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health_pb2, health_pb2_grpc

from miles.addresses import split_address
from miles.rpc import connect, start_server

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _PING = 0, 6
"""Types of HTTP/2 frames."""
_CALLS = 20


class FrameCounter:
    """Relays one HTTP/2 connection to a port of this machine, and notes the types of its frames."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.types: list[int] = []

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
        server_writer.write(await reader.readexactly(len(_PREFACE)))
        await asyncio.gather(
            self._pass_on(reader, server_writer), self._pass_on(server_reader, writer), return_exceptions=True
        )

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                header = await reader.readexactly(9)
                writer.write(header + await reader.readexactly(int.from_bytes(header[:3], "big")))
                self.types.append(header[3])
        finally:
            writer.close()


async def _frame_types(*, bandwidth_probes: bool) -> list[int]:
    """The types of the frames that health checks take, in both directions."""
    server, address = await start_server(lambda _: None, "127.0.0.1:0", [], bandwidth_probes=bandwidth_probes)
    counter = FrameCounter(split_address(address)[1])
    proxy = await asyncio.start_server(counter.relay, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    async with proxy, connect(f"127.0.0.1:{port}", bandwidth_probes=bandwidth_probes) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for _ in range(_CALLS):
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=60.0)
        types = list(counter.types)  # ending a connection takes a ping too
    await server.stop(0)
    return types


async def test_short_messages_cost_no_pings() -> None:
    types = await _frame_types(bandwidth_probes=False)
    assert types.count(_DATA) >= 2 * _CALLS
    assert types.count(_PING) == 0


async def test_bulk_data_is_measured_with_pings() -> None:
    assert (await _frame_types(bandwidth_probes=True)).count(_PING) > 0
