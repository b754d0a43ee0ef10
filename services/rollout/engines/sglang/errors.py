"""What can go wrong with an SGLang server."""

from __future__ import annotations


class EngineFailed(RuntimeError):
    """A request was lost with its server, or the server answered nonsense; another try may work."""


class ServerRefused(RuntimeError):
    """The server answered an order with an error."""

    def __init__(self, path: str, status: int, message: str) -> None:
        super().__init__(f"SGLang refused {path} ({status}): {message}")
        self.status = status
        self.message = message


class ServerUnstartable(RuntimeError):
    """A server ended, or was not ready in time, while it started."""

    def __init__(self, message: str, *, ended: bool = False) -> None:
        """`ended`: whether it has ended by itself."""
        super().__init__(message)
        self.ended = ended
