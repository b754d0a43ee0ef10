"""Opens files that may have been put there by anybody: a pipe, a socket or a folder is an error, not a wait."""

from __future__ import annotations

import errno
import os
import stat


def regular(path: str, flags: int) -> int:
    """Open a file as `opener` of the built-in `open`. Raises OSError for what is no regular file."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)  # a pipe would wait for its other end
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return descriptor
