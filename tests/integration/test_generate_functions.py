"""Generate functions of users through the rollout service, with the torch engine and SGLang's own server on a CPU."""

from __future__ import annotations

import pathlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from rollout_kit import Rollout, checkpoint, job_config, lease, reward_service, rollout_service
from sglang_kit import CPU_FLAGS, CPU_PYTHON, ON_GPU, have_sglang
from transformers import AutoTokenizer

from miles.queue import GroupQueue, connect_async
from miles.rpc.gen import rollout_pb2
from miles.types import Sample, SampleStatus, VersionSpan
from miles.types.convert import group_from_proto

EVAL = rollout_pb2.GROUP_PURPOSE_EVAL


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return checkpoint(tmp_path)


@pytest.fixture
async def rollout(redis_url: str) -> AsyncIterator[Rollout]:
    async with rollout_service(redis_url) as service:
        yield service


@pytest.fixture
async def rewards() -> AsyncIterator[str]:
    async with reward_service() as address:
        yield address


async def queued(redis_url: str, job_id: str, group_id: int) -> list[Sample]:
    redis = await connect_async(redis_url)
    try:
        _, group = (await GroupQueue(redis, job_id).collect([group_id], 30))[group_id]
        return list(group.samples)
    finally:
        await redis.aclose()


def using(folder: pathlib.Path, function: str, **changes: Any) -> Any:
    return job_config(folder, custom_generate_function_path=f"generate_functions.{function}", **changes)


async def test_a_function_of_two_turns_generates_the_samples_of_a_group(
    rollout: Rollout, rewards: str, folder: pathlib.Path, redis_url: str, job_id: str
) -> None:
    await rollout.start_job(job_id, using(folder, "two_turns"), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 3))
    outcome = await run.outcome()
    assert outcome.finished.entry_id, outcome
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tool = tokenizer.encode(" TOOL ", add_special_tokens=False)
    samples = await queued(redis_url, job_id, 3)
    for sample in samples:
        assert sample.prompt_tokens.tolist() == tokenizer.encode("p", add_special_tokens=False)
        assert sample.status is SampleStatus.COMPLETED
        assert sample.loss_mask is not None
        masked = np.flatnonzero(sample.loss_mask == 0)
        assert sample.response_tokens[masked].tolist() == tool
        first = int(masked[0])
        assert masked.tolist() == list(range(first, first + len(tool)))
        assert sample.weight_versions == (VersionSpan(0, 0, sample.response_length),)
        assert sample.rollout_log_probs is not None
        assert (sample.rollout_log_probs[sample.loss_mask == 1] < 0).all()
        assert sample.response == tokenizer.decode(sample.response_tokens.tolist())
        assert sample.reward == float(sample.index)
        assert sample.metadata["turns"] == 2
        assert sample.metadata["sample_attributes"] == {"tool_calls": 1}
    one, two = (sample.response_tokens.tolist() for sample in samples)
    assert one != two, "each sample has random numbers of its own"
    assert one[: len(one) - 5] != one[-5:]


async def test_a_repeated_group_has_the_same_tokens(
    rollout: Rollout, rewards: str, folder: pathlib.Path, redis_url: str, job_id: str
) -> None:
    found = []
    for name in (job_id, job_id + "-again"):
        await rollout.start_job(name, using(folder, "two_turns"), rewards)
        run = await rollout.run(name)
        await run.send(lease(name, 5))
        assert (await run.outcome()).finished.entry_id
        found.append([sample.tokens.tolist() for sample in await queued(redis_url, name, 5)])
    assert found[0] == found[1]


async def test_a_reward_that_the_function_gives_is_kept_and_evaluations_say_that_they_are(
    rollout: Rollout, rewards: str, folder: pathlib.Path, redis_url: str, job_id: str
) -> None:
    await rollout.start_job(job_id, using(folder, "with_helpers"), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 1), lease(job_id, 2, purpose=EVAL))
    outcomes = await run.outcomes(2)
    assert [sample.reward for sample in await queued(redis_url, job_id, 1)] == [0.0, 1.0]
    evaluated = group_from_proto(outcomes[2].finished.group, "")
    assert [sample.reward for sample in evaluated.samples] == [10.0, 11.0]
    assert all(" TOOL " in sample.response for sample in evaluated.samples)


async def test_a_sample_that_its_function_gives_up_is_left_out_of_training(
    rollout: Rollout, rewards: str, folder: pathlib.Path, redis_url: str, job_id: str
) -> None:
    await rollout.start_job(job_id, using(folder, "gives_up"), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 1))
    assert (await run.outcome()).finished.stats.failed == 1
    first, second = await queued(redis_url, job_id, 1)
    assert (first.status, first.reward) == (SampleStatus.FAILED, None)
    assert first.metadata["reward_error"] == "the environment is gone"
    assert second.status is SampleStatus.COMPLETED


@pytest.mark.parametrize(
    ("function", "words", "retryable"),
    [
        ("raises", "generate_functions.raises on sample 0 of group 1 raised KeyError: 'no tool for index' (", True),
        ("several", "it returned 2 samples; each sample of a group is one trajectory here", False),
        ("cold", "drawn at temperature 0.5, top_p 1 and top_k -1, but are trained on at 1", False),
    ],
)
async def test_what_a_function_does_wrong_fails_the_group_with_words(
    function: str, words: str, retryable: bool, rollout: Rollout, rewards: str, folder: pathlib.Path, job_id: str
) -> None:
    await rollout.start_job(job_id, using(folder, function), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 1, samples=1))
    failed = (await run.outcome()).failed
    assert words in failed.error
    assert failed.retryable == retryable


async def test_a_function_that_hangs_is_preempted_and_times_out(
    rollout: Rollout, rewards: str, folder: pathlib.Path, job_id: str
) -> None:
    await rollout.start_job(job_id, using(folder, "waits"), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 1))
    await rollout.until_generated(20)
    await run.preempt_group(1)
    assert (await run.outcome()).preempted.saved_tokens == 0

    other = job_id + "-2"
    await rollout.start_job(other, using(folder, "waits", custom_generate_timeout_s=0.2), rewards)
    run = await rollout.run(other)
    await run.send(lease(other, 1))
    assert "did not return within 0.2 s (custom_generate_timeout_s)" in (await run.outcome()).failed.error


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines")
async def test_the_same_function_runs_with_a_server_of_sglang(
    rollout: Rollout, rewards: str, folder: pathlib.Path, redis_url: str, job_id: str
) -> None:
    flags = {f"sglang_{name}": value for name, value in CPU_FLAGS.items()}
    engine = {"rollout_backend": "sglang", "rollout_engine_python": str(CPU_PYTHON), "rollout_max_context_len": 450}
    await rollout.start_job(job_id, using(folder, "two_turns", **flags, **engine), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 3))
    assert (await run.outcome()).finished.entry_id
    samples = await queued(redis_url, job_id, 3)
    for sample in samples:
        assert sample.loss_mask is not None
        assert sample.rollout_log_probs is not None
        assert (sample.rollout_log_probs[sample.loss_mask == 1] < 0).all()
        assert 0 < int(sample.loss_mask.sum()) <= 10
        assert sample.weight_versions == (VersionSpan(0, 0, sample.response_length),)
    assert len({tuple(sample.tokens.tolist()) for sample in samples}) == 2
