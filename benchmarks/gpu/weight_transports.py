"""Weight transfer from a trainer's GPU to an engine's: stages of each transport, and a plain device copy.

    python -m benchmarks.gpu.weight_transports
    python -m benchmarks.gpu.weight_transports --gigabytes 7 --transports shared_memory cuda_ipc --held float32
    python -m benchmarks.gpu.weight_transports --gigabytes 1 4 8 --transports cuda_ipc broadcast

The trainer is a process of its own that holds random tensors, in float32 if asked to, and publishes them in bfloat16 to
a real weightsync service. The engine copies what arrives in host memory to the GPU and swaps parameters as the torch
engine does; only the swap is a pause. The first version warms up; the median of the others counts. `memcpy` copies as
many bytes within the device. NCCL takes a second GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from miles.rpc import connect, connect_blocking
from miles.rpc.gen import policy_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.weights import WeightPublisher, WeightSubscriber
from miles.weights.base import Endpoint
from miles.weights.staging.ahead import AheadOnDevice
from miles.weights.transports.names import TRANSPORT_OF_MODE

JOB = "benchmark"
STREAM = policy_pb2.WEIGHT_STREAM_POLICY
ROWS = 4096
TRANSPORTS = ("shared_memory", "grpc_chunks", "cuda_ipc", "broadcast")
DEADLINE_S = 120.0


def tensors_of(gigabytes: float, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Matrices of 32 MB in bfloat16 and as many vectors."""
    count = max(1, round(gigabytes * 1e9 / (2 * ROWS * ROWS)))
    made: dict[str, torch.Tensor] = {}
    for index in range(count):
        made[f"layers.{index}.weight"] = torch.randn(ROWS, ROWS, device=device, dtype=dtype)
        made[f"layers.{index}.norm"] = torch.randn(ROWS, device=device, dtype=dtype)
    return made


def trainer(address: str, mode: str, gigabytes: float, device: torch.device, held: torch.dtype) -> None:
    """The trainer's process: publishes a version for every line on stdin and says how long it took."""
    publisher = WeightPublisher(
        weightsync_pb2_grpc.WeightSyncServiceStub(connect_blocking(address)),
        JOB,
        STREAM,
        TRANSPORT_OF_MODE[mode],
        endpoint=Endpoint(address, device),
    )
    tensors = tensors_of(gigabytes, device, held)
    layout = [(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in tensors.items()]
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        result = publisher.publish(int(line), int(line), layout, tensors.items())
        said = {"copy_s": result.copy_s, "checksum_s": result.checksum_s, "bytes": result.total_bytes}
        print(json.dumps(said), flush=True)
    publisher.close()


class Target:
    """Swaps parameters in place of their predecessors, as the torch engine does."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.version: int | None = None
        self.ahead_s = 0.0
        """Of the last version: copying from host memory to the device before the swap."""
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._ahead = AheadOnDevice(device) if device.type == "cuda" else None

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> float:
        came = time.perf_counter()
        if self._ahead is not None:
            tensors = await asyncio.to_thread(self._ahead.copied, tensors)
        began = time.perf_counter()
        self.ahead_s = began - came
        self._parameters = {
            name: torch.nn.Parameter(t.to(self.device), requires_grad=False) for name, t in tensors.items()
        }
        _synchronize(self.device)
        self.version = version
        return time.perf_counter() - began

    async def weight_bytes(self) -> Mapping[str, torch.Tensor]:
        return self._parameters


async def measure(mode: str, gigabytes: float, versions: int, devices: tuple[str, str], held: str) -> dict[str, float]:
    """Medians over the versions after the first, in seconds; `bytes` is the size of one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        service = _start("-m", "miles.services.weightsync", "--directory", folder)
        address = (await asyncio.to_thread(_line, service)).split()[-1]
        where = ("--address", address, "--trainer-device", devices[0], "--held", held)
        process = _start(
            "-m", __spec__.name, "--role", "trainer", "--transports", mode, "--gigabytes", gigabytes, *where
        )
        try:
            await asyncio.to_thread(_line, process)
            return await _versions(address, process, versions, torch.device(devices[1]))
        finally:
            for child in (process, service):
                child.kill()
                child.wait()


async def _versions(
    address: str, process: subprocess.Popen[str], versions: int, device: torch.device
) -> dict[str, float]:
    target = Target(device)
    subscriber = WeightSubscriber(address, JOB, "engine", STREAM, target)
    await subscriber.start()
    rows: list[dict[str, float]] = []
    async with connect(address) as channel:
        stub: Any = weightsync_pb2_grpc.WeightSyncServiceStub(channel)
        for version in range(versions + 1):
            assert process.stdin is not None
            process.stdin.write(f"{version}\n")
            process.stdin.flush()
            row = json.loads(await asyncio.to_thread(_line, process))
            await _attached(stub)
            began = time.monotonic()
            request = weightsync_pb2.ActivateRequest(
                version=policy_pb2.WeightVersion(job_id=JOB, stream=STREAM, version=version),
                operation_id=str(version),
                deadline_ms=int(DEADLINE_S * 1000),
                min_engines=1,
            )
            async for answer in stub.Activate(request, timeout=DEADLINE_S):
                if answer.WhichOneof("kind") == "engine" and answer.engine.prefetch_s:
                    row["prefetch_s"] = answer.engine.prefetch_s
                elif answer.WhichOneof("kind") == "done":
                    row["pause_s"] = answer.done.pause_s
            rows.append({**row, "ahead_s": target.ahead_s, "activate_s": time.monotonic() - began})
    await subscriber.close()
    return {name: statistics.median(row[name] for row in rows[1:]) for name in rows[-1]}


async def _attached(stub: Any) -> None:
    end = time.monotonic() + DEADLINE_S
    while not (await stub.ListVersions(weightsync_pb2.ListVersionsRequest())).engines:
        if time.monotonic() > end:
            raise TimeoutError(f"waited {DEADLINE_S:g} s for the engine to attach")
        await asyncio.sleep(0.05)


def memcpy_s(nbytes: int, device: torch.device) -> float:
    """Time of a copy within the device, the best of ten, in seconds."""
    source, target = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(10):
        _synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def table(rows: list[tuple[str, dict[str, float], float]]) -> Iterator[str]:
    """Lines of the result; rates are bytes of the version over the stage's time."""
    names = ("copy_s", "checksum_s", "prefetch_s", "ahead_s", "pause_s")
    yield (
        "| transport | GB | send copy s | checksum s | prefetch s | to the GPU s | pause s | pause s/GB "
        "| send GB/s | prefetch GB/s | to the GPU GB/s | device memcpy GB/s |"
    )
    yield "|---" * 12 + "|"
    for mode, row, copy_s in rows:
        size = row["bytes"]
        stages = " | ".join(f"{row[name]:.4f}" for name in names)
        times = (row["copy_s"] + row["checksum_s"], row["prefetch_s"], row["ahead_s"], copy_s)
        rates = " | ".join(f"{size / seconds / 1e9:.1f}" for seconds in times)
        yield f"| {mode} | {size / 1e9:.2f} | {stages} | {row['pause_s'] / size * 1e9:.4f} | {rates} |"


def main(args: argparse.Namespace) -> None:
    """Measure every transport at every size."""
    rows = []
    for mode in args.transports:
        other = args.engine_device or ("cuda:1" if mode == "broadcast" else args.trainer_device)
        if other == "cuda:1" and torch.cuda.device_count() < 2:
            print(f"{mode}: left out, it takes a second GPU")
            continue
        for gigabytes in args.gigabytes:
            row = asyncio.run(measure(mode, gigabytes, args.versions, (args.trainer_device, other), args.held))
            rows.append((mode, row, memcpy_s(int(row["bytes"]), torch.device(args.trainer_device))))
    device = torch.device(args.trainer_device)
    print(
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", f"torch {torch.__version__}", sep=", "
    )
    print("\n".join(table(rows)))


def _start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, arguments)]
    folder = pathlib.Path(__file__).resolve().parents[2]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args} ended with {process.wait()}")
    return line


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--transports", nargs="+", default=["cuda_ipc", "broadcast"], choices=TRANSPORTS)
    parser.add_argument("--versions", type=int, default=3)
    parser.add_argument("--held", default="bfloat16", choices=["bfloat16", "float32"], help="as the trainer has them")
    parser.add_argument("--trainer-device", default="cuda:0")
    parser.add_argument("--engine-device", default="", help="default: the trainer's; cuda:1 for broadcast")
    parser.add_argument("--role", default="", help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "trainer":
        trainer(
            options.address,
            options.transports[0],
            options.gigabytes[0],
            torch.device(options.trainer_device),
            getattr(torch, options.held),
        )
    else:
        main(options)
