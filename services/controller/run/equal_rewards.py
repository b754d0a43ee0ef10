"""Notices that rewards do not differ, so that nothing can be learned from them. Pure."""

from __future__ import annotations

from miles.rpc.gen import rollout_pb2
from miles.services.controller.run.examples import describe_example

_GROWTH = 8


class EqualRewards:
    """Counts groups in a row whose rewards are all equal; of single samples, those that equal the one before."""

    def __init__(self, batch_size: int) -> None:
        """A batch of them is told first."""
        self._first_told = self._told_at = batch_size
        self._in_a_row = 0
        self._value: float | None = None

    def note(self, example: rollout_pb2.ScoredExample | None) -> str:
        """Take in a group's example, None when its rewards differ; return what people are to be told, if anything."""
        if example is not None and not example.rewards:
            return ""  # its failures are told
        value = None if example is None else example.rewards[0]
        if example is None or (len(example.rewards) == 1 and self._in_a_row and value != self._value):
            self._in_a_row, self._told_at = 0, self._first_told
        self._value = value
        if example is None:
            return ""
        self._in_a_row += 1
        if self._in_a_row < self._told_at:
            return ""
        self._told_at *= _GROWTH
        alike = "has one and the same reward" if len(example.rewards) == 1 else "has equal rewards in itself"
        return (
            f"each of the last {self._in_a_row} groups {alike}, from which nothing can be learned; e.g. "
            f"{describe_example(example)}. Check that the reward reads the response as you expect"
        )
