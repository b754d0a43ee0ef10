"""The progress of a training step as a stream of messages to the caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from miles.rpc.gen import trainer_pb2
from miles.services.trainer.step.progress import Progress

REPORT_EVERY_S = 5.0
"""How often a stream repeats its last message while nothing changes."""


class ProgressStream:
    """Carries progress from the worker thread, which reports it, to the event loop, which sends it."""

    def __init__(self, on_progress: Callable[[trainer_pb2.TrainResponse], None]) -> None:
        """Create it on the event loop, where `on_progress` is called with each message."""
        self._loop = asyncio.get_running_loop()
        self._on_progress = on_progress
        self._messages: asyncio.Queue[trainer_pb2.TrainResponse] = asyncio.Queue()

    def report(self, progress: Progress) -> None:
        """Send progress; may be called from any thread."""
        self._loop.call_soon_threadsafe(self._put, progress)

    async def until_done(self, step: asyncio.Future[bool]) -> AsyncIterator[trainer_pb2.TrainResponse]:
        """Yield messages as they come until the step is done; repeat the last one while nothing changes."""
        last = trainer_pb2.TrainResponse(phase=trainer_pb2.TRAIN_PHASE_WAITING)
        while not step.done():
            following = asyncio.ensure_future(self._messages.get())
            waited: list[asyncio.Future[Any]] = [step, following]
            await asyncio.wait(waited, timeout=REPORT_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                last = following.result()
            else:
                following.cancel()
            if not step.done():
                yield last

    def _put(self, progress: Progress) -> None:
        message = trainer_pb2.TrainResponse(
            phase=trainer_pb2.TrainPhase.Value(f"TRAIN_PHASE_{progress.phase.upper()}"),
            micro_batches_done=progress.micro_batches_done,
            micro_batches=progress.micro_batches,
        )
        self._on_progress(message)
        self._messages.put_nowait(message)
