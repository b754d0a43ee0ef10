"""What becomes of a job whose command is given again: pure rules over its record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from miles.config.resume_rules import changes
from miles.rpc.gen import job_pb2
from miles.services.controller.jobs.records import ENDED


def may_go_on(job: job_pb2.Job, settings: Mapping[str, Any], running: str | None) -> bool:
    """Return whether a job goes on with these settings (flat): unless it runs, or has nothing left to do.

    `running` is the id of the job that runs.
    """
    if job.state == job_pb2.JOB_STATE_SUCCEEDED:
        return _asks_for_more(job, settings)
    return job.job_id != running


def go_on_with(job: job_pb2.Job, settings: Mapping[str, Any]) -> job_pb2.JobEvent | None:
    """Give a job other settings, and queue it if it has ended; returns the event to record with it."""
    words = ", ".join(map(str, changes(json.loads(job.config_json), settings)))
    job.config_json = json.dumps(settings)
    job.num_rollout = settings["num_rollout"] or 0  # num_epoch counts once the data is read
    if job.state not in ENDED:
        return None
    state = job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
    job.state, job.error, job.ended_unix_ns = job_pb2.JOB_STATE_QUEUED, "", 0
    reason = f"submitted again after it had {_HAD.get(state, state)}; it goes on from its newest checkpoint"
    changed = job_pb2.JobStateChanged(state=job.state, reason=f"{reason} with {words}" if words else reason)
    return job_pb2.JobEvent(job_id=job.job_id, state_changed=changed)


_HAD = {"cancelled": "been cancelled", "stopped": "been stopped"}


def _asks_for_more(job: job_pb2.Job, settings: Mapping[str, Any]) -> bool:
    """Whether settings ask for more steps than a job that has taken every step of its own has taken.

    How many steps the passes over a data set are is known when it is read, so that more passes count as more.
    """
    if settings["num_rollout"] is not None:
        return int(settings["num_rollout"]) > job.policy_version
    was = json.loads(job.config_json)
    return (settings["num_epoch"] or 0) > (was["num_epoch"] or 0)
