"""The rollout service as its callers see it: jobs, versions, pauses, quarantine, single responses, the end."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import grpc.aio
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rollout_kit import LONG, SERVICE, Rollout, Run, checkpoint, job_config, lease, reward_service, rollout_service
from torch_engine_models import prompt_of, save_checkpoint, weights_of

from miles.queue import GroupQueue, PartialStore, connect_async
from miles.rpc import connect, connect_blocking, start_server
from miles.rpc.gen import rollout_pb2, rollout_pb2_grpc, weightsync_pb2, weightsync_pb2_grpc
from miles.services.rollout.engines.base import PauseMode
from miles.services.weightsync.service import WeightSyncServicer
from miles.types import VersionSpan
from miles.types.convert import array_from_proto, array_to_proto
from miles.weights import WeightPublisher


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


class Weights:
    """A weight-sync service, with the calls that a trainer and a controller make."""

    def __init__(self, address: str, job_id: str) -> None:
        self.address = address
        self._job_id = job_id

    async def publish(self, version: int, tensors: dict[str, torch.Tensor]) -> list[str]:
        """Publish and activate; returns the errors of engines that failed."""

        def send() -> None:
            with connect_blocking(self.address) as channel:
                stub = weightsync_pb2_grpc.WeightSyncServiceStub(channel)
                layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
                result = WeightPublisher(stub, self._job_id).publish(version, version, layout, tensors.items())
                request = weightsync_pb2.ActivateRequest(
                    version=result.manifest.version, operation_id=f"{version}", deadline_ms=20_000, min_engines=0
                )
                for _ in stub.Activate(request, timeout=60):
                    pass

        await asyncio.to_thread(send)
        return []


@pytest.fixture
async def weights(tmp_path: pathlib.Path, job_id: str) -> AsyncIterator[Weights]:
    directory = tmp_path / "versions"
    directory.mkdir()
    servicer = WeightSyncServicer(None, directory)
    servicer.start()
    server, address = await start_server(
        lambda server: weightsync_pb2_grpc.add_WeightSyncServiceServicer_to_server(servicer, server),
        "127.0.0.1:0",
        [],
    )
    yield Weights(address, job_id)
    servicer.close()
    await server.stop(1.0)


async def test_starting_a_job_is_idempotent_and_stopping_it_releases_everything(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path
) -> None:
    assert len(await rollout.start_job(job_id, job_config(folder), rewards)) > 3
    assert await rollout.start_job(job_id, job_config(folder), rewards) == ["ready"]
    again = await rollout.start_job(job_id, job_config(folder, max_running_requests=4), rewards)
    assert again[0] == "stopping the job as configured before"
    status = await rollout.stub.GetStatus(rollout_pb2.RolloutGetStatusRequest())
    assert (list(status.job_ids), status.progress.version, status.paused) == ([job_id], 0, False)
    await rollout.stub.StopJob(rollout_pb2.RolloutStopJobRequest(job_id=job_id))
    await rollout.stub.StopJob(rollout_pb2.RolloutStopJobRequest(job_id=job_id))
    assert not (await rollout.stub.GetStatus(rollout_pb2.RolloutGetStatusRequest())).job_ids


async def test_a_job_that_cannot_start_says_why_and_leaves_nothing(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path
) -> None:
    bad_filter = job_config(folder).replace(dynamic_sampling_filter_path="json.nothing")
    empty = folder / "empty"
    empty.mkdir()
    for config, code, words in [
        (bad_filter, grpc.StatusCode.FAILED_PRECONDITION, "json.nothing"),
        (job_config(empty), grpc.StatusCode.FAILED_PRECONDITION, "empty"),
    ]:
        with pytest.raises(grpc.aio.AioRpcError, match=words) as error:
            await rollout.start_job(job_id, config, rewards)
        assert error.value.code() is code
    request = rollout_pb2.RolloutStartJobRequest(job_id=job_id, config_json=json.dumps({"no_such_flag": 1}))
    with pytest.raises(grpc.aio.AioRpcError, match="no_such_flag") as error:
        await rollout.stub.StartJob(request).read()
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not (await rollout.stub.GetStatus(rollout_pb2.RolloutGetStatusRequest())).job_ids


async def test_calls_for_a_job_that_is_not_loaded_can_be_tried_again(rollout: Rollout) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="StartJob first") as error:
        await rollout.run("nobody")
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_response_can_be_streamed_outside_any_group(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    request = rollout_pb2.GenerateRequest(
        job_id=job_id,
        tokens=array_to_proto(np.array(prompt_of(7), np.int32)),
        sampling=rollout_pb2.SamplingParams(
            temperature=1, top_p=1, top_k=-1, max_new_tokens=20, min_new_tokens=20, seed=3
        ),
    )
    for _ in range(2):
        messages = [message async for message in rollout.stub.Generate(request)]
        tokens = np.concatenate([array_from_proto(message.tokens) for message in messages])
        log_probs = np.concatenate([array_from_proto(message.log_probs) for message in messages])
        assert (len(tokens), tokens.dtype, len(log_probs), log_probs.dtype) == (20, np.int32, 20, np.float32)
        assert messages[-1].finished.reason == rollout_pb2.FINISH_REASON_LENGTH
        [span] = messages[-1].finished.weight_versions
        assert (span.version, span.start, span.end) == (0, 0, 20)
    request.sampling.top_p = 3
    with pytest.raises(grpc.aio.AioRpcError, match=r"sampling\.top_p"):
        await rollout.stub.Generate(request).read()


async def test_it_answers_while_the_engine_is_busy(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id)
    await run.send(*(lease(job_id, group_id, samples=4, **LONG) for group_id in range(4)))
    await rollout.until_generated(10)
    for _ in range(5):
        status = await rollout.stub.GetStatus(rollout_pb2.RolloutGetStatusRequest(), timeout=10)
        assert status.progress.running_requests > 0
    assert run.capacity == 8
    assert len(await run.outcomes(4)) == 4


async def test_small_groups_fill_the_slots_too(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path
) -> None:
    await rollout.start_job(job_id, job_config(folder, n_samples_per_prompt=8, max_running_requests=8), rewards)
    run = await rollout.run(job_id)
    assert run.capacity == 2
    await run.send(lease(job_id, 1, samples=8, **LONG))
    eval_leases = [lease(job_id, i, samples=1, purpose=rollout_pb2.GROUP_PURPOSE_EVAL) for i in range(16)]
    await run.send(eval_leases[0])
    await run.until(lambda: run.capacity == 2 + 2)
    await run.send(*eval_leases[1:])
    for _ in range(17):
        await run.outcome()
    await run.until(lambda: run.capacity == 2)


async def test_groups_wait_for_their_version_and_record_which_one_made_which_tokens(
    rollout: Rollout, rewards: str, job_id: str, tmp_path: pathlib.Path, weights: Weights, redis_url: str
) -> None:
    first = weights_of(save_checkpoint(tmp_path, "qwen3", seed=0))
    second = {name: tensor * 0.9 for name, tensor in first.items()}
    await rollout.start_job(job_id, job_config(tmp_path), rewards, weights.address)
    run = await rollout.run(job_id)
    await run.send(
        lease(job_id, 1),
        lease(job_id, 2, min_version=1, **LONG),
        lease(job_id, 3, exact_version=0, purpose=rollout_pb2.GROUP_PURPOSE_EVAL),
    )
    await weights.publish(0, first)
    outcomes = await run.outcomes(2)
    assert set(outcomes) == {1, 3}
    await weights.publish(1, second)
    await rollout.until_generated(20)
    await weights.publish(2, first)
    finished = (await run.outcome()).finished
    assert (finished.group_id, finished.oldest_version) == (2, 1)
    client = await connect_async(redis_url)
    group = (await GroupQueue(client, job_id).collect([2], 10))[2][1]
    await client.aclose()
    for sample in group.samples:
        before, after = sample.weight_versions
        assert (before.version, after) == (1, VersionSpan(2, before.end, 400))
    await run.send(lease(job_id, 4, exact_version=1, purpose=rollout_pb2.GROUP_PURPOSE_EVAL))
    failed = (await run.outcome()).failed
    assert failed.retryable
    assert "version 2 already, not 1" in failed.error


async def test_weights_that_do_not_fit_quarantine_the_engine_until_good_ones_come(
    rollout: Rollout, rewards: str, job_id: str, tmp_path: pathlib.Path, weights: Weights
) -> None:
    good = weights_of(save_checkpoint(tmp_path, "qwen3"))
    await rollout.start_job(job_id, job_config(tmp_path), rewards, weights.address)
    run = await rollout.run(job_id)
    await weights.publish(0, good)
    await run.send(lease(job_id, 1, **LONG))
    await rollout.until_generated(20)
    misfit = {name: tensor for name, tensor in good.items() if "norm" not in name}
    publishing = asyncio.create_task(weights.publish(1, misfit))
    preempted = (await run.outcome()).preempted
    assert preempted.saved_tokens >= 20
    await run.until(lambda: run.ready.refused_weights)
    assert run.capacity == 0
    assert "do not fit" in run.ready.out_of_routing
    status = await rollout.stub.GetStatus(rollout_pb2.RolloutGetStatusRequest())
    assert "do not fit" in status.quarantine_reason
    assert not status.progress.HasField("version")
    await asyncio.gather(publishing, return_exceptions=True)
    await weights.publish(2, good)
    await run.until(lambda: run.capacity == 8)
    assert (run.ready.refused_weights, run.ready.out_of_routing) == (False, "")
    await run.send(lease(job_id, 1, attempt=2, **LONG))
    finished = (await run.outcome()).finished
    assert (finished.stats.response_tokens, finished.oldest_version) == (800, 0)


async def test_a_pause_stops_decoding_once_and_its_resume_goes_on(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 1, **LONG))
    await rollout.until_generated(10)
    pause = rollout_pb2.PauseRequest(
        job_id=job_id, mode=rollout_pb2.PAUSE_MODE_IN_PLACE, operation_id="op", token_ttl_ms=60_000
    )
    resume = rollout_pb2.ResumeRequest(job_id=job_id, operation_id="op")
    await rollout.stub.Pause(pause)
    assert (await rollout.stub.Pause(pause)).pause_s == 0
    generated = rollout.generated
    await asyncio.sleep(0.2)
    assert rollout.generated == generated < 800
    assert (await rollout.stub.GetStatus(rollout_pb2.RolloutGetStatusRequest())).paused
    pause.operation_id = "other"
    with pytest.raises(grpc.aio.AioRpcError, match="'op' holds the engine paused"):
        await rollout.stub.Pause(pause)
    await rollout.stub.Resume(resume)
    await rollout.stub.Resume(resume)
    assert (await run.outcome()).finished.stats.response_tokens == 800


async def test_a_pause_by_abort_returns_groups_with_what_they_have(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path
) -> None:
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 1, **LONG))
    await rollout.until_generated(10)
    await rollout.stub.Pause(
        rollout_pb2.PauseRequest(
            job_id=job_id, mode=rollout_pb2.PAUSE_MODE_ABORT, operation_id="op", token_ttl_ms=60_000
        )
    )
    assert (await run.outcome()).preempted.saved_tokens >= 10
    await run.send(lease(job_id, 1, attempt=2, **LONG))
    await rollout.stub.Resume(rollout_pb2.ResumeRequest(job_id=job_id, operation_id="op"))
    assert (await run.outcome()).finished.stats.response_tokens == 800


async def test_a_pause_whose_token_expires_ends_in_quarantine_until_a_full_load(
    rollout: Rollout, rewards: str, job_id: str, tmp_path: pathlib.Path, weights: Weights
) -> None:
    good = weights_of(save_checkpoint(tmp_path, "qwen3"))
    await rollout.start_job(job_id, job_config(tmp_path), rewards, weights.address)
    run = await rollout.run(job_id)
    await weights.publish(0, good)
    await run.send(lease(job_id, 1, **LONG))
    await rollout.until_generated(10)
    pause = rollout_pb2.PauseRequest(
        job_id=job_id, mode=rollout_pb2.PAUSE_MODE_IN_PLACE, operation_id="op", token_ttl_ms=100
    )
    await rollout.stub.Pause(pause)
    assert (await run.outcome()).preempted.saved_tokens >= 10
    await run.until(lambda: run.capacity == 0)
    status = await rollout.stub.GetStatus(rollout_pb2.RolloutGetStatusRequest())
    assert "pause token of operation 'op' expired" in status.quarantine_reason
    with pytest.raises(grpc.aio.AioRpcError, match="pause token of operation 'op' expired"):
        await rollout.stub.Resume(rollout_pb2.ResumeRequest(job_id=job_id, operation_id="op"))
    await weights.publish(1, good)
    await run.until(lambda: run.capacity == 8)
    await run.send(lease(job_id, 1, attempt=2, **LONG))
    assert (await run.outcome()).finished.stats.response_tokens == 800


async def test_an_engine_that_hangs_leaves_routing(
    rollout: Rollout, rewards: str, job_id: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miles.services.rollout.serving.readiness.ENGINE_SILENCE_S", 0.6)
    await rollout.start_job(job_id, job_config(folder), rewards)
    run = await rollout.run(job_id)
    await run.send(lease(job_id, 1, **LONG))
    await rollout.until_generated(10)
    # Paused behind the service's back: requests run and nothing comes of them.
    await rollout.servicer._jobs[job_id].engine.pause(PauseMode.IN_PLACE)
    await run.until(lambda: run.capacity == 0)
    status = await rollout.stub.GetStatus(rollout_pb2.RolloutGetStatusRequest())
    assert "generated nothing" in status.quarantine_reason


class Process:
    """The service as a program."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.log = folder / "rollout.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "miles.services.rollout", "--listen", "127.0.0.1:0", "--worker-id", "r1"],
                stdout=log,
                stderr=log,
                env=environment,
            )

    async def address(self) -> str:
        for _ in range(1200):
            if found := re.search(r"listening on (\S+)", self.log.read_text()):
                return found[1]
            assert self.popen.poll() is None, self.log.read_text()
            await asyncio.sleep(0.05)
        raise TimeoutError(f"the service did not listen within 60 s: {self.log.read_text()}")


async def test_a_terminated_process_stores_what_runs_and_another_one_resumes_it(
    rewards: str, job_id: str, folder: pathlib.Path, redis_url: str
) -> None:
    config = job_config(folder)
    process = Process(folder)
    try:
        async with connect(await process.address()) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            stub = rollout_pb2_grpc.RolloutServiceStub(channel)
            await Rollout(None, stub, redis_url).start_job(job_id, config, rewards)  # type: ignore[arg-type]
            run = await Run(stub).open(job_id)
            await run.send(lease(job_id, 1), lease(job_id, 2, **LONG))
            assert (await run.outcome()).finished.group_id == 1
            process.popen.send_signal(signal.SIGTERM)
            assert (await run.outcome()).preempted.group_id == 2
        assert await asyncio.to_thread(process.popen.wait, 30) == 0, process.log.read_text()
    finally:
        process.popen.kill()
    client = await connect_async(redis_url)
    queue, partials = GroupQueue(client, job_id), PartialStore(client, job_id)
    assert [entry.group_id for entry in await queue.outstanding()] == [1]
    partial = await partials.load(2)
    assert partial is not None
    kept = [sample.response_tokens.tolist() for sample in partial.samples]
    async with rollout_service(redis_url) as rollout:
        await rollout.start_job(job_id, config, rewards)
        run = await rollout.run(job_id, lease_number=2)
        await run.send(lease(job_id, 2, attempt=2, **LONG))
        assert (await run.outcome()).finished.stats.response_tokens == 800
        assert rollout.generated == 800 - sum(map(len, kept))
    group = (await queue.collect([2], 10))[2][1]
    assert [s.response_tokens.tolist()[: len(k)] for s, k in zip(group.samples, kept, strict=True)] == kept
    await client.aclose()
