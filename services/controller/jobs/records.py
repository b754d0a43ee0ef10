"""Reads job records from Redis; one that cannot be read is a failed job, so that it is seen and stops nobody else."""

from __future__ import annotations

import functools
import json
import logging

from google.protobuf.message import DecodeError

from miles.rpc.gen import job_pb2

logger = logging.getLogger(__name__)


ENDED = frozenset(
    {job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED, job_pb2.JOB_STATE_STOPPED}
)


def read_record(job_id: str, data: bytes | None) -> job_pb2.Job:
    """Return the record stored for a job. Without settings it stands for one that cannot be read."""
    try:
        if data is None:
            raise ValueError("it is not there")
        job = job_pb2.Job.FromString(data)
        if job.job_id != job_id:
            raise ValueError(f"it is that of job {job.job_id!r}")
        if job.state not in ENDED and not isinstance(json.loads(job.config_json), dict):
            raise ValueError("its settings are not an object")
    except (DecodeError, ValueError, RecursionError) as error:
        problem = f"the record of job {job_id} in Redis cannot be read ({error}); submit it as a new job"
        _say_once(problem)
        return job_pb2.Job(job_id=job_id, name=job_id, state=job_pb2.JOB_STATE_FAILED, error=problem, config_json="{}")
    return job


@functools.lru_cache(1000)
def _say_once(problem: str) -> None:
    logger.error("%s", problem)


def is_unreadable(job: job_pb2.Job) -> bool:
    """Return whether a record stands for one that could not be read."""
    return job.config_json == "{}"
