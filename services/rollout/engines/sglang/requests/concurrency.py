"""The concurrency limit of a server, adapted to how full its KV cache is: a pure state machine."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class ConcurrencyLimit:
    """Additive increase, multiplicative decrease.

    A server whose cache is full retracts requests and recomputes them, which costs more than waiting. The limit
    falls by a quarter when the cache is nearly full or requests wait inside the server, and rises by a few when the
    limit is used up and there is room. It starts at the ceiling, because a cache that is large enough is the rule.
    """

    ceiling: int
    """The highest limit."""
    high: float = 0.95
    """Fraction of the cache in use above which the limit falls."""
    low: float = 0.85
    """Fraction up to which it may rise."""
    decrease: float = 0.75
    increase: int = 8
    floor: int = 1
    limit: int = dataclasses.field(init=False)
    """Requests that the server may have now."""

    def __post_init__(self) -> None:
        self.limit = self.ceiling

    def observe(self, *, cache_use: float, running: int, waiting: int, retracted: bool = False) -> None:
        """Adapt the limit to a server's load.

        Args:
            cache_use: fraction of the cache in use.
            running: requests that decode.
            waiting: requests that wait inside the server for a turn or for room in the cache.
            retracted: whether requests lost their cache since the last observation.
        """
        if retracted or cache_use > self.high or (waiting > 0 and cache_use > self.low):
            given = running + waiting
            base = min(self.limit, given) if given else self.limit
            self.limit = max(self.floor, min(self.limit, int(base * self.decrease)))
        elif cache_use <= self.low and running + waiting >= self.limit - self.increase:
            self.limit = min(self.ceiling, self.limit + self.increase)
