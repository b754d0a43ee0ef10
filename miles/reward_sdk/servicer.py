"""The gRPC side of a reward service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc.aio

from miles.reward_sdk.scorer import Scorer
from miles.rpc.gen import reward_pb2, reward_pb2_grpc

SERVICE_NAME = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name
MAX_REQUESTS_PER_STREAM = 1024
"""Requests of one stream that are scored at once; past that the stream is not read, and the caller's writes wait."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Scores requests concurrently with a `Scorer` and answers each when it is scored."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    async def Score(self, request_iterator: AsyncIterator[reward_pb2.ScoreRequest], context: Context) -> None:  # type: ignore[override]
        """Read requests, score each in its own task, and write each answer when it is ready."""
        slots = asyncio.Semaphore(MAX_REQUESTS_PER_STREAM)
        writing = asyncio.Lock()

        async def answer(request: reward_pb2.ScoreRequest) -> None:
            scores = await self._scorer.score(request)
            async with writing:
                await context.write(reward_pb2.ScoreResponse(request_id=request.request_id, scores=scores))

        async with asyncio.TaskGroup() as tasks:
            async for request in request_iterator:
                await slots.acquire()
                tasks.create_task(answer(request)).add_done_callback(lambda _: slots.release())

    async def Describe(self, request: reward_pb2.DescribeRequest, context: Context) -> reward_pb2.DescribeResponse:
        """List the rewards that can be asked for."""
        return reward_pb2.DescribeResponse(rewards=list(self._scorer.functions), default_reward=self._scorer.default)
