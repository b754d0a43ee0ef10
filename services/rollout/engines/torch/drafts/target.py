"""The draft model as the draft stream's subscriber sees it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import torch

from miles.services.rollout.engines.torch.drafts.proposer import DraftWeights

Call = Callable[[Callable[[], Any], str], Awaitable[Any]]


class DraftTarget:
    """Loads the weights of a draft model between two steps; implements WeightTarget."""

    def __init__(self, weights: DraftWeights, device: torch.device, call: Call) -> None:
        """`call` runs a function, described by a string, in the worker thread between two steps."""
        self.device = device
        self._weights = weights
        self._call = call

    @property
    def version(self) -> int | None:
        """Version that proposes now; None before the first `load_weights`."""
        return self._weights.version

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> float:
        """Swap in draft weights between two steps; return the pause time in seconds.

        Raises WeightsRefused before anything changed when they do not fit.
        """
        checked = self._weights.check(tensors)

        def load() -> float:
            begin = time.perf_counter()
            self._weights.load(version, checked)
            return time.perf_counter() - begin

        pause_s: float = await self._call(load, f"loading version {version} of the draft model")
        return pause_s

    async def weight_bytes(self) -> Mapping[str, torch.Tensor]:
        """The draft's tensors as they came; empty before the first `load_weights`."""
        served: Mapping[str, torch.Tensor] = await self._call(self._weights.served, "reading the draft model's weights")
        return served
