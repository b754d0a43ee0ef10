"""The gate that holds groups back until the engine serves a version they may be generated with."""

from __future__ import annotations

import asyncio

from miles.change_signal import ChangeSignal
from miles.telemetry.tracing import traced


class VersionPassed(RuntimeError):
    """The engine already serves a later version than the one asked for."""


class VersionGate:
    """Open at one version, or closed. Groups wait at it for the version they need."""

    def __init__(self) -> None:
        self.version: int | None = None
        """Version the gate is open at; None while it is closed and nothing may be generated."""
        self._changed = ChangeSignal()

    def open(self, version: int) -> None:
        """Let groups be generated with `version`, in place of the version before."""
        self._set(version)

    def close(self) -> None:
        """Let no group be generated."""
        self._set(None)

    def _set(self, version: int | None) -> None:
        self.version = version
        self._changed.notify()

    @traced("wait for a version")
    async def wait(self, minimum: int | None, exact: int | None, deadline_s: float) -> int:
        """Wait until the gate is open at a version of at least `minimum` that equals `exact`, if given; return it.

        Raises VersionPassed when `exact` will not come back, and TimeoutError after `deadline_s` seconds.
        """
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    version = self.version
                    if version is not None:
                        if exact is not None and version > exact:
                            raise VersionPassed(f"the engine serves version {version} already, not {exact}")
                        if version >= (minimum or 0) and exact in (None, version):
                            return version
                    await self._changed.wait()
        except TimeoutError:
            wanted = f"version {exact}" if exact is not None else f"a version of at least {minimum or 0}"
            has = "none" if self.version is None else f"version {self.version}"
            raise TimeoutError(f"waited {deadline_s:g} s for the engine to serve {wanted}; it serves {has}") from None
