"""Routes of jobs: submit, list, show, and act on them."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from miles.config.schema.faults import Fault
from miles.gateway.auth import Caller, Reader, Submitter
from miles.gateway.body import read_json
from miles.gateway.config_policy import review
from miles.gateway.config_schema import body_schema, example_body, fault_documents
from miles.gateway.problems import Problem, faults_detail
from miles.gateway.routes.common import Cursor, Gateway, JobId, check_own, problems, renamed
from miles.gateway.schemas import Job, JobEntry, JobPage, JobState
from miles.rpc.gen import controller_pb2

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        pattern=r"^[!-~]+$",
        description="Any text of your own. Repeating a request with the same key has no further effect and gives the "
        "same answer, so that a request whose answer was lost can be sent again.",
        examples=["6f1c2f0e-9f43-4f0e-8f0a-0d6c7d2b9a11"],
    ),
]
_LINKS = {
    operation: {"operationId": operation, "parameters": {"job_id": "$response.body#/id"}}
    for operation in (
        *("getJob", "watchJob", "getMetrics", "getTimeline", "listSamples", "listCheckpoints", "listJobWorkers"),
        *("getStatus", "listLogs", "pauseJob", "resumeJob", "stopJob", "cancelJob", "checkpointJob"),
    )
}
"""Operations on a submitted job, for programs that read the OpenAPI document."""
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": body_schema(), "example": example_body()}},
    }
}


@router.post(
    "",
    status_code=201,
    response_model=Job,
    operation_id="submitJob",
    openapi_extra=_BODY,
    responses={
        200: {"model": Job, "description": "The job of an earlier request with the same key", "links": _LINKS},
        201: {"model": Job, "description": "The job", "links": _LINKS},
        204: {"description": "A dry run found no fault"},
        **problems(
            "malformed-body", "conflict", "body-too-large", "unsupported-media-type", "invalid-config", "key-reused"
        ),
    },
)
async def submit_job(
    request: Request,
    response: Response,
    gateway: Gateway,
    caller: Submitter,
    key: Key = None,
    dry_run: Annotated[bool, Query(description="Check the configuration and store nothing: answers 204")] = False,
) -> Any:
    """Submit a job: the settings of the command line as one flat object. All of its faults are listed."""
    body = await read_json(request)
    request_id = f"rest:{caller.name}:{key}" if key else ""
    flat = await _checked(gateway, body, request_id)
    if dry_run:
        return Response(status_code=204)
    answer = await gateway.controller.submit(
        controller_pb2.SubmitJobRequest(
            request_id=request_id, config_json=json.dumps(flat), only_new=True, submitted_by=caller.name
        )
    )
    if answer.differs:
        raise Problem(
            "key-reused",
            f"job {answer.job.job_id} was submitted with this Idempotency-Key and another configuration; "
            "send a new key with a new configuration",
        )
    response.status_code = 201 if answer.created else 200
    response.headers["Location"] = f"/v1/jobs/{answer.job.job_id}"
    return Job.of(answer.job)


async def _checked(gateway: Gateway, body: dict[str, Any], request_id: str) -> dict[str, Any]:
    """Return the configuration to submit. Raises a Problem that lists all of its faults."""
    reviewed = review(body, gateway.options, request_id)
    others = await gateway.controller.check_config(json.dumps(reviewed.flat), sorted(reviewed.refused))
    faults = [
        *reviewed.faults,
        *(Fault(fault.field, json.loads(fault.value_json), fault.problem, fault.remedy) for fault in others),
    ]
    if faults:
        documents = fault_documents(faults)
        raise Problem("invalid-config", faults_detail(documents), faults=documents)
    return reviewed.flat


@router.get("", response_model=JobPage, operation_id="listJobs", responses=problems("unknown-cursor"))
async def list_jobs(
    gateway: Gateway,
    caller: Reader,
    state: Annotated[list[JobState] | None, Query(description="Only jobs in one of these states")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Cursor = "",
) -> JobPage:
    """Jobs, newest first."""
    with renamed("invalid-request", "unknown-cursor"):
        page = await gateway.controller.jobs([item.to_proto() for item in state or ()], limit, cursor)
    return JobPage(jobs=[JobEntry.of(job) for job in page.jobs], next_cursor=page.next_page_token or None)


@router.get("/{job_id}", response_model=Job, operation_id="getJob", responses=problems("unknown-job"))
async def get_job(gateway: Gateway, caller: Reader, job_id: JobId) -> Response:
    """One job, with its configuration and results."""
    return Response(await gateway.encoded_job(job_id), media_type="application/json")


_ACTIONS = {
    "pause": (controller_pb2.JOB_ACTION_PAUSE, "Pause the job after its current activity; its workers stay loaded."),
    "resume": (
        controller_pb2.JOB_ACTION_RESUME,
        "Continue a paused job, or resume one that failed or was stopped from its newest checkpoint.",
    ),
    "stop": (controller_pb2.JOB_ACTION_STOP, "Save a checkpoint and end the job, so that it can be resumed."),
    "cancel": (controller_pb2.JOB_ACTION_CANCEL, "End the job for good, without saving."),
    "checkpoint": (
        controller_pb2.JOB_ACTION_CHECKPOINT,
        "Save a checkpoint and continue: after the current step, or now when the job is paused.",
    ),
}


def _add_action(name: str, action: controller_pb2.JobAction.ValueType, description: str) -> None:
    async def act(gateway: Gateway, caller: Submitter, job_id: JobId, key: Key = None) -> Job:
        return await _act(gateway, caller, job_id, action, key)

    router.add_api_route(
        f"/{{job_id}}/{name}",
        act,
        methods=["POST"],
        operation_id=f"{name}Job",
        summary=f"{name.capitalize()} job",
        description=description,
        status_code=202,
        response_model=Job,
        responses=problems("unknown-job", "not-possible-now", "key-reused"),
    )


for _name, (_action, _description) in _ACTIONS.items():
    _add_action(_name, _action, _description)


async def _act(
    gateway: Gateway, caller: Caller, job_id: str, action: controller_pb2.JobAction.ValueType, key: str | None
) -> Job:
    """Request an action; return the job as it is now, which may be before the action has taken effect."""
    await check_own(gateway, caller, job_id)
    operation = f"rest:{caller.name}:{key}" if key else ""
    with renamed("conflict", "key-reused"):
        changed = await gateway.controller.control(job_id, action, operation)
    gateway.forget(job_id)
    return Job.of(changed)
