"""`miles serve` as a process of a test, and jobs for it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import pytest

from miles.addresses import free_port
from miles.client import GatewayUnreachableError, MilesClient, MilesError

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
START_S = 400.0
KINDS = {"rollout", "trainer", "reward", "weightsync"}


@contextlib.contextmanager
def serving(folder: pathlib.Path, root: pathlib.Path, *flags: str) -> Iterator[MilesClient]:
    """A client of services whose jobs may use `root`, once all kinds of workers are attached."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "miles.cli", "serve", "--device", "cpu", "--run-dir", str(folder / "runs" / "serve")),
        *("--gateway-port", str(port), "--gateway-allowed-root", str(root), *flags),
    ]
    log = folder / "serve.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=file, env=dict(os.environ))
    children: list[psutil.Process] = []
    try:
        with MilesClient(f"http://127.0.0.1:{port}") as client:
            _wait_for_workers(client, process, log)
            yield client
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(180) == 0, log.read_text()
    finally:
        process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def _wait_for_workers(client: MilesClient, process: subprocess.Popen[bytes], log: pathlib.Path) -> None:
    end = time.monotonic() + START_S
    while True:
        with contextlib.suppress(GatewayUnreachableError, MilesError):
            if {worker["kind"] for worker in client.workers()} >= KINDS:
                return
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"the services did not start:\n{log.read_text()}")
        time.sleep(0.2)


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


def wait_for(client: MilesClient, job_id: str, condition: Any) -> Mapping[str, Any]:
    """The job once a condition holds."""
    end = time.monotonic() + 400
    while True:
        job = client.job(job_id)
        if condition(job):
            return job
        assert job["state"] != "failed", job["error"]
        assert time.monotonic() < end, f"job {job_id} is {job['state']} at step {job['policy_version']}"
        time.sleep(0.1)
