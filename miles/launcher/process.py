"""A supervised child process: started, restarted when it ends by itself, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import pathlib
import signal
import time
from collections.abc import Mapping, Sequence

from miles.launcher.restart_policy import RestartPolicy
from miles.rpc.exit_codes import HELP

logger = logging.getLogger(__name__)

_LOG_TAIL_LINES = 15


class ProcessFailedError(RuntimeError):
    """A process is not restarted any more: it kept ending, or ended for a cause that a restart cannot remove."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclasses.dataclass(slots=True)
class SupervisedProcess:
    """Runs a command until it is stopped; restarts it when it ends by itself.

    The child gets its own session, so that Ctrl-C in the terminal reaches only the launcher. Its output goes to a log
    file.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log_path: pathlib.Path
    policy: RestartPolicy = dataclasses.field(default_factory=RestartPolicy)
    restarts: int = 0
    _crashed_on_purpose: bool = False
    _process: asyncio.subprocess.Process | None = None
    _stopping: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int | None:
        """Process id; None while it is not running."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def run(self) -> None:
        """Keep the process running until `stop`; raises `ProcessFailedError` when it is not restarted any more."""
        while not self._stopping.is_set():
            code = await self._run_once()
            if self._stopping.is_set():
                return
            if self._crashed_on_purpose:
                self._crashed_on_purpose = False
                delay_s: float | None = self.policy.first_delay_s
            else:
                delay_s = self.policy.delay_after(code, time.monotonic())
            if delay_s is None:
                raise ProcessFailedError(self._failure(code), code)
            logger.warning("%s ended with %s; restarting it in %.1f s", self.name, describe(code), delay_s)
            self.restarts += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()

    def crash(self) -> bool:
        """Kill the process and its children; it is restarted, and the restart does not count towards the limit.

        Returns False when it is not running.
        """
        pid = self.pid
        if pid is None or self._stopping.is_set():
            return False
        self._crashed_on_purpose = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return True

    async def stop(self, grace_s: float) -> None:
        """Ask the process to end; kill it and its children when it does not end within the grace period."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await process.wait()
        if process.returncode is None:
            logger.warning("%s did not end within %g s of SIGTERM; killing it", self.name, grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    async def _run_once(self) -> int:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                env=dict(self.environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return await self._process.wait()

    def _failure(self, code: int) -> str:
        tail = self.log_path.read_text(errors="replace").strip().splitlines()[-_LOG_TAIL_LINES:]
        lines = "\n".join(f"    {line}" for line in tail)
        return f"{self.name} ended with {describe(code)} and is not restarted. The end of {self.log_path}:\n{lines}"


def describe(exit_code: int) -> str:
    """Describe an exit code for people."""
    if exit_code < 0:
        return f"signal {signal.Signals(-exit_code).name}"
    meaning = next((f" ({text})" for code, text in HELP.items() if code == exit_code), "")
    return f"exit code {exit_code}{meaning}"
