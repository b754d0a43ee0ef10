"""Everything that this process has started, and what that has started in turn, killed at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time

KILL_S = 2.0
"""How long killed processes may take to go."""
_LOOK_EVERY_S = 0.02


def kill_descendants(limit_s: float) -> None:
    """Kill every descendant, whatever session it is in; returns when all are gone, or after the limit.

    They are stopped first: one that is killed earlier than its child would leave us without a way to find the child.
    """
    end = time.monotonic() + limit_s
    found: set[int] = set()
    while True:
        while new := _descendants(os.getpid()) - found:
            _signal(new, signal.SIGSTOP)
            found |= new
        _signal(found, signal.SIGKILL)
        found = {pid for pid in found if _runs(_state_and_parent(pid)[0])}
        if not found or time.monotonic() > end:
            return
        time.sleep(_LOOK_EVERY_S)


def _descendants(root: int) -> set[int]:
    """Processes below another one that run."""
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
    """Letter of the state and id of the parent; an empty state when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before it may have any character
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    return fields[0], int(fields[1])


def _runs(state: str) -> bool:
    return state not in ("", "Z", "X")  # no process, or one that has ended


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
