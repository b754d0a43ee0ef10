"""The requests that the function of one sample makes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np
import xxhash

from miles.services.rollout.engines.base import FinishReason, GenerationResult, SamplingParams
from miles.services.rollout.functions.payload import GenerateCall
from miles.services.rollout.groups.partial_response import Piece
from miles.services.rollout.groups.requests import GroupRequests
from miles.types import VersionSpan


@dataclasses.dataclass(frozen=True, slots=True)
class MadeCall:
    """A request that has ended."""

    input_ids: Sequence[int]
    token_ids: Sequence[int]
    log_probs: Sequence[float]
    weight_versions: tuple[VersionSpan, ...]
    """Spans over `token_ids`."""
    sampling: SamplingParams


class SampleCalls:
    """Runs the requests of one sample's function, and records them."""

    def __init__(self, requests: GroupRequests, position: int, seed: int) -> None:
        self.made: list[MadeCall] = []
        """In the order in which they ended."""
        self.aborted: asyncio.Event = asyncio.Event()
        """Set when the engine, or the group's preemption, ended a request."""
        self._requests = requests
        self._position = position
        self._seed = seed
        self._repeated: dict[int, int] = {}

    async def run(self, call: GenerateCall) -> Piece:
        """Run a request to its end; one without room for a token ends at once, for its length."""
        if call.sampling.max_new_tokens <= 0:
            piece = Piece()
            piece.result = GenerationResult(FinishReason.LENGTH, ())
            return piece
        sampling = call.sampling if call.seeded else dataclasses.replace(call.sampling, seed=self._next_seed(call))
        piece = await self._requests.generate(self._position, call.input_ids, sampling)
        assert piece.result is not None
        if piece.result.reason is FinishReason.ABORT:
            self.aborted.set()
        versions = piece.result.weight_versions
        self.made.append(MadeCall(call.input_ids, piece.token_ids, piece.log_probs, versions, call.sampling))
        return piece

    def _next_seed(self, call: GenerateCall) -> int:
        """Return a seed that follows from the sample's, the input, and how often that was asked before.

        So no two requests share their random numbers, and a run repeats them.
        """
        key = xxhash.xxh3_64_intdigest(np.asarray(call.input_ids, np.int64).tobytes(), seed=self._seed & (2**64 - 1))
        times = self._repeated[key] = self._repeated.get(key, -1) + 1
        return (key + times * 0x9E3779B97F4A7C15) % 2**63
