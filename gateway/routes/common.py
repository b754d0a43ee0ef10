"""Shared parts of all routes: parameters, checks, and the description of errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request

from miles.gateway.auth import Caller
from miles.gateway.problems import KINDS, MEDIA_TYPE, Problem, ProblemDocument
from miles.gateway.state import GatewayState

JobId = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="Id of the job", examples=["sums-1f0c2a9b"])
]
Cursor = Annotated[
    str, Query(max_length=200, pattern=r"^[A-Za-z0-9._-]*$", description="`next_cursor` of the page before")
]


async def _gateway(request: Request) -> GatewayState:  # async: a plain function would run in a thread
    gateway: GatewayState = request.app.state.gateway
    return gateway


Gateway = Annotated[GatewayState, Depends(_gateway)]


async def check_own(gateway: GatewayState, caller: Caller, job_id: str) -> None:
    """Raise Problem when the caller may not act on this job, or when it does not exist."""
    job = await gateway.job(job_id)
    if not caller.may_change(job.submitted_by):
        raise Problem(
            "missing-scope",
            f"job {job_id} was submitted by {job.submitted_by or 'the command line'}, and key {caller.name!r} may only "
            "act on jobs it submitted; use a key with scope admin",
        )


@contextlib.contextmanager
def renamed(kind: str, to: str) -> Iterator[None]:
    """Raise problems of one kind inside the block as another kind."""
    try:
        yield
    except Problem as problem:
        raise (Problem(to, problem.detail) if problem.kind == kind else problem) from None


def problems(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """Describe the problem documents that an operation can answer with."""
    described: dict[int | str, dict[str, Any]] = {}
    for kind in (*kinds, *_ANYWHERE):
        status, title = KINDS[kind]
        entry = described.setdefault(status, {"model": ProblemDocument, "description": title, "content": {}})
        example = {"type": f"/problems/{kind}", "title": title, "status": status, "detail": "what to do about it"}
        examples = entry["content"].setdefault(MEDIA_TYPE, {"examples": {}})["examples"]
        examples[kind] = {"value": example}
    return described


_ANYWHERE = (
    "missing-key",
    "unknown-key",
    "not-local",
    "missing-scope",
    "invalid-request",
    "too-many-requests",
    "controller-failed",
    "controller-away",
)
