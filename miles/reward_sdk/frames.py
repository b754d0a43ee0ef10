"""Length-prefixed frames between the service and its worker processes: uint32 little-endian length, then the bytes."""

from __future__ import annotations

import asyncio
import struct

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
