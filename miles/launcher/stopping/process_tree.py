"""Kills all descendants of this process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time

KILL_S = 2.0
"""How long killed processes may take to end."""
_POLL_S = 0.02


def kill_descendants(limit_s: float) -> None:
    """Kill every descendant, in any session; return when all have ended, or after the limit.

    All are stopped (SIGSTOP) first: a child whose parent is killed before it could not be found any more.
    """
    end = time.monotonic() + limit_s
    found: set[int] = set()
    while True:
        while new := _descendants(os.getpid()) - found:
            _signal(new, signal.SIGSTOP)
            found |= new
        _signal(found, signal.SIGKILL)
        found = {pid for pid in found if _runs(_state_and_parent(pid)[0])}
        # Another thread may have started one more meanwhile.
        if time.monotonic() > end or not (found or _descendants(os.getpid())):
            return
        time.sleep(_POLL_S)


def _descendants(root: int) -> set[int]:
    """Return the running descendants of a process."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            state, parent = _state_and_parent(int(name))
            if _runs(state):
                parents[int(name)] = parent
    found, before = {root}, 0
    while len(found) > before:
        before = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found - {root}


def _state_and_parent(pid: int) -> tuple[str, int]:
    """Return the letter of the state and the id of the parent; an empty state when there is no such process."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before it may have any character
        return fields[0], int(fields[1])
    return "", 0


def _runs(state: str) -> bool:
    return state not in ("", "Z", "X")  # no process, or one that has ended


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
