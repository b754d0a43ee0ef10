"""When a pool starts worker processes. Pure."""

from __future__ import annotations

import math

LOAD_S = 0.02
"""How long a call waits for a worker before that shows load. The responses of a training step end in bursts, which few
workers score within this time when the function is cheap; a process takes 0.5 s and more to start."""


def workers_to_start(*, workers: int, waiting: int, waited_s: float, size: int, capacity: int) -> int:
    """How many processes to start now, when none is starting.

    The first one starts at once. With load their number doubles, as far as calls wait for them.

    Args:
        workers: those that are there.
        waiting: calls that wait for a worker.
        waited_s: how long the first of them has waited, in seconds, counted from the last start at the earliest.
        size: workers at most.
        capacity: calls that one worker runs at once.
    """
    if workers and waited_s < LOAD_S:
        return 0
    return min(size - workers, math.ceil(waiting / capacity), max(1, workers))
