"""Which services a drill kills, and when: a pure rule, the same for the same seed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

_BLOWS = (1, 1, 1, 1, 2, 3)
"""Number of blows of a strike, each as likely as it is often here."""
_ONE, _SOME, _ALL = "one", "some", "all"
_VICTIMS = (_ONE, _ONE, _ONE, _ONE, _SOME, _ALL)
_NEXT_BLOW_S = 3.0
"""Longest time between two blows of a strike: the later ones hit what is just starting again."""
_LONGEST_PAUSE = 3.0
"""Longest pause between strikes, in means."""


@dataclasses.dataclass(frozen=True, slots=True)
class Blow:
    """Services that are killed at once."""

    after_s: float
    """Time from the blow before, or from the beginning of the strike."""
    victims: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Strike:
    """Blows in quick succession. What comes next waits until all that was hit is back."""

    pause_s: float
    """Time from the end of the strike before."""
    blows: tuple[Blow, ...]


class ChaosSchedule:
    """An endless schedule of strikes."""

    def __init__(self, seed: int, services: Sequence[str], mean_pause_s: float) -> None:
        """Pauses between strikes are exponential around the mean, so that any moment is as likely as any other."""
        self._random = random.Random(seed)
        self._services = tuple(sorted(services))
        self._mean_pause_s = mean_pause_s

    def next(self) -> Strike:
        """The next strike."""
        pause_s = min(self._random.expovariate(1 / self._mean_pause_s), _LONGEST_PAUSE * self._mean_pause_s)
        blows = [self._blow(first=i == 0) for i in range(self._random.choice(_BLOWS))]
        return Strike(pause_s, tuple(blows))

    def _blow(self, *, first: bool) -> Blow:
        kind = self._random.choice(_VICTIMS)
        count = {_ONE: 1, _SOME: self._random.randint(1, len(self._services)), _ALL: len(self._services)}[kind]
        victims = tuple(sorted(self._random.sample(self._services, count)))
        return Blow(0.0 if first else self._random.uniform(0, _NEXT_BLOW_S), victims)
