"""Tiny models, and whole runs of train.py as a user starts them."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file

from examples.tiny.make import make
from miles.rpc import connect_blocking
from miles.rpc.gen import controller_pb2, controller_pb2_grpc

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
RUN_LIMIT_S = 800.0


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder with model/, train.jsonl and eval.jsonl of the tiny dense model."""
    return made_once(tmp_path_factory, "dense", moe=False)


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same for the tiny mixture of experts."""
    return made_once(tmp_path_factory, "moe", moe=True)


def made_once(factory: pytest.TempPathFactory, name: str, *, moe: bool) -> pathlib.Path:
    """A tiny model's folder, made by the first of the test processes that asks for it; the others wait."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = shared / f"tiny-{name}"
        if not folder.exists():
            unfinished = factory.mktemp(name)
            make(unfinished, moe=moe)
            unfinished.rename(folder)
    return folder


def settings(folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
    """A GRPO job on the sorting task, with `changes`."""
    return {
        "hf_checkpoint": folder / "model",
        "prompt_data": folder / "train.jsonl",
        "input_key": "prompt",
        "label_key": "label",
        "rm_type": "exact_match",
        "rollout_batch_size": 16,
        "n_samples_per_prompt": 16,
        "num_steps_per_rollout": 1,
        "rollout_max_response_len": 6,
        "rollout_skip_special_tokens": True,
        "rollout_dtype": "float32",
        "max_running_requests": 256,
        "train_dtype": "float32",
        "lr": 5e-4,
        "calculate_per_token_loss": True,
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 4096,
        **changes,
    }


def recipe(folder: pathlib.Path, run_dir: pathlib.Path, **changes: Any) -> list[str]:
    """Command line of such a run (True: a switch)."""
    command = [sys.executable, "train.py"]
    given = settings(folder, device="cpu", run_dir=run_dir, name=run_dir.name, **changes)
    for key, value in given.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            command.append(flag)
        elif isinstance(value, list | tuple):
            command += [flag, *map(str, value)]
        elif value is not None:
            command.append(f"{flag}={value}")
    return command


@dataclasses.dataclass
class Records:
    """What a run leaves behind."""

    run_dir: pathlib.Path

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that were written by training steps."""
        path = self.run_dir / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if "rollout/response_tokens" in line]

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        summary: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return summary

    def weights(self) -> dict[str, Any]:
        """Every tensor of the final HF checkpoint by name."""
        files = sorted(pathlib.Path(self.summary()["hf_checkpoint"]).glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}


@dataclasses.dataclass
class Run(Records):
    """A run in progress or at its end."""

    process: subprocess.Popen[str]
    log: pathlib.Path

    def wait(self, limit_s: float = RUN_LIMIT_S) -> int:
        """The exit code; fails with the run's output when it does not end in time."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the run did not end within {limit_s} s:\n{self.output()}")

    def output(self) -> str:
        """What the run printed, and the ends of its logs."""
        logs = [f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted((self.run_dir / "logs").glob("*.log"))]
        return "\n".join([self.log.read_text(), *logs])

    def wait_for_step(self, steps: int, limit_s: float = 400.0) -> None:
        """Return when so many steps are done."""
        end = time.monotonic() + limit_s
        while len(self.metrics()) < steps:
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"step {steps} was not reached within {limit_s} s:\n{self.output()}")
            time.sleep(0.02)

    def wait_for_training(self, steps: int, limit_s: float = 400.0) -> None:
        """Return when at least so many steps are done and another one is under way."""
        end = time.monotonic() + limit_s
        self.wait_for_step(steps, limit_s)
        with connect_blocking((self.run_dir / "controller.address").read_text()) as channel:
            stub = controller_pb2_grpc.ControllerServiceStub(channel)
            (job,) = stub.ListJobs(controller_pb2.ListJobsRequest()).jobs
            while stub.DescribeRun(controller_pb2.DescribeRunRequest(job_id=job.job_id)).phase != "training":
                if self.process.poll() is not None or time.monotonic() > end:
                    pytest.fail(f"no step was under way within {limit_s} s:\n{self.output()}")
                time.sleep(0.02)

    def wait_for_text(self, text: str, limit_s: float = 200.0) -> None:
        """Return when the run has printed this."""
        end = time.monotonic() + limit_s
        while text not in self.log.read_text():
            if time.monotonic() > end:
                pytest.fail(f"{text!r} was not printed within {limit_s} s:\n{self.output()}")
            time.sleep(0.02)

    def family(self) -> list[psutil.Process]:
        """Every process that the run has started and that is there now."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def processes(self) -> dict[str, psutil.Process]:
        """The run's service processes by worker name."""
        found = {}
        for child in self.family():
            words = child.cmdline()
            if "--worker-id" in words:
                found[words[words.index("--worker-id") + 1]] = child
            elif "miles.services.controller" in words:
                found["controller"] = child
            elif words and "redis-server" in words[0]:
                found["redis"] = child
        return found


def left_of(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run some seconds later."""
    _, alive = psutil.wait_procs(family, timeout=10.0)
    return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def start_run(tmp_path: pathlib.Path) -> Iterator[Callable[[list[str], pathlib.Path], Run]]:
    """Starts train.py; whatever is still running at the end of the test is killed."""
    with runs_of_test(tmp_path) as start:
        yield start


@contextlib.contextmanager
def runs_of_test(folder: pathlib.Path) -> Iterator[Callable[[list[str], pathlib.Path], Run]]:
    """The same for any scope; what runs print is kept in `folder`."""
    runs: list[Run] = []

    def start(command: list[str], run_dir: pathlib.Path) -> Run:
        log = folder / f"output-{len(runs)}.log"
        environment = {**os.environ, "COLUMNS": "200"}
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT, text=True
            )
        runs.append(Run(run_dir, process, log))
        return runs[-1]

    try:
        yield start
    finally:
        for run in runs:
            left = psutil.Process(run.process.pid).children(recursive=True) if run.process.poll() is None else []
            run.process.kill()
            run.process.wait()
            for process in left:
                if process.is_running():
                    process.send_signal(signal.SIGKILL)
