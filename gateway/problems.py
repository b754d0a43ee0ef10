"""Errors as problem documents (RFC 9457): what is wrong, and what to change."""

from __future__ import annotations

import http
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from miles.config.schema.faults import Fault
from miles.gateway.security_headers import HEADERS

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

KINDS: Mapping[str, tuple[int, str]] = {
    "malformed-body": (400, "The body is malformed"),
    "missing-key": (401, "An API key is needed"),
    "unknown-key": (401, "The API key is not valid"),
    "not-local": (403, "Only this machine is served"),
    "missing-scope": (403, "The API key may not do this"),
    "unknown-job": (404, "There is no such job"),
    "unknown-cursor": (404, "There is no such page"),
    "not-found": (404, "There is nothing here"),
    "method-not-allowed": (405, "The method is not allowed at this address"),
    "not-possible-now": (409, "The job's state does not allow this"),
    "conflict": (409, "The request conflicts with an existing resource"),
    "body-too-large": (413, "The body is too large"),
    "unsupported-media-type": (415, "The body must be JSON"),
    "invalid-config": (422, "The configuration has faults"),
    "invalid-request": (422, "The request has faults"),
    "key-reused": (422, "The idempotency key belongs to another request"),
    "too-many-requests": (429, "Too many requests"),
    "too-many-watchers": (503, "Too many event streams"),
    "internal": (500, "Unexpected error"),
    "controller-failed": (502, "The controller could not answer"),
    "controller-away": (503, "The controller does not answer"),
}
"""Status and title by kind; the `type` of a problem document is /problems/KIND."""


class FaultDocument(BaseModel):
    """One fault of a request."""

    field: str = Field(description="Key of the setting, or place in the request", examples=["rollout_batch_size"])
    value: Any = Field(default=None, description="What was given", examples=[-1])
    problem: str = Field(description="Why it is refused", examples=["it must be above 0"])
    remedy: str = Field(description="What to do about it", examples=["raise it"])
    message: str = Field(
        description="All of it in one sentence", examples=["rollout_batch_size = -1, but it must be above 0; raise it"]
    )


class ProblemDocument(BaseModel):
    """A problem document (RFC 9457)."""

    type: str = Field(
        description="Address of the description of this kind of problem", examples=["/problems/unknown-job"]
    )
    title: str = Field(examples=["There is no such job"])
    status: int = Field(examples=[404])
    detail: str = Field(
        description="What happened and what to do", examples=["no job 'a'; list the jobs to see their ids"]
    )
    instance: str | None = Field(default=None, description="Path of the request", examples=["/v1/jobs/a"])
    faults: list[FaultDocument] | None = Field(default=None, description="Every fault of the request")


class Problem(Exception):
    """Ends a request with a problem document."""

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        faults: Sequence[Mapping[str, Any]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.faults = faults
        self.headers = headers

    @property
    def status(self) -> int:
        return KINDS[self.kind][0]

    def response(self, instance: str | None = None) -> Response:
        """Return the problem document as response."""
        status, title = KINDS[self.kind]
        return _response(f"/problems/{self.kind}", title, status, self.detail, instance, self.faults, self.headers)


def _response(
    kind: str,
    title: str,
    status: int,
    detail: str,
    instance: str | None,
    faults: Sequence[Mapping[str, Any]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    body: dict[str, Any] = {"type": kind, "title": title, "status": status, "detail": detail}
    if instance is not None:
        body["instance"] = instance
    if faults is not None:
        body["faults"] = [dict(fault) for fault in faults]
    # Text that UTF-8 cannot encode (lone surrogates) is returned escaped.
    content = json.dumps(body, ensure_ascii=True, default=str).encode()
    return Response(content, status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def install(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Answer every error of the app with a problem document; `routers` are all of its routers."""

    @app.exception_handler(Problem)
    async def on_problem(request: Request, problem: Problem) -> Response:
        return problem.response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        faults = [_fault(details) for details in error.errors()]
        return Problem("invalid-request", _count(faults), faults=faults).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 404:
            detail = f"nothing is at {path}; /openapi.json lists what there is"
            return Problem("not-found", detail).response(path)
        if error.status_code == 405:
            # The web page, beside the API, is read-only.
            allowed = ", ".join(_allowed_methods(routers, request) or ("GET", "HEAD"))
            detail = f"{request.method} {path} is not possible; possible: {allowed}"
            return Problem("method-not-allowed", detail, headers={"Allow": allowed}).response(path)
        title = http.HTTPStatus(error.status_code).phrase
        return _response("about:blank", title, error.status_code, str(error.detail), path, headers=error.headers)

    @app.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        # The middleware does not add headers to this answer.
        problem = Problem("internal", "the gateway's log says what failed", headers=HEADERS)
        return problem.response(request.url.path)


def faults_detail(faults: Sequence[Mapping[str, Any]]) -> str:
    """Return the number of faults and the first one."""
    return _count(faults)


def _count(faults: Sequence[Mapping[str, Any]]) -> str:
    text = faults[0]["message"]
    return text if len(faults) == 1 else f"{len(faults)} faults, all listed in `faults`; the first is {text}"


def _fault(details: Mapping[str, Any]) -> dict[str, Any]:
    place = ".".join(str(part) for part in details["loc"])
    return Fault(place, details.get("input"), details["msg"], "correct it").to_json()


def _allowed_methods(routers: Sequence[APIRouter], request: Request) -> list[str]:
    methods: set[str] = set()
    for route in (route for router in routers for route in router.routes):
        if route.matches(request.scope)[0] != Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    return sorted(methods)
