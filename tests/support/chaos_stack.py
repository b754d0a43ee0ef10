"""All services on this machine without a job, jobs that run on them, and assertions about each job."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import numpy as np
from safetensors.numpy import load_file

from miles.launcher.cluster import LocalCluster
from miles.launcher.drill.drill import Drill, Recovery
from miles.launcher.job_client import JobClient
from miles.launcher.run_on_cluster import run_on_cluster
from miles.launcher.serve import service_config
from miles.rpc import connect
from miles.rpc.gen import controller_pb2, controller_pb2_grpc, job_pb2

JOB_LIMIT_S = 800.0
WAIT_S = 200.0
STEPS, BATCH = 6, 4
ROUNDS = 3
"""Rounds of a drill, at most."""
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """A job that has ended."""

    job: job_pb2.Job
    run_dir: pathlib.Path
    seconds: float
    kills: int = 0
    recoveries: list[Recovery] = dataclasses.field(default_factory=list)

    def assert_every_group_was_trained_once(self, steps: int = STEPS) -> None:
        """As many steps as asked for, each with a whole batch, and over all of them every group exactly once."""
        assert self.job.state == job_pb2.JOB_STATE_SUCCEEDED, self.job.error
        assert [line["step"] for line in self.steps()] == list(range(steps))
        times: Counter[int] = Counter()
        for groups in self.samples():
            assert len(groups) == BATCH, f"groups of a step: {[group['group_id'] for group in groups]}"
            times.update(group["group_id"] for group in groups)
        assert times == Counter(range(steps * BATCH)), f"lost or duplicated: {times}"

    def steps(self) -> list[dict[str, Any]]:
        """The metrics of each step."""
        lines = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "rollout/response_tokens" in line]

    def samples(self) -> list[list[dict[str, Any]]]:
        """The groups that each step was trained on, as they were recorded."""
        files = sorted((self.run_dir / "samples").glob("step_????????.rank0.jsonl"))
        return [[json.loads(line) for line in path.read_text().splitlines()] for path in files]

    def weights(self) -> dict[str, Any]:
        """Every tensor of the final HF checkpoint by name."""
        files = sorted(pathlib.Path(json.loads(self.job.summary_json)["hf_checkpoint"]).glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def assert_same_weights(self, other: Ended) -> None:
        """Equal to the bit."""
        left, right = self.weights(), other.weights()
        assert left.keys() == right.keys()
        assert [name for name in left if not np.array_equal(left[name], right[name])] == []


class RunningJob:
    """A job from its submission to its end."""

    def __init__(self, cluster: LocalCluster, config: dict[str, Any]) -> None:
        self.steps = 0
        """How many have been taken, those that were taken again included."""
        self._cluster = cluster
        self._config = config
        self._listeners: list[Callable[[job_pb2.JobEvent], None]] = []
        self._began_s = time.monotonic()
        self._task = asyncio.create_task(self._watch())

    def listen(self, listener: Callable[[job_pb2.JobEvent], None]) -> None:
        """Have `listener` told of every event."""
        self._listeners.append(listener)

    async def end(self) -> Ended:
        """Wait for it."""
        async with asyncio.timeout(JOB_LIMIT_S):
            job = await self._task
        return Ended(job, pathlib.Path(self._config["run_dir"]), time.monotonic() - self._began_s)

    async def until_step(self, count: int) -> None:
        """Return when so many steps have been taken, or the job has ended."""
        await until(lambda: self.steps >= count or self._task.done(), f"step {count}")

    def _on_event(self, event: job_pb2.JobEvent, _: int) -> None:
        if event.WhichOneof("kind") == "metrics" and "perf/step_time" in event.metrics.values:
            self.steps += 1
        for listener in self._listeners:
            listener(event)

    async def _watch(self) -> job_pb2.Job:
        async with connect(self._cluster.controller_address) as channel:
            stub = controller_pb2_grpc.ControllerServiceStub(channel)
            # The request id makes it safe to ask again when the controller was killed before it answered.
            request = controller_pb2.SubmitJobRequest(
                request_id=self._config["name"], config_json=json.dumps(self._config)
            )
            while True:
                try:
                    submitted = await stub.SubmitJob(request, wait_for_ready=True, timeout=WAIT_S)
                    return await JobClient(stub, submitted.job.job_id).watch(False, self._on_event)
                except grpc.aio.AioRpcError as error:
                    if error.code() not in _AWAY:
                        raise
                    await asyncio.sleep(0.2)


class Stack:
    """Services that jobs are run on."""

    def __init__(self, cluster: LocalCluster, model: pathlib.Path, folder: pathlib.Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self._model = model

    def start(self, name: str, **changes: Any) -> RunningJob:
        """Submit a short job; a change to None leaves a setting out."""
        config = {
            "name": name,
            "run_dir": str(self.folder / name),
            "hf_checkpoint": str(self._model / "model"),
            "prompt_data": str(self._model / "train.jsonl"),
            "input_key": "prompt",
            "label_key": "label",
            "rm_type": "exact_match",
            "rollout_batch_size": BATCH,
            "n_samples_per_prompt": 4,
            "rollout_max_response_len": 6,
            "rollout_skip_special_tokens": True,
            "rollout_dtype": "float32",
            "train_dtype": "float32",
            "max_running_requests": 16,
            "num_rollout": STEPS,
            "save_interval": 2,
            "log_samples_per_step": BATCH,
            "lr": 5e-4,
            "device": "cpu",
        }
        changed = {**config, **changes}
        return RunningJob(self.cluster, {key: value for key, value in changed.items() if value is not None})

    async def run(self, name: str, **changes: Any) -> Ended:
        """A short job to its end."""
        return await self.start(name, **changes).end()

    async def run_through(self, seed: int, mean_pause_s: float, name: str, **changes: Any) -> Ended:
        """The same during a drill of few rounds: an endless one could hit before each checkpoint."""
        job = self.start(name, **changes)
        drill = Drill(self.cluster, seed, mean_pause_s)
        job.listen(drill.on_event)
        ended = await run_on_cluster(job.end(), self.cluster, drill, ROUNDS)
        return dataclasses.replace(ended, kills=drill.kills, recoveries=drill.recoveries)

    async def workers(self) -> dict[str, controller_pb2.Worker]:
        """Those that are attached, by name."""
        async with connect(self.cluster.controller_address) as channel:
            stub = controller_pb2_grpc.ControllerServiceStub(channel)
            answer = await stub.ListWorkers(controller_pb2.ListWorkersRequest(), wait_for_ready=True, timeout=WAIT_S)
        return {worker.registration.worker_id: worker for worker in answer.workers if worker.alive}

    async def until_workers(self, accept: Callable[[dict[str, controller_pb2.Worker]], bool], what: str) -> None:
        """Return once the attached workers are as wanted."""
        end = time.monotonic() + WAIT_S
        while not accept(workers := await self.workers()):
            assert time.monotonic() < end, f"waited {WAIT_S:g} s for {what}; attached: {sorted(workers)}"
            await asyncio.sleep(0.1)


async def until(done: Callable[[], bool], what: str) -> None:
    """Return once something is so."""
    end = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < end, f"waited {WAIT_S:g} s for {what}"
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def stack(model: pathlib.Path, folder: pathlib.Path) -> AsyncIterator[Stack]:
    """All services with two rollouts, for a model that lies in a folder."""
    settings = {"run_dir": str(folder / "serve"), "device": "cpu", "gateway": False, "rollout_num_workers": 2}
    # `chaos`: services may end often and are still restarted; the drills are the tests' own.
    async with LocalCluster(service_config({**settings, "chaos": 0}), any_job=True) as cluster:
        yield Stack(cluster, model, folder)
