"""Routes of the samples that a job trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field

from miles.gateway.auth import Reader
from miles.gateway.routes.common import Gateway, JobId, problems, renamed
from miles.gateway.schemas import finite
from miles.rpc.gen import records_pb2, sample_pb2

router = APIRouter(prefix="/v1/jobs", tags=["samples"])


class VersionSpan(BaseModel):
    """The version of the weights that generated the response tokens from `start` to `end` − 1."""

    version: int
    start: int
    end: int


class LogProbDiff(BaseModel):
    """The mismatch |trainer's − engine's log-probability| over trained tokens."""

    mean: float
    max: float


class Sample(BaseModel):
    """A sample as a training step saw it."""

    step: int = Field(description="Training step, from 0")
    group_id: int = Field(description="Group of the samples of one prompt")
    index: int = Field(description="Place within the group")
    prompt: str | list[dict[str, Any]] = Field(description="Text, or chat messages", examples=["1 + 2 ="])
    response: str = Field(examples=[" 3"])
    label: str | None = Field(default=None, description="Reference answer for the reward", examples=["3"])
    reward: float | None = Field(default=None, description="The number trained on; null when it was not scored")
    reward_parts: dict[str, float] = Field(description="The reward's parts, when it has several")
    status: Literal["unspecified", "pending", "completed", "truncated", "aborted", "failed"]
    response_length: int = Field(description="Tokens of the response")
    versions: list[VersionSpan] = Field(description="Which version of the weights generated which tokens")
    log_prob_diff: LogProbDiff | None = Field(default=None, description="Null when one side is not known")
    advantage: float | None = Field(default=None, description="Mean over trained tokens; null when not trained on")
    cut: bool = Field(description="Prompt or response was too long to be recorded completely")


class TokenTable(BaseModel):
    """Per-token values of a response: lists as long as `ids`, or empty when they are not known."""

    ids: list[int]
    texts: list[str] = Field(description="Text of each token; empty for one whose text is completed by the next")
    train_log_probs: list[float | None] = Field(description="The trainer's log-probabilities, in nats")
    rollout_log_probs: list[float | None] = Field(description="The engine's log-probabilities, in nats")
    advantages: list[float | None]
    mask: list[int] = Field(description="1 for tokens that were trained on, 0 for others")
    skipped: int = Field(description="Tokens left out in the middle of a long response")
    skipped_at: int = Field(description="Number of tokens in the lists before those left out")


class SampleDetail(Sample):
    """A sample with its tokens."""

    tokens: TokenTable | None = Field(default=None, description="Null when the trainer recorded none")


class SamplePage(BaseModel):
    """A page of samples, newest step first. It may be short or empty although more pages follow."""

    samples: list[Sample]
    next_cursor: str | None = Field(default=None, description="Cursor of the next page; null on the last")


Cursor = Annotated[
    str,
    Query(pattern=r"^(\d{1,15}\.\d{0,15}\.(-1|\d{1,9}))?$", description="`next_cursor` of the page before"),
]
Reward = Annotated[float | None, Query(ge=-1e12, le=1e12)]


@router.get(
    "/{job_id}/samples",
    response_model=SamplePage,
    operation_id="listSamples",
    responses=problems("unknown-job"),
)
async def list_samples(
    gateway: Gateway,
    caller: Reader,
    job_id: JobId,
    step: Annotated[int | None, Query(ge=0, le=2**53, description="Only samples of this training step")] = None,
    min_reward: Reward = None,
    max_reward: Reward = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Cursor = "",
) -> SamplePage:
    """Samples with prompt, response, reward, versions and log-probability difference; a few groups of each step."""
    request = records_pb2.ListSamplesRequest(
        job_id=job_id, step=step, min_reward=min_reward, max_reward=max_reward, page_size=limit, page_token=cursor
    )
    page = await gateway.controller.samples(request)
    return SamplePage(samples=[_sample(record) for record in page.samples], next_cursor=page.next_page_token or None)


@router.get(
    "/{job_id}/samples/{step}/{group_id}/{index}",
    response_model=SampleDetail,
    operation_id="getSample",
    responses=problems("unknown-job", "not-found"),
)
async def get_sample(
    gateway: Gateway,
    caller: Reader,
    job_id: JobId,
    step: Annotated[int, Path(ge=0, le=2**53, description="Training step, from 0")],
    group_id: Annotated[int, Path(ge=0, le=2**53, description="The prompt group")],
    index: Annotated[int, Path(ge=0, lt=2**32, description="Place within the group")],
) -> SampleDetail:
    """One sample with the log-probabilities, advantage and text of each token of its response."""
    await gateway.job(job_id)
    request = records_pb2.GetSampleRequest(job_id=job_id, step=step, group_id=group_id, index=index)
    with renamed("unknown-job", "not-found"):
        answer = await gateway.controller.sample(request)
    tokens = _tokens(answer.tokens) if answer.HasField("tokens") else None
    return SampleDetail(**_sample(answer.sample).model_dump(), tokens=tokens)


def _tokens(table: records_pb2.TokenTable) -> TokenTable:
    return TokenTable(
        ids=list(table.ids),
        texts=list(table.texts),
        train_log_probs=_finite(table.train_log_probs),
        rollout_log_probs=_finite(table.rollout_log_probs),
        advantages=_finite(table.advantages),
        mask=list(table.mask),
        skipped=table.skipped,
        skipped_at=table.skipped_at,
    )


def _finite(values: Iterable[float]) -> list[float | None]:
    return [None if (kept := finite(value)) is None else round(kept, 6) for value in values]


def _sample(record: records_pb2.SampleRecord) -> Sample:
    difference = None
    if record.HasField("log_prob_diff_mean"):
        difference = LogProbDiff(mean=record.log_prob_diff_mean, max=record.log_prob_diff_max)
    status = sample_pb2.SampleStatus.Name(record.status).removeprefix("SAMPLE_STATUS_").lower()
    return Sample(
        step=record.step,
        group_id=record.group_id,
        index=record.index,
        prompt=json.loads(record.prompt_json),
        response=record.response,
        label=record.label if record.HasField("label") else None,
        reward=record.reward if record.HasField("reward") else None,
        reward_parts=dict(record.reward_parts),
        status=status,  # type: ignore[arg-type]
        response_length=record.response_length,
        versions=[VersionSpan(version=s.version, start=s.start, end=s.end) for s in record.weight_versions],
        log_prob_diff=difference,
        advantage=record.advantage if record.HasField("advantage") else None,
        cut=record.cut,
    )
