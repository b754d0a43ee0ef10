"""How long an engine has had requests."""

from __future__ import annotations

import time


class BusyClock:
    """Adds up the time in which it was set to busy."""

    def __init__(self) -> None:
        self._total_s = 0.0
        self._since: float | None = None

    def set(self, busy: bool) -> None:
        """Start or stop counting; no effect when it is so already."""
        now = time.monotonic()
        if busy and self._since is None:
            self._since = now
        elif not busy and self._since is not None:
            self._total_s += now - self._since
            self._since = None

    @property
    def seconds(self) -> float:
        """The total up to now."""
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return self._total_s + running
