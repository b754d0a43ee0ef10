"""Takes the folders of a run for as long as it runs: marks them, and locks them against runs elsewhere."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
from collections.abc import Iterator

from miles.ownership.owner_file import NAME, FolderTakenError, Owner, new_owner, read_owner, run_of, write_owner
from miles.ownership.place import locate
from miles.ownership.rules import Refusal, export_refusal, refusal

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""A file system without locks: the owner files must do."""


class FolderBusyError(FolderTakenError):
    """A folder that a run elsewhere writes now."""


@contextlib.contextmanager
def claimed(run_dir: str, save: str | None, save_hf: str | None, load: str | None, job_id: str) -> Iterator[None]:
    """Hold a run's folders: its run folder, its folder of checkpoints, and a look at the place of its exports.

    Raises FolderTakenError for the first one that is not the run's to write, or that a run elsewhere writes now, and
    OSError or ValueError for one that cannot be used.
    """
    with contextlib.ExitStack() as locks:
        folder = locate(run_dir).path
        _raise("run_dir", refusal("run", folder, folder))
        run = run_of(folder, job_id)
        locks.enter_context(_locked(folder))
        if save is not None and (checkpoints := locate(save).path) != folder:
            _raise("save", refusal("checkpoints", checkpoints, folder, load))
            checkpoints.mkdir(parents=True, exist_ok=True)
            locks.enter_context(_taken_over(checkpoints, run, folder, job_id))
        if save_hf is not None:
            _raise("save_hf", export_refusal(save_hf, folder))
        yield


@contextlib.contextmanager
def _taken_over(folder: pathlib.Path, run: Owner, run_dir: pathlib.Path, job_id: str) -> Iterator[None]:
    """Hold a folder of checkpoints; one of another run becomes this run's."""
    mine = new_owner("checkpoints", run.run, run_dir, job_id)
    before = read_owner(folder) or write_owner(folder, mine)
    with _locked(folder):
        if before.run == run.run:
            yield
            return
        write_owner(folder, mine, replace=True)
        with _locked(folder):
            yield


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Lock a folder's owner file until the end of the block or of the process, however it ends."""
    descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        owner = read_owner(folder)
        raise FolderBusyError(
            f"{folder} is {owner}, and another controller runs a job in it now; stop that one, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    try:
        yield
    finally:
        os.close(descriptor)


def _raise(key: str, found: Refusal | None) -> None:
    if found is not None:
        raise FolderTakenError(f"{key}: {found.problem}; {found.remedy}")
