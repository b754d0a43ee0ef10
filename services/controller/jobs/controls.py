"""Keeps what the user has asked of a running job."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine
from typing import Any, TypeVar

from miles.change_signal import ChangeSignal
from miles.rpc.gen import controller_pb2
from miles.tasks import cancelled_at_end

T = TypeVar("T")


class JobStoppedError(Exception):
    """The user asked for the job to end with its state saved."""


class JobCancelledError(Exception):
    """The user asked for the job to end at once."""


@dataclasses.dataclass(slots=True)
class JobControls:
    """Requests of the user, which the run loop looks at between its steps."""

    paused: bool = False
    stop: bool = False
    cancel: bool = False
    checkpoint: bool = False
    changed: ChangeSignal = dataclasses.field(default_factory=ChangeSignal)

    def apply(self, action: controller_pb2.JobAction.ValueType) -> None:
        """Note an action of the user."""
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
        self.changed.notify()

    async def wait_for_end(self) -> None:
        """Return once the user has asked for the end of the job."""
        while not (self.stop or self.cancel):
            await self.changed.wait()

    async def unless_ended(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of work that changes nothing; cancel it and raise as `check` when the user ends the job."""
        working, ending = asyncio.create_task(work), asyncio.create_task(self.wait_for_end())
        async with cancelled_at_end(working, ending):
            await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
            self.check()
            return await working

    async def wait_while_paused(self) -> bool:
        """Return False once the job may go on, True when it has to save a checkpoint first; raises as `check` does."""
        while True:
            self.check()
            if not self.paused or self.checkpoint:
                return self.paused
            await self.changed.wait(1.0)

    def check(self) -> None:
        """Raise what ends the job, if the user asked for it."""
        if self.cancel:
            raise JobCancelledError
        if self.stop:
            raise JobStoppedError
