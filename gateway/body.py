"""Request bodies: limits their size, and parses them as JSON that UTF-8 can encode."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miles.gateway.problems import Problem


async def read_json(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request's body. Raises Problem."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Problem("unsupported-media-type", "send JSON with the header `Content-Type: application/json`")
    content = await request.body()
    try:
        body = json.loads(content, parse_constant=_refuse_constant)
        json.dumps(body, ensure_ascii=False).encode()  # fails for a lone surrogate
    except RecursionError:
        raise Problem("malformed-body", "the body is nested too deeply; send one flat JSON object") from None
    except ValueError as error:
        raise Problem("malformed-body", f"the body is not JSON ({error}); send one JSON object") from None
    if not isinstance(body, dict):
        raise Problem("malformed-body", "the body is not a JSON object; send setting names with their values")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


class BodyLimit:
    """ASGI middleware that refuses bodies above a size, whether or not it is announced."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_bytes:
            await self._problem().response(scope["path"])(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._problem()
            return message

        await self._app(scope, limited, send)

    def _problem(self) -> Problem:
        return Problem(
            "body-too-large",
            f"at most {self._max_bytes} bytes are accepted; put data into files and name those",
            headers={"Connection": "close"},
        )
