"""The process of an SGLang server that this service started."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

from miles.services.rollout.engines.sglang.errors import ServerUnstartable

log = logging.getLogger(__name__)

_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Becomes the command given; the GPU memory of a server must not outlive a service that was killed."""
_STOP_GRACE_S = 10.0
_POLL_S, _LEFTOVER_POLLS = 0.1, 20
_LOG_TAIL_BYTES = 3000


def free_port() -> int:
    """A port of the loopback device that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """One server process and the processes it starts, which form a process group and end together."""

    def __init__(self, process: asyncio.subprocess.Process, log_path: pathlib.Path | None) -> None:
        self._process = process
        self._log_path = log_path

    @classmethod
    async def start(cls, command: Sequence[str], log_path: pathlib.Path | None) -> ServerProcess:
        """Start it; what it prints is appended to the log. Raises ServerUnstartable when there is no such program."""
        output: IO[bytes] | int = subprocess.DEVNULL
        if log_path is not None:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            output = log_path.open("ab")
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid()), *command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        except OSError as error:
            raise ServerUnstartable(f"{command[0]} cannot be run: {error}") from error
        finally:
            if not isinstance(output, int):
                output.close()
        return cls(process, log_path)

    @property
    def pid(self) -> int:
        """Of the server itself."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Its exit status, once it has ended."""
        return await self._process.wait()

    async def stop(self) -> None:
        """End it and everything it started, within seconds."""
        if self._process.returncode is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_GRACE_S):
                    await self._process.wait()
        for _ in range(_LEFTOVER_POLLS):  # what it started removes its semaphores and files
            if not self._exists():
                break
            await asyncio.sleep(_POLL_S)
        self._signal(signal.SIGKILL)
        await self._process.wait()

    def kill(self) -> None:
        """End it at once."""
        self._signal(signal.SIGKILL)

    def last_words(self) -> str:
        """The end of its log."""
        if self._log_path is None:
            return "(its output was not kept)"
        with contextlib.suppress(OSError), self._log_path.open("rb") as file:
            file.seek(max(0, self._log_path.stat().st_size - _LOG_TAIL_BYTES))
            return f"the end of {self._log_path}:\n" + file.read().decode(errors="replace")
        return f"{self._log_path} cannot be read"

    def _exists(self) -> bool:
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
