"""Holds groups back until the engine serves a version they may be generated with."""

from __future__ import annotations

import asyncio


class VersionPassed(RuntimeError):
    """The engine already serves a later version than the one asked for."""


class VersionGate:
    """The version that may be served now, and those who wait for another."""

    def __init__(self) -> None:
        self.version: int | None = None
        """None: nothing may be generated."""
        self._changed = asyncio.Event()

    def set(self, version: int | None) -> None:
        """The engine now serves `version`, or must not serve (None)."""
        self.version = version
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, minimum: int | None, exact: int | None, deadline_s: float) -> int:
        """Return the version served once it is at least `minimum` and, if given, equal to `exact`.

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
