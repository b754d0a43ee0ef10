"""A watcher that reconnects gets every event once, in order."""

from __future__ import annotations

from collections.abc import Sequence


def stream_faults(watched: Sequence[str], history: Sequence[str]) -> list[str]:
    """Faults of the ids of events that a watcher got of a job that has ended, given those of its history."""
    if list(watched) == list(history):
        return []
    missing = [i for i in history if i not in set(watched)]
    found = f"a watcher got {len(watched)} events of {len(history)}, or not in order"
    return [f"{found}; missing: {missing[:5]}"]
