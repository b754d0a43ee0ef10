"""Samplers behind a group's run, with a real engine, queue and reward service."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from rollout_kit import job_config, lease, reward_service
from torch_engine_models import running_engine, save_checkpoint, weights_of
from transformers import AutoTokenizer

from miles.queue import GroupQueue, PartialStore, connect_async
from miles.reward_sdk import RewardClient
from miles.services.rollout.engines.torch import TorchEngine
from miles.services.rollout.groups.group_run import GroupRun, GroupTools
from miles.services.rollout.groups.messages import Failed, Finished, GroupLease, Preempted, lease_from_proto
from miles.services.rollout.groups.requests import GroupRequests
from miles.services.rollout.groups.response_sampler import Sampler
from miles.services.rollout.groups.scoring import JobRewards
from miles.services.rollout.serving.version_gate import VersionGate
from miles.types import Sample, SampleStatus

OBSERVATION = [84, 79, 79, 76]
"""Tokens that the tool answers with."""
SAMPLING: dict[str, Any] = {"max_new_tokens": 200, "min_new_tokens": 6, "stop_token_ids": list(range(128))}
"""A turn ends with the first of these tokens; the first turn has at least 6."""


class TwoTurns:
    """Generates until a stop token, asks a tool, and generates again."""

    def __init__(self, requests: GroupRequests, tool: asyncio.Event) -> None:
        self._requests = requests
        self._tool = tool
        self._aborted = asyncio.Event()

    async def respond(self, position: int, sample: Sample) -> AsyncGenerator[Sample, None]:
        if "tool" not in sample.metadata:
            sample = await self._requests.extend(position, sample)
            if sample.status is not SampleStatus.COMPLETED:
                yield sample
                return
            asked = {**sample.metadata, "tool": "asked"}
            yield (sample := dataclasses.replace(sample, status=SampleStatus.PENDING, metadata=asked))
        if sample.metadata["tool"] == "asked":
            events = [asyncio.create_task(event.wait()) for event in (self._tool, self._aborted)]
            await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
            for event in events:
                event.cancel()
            if self._aborted.is_set():
                return
            yield (sample := with_observation(sample))
        yield await self._requests.extend(position, sample)

    async def abort(self) -> None:
        self._aborted.set()
        await self._requests.abort()


class FirstFails(TwoTurns):
    """Fails the first sample as soon as the others have asked the tool."""

    async def respond(self, position: int, sample: Sample) -> AsyncGenerator[Sample, None]:
        if position == 0:
            await self._tool.wait()
            raise RuntimeError("the tool is broken")
        async for grown in super().respond(position, sample):
            yield grown


def with_observation(sample: Sample) -> Sample:
    """The sample with the tool's answer, masked out of the loss, as tokens of the version before."""
    new = len(OBSERVATION)
    length = sample.response_length
    mask = np.ones(length, np.uint8) if sample.loss_mask is None else sample.loss_mask
    assert sample.rollout_log_probs is not None
    *spans, last = sample.weight_versions
    return dataclasses.replace(
        sample,
        tokens=np.concatenate([sample.tokens, np.array(OBSERVATION, np.int32)]),
        response_length=length + new,
        loss_mask=np.concatenate([mask, np.zeros(new, np.uint8)]),
        rollout_log_probs=np.concatenate([sample.rollout_log_probs, np.zeros(new, np.float32)]),
        weight_versions=(*spans, last._replace(end=length + new)),
        metadata={**sample.metadata, "tool": "answered"},
    )


@dataclasses.dataclass
class Scene:
    """A job's group tools with one engine."""

    engine: TorchEngine
    tools: GroupTools
    tokenizer: Any

    def run(self, group: GroupLease, create: Callable[[GroupRequests], Sampler]) -> GroupRun:
        tools = dataclasses.replace(
            self.tools, create_sampler=lambda leased: create(GroupRequests(self.engine, leased))
        )
        return GroupRun(group, tools)

    async def stored(self, group_id: int) -> list[Sample]:
        """The samples of a group that is stored to be resumed."""
        partial = await self.tools.partials.load(group_id)
        assert partial is not None
        return list(partial.samples)

    async def until_asked(self, samples: int) -> None:
        """Wait until this many responses have ended their first turn."""
        async with asyncio.timeout(100):
            while (stats := self.engine.stats()).running_requests + stats.waiting_requests or (  # noqa: ASYNC110
                stats.generated_tokens < 6 * samples
            ):
                await asyncio.sleep(0.01)


@pytest.fixture
async def scene(redis_url: str, job_id: str, tmp_path: pathlib.Path) -> AsyncIterator[Scene]:
    model = save_checkpoint(tmp_path, "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    config = job_config(tmp_path)
    gate = VersionGate()
    gate.open(0)
    async with contextlib.AsyncExitStack() as stack:
        redis = await connect_async(redis_url)
        stack.push_async_callback(redis.aclose)
        address = await stack.enter_async_context(reward_service())
        client = await stack.enter_async_context(RewardClient({"default": address}))
        engine = await stack.enter_async_context(running_engine(tmp_path, weights_of(model)))
        tools = GroupTools(
            job_id=job_id,
            config=config,
            create_sampler=lambda leased: TwoTurns(GroupRequests(engine, leased), asyncio.Event()),
            gate=gate,
            decode=lambda tokens, skip: str(tokenizer.decode(tokens, skip_special_tokens=skip)),
            rewards=JobRewards(client, config.reward),
            queue=GroupQueue(redis, job_id),
            partials=PartialStore(redis, job_id),
        )
        yield Scene(engine, tools, tokenizer)


def lease_of(job_id: str, group_id: int, attempt: int = 1) -> GroupLease:
    return lease_from_proto(lease(job_id, group_id, attempt=attempt, samples=3, **SAMPLING).lease)


async def test_a_group_of_two_requests_a_response_is_preempted_between_them_resumed_and_queued(
    scene: Scene, job_id: str
) -> None:
    never = asyncio.Event()
    run = scene.run(lease_of(job_id, 3), lambda requests: TwoTurns(requests, never))
    running = asyncio.create_task(run.run())
    await scene.until_asked(3)
    run.preempt()
    outcome = await running
    first_turns = scene.engine.stats().generated_tokens
    assert outcome == Preempted(saved_tokens=first_turns)
    stored = await scene.stored(3)
    assert [sample.status for sample in stored] == [SampleStatus.PENDING] * 3
    assert [sample.metadata["tool"] for sample in stored] == ["asked"] * 3

    answered = asyncio.Event()
    answered.set()
    outcome = await scene.run(lease_of(job_id, 3, attempt=2), lambda requests: TwoTurns(requests, answered)).run()
    assert isinstance(outcome, Finished)
    _, group = (await scene.tools.queue.collect([3], 30))[3]
    sampled = 0
    for before, sample in zip(stored, group.samples, strict=True):
        first, new = before.response_length, len(OBSERVATION)
        assert sample.status is SampleStatus.COMPLETED
        assert sample.reward == float(sample.index)
        response = sample.response_tokens.tolist()
        assert response[:first] == before.response_tokens.tolist()
        assert response[first : first + new] == OBSERVATION
        assert sample.response_length > first + new
        assert sample.loss_mask is not None
        assert np.flatnonzero(sample.loss_mask == 0).tolist() == list(range(first, first + new))
        assert sample.weight_versions[-1].end == sample.response_length
        assert sample.response == scene.tokenizer.decode(response)
        sampled += sample.response_length - new
    assert scene.engine.stats().generated_tokens == sampled
    assert await scene.tools.partials.load(3) is None


async def test_an_error_of_one_response_ends_the_others_and_keeps_what_they_have(scene: Scene, job_id: str) -> None:
    broken = asyncio.Event()
    run = scene.run(lease_of(job_id, 4), lambda requests: FirstFails(requests, broken))
    running = asyncio.create_task(run.run())
    await scene.until_asked(2)
    broken.set()
    outcome = await running
    assert outcome == Failed("RuntimeError: the tool is broken", retryable=True)
    first, *others = await scene.stored(4)
    assert first.response_length == 0
    assert all(sample.response_length >= 6 for sample in others)
    assert scene.engine.stats().running_requests == 0
