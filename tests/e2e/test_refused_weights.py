"""Weights that no engine can take: the job fails with the engine's words, and does not wait for a retry."""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
import time
from collections.abc import Callable

import pytest
from whole_runs import Run, recipe

from miles.rpc import ExitCode, connect_blocking
from miles.rpc.gen import controller_pb2, controller_pb2_grpc

Start = Callable[[list[str], pathlib.Path], Run]
SHORT = {"rollout_batch_size": 4, "n_samples_per_prompt": 4, "no_gateway": True}


def test_a_model_that_changed_before_the_engine_read_it_fails_the_job_while_it_loads(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = _copy(tiny_dense, tmp_path / "inputs")
    run = start_run(recipe(folder, tmp_path / "run", num_rollout=4, **SHORT), tmp_path / "run")
    _wait(lambda: "rollout-0" in run.processes())
    run.processes()["rollout-0"].send_signal(signal.SIGSTOP)
    _wait(lambda: _waiting_for(run) == "a rollout to load the model")
    _drop_a_layer(folder)
    run.processes()["rollout-0"].send_signal(signal.SIGCONT)
    _fails_with_the_engines_words(run)


@pytest.mark.slow
def test_a_restarted_engine_with_another_model_fails_the_job_that_has_no_other(
    start_run: Start, tiny_dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = _copy(tiny_dense, tmp_path / "inputs")
    run = start_run(recipe(folder, tmp_path / "run", num_rollout=10000, **SHORT), tmp_path / "run")
    run.wait_for_step(1)
    _drop_a_layer(folder)
    run.processes()["rollout-0"].kill()
    _fails_with_the_engines_words(run)


def _fails_with_the_engines_words(run: Run) -> None:
    assert run.wait(100) == ExitCode.JOB_FAILED, run.output()
    printed = run.log.read_text()
    assert (
        "the job has failed: the engines cannot load the trainer's weights, and trying again cannot help: " in printed
    )
    assert "rollout-0: " in printed
    assert "model.layers.1.mlp.up_proj.weight: the model has no such parameter" in printed
    assert "give trainer and engines the same model" in printed


def _copy(folder: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    shutil.copytree(folder, to)
    return to


def _drop_a_layer(folder: pathlib.Path) -> None:
    """Somebody puts another model where the run's was."""
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config["num_hidden_layers"] = 1
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))


def _waiting_for(run: Run) -> str:
    address = run.run_dir / "controller.address"
    if not address.exists():
        return ""
    with connect_blocking(address.read_text()) as channel:
        stub = controller_pb2_grpc.ControllerServiceStub(channel)
        jobs = stub.ListJobs(controller_pb2.ListJobsRequest(), wait_for_ready=True).jobs
        requests = [controller_pb2.DescribeRunRequest(job_id=job.job_id) for job in jobs]
        return "".join(stub.DescribeRun(request, wait_for_ready=True).waiting_for for request in requests)


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 200.0
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
