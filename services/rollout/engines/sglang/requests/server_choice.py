"""The router: which server gets a request. Pure."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

REMEMBERED_GROUPS = 16384


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """What the router needs to know of a server."""

    index: int
    running: int
    """Requests given to it that have not ended."""
    limit: int
    """Requests that it may have at once."""
    version: int | None
    """Policy version that it holds; None while it must not serve."""


class Router:
    """Keeps a group's samples on one server, where they share their prompt's cache; new groups go to the least loaded.

    A group follows its server only while that one serves the wanted version and has room, or none has.
    """

    def __init__(self) -> None:
        self._home: OrderedDict[str, int] = OrderedDict()

    def choose(self, candidates: Sequence[Candidate], group: str, version: int | None) -> int | None:
        """Index of the server for a request of `group` with the policy's `version`; None when it has to wait.

        An empty group has no home. A request waits for its group's server rather than leave it for another one that
        is busier than half its limit.
        """
        serving = [c for c in candidates if c.version is not None and c.version == version and c.limit > 0]
        free = [c for c in serving if c.running < c.limit]
        home = self._home.get(group) if group else None
        at_home = next((c for c in serving if c.index == home), None)
        if at_home is not None:
            self._home.move_to_end(group)
            if at_home in free:
                return at_home.index
            free = [c for c in free if c.running < c.limit / 2]
        if not free:
            return None
        chosen = min(free, key=lambda c: (c.running / c.limit, c.index)).index
        if group:
            self._home[group] = chosen
            self._home.move_to_end(group)
            while len(self._home) > REMEMBERED_GROUPS:
                self._home.popitem(last=False)
        return chosen
