"""Jobs over REST on real services: one after another, watched, paused, resumed, downloaded."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from miles.client import GatewayUnreachableError, MilesClient, MilesError
from miles.launcher.local import free_port

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def client(tiny_dense: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[MilesClient]:
    """A client of `miles serve`, once all workers are attached."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "miles.cli", "serve", "--device", "cpu", "--run-dir", str(tmp_path / "runs" / "serve")),
        *("--gateway-port", str(port), "--gateway-allowed-root", str(tiny_dense)),
    ]
    log = tmp_path / "serve.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=file, env=dict(os.environ))
    children: list[psutil.Process] = []
    try:
        with MilesClient(f"http://127.0.0.1:{port}") as made:
            end = time.monotonic() + 120
            while True:
                with contextlib.suppress(GatewayUnreachableError, MilesError):
                    if {"rollout", "trainer", "reward", "weightsync"} <= {worker["kind"] for worker in made.workers()}:
                        break
                if process.poll() is not None or time.monotonic() > end:
                    pytest.fail(f"the services did not start:\n{log.read_text()}")
                time.sleep(0.5)
            yield made
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def config(folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
    """A short job on the sorting task."""
    return {
        "hf_checkpoint": str(folder / "model"),
        "prompt_data": str(folder / "train.jsonl"),
        "input_key": "prompt",
        "label_key": "label",
        "rm_type": "exact_match",
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 4,
        "rollout_max_response_len": 6,
        "rollout_skip_special_tokens": True,
        "rollout_dtype": "float32",
        "lr": 1e-3,
        "num_rollout": 3,
        **changes,
    }


def test_jobs_run_one_after_another_and_leave_their_records(
    client: MilesClient, tiny_dense: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    first = client.submit(config(tiny_dense, name="first"))["id"]
    second = client.submit(config(tiny_dense, name="second", num_rollout=2))["id"]
    events = list(client.watch(first))
    assert [event["state"] for event in events if event["type"] == "state"] == ["starting", "running", "succeeded"]
    assert [e["step"] for e in events if e["type"] == "metrics" and "perf/step_time" in e["values"]] == [0, 1, 2]
    assert list(client.watch(second))[-1]["state"] == "succeeded"
    jobs = {job["id"]: job for job in client.jobs()}
    assert (jobs[first]["policy_version"], jobs[second]["policy_version"]) == (3, 2)
    assert jobs[first]["ended_at"] <= jobs[second]["started_at"]

    (series,) = client.metrics(first, ["rollout/raw_reward"])["series"]
    assert series["steps"] == [0, 1, 2]
    samples = list(client.samples(first, step=1))
    assert len(samples) == 16
    assert {span["version"] for sample in samples for span in sample["versions"]} == {1}
    assert all(sample["log_prob_diff"]["max"] < 0.5 for sample in samples)
    assert {span["activity"] for span in client.timeline(first)} == {"generate", "train", "sync"}
    assert {log["name"] for log in client.logs(first)} >= {"controller", "rollout-0", "trainer-0", "gateway"}

    (checkpoint,) = [each for each in client.checkpoints(first) if each["hf_files"]]
    client.download(first, checkpoint["step"], tmp_path / "export.tar")
    with tarfile.open(tmp_path / "export.tar") as archive:
        names = {pathlib.Path(name).name for name in archive.getnames()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_a_job_is_paused_stopped_and_taken_up_again(client: MilesClient, tiny_dense: pathlib.Path) -> None:
    job_id = client.submit(config(tiny_dense, name="long", num_rollout=200))["id"]
    wait_for(client, job_id, lambda job: job["policy_version"] >= 2)
    client.pause(job_id)
    paused = wait_for(client, job_id, lambda job: job["state"] == "paused")
    versions = {worker["kind"]: worker["version"] for worker in client.workers(job_id)}
    assert versions["rollout"] == versions["trainer"] == paused["policy_version"]
    client.resume(job_id)
    wait_for(client, job_id, lambda job: job["policy_version"] > paused["policy_version"])
    client.stop(job_id)
    stopped = wait_for(client, job_id, lambda job: job["state"] == "stopped")
    client.resume(job_id)
    wait_for(client, job_id, lambda job: job["policy_version"] > stopped["policy_version"])
    client.cancel(job_id)
    wait_for(client, job_id, lambda job: job["state"] == "cancelled")


def wait_for(client: MilesClient, job_id: str, condition: Any) -> dict[str, Any]:
    """The job once a condition holds."""
    end = time.monotonic() + 90
    while True:
        job = client.job(job_id)
        if condition(job):
            return job
        assert job["state"] != "failed", job["error"]
        assert time.monotonic() < end, f"job {job_id} is {job['state']} at step {job['policy_version']}"
        time.sleep(0.1)
