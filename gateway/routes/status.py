"""What a job's run does now, and what it waits for."""

from __future__ import annotations

import datetime

from fastapi import APIRouter
from pydantic import BaseModel, Field

from miles.gateway.auth import Reader
from miles.gateway.routes.common import Gateway, JobId, problems
from miles.gateway.schemas import moment
from miles.rpc.gen import controller_pb2
from miles.telemetry.redaction import redact

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


class RunningGroup(BaseModel):
    """A group in the hands of a worker."""

    group_id: int
    worker: str = Field(description="Worker that generates it", examples=["rollout-0"])
    attempt: int = Field(description="Number of this lease of the group; more than the first means it came back")
    since: datetime.datetime | None = Field(default=None, description="When the worker got it")
    evaluation: bool = Field(description="Of an evaluation; numbered apart from groups of training")


class ReadyGroup(BaseModel):
    """A group that is finished and waits to be trained on."""

    group_id: int
    oldest_version: int = Field(description="Oldest version among its tokens")


class WorkerDoing(BaseModel):
    """What a worker does for the job, or waits for."""

    worker: str = Field(examples=["trainer-0"])
    activity: str | None = Field(default=None, description="What it does; null while it waits", examples=["train"])
    waiting_for: str | None = Field(
        default=None, description="What it waits for; null while it does something", examples=["groups of step 3"]
    )
    since: datetime.datetime


class RunStatus(BaseModel):
    """A job's run as it is now."""

    phase: str = Field(
        description="queued, starting, loading, collecting, training, publishing, evaluating, saving, paused, "
        "recovering, ending or ended",
        examples=["collecting"],
    )
    waiting_for: str | None = Field(
        default=None, description="What it waits for", examples=["4 of 16 groups of step 3"]
    )
    since: datetime.datetime
    step: int = Field(description="Training step that is current, from 0")
    active_version: int | None = Field(default=None, description="Version that engines serve; null before the first")
    newest_version: int = Field(description="Version that the trainer handed over last")
    batch_size: int = Field(description="Groups that a training step takes")
    running: list[RunningGroup] = Field(description="Groups being generated")
    ready: list[ReadyGroup] = Field(description="Groups that wait to be trained on")
    pending: int = Field(description="Groups that came back unfinished and wait for a worker")
    training: int = Field(description="Groups that the trainer works on")
    consumed: int = Field(description="Groups trained on so far")
    holds: list[str] = Field(description="Why no group is handed out, if there are reasons beside the staleness bound")
    workers: list[WorkerDoing]
    jobs_ahead: int = Field(description="Jobs that run before this one")


@router.get("/{job_id}/status", response_model=RunStatus, operation_id="getStatus", responses=problems("unknown-job"))
async def get_status(gateway: Gateway, caller: Reader, job_id: JobId) -> RunStatus:
    """What the run and each of its workers do or wait for, since when, and which groups are where."""
    run = await gateway.run(job_id)
    return RunStatus(
        phase=run.phase,
        waiting_for=redact(run.waiting_for) or None,
        since=moment(run.since_unix_ns),
        step=run.step,
        active_version=run.active_version if run.HasField("active_version") else None,
        newest_version=run.newest_version,
        batch_size=run.batch_size,
        running=[_running(group) for group in run.running],
        ready=[ReadyGroup(group_id=group.group_id, oldest_version=group.oldest_version) for group in run.ready],
        pending=run.pending,
        training=run.training,
        consumed=run.consumed,
        holds=list(run.holds),
        workers=[_doing(worker) for worker in run.workers],
        jobs_ahead=run.jobs_ahead,
    )


def _running(group: controller_pb2.RunningGroup) -> RunningGroup:
    return RunningGroup(
        group_id=group.group_id,
        worker=group.worker_id,
        attempt=group.attempt,
        since=moment(group.since_unix_ns) if group.since_unix_ns else None,
        evaluation=group.evaluation,
    )


def _doing(worker: controller_pb2.WorkerActivity) -> WorkerDoing:
    return WorkerDoing(
        worker=worker.worker_id,
        activity=worker.activity or None,
        waiting_for=redact(worker.waiting_for) or None,
        since=moment(worker.since_unix_ns),
    )
