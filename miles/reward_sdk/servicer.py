"""`RewardService` over a `Scorer`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc.aio

from miles.reward_sdk.scorer import Scorer
from miles.rpc.gen import reward_pb2, reward_pb2_grpc

SERVICE_NAME = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name
MAX_REQUESTS_PER_STREAM = 1024
"""Requests of one stream in work at once; past that the stream is not read, and the caller's writes wait."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Scores concurrently and answers as scores come."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    async def Score(self, request_iterator: AsyncIterator[reward_pb2.ScoreRequest], context: Context) -> None:  # type: ignore[override]
        """Read requests, score each in a task of its own, write each answer when it is there."""
        slots = asyncio.Semaphore(MAX_REQUESTS_PER_STREAM)
        writing = asyncio.Lock()

        async def answer(request: reward_pb2.ScoreRequest) -> None:
            try:
                scores = await self._scorer.score(request)
                async with writing:
                    await context.write(reward_pb2.ScoreResponse(request_id=request.request_id, scores=scores))
            finally:
                slots.release()

        async with asyncio.TaskGroup() as tasks:
            async for request in request_iterator:
                await slots.acquire()
                tasks.create_task(answer(request))

    async def Describe(self, request: reward_pb2.DescribeRequest, context: Context) -> reward_pb2.DescribeResponse:
        """What can be asked for."""
        return reward_pb2.DescribeResponse(rewards=list(self._scorer.functions), default_reward=self._scorer.default)
