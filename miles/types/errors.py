"""The error of a message that breaks its contract."""

from __future__ import annotations


class MalformedMessage(ValueError):
    """A message, or the object it is made from, breaks its contract.

    `field` is the path of the offending field from the outermost message, e.g. `samples[2].rollout_log_probs`.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def within(self, path: str) -> MalformedMessage:
        """The same error as seen from an outer message, where `path` leads to the one it is about."""
        return MalformedMessage(path + self.field, self.problem)

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"
