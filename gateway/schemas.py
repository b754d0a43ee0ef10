"""Schemas of jobs, events and workers in the REST API."""

from __future__ import annotations

import datetime
import enum
import functools
import json
from typing import Any, Literal

from pydantic import BaseModel, Field

from miles.rpc.gen import controller_pb2, job_pb2, policy_pb2, weightsync_pb2
from miles.telemetry.redaction import redact, redact_config


class JobState(enum.StrEnum):
    """The state of a job."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    RECOVERING = "recovering"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    STOPPED = "stopped"

    @classmethod
    def of(cls, state: job_pb2.JobState.ValueType) -> JobState:
        return cls(job_pb2.JobState.Name(state).removeprefix("JOB_STATE_").lower())

    def to_proto(self) -> job_pb2.JobState.ValueType:
        return job_pb2.JobState.Value(f"JOB_STATE_{self.name}")


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.STOPPED})
"""Final states, which only resuming leaves."""


class Wait(BaseModel):
    """One thing that a job waits for."""

    what: str = Field(description="What it waits for", examples=["reward service 'math' at scores:9300"])
    detail: str | None = Field(
        default=None, description="What is known of it", examples=["it cannot be reached: Connection refused"]
    )
    since: datetime.datetime
    gives_up_at: datetime.datetime | None = Field(
        default=None, description="When waiting ends by itself; null when it has no bound"
    )
    ending: str | None = Field(
        default=None, description="What happens then or, without a bound, how to end it", examples=["the job fails"]
    )
    samples: int = Field(default=0, description="Samples that wait; 0 where they are not counted")

    @classmethod
    def of(cls, wait: job_pb2.Wait) -> Wait:
        return cls(
            what=redact(wait.what),
            detail=redact(wait.detail) or None,
            since=moment(wait.since_unix_ns),
            gives_up_at=moment(wait.gives_up_unix_ns) if wait.gives_up_unix_ns else None,
            ending=wait.ending or None,
            samples=wait.samples,
        )


class JobEntry(BaseModel):
    """A job in a list."""

    id: str = Field(examples=["sums-1f0c2a9b"])
    name: str = Field(description="The setting `name`", examples=["sums"])
    state: JobState
    policy_version: int = Field(description="Training steps done", examples=[12])
    num_rollout: int = Field(description="Number of steps of the job; 0 until it is known", examples=[100])
    submitted_at: datetime.datetime
    started_at: datetime.datetime | None = Field(default=None, description="When it first ran")
    ended_at: datetime.datetime | None = None
    submitted_by: str = Field(description="Name of the API key that submitted it", examples=["alice"])
    error: str | None = Field(default=None, description="Why it failed and what to do about it")
    waits: list[Wait] = Field(description="What it waits for, the most telling first; empty once it has ended")

    @classmethod
    def of(cls, job: job_pb2.Job) -> JobEntry:
        return cls(**_entry(job))


class Job(JobEntry):
    """A job with its configuration and results."""

    config: dict[str, Any] = Field(
        description="Every setting with its value; secrets are redacted", examples=[{"rollout_batch_size": 16}]
    )
    summary: dict[str, Any] = Field(
        description="Results so far: steps, wall_s, tokens_per_s, time_share, eval.before, eval.after, checkpoint, "
        "hf_checkpoint, acceptance",
        examples=[{"steps": 12, "wall_s": 80.5, "eval": {"before": {"sums": 0.1}, "after": {"sums": 0.9}}}],
    )

    @classmethod
    def of(cls, job: job_pb2.Job) -> Job:
        return cls(**_entry(job), config=_shown_config(job.config_json), summary=json.loads(job.summary_json or "{}"))


@functools.lru_cache(maxsize=64)
def _shown_config(config_json: str) -> dict[str, Any]:
    """Return a configuration without secrets; cached, because it is long and never changes."""
    return redact_config(json.loads(config_json or "{}"))


class JobPage(BaseModel):
    """A page of jobs, newest first."""

    jobs: list[JobEntry]
    next_cursor: str | None = Field(default=None, description="Cursor of the next page; null on the last")


class StateEvent(BaseModel):
    """The job moved to another state."""

    type: Literal["state"] = "state"
    id: str = Field(examples=["1795362208645-0"])
    time: datetime.datetime
    state: JobState
    reason: str = Field(examples=["every step is done"])


class MetricsEvent(BaseModel):
    """Metrics of one training step."""

    type: Literal["metrics"] = "metrics"
    id: str
    time: datetime.datetime
    step: int = Field(description="Training step, from 0")
    values: dict[str, float | None] = Field(
        description="Value by metric name; null when it is not finite", examples=[{"train/loss": 0.12}]
    )


class LogEvent(BaseModel):
    """A log message for people."""

    type: Literal["log"] = "log"
    id: str
    time: datetime.datetime
    level: Literal["info", "warning", "error"]
    source: str = Field(examples=["controller"])
    text: str


class EndEvent(BaseModel):
    """The job has ended, and nothing follows."""

    type: Literal["end"]


Event = StateEvent | MetricsEvent | LogEvent


class Version(BaseModel):
    """The version of a weight stream that an engine serves."""

    stream: Literal["policy", "draft"]
    state: Literal["empty", "serving", "prefetched", "quarantined"]
    version: int | None = Field(default=None, description="Version it serves; null before the first")
    last_error: str | None = None


class Worker(BaseModel):
    """A process that serves jobs."""

    id: str = Field(examples=["rollout-0"])
    kind: Literal["rollout", "trainer", "trainer_node", "draft_trainer", "reward", "weightsync"]
    health: Literal["good", "stuck", "quarantined", "lost"] = Field(
        description="stuck: sends heartbeats without progress; quarantined: out of routing until it holds verified "
        "weights; lost: sends no heartbeats"
    )
    activity: str = Field(description="Current activity", examples=["generating"])
    load: dict[str, float] = Field(description="Load by name", examples=[{"running_requests": 12}])
    progress: int = Field(description="Work done so far in its own unit: tokens, samples, micro-batches")
    version: int | None = Field(default=None, description="Version of the policy it holds; null when it holds none")
    versions: list[Version] = Field(description="Versions it serves as an engine, per weight stream")
    address: str = Field(description="Where its gRPC server listens", examples=["127.0.0.1:50061"])
    gpus: int
    info: dict[str, Any] = Field(examples=[{"pid": 4711, "host": "node-1"}])
    last_seen_at: datetime.datetime
    progress_at: datetime.datetime | None = Field(default=None, description="When its progress last changed")


class WorkerList(BaseModel):
    """Workers, by id."""

    workers: list[Worker]


def event_model(event: job_pb2.JobEvent) -> Event:
    """Convert an event to its schema."""
    head: dict[str, Any] = {"id": event.event_id, "time": moment(event.unix_ns)}
    match event.WhichOneof("kind"):
        case "state_changed":
            state = JobState.of(event.state_changed.state)
            return StateEvent(**head, state=state, reason=redact(event.state_changed.reason))
        case "metrics":
            values = {name: finite(value) for name, value in sorted(event.metrics.values.items())}
            return MetricsEvent(**head, step=event.metrics.step, values=values)
        case _:
            level = job_pb2.LogLevel.Name(event.log.level).removeprefix("LOG_LEVEL_").lower()
            known = level if level in ("info", "warning", "error") else "info"
            return LogEvent(**head, level=known, source=event.log.source, text=redact(event.log.text))  # type: ignore[arg-type]


def worker_model(worker: controller_pb2.Worker, policy_version: int | None) -> Worker:
    """Convert a worker to its schema; `policy_version` is that of its job, for a trainer."""
    versions = [
        Version(
            stream=_lower(policy_pb2.WeightStream.Name(held.stream), "WEIGHT_STREAM_"),  # type: ignore[arg-type]
            state=_lower(weightsync_pb2.EngineState.Name(held.state), "ENGINE_STATE_"),  # type: ignore[arg-type]
            version=held.version if held.HasField("version") else None,
            last_error=redact(held.last_error) or None,
        )
        for held in worker.versions
    ]
    kind = _lower(controller_pb2.WorkerKind.Name(worker.registration.kind), "WORKER_KIND_")
    held = next((version.version for version in versions if version.stream == "policy"), None)
    return Worker(
        id=worker.registration.worker_id,
        kind=kind,  # type: ignore[arg-type]
        health=_lower(controller_pb2.WorkerHealth.Name(worker.health), "WORKER_HEALTH_"),  # type: ignore[arg-type]
        activity=worker.heartbeat.activity,
        load=dict(worker.heartbeat.load),
        progress=worker.heartbeat.progress,
        version=policy_version if kind == "trainer" and worker.alive else held,
        versions=versions,
        address=worker.registration.address,
        gpus=worker.registration.num_gpus,
        info=redact_config(json.loads(worker.registration.info_json or "{}")),
        last_seen_at=moment(worker.last_seen_unix_ns),
        progress_at=moment(worker.progress_unix_ns) if worker.progress_unix_ns else None,
    )


def moment(unix_ns: int) -> datetime.datetime:
    """Convert a time, to the microsecond."""
    seconds, rest = divmod(unix_ns, 1_000_000_000)
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).replace(microsecond=rest // 1000)


def finite(value: float) -> float | None:
    """Return the value, or None when it is not finite, which JSON cannot express."""
    return value if value - value == 0.0 else None


def _entry(job: job_pb2.Job) -> dict[str, Any]:
    return {
        "id": job.job_id,
        "name": job.name,
        "state": JobState.of(job.state),
        "policy_version": job.policy_version,
        "num_rollout": job.num_rollout,
        "submitted_at": moment(job.submitted_unix_ns),
        "started_at": moment(job.started_unix_ns) if job.started_unix_ns else None,
        "ended_at": moment(job.ended_unix_ns) if job.ended_unix_ns else None,
        "submitted_by": job.submitted_by,
        "error": redact(job.error) or None,
        "waits": [Wait.of(wait) for wait in job.waits],
    }


def _lower(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()
