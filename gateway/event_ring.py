"""The newest events of a job, encoded: a pure ring buffer, bounded in count and bytes."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

EventId = tuple[int, int]

PIECE_BYTES = 64 << 10
"""About how much a connection gets at once, which bounds the memory of one whose client does not read."""


def parse_id(event_id: str) -> EventId:
    """Return an event id as comparable numbers. Raises ValueError."""
    first, dash, second = event_id.partition("-")
    if not dash:
        raise ValueError(event_id)
    return int(first), int(second)


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One encoded event."""

    id: EventId
    event_id: str
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive encoded events, with the id of the last one."""

    data: bytes
    id: EventId
    event_id: str


def pieces(messages: Sequence[Message], limit_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
    """Yield the messages in pieces of at most `limit_bytes`, or of one longer message."""
    first = 0
    while first < len(messages):
        end, size = first + 1, len(messages[first].data)
        while end < len(messages) and size + len(messages[end].data) <= limit_bytes:
            size += len(messages[end].data)
            end += 1
        last = messages[end - 1]
        yield Piece(b"".join(message.data for message in messages[first:end]), last.id, last.event_id)
        first = end


class EventRing:
    """Keeps the newest events: at most `count`, and at most `size_bytes` unless one alone is longer."""

    def __init__(self, count: int, size_bytes: int) -> None:
        self._count = count
        self._size_bytes = size_bytes
        self._messages: list[Message] = []
        self._held_bytes = 0
        self._complete = False
        self._made: tuple[EventId, Piece] | None = None
        """The last piece built and the event before it: most readers are at the same position."""

    @property
    def newest_id(self) -> str:
        """Id of the newest event; empty before the first."""
        return self._messages[-1].event_id if self._messages else ""

    def begins_with(self, first: Message) -> None:
        """Note the job's very first event: when it is the oldest in the ring, the ring is complete."""
        self._complete = bool(self._messages) and self._messages[0].id == first.id

    def append(self, message: Message) -> None:
        """Add the next event."""
        self._messages.append(message)
        self._held_bytes += len(message.data)
        self._made = None
        discarded = 0
        while len(self._messages) - discarded > 1 and (
            len(self._messages) - discarded > self._count or self._held_bytes > self._size_bytes
        ):
            self._held_bytes -= len(self._messages[discarded].data)
            discarded += 1
        del self._messages[:discarded]
        self._complete = self._complete and not discarded

    def reaches(self, cursor: EventId) -> bool:
        """Return whether the ring has every event after this one."""
        return self._complete or (bool(self._messages) and self._messages[0].id <= cursor)

    def after(self, cursor: EventId) -> Piece | None:
        """Return the next piece of events after `cursor`, which the ring must `reach`; None when there is none."""
        if self._made is not None and self._made[0] == cursor:
            return self._made[1]
        first = bisect.bisect_right(self._messages, cursor, key=lambda message: message.id)
        piece = next(pieces(self._messages[first : first + _MOST_IN_PIECE]), None)
        if piece is not None:
            self._made = cursor, piece
        return piece


_MOST_IN_PIECE = 256
"""Maximum number of events in one piece."""
