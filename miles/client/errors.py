"""Errors of the client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class MilesError(RuntimeError):
    """The gateway refused a request; the problem document says why."""

    def __init__(self, problem: Mapping[str, Any]) -> None:
        self.problem = dict(problem)
        """The problem document (RFC 9457)."""
        super().__init__(self.describe())

    @property
    def kind(self) -> str:
        """Kind of the problem, e.g. `invalid-config`; docs/gateway.md lists the kinds."""
        return str(self.problem.get("type", "")).rpartition("/")[2]

    @property
    def status(self) -> int:
        """HTTP status."""
        return int(self.problem.get("status", 0))

    @property
    def faults(self) -> list[dict[str, Any]]:
        """Every fault of the request: field, value, problem, remedy, and all four in one sentence (message)."""
        return list(self.problem.get("faults") or [])

    def describe(self) -> str:
        """Return title and detail, or one line per fault."""
        title = str(self.problem.get("title", "the gateway refused"))
        if not self.faults:
            return f"{title}: {self.problem.get('detail', '')}"
        lines = [f"  {fault['message']}" for fault in self.faults]
        return "\n".join([f"{title}:", *lines])


class GatewayUnreachableError(ConnectionError):
    """Nothing answers at the gateway's address."""


class UnexpectedAnswerError(RuntimeError):
    """The answer is not a gateway's."""
