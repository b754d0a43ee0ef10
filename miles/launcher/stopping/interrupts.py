"""Ctrl-C, SIGTERM and SIGHUP: the first stops the program in order, the second kills everything at once.

A hangup is never the second, nor does it make one of the next: who closes a terminal sends several signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console

from miles.launcher.stopping.process_tree import KILL_S, kill_descendants
from miles.rpc.exit_codes import ExitCode
from miles.rpc.server import stop_signals

_SAME_PRESS_S = 0.1
"""One press of Ctrl-C may come twice: from the terminal, and from a program around this one that passes it on."""
_SHOW_CURSOR = "\x1b[?25h"


class Interrupts:
    """Handles the signals from its creation to the end of the process.

    Used as a context manager, it ends the block quietly when a signal has cancelled the task. The handlers belong to
    the process and not to the event loop, which may hang, or be closed already.
    """

    def __init__(self, on_first: Callable[[], object]) -> None:
        """Call in the event loop; `on_first` is called there."""
        self.on_first = on_first
        """Called on the first signal; may be replaced as the program goes on."""
        self.came = False
        self.last_words = "stopped at once"
        """What to print on the second signal."""
        self._loop = asyncio.get_running_loop()
        self._first_s = 0.0
        self._counted = False
        """Whether a signal came after which the next one kills."""
        for number in stop_signals():
            signal.signal(number, self._handle)

    def __enter__(self) -> Interrupts:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return self.came and kind is not None and issubclass(kind, asyncio.CancelledError)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        now_s = time.monotonic()
        if number != signal.SIGHUP:
            if self._counted and now_s - self._first_s >= _SAME_PRESS_S:
                end_at_once(ExitCode.INTERRUPTED, self.last_words)
            if not self._counted:
                self._counted, self._first_s = True, now_s
        if not self.came:
            self.came = True
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(lambda: self.on_first())


def cancel_this_task(console: Console) -> Callable[[], None]:
    """Return what `Interrupts` calls while services start: it cancels the task that called this function."""
    task = asyncio.current_task()
    assert task is not None

    def cancel() -> None:
        console.print("stopping all processes; Ctrl-C again kills them", style="yellow")
        task.cancel()

    return cancel


def end_at_once(code: ExitCode, last_words: str) -> NoReturn:
    """Kill every process that this one has started, and exit. Works at any moment, also in a signal handler."""
    _ignore_signals()
    try:
        _say(last_words)
    finally:
        kill_descendants(KILL_S)
        os._exit(int(code))


def _say(last_words: str) -> None:
    """Print, past the buffers. Nobody may read any more: Ctrl-C also ends the program that output is piped to."""
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # RuntimeError: the signal has interrupted a print
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout.isatty():  # the progress bar hides it
            os.write(1, _SHOW_CURSOR.encode())
        os.write(1, f"\n{last_words}\n".encode())


def leave_nothing_running() -> None:
    """Ignore signals and kill the processes that are left: the last thing that a program does.

    A signal that comes now must not look like a failure. Processes are left only when a signal interrupted the cleanup
    after a failed start.
    """
    _ignore_signals()
    kill_descendants(KILL_S)


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
