"""Groups as bytes in Redis, and the record that describes a queue entry without its payload."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles.types import SampleGroup

INLINE_LIMIT = 1 << 20
"""Largest payload in a stream entry, in bytes; a bigger one becomes a blob (`blobs`)."""


def encode_group(group: SampleGroup) -> bytes:
    """Serialise a group as the `SampleGroup` message."""
    from miles.types.wire import group_to_bytes

    return group_to_bytes(group)


def decode_group(payload: bytes | memoryview) -> SampleGroup:
    """Inverse of `encode_group`.

    Raises ValueError (`miles.types.MalformedMessage` when a field is wrong) for bytes that are not a valid group.
    """
    from miles.types.wire import group_from_bytes

    return group_from_bytes(payload)


@dataclasses.dataclass(frozen=True, slots=True)
class Outstanding:
    """An entry of the stream without its payload, as the index hash keeps it."""

    group_id: int
    entry_id: str
    attempt: int
    oldest_version: int
    nbytes: int
    """Size of the payload, in bytes."""

    @classmethod
    def parse(cls, group_id: bytes, record: bytes) -> Outstanding:
        """Read a field and value of the index hash; the value is written by the `PUT` script."""
        entry_id, attempt, oldest_version, nbytes, _ = record.decode().split(" ")
        return cls(int(group_id), entry_id, int(attempt), int(oldest_version), int(nbytes))
