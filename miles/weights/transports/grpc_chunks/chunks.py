"""Chunks: pieces of a version's buffer, named by their content hash. Needs no torch."""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING

from miles.rpc.gen import weightsync_pb2
from miles.weights.manifest import checksum

if TYPE_CHECKING:
    from collections.abc import Iterable

CHUNK_BYTES = 5 << 20
"""Large enough that a call's overhead does not matter, small enough to resend after a disconnect."""


def cut(
    data: memoryview, begin: int, chunk_bytes: int, threads: concurrent.futures.Executor
) -> list[weightsync_pb2.ChunkDescriptor]:
    """Cut `data` (bytes), which lies at byte `begin` of the version's buffer, into chunks."""

    def describe(start: int) -> weightsync_pb2.ChunkDescriptor:
        with data[start : start + chunk_bytes] as part:
            return weightsync_pb2.ChunkDescriptor(offset=begin + start, nbytes=len(part), id=checksum(part))

    return list(threads.map(describe, range(0, len(data), chunk_bytes)))


def fault(chunks: Iterable[weightsync_pb2.ChunkDescriptor], nbytes: int) -> str:
    """What is wrong with a list of chunks of a buffer of that size; empty when nothing is."""
    for number, chunk in enumerate(chunks):
        if not chunk.nbytes or chunk.offset + chunk.nbytes > nbytes or len(chunk.id) != 16:
            return (
                f"chunk {number} lies at byte {chunk.offset} of {nbytes}, has {chunk.nbytes} bytes and id {chunk.id!r}"
            )
    return ""
