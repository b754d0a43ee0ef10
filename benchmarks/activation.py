"""Where the time of one publication goes, from the end of a training step until the engine serves the version.

Starts the weightsync service, a trainer and a rollout service with a real engine, each in a process of its own as in a
run, and calls them as the controller does: export, then activate. No step is trained between two versions, and the
tensors keep their values: what an update costs does not depend on them.

    python -m benchmarks.activation --model .cache/tiny/dense/model
    python -m benchmarks.activation --model DIR --engine sglang --python .venv-sglang/bin/python
    python -m benchmarks.activation --model DIR --engine sglang --device cuda --transport cuda_ipc
    python -m benchmarks.activation --model large --engine sglang --device cuda --transport cuda_ipc --colocate

`--model` is a Hugging Face folder, or `large` for random weights of 4 GB in bfloat16. The first two versions are left
out of the medians: memory is allocated and mapped then. With `--colocate` a second table follows, of versions before
each of which the engine releases its memory, as it does while a trainer on the same GPU works.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from benchmarks.gpu.models import write_checkpoint
from benchmarks.gpu.workload import CPU_FLAGS, GPU_FLAGS
from miles.config import JobConfig
from miles.queue import RedisServer
from miles.rpc import connect
from miles.rpc.gen import controller_pb2, rollout_pb2, rollout_pb2_grpc, weightsync_pb2
from miles.services.controller.clients.trainer import TrainerClient
from miles.services.controller.clients.weightsync import WeightSyncClient
from miles.services.controller.jobs.context import JobContext
from miles.services.controller.workers.registry import AttachedWorker

JOB = "activation"
START_DEADLINE_S = 400.0
STEP_S = 0.3
"""Between two versions, as a training step is: engines discard the old one meanwhile."""
NOT_COUNTED = 2
SERVER_FLAGS: dict[str, dict[str, Any]] = {
    "cuda": {**GPU_FLAGS, "mem_fraction_static": 0.4, "max_total_tokens": 65536, "cuda_graph_bs_decode": [1]},
    "cpu": {**CPU_FLAGS, "max_total_tokens": 4096},
}


@contextlib.asynccontextmanager
async def service(logs: pathlib.Path, name: str, *arguments: str) -> AsyncIterator[str]:
    """A service of the project in a process of its own; yields its address."""
    with (logs / f"{name}.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"miles.services.{name}", *arguments), stdout=asyncio.subprocess.PIPE, stderr=log
        )
    assert process.stdout is not None
    try:
        while line := await asyncio.wait_for(process.stdout.readline(), START_DEADLINE_S):
            if line.startswith(b"listening on "):
                break
        else:
            raise RuntimeError(f"the {name} service ended before it listened: see {logs / f'{name}.log'}")
        yield line.decode().split()[-1]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def job_config(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """A job of the model, as a flat configuration."""
    flags = SERVER_FLAGS[args.device] if args.engine == "sglang" else {}
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    return {
        "hf_checkpoint": args.model,
        "prompt_data": "none.jsonl",
        "label_key": "label",
        "num_rollout": 1,
        "rollout_batch_size": 8,
        "n_samples_per_prompt": 8,
        "rollout_max_response_len": 16,
        "rm_type": "exact_match",
        "rollout_backend": args.engine,
        "train_backend": args.trainer,
        "rollout_dtype": dtype,
        "train_dtype": dtype,
        "device": args.device,
        "run_dir": str(folder),
        "lr": 1e-6,
        "update_weight_transfer_mode": args.transport,
        **({"colocate": True} if args.colocate else {}),
        **({"rollout_engine_python": args.python} if args.python else {}),
        **{f"sglang_{name}": value for name, value in flags.items()},
    }


def attached(kind: str, address: str) -> AttachedWorker:
    """A service as the controller knows it."""
    registration = controller_pb2.WorkerRegistration(worker_id=kind, address=address)
    return AttachedWorker(registration, 1, controller_pb2.WorkerHeartbeat(), time.time_ns(), asyncio.Event())


async def ignore(engine: weightsync_pb2.EngineStatus) -> None:
    """Take an engine's stage, as the controller does."""


async def publish(trainer: TrainerClient, weightsync: WeightSyncClient) -> dict[str, float]:
    """One publication as the controller makes it; seconds by stage."""
    began = time.monotonic()
    await trainer.export(0)
    exported = time.monotonic()
    await weightsync.activate(JOB, 0, min_engines=1, wait_for=["rollout"], check_equal=False, on_engine=ignore)
    ended = time.monotonic()
    listed = await weightsync.list_versions(JOB)
    engine, stages = listed.engines[0], listed.versions[-1].stage_s
    export_s, activate_s = exported - began, ended - exported
    return {
        "export": export_s,
        "  allocate": stages["allocate"],
        "  copy": stages["copy"],
        "  checksum": stages["checksum"],
        "  calls of the export": export_s - stages["allocate"] - stages["copy"] - stages["checksum"],
        "activate": activate_s,
        "  prefetch": engine.stage_s["prefetch"],
        "  swap": engine.stage_s["swap"],
        "    of which pause": engine.pause_s,
        "  calls of the activation": activate_s - engine.stage_s["prefetch"] - engine.stage_s["swap"],
        "end to end": ended - began,
    }


async def measure(args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Start the services, publish versions and print where their time went."""
    logs = args.logs or folder
    config = job_config(args, folder)
    async with contextlib.AsyncExitStack() as stack:
        redis = stack.enter_context(RedisServer(folder / "redis"))
        state = ("--state-dir", str(folder / "weightsync"))
        weightsync_address = await stack.enter_async_context(service(logs, "weightsync", *state))
        rollout_address = await stack.enter_async_context(
            service(logs, "rollout", "--device", args.device, "--worker-id", "rollout")
        )
        trainer_address = await stack.enter_async_context(service(logs, "trainer", "--device", args.device))
        channel = await stack.enter_async_context(connect(rollout_address))
        stub: Any = rollout_pb2_grpc.RolloutServiceStub(channel)
        context = JobContext(JOB, JobConfig.from_flat(config), redis.url, folder)
        trainer = TrainerClient(attached("trainer", trainer_address), context, weightsync_address)
        stack.push_async_callback(trainer.aclose)
        start = rollout_pb2.RolloutStartJobRequest(
            job_id=JOB,
            config_json=json.dumps(config),
            redis_url=redis.url,
            weightsync_address=weightsync_address,
        )
        began = time.monotonic()
        await asyncio.gather(trainer.start_job(), _drain(stub.StartJob(start)))
        print(f"trainer and engine are ready after {time.monotonic() - began:.0f} s", flush=True)
        weightsync = WeightSyncClient(attached("weightsync", weightsync_address))
        while not (await weightsync.list_versions(JOB)).engines:  # noqa: ASYNC110 (a benchmark may poll)
            await asyncio.sleep(0.05)
        for released in (False, True) if args.colocate else (False,):
            rows = []
            for _ in range(args.versions + NOT_COUNTED):
                if released:
                    await stub.ReleaseMemory(rollout_pb2.ReleaseMemoryRequest(job_id=JOB))
                rows.append(await publish(trainer, weightsync))
                await asyncio.sleep(STEP_S)
            nbytes = (await weightsync.list_versions(JOB)).versions[-1].total_bytes
            show(rows, nbytes, "after memory was released, " if released else "")
        await stub.StopJob(rollout_pb2.RolloutStopJobRequest(job_id=JOB))


async def _drain(messages: AsyncIterator[Any]) -> None:
    async for _ in messages:
        pass


def show(rows: Sequence[dict[str, float]], nbytes: int, what: str) -> None:
    """Print medians and worst of each stage."""
    counted = rows[NOT_COUNTED:]
    print(f"\n{what}{nbytes / 1e9:.3f} GB, {len(counted)} versions; milliseconds")
    print(f"{'stage':<26}{'median':>9}{'worst':>9}{'first':>9}")
    for stage in rows[0]:
        times = [row[stage] * 1e3 for row in counted]
        print(f"{stage:<26}{statistics.median(times):>9.1f}{max(times):>9.1f}{rows[0][stage] * 1e3:>9.1f}", flush=True)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Hugging Face checkpoint, or large")
    parser.add_argument("--engine", default="torch", choices=["torch", "sglang"])
    parser.add_argument("--trainer", default="fsdp", choices=["fsdp", "megatron"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--transport", default="auto", help="as --update-weight-transfer-mode")
    parser.add_argument("--versions", type=int, default=12, help="that count")
    parser.add_argument("--colocate", action="store_true", help="the engine releases its memory between versions")
    parser.add_argument("--python", default="", help="interpreter that has SGLang, when it is another one")
    parser.add_argument("--logs", type=pathlib.Path, help="folder for the services' logs")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory(prefix="activation-", ignore_cleanup_errors=True) as name:
        folder = pathlib.Path(name)
        if args.model == "large":
            args.model = str(write_checkpoint(folder / "model", "large", weights=True))
        asyncio.run(measure(args, folder))


if __name__ == "__main__":
    main()
