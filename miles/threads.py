"""Threads in which nothing ends unseen: what is not an Exception leaves them as one.

PyTorch's CheckpointException, a library's SystemExit or a panic of an extension would pass every `except Exception`: a
call would never be answered, or an event loop would end in the middle of its work.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class EscapedError(RuntimeError):
    """Something was raised that is no Exception."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def only_exceptions() -> Iterator[None]:
    """Raise EscapedError for whatever is raised inside and is no Exception, apart from a cancellation.

    A KeyboardInterrupt in the main thread is the user's, and stays one too.
    """
    try:
        yield
    except (Exception, asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        raise EscapedError(error) from error


class Threads(concurrent.futures.ThreadPoolExecutor):
    """A pool of threads whose calls end with a result or an Exception."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Run a call in one of the threads."""
        return super().submit(_run, fn, *args, **kwargs)


def guard_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Have `asyncio.to_thread` use such threads on this event loop."""
    loop.set_default_executor(Threads(thread_name_prefix="asyncio"))


def _run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with only_exceptions():
        return call(*args, **kwargs)
