"""The error of a message that violates its contract."""

from __future__ import annotations


class MalformedMessage(ValueError):
    """A message, or the object that it encodes, violates its contract.

    `field` is the path of the offending field from the outermost message, e.g. `samples[2].rollout_log_probs`.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def within(self, path: str) -> MalformedMessage:
        """Return the same error with the field's path prefixed by `path`, the place of its message in an outer one."""
        return MalformedMessage(path + self.field, self.problem)

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"
