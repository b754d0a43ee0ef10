"""The OpenAPI document: that of the framework, with problem documents instead of its own errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from miles.gateway.problems import MEDIA_TYPE
from miles.gateway.schemas import EndEvent, LogEvent, MetricsEvent, StateEvent

DESCRIPTION = """Submit, watch and steer reinforcement-learning jobs.

A job's configuration is one flat object with the names of the command line's flags. Errors are problem documents
(RFC 9457); those of a configuration list every fault with what to change. Lists are read page by page with
`cursor = next_cursor`. Where the gateway was started with API keys, send `Authorization: Bearer KEY`; the scopes are
`read` (read everything), `submit` (submit jobs and act on one's own) and `admin` (act on every job)."""

_TAGS = [
    {"name": "jobs", "description": "Submit jobs and act on them"},
    {"name": "events", "description": "What happens to a job, as it happens"},
    {"name": "metrics", "description": "Per-step metrics"},
    {"name": "samples", "description": "Samples that were trained on"},
    {"name": "checkpoints", "description": "Saved checkpoints"},
    {"name": "versions", "description": "Versions of the weights, and what each engine holds"},
    {"name": "workers", "description": "Processes that serve jobs"},
    {"name": "logs", "description": "Logs of those processes"},
    {"name": "health", "description": "The gateway itself"},
]


def install(app: FastAPI) -> None:
    """Make the app serve this document at /openapi.json."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes, tags=_TAGS
            )
            app.openapi_schema = _corrected(made)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _corrected(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for model in (StateEvent, MetricsEvent, LogEvent, EndEvent):  # the data of server-sent events
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, response in list(operation["responses"].items()):
                _correct_response(operation, status, response)
    return document


def _correct_response(operation: dict[str, Any], status: str, response: dict[str, Any]) -> None:
    content = response.get("content", {})
    if int(status) < 400:
        if "application/json" in content and len(content) > 1:  # a stream or a file, which no model describes
            del content["application/json"]
        return
    problem = content.get(MEDIA_TYPE)
    if problem is None:
        del operation["responses"][status]  # the framework's own 422 of an operation that cannot have one
        return
    problem["schema"] = {"$ref": "#/components/schemas/ProblemDocument"}
    response["content"] = {MEDIA_TYPE: problem}
