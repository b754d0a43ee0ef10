"""What the user has asked of a running job."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

from miles.rpc.gen import controller_pb2


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
