"""Errors of SGLang servers; what a caller of any engine sees is `EngineFailed`, in `engines.base`."""

from __future__ import annotations


class ServerRefused(RuntimeError):
    """The server answered a call with an error."""

    def __init__(self, path: str, status: int, message: str) -> None:
        super().__init__(f"SGLang refused {path} ({status}): {message}")
        self.status = status
        self.message = message


class ServerUnstartable(RuntimeError):
    """A server ended while it started, or was not ready in time."""

    def __init__(self, message: str, *, ended: bool = False) -> None:
        """`ended`: whether its process has ended."""
        super().__init__(message)
        self.ended = ended
