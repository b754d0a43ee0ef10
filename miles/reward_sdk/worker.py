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
import dataclasses
import inspect
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from miles.reward_sdk import outcome
from miles.reward_sdk.frames import encode_answer, read_frame, write_frame
from miles.reward_sdk.functions import RewardFunction, RewardLoadError, Source, load
from miles.rpc.gen import reward_pb2, sample_pb2
from miles.types.convert import sample_from_proto

if TYPE_CHECKING:
    from miles.types import Sample

_PR_SET_PDEATHSIG = 1


class MainThread:
    """Runs calls on the thread that calls `run`, one after another."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], list[object]], concurrent.futures.Future[list[object]]]]
        self._jobs = queue.SimpleQueue()

    def submit(self, call: Callable[[], list[object]]) -> concurrent.futures.Future[list[object]]:
        """Queue a call."""
        future: concurrent.futures.Future[list[object]] = concurrent.futures.Future()
        self._jobs.put((call, future))
        return future

    def run(self) -> None:
        """Run queued calls forever."""
        while True:
            call, future = self._jobs.get()
            try:
                future.set_result(call())
            except BaseException as error:
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
        call = _Call(self._functions[request.reward], request.deadline_ms / 1000)
        scores = await self._score(call, request.samples)
        response = reward_pb2.ScoreResponse(request_id=request.request_id, scores=scores)
        write_frame(self._writer, encode_answer(call.seconds, call.attempts, response))
        await self._writer.drain()

    async def _score(self, call: _Call, messages: Sequence[sample_pb2.Sample]) -> list[reward_pb2.Score]:
        """Score samples, each on its own or as a group: unless the function hangs, each gets a score or an error."""
        subjects = [outcome.sample_id(message) for message in messages]
        samples = [_decoded(message) for message in messages]
        if call.function.group:
            malformed = [sample for sample in samples if isinstance(sample, ValueError)]
            if malformed:
                problem = f"malformed {', '.join(subjects)}: {malformed[0]}"
                return [outcome.error_score(problem)] * len(subjects)
            [value] = await self._values(call, [samples])
            if isinstance(value, _Raised):
                return [call.error_score(value.error, subject) for subject in subjects]
            return outcome.group_scores(call.function, value, subjects)
        values = iter(await self._values(call, [sample for sample in samples if not isinstance(sample, ValueError)]))
        return [
            outcome.error_score(f"malformed {subject}: {sample}")
            if isinstance(sample, ValueError)
            else call.sample_score(next(values), subject)
            for sample, subject in zip(samples, subjects, strict=True)
        ]

    async def _values(self, call: _Call, arguments: Sequence[Any]) -> list[object]:
        """What the function returned for each argument, or `_Raised`."""
        if call.function.is_async:
            return await asyncio.gather(*(call.awaited(call.attempt(each)) for each in arguments))
        ended = self._main_thread.submit(lambda: [call.attempt(each) for each in arguments])
        return [await call.awaited(value) for value in await asyncio.wrap_future(ended)]


@dataclasses.dataclass(frozen=True, slots=True)
class _Raised:
    """What a user's function raised: the sample's error, never the service's."""

    error: BaseException


class _Call:
    """The calls of a function for one request."""

    def __init__(self, function: RewardFunction, deadline_s: float) -> None:
        self.function = function
        self.seconds = 0.0
        """How long they took."""
        self.attempts = 0
        """How many there were: malformed samples are not scored."""
        self._deadline_s = deadline_s

    def attempt(self, argument: Any) -> object:
        """Call the function."""
        self.attempts += 1
        began = time.perf_counter()
        try:
            return self.function.call(argument)
        except BaseException as error:  # SystemExit too: it ends the call, not the worker
            return _Raised(error)
        finally:
            self.seconds += time.perf_counter() - began

    async def awaited(self, value: object) -> object:
        """Wait for what the function returned; until the deadline, if the function is asynchronous."""
        if not inspect.isawaitable(value):
            return value
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self._deadline_s if self.function.is_async else None):
                return await value
        except BaseException as error:  # CancelledError too, which a user's function may raise
            return _Raised(error)
        finally:
            self.seconds += time.perf_counter() - began

    def sample_score(self, value: object, subject: str) -> reward_pb2.Score:
        """The score of a sample by what `attempt` or `awaited` returned."""
        if isinstance(value, _Raised):
            return self.error_score(value.error, subject)
        return outcome.sample_score(self.function, value, subject)

    def error_score(self, error: BaseException, subject: str) -> reward_pb2.Score:
        """The error of a sample."""
        reason = outcome.raised(self.function.name, error)
        if isinstance(error, TimeoutError) and not str(error):  # the deadline's, not the function's own
            reason = f"reward {self.function.name!r} was cancelled after {self._deadline_s:g} s"
        return outcome.error_score(f"{reason} on {subject}")


def _decoded(message: sample_pb2.Sample) -> Sample | ValueError:
    try:
        return sample_from_proto(message)
    except ValueError as error:
        return error


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
