"""The checkpoints of a job: saving them one at a time, and which queue entries the newest one covers."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from miles.checkpoint_folder import folder_name
from miles.queue import GroupQueue
from miles.services.trainer.checkpoint.retention import discard_passed
from miles.services.trainer.checkpoint.state import TrainerState
from miles.services.trainer.ranks.collective_calls import Command

if TYPE_CHECKING:
    from miles.services.trainer.ranks.leader import Leader

_POLL_EVERY_S = 0.2
WRITTEN, WRITING = b"+", b"-"
"""What a rank reports of its files."""


class CheckpointManager:
    """Saves a job, one checkpoint after the other; queue entries are acknowledged when a complete one covers them."""

    def __init__(
        self,
        leader: Leader,
        queue: GroupQueue,
        folder: pathlib.Path,
        saved_step: int | None,
        retain_every: int | None = None,
    ) -> None:
        """`saved_step` is that of the newest checkpoint in `folder`; None when there is none.

        With `retain_every`, checkpoints before the newest are deleted but for those of every so many steps.
        """
        self._leader = leader
        self._queue = queue
        self._folder = folder
        self._saved_step = saved_step
        self._retain_every = retain_every
        self._unacknowledged: set[int] = set()
        self._writing: asyncio.Task[None] | None = None

    @property
    def newest(self) -> pathlib.Path | None:
        """The newest complete checkpoint."""
        return None if self._saved_step is None else self._folder / folder_name(self._saved_step)

    def consumed(self, group_ids: Iterable[int]) -> None:
        """Note groups that the next checkpoint covers."""
        self._unacknowledged.update(group_ids)

    async def save(self, state: TrainerState, *, in_background: bool) -> None:
        """Write a checkpoint, after the one that is being written.

        Returns when it is complete; in the background, as soon as its contents are copied and training may go on.
        """
        await self.flush()
        step, covered = state.step, sorted(self._unacknowledged)
        arguments = {"directory": str(self._folder / folder_name(step)), "state": state.to_json()}
        if self._saved_step == step:
            await self._complete(step, covered)
        elif in_background:
            await self._leader.run(Command("begin_save", arguments))
            self._writing = asyncio.create_task(self._write(step, covered), name=f"checkpoint of step {step}")
        else:
            await self._leader.run(Command("save", arguments))
            await self._complete(step, covered)

    async def flush(self) -> None:
        """Wait for the checkpoint that is being written; raise its error if it failed."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
            self.raise_failure()

    def raise_failure(self) -> None:
        """Raise the error of a background save that has failed, once."""
        if self._writing is not None and self._writing.done():
            writing, self._writing = self._writing, None
            writing.result()

    async def _write(self, step: int, covered: list[int]) -> None:
        while set(await self._leader.gather(Command("save_progress"))) != {WRITTEN}:  # noqa: ASYNC110  (other processes)
            await asyncio.sleep(_POLL_EVERY_S)
        await self._leader.run(Command("finish_save"))
        await self._complete(step, covered)

    async def _complete(self, step: int, covered: list[int]) -> None:
        self._saved_step = step
        await self._queue.acknowledge(covered)
        self._unacknowledged.difference_update(covered)
        if self._retain_every is not None:
            await asyncio.to_thread(discard_passed, self._folder, self._retain_every)
