"""What goes wrong beside the run loop: warnings for people, and a failure that ends the job."""

from __future__ import annotations

import asyncio

from miles.change_signal import ChangeSignal
from miles.telemetry.repeated_warnings import RepeatedWarnings


class RunAlerts:
    """Collects alerts of a run's background tasks until the loop asks for them."""

    def __init__(self, changed: ChangeSignal) -> None:
        """`changed` is notified of a failure."""
        self._changed = changed
        self._failure: Exception | None = None
        self._warnings: list[str] = []
        self._repeated = RepeatedWarnings()

    def warn(self, text: str) -> None:
        """Note something that a person should know; what repeats becomes one line with a count."""
        if line := self._repeated.note(text):
            self._warnings.append(line)

    def report(self, text: str) -> None:
        """Note something that a person should know every time: the caller repeats it seldom."""
        self._warnings.append(text)

    def fail(self, error: Exception) -> None:
        """Note an error that has to end the job."""
        self._failure = error
        self._changed.notify()

    def watch(self, task: asyncio.Task[None]) -> None:
        """Fail when a task ends by an unexpected error, instead of waiting forever."""
        task.add_done_callback(self._on_task_end)

    def check(self) -> None:
        """Raise the failure, if there is one."""
        if self._failure is not None:
            raise self._failure

    def take_warnings(self) -> list[str]:
        """Return the warnings since the last call."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))
