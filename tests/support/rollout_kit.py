"""The rollout service in this process, with a real engine, Redis and reward service, and a driver of its Run stream."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import pathlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc.aio
import numpy as np
from torch_engine_models import prompt_of, save_checkpoint

from miles.config import JobConfig
from miles.reward_sdk import Source, start_reward_server
from miles.rpc import connect, start_server
from miles.rpc.gen import rollout_pb2, rollout_pb2_grpc
from miles.services.rollout.service import RolloutServicer
from miles.types import Sample, SampleGroup
from miles.types.convert import group_to_proto

SERVICE = rollout_pb2.DESCRIPTOR.services_by_name["RolloutService"].full_name
REWARDS = pathlib.Path(__file__).parent / "rollout_rewards.py"
DEADLINE_S = 200.0


def job_config(folder: pathlib.Path, **changes: Any) -> JobConfig:
    """A job on the checkpoint in `folder`."""
    return JobConfig.from_flat(
        {
            "hf_checkpoint": str(folder),
            "prompt_data": str(folder / "prompts.jsonl"),
            "num_rollout": 1,
            "rollout_batch_size": 2,
            "n_samples_per_prompt": 2,
            "rollout_max_response_len": 400,
            "rollout_dtype": "float32",
            "device": "cpu",
            "max_running_requests": 8,
            "custom_rm_path": "rollout_rewards.by_label",
            "reward_timeout_s": 60.0,
            "reward_retries": 1,
            "lr": 1e-5,
            **changes,
        }
    )


def lease(
    job_id: str,
    group_id: int,
    *,
    attempt: int = 1,
    samples: int = 2,
    label: str = "index",
    metadata: dict[str, Any] | None = None,
    purpose: rollout_pb2.GroupPurpose.ValueType = rollout_pb2.GROUP_PURPOSE_TRAIN,
    min_version: int | None = None,
    exact_version: int | None = None,
    **sampling: Any,
) -> rollout_pb2.RunRequest:
    """A lease of a group whose prompt and seeds follow from its id."""
    prompt = np.array(prompt_of(7, group_id), np.int32)
    group = SampleGroup(
        job_id,
        group_id,
        [
            Sample(group_id=group_id, index=i, prompt="p", tokens=prompt, label=label, metadata=metadata or {})
            for i in range(samples)
        ],
    )
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 12, **sampling}
    return rollout_pb2.RunRequest(
        lease=rollout_pb2.GroupLease(
            group_id=group_id,
            attempt=attempt,
            purpose=purpose,
            group=group_to_proto(group),
            sampling=[rollout_pb2.SamplingParams(seed=1000 * group_id + i, **params) for i in range(samples)],
            min_version=min_version,
            exact_version=exact_version,
        )
    )


LONG = {"max_new_tokens": 400, "min_new_tokens": 400}
"""Long enough to be caught in the middle."""


class Run:
    """A Run stream as the controller drives it."""

    def __init__(self, stub: rollout_pb2_grpc.RolloutServiceStub) -> None:
        self.call: Any = stub.Run()
        self.progress = rollout_pb2.RunProgress()
        self.capacity = -1
        self.ready = rollout_pb2.RunReady()
        self.messages = 0
        """How many came, of one response or several."""
        self._unread: collections.deque[rollout_pb2.RunResponse] = collections.deque()

    async def open(self, job_id: str, lease_number: int = 1, *, takes_several: bool = True) -> Run:
        opening = rollout_pb2.RunOpen(job_id=job_id, lease_number=lease_number, takes_several=takes_several)
        await self.call.write(rollout_pb2.RunRequest(open=opening))
        await self.until(lambda: self.capacity >= 0)
        return self

    async def send(self, *requests: rollout_pb2.RunRequest) -> None:
        for request in requests:
            await self.call.write(request)

    async def preempt_group(self, group_id: int, attempt: int = 1) -> None:
        await self.send(rollout_pb2.RunRequest(preempt=rollout_pb2.GroupPreempt(group_id=group_id, attempt=attempt)))

    async def read(self) -> rollout_pb2.RunResponse | None:
        """The next response; None at the end of the stream."""
        if not self._unread:
            message = await asyncio.wait_for(self.call.read(), DEADLINE_S)
            if message is grpc.aio.EOF:
                return None
            self.messages += 1
            self._unread.extend(message.several.responses or (message,))
        response = self._unread.popleft()
        if response.HasField("progress"):
            self.progress = response.progress
        if response.HasField("ready"):
            self.ready, self.capacity = response.ready, response.ready.capacity_groups
        return response

    async def until(self, done: Any) -> None:
        """Read on until `done()`."""
        async with asyncio.timeout(DEADLINE_S):
            while not done():
                assert await self.read() is not None, "the stream ended"

    async def outcome(self) -> rollout_pb2.RunResponse:
        """The next group that finished, failed or was preempted."""
        while (response := await self.read()) is not None:
            if response.WhichOneof("kind") in ("finished", "failed", "preempted"):
                return response
        raise AssertionError("the stream ended")

    async def outcomes(self, number: int) -> dict[int, rollout_pb2.RunResponse]:
        """The next outcomes by group id."""
        found: dict[int, rollout_pb2.RunResponse] = {}
        while len(found) < number:
            response = await self.outcome()
            found[getattr(response, response.WhichOneof("kind")).group_id] = response
        return found


class Rollout:
    """A rollout service and a stub for it."""

    def __init__(self, servicer: RolloutServicer, stub: rollout_pb2_grpc.RolloutServiceStub, redis_url: str) -> None:
        self.servicer = servicer
        self.stub = stub
        self._redis_url = redis_url

    async def start_job(
        self, job_id: str, config: JobConfig, rewards: str, weightsync: str = "", redis_url: str | None = None
    ) -> list[str]:
        """Start a job; returns the stages it went through."""
        request = rollout_pb2.RolloutStartJobRequest(
            job_id=job_id,
            config_json=json.dumps(config.to_flat()),
            redis_url=redis_url or self._redis_url,
            weightsync_address=weightsync,
            reward_addresses={"default": rewards},
        )
        messages = [message async for message in self.stub.StartJob(request, timeout=DEADLINE_S)]
        assert messages[-1].ready
        return [message.stage for message in messages]

    async def until_generated(self, tokens: int) -> None:
        """Wait until the engines have generated this many tokens more."""
        goal = self.generated + tokens
        for _ in range(int(DEADLINE_S / 0.005)):
            if self.generated >= goal:
                return
            await asyncio.sleep(0.005)
        raise TimeoutError(f"{self.generated} of {goal} tokens after {DEADLINE_S:.0f} s")

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return self.servicer.progress().generated_tokens

    async def run(self, job_id: str, lease_number: int = 1, *, takes_several: bool = True) -> Run:
        """An open Run stream."""
        return await Run(self.stub).open(job_id, lease_number, takes_several=takes_several)


@contextlib.asynccontextmanager
async def rollout_service(redis_url: str) -> AsyncIterator[Rollout]:
    """A rollout service without jobs."""
    servicer = RolloutServicer(worker_id="rollout-0")
    server, address = await start_server(
        lambda server: rollout_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, server), "127.0.0.1:0", [SERVICE]
    )
    try:
        async with connect(address) as channel:
            yield Rollout(servicer, rollout_pb2_grpc.RolloutServiceStub(channel), redis_url)
    finally:
        await servicer.close()
        await server.stop(1.0)


@contextlib.asynccontextmanager
async def reward_service(address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """A reward service with the functions of rollout_rewards.py; yields its address."""
    async with start_reward_server([Source(str(REWARDS), script=True)], address, workers=1) as (bound, _):
        yield bound


def checkpoint(folder: pathlib.Path, family: str = "qwen3") -> pathlib.Path:
    """A tiny random model with its weights."""
    save_checkpoint(folder, family)
    return folder


def rewards_of(samples: Sequence[Sample]) -> list[Any]:
    return [sample.reward for sample in samples]
