"""The worker process: runs reward functions, one blocking call at a time or many asynchronous ones.

Started by `miles.reward_sdk.pool` as `python -m miles.reward_sdk.worker FD PARENT_PID SOURCES_JSON`. It talks over the
socket FD: first one JSON frame that says which functions were loaded or why loading failed, then a `ScoreResponse` for
each `ScoreRequest`. A hung function can be killed because it has its own process. Blocking functions run on the main
thread with no event loop in it, so that they may use signals and `asyncio.run`; asynchronous ones share one event loop
on another thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import inspect
import json
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from miles.reward_sdk import outcome
from miles.reward_sdk.frames import read_frame, write_frame
from miles.reward_sdk.functions import RewardFunction, RewardLoadError, Source, load
from miles.rpc.gen import reward_pb2, sample_pb2
from miles.types.convert import sample_from_proto

if TYPE_CHECKING:
    from miles.types import Sample

_PR_SET_PDEATHSIG = 1


class MainThread:
    """Runs calls on the thread that calls `run`, one after another."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], object], concurrent.futures.Future[object]]]
        self._jobs = queue.SimpleQueue()

    def submit(self, call: Callable[[], object]) -> concurrent.futures.Future[object]:
        """Queue a call."""
        future: concurrent.futures.Future[object] = concurrent.futures.Future()
        self._jobs.put((call, future))
        return future

    def run(self) -> None:
        """Run queued calls forever."""
        while True:
            call, future = self._jobs.get()
            try:
                future.set_result(call())
            except BaseException as error:  # SystemExit too: it ends the call, not the worker
                future.set_exception(error)


class Worker:
    """Answers requests until the socket ends."""

    def __init__(
        self, main_thread: MainThread, functions: dict[str, RewardFunction], writer: asyncio.StreamWriter
    ) -> None:
        self._main_thread = main_thread
        self._functions = functions
        self._writer = writer
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Read requests and answer each as it finishes."""
        while (frame := await read_frame(reader)) is not None:
            task = asyncio.create_task(self._answer(reward_pb2.ScoreRequest.FromString(frame)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: reward_pb2.ScoreRequest) -> None:
        scores = await self._score(self._functions[request.reward], request.samples, request.deadline_ms / 1000)
        response = reward_pb2.ScoreResponse(request_id=request.request_id, scores=scores)
        write_frame(self._writer, response.SerializeToString())
        await self._writer.drain()

    async def _score(
        self, function: RewardFunction, messages: Sequence[sample_pb2.Sample], deadline_s: float
    ) -> list[reward_pb2.Score]:
        """Score one sample or a group: unless the function hangs, every sample gets a score or an error score."""
        subjects = [outcome.sample_id(message) for message in messages]
        try:
            samples = [sample_from_proto(message) for message in messages]
        except ValueError as error:
            return [outcome.error_score(f"malformed {', '.join(subjects)}: {error}")] * len(subjects)
        try:
            value = await self._call(function, samples if function.group else samples[0], deadline_s)
        except BaseException as error:  # a user's mistake becomes the sample's error, never the service's
            reason = outcome.raised(function.name, error)
            if isinstance(error, TimeoutError) and not str(error):  # the deadline's, not the function's own
                reason = f"reward {function.name!r} was cancelled after {deadline_s:g} s"
            return [outcome.error_score(f"{reason} on {subject}") for subject in subjects]
        if function.group:
            return outcome.group_scores(function, value, subjects)
        return [outcome.sample_score(function, value, subjects[0])]

    async def _call(self, function: RewardFunction, argument: Sample | list[Sample], deadline_s: float) -> object:
        call: Callable[[], object] = lambda: function.call(argument)  # type: ignore[arg-type]  # noqa: E731
        if function.is_async:
            async with asyncio.timeout(deadline_s):
                return await _awaited(call())
        return await _awaited(await asyncio.wrap_future(self._main_thread.submit(call)))


async def _awaited(value: object) -> object:
    return await value if inspect.isawaitable(value) else value


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the reward service that started this worker is gone")


async def _serve(main_thread: MainThread, descriptor: int, loaded: dict[str, RewardFunction] | RewardLoadError) -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor))
    if isinstance(loaded, RewardLoadError):
        write_frame(writer, json.dumps({"error": str(loaded)}).encode())
        await writer.drain()
        return
    described = [
        {"name": function.name, "group": function.group, "is_async": function.is_async} for function in loaded.values()
    ]
    write_frame(writer, json.dumps({"functions": described}).encode())
    await writer.drain()
    await Worker(main_thread, loaded, writer).run(reader)


def main(descriptor: int, sources: Sequence[Source]) -> None:
    """Load the functions, report them, and score until the service closes the socket."""
    main_thread = MainThread()
    loaded: dict[str, RewardFunction] | RewardLoadError
    try:
        loaded = load(sources)
    except RewardLoadError as error:
        loaded = error

    def serve() -> None:
        try:
            asyncio.run(_serve(main_thread, descriptor, loaded))
        finally:
            os._exit(0)  # the main thread may be inside a function that never returns

    threading.Thread(target=serve, daemon=True).start()
    main_thread.run()


if __name__ == "__main__":
    _die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the service ends its workers
    main(int(sys.argv[1]), [Source(**fields) for fields in json.loads(sys.argv[3])])
