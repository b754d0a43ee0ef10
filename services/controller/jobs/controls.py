"""What the user has asked of a running job."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Coroutine
from typing import Any, TypeVar

from miles.rpc.gen import controller_pb2

T = TypeVar("T")


class JobStoppedError(Exception):
    """The user asked for the job to end with its state saved."""


class JobCancelledError(Exception):
    """The user asked for the job to end at once."""


@dataclasses.dataclass(slots=True)
class JobControls:
    """Requests of the user, as the run loop sees them at its next turn."""

    paused: bool = False
    stop: bool = False
    cancel: bool = False
    checkpoint: bool = False
    changed: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def apply(self, action: controller_pb2.JobAction.ValueType) -> None:
        """Take note of an action."""
        if action == controller_pb2.JOB_ACTION_PAUSE:
            self.paused = True
        elif action == controller_pb2.JOB_ACTION_RESUME:
            self.paused = False
        elif action == controller_pb2.JOB_ACTION_CANCEL:
            self.cancel = True
        elif action == controller_pb2.JOB_ACTION_STOP:
            self.stop = True
        elif action == controller_pb2.JOB_ACTION_CHECKPOINT:
            self.checkpoint = True
        self.changed.set()
        self.changed = asyncio.Event()

    async def wait_for_end(self) -> None:
        """Return once the user has asked for the end of the job."""
        while not (self.stop or self.cancel):
            await self.changed.wait()

    async def unless_ended(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work that changes nothing; it is given up when the user ends the job, as `check` says."""
        working, ending = asyncio.create_task(work), asyncio.create_task(self.wait_for_end())
        try:
            await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
            self.check()
            return await working
        finally:
            for task in (working, ending):
                task.cancel()
            await asyncio.gather(working, ending, return_exceptions=True)

    async def wait_while_paused(self) -> bool:
        """Return False once the job may go on, True when it is to save a checkpoint before; raises as `check` does."""
        while True:
            self.check()
            if not self.paused or self.checkpoint:
                return self.paused
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self.changed.wait()

    def check(self) -> None:
        """Raise what ends the job, if the user asked for it."""
        if self.cancel:
            raise JobCancelledError
        if self.stop:
            raise JobStoppedError
