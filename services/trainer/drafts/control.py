"""Holds and stops the thread that trains a draft model, between two of its optimizer steps."""

from __future__ import annotations

import threading
from collections.abc import Callable


class StoppedError(Exception):
    """Raised in the thread that trains when it is to end."""


class Control:
    """What others ask of the thread, which calls `between_steps` and `sleep` alone; all other methods are others'."""

    def __init__(self, release: Callable[[], int], restore: Callable[[], None]) -> None:
        """`release` frees the memory of the device and returns how much, in bytes; `restore` undoes it. Both are called
        by the thread."""
        self._release = release
        self._restore = restore
        self._changed = threading.Condition()
        self._hold = self._release_wanted = self._stop = self._woken = False
        self._held = self._released = self._ended = False
        self._released_bytes = 0

    # -- of others ----------------------------------------------------------------------------------------------------

    def hold(self, *, release_memory: bool) -> int:
        """Return once the thread computes nothing, with the bytes of device memory that are free meanwhile."""
        with self._changed:
            self._hold = True
            self._release_wanted |= release_memory
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or not self._hold or self._is_held_as_asked())
            return self._released_bytes

    def go_on(self) -> None:
        """End a hold; does not wait until anything computes again."""
        with self._changed:
            self._hold = self._release_wanted = False
            self._changed.notify_all()

    def wake(self) -> None:
        """End a sleep: there is something to look at."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Have the thread end between two steps; does not wait for it."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()

    # -- of the thread that trains ------------------------------------------------------------------------------------

    @property
    def is_asked_to_hold(self) -> bool:
        """Whether `between_steps` would wait."""
        with self._changed:
            return self._hold and not self._stop

    def between_steps(self) -> None:
        """Wait while training is held. Raises StoppedError when it is to end, with the memory still free."""
        while True:
            with self._changed:
                while self._hold and not self._stop and (self._released or not self._release_wanted):
                    self._held = True
                    self._changed.notify_all()
                    self._changed.wait()
                if self._stop:
                    raise StoppedError
                releases = self._hold
                if not releases:
                    self._held = False
                    if not self._released:
                        return
                    self._released_bytes, self._released = 0, False
            # Takes seconds, in which others must be able to ask.
            if not releases:
                self._restore()
                continue
            freed = self._release()
            with self._changed:
                self._released_bytes, self._released = freed, True

    def sleep(self, seconds: float) -> None:
        """Wait until something is asked, or for so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._hold or self._stop or self._woken, seconds)
            self._woken = False

    def end(self) -> None:
        """The thread ends: nobody waits for it any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _is_held_as_asked(self) -> bool:
        return self._held and (self._released or not self._release_wanted)
