"""Refuses a job that would write into a folder of another one that has not ended, above or below it."""

from __future__ import annotations

import json
from collections.abc import Iterable

from miles.ownership.overlap import Output, outputs_of, shared
from miles.ownership.owner_file import NAME, FolderTakenError, read_owner
from miles.ownership.place import locate
from miles.rpc.gen import job_pb2
from miles.services.controller.errors import ConflictError


class SharedFolderError(ConflictError):
    """Another job that has not ended writes the same folder, or one above or below it."""

    def __init__(self, mine: Output, other: Output, job: job_pb2.Job) -> None:
        state = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
        super().__init__(
            f"{mine.key} = {mine.place}, but job {job.job_id} ({state}) writes to {other.key} = {other.place}; choose "
            "another folder, or wait until that job has ended"
        )


class EarlierRunError(ConflictError):
    """The run folder of a new job is that of an earlier run, which this Redis need not know."""


def refuse_earlier(job: job_pb2.Job) -> None:
    """Raise EarlierRunError when the run folder says that it is another job's."""
    run_dir = json.loads(job.config_json).get("run_dir")
    if not run_dir:
        return
    folder = locate(run_dir).path
    try:
        owner = read_owner(folder)
    except FolderTakenError as error:
        raise EarlierRunError(f"run_dir: {error}") from error
    if owner is not None and owner.job_id != job.job_id:
        way_out = f"choose another folder, or delete {folder / NAME} to go on from what is in it"
        raise EarlierRunError(f"run_dir = {folder}, but that is {owner}; {way_out}")


def refuse_shared(job: job_pb2.Job, live: Iterable[job_pb2.Job]) -> None:
    """Raise SharedFolderError when one of the live jobs has a folder in common with a job; follows links on disk."""
    mine = _outputs(job)
    for other in live:
        if other.job_id != job.job_id and (found := shared(mine, _outputs(other))) is not None:
            raise SharedFolderError(*found, other)


def _outputs(job: job_pb2.Job) -> list[Output]:
    try:
        return outputs_of(json.loads(job.config_json))
    except (ValueError, TypeError):
        return []  # it names no folders, and fails by itself when it runs
