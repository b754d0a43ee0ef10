"""How fast a new version of the weights reaches an engine over shared memory, and how long generation stands still.

Runs the weightsync service, an engine process that swaps tensors without copying, and a trainer, and prints one table:
per size, the median time and rate of each stage, beside a plain memory copy of the same bytes and a safetensors file
written and read again.

    python benchmarks/weight_sync.py --gigabytes 0.5 1 2 --repeats 5
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from rich.console import Console
from rich.table import Table

from miles.rpc import connect_blocking
from miles.rpc.gen import policy_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.weights import WeightPublisher, WeightSubscriber

GB = 1e9
JOB = "benchmark"
DEADLINE_S = 300.0
_LAYERS = 32


class SwappingEngine:
    """Points its parameters at the new tensors, as an engine on CPU does between two steps."""

    def __init__(self) -> None:
        self._version: int | None = None
        self.device = torch.device("cpu")
        self._parameters: dict[str, torch.nn.Parameter] = {}

    @property
    def version(self) -> int | None:
        return self._version

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> float:
        if not self._parameters:
            self._parameters = {name: torch.nn.Parameter(t, requires_grad=False) for name, t in tensors.items()}
        began = time.perf_counter()
        for name, parameter in self._parameters.items():
            parameter.data = tensors[name]
        self._version = version
        return time.perf_counter() - began

    async def weight_bytes(self) -> Mapping[str, torch.Tensor]:
        return self._parameters


async def follow(address: str) -> None:
    """The engine process: follow the service until killed."""
    subscriber = WeightSubscriber(address, JOB, "engine", policy_pb2.WEIGHT_STREAM_POLICY, SwappingEngine())
    await subscriber.start()
    await asyncio.sleep(DEADLINE_S * 100)


def make_tensors(nbytes: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """As many tensors whatever the size: 32 layers of one matrix and two vectors, about nbytes in all."""
    rows = max(1, round(nbytes / (_LAYERS * 2048 * dtype.itemsize)))
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(_LAYERS):
        tensors[f"layers.{layer}.weight"] = torch.randn(rows, 2048).to(dtype)
        tensors[f"layers.{layer}.norm_1"] = torch.ones(2048, dtype=dtype)
        tensors[f"layers.{layer}.norm_2"] = torch.ones(2048, dtype=dtype)
    return tensors


def timed(repeats: int, work: Callable[[], object]) -> float:
    """Median time of a call after one that is not counted, in seconds."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def copy_s(tensors: dict[str, torch.Tensor], repeats: int) -> float:
    """Copying the same tensors within memory, into pages that exist: the bound for any copy."""
    targets = [torch.empty_like(tensor).zero_() for tensor in tensors.values()]

    def copy() -> None:
        for target, tensor in zip(targets, tensors.values(), strict=True):
            target.copy_(tensor)

    return timed(repeats, copy)


def safetensors_s(tensors: dict[str, torch.Tensor], directory: pathlib.Path, repeats: int) -> float:
    """Writing a safetensors file to the same folder and reading it into memory."""
    from safetensors.torch import load_file, save_file

    path = directory / "benchmark.safetensors"

    def round_trip() -> None:
        save_file(tensors, path)
        for tensor in load_file(path).values():
            tensor.clone()

    try:
        return timed(repeats, round_trip)
    finally:
        path.unlink(missing_ok=True)


def publications(
    stub: weightsync_pb2_grpc.WeightSyncServiceStub, tensors: dict[str, torch.Tensor], first: int, repeats: int
) -> Iterator[dict[str, float]]:
    """Publish and activate `repeats` versions from number `first` on; yields the stages' times in seconds."""
    publisher = WeightPublisher(stub, JOB)
    layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    for version in range(first, first + repeats):
        result = publisher.publish(version, version, layout, tensors.items())
        request = weightsync_pb2.ActivateRequest(
            version=result.manifest.version,
            operation_id=f"activate {version}",
            deadline_ms=int(DEADLINE_S * 1000),
            min_engines=1,
        )
        done = list(stub.Activate(request, timeout=DEADLINE_S + 10))[-1].done
        engine = wait_until_old_bytes_are_free(stub)
        yield {
            "allocate": result.allocate_s,
            "copy": result.copy_s,
            "checksum (rest)": result.checksum_s,
            "publish in all": result.total_s,
            "map and verify": engine.prefetch_s,
            "activate in all": done.total_s,
            "swap (pause)": done.pause_s,
        }


def wait_until_old_bytes_are_free(stub: weightsync_pb2_grpc.WeightSyncServiceStub) -> weightsync_pb2.EngineStatus:
    """A training step lies between two publications; here, wait until the engine has let go of the old version."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        state = stub.ListVersions(weightsync_pb2.ListVersionsRequest(job_id=JOB), timeout=10)
        if len(state.versions) == 1:
            return state.engines[0]
        time.sleep(0.01)
    raise TimeoutError(f"waited {DEADLINE_S:g} s for the engine to let go of the old version")


def start_service(directory: pathlib.Path) -> tuple[subprocess.Popen[str], str]:
    """The service, and where it listens."""
    command = [sys.executable, "-m", "miles.services.weightsync", "--directory", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]


def measure(arguments: argparse.Namespace, gigabytes: float, table: Table) -> None:
    """Fill the table's rows for one size."""
    tensors = make_tensors(int(gigabytes * GB), getattr(torch, arguments.dtype))
    size = sum(tensor.nbytes for tensor in tensors.values())
    service, address = start_service(arguments.directory)
    engine = subprocess.Popen([sys.executable, __file__, "--follow", address])
    try:
        stub = weightsync_pb2_grpc.WeightSyncServiceStub(connect_blocking(address))
        runs = list(publications(stub, tensors, 0, arguments.repeats + 2))
    finally:
        engine.kill()
        service.terminate()
        service.wait(30)
    memcpy = copy_s(tensors, arguments.repeats)
    rows = {
        "memory copy": memcpy,
        "safetensors save + load": safetensors_s(tensors, arguments.directory, arguments.repeats),
    }
    rows |= {f"{stage}, new file": time_s for stage, time_s in runs[0].items() if stage in ("allocate", "copy")}
    rows |= {stage: statistics.median(run[stage] for run in runs[2:]) for stage in runs[0]}
    for stage, time_s in rows.items():
        moves_bytes = not stage.startswith(("swap", "allocate", "checksum"))
        rate = f"{size / time_s / GB:.2f}" if moves_bytes else ""
        share = f"{memcpy / time_s:.0%}" if moves_bytes else ""
        table.add_row(f"{size / GB:.2f}", stage, f"{time_s * 1e3:.3f}", rate, share)
    table.add_section()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="sizes, in 10^9 bytes")
    parser.add_argument("--repeats", type=int, default=5, help="publications per size that count")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--directory", type=pathlib.Path, default=None, help="where the bytes go (default: /dev/shm)")
    parser.add_argument("--follow", metavar="HOST:PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.follow:
        asyncio.run(follow(arguments.follow))
        return
    shared = pathlib.Path("/dev/shm")
    arguments.directory = arguments.directory or (shared if shared.is_dir() else pathlib.Path(tempfile.gettempdir()))
    table = Table(title=f"Weights over shared memory, {arguments.dtype}, {os.cpu_count()} CPUs, medians")
    for column in ("GB", "stage", "ms", "GB/s", "of memory copy"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for gigabytes in arguments.gigabytes:
        measure(arguments, gigabytes, table)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
