from __future__ import annotations

import gc
import json
import logging
import pathlib
import weakref
from collections.abc import Callable

import grpc
import grpc.aio
import pytest
from draft_trainer_process import draft_config
from trainer_cases import write_dense_model

from miles.config import JobConfig
from miles.drafts.folders import checkpoint_dir
from miles.rpc import start_server
from miles.rpc.gen import draft_trainer_pb2, draft_trainer_pb2_grpc
from miles.services.trainer.drafts.job import DraftJob
from miles.services.trainer.drafts.loading import load_job
from miles.services.trainer.drafts.service import SERVICE_NAME, DraftTrainerServicer

JOB, NOBODY = "job", "127.0.0.1:1"


async def test_a_job_that_failed_is_gone_before_it_is_loaded_again(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "miles.services.trainer.drafts.job")  # records keep the job by their traceback
    config = draft_config(write_dense_model(tmp_path / "model"))
    run_dir = pathlib.Path(config.services.run_dir)
    loaded: list[weakref.ref[DraftJob]] = []
    left: list[DraftJob | None] = []

    def load(
        request: draft_trainer_pb2.DraftTrainerStartJobRequest, config: JobConfig, on_change: Callable[[], None]
    ) -> DraftJob:
        gc.collect()
        left.extend(each() for each in loaded)
        job = load_job(request, config, on_change, "cpu")
        loaded.append(weakref.ref(job))
        return job

    servicer = DraftTrainerServicer(load)
    server, address = await start_server(
        lambda each: draft_trainer_pb2_grpc.add_DraftTrainerServiceServicer_to_server(servicer, each),
        "127.0.0.1:0",
        [SERVICE_NAME],
    )
    checkpoint_dir(run_dir).parent.mkdir(parents=True)
    checkpoint_dir(run_dir).write_text("no folder, so that the job fails")
    request = draft_trainer_pb2.DraftTrainerStartJobRequest(
        job_id=JOB,
        config_json=json.dumps(config.to_flat()),
        weightsync_address=NOBODY,
        run_dir=str(run_dir),
        policy_step=0,
    )
    async with grpc.aio.insecure_channel(address) as channel:
        stub = draft_trainer_pb2_grpc.DraftTrainerServiceStub(channel)
        assert [each async for each in stub.StartJob(request)][-1].ready
        with pytest.raises(grpc.aio.AioRpcError, match="the training of drafts has ended"):
            async for _ in stub.Watch(draft_trainer_pb2.WatchDraftsRequest(job_id=JOB)):
                pass
        checkpoint_dir(run_dir).unlink()
        assert [each async for each in stub.StartJob(request)][-1].ready
        await stub.StopJob(draft_trainer_pb2.DraftTrainerStopJobRequest(job_id=JOB))
    await server.stop(None)
    assert left == [None]
