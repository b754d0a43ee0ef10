"""Calls to workers: their deadlines, and the difference between a lost worker and a failed one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable
from typing import TypeVar

import grpc
import grpc.aio

T = TypeVar("T")

_LOST = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.DATA_LOSS,  # groups that cannot be read are generated again
    }
)


class WorkerLostError(ConnectionError):
    """A worker no longer answers; once it is back, the work can be repeated."""


class WorkerFailedError(RuntimeError):
    """A worker refused or failed; trying again cannot help."""


class WeightsRefusedError(WorkerFailedError):
    """No engine of the job can take the trainer's weights, whenever they are sent."""

    def __init__(self, reason: str) -> None:
        """`reason` is what each engine said."""
        super().__init__(
            f"the engines cannot load the trainer's weights, and trying again cannot help: {reason}. An engine builds "
            "the model in hf_checkpoint and takes its names, shapes and rollout_dtype: give trainer and engines the "
            "same model (one whose folder has changed must be put back), or choose another rollout_backend"
        )


async def call(awaitable: Awaitable[T], what: str, deadline_s: float) -> T:
    """Await a unary call. Raises WorkerLostError after a deadline or a lost connection, else WorkerFailedError."""
    return await _within(deadline_s, awaitable, what, "no answer within")


async def stream(messages: AsyncIterable[T], what: str, silence_s: float) -> AsyncIterator[T]:
    """Iterate a response stream; after `silence_s` without a message the worker counts as lost."""
    iterator = aiter(messages)
    while (message := await _within(silence_s, anext(iterator, None), what, "no message for")) is not None:
        yield message


async def _within(limit_s: float, awaitable: Awaitable[T], what: str, silence: str) -> T:
    try:
        async with asyncio.timeout(limit_s):
            return await awaitable
    except TimeoutError:
        raise WorkerLostError(f"{what}: {silence} {limit_s:g} s") from None
    except grpc.aio.AioRpcError as error:
        if error.code() in _LOST:
            raise WorkerLostError(f"{what}: {error.code().name}: {error.details()}") from error
        raise WorkerFailedError(f"{what}: {error.details()}") from error
