"""Aborts a call with a gRPC status, typed so that a checker knows that it does not return."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio


async def abort(context: grpc.aio.ServicerContext[Any, Any], code: grpc.StatusCode, details: str) -> NoReturn:
    """Send the status and end the handler."""
    await context.abort(code, details)
    raise AssertionError("abort raises")
