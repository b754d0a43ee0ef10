"""Abandoning a training step that has changed nothing yet, at the same point on every rank."""

from __future__ import annotations

import threading
from collections.abc import Callable


class StepAbandonedError(Exception):
    """The training step was abandoned; parameters, optimizers and random states are as they were before it."""


class Abandonment:
    """Whether to abandon one training step, which is possible until `commit`, before its first optimizer step.

    `request` may be called from any thread of rank 0; `check` and `commit` are called by every rank's worker, at the
    same points.
    """

    def __init__(self, share: Callable[[bool], bool] = lambda wanted: wanted) -> None:
        """`share` broadcasts rank 0's flag to every rank."""
        self._share = share
        self._lock = threading.Lock()
        self._wanted = False
        self._committed = False

    def request(self) -> bool:
        """Abandon the step at the next check; False when it is too late."""
        with self._lock:
            self._wanted = not self._committed
            return self._wanted

    def check(self) -> None:
        """Raise StepAbandonedError on every rank if the step is to be abandoned; collective until `commit`."""
        if not self._committed and self._share(self._wanted):
            raise StepAbandonedError

    def commit(self) -> None:
        """As `check`, for the last time; collective. After it the step runs to its end."""
        with self._lock:
            wanted = self._wanted
            self._committed = not wanted
        if self._share(wanted):
            raise StepAbandonedError
