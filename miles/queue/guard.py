"""Ends a process some time after this one has ended, however it ended: also when it was killed."""

from __future__ import annotations

import subprocess

_SCRIPT = 'read -r _; sleep "$2"; kill "$1"'
"""`read` returns at the end of the pipe, which comes when no process has its other end open any more."""


class EndGuard:
    """A small process that waits for the end of this one, and then ends another.

    A child cannot be told at its start to end with its parent: what Linux has for it (PR_SET_PDEATHSIG) concerns the
    thread that started the child, and the thread may end early.
    """

    def __init__(self, pid: int, grace_s: float) -> None:
        """Send SIGTERM to `pid` so many seconds after the end of this process."""
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "sh", str(pid), f"{grace_s:g}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def stop(self) -> None:
        """Stop waiting; call before the guarded process is gone and its id may be given to another."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
