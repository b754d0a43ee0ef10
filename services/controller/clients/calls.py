"""Calls to workers: their deadlines, and the difference between a lost worker and a failed one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Iterator
from typing import TypeVar

import grpc
import grpc.aio

from miles.services.controller.clients.silence import SilenceWatch

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
    with _worker_errors(what, f"no answer within {deadline_s:g} s"):
        async with asyncio.timeout(deadline_s):
            return await awaitable


async def stream(messages: AsyncIterable[T], what: str, silence_s: float) -> AsyncIterator[T]:
    """Iterate a response stream; after `silence_s` without a message the worker counts as lost."""
    iterator = aiter(messages)
    silence = f"no message for {silence_s:g} s"
    with contextlib.closing(SilenceWatch(silence_s)) as watch, _worker_errors(what, silence):
        while True:
            with watch:
                message = await anext(iterator, None)
            if message is None:
                return
            yield message


@contextlib.contextmanager
def _worker_errors(what: str, silence: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise WorkerLostError(f"{what}: {silence}") from None
    except grpc.aio.AioRpcError as error:
        if error.code() in _LOST:
            raise WorkerLostError(f"{what}: {error.code().name}: {error.details()}") from error
        raise WorkerFailedError(f"{what}: {error.details()}") from error
