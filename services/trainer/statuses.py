"""Errors of the trainer as gRPC statuses."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from miles.queue import MissingGroups, UnreadableGroups
from miles.rpc import abort

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def errors_as_status(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """End the call with the status that fits an error raised inside."""
    try:
        yield
    except MissingGroups as error:
        await abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
    except UnreadableGroups as error:
        await abort(context, grpc.StatusCode.DATA_LOSS, str(error))
    except FileNotFoundError as error:
        await abort(context, grpc.StatusCode.NOT_FOUND, str(error))
    except ValueError as error:
        logger.exception("invalid argument")
        await abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except grpc.RpcError as error:
        await abort(context, grpc.StatusCode.UNAVAILABLE, f"the weight-sync service: {error}")
    except (RuntimeError, ArithmeticError, OSError) as error:
        logger.exception("failed")
        await abort(context, grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
