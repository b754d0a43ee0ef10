"""Route of the current state of a job's run."""

from __future__ import annotations

import datetime

from fastapi import APIRouter
from pydantic import BaseModel, Field

from miles.gateway.auth import Reader
from miles.gateway.routes.common import Gateway, JobId, problems
from miles.gateway.schemas import Wait, moment
from miles.gateway.speculation import EngineSpeculation, engine_speculation
from miles.rpc.gen import controller_pb2
from miles.telemetry.redaction import redact

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


class RunningGroup(BaseModel):
    """A group that a worker is generating."""

    group_id: int
    worker: str = Field(description="Worker that generates it", examples=["rollout-0"])
    attempt: int = Field(description="Number of this lease of the group; above 1 the group was leased before")
    since: datetime.datetime | None = Field(default=None, description="When it was leased to the worker")
    evaluation: bool = Field(description="Whether it belongs to an evaluation, whose groups are numbered separately")


class ReadyGroup(BaseModel):
    """A finished group that waits for training."""

    group_id: int
    oldest_version: int = Field(description="Oldest version among its tokens")


class WorkerActivity(BaseModel):
    """The current activity of a worker for the job, or what it waits for."""

    worker: str = Field(examples=["trainer-0"])
    activity: str | None = Field(default=None, description="Current activity; null while it waits", examples=["train"])
    waiting_for: str | None = Field(
        default=None, description="What it waits for; null while it has an activity", examples=["groups of step 3"]
    )
    since: datetime.datetime


class RunStatus(BaseModel):
    """The current state of a job's run."""

    phase: str = Field(
        description="queued, starting, gathering, loading, collecting, training, publishing, evaluating, saving, "
        "paused, recovering, ending or ended",
        examples=["collecting"],
    )
    waiting_for: str | None = Field(
        default=None, description="What it waits for", examples=["4 of 16 groups of step 3"]
    )
    since: datetime.datetime
    step: int = Field(description="Current training step, from 0")
    active_version: int | None = Field(default=None, description="Version that engines serve; null before the first")
    newest_version: int = Field(description="Newest version that the trainer published")
    batch_size: int = Field(description="Groups per training step")
    running: list[RunningGroup] = Field(description="Groups being generated")
    ready: list[ReadyGroup] = Field(description="Groups that wait to be trained on")
    pending: int = Field(description="Preempted groups that wait for a worker")
    training: int = Field(description="Groups in the current training step")
    consumed: int = Field(description="Groups trained on so far")
    holds: list[str] = Field(description="Reasons, other than the staleness bound, why no group is leased")
    workers: list[WorkerActivity]
    waits: list[Wait] = Field(description="Everything that it waits for, the most telling first")
    jobs_ahead: int = Field(description="Jobs that run before this one")
    speculation: list[EngineSpeculation] = Field(description="Speculative decoding of each engine; empty without it")


@router.get("/{job_id}/status", response_model=RunStatus, operation_id="getStatus", responses=problems("unknown-job"))
async def get_status(gateway: Gateway, caller: Reader, job_id: JobId) -> RunStatus:
    """The current activity of the run and of each worker, what they wait for, and the state of the groups."""
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
        waits=[Wait.of(wait) for wait in run.waits],
        jobs_ahead=run.jobs_ahead,
        speculation=[engine_speculation(engine) for engine in run.speculation],
    )


def _running(group: controller_pb2.RunningGroup) -> RunningGroup:
    return RunningGroup(
        group_id=group.group_id,
        worker=group.worker_id,
        attempt=group.attempt,
        since=moment(group.since_unix_ns) if group.since_unix_ns else None,
        evaluation=group.evaluation,
    )


def _doing(worker: controller_pb2.WorkerActivity) -> WorkerActivity:
    return WorkerActivity(
        worker=worker.worker_id,
        activity=worker.activity or None,
        waiting_for=redact(worker.waiting_for) or None,
        since=moment(worker.since_unix_ns),
    )
