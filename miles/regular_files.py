"""Opens files that may have been put there by anybody: a pipe, a socket or a folder is an error, not a wait."""

from __future__ import annotations

import errno
import os
import pathlib
import stat
from typing import BinaryIO, TextIO


def regular(path: str, flags: int) -> int:
    """Open a file as `opener` of the built-in `open`. Raises OSError for what is no regular file."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)  # a pipe would wait for its other end
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return descriptor


def open_to_append(path: pathlib.Path) -> TextIO:
    """Open a text file to append to it; makes it. Raises OSError."""
    return open(path, "a", encoding="utf-8", opener=regular)


def open_to_read(path: pathlib.Path) -> BinaryIO:
    """Open a file to read its bytes. Raises OSError."""
    return open(path, "rb", opener=regular)


def replace_file(path: pathlib.Path, text: str) -> None:
    """Write a file that is complete or the old one, also after a power cut. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with open(partial, "w", encoding="utf-8", opener=regular) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
