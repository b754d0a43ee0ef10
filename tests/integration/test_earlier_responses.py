"""Drafts through preempted, aborted and killed rollouts: no token is lost or repeated, earlier responses are found."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from rollout_kit import Rollout, Run, checkpoint, job_config, lease, reward_service, rollout_service
from torch_engine_models import save_checkpoint

from miles.drafts.new_head import write_new_head
from miles.queue import GroupQueue, JobKeys, connect_async
from miles.rpc import connect
from miles.rpc.gen import rollout_pb2, rollout_pb2_grpc
from miles.tasks import cancelled_at_end
from miles.types import Sample

DRAFTS: dict[str, Any] = {
    "rollout_backend": "torch",
    "sglang_speculative_num_steps": 4,
    "sglang_speculative_adaptive": False,
}
NGRAM: dict[str, Any] = {**DRAFTS, "sglang_speculative_algorithm": "NGRAM"}
LEAST = {"NGRAM": 2.0, "STANDALONE": 1.2, "EAGLE3": 1.0}
"""Tokens per verification: a draft model that is a copy of the policy drafts well, a head from nothing does not."""
TOKENS = 160
GROUPS = 3
EPOCH = 100
"""Between the group ids of a prompt in one epoch and in the next."""


def leased(job_id: str, group_id: int, attempt: int = 1) -> rollout_pb2.RunRequest:
    """A group of a prompt that comes again in each epoch, with the same seeds, so that its responses are the same."""
    request = lease(job_id, group_id % EPOCH, attempt=attempt, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    request.lease.group_id = request.lease.group.group_id = group_id
    for sample in request.lease.group.samples:
        sample.group_id = group_id
    return request


async def responses(redis_url: str, job_id: str, epoch: int) -> list[Sample]:
    """What was queued of an epoch."""
    client = await connect_async(redis_url)
    found = await GroupQueue(client, job_id).collect([group + epoch * EPOCH for group in range(GROUPS)], 60)
    await client.aclose()
    return [sample for _, group in found.values() for sample in group.samples]


async def until_kept(redis_url: str, job_id: str, prompts: int) -> None:
    client = await connect_async(redis_url)
    async with asyncio.timeout(100):
        while await client.zcard(JobKeys(job_id).response_ages) < prompts:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await client.aclose()


@contextlib.asynccontextmanager
async def rollout_process(redis_url: str) -> AsyncIterator[tuple[Rollout, Any]]:
    """A rollout service in a process of its own, with the process."""
    arguments = (sys.executable, "-m", "miles.services.rollout", "--worker-id", "rollout-1", "--device", "cpu")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE, env=environment)
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 200)).decode()
        async with connect(line.rpartition(" ")[2].strip()) as channel:
            yield Rollout(None, rollout_pb2_grpc.RolloutServiceStub(channel), redis_url), process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def run_epoch(rollout: Rollout, job_id: str, epoch: int, attempt: int = 1) -> None:
    """Generate an epoch's groups."""
    run = await rollout.run(job_id)
    await run.send(*(leased(job_id, group + epoch * EPOCH, attempt) for group in range(GROUPS)))
    for group_id, outcome in (await run.outcomes(GROUPS)).items():
        assert outcome.HasField("finished"), (group_id, outcome)
    await run.call.done_writing()


async def until_generated(rollout: Rollout, tokens: int) -> None:
    async with asyncio.timeout(200):
        while (await rollout.stub.GetStatus(rollout_pb2.RolloutGetStatusRequest())).progress.generated_tokens < tokens:
            pass


def accept_length(samples: list[Sample]) -> float:
    """Mean tokens per verification."""
    counts = [sample.speculative for sample in samples if sample.speculative is not None]
    verified = sum(count.verify_count for count in counts)
    return 1 + sum(count.accepted_draft_tokens for count in counts) / verified if verified else 1.0


def assert_same(found: list[Sample], expected: list[Sample]) -> None:
    for sample, other in zip(found, expected, strict=True):
        assert sample.response_tokens.tolist() == other.response_tokens.tolist()
        assert [(span.start, span.end) for span in sample.weight_versions] == [(0, TOKENS)]
        np.testing.assert_allclose(sample.rollout_log_probs, other.rollout_log_probs, atol=1e-4)


@pytest.mark.slow
async def test_a_service_that_takes_over_from_a_killed_one_drafts_from_its_responses_and_changes_none(
    redis_url: str, job_id: str, tmp_path: pathlib.Path
) -> None:
    plain, drafted = f"{job_id}-plain", f"{job_id}-drafted"
    checkpoint(tmp_path)
    async with reward_service() as rewards, rollout_service(redis_url) as rollout:
        await rollout.start_job(plain, job_config(tmp_path), rewards)
        await run_epoch(rollout, plain, 0)
        async with rollout_process(redis_url) as (killed, process):
            await killed.start_job(drafted, job_config(tmp_path, **NGRAM), rewards)
            await run_epoch(killed, drafted, 0)
            await until_kept(redis_url, drafted, GROUPS)
            run = await killed.run(drafted, lease_number=2)
            await run.send(*(leased(drafted, group + EPOCH) for group in range(GROUPS)))
            await until_generated(killed, 2 * GROUPS * TOKENS + 100)
            process.send_signal(signal.SIGKILL)
        await rollout.start_job(drafted, job_config(tmp_path, **NGRAM), rewards)
        await run_epoch(rollout, drafted, 1, attempt=2)
    expected = await responses(redis_url, plain, 0)
    first, second = [await responses(redis_url, drafted, epoch) for epoch in range(2)]
    for epoch in (first, second):
        assert_same(epoch, expected)
    assert accept_length(second) > 1.5 * accept_length(first)
    assert accept_length(second) > 3


def drafts_of(kind: str, policy: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """Settings of a kind of drafts, with a draft model in `folder`."""
    if kind == "NGRAM":
        return NGRAM
    if kind == "STANDALONE":
        shutil.copytree(policy, folder)
    else:
        write_new_head(policy, folder)
    return {**DRAFTS, "sglang_speculative_algorithm": kind, "sglang_speculative_draft_model_path": str(folder)}


@pytest.mark.parametrize(
    "kind", ["NGRAM", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("STANDALONE", "EAGLE3"))]
)
async def test_preempted_and_paused_responses_go_on_as_if_undisturbed(
    kind: str, redis_url: str, job_id: str, tmp_path: pathlib.Path
) -> None:
    plain, drafted = f"{job_id}-plain", f"{job_id}-drafted"
    policy = tmp_path / "policy"
    save_checkpoint(policy, "llama", num_hidden_layers=4, layer_types=None)
    drafts = drafts_of(kind, policy, tmp_path / "draft")
    async with reward_service() as rewards, rollout_service(redis_url) as rollout:
        await rollout.start_job(plain, job_config(policy), rewards)
        await run_epoch(rollout, plain, 0)
        await rollout.start_job(drafted, job_config(policy, **drafts), rewards)
        await run_epoch(rollout, drafted, 0)
        if kind == "NGRAM":
            await until_kept(redis_url, drafted, GROUPS)
        groups = Disturbed(rollout, drafted, epoch=1)
        await groups.run_all()
    assert groups.saved_tokens > 0
    found = await responses(redis_url, drafted, 1)
    assert_same(found, await responses(redis_url, plain, 0))
    assert accept_length(found) >= LEAST[kind]


class Disturbed:
    """A run's groups, of which each is leased again whenever it was preempted."""

    def __init__(self, rollout: Rollout, job_id: str, epoch: int) -> None:
        self.saved_tokens = 0
        """Stored at all preemptions together."""
        self._rollout = rollout
        self._job_id = job_id
        self._attempts = {group + epoch * EPOCH: 1 for group in range(GROUPS)}
        self._sending = asyncio.Lock()

    async def run_all(self) -> None:
        """Return once each group has finished."""
        run = await self._rollout.run(self._job_id)
        await run.send(*(leased(self._job_id, group) for group in self._attempts))
        async with cancelled_at_end(asyncio.create_task(self._disturb(run))):
            while self._attempts:
                outcome = await run.outcome()
                if outcome.HasField("finished"):
                    del self._attempts[outcome.finished.group_id]
                    continue
                group = outcome.preempted.group_id
                self.saved_tokens += outcome.preempted.saved_tokens
                self._attempts[group] += 1
                async with self._sending:
                    await run.send(leased(self._job_id, group, self._attempts[group]))

    async def _disturb(self, run: Run) -> None:
        """Preempt all groups, pause in each of the ways that take the cache away, and again."""
        stub = self._rollout.stub
        for i in itertools.count():
            await self._rollout.until_generated(50)
            if i % 3 == 0:
                async with self._sending:
                    for group, attempt in list(self._attempts.items()):
                        await run.preempt_group(group, attempt)
                continue
            mode = rollout_pb2.PAUSE_MODE_ABORT if i % 3 == 1 else rollout_pb2.PAUSE_MODE_RETRACT
            operation = {"job_id": self._job_id, "operation_id": f"{i}"}
            await stub.Pause(rollout_pb2.PauseRequest(mode=mode, token_ttl_ms=60_000, **operation))
            await stub.Resume(rollout_pb2.ResumeRequest(**operation))
