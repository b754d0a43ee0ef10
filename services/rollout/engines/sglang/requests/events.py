"""Parses server-sent events from the pieces that a connection delivers."""

from __future__ import annotations

from collections.abc import Iterator

_DATA = b"data: "
_NEWLINE = b"\n"
_END = _NEWLINE * 2
DONE = b"[DONE]"
"""The last event of a response."""


class EventSplitter:
    """Collects the pieces of a stream and yields the data of each complete event."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0
        """Bytes at the beginning of the buffer in which no event ends."""

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Take a piece; yield the data of the events that it completes."""
        if not self._buffer and piece.endswith(_END) and _end_of_event(piece, 0) == len(piece) - len(_END):
            yield piece[len(_DATA) : -len(_END)]  # the usual case: one piece, one event
            return
        self._buffer += piece
        begin = 0
        while (end := _end_of_event(self._buffer, max(begin, self._searched))) >= 0:
            yield bytes(memoryview(self._buffer)[begin + len(_DATA) : end])
            begin = end + len(_END)
        del self._buffer[:begin]
        self._searched = max(0, len(self._buffer) - len(_END) + 1)


def _end_of_event(data: bytes | bytearray, start: int) -> int:
    """Where the first event from `start` on ends; -1 when none does.

    Looks for single newlines, of which JSON has none: a search for two at once takes ten times as long, which tells in
    events with many routed experts.
    """
    at = data.find(_NEWLINE, start)
    while at >= 0 and not data.startswith(_END, at):
        at = data.find(_NEWLINE, at + 1)
    return at
