"""Which services a drill kills, and when: a pure rule that depends on its seed alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

_KILLS_IN_A_ROUND = (1, 1, 1, 1, 2, 3)
"""How many kills a round has; each entry is equally likely."""
_ONE, _SOME, _ALL = "one", "some", "all"
_VICTIMS = (_ONE, _ONE, _ONE, _ONE, _SOME, _ALL)
_NEXT_KILL_S = 3.0
"""Longest time between two kills of a round: the later ones hit services that are just restarting."""
_LONGEST_PAUSE = 3.0
"""Longest pause between rounds, as a multiple of the mean."""


@dataclasses.dataclass(frozen=True, slots=True)
class Kill:
    """Services that are killed at the same moment."""

    after_s: float
    """Time since the previous kill, or since the start of the round."""
    victims: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class KillRound:
    """Kills in quick succession. The next round starts after all killed services have recovered."""

    pause_s: float
    """Time since the end of the previous round."""
    kills: tuple[Kill, ...]


class ChaosSchedule:
    """An endless schedule of rounds."""

    def __init__(self, seed: int, services: Sequence[str], mean_pause_s: float) -> None:
        """Pauses between rounds are exponentially distributed, so that every moment is equally likely."""
        self._random = random.Random(seed)
        self._services = tuple(sorted(services))
        self._mean_pause_s = mean_pause_s

    def next(self) -> KillRound:
        """Return the next round."""
        pause_s = min(self._random.expovariate(1 / self._mean_pause_s), _LONGEST_PAUSE * self._mean_pause_s)
        kills = [self._kill(first=i == 0) for i in range(self._random.choice(_KILLS_IN_A_ROUND))]
        return KillRound(pause_s, tuple(kills))

    def _kill(self, *, first: bool) -> Kill:
        kind = self._random.choice(_VICTIMS)
        count = {_ONE: 1, _SOME: self._random.randint(1, len(self._services)), _ALL: len(self._services)}[kind]
        victims = tuple(sorted(self._random.sample(self._services, count)))
        return Kill(0.0 if first else self._random.uniform(0, _NEXT_KILL_S), victims)
