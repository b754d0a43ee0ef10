"""The thread that owns the generator: it steps, and runs the event loop's commands between two steps."""

from __future__ import annotations

import concurrent.futures
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from miles.services.rollout.engines.base import EngineFailed, PauseMode
from miles.services.rollout.engines.torch.generation.generator import Generator, GeneratorOptions
from miles.services.rollout.engines.torch.generation.outbox import Delivery
from miles.threads import only_exceptions

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Worker:
    """Builds a generator in a thread of its own and steps it there while it has work and is not paused.

    Commands are added by `submit` and run between two steps; no step waits for the event loop, nor the loop for a step.
    """

    generator: Generator
    """Exists once `start` is done."""

    def __init__(
        self,
        config: Any,
        options: GeneratorOptions,
        threads: int | None,
        deliver: Callable[[list[Delivery]], None],
    ) -> None:
        self._config = config
        self._options = options
        self._threads = threads
        self._deliver = deliver
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = (
            queue.SimpleQueue()
        )
        self._paused = False
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self.busy_s = 0.0

    def start(self) -> concurrent.futures.Future[None]:
        """Start the thread, which first builds the generator; the future is done when it has."""
        self._thread.start()
        return self.submit(self._build)

    def submit(self, command: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run `command` between two steps."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._commands.put((command, future))
        return future

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end after the command to close; return whether it did."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # Commands.

    def pause(self, mode: PauseMode) -> None:
        """Take no further step."""
        self._paused = True
        if mode is PauseMode.RETRACT:
            self.generator.retract()
        elif mode is PauseMode.ABORT:
            self.generator.abort(None)

    def resume(self) -> None:
        """Step again."""
        self._paused = False

    def close(self) -> None:
        """Abort everything and end the thread."""
        self._closed = True
        if hasattr(self, "generator"):
            self.generator.abort(None)

    def _build(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        self.generator = Generator(self._config, self._options)

    # The loop.

    def _run(self) -> None:
        while not self._closed:
            self._run_commands()
            if not self._closed and self._can_step():
                self._step()

    def _can_step(self) -> bool:
        return not self._paused and self._failure is None and hasattr(self, "generator") and not self.generator.idle

    def _run_commands(self) -> None:
        """Run the commands that wait; wait for one when there is no step to take."""
        block = not self._can_step()
        while block or not self._commands.empty():  # this thread alone takes commands out
            command, future = self._commands.get()
            block = False
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if self._failure is not None and command != self.close:
                    raise EngineFailed("an earlier step of the engine failed") from self._failure
                with only_exceptions():
                    result = command()
            except Exception as error:
                future.set_exception(error)
            else:
                self._flush(force=True)
                future.set_result(result)

    def _step(self) -> None:
        begin = time.perf_counter()
        try:
            with only_exceptions():
                self.generator.step()
        except Exception as error:
            logger.exception("a step of the engine failed")
            self._failure = error
            self.generator.fail(error)
        self.busy_s += time.perf_counter() - begin
        self._flush(force=self.generator.idle)

    def _flush(self, *, force: bool) -> None:
        now_s = time.monotonic()
        if hasattr(self, "generator") and (force or self.generator.outbox.due(now_s)):
            batch = self.generator.outbox.take(now_s)
            if batch:
                self._deliver(batch)
