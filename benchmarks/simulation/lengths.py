"""How long a group of responses takes to generate: as long as its longest response."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Log-normal response lengths with a limit, as measured of reasoning models: most short, a few at the limit."""

    median_tokens: float = 2000.0
    sigma: float = 1.0
    """Of the logarithm. At 1 the mean is 1.6 times the median and one response in 100 is 10 times as long."""
    limit_tokens: int = 32_768
    samples: int = 8
    """Responses of a group."""
    tokens_per_s: float = 50.0
    """Speed of one response."""
    seed: int = 0

    def group_s(self, group_id: int) -> float:
        """Seconds that a group takes, the same whenever and wherever it is generated."""
        return float(self._block(group_id // _BLOCK)[group_id % _BLOCK])

    @property
    def mean_group_s(self) -> float:
        """Mean over many groups, in seconds."""
        return float(self._block(0).mean())

    @functools.lru_cache(maxsize=64)  # noqa: B019 (few of these objects are ever made)
    def _block(self, number: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, number])
        tokens = self.median_tokens * np.exp(self.sigma * random.standard_normal((_BLOCK, self.samples)))
        return np.minimum(tokens, self.limit_tokens).max(axis=1) / self.tokens_per_s
