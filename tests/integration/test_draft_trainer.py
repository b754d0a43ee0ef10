"""The draft trainer as a service: real processes, recordings on disk, a real weight-sync service with an engine."""

from __future__ import annotations

import pathlib
import signal
from collections.abc import Iterator

import grpc
import pytest
import torch
from draft_trainer_process import DraftTrainerProcess, draft_config, record, samples_of_step
from safetensors.torch import load_file
from trainer_cases import write_dense_model
from weightsync_processes import Engine, Lines, Service, digest

from miles.drafts.folders import checkpoint_dir, initial_dir, trained_dir
from miles.services.trainer.drafts import checkpoint
from miles.services.trainer.drafts.learner import create_learner
from miles.services.trainer.drafts.training import DraftTraining

JOB = "job"


@pytest.fixture
def processes() -> Iterator[list[Lines]]:
    """Processes that the test started; killed at its end."""
    started: list[Lines] = []
    yield started
    for process in started:
        process.kill()


@pytest.fixture
def weightsync(tmp_path: pathlib.Path, processes: list[Lines]) -> Service:
    (tmp_path / "shared").mkdir()
    service = Service(None, tmp_path / "shared")
    processes.append(service)
    return service


def undisturbed(config_folder: pathlib.Path, run_dir: pathlib.Path, steps: int) -> dict[str, str]:
    """Digests of the draft after so many recordings, learned without a process."""
    config = draft_config(config_folder)
    learner = create_learner(config, initial_dir(pathlib.Path(config.services.run_dir)), torch.device("cpu"))
    training = DraftTraining(config, run_dir, learner, torch.device("cpu"))
    for step in range(steps):
        for _ in training.learn(samples_of_step(step), step):
            pass
        training.finish_version()
    return digest(dict(learner.export()))


def test_a_killed_draft_trainer_loses_nothing_but_time(
    tmp_path: pathlib.Path, weightsync: Service, processes: list[Lines]
) -> None:
    config = draft_config(write_dense_model(tmp_path / "model"))
    run_dir = pathlib.Path(config.services.run_dir)
    engine = Engine(weightsync, "engine", "--stream", "draft", job=JOB)
    first = DraftTrainerProcess()
    processes += [engine, first]
    record(run_dir, 0)
    first.calls.start_job(JOB, config, weightsync.address, run_dir, policy_step=None)
    first.calls.wait_for(lambda said: said.activity == "waiting for the run to be loaded", "loaded draft")
    first.calls.start_job(JOB, config, weightsync.address, run_dir, policy_step=0)
    said = first.calls.wait_for_version(1)
    assert {"draft/loss", "draft/agreement", "draft/update_s"} <= set(said.metrics)
    weightsync.activate(1, 1, stream="draft", job=JOB)
    engine.wait_for_state("serving", 1)
    record(run_dir, 1)
    first.calls.wait_until_training(1)
    first.kill()

    second = DraftTrainerProcess()
    processes.append(second)
    second.calls.start_job(JOB, config, weightsync.address, run_dir, policy_step=2)
    resumed = second.calls.wait_for_version(1)  # what it goes on from is published again, for engines that come anew
    assert resumed.missed_recordings == 0
    record(run_dir, 2)
    last = second.calls.wait_for_version(3)
    assert (last.version, last.recordings, last.recorded_step) == (3, 3, 2)
    weightsync.activate(3, 1, stream="draft", job=JOB, check_equal=True)
    engine.wait_for_state("serving", 3)
    assert engine.digest() == undisturbed(tmp_path / "model", tmp_path / "other", 3)

    second.calls.stop_job(JOB)
    kept = load_file(trained_dir(run_dir) / "model.safetensors")
    state = load_file(checkpoint_dir(run_dir) / checkpoint.FILE)
    name = next(name for name in kept if name.endswith("norm.weight"))
    assert kept[name].equal(next(tensor for key, tensor in state.items() if key == f"weight.{name}"))
    second.process.send_signal(signal.SIGTERM)
    assert second.ends_within(60) == 0


def test_a_held_draft_trainer_computes_nothing_and_then_goes_on(
    tmp_path: pathlib.Path, weightsync: Service, processes: list[Lines]
) -> None:
    config = draft_config(write_dense_model(tmp_path / "model"), draft_recordings_kept=1)
    run_dir = pathlib.Path(config.services.run_dir)
    process = DraftTrainerProcess()
    processes.append(process)
    calls = process.calls
    with pytest.raises(grpc.RpcError) as refused:
        calls.hold(JOB)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION

    other = tmp_path / "nowhere"
    wrong = draft_config(tmp_path / "model", sglang_speculative_draft_model_path=str(other))
    with pytest.raises(grpc.RpcError) as missing:
        calls.start_job(JOB, wrong, weightsync.address, run_dir)
    assert missing.value.code() is grpc.StatusCode.NOT_FOUND
    assert str(other) in missing.value.details()

    calls.start_job(JOB, config, weightsync.address, run_dir)
    record(run_dir, 0)
    calls.wait_until_training(0)
    assert calls.hold(JOB).released_bytes == 0, "there is no GPU"
    calls.wait_for(lambda said: said.activity == "held", "hold")
    for step in (1, 2):  # of which the trainer, which keeps one, has removed the first meanwhile
        record(run_dir, step)
    for path in (run_dir / "drafts" / "recordings" / "step-00000001").iterdir():
        path.unlink()
    (run_dir / "drafts" / "recordings" / "step-00000001").rmdir()
    calls.hold(JOB, hold=False)
    done = calls.wait_for(lambda said: said.recordings == 2 and said.HasField("version"), "the rest")
    assert (done.missed_recordings, done.recorded_step) == (1, 2)
    warned = calls.wait_for(lambda said: bool(said.warnings), "warning")
    assert "the recording of training step 1 was gone before" in warned.warnings[0]

    with pytest.raises(grpc.RpcError) as busy:
        calls.start_job("another", config, weightsync.address, run_dir)
    assert busy.value.code() is grpc.StatusCode.FAILED_PRECONDITION
