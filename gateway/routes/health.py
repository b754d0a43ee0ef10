"""Routes of liveness, readiness, Prometheus metrics, and descriptions of problems."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import PlainTextResponse, Response

from miles.gateway.auth import Reader
from miles.gateway.problems import KINDS, MEDIA_TYPE, Problem, ProblemDocument
from miles.gateway.routes.common import Gateway, problems
from miles.gateway.telemetry import CONTENT_TYPE, Telemetry

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The gateway is alive."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """The gateway is ready: the controller answers."""

    status: Literal["ok"] = "ok"
    workers: int = Field(description="Number of healthy workers")


@router.get("/healthz", response_model=Health, operation_id="getHealth")
async def healthz() -> Health:
    """Whether the gateway is alive. Needs no key."""
    return Health()


_AWAY = {
    503: {
        "model": ProblemDocument,
        "description": KINDS["controller-away"][1],
        "content": {MEDIA_TYPE: {}},
    },
    502: {
        "model": ProblemDocument,
        "description": KINDS["controller-failed"][1],
        "content": {MEDIA_TYPE: {}},
    },
}


@router.get("/readyz", response_model=Readiness, operation_id="getReadiness", responses=_AWAY)  # type: ignore[arg-type]
async def readyz(gateway: Gateway) -> Readiness:
    """Whether the gateway is ready: the controller answers. Needs no key."""
    workers = await gateway.workers()
    return Readiness(workers=sum(worker.health == "good" for worker in workers))


@router.get(
    "/metrics",
    operation_id="getPrometheusMetrics",
    response_class=PlainTextResponse,
    responses={
        200: {"description": "Prometheus text format", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **problems(),
    },
)
async def prometheus(request: Request, gateway: Gateway, caller: Reader) -> Response:
    """Metrics of the gateway, of jobs and of workers for Prometheus."""
    telemetry: Telemetry = request.app.state.telemetry
    return Response(await telemetry.exposition(gateway), media_type=CONTENT_TYPE)


@router.get("/problems/{kind}", include_in_schema=False)
async def describe_problem(kind: str) -> PlainTextResponse:
    """A sentence about a kind of problem, at the address in the `type` of a problem document."""
    if kind not in KINDS:
        raise Problem("not-found", f"there is no kind of problem named {kind!r}")
    status, title = KINDS[kind]
    return PlainTextResponse(f"{title} (status {status}). See docs/gateway.md.\n")
