"""A controller and gateways as processes, for tests."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import httpx
import numpy as np
import pytest

from miles.queue import RedisServer
from miles.services.controller.status.timeline import NAME, TimelineWriter
from miles.services.trainer.step.sample_log import SampleLog, TokenMetrics
from miles.telemetry import MetricsWriter
from miles.types import Sample, SampleStatus, VersionSpan

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
START_S = 200.0


@dataclasses.dataclass
class Process:
    """A service that listens somewhere."""

    command: list[str]
    address_file: pathlib.Path
    log: pathlib.Path
    environment: dict[str, str]
    running: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return self.address_file.read_text()

    def start(self) -> None:
        """Start it and wait until it listens."""
        self.address_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(
                self.command, cwd=REPOSITORY, env={**os.environ, **self.environment}, stdout=log, stderr=log
            )
        end = time.monotonic() + START_S
        while not self.address_file.exists():
            if self.running.poll() is not None or time.monotonic() > end:
                pytest.fail(f"{self.command} did not start:\n{self.log.read_text()}")
            time.sleep(0.02)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.running is not None:
            self.running.send_signal(number)
            try:
                self.running.wait(20)
            except subprocess.TimeoutExpired:
                self.running.kill()
                self.running.wait()
            self.running = None


@dataclasses.dataclass
class Stack:
    """Everything that runs, and what is needed to use it."""

    root: pathlib.Path
    """The allowed root; also holds the tiny model."""
    controller: Process
    local: Process
    """Gateway without keys."""
    keyed: Process
    """Gateway with keys."""
    keys: dict[str, str]
    """API keys by name: reader, alice and bob (submit), boss (admin)."""
    redis: RedisServer

    def config(self, **changes: Any) -> dict[str, Any]:
        """The body of a job."""
        return {
            "hf_checkpoint": "tiny/model",
            "prompt_data": "tiny/train.jsonl",
            "input_key": "prompt",
            "label_key": "label",
            "rm_type": "exact_match",
            "rollout_batch_size": 4,
            "n_samples_per_prompt": 2,
            "rollout_max_response_len": 6,
            "num_rollout": 2,
            **changes,
        }


def service(folder: pathlib.Path, name: str, *command: str, environment: dict[str, str] | None = None) -> Process:
    """A service of this project as a process; its address goes to a file."""
    address_file = folder / f"{name}.address"
    words = [sys.executable, "-m", *command, "--address-file", str(address_file)]
    return Process(words, address_file, folder / f"{name}.log", environment or {})


def write_task(folder: pathlib.Path) -> None:
    """A model folder that can be read as far as a job without workers gets, and prompts."""
    from examples.tiny.make import make_tokenizer

    model = folder / "model"
    make_tokenizer().save_pretrained(model)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    prompts = [{"prompt": f"{i:05d}>", "label": f"{i:05d}"} for i in range(64)]
    (folder / "train.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def wait_for_state(http: httpx.Client, job_id: str, *states: str) -> dict[str, Any]:
    """The job once it is in one of the states."""
    end = time.monotonic() + 30
    while True:
        job: dict[str, Any] = http.get(f"/v1/jobs/{job_id}").json()
        if job["state"] in states:
            return job
        assert time.monotonic() < end, f"job {job_id} is {job['state']}, not {states}"
        time.sleep(0.05)


def problem(answer: httpx.Response, kind: str) -> dict[str, Any]:
    """The body of an answer that must be this problem document."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body: dict[str, Any] = answer.json()
    assert body["type"] == f"/problems/{kind}", answer.text
    assert body["status"] == answer.status_code
    assert body["title"]
    assert body["detail"]
    return body


def fill_run_folder(run_dir: pathlib.Path) -> None:
    """Leave in a run folder what a run would have left there: metrics, samples, activity, an export, logs."""
    writer = MetricsWriter(run_dir / "metrics.jsonl")
    for step in range(6):
        writer.write(step, {"train/loss": float(step), "rollout/raw_reward": math.nan if step == 1 else 0.5})
    writer.close()
    samples = SampleLog(run_dir, 2, 0, None)
    values = np.array([0.25, 0.75], np.float32)
    for step in range(3):
        made = [
            Sample(
                group_id=step,
                index=i,
                prompt=[{"role": "user", "content": "häh?"}],
                tokens=np.arange(4, dtype=np.int32),
                response_length=2,
                response="ja\n",
                label="ja",
                reward=float(i),
                status=SampleStatus.COMPLETED,
                weight_versions=(VersionSpan(step, 0, 2),),
            )
            for i in range(2)
        ]
        numbers = TokenMetrics(np.ones(2, np.float32), values, values, values + 1)
        samples.write(step, [(sample, numbers) for sample in made])
    spans = TimelineWriter(run_dir / NAME)
    spans.add("train", 1.0, 2.5)
    spans.close()
    export = run_dir / "hf" / "6"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    (export / "model.safetensors").write_bytes(bytes(range(256)) * 8000)
    logs = run_dir / "logs"
    logs.mkdir()
    (logs / "rollout-0.log").write_text("started\nredis://:geheim123@host\nlast\n")
