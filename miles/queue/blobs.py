"""Payloads outside stream entries, in pieces: what client and server hold beside a payload is a piece or two.

A blob is named by its content hash, and by the number of its pieces where there are several. The first piece has the
key of that name, the others the same with their number behind it. The scripts in `scripts` know this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    import redis.asyncio

PIECE_BYTES = 8 << 20
"""asyncio holds up to three copies of what it sends, and two of what it receives; Redis does nothing else meanwhile."""


def content_hash(payload: bytes | memoryview) -> str:
    """xxh3-128 in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(payload)


def blob_name(payload: bytes) -> str:
    """The name of a payload's blob."""
    count = -(-len(payload) // PIECE_BYTES)
    return content_hash(payload) + (f":{count}" if count > 1 else "")


def is_named(name: str, payload: memoryview) -> bool:
    """Whether the bytes are those that the blob was named after."""
    return name.partition(":")[0] == content_hash(payload)


def piece_keys(prefix: str, name: str) -> list[str]:
    """The keys of a blob's pieces, in order; `prefix` begins every key of a blob."""
    count = int(name.partition(":")[2] or 1)
    return [f"{prefix}{name}", *(f"{prefix}{name}/{i}" for i in range(1, count))]


def pieces(payload: bytes, count: int) -> Sequence[memoryview]:
    """A payload in so many pieces, without copying."""
    view = memoryview(payload)
    if count == 1:
        return [view]
    return [view[i * PIECE_BYTES : (i + 1) * PIECE_BYTES] for i in range(count)]


async def fetch_blob(redis: redis.asyncio.Redis, prefix: str, name: str, ttl_s: int) -> memoryview | None:
    """Read a blob, whose time to live begins anew; None when a piece of it is gone. The bytes are read-only."""
    keys = piece_keys(prefix, name)
    if len(keys) == 1:
        only: Any = await redis.getex(keys[0], ex=ttl_s)
        return None if only is None else memoryview(only)
    found = bytearray(len(keys) * PIECE_BYTES)
    end = 0
    for key in keys:
        piece: Any = await redis.getex(key, ex=ttl_s)
        if piece is None:
            return None
        found[end : end + len(piece)] = piece
        end += len(piece)
    return memoryview(found)[:end].toreadonly()
