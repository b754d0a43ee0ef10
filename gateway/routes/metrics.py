"""Routes of a job's per-step metrics and of its timeline of activities."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from starlette.responses import Response

from miles.gateway.auth import Reader
from miles.gateway.routes.common import Gateway, JobId, problems
from miles.gateway.schemas import finite
from miles.rpc.gen import records_pb2

router = APIRouter(prefix="/v1/jobs", tags=["metrics"])

_MAX_STEP = 2**53
Name = Annotated[str, Query(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Series(BaseModel):
    """One metric over training steps. The three lists have the same length."""

    name: str = Field(examples=["rollout/raw_reward"])
    steps: list[int] = Field(description="Training steps, ascending", examples=[[0, 1, 2]])
    values: list[float | None] = Field(
        description="Null where no finite number was recorded", examples=[[0.1, None, 0.3]]
    )
    unix_s: list[float] = Field(
        description="When each was recorded, in seconds since 1970",
        examples=[[1795362208.1, 1795362209.2, 1795362210.3]],
    )


class MetricSet(BaseModel):
    """The requested metrics."""

    series: list[Series]
    names: list[str] = Field(description="Every metric the job has", examples=[["rollout/raw_reward", "train/loss"]])
    newest_step: int | None = Field(default=None, description="Newest step with metrics; null before the first")


class Span(BaseModel):
    """The time span of one activity."""

    worker: str | None = Field(default=None, description="Worker with this activity; null for the run as a whole")
    activity: str = Field(
        description="Of the run: generate, train or sync. Of a worker: generate, score, load, train, export, save or "
        "activate",
        examples=["train"],
    )
    step: int = Field(description="Current training step when it ended")
    start_unix_s: float
    end_unix_s: float


class Timeline(BaseModel):
    """Activities in the order in which they ended. They may overlap."""

    spans: list[Span]


@router.get("/{job_id}/metrics", response_model=MetricSet, operation_id="getMetrics", responses=problems("unknown-job"))
async def get_metrics(
    gateway: Gateway,
    caller: Reader,
    job_id: JobId,
    name: Annotated[
        list[Name] | None,
        Query(max_length=100, description="Metrics to return, by name or as `prefix*`; all when none is given"),
    ] = None,
    start: Annotated[int, Query(ge=0, le=_MAX_STEP, description="First training step")] = 0,
    end: Annotated[
        int | None, Query(ge=0, le=_MAX_STEP, description="Last training step, included; the newest when not given")
    ] = None,
    step: Annotated[
        int, Query(ge=1, le=1_000_000, description="Return one mean value for this many training steps")
    ] = 1,
) -> Response:
    """Per-step metrics over a range of training steps."""
    request = records_pb2.ListMetricsRequest(
        job_id=job_id, names=sorted(set(name or ())), first_step=start, stride=step
    )
    if end is not None:
        request.last_step = end
    return Response(await gateway.encoded_metrics(request, _encoded), media_type="application/json")


def _encoded(answer: records_pb2.ListMetricsResponse) -> bytes:
    made = MetricSet(
        series=[
            Series(
                name=series.name,
                steps=list(series.steps),
                values=[finite(value) for value in series.values],
                unix_s=list(series.unix_s),
            )
            for series in answer.series
        ],
        names=list(answer.names),
        newest_step=answer.newest_step if answer.HasField("newest_step") else None,
    )
    return made.model_dump_json().encode()


@router.get(
    "/{job_id}/timeline", response_model=Timeline, operation_id="getTimeline", responses=problems("unknown-job")
)
async def get_timeline(
    gateway: Gateway,
    caller: Reader,
    job_id: JobId,
    after_unix_s: Annotated[float, Query(ge=0, le=1e12, description="Only spans that end after this time")] = 0.0,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Maximum number, of the newest")] = 1000,
) -> Timeline:
    """The activities of the run and of each worker over time."""
    request = records_pb2.ListActivityRequest(job_id=job_id, after_unix_s=after_unix_s, limit=limit)
    return Timeline(
        spans=[
            Span(
                worker=span.worker_id or None,
                activity=span.activity,
                step=span.step,
                start_unix_s=span.start_unix_s,
                end_unix_s=span.end_unix_s,
            )
            for span in await gateway.controller.activity(request)
        ]
    )
