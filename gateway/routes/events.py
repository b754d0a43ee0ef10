"""Route of a job's events."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Header, Query
from starlette.responses import StreamingResponse

from miles.gateway.auth import Reader
from miles.gateway.problems import Problem
from miles.gateway.routes.common import Gateway, JobId, problems

router = APIRouter(prefix="/v1/jobs", tags=["events"])

_EVENT_ID = r"^(\d{1,15}-\d{1,15})?$"
_EVENT = {
    "type": "object",
    "description": "One event of the stream",
    "properties": {
        "id": {"type": "string", "description": "To continue after this event, send it as Last-Event-ID"},
        "event": {"enum": ["state", "metrics", "log", "end"]},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {
                "oneOf": [
                    {"$ref": f"#/components/schemas/{name}"}
                    for name in ("StateEvent", "MetricsEvent", "LogEvent", "EndEvent")
                ]
            },
        },
    },
    "required": ["event", "data"],
}
_EXAMPLE = (
    'id: 1795362208645-0\nevent: state\ndata: {"type":"state","id":"1795362208645-0",'
    '"time":"2026-01-01T00:00:00Z","state":"running","reason":"at step 0"}\n\n'
)


@router.get(
    "/{job_id}/events",
    operation_id="watchJob",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Server-sent events named state, metrics and log, whose data is an Event; a last one named "
            "end when the job has ended. Comments are sent while there are no events.",
            "content": {"text/event-stream": {"schema": _EVENT, "example": _EXAMPLE}},
        },
        **problems("unknown-job", "too-many-watchers"),
    },
)
async def watch_job(
    gateway: Gateway,
    caller: Reader,
    job_id: JobId,
    last_event_id: Annotated[
        str, Header(pattern=_EVENT_ID, description="Only events after this one; browsers send it by themselves")
    ] = "",
    after: Annotated[
        str, Query(pattern=_EVENT_ID, description="The same, for a first request; the header takes precedence")
    ] = "",
    follow: Annotated[bool, Query(description="Continue with events as they happen")] = True,
) -> StreamingResponse:
    """The job's past events, then new ones as they happen, as server-sent events, until the job has ended."""
    await gateway.job(job_id)
    options = gateway.options
    if gateway.feeds.watchers >= options.max_watchers:
        raise Problem(
            "too-many-watchers",
            f"{options.max_watchers} event streams are open; close some, or try again later",
            headers={"Retry-After": "10"},
        )
    events = gateway.feeds.events(
        job_id,
        last_event_id or after,
        heartbeat_s=options.heartbeat_s,
        end_s=time.monotonic() + options.stream_s,
        follow=follow,
    )
    # Proxies must neither buffer nor cache events.
    return StreamingResponse(
        events, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )
