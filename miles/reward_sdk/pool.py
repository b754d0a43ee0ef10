"""A pool of worker processes that grows on demand, kills processes that hang and replaces those that died."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from miles.reward_sdk.answers import Answers
from miles.reward_sdk.frames import read_frame, write_frame
from miles.reward_sdk.functions import RewardLoadError, Source
from miles.rpc.gen import reward_pb2

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0
"""For importing the user's code, which may load a model."""
_EXIT_TIMEOUT_S = 5.0
"""For a process that has closed its socket to be gone."""
_ASYNC_GRACE_S = 1.0
"""How long an asynchronous function may take to end after it was cancelled at its deadline."""
ASYNC_CALLS_PER_WORKER = 256
"""Asynchronous calls that one worker process runs at once."""


class WorkerDied(RuntimeError):
    """The process that ran a call ended before answering."""


@dataclasses.dataclass(frozen=True, slots=True)
class Described:
    """A function that a worker loaded, as the worker describes it."""

    name: str
    group: bool
    is_async: bool


class WorkerProcess:
    """One worker process and the calls it runs."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        functions: Sequence[Described],
    ) -> None:
        self.functions = functions
        self.calls = 0
        self.alive = True
        self._process = process
        self._writer = writer
        self._next_id = 0
        self._answers: Answers[list[reward_pb2.Score]] = Answers()
        self._reading = asyncio.create_task(self._read(reader))

    @classmethod
    async def start(cls, sources: Sequence[Source]) -> WorkerProcess:
        """Start a process and wait until it has loaded the sources. Raises RewardLoadError when it cannot."""
        ours, theirs = socket.socketpair()
        with theirs:
            descriptor = theirs.fileno()
            described = json.dumps([dataclasses.asdict(source) for source in sources])
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "miles.reward_sdk.worker", str(descriptor), str(os.getpid()), described),
                pass_fds=[descriptor],
                stdin=asyncio.subprocess.DEVNULL,
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                frame = await read_frame(reader)
        except TimeoutError:
            frame = json.dumps({"error": f"loading took longer than {_START_TIMEOUT_S:g} s"}).encode()
        dead = {"error": "the worker process ended while loading; its own output says why"}
        hello: dict[str, Any] = json.loads(frame) if frame else dead
        if "error" in hello:
            writer.close()
            _kill(process)
            await process.wait()
            raise RewardLoadError(hello["error"])
        return cls(process, reader, writer, [Described(**fields) for fields in hello["functions"]])

    async def call(self, request: reward_pb2.ScoreRequest) -> list[reward_pb2.Score]:
        """Run one call, choosing its id. Raises WorkerDied when the process ends first."""
        self._next_id += 1
        request.request_id = self._next_id
        payload = request.SerializeToString()
        return await self._answers.ask(request.request_id, lambda: write_frame(self._writer, payload))

    async def kill(self) -> None:
        """End the process now; its calls raise `WorkerDied`."""
        self.alive = False
        _kill(self._process)
        await self._reading

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while (frame := await read_frame(reader)) is not None:
            response = reward_pb2.ScoreResponse.FromString(frame)
            self._answers.put(response.request_id, list(response.scores))
        self.alive = False
        self._writer.close()
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT_S):
                code = await self._process.wait()
        except TimeoutError:
            _kill(self._process)
            code = await self._process.wait()
        self._answers.fail(lambda: WorkerDied(f"the worker process ended with code {code}"))


def _kill(process: asyncio.subprocess.Process) -> None:
    # Not Process.kill: it polls, which can take the exit code from whoever waits for it.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


class WorkerPool:
    """Worker processes for one kind of function: blocking ones (capacity 1 each) or asynchronous ones.

    At most `size` processes run at once; they start when first needed. A call that outlives its deadline has its
    process killed, and calls that shared the process with it are run again once.
    """

    def __init__(self, sources: Sequence[Source], *, size: int, capacity: int) -> None:
        self._sources = sources
        self._size = size
        self._capacity = capacity
        self._workers: list[WorkerProcess] = []
        self._slots = asyncio.Semaphore(size * capacity)
        self._starting = asyncio.Lock()
        self._running: set[asyncio.Task[list[reward_pb2.Score]]] = set()

    def adopt(self, worker: WorkerProcess) -> None:
        """Add a worker that was started elsewhere with the same sources."""
        self._workers.append(worker)

    async def score(self, request: reward_pb2.ScoreRequest, deadline: float) -> list[reward_pb2.Score]:
        """Run one call by `deadline`, a `time.monotonic()`.

        Raises `TimeoutError` past the deadline, `WorkerDied` when the function ends its process, `RewardLoadError` when
        no process can be started. Cancelling removes a call that waits; one that runs keeps its process to the end.
        """
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._slots.acquire()
        except TimeoutError:
            busy = f"{len(self._running)} calls ahead in {self._size} worker processes"
            raise TimeoutError(f"waited to its deadline for a free worker ({busy})") from None
        task = asyncio.create_task(self._run(request, deadline))
        self._running.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[list[reward_pb2.Score]]) -> None:
        self._running.discard(task)
        self._slots.release()
        if not task.cancelled():
            task.exception()  # retrieved, as the caller may be gone

    async def _run(self, request: reward_pb2.ScoreRequest, deadline: float) -> list[reward_pb2.Score]:
        attempts = 1 if self._capacity == 1 else 2  # a call that ran alone in a process that died has killed it
        while True:
            attempts -= 1
            worker = await self._take_worker()
            try:
                return await self._call(worker, request, deadline)
            except WorkerDied:
                if not attempts:
                    raise
            finally:
                worker.calls -= 1

    async def _call(
        self, worker: WorkerProcess, request: reward_pb2.ScoreRequest, deadline: float
    ) -> list[reward_pb2.Score]:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("waited to its deadline for a worker process to start")
        request.deadline_ms = max(1, int(left * 1000))
        try:
            async with asyncio.timeout(left + (_ASYNC_GRACE_S if self._capacity > 1 else 0)):
                return await worker.call(request)
        except TimeoutError:
            logger.warning("killing a worker process: reward %r did not end in %.3g s", request.reward, left)
            await worker.kill()
            raise TimeoutError(f"did not end in {left:.3g} s; its process was killed") from None

    async def _take_worker(self) -> WorkerProcess:
        """A worker with room for a call, which is counted; started if there is none."""
        worker = self._free_worker()
        if worker is None:
            async with self._starting:
                worker = self._free_worker() or await WorkerProcess.start(self._sources)
            if worker not in self._workers:
                self._workers.append(worker)
        worker.calls += 1
        return worker

    def _free_worker(self) -> WorkerProcess | None:
        self._workers = [worker for worker in self._workers if worker.alive]
        free = [worker for worker in self._workers if worker.calls < self._capacity]
        return min(free, key=lambda worker: worker.calls, default=None)

    async def close(self) -> None:
        """Kill every worker process; running calls raise `WorkerDied`."""
        await asyncio.gather(*(worker.kill() for worker in self._workers))
