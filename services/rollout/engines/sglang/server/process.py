"""The process of a managed SGLang server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

from miles.proxies import without_proxy_for_loopback

log = logging.getLogger(__name__)

_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Becomes the command, which is killed when the rollout service dies: a server must not keep its GPU memory then."""
_STOP_GRACE_S = 10.0
_POLL_S, _LEFTOVER_POLLS = 0.1, 20
_LOG_TAIL_BYTES = 3000


def _open_log(path: pathlib.Path | None) -> IO[bytes]:
    if path is None:
        return pathlib.Path(os.devnull).open("ab")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


_SCORES_AS_DRAWN = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "false", "SGLANG_SIMULATE_ACC_LEN": "-1"}
"""Whatever the environment says: log-probs are at the sampling temperature, and drafts are verified."""


IN_SERVER = pathlib.Path(__file__).parents[1] / "in_server"
"""Folder of modules that servers can import."""


def _environment() -> dict[str, str]:
    found = without_proxy_for_loopback(os.environ)
    importable = os.pathsep.join([str(IN_SERVER), *filter(None, [found.get("PYTHONPATH")])])
    return {**found, "PYTHONUNBUFFERED": "1", "PYTHONPATH": importable, **_SCORES_AS_DRAWN}


class ServerProcess:
    """One server process and the processes it starts, which form a process group and end together."""

    def __init__(self, process: asyncio.subprocess.Process, log_path: pathlib.Path | None) -> None:
        self._process = process
        self._log_path = log_path

    @classmethod
    async def start(cls, command: Sequence[str], log_path: pathlib.Path | None) -> ServerProcess:
        """Start it; its output is appended to the log, which also says so when the program cannot be run."""
        with _open_log(log_path) as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid()), *command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
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
        for _ in range(_LEFTOVER_POLLS):  # its children still remove their semaphores and files
            if not self._exists():
                break
            await asyncio.sleep(_POLL_S)
        self._signal(signal.SIGKILL)
        await self._process.wait()

    def kill(self) -> None:
        """End it at once."""
        self._signal(signal.SIGKILL)

    def log_tail(self) -> str:
        """The end of its log."""
        if self._log_path is None:
            return "(its output was not kept)"
        with contextlib.suppress(OSError), self._log_path.open("rb") as file:
            file.seek(max(0, self._log_path.stat().st_size - _LOG_TAIL_BYTES))
            return f"the end of {self._log_path}:\n" + file.read().decode(errors="replace")
        return f"{self._log_path} cannot be read"

    def _exists(self) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 0)
            return True
        return False

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
