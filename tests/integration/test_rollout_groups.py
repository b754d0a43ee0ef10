"""Groups through the rollout service: generated, scored, filtered, queued, or preempted and resumed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import socket
from collections.abc import AsyncIterator

import grpc.aio
import numpy as np
import pytest
import torch
from rollout_kit import LONG, Rollout, checkpoint, job_config, lease, reward_service, rewards_of, rollout_service
from torch_engine_models import prompt_of, reference_log_probs, save_checkpoint
from transformers import AutoTokenizer

from miles.queue import GroupQueue, PartialStore, connect_async
from miles.rpc.gen import rollout_pb2
from miles.services.rollout.groups import partial_group
from miles.services.rollout.groups.partial_response import FINISHED
from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan
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


def same(left: Sample, right: Sample, field: str) -> bool:
    """Equality of one field, bit for bit."""
    one, two = getattr(left, field), getattr(right, field)
    return np.array_equal(one, two) if isinstance(one, np.ndarray) else bool(one == two)


class Stores:
    """What the job has in Redis."""

    def __init__(self, queue: GroupQueue, partials: PartialStore) -> None:
        self.queue = queue
        self.partials = partials

    async def group(self, group_id: int) -> SampleGroup:
        return (await self.queue.collect([group_id], 30))[group_id][1]

    async def partial(self, group_id: int) -> SampleGroup:
        for _ in range(1500):
            if (partial := await self.partials.load(group_id)) is not None:
                return partial
            await asyncio.sleep(0.02)
        raise TimeoutError(f"group {group_id} was not stored within 30 s")

    async def queued(self) -> list[int]:
        return [entry.group_id for entry in await self.queue.outstanding()]


@contextlib.asynccontextmanager
async def stores_of(redis_url: str, job_id: str) -> AsyncIterator[Stores]:
    client = await connect_async(redis_url)
    yield Stores(GroupQueue(client, job_id), PartialStore(client, job_id))
    await client.aclose()


@pytest.fixture
async def stores(redis_url: str, job_id: str) -> AsyncIterator[Stores]:
    async with stores_of(redis_url, job_id) as opened:
        yield opened


async def test_a_group_is_generated_scored_and_queued(
    rollout: Rollout, rewards: str, job_id: str, stores: Stores, tmp_path: pathlib.Path
) -> None:
    model = save_checkpoint(tmp_path, "qwen3")
    stages = await rollout.start_job(job_id, job_config(tmp_path), rewards)
    assert "building the torch engine" in stages
    run = await rollout.run(job_id, lease_number=7)
    await run.send(lease(job_id, 3, samples=3))
    response = await run.outcome()
    assert response.lease_number == 7
    finished = response.finished
    assert (finished.group_id, finished.attempt, finished.verdict) == (3, 1, rollout_pb2.FILTER_VERDICT_KEEP)
    group = await stores.group(3)
    [entry] = await stores.queue.outstanding()
    assert entry.entry_id == finished.entry_id
    assert rewards_of(group.samples) == [0.0, 1.0, 2.0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for sample in group.samples:
        response_tokens = sample.response_tokens.tolist()
        assert sample.status in FINISHED
        assert sample.prompt_tokens.tolist() == prompt_of(7, 3)
        assert sample.response == tokenizer.decode(response_tokens).removesuffix(tokenizer.eos_token)
        assert sample.metadata == {"scored": len(response_tokens)}
        assert sample.weight_versions == (VersionSpan(0, 0, len(response_tokens)),)
        assert sample.rollout_log_probs is not None
        expected = reference_log_probs(model, sample.prompt_tokens.tolist(), response_tokens)
        assert torch.allclose(torch.tensor(sample.rollout_log_probs), expected, atol=1e-4)
    stats = finished.stats
    assert (stats.samples, stats.reward_sum, stats.reward_square_sum) == (3, 3.0, 5.0)
    assert stats.response_tokens == sum(sample.response_length for sample in group.samples)


async def test_a_group_that_is_queued_already_is_not_generated_again(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 3))
    first = (await run.outcome()).finished
    generated = rollout.generated
    await run.send(lease(job_id, 3, attempt=2))
    second = (await run.outcome()).finished
    assert (second.entry_id, second.attempt) == (first.entry_id, 2)
    assert second.stats.reward_sum == first.stats.reward_sum
    assert rollout.generated == generated


@pytest.mark.parametrize("takes_several", [True, False])
async def test_outcomes_that_wait_together_are_one_message_to_those_who_take_several(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path, takes_several: bool
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id, takes_several=takes_several)
    before = run.messages
    malformed = [lease(job_id, group_id, temperature=-1).lease for group_id in range(5)]
    await run.send(rollout_pb2.RunRequest(leases=rollout_pb2.GroupLeases(leases=malformed)))
    outcomes = await run.outcomes(5)
    assert sorted(outcomes) == list(range(5))
    assert all(not outcome.failed.retryable for outcome in outcomes.values())
    assert (run.messages - before < 5) == takes_several


async def test_an_evaluation_group_comes_back_and_is_never_queued(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path, stores: Stores
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id)
    # The same id as a training group: the two have nothing to do with each other.
    await run.send(lease(job_id, 3, purpose=EVAL, exact_version=0, temperature=0.0), lease(job_id, 3, **LONG))
    finished = (await run.outcome()).finished
    assert (finished.purpose, finished.entry_id) == (EVAL, "")
    group = group_from_proto(finished.group)
    assert rewards_of(group.samples) == [0.0, 1.0]
    assert group.samples[0].response_tokens.tolist() == group.samples[1].response_tokens.tolist()
    assert await stores.queued() == []
    assert (await run.outcome()).finished.purpose == rollout_pb2.GROUP_PURPOSE_TRAIN
    assert await stores.queued() == [3]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
async def test_a_preempted_group_is_resumed_and_ends_as_if_uninterrupted(
    family: str, rollout: Rollout, rewards: str, job_id: str, tmp_path: pathlib.Path, redis_url: str
) -> None:
    config = job_config(checkpoint(tmp_path, family), use_rollout_routing_replay=family == "qwen3_moe")
    jobs = (f"{job_id}-whole", f"{job_id}-parts")
    groups = {}
    for job in jobs:
        await rollout.start_job(job, config, rewards)
        run = await rollout.run(job)
        await run.send(lease(job, 5, **LONG))
        if job.endswith("parts"):
            for attempt in (1, 2):
                await rollout.until_generated(20)
                await run.preempt_group(5, attempt)
                preempted = (await run.outcome()).preempted
                assert preempted.attempt == attempt
                assert 20 <= preempted.saved_tokens < 800
                await run.send(lease(job, 5, attempt=attempt + 1, **LONG))
        assert (await run.outcome()).finished.stats.response_tokens == 800
        async with stores_of(redis_url, job) as stores:
            groups[job] = await stores.group(5)
            assert await stores.partials.load(5) is None
    whole, parts = (groups[job] for job in jobs)
    for left, right in zip(whole.samples, parts.samples, strict=True):
        different = {field.name for field in dataclasses.fields(left) if not same(left, right, field.name)}
        # Recomputing a long response in one pass may round its keys and values otherwise than token by token did.
        assert different <= {"rollout_log_probs", "prefix_cache"}
        assert left.rollout_log_probs is not None
        assert right.rollout_log_probs is not None
        np.testing.assert_allclose(left.rollout_log_probs, right.rollout_log_probs, atol=1e-4)
    if family == "qwen3_moe":
        assert whole.samples[0].rollout_routed_experts is not None
        assert whole.samples[0].rollout_routed_experts.shape == (406, 2, 2)


async def test_when_the_stream_breaks_running_groups_are_stored_and_the_next_lease_resumes_them(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path, stores: Stores
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id, lease_number=1)
    await run.send(lease(job_id, 5, **LONG))
    await rollout.until_generated(10)
    run.call.cancel()
    partial = await stores.partial(5)
    kept = [sample.response_tokens.tolist() for sample in partial.samples]
    assert sum(map(len, kept)) >= 10
    assert all(sample.status is SampleStatus.PENDING for sample in partial.samples)
    before = rollout.generated
    run = await rollout.run(job_id, lease_number=2)
    await run.send(lease(job_id, 5, attempt=2, **LONG))
    assert (await run.outcome()).finished.stats.response_tokens == 800
    assert rollout.generated - before == 800 - sum(map(len, kept))
    group = await stores.group(5)
    assert [s.response_tokens.tolist()[: len(k)] for s, k in zip(group.samples, kept, strict=True)] == kept


async def test_closing_the_requests_preempts_what_runs_and_ends_the_stream(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 5, **LONG), lease(job_id, 6, **LONG))
    await rollout.until_generated(10)
    await run.call.done_writing()
    preempted = [(await run.outcome()).preempted for _ in range(2)]
    assert {message.group_id for message in preempted} == {5, 6}
    assert all(message.saved_tokens > 0 for message in preempted)
    while await run.read() is not None:
        pass


async def test_a_newer_lease_number_ends_the_older_stream(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    old = await rollout.run(job_id, lease_number=4)
    await old.send(lease(job_id, 5, **LONG))
    await rollout.until_generated(10)
    new = await rollout.run(job_id, lease_number=5)
    while (response := await old.read()) is not None:
        assert response.WhichOneof("kind") in ("progress", "ready"), response
    await new.send(lease(job_id, 5, attempt=2, **LONG))
    response = await new.outcome()
    assert (response.lease_number, response.finished.attempt) == (5, 2)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await rollout.run(job_id, lease_number=4)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "lease 4 is over" in str(error.value.details())


async def test_a_group_leased_again_on_the_same_stream_is_generated_once(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path, stores: Stores
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 5, **LONG))
    await rollout.until_generated(10)
    await run.send(lease(job_id, 5, attempt=2, **LONG))
    first, second = await run.outcome(), await run.outcome()
    assert (first.preempted.attempt, second.finished.attempt) == (1, 2)
    assert await stores.queued() == [5]


async def test_an_unusable_reward_fails_the_group_but_its_responses_are_kept(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path, stores: Stores
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 5, label="nan for the first"))
    failed = (await run.outcome()).failed
    assert failed.retryable
    assert "sample 0 could not be scored" in failed.error
    assert "finite" in failed.error
    generated = rollout.generated
    await run.send(lease(job_id, 5, attempt=2))
    assert (await run.outcome()).finished.stats.reward_sum == 1.0
    assert rollout.generated == generated
    assert rewards_of((await stores.group(5)).samples) == [0.0, 1.0]


async def test_a_sample_without_reward_is_marked_and_left_out_when_the_policy_says_so(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path, stores: Stores
) -> None:
    await rollout.start_job(job_id, job_config(folder, reward_failure_policy="drop"), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 5, label="nan for the first"))
    assert (await run.outcome()).finished.stats.failed == 1
    first, second = (await stores.group(5)).samples
    assert (first.status, first.reward, first.remove_sample) == (SampleStatus.FAILED, None, True)
    assert "finite" in first.metadata["reward_error"]
    assert (second.status in FINISHED, second.reward) == (True, 1.0)
    await run.send(lease(job_id, 6, label="nan"))
    finished = (await run.outcome()).finished
    assert finished.verdict == rollout_pb2.FILTER_VERDICT_DROP
    assert "no sample could be scored" in finished.reason
    assert await stores.queued() == [5]


async def test_a_reward_service_that_is_down_costs_no_response(
    rollout: Rollout, job_id: str, folder: pathlib.Path, stores: Stores
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = job_config(folder, reward_timeout_s=0.3, reward_retries=1)
    await rollout.start_job(job_id, config, address)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 5), lease(job_id, 6))
    failed = [(await run.outcome()).failed for _ in range(2)]
    assert all(message.retryable and address in message.error for message in failed)
    generated = rollout.generated
    async with reward_service(address):
        for group_id in (5, 6):
            # The connection comes back after a back-off; until then further attempts fail like the first.
            for attempt in range(2, 100):
                await run.send(lease(job_id, group_id, attempt=attempt))
                if (await run.outcome()).HasField("finished"):
                    break
    assert rollout.generated == generated
    assert await stores.queued() == [5, 6]


async def test_groups_without_reward_spread_are_dropped_by_the_filter(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path, stores: Stores
) -> None:
    path = "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    await rollout.start_job(job_id, job_config(folder, dynamic_sampling_filter_path=path), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 5, label="same"), lease(job_id, 6))
    outcomes = await run.outcomes(2)
    dropped, kept = outcomes[5].finished, outcomes[6].finished
    assert (dropped.verdict, dropped.reason, dropped.entry_id) == (
        rollout_pb2.FILTER_VERDICT_DROP,
        "zero_std_0.5",
        "",
    )
    assert dropped.stats.samples == 2
    assert kept.verdict == rollout_pb2.FILTER_VERDICT_KEEP
    assert await stores.queued() == [6]


async def test_a_reward_with_parts_and_no_key_cannot_be_cured_by_another_try(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 5, label="parts"))
    failed = (await run.outcome()).failed
    assert not failed.retryable
    assert "--reward-key" in failed.error


async def test_rewards_are_awaited_while_other_groups_generate(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 5, label="slow"), lease(job_id, 6, label="slow"), lease(job_id, 7))
    first = (await run.outcome()).finished
    assert first.group_id == 7
    others = [(await run.outcome()).finished for _ in range(2)]
    assert all(message.stats.reward_s >= 0.4 for message in others)


async def test_a_group_can_be_scored_as_a_whole_by_the_reward_its_samples_name(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path, stores: Stores
) -> None:
    await rollout.start_job(job_id, job_config(folder, group_rm=True), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 5, samples=4, metadata={"rm_type": "ranked"}))
    assert (await run.outcome()).finished.stats.reward_sum == 6
    samples = (await stores.group(5)).samples
    by_reward = sorted(samples, key=lambda sample: rewards_of([sample]))
    assert [len(s.response) for s in by_reward] == sorted(len(s.response) for s in samples)


async def test_a_malformed_lease_fails_alone(rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id)
    too_long = lease(job_id, 6, max_new_tokens=100_000)
    await run.send(lease(job_id, 5, top_p=2.0), too_long, lease(job_id, 7))
    outcomes = await run.outcomes(3)
    assert "sampling[0].top_p" in outcomes[5].failed.error
    assert "exceed" in outcomes[6].failed.error
    assert not outcomes[5].failed.retryable
    assert not outcomes[6].failed.retryable
    assert outcomes[7].finished.entry_id


async def test_what_a_lease_that_is_over_has_generated_is_refused_and_kept(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path, stores: Stores
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id, lease_number=7)
    await stores.queue.fence("rollout-0", 8)
    await run.send(lease(job_id, 3))
    preempted = (await run.outcome()).preempted
    assert (preempted.group_id, preempted.attempt) == (3, 1)
    assert preempted.saved_tokens > 0
    assert await stores.queued() == []
    run = await rollout.run(job_id, lease_number=8)
    generated = rollout.generated
    await run.send(lease(job_id, 3, attempt=2))
    assert (await run.outcome()).finished.attempt == 2
    assert await stores.queued() == [3]
    assert rollout.generated == generated


async def test_responses_that_have_ended_outlive_a_worker_that_is_killed(
    redis_url: str, rewards: str, job_id: str, folder: pathlib.Path, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_group, "SAVE_EVERY_S", 0.0)
    request = lease(job_id, 3, **LONG)
    request.lease.sampling[0].max_new_tokens = request.lease.sampling[0].min_new_tokens = 5
    async with rollout_service(redis_url) as killed:
        await killed.start_job(job_id, job_config(folder), rewards)
        run = await killed.run(job_id)
        await run.send(request)
        partial = await stores.partial(3)
        assert [sample.status in FINISHED for sample in partial.samples] == [True, False]
        first = partial.samples[0]
        # As a killed worker would: nothing of the rest is stored.
        monkeypatch.setattr(PartialStore, "save", _save_nothing)
    monkeypatch.undo()
    async with rollout_service(redis_url) as other:
        await other.start_job(job_id, job_config(folder), rewards)
        run = await other.run(job_id)
        again = rollout_pb2.RunRequest(lease=request.lease)
        again.lease.attempt = 2
        await run.send(again)
        assert (await run.outcome()).finished.attempt == 2
        assert other.generated == 400
    whole = (await stores.group(3)).samples[0]
    assert same(whole, first, "tokens")
    assert same(whole, first, "rollout_log_probs")


async def _save_nothing(*_: object, **__: object) -> bool:
    return False
