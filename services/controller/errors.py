"""What a caller got wrong, and the status that ends the call."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from miles.config import ConfigError
from miles.rpc import abort


class NotFoundError(LookupError):
    """Something that a request names does not exist."""


class BadRequestError(ValueError):
    """A value in a request is not allowed."""


class BadPageToken(BadRequestError):
    """A page token that no page ended with."""

    def __init__(self, token: str) -> None:
        super().__init__(f"page_token {token!r} is not one this service gave")


class ConflictError(ValueError):
    """A request contradicts an earlier one."""


class NotPossibleNowError(ValueError):
    """The state of a job or of the services does not allow what a request asks for."""


_STATUS: dict[type[Exception], grpc.StatusCode] = {
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    BadRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    ConflictError: grpc.StatusCode.ALREADY_EXISTS,
    NotPossibleNowError: grpc.StatusCode.FAILED_PRECONDITION,
}
_CALLER_ERRORS = tuple(_STATUS)


@contextlib.asynccontextmanager
async def ending_call(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """End the call with the status of an error inside the block: one of the caller, or of another service."""
    try:
        yield
    except _CALLER_ERRORS as error:
        code = next(code for kind, code in _STATUS.items() if isinstance(error, kind))
        await abort(context, code, str(error))
    except grpc.aio.AioRpcError as error:  # of the only service that is asked on behalf of a caller
        await abort(context, error.code(), f"the weight-sync service: {error.details()}")
