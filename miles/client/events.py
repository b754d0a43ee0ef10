"""Parser of server-sent events."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event of a stream."""

    event: str
    data: str
    id: str


def parse_events(lines: Iterable[str]) -> Iterator[ServerEvent]:
    """Parse the events of a stream (WHATWG HTML, server-sent events, section 9.2.6); skip comments.

    An incomplete event at the end of the stream is skipped.
    """
    name, data, last_id = "", list[str](), ""
    for line in lines:
        if not line:
            if data:
                yield ServerEvent(name or "message", "\n".join(data), last_id)
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id":
            last_id = value
