"""Routes of a job's checkpoints, and of the download of their exports."""

from __future__ import annotations

import datetime
import tarfile
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field
from starlette.responses import StreamingResponse

from miles.gateway.auth import Reader
from miles.gateway.controller_client import ControllerClient
from miles.gateway.problems import Problem
from miles.gateway.routes.common import Gateway, JobId, problems
from miles.gateway.schemas import moment
from miles.rpc.gen import records_pb2

router = APIRouter(prefix="/v1/jobs", tags=["checkpoints"])

_BLOCK = tarfile.BLOCKSIZE


class ExportFile(BaseModel):
    """A file of a checkpoint in Hugging Face format."""

    name: str = Field(examples=["model.safetensors"])
    size_bytes: int


class Checkpoint(BaseModel):
    """A checkpoint."""

    step: int = Field(description="Training steps done when it was saved")
    saved_at: datetime.datetime
    state_bytes: int = Field(description="Size of the training state; 0 when only the export exists")
    hf_files: list[ExportFile] = Field(description="The weights in Hugging Face format; empty when not exported")


class CheckpointList(BaseModel):
    """Checkpoints, newest first."""

    checkpoints: list[Checkpoint]


@router.get(
    "/{job_id}/checkpoints",
    response_model=CheckpointList,
    operation_id="listCheckpoints",
    responses=problems("unknown-job"),
)
async def list_checkpoints(gateway: Gateway, caller: Reader, job_id: JobId) -> CheckpointList:
    """Checkpoints on disk."""
    return CheckpointList(
        checkpoints=[
            Checkpoint(
                step=checkpoint.step,
                saved_at=moment(checkpoint.saved_unix_ns),
                state_bytes=checkpoint.state_bytes,
                hf_files=[ExportFile(name=file.name, size_bytes=file.size_bytes) for file in checkpoint.hf_files],
            )
            for checkpoint in await gateway.controller.checkpoints(job_id)
        ]
    )


@router.get(
    "/{job_id}/checkpoints/{step}/download",
    operation_id="downloadCheckpoint",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "A tar archive of the Hugging Face folder",
            "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
        },
        **problems("unknown-job", "not-found"),
    },
)
async def download_checkpoint(
    gateway: Gateway, caller: Reader, job_id: JobId, step: Annotated[int, Path(ge=0, le=2**53)]
) -> StreamingResponse:
    """The checkpoint of a step in Hugging Face format, as a tar archive that is built while it is sent."""
    checkpoints = await gateway.controller.checkpoints(job_id)
    found = next((checkpoint for checkpoint in checkpoints if checkpoint.step == step), None)
    if found is None or not found.hf_files:
        exported = ", ".join(str(other.step) for other in checkpoints if other.hf_files) or "none yet"
        raise Problem("not-found", f"job {job_id} has no export of step {step}; steps that have one: {exported}")
    folder = f"{job_id}-step{step}"
    heads = [_head(found, folder, file) for file in found.hf_files]
    contents = sum(file.size_bytes + -file.size_bytes % _BLOCK for file in found.hf_files)
    size = sum(map(len, heads)) + contents + 2 * _BLOCK
    headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{folder}.tar"'}
    archive = _archive(gateway.controller, job_id, found, heads)
    return StreamingResponse(archive, media_type="application/x-tar", headers=headers)


def _head(checkpoint: records_pb2.Checkpoint, folder: str, file: records_pb2.ExportFile) -> bytes:
    """Return the header of a file in the archive: one block, or three for a long name."""
    entry = tarfile.TarInfo(f"{folder}/{file.name}")
    entry.size = file.size_bytes
    entry.mtime = checkpoint.saved_unix_ns // 1_000_000_000
    return entry.tobuf(tarfile.GNU_FORMAT)


async def _archive(
    controller: ControllerClient, job_id: str, checkpoint: records_pb2.Checkpoint, heads: Sequence[bytes]
) -> AsyncIterator[bytes]:
    """Yield a tar archive of the export's files, piece by piece, without holding a full file in memory."""
    for head, file in zip(heads, checkpoint.hf_files, strict=True):
        yield head
        sent = 0
        async for piece in controller.read_export(job_id, checkpoint.step, file.name):
            sent += len(piece)
            yield piece
        if sent != file.size_bytes:
            raise RuntimeError(f"{file.name} of step {checkpoint.step} changed while it was sent")
        yield bytes(-sent % _BLOCK)
    yield bytes(2 * _BLOCK)
