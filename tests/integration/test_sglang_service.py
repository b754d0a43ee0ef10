"""The rollout service with real SGLang servers on the CPU: groups through two of them, and one killed at work."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
from collections.abc import AsyncIterator

import pytest
import rollout_kit
from rollout_kit import LONG, Rollout, Run, job_config, lease, reward_service, rollout_service
from sglang_kit import CPU_FLAGS, CPU_PYTHON, ON_GPU, have_sglang
from torch_engine_models import save_checkpoint

from miles.queue import GroupQueue, connect_async
from miles.services.rollout.engines.sglang import SglangEngine

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(2700),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines"),
]
START_DEADLINE_S = 900.0


@pytest.fixture
async def rollout(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rollout]:
    monkeypatch.setattr(rollout_kit, "DEADLINE_S", START_DEADLINE_S)
    async with rollout_service(redis_url) as service:
        yield service


async def until_capacity(run: Run, enough: bool) -> None:
    await run.until(lambda: (run.capacity > 0) is enough)


async def test_groups_go_through_two_servers_and_survive_the_death_of_one(
    rollout: Rollout, job_id: str, tmp_path: pathlib.Path, redis_url: str
) -> None:
    save_checkpoint(tmp_path / "model", "qwen3", initializer_range=0.1)
    config = job_config(
        tmp_path / "model",
        rollout_backend="sglang",
        rollout_engine_python=str(CPU_PYTHON),
        rollout_num_gpus=2,
        run_dir=str(tmp_path / "run"),
        n_samples_per_prompt=4,
        **{f"sglang_{name}": value for name, value in CPU_FLAGS.items()},
    )
    async with reward_service() as rewards:
        await rollout.start_job(job_id, config, rewards)
        engine = rollout.servicer._jobs[job_id].engine
        assert isinstance(engine, SglangEngine)
        run = await rollout.run(job_id)
        await run.send(lease(job_id, 1, samples=4), lease(job_id, 2, samples=4))
        done = await run.outcomes(2)
        assert all(response.HasField("finished") for response in done.values())

        await run.send(lease(job_id, 3, samples=4, **LONG), lease(job_id, 4, samples=4, **LONG))
        await rollout.until_generated(8)
        at_work = [replica for replica in engine.replicas if replica.running]
        assert [replica.running for replica in at_work] == [4, 4], "each server has one whole group"
        victim = at_work[0]
        assert victim.pid is not None
        os.killpg(victim.pid, signal.SIGKILL)
        outcomes = await run.outcomes(2)
        failed = [response.failed for response in outcomes.values() if response.HasField("failed")]
        assert [outcome.retryable for outcome in failed] == [True]
        assert sum(response.HasField("finished") for response in outcomes.values()) == 1

        # Its share goes to the other server at once, and both work again once it is back.
        await run.send(lease(job_id, failed[0].group_id, attempt=2, samples=4))
        assert (await run.outcome()).HasField("finished")
        async with asyncio.timeout(START_DEADLINE_S):
            while victim.version is None:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        await run.send(lease(job_id, 5, samples=4), lease(job_id, 6, samples=4))
        done = await run.outcomes(2)
        assert all(response.HasField("finished") for response in done.values())
        redis = await connect_async(redis_url)
        try:
            found = await GroupQueue(redis, job_id).find(5)
        finally:
            await redis.aclose()
        assert found is not None
        assert all(len(sample.rollout_log_probs) == sample.response_length for sample in found[1].samples)
