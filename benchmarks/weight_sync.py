"""Latency of a weight update by each transport, and its pause time.

Runs the weightsync service, an engine process that swaps tensors without copying, and a trainer, and prints one table:
per size, the time and rate of each stage, beside a plain memory copy of the same bytes and safetensors files written
and read again. shared_memory: medians of several publications. disk_delta and grpc_chunks: one whole version and one
for each of `--changed`, in which this share of the values changed, in fresh processes.

    python benchmarks/weight_sync.py --gigabytes 1 4 8 --repeats 5

From 4 GB on the trainer's tensors take an eighth of the size, as eight layers share each matrix: so 8 GB fit beside two
versions in 24 GB. With grpc_chunks the service holds every version in shared memory, one for each of `--changed` too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from miles.rpc import connect_blocking
from miles.rpc.gen import policy_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.weights import WeightPublisher, WeightSubscriber
from miles.weights.base import Endpoint

GB = 1e9
JOB = "benchmark"
DEADLINE_S = 300.0
TRANSPORTS = ["shared_memory", "disk_delta", "grpc_chunks"]
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
    """As many tensors whatever the size: 32 layers of one matrix and two vectors, about nbytes in all.

    From 4 GB on eight layers share each matrix: an eighth of the bytes, which is still more than caches hold.
    """
    sharing = 8 if nbytes > 2 * GB else 1
    rows = max(1, round(nbytes / (_LAYERS * 2048 * dtype.itemsize)))
    matrices = [(torch.randn(rows, 2048) * 0.02).to(dtype) for _ in range(_LAYERS // sharing)]
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(_LAYERS):
        tensors[f"layers.{layer}.weight"] = matrices[layer % len(matrices)]
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


def change(tensors: dict[str, torch.Tensor], share: float) -> None:
    """Move this share of every matrix's values by about a hundredth, as a training step does in bfloat16."""
    for tensor in {tensor.data_ptr(): tensor for tensor in tensors.values() if tensor.dim() == 2}.values():
        flat = tensor.view(-1)
        step = 1 << 24
        for begin in range(0, flat.numel(), step):
            part = flat[begin : begin + step]
            chosen = torch.rand(part.numel()) < share
            part[chosen] *= 1.01


def safetensors_s(tensors: dict[str, torch.Tensor], directory: pathlib.Path, repeats: int) -> float:
    """Writing a safetensors file for each layer to the folder and reading them into memory."""
    from safetensors.torch import load_file, save_file

    paths = [directory / f"benchmark-{layer}.safetensors" for layer in range(_LAYERS)]

    def round_trip() -> None:
        for layer, path in enumerate(paths):
            save_file({n: t for n, t in tensors.items() if n.startswith(f"layers.{layer}.")}, path)
        for path in paths:
            for tensor in load_file(path).values():
                tensor.clone()

    try:
        return timed(repeats, round_trip)
    finally:
        for path in paths:
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
        state: weightsync_pb2.ListVersionsResponse = stub.ListVersions(
            weightsync_pb2.ListVersionsRequest(job_id=JOB), timeout=10
        )
        if len(state.versions) == 1:
            return state.engines[0]
        time.sleep(0.01)
    raise TimeoutError(f"waited {DEADLINE_S:g} s for the engine to let go of the old version")


def start_service(arguments: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """The service, and where it listens."""
    command = [sys.executable, "-m", "miles.services.weightsync", "--directory", str(arguments.directory)]
    command += ["--disk-dir", str(arguments.disk_directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]


def measure_shared_memory(arguments: argparse.Namespace, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Medians of each stage, in seconds."""
    service, address = start_service(arguments)
    engine = subprocess.Popen([sys.executable, __file__, "--follow", address])
    try:
        stub = weightsync_pb2_grpc.WeightSyncServiceStub(connect_blocking(address))
        runs = list(publications(stub, tensors, 0, arguments.repeats + 2))
    finally:
        engine.kill()
        service.terminate()
        service.wait(30)
    rows = {f"{stage}, new file": time_s for stage, time_s in runs[0].items() if stage in ("allocate", "copy")}
    return rows | {stage: statistics.median(run[stage] for run in runs[2:]) for stage in runs[0]}


def publish_changes(address: str, kind: str, gigabytes: float, dtype: str, shares: Sequence[float]) -> None:
    """The trainer process: a whole version, then one for each share of the values; prints what each took."""
    tensors = make_tensors(int(gigabytes * GB), getattr(torch, dtype))
    publisher = WeightPublisher(
        weightsync_pb2_grpc.WeightSyncServiceStub(connect_blocking(address)),
        *(JOB, policy_pb2.WEIGHT_STREAM_POLICY, weightsync_pb2.TransportKind.Value(f"TRANSPORT_KIND_{kind}")),
        deadline_s=DEADLINE_S,
        endpoint=Endpoint(address=address),
    )
    layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    for version, share in enumerate([None, *shares]):
        if share is not None:
            change(tensors, share)
        result = publisher.publish(version, version, layout, tensors.items())
        print(json.dumps({"total_s": result.total_s, "written_bytes": result.written_bytes}), flush=True)


def measure_in_processes(arguments: argparse.Namespace, kind: str, gigabytes: float) -> dict[str, tuple[float, int]]:
    """Seconds and bytes of each stage. The trainer ends before the engine starts: both together may not fit."""
    service, address = start_service(arguments)
    engine = None
    rows: dict[str, tuple[float, int]] = {}
    try:
        command = [sys.executable, __file__, "--publish", address, kind, "--gigabytes", str(gigabytes)]
        command += ["--dtype", arguments.dtype, "--changed", *map(str, arguments.changed)]
        trainer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        published = [json.loads(line) for line in trainer.stdout.splitlines()]
        engine = subprocess.Popen([sys.executable, __file__, "--follow", address])
        stub = weightsync_pb2_grpc.WeightSyncServiceStub(connect_blocking(address))
        for version, sent in enumerate(published):
            what = f"{arguments.changed[version - 1]:.0%} changed" if version else "whole"
            name = policy_pb2.WeightVersion(job_id=JOB, stream=policy_pb2.WEIGHT_STREAM_POLICY, version=version)
            request = weightsync_pb2.ActivateRequest(
                version=name, operation_id=what, deadline_ms=int(DEADLINE_S * 1000), min_engines=1
            )
            done = list(stub.Activate(request, timeout=DEADLINE_S + 10))[-1].done
            status = stub.ListVersions(weightsync_pb2.ListVersionsRequest(job_id=JOB), timeout=10).engines[0]
            rows[f"publish, {what}"] = sent["total_s"], sent["written_bytes"]
            rows[f"get and verify, {what}"] = status.prefetch_s, status.total_bytes
            rows[f"swap (pause), {what}"] = done.pause_s, 0
    finally:
        if engine is not None:
            engine.kill()
            engine.wait(30)
        service.terminate()
        service.wait(60)
    return rows


def measure(arguments: argparse.Namespace, gigabytes: float, table: Table) -> None:
    """Fill the table's rows for one size."""
    tensors = make_tensors(int(gigabytes * GB), getattr(torch, arguments.dtype))
    size = sum(tensor.nbytes for tensor in tensors.values())
    memcpy = copy_s(tensors, arguments.repeats)

    def row(transport: str, stage: str, time_s: float, moves_bytes: bool = True, written: int = 0) -> None:
        rate = f"{size / time_s / GB:.2f}" if moves_bytes else ""
        share = f"{memcpy / time_s:.0%}" if moves_bytes else ""
        of_size = f"{written / size:.1%}" if written else ""
        table.add_row(f"{size / GB:.2f}", transport, stage, f"{time_s * 1e3:.3f}", rate, share, of_size)

    row("", "memory copy", memcpy)
    row("", "safetensors save + load", safetensors_s(tensors, arguments.directory, max(1, arguments.repeats // 2)))
    if "shared_memory" in arguments.transports:
        for stage, time_s in measure_shared_memory(arguments, tensors).items():
            row("shared_memory", stage, time_s, not stage.startswith(("swap", "allocate", "checksum")))
    del tensors
    for transport in ("disk_delta", "grpc_chunks"):
        if transport in arguments.transports:
            for stage, (time_s, nbytes) in measure_in_processes(arguments, transport.upper(), gigabytes).items():
                written = nbytes if stage.startswith("publish") else 0
                row(transport, stage, time_s, not stage.startswith("swap"), written)
    table.add_section()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0, 8.0], help="sizes, in 10^9 bytes")
    parser.add_argument("--repeats", type=int, default=5, help="publications per size that count")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--directory", type=pathlib.Path, default=None, help="where the bytes go (default: /dev/shm)")
    parser.add_argument(
        "--disk-directory", type=pathlib.Path, default=None, help="shared storage (default: a temporary folder)"
    )
    parser.add_argument("--transports", nargs="+", default=TRANSPORTS, choices=TRANSPORTS)
    parser.add_argument("--changed", type=float, nargs="*", default=[0.02], help="shares of the values; or none")
    parser.add_argument("--follow", metavar="HOST:PORT", help=argparse.SUPPRESS)
    parser.add_argument("--publish", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.follow:
        asyncio.run(follow(arguments.follow))
        return
    if arguments.publish:
        address, kind = arguments.publish
        publish_changes(address, kind, arguments.gigabytes[0], arguments.dtype, arguments.changed)
        return
    shared = pathlib.Path("/dev/shm")
    arguments.directory = arguments.directory or (shared if shared.is_dir() else pathlib.Path(tempfile.gettempdir()))
    table = Table(title=f"Weights from trainer to engine, {arguments.dtype}, {os.cpu_count()} CPUs")
    for column in ("GB", "transport", "stage", "ms", "GB/s", "of memory copy", "written"):
        table.add_column(column, justify="left" if column in ("transport", "stage") else "right")
    with tempfile.TemporaryDirectory(prefix="weight-sync-") as folder:
        arguments.disk_directory = arguments.disk_directory or pathlib.Path(folder)
        for gigabytes in arguments.gigabytes:
            measure(arguments, gigabytes, table)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
