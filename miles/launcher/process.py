"""One supervised child process."""

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

from miles.launcher.restarts import RestartPolicy
from miles.rpc.exit_codes import HELP, ExitCode

logger = logging.getLogger(__name__)

_LOG_TAIL_LINES = 15


class ProcessGivenUpError(RuntimeError):
    """A process kept ending, or ended for a cause that a restart cannot remove."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclasses.dataclass(slots=True)
class SupervisedProcess:
    """Runs a command until told to stop; starts it again when it ends by itself.

    The child gets a session of its own, so that Ctrl-C in the terminal reaches the launcher alone, and its output goes
    to a log file.
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
        """Process id while it runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def run(self) -> None:
        """Keep the process running until `stop`; raises `ProcessGivenUpError`."""
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
                raise ProcessGivenUpError(self._obituary(code), code)
            logger.warning("%s ended with %s; starting it again in %.1f s", self.name, describe(code), delay_s)
            self.restarts += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()

    def crash(self) -> bool:
        """Kill the process and its children; it starts again, and the end does not count against it.

        False when it does not run now.
        """
        pid = self.pid
        if pid is None or self._stopping.is_set():
            return False
        self._crashed_on_purpose = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return True

    async def stop(self, grace_s: float) -> None:
        """Ask the process to end; kill it and its children when it does not within the grace."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
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

    def _obituary(self, code: int) -> str:
        tail = self.log_path.read_text(errors="replace").strip().splitlines()[-_LOG_TAIL_LINES:]
        lines = "\n".join(f"    {line}" for line in tail)
        return f"{self.name} ended with {describe(code)} and was given up. The end of {self.log_path}:\n{lines}"


def describe(exit_code: int) -> str:
    """An exit code in words."""
    if exit_code < 0:
        return f"signal {signal.Signals(-exit_code).name}"
    try:
        return f"exit code {exit_code} ({HELP[ExitCode(exit_code)]})"
    except ValueError:
        return f"exit code {exit_code}"
