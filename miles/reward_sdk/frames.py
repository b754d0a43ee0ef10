"""Length-prefixed frames between the service and its worker processes: uint32 little-endian length, then the bytes.

A worker's answer begins with a float64 of how many seconds its function took and a uint32 of how often it was called; a
`ScoreResponse` follows.
"""

from __future__ import annotations

import asyncio
import struct

from miles.rpc.gen import reward_pb2

_SPENT = struct.Struct("<dI")
_LENGTH = struct.Struct("<I")


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """Read the next frame; None at the end of the stream, even if it ends within a frame."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return None


def write_frame(writer: asyncio.StreamWriter, payload: bytes) -> None:
    """Queue one frame for sending."""
    writer.write(_LENGTH.pack(len(payload)) + payload)


def encode_answer(seconds: float, calls: int, response: reward_pb2.ScoreResponse) -> bytes:
    """The payload of an answer."""
    return _SPENT.pack(seconds, calls) + response.SerializeToString()


def decode_answer(payload: bytes) -> tuple[float, int, reward_pb2.ScoreResponse]:
    """Seconds, calls and scores of an answer."""
    seconds, calls = _SPENT.unpack_from(payload)
    return seconds, calls, reward_pb2.ScoreResponse.FromString(payload[_SPENT.size :])
