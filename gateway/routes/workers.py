"""Routes of workers: health, load and weight version of every worker process."""

from __future__ import annotations

from fastapi import APIRouter

from miles.gateway.auth import Reader
from miles.gateway.routes.common import Gateway, JobId, problems
from miles.gateway.schemas import ENDED, JobState, WorkerList

router = APIRouter(prefix="/v1", tags=["workers"])


@router.get("/workers", response_model=WorkerList, operation_id="listWorkers", responses=problems())
async def list_workers(gateway: Gateway, caller: Reader) -> WorkerList:
    """All workers: rollouts, trainers, reward and weight-sync services, with health, load and weight version."""
    return WorkerList(workers=await gateway.workers())


@router.get(
    "/jobs/{job_id}/workers",
    response_model=WorkerList,
    operation_id="listJobWorkers",
    responses=problems("unknown-job"),
)
async def list_job_workers(gateway: Gateway, caller: Reader, job_id: JobId) -> WorkerList:
    """Workers that serve the job, including recently lost ones; none when it is queued or has ended."""
    state = JobState.of((await gateway.job(job_id)).state)
    if state in ENDED or state is JobState.QUEUED:
        return WorkerList(workers=[])
    return WorkerList(workers=await gateway.workers())
