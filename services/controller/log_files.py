"""The log files of a run's processes, in pieces of whole lines and without secrets."""

from __future__ import annotations

import os
import pathlib

from miles.rpc.gen import records_pb2
from miles.telemetry.redaction import redact

DEFAULT_BYTES = 64 << 10
MAX_BYTES = 1 << 20


class UnknownLogError(KeyError):
    """No log file has this name."""


def list_logs(folder: pathlib.Path) -> list[records_pb2.LogFile]:
    """Every log in a folder, by name."""
    files = []
    for path in sorted(folder.glob("*.log")):
        state = path.stat()
        files.append(records_pb2.LogFile(name=path.stem, size_bytes=state.st_size, modified_unix_ns=state.st_mtime_ns))
    return files


def read_log(folder: pathlib.Path, name: str, offset: int | None, limit: int) -> records_pb2.ReadLogResponse:
    """Lines of one log from `offset` on, or up to its end without one. Raises UnknownLogError.

    A secret is only recognised when the line it is in is read whole, so pieces end at line ends; a last line without
    an end is left for the next piece, unless it alone fills the limit.
    """
    if name not in {file.name for file in list_logs(folder)}:
        raise UnknownLogError(name)
    limit = min(limit or DEFAULT_BYTES, MAX_BYTES)
    with (folder / f"{name}.log").open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = max(0, size - limit) if offset is None else min(offset, size)
        file.seek(max(0, start - 1))
        # The byte before tells whether `start` is the beginning of a line.
        before = file.read(min(1, start))
        data = file.read(limit)
    if offset is None and before not in (b"", b"\n"):
        skipped = data.find(b"\n") + 1
        start, data = start + skipped, data[skipped:]
    end = data.rfind(b"\n") + 1
    if end == 0 and len(data) == limit:
        end = len(data)
    text = redact(data[:end].decode("utf-8", "replace"))
    return records_pb2.ReadLogResponse(text=text, offset_bytes=start, next_offset_bytes=start + end, size_bytes=size)
