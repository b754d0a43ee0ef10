"""Whole groups in a file: `SampleGroup` messages, each behind its length (8 bytes, little-endian)."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator

from google.protobuf.message import DecodeError

from miles.rpc.gen import sample_pb2 as pb
from miles.types.sample import SampleGroup
from miles.types.wire import group_to_bytes

SUFFIX = ".groups.pb"
_LENGTH_BYTES = 8


def write_groups(path: pathlib.Path, groups: Iterable[SampleGroup]) -> None:
    """Write a file. Raises MalformedMessage for a group that `check_group` refuses."""
    with path.open("wb") as file:
        for group in groups:
            payload = group_to_bytes(group)
            file.write(len(payload).to_bytes(_LENGTH_BYTES, "little"))
            file.write(payload)


def read_messages(path: pathlib.Path) -> Iterator[pb.SampleGroup]:
    """The groups of a file as messages, not checked. Raises ValueError for a file that was cut or holds others."""
    with path.open("rb") as file:
        number = 0
        while head := file.read(_LENGTH_BYTES):
            size = int.from_bytes(head, "little")
            left = path.stat().st_size - file.tell()
            if len(head) < _LENGTH_BYTES or size > left:
                raise ValueError(f"group {number} of {path} needs {size} bytes, but {left} are left; the file is cut")
            message = pb.SampleGroup()
            try:
                message.ParseFromString(file.read(size))
            except DecodeError as error:
                raise ValueError(f"group {number} of {path} is not a SampleGroup message: {error}") from error
            yield message
            number += 1
