"""Leaving a training step that has changed nothing yet, at the same point on every rank."""

from __future__ import annotations

import threading
from collections.abc import Callable


class StepAbandonedError(Exception):
    """The training step was left; parameters, optimizers and random states are as they were before it."""


class Abandonment:
    """Whether one training step is to be left. It can be until `commit`, which comes before its first optimizer step.

    `request` may be called from any thread of rank 0; `check` and `commit` are called by every rank's worker, at the
    same points.
    """

    def __init__(self, share: Callable[[bool], bool] = lambda wanted: wanted) -> None:
        """`share` gives every rank what rank 0 calls it with; collective."""
        self._share = share
        self._lock = threading.Lock()
        self._wanted = False
        self._committed = False

    def request(self) -> bool:
        """Have the step left at the next point; False when it is too late for that."""
        with self._lock:
            self._wanted = not self._committed
            return self._wanted

    def check(self) -> None:
        """Raise StepAbandonedError on every rank if the step is to be left; collective until `commit`."""
        if not self._committed and self._share(self._wanted):
            raise StepAbandonedError

    def commit(self) -> None:
        """The last such point; collective. From now on the step is finished."""
        with self._lock:
            leave = self._wanted
            self._committed = not leave
        if self._share(leave):
            raise StepAbandonedError
