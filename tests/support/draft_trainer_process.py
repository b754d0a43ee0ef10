"""The draft trainer as a real process, and its calls; and jobs and recordings for it."""

from __future__ import annotations

import json
import pathlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import torch
from recorded import random_sample, write_recording
from trainer_cases import VOCAB, job_config
from weightsync_processes import Lines

from miles.config import JobConfig
from miles.drafts.recorded_layers import EMBEDDING, aux_layers
from miles.drafts.recording import RecordedSample
from miles.rpc import connect_blocking
from miles.rpc.gen import draft_trainer_pb2, draft_trainer_pb2_grpc

DEADLINE_S = 200.0
LAYERS, HIDDEN = 3, 32
"""Of `trainer_cases.write_dense_model`."""


def draft_config(model: pathlib.Path, **changes: Any) -> JobConfig:
    """A job that trains an EAGLE-3 head from nothing, with several optimizer steps a recording."""
    settings = {
        "rollout_backend": "torch", "sglang_speculative_algorithm": "EAGLE3", "sglang_speculative_num_steps": 2,
        "enable_draft_training": True, "draft_batch_tokens": 64, "draft_tokens_per_step": 4096,
        "draft_learning_rate": 1e-3,
    }  # fmt: skip
    return job_config(model, **settings | changes)


def samples_of_step(step: int, count: int = 12) -> list[RecordedSample]:
    """What the policy's trainer would record of a step, if its hidden states were random."""
    generator = torch.Generator().manual_seed(step)
    layers = (EMBEDDING, *aux_layers(None, LAYERS))
    return [
        random_sample(generator, length=24, prompt=6, layers=layers, hidden=HIDDEN, vocabulary=VOCAB)
        for _ in range(count)
    ]


def record(run_dir: pathlib.Path, step: int) -> None:
    """Leave the recording of a step, as the trainer does."""
    write_recording(run_dir / "drafts" / "recordings", step, samples_of_step(step))


class DraftCalls:
    """Calls to a draft trainer, and what it says of its training."""

    def __init__(self, address: str) -> None:
        self.stub = draft_trainer_pb2_grpc.DraftTrainerServiceStub(connect_blocking(address))
        self.seen: list[draft_trainer_pb2.WatchDraftsResponse] = []
        self.ended: grpc.StatusCode | None = None
        self._changed = threading.Condition()

    def start_job(
        self,
        job_id: str,
        config: JobConfig,
        weightsync_address: str,
        run_dir: pathlib.Path,
        policy_step: int | None = 0,
    ) -> None:
        """Have it load a job, and follow that from now on."""
        request = draft_trainer_pb2.DraftTrainerStartJobRequest(
            job_id=job_id,
            config_json=json.dumps(config.to_flat()),
            weightsync_address=weightsync_address,
            run_dir=str(run_dir),
            policy_step=policy_step,
        )
        *_, last = self.stub.StartJob(request, timeout=DEADLINE_S)
        assert last.ready
        threading.Thread(target=self._watch, args=(job_id,), daemon=True).start()

    def stop_job(self, job_id: str) -> None:
        self.stub.StopJob(draft_trainer_pb2.DraftTrainerStopJobRequest(job_id=job_id), timeout=DEADLINE_S)

    def hold(self, job_id: str, hold: bool = True) -> draft_trainer_pb2.HoldDraftsResponse:
        request = draft_trainer_pb2.HoldDraftsRequest(job_id=job_id, hold=hold, release_memory=hold)
        return self.stub.Hold(request, timeout=DEADLINE_S)

    def wait_for(
        self, accept: Callable[[draft_trainer_pb2.WatchDraftsResponse], bool], what: str
    ) -> draft_trainer_pb2.WatchDraftsResponse:
        """The first thing it says that is accepted, seen before or not."""
        found: list[draft_trainer_pb2.WatchDraftsResponse] = []

        def is_there() -> bool:
            found.extend(message for message in self.seen if accept(message))
            return bool(found)

        with self._changed:
            assert self._changed.wait_for(is_there, DEADLINE_S), f"no {what} within {DEADLINE_S:g} s: {self.seen[-3:]}"
        return found[0]

    def wait_for_version(self, version: int) -> draft_trainer_pb2.WatchDraftsResponse:
        """What it says once a version is PREPARED."""
        return self.wait_for(lambda said: said.HasField("version") and said.version >= version, f"version {version}")

    def wait_until_training(self, step: int) -> None:
        """Return once it trains on the recording of a step, or has done so: it may be done before it says anything."""
        begun = f"training on step {step}"

        def is_begun(said: draft_trainer_pb2.WatchDraftsResponse) -> bool:
            return said.activity == begun or (said.HasField("recorded_step") and said.recorded_step >= step)

        self.wait_for(is_begun, begun)

    def _watch(self, job_id: str) -> None:
        try:
            for message in self.stub.Watch(draft_trainer_pb2.WatchDraftsRequest(job_id=job_id)):
                with self._changed:
                    self.seen.append(message)
                    self._changed.notify_all()
        except grpc.RpcError as error:
            self.ended = error.code()  # type: ignore[attr-defined]


class DraftTrainerProcess(Lines):
    """`python -m miles.services.trainer.drafts`."""

    def __init__(self, *options: str, environment: Mapping[str, str] | None = None) -> None:
        module = ["-m", "miles.services.trainer.drafts", "--listen", "127.0.0.1:0", "--device", "cpu"]
        super().__init__([*module, *options], environment=environment)
        self.address = self.wait_for(lambda line: line.startswith("listening on "), "address").split()[-1]
        self.calls = DraftCalls(self.address)

    def ends_within(self, seconds: float) -> int:
        """Wait for its end; returns the exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        code = self.process.poll()
        assert code is not None, f"it did not end within {seconds:g} s"
        return code
