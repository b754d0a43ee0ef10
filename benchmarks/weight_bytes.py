"""Bytes of a version in each weight format, by transport, and the memory that receiving it takes.

Publishes a slice of Qwen3-30B-A3B (one layer with fewer experts, random weights) as a trainer does, first whole and
then after one step of the optimizer, to the weightsync service; a process that keeps the parts as they come, as an
engine does, follows it. Prints per format and transport what was written, what the receiver got, and by how much the
peak of its resident memory, shared pages included, rose. The line of the whole model is computed from its shapes.

    python -m benchmarks.weight_bytes
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.weight_sync import DEADLINE_S, GB, JOB, start_service, wait_until_old_bytes_are_free
from miles.precision.layers import QuantisedLayers
from miles.precision.recipe import Recipe
from miles.precision.tensors import QuantisedTensors
from miles.rpc import connect_blocking
from miles.rpc.gen import policy_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.weights import WeightPublisher, WeightSubscriber
from miles.weights.base import Endpoint
from miles.weights.export_format import AS_TRAINED, Entry, ExportFormat, formatted, formatted_layout
from miles.weights.naming.model_tensors import read_model_tensors

FORMATS: Mapping[str, ExportFormat] = {
    "bfloat16": AS_TRAINED,
    "fp8_block": QuantisedTensors(Recipe(format="fp8_block")),
    "int4, experts": QuantisedTensors(Recipe(format="int4", layers=QuantisedLayers(only=(".experts.",)))),
    "int4, every matrix": QuantisedTensors(Recipe(format="int4")),
}
TRANSPORTS = ("shared_memory", "grpc_chunks", "disk_delta")
_SLICE = {"num_hidden_layers": 1, "num_experts": 16, "vocab_size": 4096}
_STEP = 1e-5
"""By which each weight moves in a step, up or down: Adam's first with this learning rate."""


def shapes(**changes: int) -> dict[str, tuple[int, ...]]:
    """Of the tensors of Qwen3-30B-A3B in the checkpoint form, by name."""
    from transformers import Qwen3MoeConfig

    sizes = {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, **changes,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        Qwen3MoeConfig(**sizes, tie_word_embeddings=False).save_pretrained(folder)
        model = read_model_tensors(folder)
    return dict(model.conversion.checkpoint_shapes(model.module))


def layout_of(export_format: ExportFormat, found: Mapping[str, tuple[int, ...]]) -> list[Entry]:
    """What is published of tensors of these shapes."""
    return formatted_layout(export_format, [(name, torch.bfloat16, shape) for name, shape in found.items()])


def bytes_of(layout: list[Entry]) -> int:
    """Of a version."""
    return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in layout)


def peak_bytes() -> int:
    """Of this process's resident memory since the last `forget_peak`."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) << 10


def forget_peak() -> None:
    """Measure anew from here."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


class MeasuredEngine:
    """Keeps parts as they come; prints by how much the peak rose when it has loaded a version."""

    def __init__(self) -> None:
        self.version: int | None = None
        self.device = torch.device("cpu")
        self._tensors: Mapping[str, torch.Tensor] = {}
        self._before = 0

    async def load_weights(self, version: int, tensors: Mapping[str, torch.Tensor]) -> float:
        self.version, self._tensors = version, tensors
        for tensor in tensors.values():
            tensor.view(torch.uint8).sum()  # read every page, as computing with it does
        print(json.dumps({"version": version, "peak_bytes": peak_bytes() - self._before}), flush=True)
        forget_peak()
        self._before = peak_bytes()
        return 0.0

    async def weight_bytes(self) -> Mapping[str, torch.Tensor]:
        return self._tensors


async def follow(address: str) -> None:
    """The receiving process."""
    subscriber = WeightSubscriber(address, JOB, "engine", policy_pb2.WEIGHT_STREAM_POLICY, MeasuredEngine())
    await subscriber.start()
    await asyncio.sleep(DEADLINE_S * 100)


def versions(arguments: argparse.Namespace, transport: str, name: str) -> Iterator[dict[str, int]]:
    """Publish and activate a small version, the whole one, and the one after a step; yields what each took."""
    export_format = FORMATS[name]
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(shape, generator=generator) * 0.02 for n, shape in shapes(**_SLICE).items()}
    service, address = start_service(arguments)
    engine = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.weight_bytes", "--follow", address], stdout=subprocess.PIPE, text=True
    )
    assert engine.stdout is not None
    try:
        stub = weightsync_pb2_grpc.WeightSyncServiceStub(connect_blocking(address))
        publisher = WeightPublisher(
            stub,
            *(JOB, policy_pb2.WEIGHT_STREAM_POLICY),
            weightsync_pb2.TransportKind.Value(f"TRANSPORT_KIND_{transport.upper()}"),
            deadline_s=DEADLINE_S,
            endpoint=Endpoint(address=address),
        )
        for version in range(3):
            held = list(weights.items())[: None if version else 1]  # a small one first, which loads every library
            if version == 2:
                for _, tensor in held:
                    tensor += _STEP * (torch.rand(tensor.shape, generator=generator) - 0.5).sign()
            layout = layout_of(export_format, {n: tuple(tensor.shape) for n, tensor in held})
            tensors = formatted(export_format, ((n, tensor.bfloat16()) for n, tensor in held))
            result = publisher.publish(version, version, layout, tensors)
            request = weightsync_pb2.ActivateRequest(
                version=result.manifest.version,
                operation_id=f"activate {version}",
                deadline_ms=int(DEADLINE_S * 1000),
                min_engines=1,
            )
            list(stub.Activate(request, timeout=DEADLINE_S + 10))
            loaded = json.loads(engine.stdout.readline())
            status = wait_until_old_bytes_are_free(stub)
            yield {
                "version": bytes_of(layout),
                "written": result.written_bytes or bytes_of(layout),
                "received": status.total_bytes,
                "peak": loaded["peak_bytes"],
            }
    finally:
        engine.kill()
        service.terminate()
        service.wait(60)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("/dev/shm"), help="where bytes go")
    parser.add_argument("--transports", nargs="+", default=TRANSPORTS, choices=TRANSPORTS)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--follow", metavar="HOST:PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.follow:
        asyncio.run(follow(arguments.follow))
        return
    table = Table(title="A version from trainer to engine, in MB")
    for column in ("format", "transport", "version", "written", "after a step", "received", "peak of the receiver"):
        table.add_column(column, justify="left" if column in ("format", "transport") else "right")
    console = Console(width=120)
    whole = shapes()
    for name in arguments.formats:
        size = bytes_of(layout_of(FORMATS[name], whole))
        console.print(f"Qwen3-30B-A3B, {name}: {size / GB:.2f} GB (computed)")
        for transport in arguments.transports:
            with tempfile.TemporaryDirectory(prefix="weight-bytes-") as folder:
                arguments.disk_directory = pathlib.Path(folder)
                _, first, second = versions(arguments, transport, name)
            cells = (first["version"], first["written"], second["written"], first["received"], first["peak"])
            table.add_row(name, transport, *(f"{cell / 1e6:.1f}" for cell in cells))
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
