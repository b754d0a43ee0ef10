"""Routes of the versions of a job's weights, and of the version that each engine holds."""

from __future__ import annotations

import datetime
import json
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from miles.gateway.auth import Reader, Submitter
from miles.gateway.routes.common import Gateway, JobId, check_own, problems
from miles.gateway.schemas import moment
from miles.gateway.speculation import VersionAcceptance, recorded_acceptance
from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.telemetry.redaction import redact

router = APIRouter(prefix="/v1/jobs", tags=["versions"])

Stream = Literal["policy", "draft"]


class WeightVersion(BaseModel):
    """A version of the weights."""

    stream: Stream
    version: int = Field(description="Training step after which it was published", examples=[12])
    state: Literal["allocated", "prepared", "activating", "active", "retired", "failed"]
    size_bytes: int = Field(description="Size of the weights")
    written_bytes: int = Field(
        description="Bytes that the trainer wrote; less than the size when it wrote only changes"
    )
    active_at: datetime.datetime | None = Field(default=None, description="When engines began to serve it")
    transports: list[str] = Field(
        description="Transports by which it is available, the best first", examples=[["shared_memory"]]
    )
    stage_s: dict[str, float] = Field(
        description="Seconds the trainer took over each stage", examples=[{"allocate": 0.01, "copy": 0.4}]
    )


class EngineWeights(BaseModel):
    """The weights that an engine holds."""

    engine: str = Field(examples=["rollout-0"])
    stream: Stream
    state: Literal["empty", "serving", "prefetched", "quarantined"]
    attached: bool = Field(description="Whether it is connected to the weight-sync service")
    version: int | None = Field(default=None, description="Version it serves; null when it must not serve")
    since: datetime.datetime | None = Field(
        default=None, description="Since when it serves that version, or is quarantined"
    )
    size_bytes: int = Field(description="Size of what it serves")
    transport: str | None = Field(default=None, description="How it got its last version")
    stage_s: dict[str, float] = Field(description="Seconds that its last order of each kind took")
    pause_s: float = Field(description="Pause time of its last swap: time without generation, in seconds")
    last_error: str | None = None


class VersionList(BaseModel):
    """Versions that are stored, oldest first, and engines."""

    versions: list[WeightVersion]
    engines: list[EngineWeights]
    acceptance: list[VersionAcceptance] = Field(
        description="What became of drafts in all engines, by pair of versions: the newest pairs, oldest first; empty "
        "without speculative decoding"
    )


class CheckResult(BaseModel):
    """The result of comparing the engines' weights with the trainer's."""

    version: int = Field(description="The active version")
    equal: int = Field(description="Engines that hold exactly what the trainer sent")
    quarantined: int = Field(description="Engines that do not, or did not answer in time")
    engines: list[EngineWeights]


@router.get(
    "/{job_id}/versions",
    response_model=VersionList,
    operation_id="listVersions",
    responses=problems("unknown-job", "not-possible-now"),
)
async def list_versions(gateway: Gateway, caller: Reader, job_id: JobId) -> VersionList:
    """Versions of the weights, the version that each engine holds since when, and how many drafts were accepted."""
    answer = await gateway.controller.versions(job_id)
    return VersionList(
        versions=[_version(version) for version in answer.versions],
        engines=[_engine(engine) for engine in answer.engines],
        acceptance=recorded_acceptance(json.loads((await gateway.job(job_id)).summary_json or "{}")),
    )


@router.post(
    "/{job_id}/versions/check",
    response_model=CheckResult,
    operation_id="checkVersions",
    responses=problems("unknown-job", "not-possible-now"),
)
async def check_versions(gateway: Gateway, caller: Submitter, job_id: JobId) -> CheckResult:
    """Make every engine compare its weights with those that the trainer sent; engines that differ are quarantined.

    Not possible while a weight update is in progress.
    """
    await check_own(gateway, caller, job_id)
    answer = await gateway.controller.check_versions(job_id)
    return CheckResult(
        version=answer.version,
        equal=answer.equal,
        quarantined=answer.quarantined,
        engines=[_engine(engine) for engine in answer.engines],
    )


def _version(version: weightsync_pb2.VersionStatus) -> WeightVersion:
    return WeightVersion(
        stream=_stream(version.version.stream),
        version=version.version.version,
        state=weightsync_pb2.VersionState.Name(version.state).removeprefix("VERSION_STATE_").lower(),  # type: ignore[arg-type]
        size_bytes=version.total_bytes,
        written_bytes=version.written_bytes,
        active_at=moment(version.active_unix_ns) if version.active_unix_ns else None,
        transports=[_transport(kind) for kind in version.transports],
        stage_s=dict(version.stage_s),
    )


def _engine(engine: weightsync_pb2.EngineStatus) -> EngineWeights:
    known = engine.transport != weightsync_pb2.TRANSPORT_KIND_UNSPECIFIED
    return EngineWeights(
        engine=engine.engine_id,
        stream=_stream(engine.stream),
        state=weightsync_pb2.EngineState.Name(engine.state).removeprefix("ENGINE_STATE_").lower(),  # type: ignore[arg-type]
        attached=engine.attached,
        version=engine.version if engine.HasField("version") else None,
        since=moment(engine.since_unix_ns) if engine.since_unix_ns else None,
        size_bytes=engine.total_bytes,
        transport=_transport(engine.transport) if known else None,
        stage_s=dict(engine.stage_s),
        pause_s=engine.pause_s,
        last_error=redact(engine.last_error) or None,
    )


def _stream(stream: policy_pb2.WeightStream.ValueType) -> Stream:
    return "draft" if stream == policy_pb2.WEIGHT_STREAM_DRAFT else "policy"


def _transport(kind: weightsync_pb2.TransportKind.ValueType) -> str:
    return weightsync_pb2.TransportKind.Name(kind).removeprefix("TRANSPORT_KIND_").lower()
