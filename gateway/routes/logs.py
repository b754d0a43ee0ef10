"""Routes of the logs of the processes that serve a job."""

from __future__ import annotations

import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field

from miles.gateway.auth import Reader
from miles.gateway.routes.common import Gateway, JobId, problems, renamed
from miles.gateway.schemas import moment
from miles.rpc.gen import records_pb2

router = APIRouter(prefix="/v1/jobs", tags=["logs"])


class LogFile(BaseModel):
    """The log of one process."""

    name: str = Field(description="Name of the process", examples=["rollout-0"])
    size_bytes: int
    modified_at: datetime.datetime


class LogList(BaseModel):
    """Logs, by name."""

    logs: list[LogFile]


class LogText(BaseModel):
    """Part of a log: complete lines, with secrets redacted."""

    name: str
    text: str
    offset: int = Field(description="Start of the text, in bytes")
    next_offset: int = Field(description="Where to continue reading, in bytes")
    size_bytes: int = Field(description="Size of the log now")


@router.get("/{job_id}/logs", response_model=LogList, operation_id="listLogs", responses=problems("unknown-job"))
async def list_logs(gateway: Gateway, caller: Reader, job_id: JobId) -> LogList:
    """Logs of the services that serve the job, one per process, restricted to the time while the job ran."""
    return LogList(
        logs=[
            LogFile(name=file.name, size_bytes=file.size_bytes, modified_at=moment(file.modified_unix_ns))
            for file in await gateway.controller.logs(job_id)
        ]
    )


@router.get(
    "/{job_id}/logs/{name}",
    response_model=LogText,
    operation_id="readLog",
    responses=problems("unknown-job", "not-found"),
)
async def read_log(
    gateway: Gateway,
    caller: Reader,
    job_id: JobId,
    name: Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", examples=["rollout-0"])],
    offset: Annotated[
        int | None, Query(ge=0, le=2**53, description="Where to start, in bytes; without it, the end of the log")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1 << 20, description="Maximum number of bytes")] = 64 << 10,
) -> LogText:
    """Part of a log. To follow it, request again with offset = next_offset."""
    await gateway.job(job_id)
    request = records_pb2.ReadLogRequest(job_id=job_id, name=name, offset_bytes=offset, limit_bytes=limit)
    with renamed("unknown-job", "not-found"):
        piece = await gateway.controller.read_log(request)
    return LogText(
        name=name,
        text=piece.text,
        offset=piece.offset_bytes,
        next_offset=piece.next_offset_bytes,
        size_bytes=piece.size_bytes,
    )
