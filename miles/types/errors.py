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

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class prefixed:
    """Context in which the fields that a MalformedMessage names are prefixed by `path`, the place of their message."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, MalformedMessage):
            raise MalformedMessage(self._path + error.field, error.problem) from error.__cause__
