"""The trainer as a real process, one rank or several, and its calls."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from weightsync_processes import Lines

from miles.config import JobConfig
from miles.rpc import connect_blocking
from miles.rpc.gen import policy_pb2, trainer_pb2, trainer_pb2_grpc

DEADLINE_S = 400.0


class TrainerProcess(Lines):
    """`python -m miles.services.trainer`, under torchrun when there is more than one rank."""

    def __init__(self, ranks: int = 1, environment: Mapping[str, str] | None = None) -> None:
        module = ["-m", "miles.services.trainer", "--listen", "127.0.0.1:0", "--device", "cpu"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        super().__init__(module if ranks == 1 else [*torchrun, *module], environment=environment)
        self.address = self.wait_for(lambda line: line.startswith("listening on "), "address").split()[-1]
        self.stub = trainer_pb2_grpc.TrainerServiceStub(connect_blocking(self.address))

    def start_job(
        self, job_id: str, config: JobConfig, redis_url: str, weightsync_address: str, run_dir: pathlib.Path
    ) -> trainer_pb2.TrainerReady:
        request = trainer_pb2.TrainerStartJobRequest(
            job_id=job_id,
            config_json=json.dumps(config.to_flat()),
            redis_url=redis_url,
            weightsync_address=weightsync_address,
            run_dir=str(run_dir),
        )
        *_, last = self.stub.StartJob(request, timeout=DEADLINE_S)
        return last.ready

    def train(self, job_id: str, step: int, group_ids: list[int], **fields: Any) -> trainer_pb2.TrainDone:
        request = trainer_pb2.TrainRequest(
            job_id=job_id, step=step, group_ids=group_ids, **{"deadline_ms": 20_000, **fields}
        )
        *_, last = self.stub.Train(request, timeout=DEADLINE_S)
        assert last.HasField("done"), last
        return last.done

    def abandon(self, job_id: str, step: int) -> bool:
        request = trainer_pb2.AbandonStepRequest(job_id=job_id, step=step)
        return self.stub.AbandonStep(request, timeout=DEADLINE_S).abandoning

    def export(self, job_id: str, version: int) -> trainer_pb2.ExportResponse:
        request = trainer_pb2.ExportRequest(job_id=job_id, stream=policy_pb2.WEIGHT_STREAM_POLICY, version=version)
        return self.stub.Export(request, timeout=DEADLINE_S)

    def save(
        self, job_id: str, export_hf: bool = False, in_background: bool = False
    ) -> trainer_pb2.SaveCheckpointResponse:
        request = trainer_pb2.SaveCheckpointRequest(job_id=job_id, export_hf=export_hf, in_background=in_background)
        return self.stub.SaveCheckpoint(request, timeout=DEADLINE_S)

    def stop_job(self, job_id: str) -> None:
        self.stub.StopJob(trainer_pb2.TrainerStopJobRequest(job_id=job_id), timeout=DEADLINE_S)
