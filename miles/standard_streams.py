"""Standard input, output and error of programs that run for days: they outlive their readers."""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any

_FULL_PIPE_S = 1.0
"""How long to wait for the reader of a full pipe that must not be waited for (O_NONBLOCK)."""


def outlive_readers() -> None:
    """Have what is printed go nowhere, instead of an error, when it cannot be written.

    The terminal may hang up (EIO), the pager or `head` be closed (EPIPE), the disk be full (ENOSPC): none of them may
    end a program whose work is elsewhere. Characters that the encoding does not have are escaped. Call once, first.
    """
    open_missing()
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not None and stream is not getattr(sys, f"__{name}__"):
            continue  # somebody else collects the output in this process
        if stream is not None:
            stream.flush()
        encoding = "utf-8" if stream is None else stream.encoding
        lasting = io.TextIOWrapper(
            _LastingFile(number),
            encoding=encoding,
            errors="backslashreplace",
            write_through=True,  # type: ignore[type-var]
        )
        setattr(sys, name, lasting)


def open_missing() -> None:
    """Open what the caller closed (`>&-`): otherwise the next file or socket would get its number, and our output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def escape_unknown_characters() -> None:
    """Escape characters that the encoding of standard output and error does not have, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _LastingFile(io.RawIOBase):
    """A file descriptor; what cannot be written is dropped."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        while left:
            try:
                left = left[os.write(self._number, left) :]
            except BlockingIOError:
                if not select.select([], [self._number], [], _FULL_PIPE_S)[1]:
                    break
            except OSError:
                break
        return len(data)
