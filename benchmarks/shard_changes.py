"""What a version costs in which a share of the values has changed: ranks that compare their shards, and an engine.

    python -m benchmarks.shard_changes --gigabytes 2 --ranks 2 --shares 0.01 0.05 1.0 --repeats 3
    python -m benchmarks.shard_changes --gigabytes 60 --ranks 8 --device cuda --directory /mnt/shared

Ranks hold shards of random bfloat16 matrices as FSDP2 lays them out. For every share they publish versions by
disk_delta in two ways by turns: `changes`, where each rank compares its shards with those of the last version before
anything is gathered, and `all`, where everything is gathered and rank 0 compares. `rest` is what is not sending:
comparing, gathering and applying. Then a process of its own reads the versions as an engine does. Medians; bytes are
counted.

Without `--compare` only `changes` is measured, which takes a third less memory: per GB of weights 1.1 GB on the ranks
together and 1 GB on rank 0, and then 2 GB in the reader. Eight layers share each matrix.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.services.trainer.backends.fsdp.export import gathered, shards
from miles.services.trainer.changes.export import ChangedExports
from miles.weights import manifest as manifests
from miles.weights.bucketing import buckets
from miles.weights.dtypes import wire_dtype
from miles.weights.transports.disk_delta.transport import DiskDeltaTransport

GB = 1e9
BUCKET_BYTES = 256 << 20
_LAYERS, _COLUMNS = 32, 2048
WAYS = ("changes", "all")


class Rank:
    """One rank, its shards, and what it publishes."""

    def __init__(self, gigabytes: float, folder: pathlib.Path, device: torch.device) -> None:
        self.rank, ranks = dist.get_rank(), dist.get_world_size()
        rows = round(gigabytes * GB / (_LAYERS * _COLUMNS * 2 * ranks))
        mesh = DeviceMesh(device.type, list(range(ranks)))
        self._own = [torch.randn(rows, _COLUMNS, device=device).mul_(0.02).bfloat16() for _ in range(_LAYERS // 8)]
        parts = [DTensor.from_local(own, mesh, [Shard(0)]) for own in self._own]
        self._weights = {f"layers.{layer}.weight": parts[layer % len(parts)] for layer in range(_LAYERS)}
        layout = [(name, wire_dtype(w.dtype), tuple(w.shape)) for name, w in self._weights.items()]
        self.descriptors, self.nbytes = manifests.plan(layout)
        self._folder, self._device = folder, device
        self._changed, self._transport = ChangedExports(), DiskDeltaTransport()
        self._last: weightsync_pb2.TransportHandle | None = None
        self._number = 0

    def change(self, share: float) -> None:
        """Move this share of the values by about a hundredth, as a training step does in bfloat16."""
        for own in self._own:
            for part in own.view(-1).split(1 << 24):
                chosen = torch.rand(part.numel(), device=part.device) < share
                part[chosen] *= 1.01

    def publish(self, way: str) -> dict[str, float]:
        """Publish a version as a change to the last one; seconds and bytes."""
        dist.barrier()
        began = time.perf_counter()
        handle = self._handle()
        descriptors = [policy_pb2.TensorDescriptor.FromString(d.SerializeToString()) for d in self.descriptors]
        tensors = self._tensors(way)
        send_s, written = 0.0, 0
        if self.rank == 0:
            for bucket in buckets(descriptors, BUCKET_BYTES):
                part = [next(tensors) for _ in bucket]
                sent = self._transport.send(handle, bucket, part, lasting=way == "changes")
                send_s, written = send_s + sent.copy_s, written + sent.written_bytes
        for _ in tensors:
            pass
        if self.rank == 0:
            self._seal(handle, descriptors)
        self._last, self._number = handle, self._number + 1
        total_s = time.perf_counter() - began
        moved = self._changed.gathered_bytes if way == "changes" else self.nbytes
        return {"total_s": total_s, "rest_s": total_s - send_s, "gathered": moved, "written": written}

    def keep(self) -> None:
        """Compare the shards, so that the next changes are told from these."""
        for _ in self._tensors("changes"):
            pass

    def _tensors(self, way: str) -> Iterator[tuple[str, torch.Tensor]]:
        def everything() -> Iterator[tuple[str, torch.Tensor]]:
            return gathered(self._weights.items(), lambda _, dtype: dtype, BUCKET_BYTES, self._allocate)

        if way == "all":
            return everything()
        mine = self._weights.items()
        return self._changed.export(lambda: shards(mine, lambda _, dtype: dtype), everything, BUCKET_BYTES)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _handle(self) -> weightsync_pb2.TransportHandle:
        name = f"weight_v{self._number:06d}"
        delta = weightsync_pb2.DiskDeltaHandle(
            path=str(self._folder / name),
            partial_path=str(self._folder / f".partial-{name}"),
            encoding=weightsync_pb2.DELTA_ENCODING_XOR,
        )
        if self._last is not None:
            delta.base_path = self._last.disk_delta.path
            delta.base_publication_id = self._last.publication_id
        return weightsync_pb2.TransportHandle(
            kind=weightsync_pb2.TRANSPORT_KIND_DISK_DELTA, publication_id=self._number + 1, disk_delta=delta
        )

    def _seal(self, handle: weightsync_pb2.TransportHandle, descriptors: list[policy_pb2.TensorDescriptor]) -> None:
        version = policy_pb2.WeightVersion(job_id="benchmark", version=self._number)
        manifest = manifests.build(version, descriptors, self.nbytes, self._number)
        self._transport.seal(handle, manifest)
        path = pathlib.Path(handle.disk_delta.path)
        (path / "handle").write_bytes(handle.SerializeToString())
        (path / "manifest").write_bytes(manifest.SerializeToString())


def publish_versions(args: argparse.Namespace) -> None:
    """One rank's process: prints, on rank 0, a JSON line for every version."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    device = torch.device(args.device, dist.get_rank()) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank = Rank(args.gigabytes, args.directory, device)
    report(rank, None, "changes")
    for share in args.shares:
        for _ in range(args.repeats):
            for way in WAYS if args.compare else WAYS[:1]:
                rank.change(share)
                report(rank, share, way)
                if way == "all":
                    rank.keep()
    dist.destroy_process_group()


def report(rank: Rank, share: float | None, way: str) -> None:
    """Publish a version and print what it took."""
    said = {"share": share, "way": way, "bytes": rank.nbytes, **rank.publish(way)}
    if rank.rank == 0:
        print(json.dumps(said), flush=True)


def read_versions(folder: pathlib.Path) -> None:
    """The engine's process: prints a JSON line for every version."""
    transport = DiskDeltaTransport()
    for path in sorted(folder.glob("weight_v*")):
        handle = weightsync_pb2.TransportHandle.FromString((path / "handle").read_bytes())
        manifest = policy_pb2.Manifest.FromString((path / "manifest").read_bytes())
        began, before = time.perf_counter(), _bytes_read()
        transport.receive(handle, manifest).release()
        print(json.dumps({"read_s": time.perf_counter() - began, "read": _bytes_read() - before}), flush=True)


def _bytes_read() -> int:
    """Bytes that this process has read from files, whether from disk or its cache."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def measure(args: argparse.Namespace) -> list[dict[str, float]]:
    """A row for every version. The ranks end before the reader starts: all together may not fit."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(args.ranks), "--master-port", str(port)]
    rows = _lines([*torchrun, "-m", "benchmarks.shard_changes", *sys.argv[1:], "--publish", str(args.directory)])
    read = _lines(["-m", "benchmarks.shard_changes", "--read", str(args.directory)])
    return [{**row, **reading} for row, reading in zip(rows, read, strict=True)]


def _lines(arguments: list[str]) -> list[dict[str, float]]:
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def show(rows: list[dict[str, float]], title: str) -> None:
    """Print medians of each share and way; bytes as parts of the version's."""
    table = Table(title=title)
    columns = (
        "changed",
        "gathered by",
        "publish s",
        "of which rest s",
        "read + verify s",
        "gathered",
        "written",
        "read",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for share, way in dict.fromkeys((row["share"], row["way"]) for row in rows):
        group = [row for row in rows if (row["share"], row["way"]) == (share, way)]
        median = {key: statistics.median(row[key] for row in group) for key in group[0] if key not in ("share", "way")}
        seconds = [f"{median[key]:.2f}" for key in ("total_s", "rest_s", "read_s")]
        parts = [f"{median[key] / median['bytes']:.1%}" for key in ("gathered", "written", "read")]
        table.add_row("first version" if share is None else f"{share:.0%}", str(way), *seconds, *parts)
    Console(width=140).print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of a version, in 10^9 bytes")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05, 1.0], help="of the values that change")
    parser.add_argument("--repeats", type=int, default=3, help="versions per share and way")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compare", action=argparse.BooleanOptionalAction, default=True, help="also gather everything")
    parser.add_argument("--directory", type=pathlib.Path, default=None, help="where versions go (default: temporary)")
    parser.add_argument("--publish", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--read", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.read:
        read_versions(args.read)
        return
    if args.publish:
        args.directory = args.publish
        publish_versions(args)
        return
    with tempfile.TemporaryDirectory(prefix="shard-changes-", dir=args.directory) as folder:
        args.directory = pathlib.Path(folder)
        rows = measure(args)
    show(rows, f"{rows[0]['bytes'] / GB:.2f} GB in bfloat16, {args.ranks} ranks on {args.device}")


if __name__ == "__main__":
    main()
