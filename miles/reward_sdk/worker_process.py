"""A worker process, as the pool sees it: started, asked, killed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from miles.reward_sdk.answers import Answers
from miles.reward_sdk.frames import decode_answer, read_frame, write_frame
from miles.reward_sdk.functions import RewardLoadError, Source
from miles.rpc.gen import reward_pb2

_START_TIMEOUT_S = 120.0
"""For importing the user's code, which may load a model."""
_EXIT_TIMEOUT_S = 5.0
"""For a process that has closed its socket to be gone."""


class WorkerDied(RuntimeError):
    """The process that ran a call ended before answering."""


@dataclasses.dataclass(frozen=True, slots=True)
class Described:
    """A function that a worker loaded, as the worker describes it."""

    name: str
    group: bool
    is_async: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a worker says to a call."""

    scores: list[reward_pb2.Score]
    """One a sample, in order."""
    seconds: float
    """How long the function took for all of them."""
    calls: int
    """How often the function was called: not for malformed samples, and once for a group."""


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
        self._answers: Answers[Answer] = Answers()
        self._reading = asyncio.create_task(self._read(reader))

    @classmethod
    async def start(cls, sources: Sequence[Source]) -> WorkerProcess:
        """Start a process and wait until it has loaded the sources. Raises RewardLoadError when it cannot."""
        ours, theirs = socket.socketpair()
        described = json.dumps([dataclasses.asdict(source) for source in sources])
        with contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            with theirs:
                descriptor = theirs.fileno()
                command = ("-m", "miles.reward_sdk.worker", str(descriptor), str(os.getpid()), described)
                try:
                    process = await asyncio.create_subprocess_exec(
                        sys.executable, *command, pass_fds=[descriptor], stdin=asyncio.subprocess.DEVNULL
                    )
                except OSError as error:  # the machine has no room for another one
                    raise RewardLoadError(f"a worker process cannot be started: {error}") from error
            undo.callback(_kill, process)
            reader, writer = await asyncio.open_connection(sock=ours)
            undo.callback(writer.close)
            try:
                async with asyncio.timeout(_START_TIMEOUT_S):
                    frame = await read_frame(reader)
            except TimeoutError:
                frame = json.dumps({"error": f"loading took longer than {_START_TIMEOUT_S:g} s"}).encode()
            dead = {"error": "the worker process ended while loading; its own output says why"}
            hello: dict[str, Any] = json.loads(frame) if frame else dead
            if "error" in hello:
                _kill(process)
                await process.wait()
                raise RewardLoadError(hello["error"])
            undo.pop_all()
        return cls(process, reader, writer, [Described(**fields) for fields in hello["functions"]])

    async def call(self, request: reward_pb2.ScoreRequest) -> Answer:
        """Run one call, choosing its id. Raises WorkerDied when the process ends first."""
        self._next_id += 1
        request.request_id = self._next_id
        payload = request.SerializeToString()
        return await self._answers.ask(request.request_id, lambda: write_frame(self._writer, payload))

    def kill(self) -> None:
        """End the process now; its calls raise `WorkerDied` once it is gone."""
        self.alive = False
        _kill(self._process)
        self._writer.transport.abort()  # a process that the function has forked may hold the other end open

    def when_gone(self, done: Callable[[WorkerProcess], object]) -> None:
        """Have a function called with this worker once its process has ended, by itself or killed."""
        self._reading.add_done_callback(lambda _: done(self))

    async def close(self) -> None:
        """Kill the process and return once it is gone."""
        self.kill()
        await self._reading

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while (frame := await read_frame(reader)) is not None:
            seconds, calls, response = decode_answer(frame)
            self._answers.put(response.request_id, Answer(list(response.scores), seconds, calls))
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
