"""The trainer as a service: real processes, a real queue, a real weight-sync service."""

from __future__ import annotations

import asyncio
import pathlib
import shutil
from collections.abc import Iterator

import grpc
import psutil
import pytest
import torch
from megatron_kit import cpu_environment, needs_megatron
from safetensors.torch import load_file
from trainer_cases import job_config, random_groups, write_dense_model, write_moe_model
from trainer_process import TrainerProcess
from weightsync_processes import Service

from miles.checkpoint_folder import newest
from miles.queue import GroupQueue, connect_async
from miles.rpc.gen import trainer_pb2


@pytest.fixture
def weightsync(tmp_path: pathlib.Path) -> Iterator[Service]:
    (tmp_path / "shared").mkdir()
    service = Service(None, tmp_path / "shared")
    yield service
    service.kill()


@pytest.fixture
def trainers() -> Iterator[list[TrainerProcess]]:
    """Trainers that the test started; killed at its end."""
    started: list[TrainerProcess] = []
    yield started
    for trainer in started:
        trainer.kill()


@pytest.fixture(scope="module")
def one_rank() -> Iterator[TrainerProcess]:
    """A trainer for tests that leave it running."""
    process = TrainerProcess()
    yield process
    process.kill()


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[TrainerProcess]:
    """The same with two ranks."""
    process = TrainerProcess(2)
    yield process
    process.kill()


@pytest.fixture
def trainer(one_rank: TrainerProcess) -> Iterator[TrainerProcess]:
    """A trainer that has no job."""
    yield one_rank
    stop(one_rank)


@pytest.fixture
def pair(two_ranks: TrainerProcess) -> Iterator[TrainerProcess]:
    """A trainer of two ranks that has no job."""
    yield two_ranks
    stop(two_ranks)


def stop(process: TrainerProcess) -> None:
    """End the trainer's job, whichever it is."""
    process.stop_job(process.stub.GetStatus(trainer_pb2.TrainerGetStatusRequest(), timeout=10).job_id)


def put_groups(redis_url: str, job_id: str, seed: int, group_ids: range) -> None:
    async def put() -> None:
        async with await connect_async(redis_url) as client:
            for group in random_groups(seed, group_ids):
                group.job_id = job_id
                await GroupQueue(client, job_id, consumer="test").put(group, attempt=0)

    asyncio.run(put())


def queued(redis_url: str, job_id: str) -> list[int]:
    async def read() -> list[int]:
        async with await connect_async(redis_url) as client:
            return [entry.group_id for entry in await GroupQueue(client, job_id, consumer="test").outstanding()]

    return asyncio.run(read())


def test_a_killed_trainer_resumes_bit_for_bit_and_trains_no_group_twice(
    tmp_path: pathlib.Path, redis_url: str, job_id: str, weightsync: Service, trainers: list[TrainerProcess]
) -> None:
    config = job_config(write_dense_model(tmp_path / "model"))
    run_dir = tmp_path / "run"
    put_groups(redis_url, job_id, 1, range(12))
    trainers.append(TrainerProcess())
    ready = trainers[0].start_job(job_id, config, redis_url, weightsync.address, run_dir)
    assert (ready.step, ready.checkpoint_dir) == (0, "")
    trainers[0].train(job_id, 0, [0, 1, 2, 3])
    saved = trainers[0].save(job_id)
    assert queued(redis_url, job_id) == list(range(4, 12))
    lost = trainers[0].train(job_id, 1, [4, 5, 6, 7])
    trainers[0].train(job_id, 2, [8, 9, 10, 11])
    whole = load_file(pathlib.Path(trainers[0].save(job_id, export_hf=True).hf_dir) / "model.safetensors")
    assert queued(redis_url, job_id) == []
    trainers[0].kill()

    shutil.rmtree(run_dir / "checkpoints" / "step_00000003")
    put_groups(redis_url, job_id, 1, range(4, 12))
    trainers.append(TrainerProcess())
    ready = trainers[1].start_job(job_id, config, redis_url, weightsync.address, run_dir)
    assert (ready.step, ready.consumed_below, ready.checkpoint_dir) == (1, 4, saved.checkpoint_dir)
    with pytest.raises(grpc.RpcError) as refused:
        trainers[1].train(job_id, 1, [3, 4, 5, 6])
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    again = trainers[1].train(job_id, 1, [4, 5, 6, 7])
    timeless = {name for name in lost.metrics if not name.startswith("perf/")}
    assert {name: again.metrics[name] for name in timeless} == {name: lost.metrics[name] for name in timeless}
    trainers[1].train(job_id, 2, [8, 9, 10, 11])
    resumed = load_file(pathlib.Path(trainers[1].save(job_id, export_hf=True).hf_dir) / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)


def test_a_step_taken_before_is_answered_and_a_gap_is_refused(
    tmp_path: pathlib.Path, redis_url: str, job_id: str, weightsync: Service, trainer: TrainerProcess
) -> None:
    config = job_config(write_dense_model(tmp_path / "model"))
    put_groups(redis_url, job_id, 2, range(4))
    with pytest.raises(grpc.RpcError) as early:
        trainer.train(job_id, 0, [0, 1, 2, 3])
    assert "StartJob" in early.value.details()
    trainer.start_job(job_id, config, redis_url, weightsync.address, tmp_path / "run")
    first = trainer.train(job_id, 0, [0, 1, 2, 3], dropped_group_ids=[4])
    assert trainer.train(job_id, 0, [0, 1, 2, 3]).metrics == first.metrics
    with pytest.raises(grpc.RpcError) as gap:
        trainer.train(job_id, 2, [8, 9, 10, 11])
    assert "next one is step 1" in gap.value.details()
    with pytest.raises(grpc.RpcError) as missing:
        trainer.train(job_id, 1, [5, 6, 7, 8], deadline_ms=200)
    assert missing.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    ready = trainer.start_job(job_id, config, redis_url, weightsync.address, tmp_path / "run")
    assert (ready.step, ready.consumed_below, ready.loaded_step) == (1, 5, 0)


def test_a_step_is_abandoned_when_it_is_asked_for_and_while_it_runs_but_not_once_taken(
    tmp_path: pathlib.Path, redis_url: str, job_id: str, weightsync: Service, trainer: TrainerProcess
) -> None:
    config = job_config(write_dense_model(tmp_path / "model"))
    put_groups(redis_url, job_id, 2, range(8))
    trainer.start_job(job_id, config, redis_url, weightsync.address, tmp_path / "run")
    trainer.train(job_id, 0, [0, 1, 2, 3])
    assert not trainer.abandon(job_id, 0)
    assert not trainer.abandon(job_id, 2)
    request = trainer_pb2.TrainRequest(job_id=job_id, step=1, group_ids=[4, 5, 6, 7], deadline_ms=20_000)
    assert trainer.abandon(job_id, 1)
    assert [message.phase for message in trainer.stub.Train(request)] == [trainer_pb2.TRAIN_PHASE_ABANDONED]

    request = trainer_pb2.TrainRequest(job_id=job_id, step=1, group_ids=[4, 5, 6, 9], deadline_ms=20_000)
    phases, abandoning = [], False
    for message in trainer.stub.Train(request):
        phases.append(message.phase)
        if len(phases) == 1:  # group 9 has not come yet, so that the step cannot be over
            abandoning = trainer.abandon(job_id, 1)
            put_groups(redis_url, job_id, 2, range(9, 10))
    assert abandoning
    assert phases[-1] == trainer_pb2.TRAIN_PHASE_ABANDONED

    assert trainer.stub.GetStatus(trainer_pb2.TrainerGetStatusRequest()).step == 1
    assert trainer.save(job_id).step == 1
    assert queued(redis_url, job_id) == [4, 5, 6, 7, 9]
    assert trainer.train(job_id, 1, [4, 5, 6, 7]).step == 1


BACKENDS = [
    "fsdp",
    pytest.param("megatron", marks=[pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900), needs_megatron]),
]


def environment_of(backend: str) -> dict[str, str] | None:
    return cpu_environment() if backend == "megatron" else None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trainer_killed_while_it_writes_a_checkpoint_resumes_from_the_one_before(
    tmp_path: pathlib.Path,
    redis_url: str,
    job_id: str,
    weightsync: Service,
    trainers: list[TrainerProcess],
    backend: str,
) -> None:
    # Large enough that its files take far longer than the way of a signal.
    model = write_dense_model(tmp_path / "model", hidden_size=512, intermediate_size=4096)
    config = job_config(model, train_backend=backend, async_save=True)
    run_dir = tmp_path / "run"
    put_groups(redis_url, job_id, 1, range(12))
    trainers.append(TrainerProcess(environment=environment_of(backend)))
    trainers[0].start_job(job_id, config, redis_url, weightsync.address, run_dir)
    trainers[0].train(job_id, 0, [0, 1, 2, 3])
    first = trainers[0].save(job_id)
    lost = trainers[0].train(job_id, 1, [4, 5, 6, 7])
    begun = trainers[0].save(job_id, in_background=True)
    trainers[0].process.kill()
    assert (begun.step, begun.checkpoint_dir) == (2, first.checkpoint_dir)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "latest",
        "step_00000001",
        "step_00000002.tmp",
    ]
    assert queued(redis_url, job_id) == list(range(4, 12))

    trainers.append(TrainerProcess(environment=environment_of(backend)))
    ready = trainers[1].start_job(job_id, config, redis_url, weightsync.address, run_dir)
    assert (ready.step, ready.consumed_below, ready.checkpoint_dir) == (1, 4, first.checkpoint_dir)
    again = trainers[1].train(job_id, 1, [4, 5, 6, 7])
    assert {k: v for k, v in again.metrics.items() if "time" not in k} == {
        k: v for k, v in lost.metrics.items() if "time" not in k
    }
    trainers[1].save(job_id, in_background=True)
    assert trainers[1].save(job_id).checkpoint_dir == str(run_dir / "checkpoints" / "step_00000002")
    assert queued(redis_url, job_id) == list(range(8, 12))


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(
    tmp_path: pathlib.Path, redis_url: str, job_id: str, weightsync: Service, pair: TrainerProcess
) -> None:
    model = write_dense_model(tmp_path / "model", hidden_size=256, intermediate_size=2048)
    config = job_config(model, actor_num_gpus_per_node=2, async_save=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    put_groups(redis_url, job_id, 1, range(12))
    pair.start_job(job_id, config, redis_url, weightsync.address, tmp_path / "run")
    pair.train(job_id, 0, [0, 1, 2, 3])
    assert pair.save(job_id, in_background=True).checkpoint_dir == ""
    pair.train(job_id, 1, [4, 5, 6, 7])
    second = pair.save(job_id, in_background=True)
    assert second.checkpoint_dir == str(checkpoints / "step_00000001")
    assert not set(queued(redis_url, job_id)) & set(range(4))
    pair.stop_job(job_id)
    assert newest(checkpoints).checkpoint == checkpoints / "step_00000002"
    assert queued(redis_url, job_id) == list(range(8, 12))


def test_an_orderly_end_waits_for_the_checkpoint(
    tmp_path: pathlib.Path, redis_url: str, job_id: str, weightsync: Service, trainers: list[TrainerProcess]
) -> None:
    config = job_config(write_dense_model(tmp_path / "model"), async_save=True)
    put_groups(redis_url, job_id, 1, range(4))
    trainers.append(TrainerProcess())
    trainers[0].start_job(job_id, config, redis_url, weightsync.address, tmp_path / "run")
    trainers[0].train(job_id, 0, [0, 1, 2, 3])
    trainers[0].save(job_id, in_background=True)
    trainers[0].process.terminate()
    assert trainers[0].process.wait(60) == 0
    assert newest(tmp_path / "run" / "checkpoints").checkpoint == tmp_path / "run" / "checkpoints" / "step_00000001"
    assert queued(redis_url, job_id) == []


def test_a_checkpoint_that_cannot_be_written_is_reported_and_tried_again(
    tmp_path: pathlib.Path, redis_url: str, job_id: str, weightsync: Service, trainer: TrainerProcess
) -> None:
    config = job_config(write_dense_model(tmp_path / "model"), async_save=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    put_groups(redis_url, job_id, 1, range(8))
    trainer.start_job(job_id, config, redis_url, weightsync.address, tmp_path / "run")
    trainer.train(job_id, 0, [0, 1, 2, 3])
    (checkpoints / "latest.tmp").mkdir(parents=True)  # where the name of the newest checkpoint is written
    trainer.save(job_id, in_background=True)
    with pytest.raises(grpc.RpcError) as failed:
        trainer.save(job_id)
    assert "latest.tmp" in failed.value.details()
    assert queued(redis_url, job_id) == list(range(8))
    (checkpoints / "latest.tmp").rmdir()
    trainer.train(job_id, 1, [4, 5, 6, 7])
    trainer.save(job_id)
    assert queued(redis_url, job_id) == []


def test_an_export_is_prepared_under_the_models_names(
    tmp_path: pathlib.Path, redis_url: str, job_id: str, weightsync: Service, trainer: TrainerProcess
) -> None:
    config = job_config(write_dense_model(tmp_path / "model"), rollout_dtype="bfloat16")
    trainer.start_job(job_id, config, redis_url, weightsync.address, tmp_path / "run")
    exported = trainer.export(job_id, 0)
    assert weightsync.states() == {0: "PREPARED"}
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert exported.total_bytes >= 2 * sum(tensor.numel() for tensor in stored.values())
    with pytest.raises(grpc.RpcError) as wrong:
        trainer.export(job_id, 3)
    assert wrong.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_a_missing_model_folder_is_named(
    tmp_path: pathlib.Path, redis_url: str, job_id: str, weightsync: Service, trainer: TrainerProcess
) -> None:
    with pytest.raises(grpc.RpcError) as error:
        trainer.start_job(job_id, job_config(tmp_path / "nowhere"), redis_url, weightsync.address, tmp_path)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert "nowhere" in error.value.details()


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_two_ranks_train_as_one_and_continue_each_others_checkpoints(
    family: str,
    tmp_path: pathlib.Path,
    redis_url: str,
    job_id: str,
    weightsync: Service,
    trainer: TrainerProcess,
    pair: TrainerProcess,
) -> None:
    write = write_dense_model if family == "dense" else write_moe_model
    # Whitened advantages need sums over ranks; a step of Adam with a large epsilon follows the gradient.
    changes = {"normalize_advantages": True, "adam_eps": 1.0, "lr": 0.5, "num_steps_per_rollout": 2}
    config = job_config(write(tmp_path / "model"), actor_num_gpus_per_node=2, **changes)
    trainers, metrics, weights = (trainer, pair), [], []
    for number, ranks in enumerate((1, 2)):
        job, run_dir = f"{job_id}-{ranks}", tmp_path / f"run-{ranks}"
        put_groups(redis_url, job, 3, range(4))
        ready = trainers[number].start_job(job, config, redis_url, weightsync.address, run_dir)
        assert ready.step == 0
        metrics.append(trainers[number].train(job, 0, [0, 1, 2, 3]).metrics)
        assert trainers[number].export(job, 0 + 1).total_bytes > 0
        weights.append(load_file(pathlib.Path(trainers[number].save(job, export_hf=True).hf_dir) / "model.safetensors"))
    for name in ("train/loss", "train/grad_norm", "train/ppo_kl", "train/train_rollout_logprob_abs_diff"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5, abs=1e-7), name
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-5, atol=1e-6, msg=name)

    after = []
    for number in (0, 1):
        job = f"{job_id}-{2 - number}"
        put_groups(redis_url, job, 3, range(4, 8))
        trainers[number].stop_job(f"{job_id}-{number + 1}")
        ready = trainers[number].start_job(job, config, redis_url, weightsync.address, tmp_path / f"run-{2 - number}")
        assert (ready.step, ready.consumed_below) == (1, 4)
        after.append(trainers[number].train(job, 1, [4, 5, 6, 7]).metrics)
    assert after[0]["train/grad_norm"] == pytest.approx(after[1]["train/grad_norm"], rel=1e-4)


def test_a_failure_on_every_rank_is_answered_and_leaves_the_trainer_usable(
    tmp_path: pathlib.Path, redis_url: str, job_id: str, weightsync: Service, pair: TrainerProcess
) -> None:
    missing = job_config(tmp_path / "nowhere", actor_num_gpus_per_node=2)
    with pytest.raises(grpc.RpcError) as error:
        pair.start_job(job_id, missing, redis_url, weightsync.address, tmp_path)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    config = job_config(write_dense_model(tmp_path / "model"), actor_num_gpus_per_node=2)
    assert pair.start_job(job_id, config, redis_url, weightsync.address, tmp_path / "run").step == 0


def test_a_step_whose_caller_left_is_taken_once_and_answered_to_the_next(
    tmp_path: pathlib.Path, redis_url: str, job_id: str, weightsync: Service, trainer: TrainerProcess
) -> None:
    config = job_config(write_dense_model(tmp_path / "model"))
    trainer.start_job(job_id, config, redis_url, weightsync.address, tmp_path / "run")
    request = trainer_pb2.TrainRequest(job_id=job_id, step=0, group_ids=[0, 1, 2, 3], deadline_ms=60_000)
    abandoned = trainer.stub.Train(request)
    next(abandoned)  # it waits for groups that are not there yet
    abandoned.cancel()
    put_groups(redis_url, job_id, 2, range(4))
    again = trainer.train(job_id, 0, [0, 1, 2, 3])
    status = trainer.stub.GetStatus(trainer_pb2.TrainerGetStatusRequest(), timeout=10)
    assert (status.job_id, status.step) == (job_id, 1)
    assert trainer.train(job_id, 0, [0, 1, 2, 3]).metrics == again.metrics


def test_a_trainer_that_is_told_to_stop_ends_at_once(trainers: list[TrainerProcess]) -> None:
    trainers.append(TrainerProcess())
    trainers[0].process.terminate()
    assert trainers[0].process.wait(30) == 0


def test_ranks_end_with_the_launcher_that_started_them(trainers: list[TrainerProcess]) -> None:
    trainers.append(TrainerProcess(2))
    ranks = psutil.Process(trainers[0].process.pid).children(recursive=True)
    assert len(ranks) >= 2
    trainers[0].kill()
    assert psutil.wait_procs(ranks, timeout=120)[1] == []
