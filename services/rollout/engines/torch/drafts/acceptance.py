"""How far drafts are accepted, by position, and how many steps of them that makes worth while."""

from __future__ import annotations

import math
from collections.abc import Sequence

_HORIZON = 256
"""Verified requests after which what was seen has lost most of its weight."""


class Acceptance:
    """Shares of requests that had a draft at each position, and in which it was accepted; older ones fade."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._requests = 0.0
        self._proposed: list[float] = []
        self._accepted: list[float] = []

    def note(self, requests: int, proposed: Sequence[int], accepted: Sequence[int]) -> None:
        """Add a step: by request, how many drafts it had, and how many of them were accepted."""
        fade = math.exp(-requests / _HORIZON)
        self._requests = self._requests * fade + requests
        longest = max(proposed, default=0)
        missing = [0.0] * (longest - len(self._proposed))
        self._proposed = [n * fade for n in self._proposed + missing]
        self._accepted = [n * fade for n in self._accepted + missing]
        for sums, counts in ((self._proposed, proposed), (self._accepted, accepted)):
            for count in counts:
                for position in range(count):
                    sums[position] += 1

    def drafts(self, steps: int) -> float:
        """Drafts that a request has in a step, with at most `steps` of them."""
        return sum(self._shares(self._proposed, steps))

    def tokens(self, steps: int) -> float:
        """Tokens that a request gets in a step, with at most `steps` drafts."""
        return 1 + sum(self._shares(self._accepted, steps))

    def speedup(self, steps: int, cost: float) -> float:
        """Tokens per second over those without drafts, when each draft lengthens a step by the share `cost` of it."""
        return self.tokens(steps) / (1 + cost * self.drafts(steps))

    def best_steps(self, most: int, cost: float) -> int:
        """The number of steps, from 1 to `most`, with the largest speedup; the fewest of equal ones."""
        return max(range(1, most + 1), key=lambda steps: (self.speedup(steps, cost), -steps))

    def _shares(self, sums: Sequence[float], steps: int) -> list[float]:
        """By position; those that were never tried go on as the last two did."""
        if not self._requests:
            return [0.0] * steps
        shares = [n / self._requests for n in sums[:steps]]
        before = [1.0, *shares]
        ratio = before[-1] / before[-2] if shares and before[-2] else 0.0
        while len(shares) < steps:
            shares.append(shares[-1] * ratio if shares else 0.0)
        return shares
