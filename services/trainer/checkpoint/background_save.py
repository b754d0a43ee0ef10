"""Checkpoints that are written in the background, from copies of the tensors."""

from __future__ import annotations

import functools
import pathlib
import shutil
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import torch.distributed as dist

from miles.services.trainer.checkpoint.errors import cause_of, writing
from miles.services.trainer.checkpoint.record import CheckpointRecord, complete
from miles.threads import Threads


class Saving:
    """A checkpoint whose files a thread of this rank writes while training goes on.

    A thread, not a process: it dies with the trainer, so nothing writes into a folder that a restarted trainer uses.
    """

    def __init__(self, directory: pathlib.Path, written: Future[Any], put_in_place: Callable[[], None]) -> None:
        """`put_in_place` is collective, is called after the writing, and raises on all ranks when it failed on one."""
        self._directory = directory
        self._written = written
        self._put_in_place = put_in_place

    def done(self) -> bool:
        """Whether writing this rank's files has ended or failed."""
        return self._written.done()

    def wait(self) -> None:
        """Wait for this rank's files, without completing the checkpoint."""
        wait([self._written])

    def finish(self) -> None:
        """Wait, then complete the checkpoint; collective. Raises OSError when a file could not be written."""
        self.wait()
        with writing(self._directory):
            self._put_in_place()
            self._written.result()


def empty_folder(directory: pathlib.Path) -> pathlib.Path:
    """Make the folder in which the files of the checkpoint `directory` are written; collective."""
    partial = directory.with_name(directory.name + ".tmp")

    def clear() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    on_first_rank(clear)
    return partial


def put_in_place(partial: pathlib.Path, directory: pathlib.Path, record: CheckpointRecord) -> None:
    """Complete a checkpoint when all ranks have written their files; collective."""
    dist.barrier()
    on_first_rank(functools.partial(complete, partial, directory, record))


def on_first_rank(act: Callable[[], None]) -> None:
    """Run something on rank 0 while the others wait; its error is raised on all, on the others as an OSError."""
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            act()
        except Exception as caught:
            error = caught
    outcome = [None if error is None else cause_of(error)]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise error or OSError(outcome[0])


def in_thread(write: Callable[[], Any]) -> Future[Any]:
    """Run a function in a thread of its own."""
    pool = Threads(1, thread_name_prefix="checkpoint")
    written = pool.submit(write)
    pool.shutdown(wait=False)
    return written
