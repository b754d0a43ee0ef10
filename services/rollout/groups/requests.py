"""The engine requests of one group."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles.services.rollout.engines.base import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    RolloutEngine,
    SamplingParams,
)
from miles.services.rollout.groups.earlier_responses import PromptDrafts
from miles.services.rollout.groups.messages import GroupLease
from miles.services.rollout.groups.partial_response import Piece, experts_start, extend
from miles.telemetry.tracing import traced
from miles.types import Sample, SampleStatus

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_serials = itertools.count()


class GroupRequests:
    """Runs engine requests that continue the samples of one group; one abort ends them all."""

    def __init__(
        self,
        engine: RolloutEngine,
        lease: GroupLease,
        *,
        record_experts: bool = False,
        top_tokens: int = 0,
        drafts: PromptDrafts | None = None,
    ) -> None:
        """With `record_experts`, training groups record which experts were chosen, and so many likeliest tokens.

        `drafts` are the earlier responses to the group's prompt, for engines that draft from them.
        """
        self._top_tokens = top_tokens if lease.is_training else 0
        self._engine = engine
        self._lease = lease
        self._record_experts = record_experts and lease.is_training
        self._drafts = drafts
        self._running: dict[str, None] = {}  # in the order in which they began
        self._aborted = False

    @traced("engine request")
    async def extend(self, position: int, sample: Sample) -> Sample:
        """Generate after the sample's tokens, in one request; returns the sample with what it generated.

        The sample is PENDING when the request was aborted. After an abort no request is made: the sample comes back
        with no new tokens.
        """
        earlier_responses = await self._earlier_responses()
        if self._aborted:
            return dataclasses.replace(sample, status=SampleStatus.PENDING)
        request = GenerationRequest(
            request_id=self._new_id(position),
            input_ids=sample.tokens.tolist(),
            sampling=self._lease.sampling[position],
            resumed_tokens=sample.response_length,
            return_routed_experts=self._record_experts,
            routed_experts_start=experts_start(sample),
            top_token_ids=self._top_tokens,
            group=self._group,
            earlier_responses=earlier_responses,
        )
        return extend(sample, await self._run(request), with_experts=self._record_experts)

    @traced("engine request")
    async def generate(self, position: int, input_ids: Sequence[int], sampling: SamplingParams) -> Piece:
        """Generate after any tokens, in one request; after an abort none is made, and the piece is empty."""
        earlier_responses = await self._earlier_responses()
        if self._aborted:
            piece = Piece()
            piece.result = GenerationResult(FinishReason.ABORT, ())
            return piece
        return await self._run(
            GenerationRequest(
                request_id=self._new_id(position),
                input_ids=input_ids,
                sampling=sampling,
                group=self._group,
                earlier_responses=earlier_responses,
            )
        )

    async def _run(self, request: GenerationRequest) -> Piece:
        piece = Piece()
        self._running[request.request_id] = None
        try:
            async with contextlib.aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    piece.add(delta)
        finally:
            del self._running[request.request_id]
        return piece

    async def _earlier_responses(self) -> Sequence[npt.NDArray[np.int32]]:
        return () if self._drafts is None else await self._drafts.get()

    @property
    def _group(self) -> str:
        return f"{self._lease.purpose.value}-{self._lease.group_id}"

    async def abort(self) -> None:
        """End every request soon, each with the tokens it has, and make no more."""
        self._aborted = True
        await self._engine.abort(list(self._running))

    def _new_id(self, position: int) -> str:
        lease = self._lease
        return f"{lease.purpose.value}-{lease.group_id}-{lease.attempt}-{position}-{next(_serials)}"
