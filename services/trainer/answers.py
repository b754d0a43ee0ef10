"""How the trainer's calls answer: progress while work goes on, refusals, and failures as gRPC status codes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
import grpc.aio

from miles.queue import MissingGroups, UnreadableGroups
from miles.rpc import abort
from miles.rpc.gen import trainer_pb2

logger = logging.getLogger(__name__)

WORD_EVERY_S = 5.0
"""How often a stream says something while nothing changes."""


async def until_done(
    task: asyncio.Future[bool], reports: asyncio.Queue[trainer_pb2.TrainResponse]
) -> AsyncIterator[trainer_pb2.TrainResponse]:
    """Messages as they come, and the last one again when nothing new does, until the task is done."""
    last = trainer_pb2.TrainResponse(phase=trainer_pb2.TRAIN_PHASE_WAITING)
    while not task.done():
        following = asyncio.ensure_future(reports.get())
        waited: list[asyncio.Future[Any]] = [task, following]
        await asyncio.wait(waited, timeout=WORD_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            last = following.result()
        else:
            following.cancel()
        if not task.done():
            yield last


async def refuse(
    context: grpc.aio.ServicerContext[Any, Any],
    reason: str,
    code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION,
) -> NoReturn:
    await abort(context, code, reason)


@contextlib.asynccontextmanager
async def as_status(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Turn errors of the work inside into gRPC status codes."""
    try:
        yield
    except MissingGroups as error:
        await abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
    except UnreadableGroups as error:
        await abort(context, grpc.StatusCode.DATA_LOSS, str(error))
    except FileNotFoundError as error:
        await abort(context, grpc.StatusCode.NOT_FOUND, str(error))
    except ValueError as error:
        logger.exception("refused")
        await abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except grpc.RpcError as error:
        await abort(context, grpc.StatusCode.UNAVAILABLE, f"the weight-sync service: {error}")
    except (RuntimeError, ArithmeticError, OSError) as error:
        logger.exception("failed")
        await abort(context, grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
