"""Calls that may hang or take all memory, each in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_MEMORY_BYTES = 2 << 30
"""What a call may allocate beyond what the process already holds."""

_WAIT_S = 25.0
"""How much longer than its CPU time a call may take, on a machine that has other work."""
_LIBC = ctypes.CDLL(None)


def bounded(call: Callable[[], bool], cpu_s: int) -> bool | None:
    """Return what the call returns; None when it raises, takes more CPU time, or takes more memory than 2 GiB.

    It runs in a forked child, which the system kills at its limit: a signal's handler would have to wait for the end
    of a single huge multiplication.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(call, cpu_s, writing)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], cpu_s + _WAIT_S)
        answer = os.read(reading, 1) if ready else b""
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return {b"1": True, b"0": False}.get(answer)


def _answer(call: Callable[[], bool], cpu_s: int, writing: int) -> None:
    """Write the call's answer and end the process, which shares everything with its parent but runs no clean-up."""
    try:
        if sys.platform == "linux":
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it must not outlive the one who waits for it
            _limit_memory()
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
        os.write(writing, b"1" if call() else b"0")
    finally:
        os._exit(0)


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as statm:
        held = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY_BYTES, resource.RLIM_INFINITY))
