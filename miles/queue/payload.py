"""Groups as bytes in Redis, and the record that describes a queue entry without its payload."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from miles.types import SampleGroup

INLINE_LIMIT = 1 << 20
"""Largest payload in a stream entry, in bytes; a bigger one becomes a blob."""

REDIS_STRING_LIMIT = 512 << 20
"""Largest value Redis takes by default (proto-max-bulk-len), in bytes."""


def encode_group(group: SampleGroup) -> bytes:
    """Serialise a group as the `SampleGroup` message.

    Raises ValueError when Redis could not hold it.
    """
    from miles.types.wire import group_to_bytes

    payload = group_to_bytes(group)
    if len(payload) > REDIS_STRING_LIMIT:
        raise ValueError(
            f"group {group.group_id} has {len(payload)} bytes and Redis holds at most {REDIS_STRING_LIMIT} "
            "in one value; lower --n-samples-per-prompt or --rollout-max-response-len"
        )
    return payload


def decode_group(payload: bytes) -> SampleGroup:
    """Inverse of `encode_group`.

    Raises ValueError (`miles.types.MalformedMessage` when a field is wrong) for bytes that are not a valid group.
    """
    from miles.types.wire import group_from_bytes

    return group_from_bytes(payload)


def content_hash(payload: bytes) -> str:
    """xxh3-128 in hexadecimal: the name of a blob."""
    return xxhash.xxh3_128_hexdigest(payload)


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
