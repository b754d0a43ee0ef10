"""How long a reward function takes for a sample, and so how many samples it is worth to hand over together. Pure."""

from __future__ import annotations

import itertools

_TOGETHER_S = 0.002
"""How long the samples of one call may take together. Handing over a call costs a tenth of that and more: little is
gained with longer ones, whose samples other processes could share."""
_MOST = 1024
"""Samples of one call at most."""
_UNKNOWN_S = 0.01
"""Assumed of a function at first."""
_WEIGHT = 1 / 32
"""Of a new sample in the mean."""


class Pace:
    """A moving mean, in which a sample that took long counts until a hundred or more were fast."""

    def __init__(self) -> None:
        self.mean_s = _UNKNOWN_S
        """Seconds for one sample."""

    def note(self, seconds: float, samples: int) -> None:
        """Note a call and how many samples the function scored in it, which may be none."""
        if samples:
            self.mean_s += (seconds / samples - self.mean_s) * (1 - (1 - _WEIGHT) ** samples)

    def shares(self, samples: int) -> list[slice]:
        """Split a number of samples into calls of about equal size: one sample each unless the function is fast."""
        most = max(1, int(_TOGETHER_S / max(self.mean_s, _TOGETHER_S / _MOST)))
        calls = -(-samples // most)
        bounds = [samples * i // calls for i in range(calls + 1)] if samples else [0]
        return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]
