"""A checkpoint between the moment its contents are held and the moment it is complete."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from miles.services.trainer.checkpoint.record import CheckpointRecord, complete


class Saving:
    """Files that a thread of this rank writes from copies of the tensors, so that training may go on.

    A thread ends with its process: nothing goes on writing into a folder that the next process has begun anew.
    """

    def __init__(self, written: Future[Any], put_in_place: Callable[[], None]) -> None:
        """`put_in_place` is collective, comes after the writing, and raises on all ranks when it failed on one."""
        self._written = written
        self._put_in_place = put_in_place

    def done(self) -> bool:
        """Whether this rank's files are written, or could not be."""
        return self._written.done()

    def wait(self) -> None:
        """Wait for this rank's files; the checkpoint is not put in place."""
        wait([self._written])

    def finish(self) -> None:
        """Wait, and put the checkpoint in place; collective. Raises OSError when a file could not be written."""
        self.wait()
        self._put_in_place()
        self._written.result()


def empty_folder(directory: pathlib.Path) -> pathlib.Path:
    """The folder in which the files of the checkpoint `directory` are written; collective."""
    partial = directory.with_name(directory.name + ".tmp")

    def clear() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    _on_first_rank(clear)
    return partial


def put_in_place(partial: pathlib.Path, directory: pathlib.Path, record: CheckpointRecord) -> None:
    """Make a checkpoint of the files that all ranks have written; collective."""
    dist.barrier()
    _on_first_rank(functools.partial(complete, partial, directory, record))


def _on_first_rank(act: Callable[[], None]) -> None:
    """Have rank 0 do something while the others wait; its OSError is raised on all."""
    error: OSError | None = None
    if dist.get_rank() == 0:
        try:
            act()
        except OSError as caught:
            error = caught
    outcome = [None if error is None else str(error)]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise error or OSError(outcome[0])


def in_thread(write: Callable[[], Any]) -> Future[Any]:
    """Run a function in a thread of its own."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    written = pool.submit(write)
    pool.shutdown(wait=False)
    return written


@contextlib.contextmanager
def failing_as_os_error(directory: pathlib.Path) -> Iterator[None]:
    """PyTorch's error for a checkpoint, which is no Exception, as one that callers expect of files."""
    try:
        yield
    except CheckpointException as error:
        raise OSError(f"{directory} could not be written: {error}") from error
