"""Reads the logs of the processes that served a job: only the job's part, in whole lines, without secrets."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from miles.rpc.gen import records_pb2
from miles.services.controller.artifacts.log_spans import LogSpans, Span
from miles.services.controller.errors import NotFoundError
from miles.telemetry.redaction import redact

DEFAULT_BYTES = 64 << 10
MAX_BYTES = 1 << 20


class UnknownLogError(NotFoundError):
    """No log file has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no log {name!r}; list the logs to see their names")


def list_logs(folder: pathlib.Path, spans: LogSpans) -> list[records_pb2.LogFile]:
    """List every log in a folder that has lines of the job, by name."""
    files = []
    for path in sorted(_logs(folder)):
        state = path.stat()
        size = sum(end - begin for begin, end in spans.of(path.stem, state.st_size))
        if size:
            files.append(records_pb2.LogFile(name=path.stem, size_bytes=size, modified_unix_ns=state.st_mtime_ns))
    return files


def read_log(
    folder: pathlib.Path, spans: LogSpans, name: str, offset: int | None, limit: int
) -> records_pb2.ReadLogResponse:
    """Read lines of one log from `offset` on, or its last ones without an offset. Raises UnknownLogError.

    Offsets count the job's part alone. A secret is only recognised in a whole line, so pieces end at line ends; an
    unfinished last line is left for the next piece, unless it alone fills the limit.
    """
    if name not in {path.stem for path in _logs(folder)}:
        raise UnknownLogError(name)
    limit = min(limit or DEFAULT_BYTES, MAX_BYTES)
    path = folder / f"{name}.log"
    stretches = spans.of(name, path.stat().st_size)
    size = sum(end - begin for begin, end in stretches)
    start = max(0, size - limit) if offset is None else min(offset, size)
    with path.open("rb") as file:
        # The byte before tells whether `start` is the beginning of a line.
        before = _read(file, stretches, start - 1, 1) if start else b""
        data = _read(file, stretches, start, limit)
    if offset is None and before not in (b"", b"\n"):
        skipped = data.find(b"\n") + 1
        start, data = start + skipped, data[skipped:]
    end = data.rfind(b"\n") + 1
    if end == 0 and len(data) == limit:
        end = len(data)
    text = redact(data[:end].decode("utf-8", "replace"))
    return records_pb2.ReadLogResponse(text=text, offset_bytes=start, next_offset_bytes=start + end, size_bytes=size)


def _logs(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Log files; a link may lead anywhere, and no service makes one."""
    return (path for path in folder.glob("*.log") if path.is_file() and not path.is_symlink())


def _read(file: BinaryIO, stretches: Sequence[Span], offset: int, limit: int) -> bytes:
    """Read bytes of the stretches as if they were one file."""
    pieces: list[bytes] = []
    for begin, end in stretches:
        if offset < end - begin and limit > 0:
            file.seek(begin + offset)
            pieces.append(file.read(min(limit, end - begin - offset)))
            limit -= len(pieces[-1])
            offset = 0
        else:
            offset -= min(offset, end - begin)
    return b"".join(pieces)
