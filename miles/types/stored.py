"""Whole groups in a file: as bytes like those in the sample queue, each behind its length (8 bytes, little-endian)."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator

from miles.types.sample import SampleGroup
from miles.types.wire import group_from_bytes, group_to_bytes

SUFFIX = ".groups.pb"
_LENGTH_BYTES = 8


def write_groups(path: pathlib.Path, groups: Iterable[SampleGroup]) -> None:
    """Write a file. Raises MalformedMessage for a group that `check_group` refuses."""
    with path.open("wb") as file:
        for group in groups:
            payload = group_to_bytes(group)
            file.write(len(payload).to_bytes(_LENGTH_BYTES, "little"))
            file.write(payload)


def read_groups(path: pathlib.Path) -> Iterator[SampleGroup]:
    """The groups of a file. Raises ValueError for a file that was cut, and for a group that cannot be read."""
    with path.open("rb") as file:
        number = 0
        while head := file.read(_LENGTH_BYTES):
            size = int.from_bytes(head, "little")
            left = path.stat().st_size - file.tell()
            if len(head) < _LENGTH_BYTES or size > left:
                raise ValueError(f"group {number} of {path} needs {size} bytes, but {left} are left; the file is cut")
            try:
                yield group_from_bytes(file.read(size))
            except ValueError as error:
                raise ValueError(f"group {number} of {path} cannot be read: {error}") from error
            number += 1
