"""Parses server-sent events from the pieces that a connection delivers."""

from __future__ import annotations

from collections.abc import Iterator

_DATA = b"data: "
_END = b"\n\n"
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
        if not self._buffer and 0 <= piece.find(_END) == len(piece) - len(_END):
            yield piece[len(_DATA) : -len(_END)]  # the usual case: one piece, one event
            return
        self._buffer += piece
        begin = 0
        while (end := self._buffer.find(_END, max(begin, self._searched))) >= 0:
            yield bytes(memoryview(self._buffer)[begin + len(_DATA) : end])
            begin = end + len(_END)
        del self._buffer[:begin]
        self._searched = max(0, len(self._buffer) - len(_END) + 1)
