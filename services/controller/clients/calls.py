"""Calls to workers: deadlines, and the difference between a lost worker and a failed one."""

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
    """A worker does not answer any more; once it is back, the work can be done again."""


class WorkerFailedError(RuntimeError):
    """A worker refused or failed; trying again cannot help."""


def translate(error: grpc.aio.AioRpcError, what: str) -> Exception:
    """The error to raise for a failed call that was to do `what`."""
    if error.code() in _LOST:
        return WorkerLostError(f"{what}: {error.code().name}: {error.details()}")
    return WorkerFailedError(f"{what}: {error.details()}")


async def call(awaitable: Awaitable[T], what: str, deadline_s: float) -> T:
    """Await a unary call; a deadline, a lost connection and a failure each become the error that says so."""
    try:
        async with asyncio.timeout(deadline_s):
            return await awaitable
    except TimeoutError:
        raise WorkerLostError(f"{what}: no answer within {deadline_s:g} s") from None
    except grpc.aio.AioRpcError as error:
        raise translate(error, what) from error


async def stream(messages: AsyncIterable[T], what: str, silence_s: float) -> AsyncIterator[T]:
    """Iterate a response stream; `silence_s` without a message counts as a lost worker."""
    iterator = messages.__aiter__()
    while True:
        try:
            async with asyncio.timeout(silence_s):
                message = await iterator.__anext__()
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise WorkerLostError(f"{what}: no word for {silence_s:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise translate(error, what) from error
        yield message
