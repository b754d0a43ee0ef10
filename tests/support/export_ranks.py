"""Ranks of a trainer that offer models by broadcast, one version per model and dtype: started by torchrun.

Rank 0 writes each version's description to FOLDER/<case>/ and then its peak of bucket memory; all wait for FOLDER/stop.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from broadcast_kit import write
from torch.multiprocessing.reductions import StorageWeakRef
from trainer_cases import job_config

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.services.trainer.export import export_command, merge, send_share
from miles.services.trainer.ranks.collective_calls import Ranks
from miles.weights import manifest as manifests
from miles.weights.base import Endpoint
from miles.weights.dtypes import wire_dtype
from miles.weights.publisher import PendingVersion, WeightSender

BUCKET_BYTES = 16384
WAIT_S = 800.0
GRACE_S = 5.0


class CountingBackend(FsdpBackend):
    """Counts the bytes of buckets that are alive, each time one is made."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._made: list[tuple[int, Any]] = []
        self.peak = self.count = self.largest = 0

    def new_bucket(self, nbytes: int) -> torch.Tensor:
        end = time.monotonic() + GRACE_S
        while len(self._alive()) > 1 and time.monotonic() < end:
            time.sleep(0.001)  # gloo's thread lets go of a bucket a moment after it has said that it is done
        bucket = super().new_bucket(nbytes)
        self._made.append((nbytes, StorageWeakRef(bucket.untyped_storage())))
        self.peak = max(self.peak, sum(self._alive()))
        self.count, self.largest = self.count + 1, max(self.largest, nbytes)
        return bucket

    def _alive(self) -> list[int]:
        return [size for size, storage in self._made if not storage.expired()]


def offer(backend: FsdpBackend, sender: WeightSender, ranks: Ranks, publication_id: int, folder: pathlib.Path) -> None:
    """Send a version from all ranks and describe it."""
    layout = backend.export_layout()
    descriptors, total = manifests.plan((name, wire_dtype(dtype), shape) for name, dtype, shape in layout)
    handle = weightsync_pb2.TransportHandle(
        kind=weightsync_pb2.TRANSPORT_KIND_COLLECTIVE, publication_id=publication_id
    )
    version = policy_pb2.WeightVersion(job_id="job", stream=policy_pb2.WEIGHT_STREAM_POLICY, version=publication_id)
    live = list(range(publication_id + 1))
    pending = PendingVersion(version, 0, descriptors, total, [handle], live, 0.0, 0.0)
    command = export_command(pending, "", BUCKET_BYTES)
    reports = ranks.agree(None, send_share(backend, sender, command, ranks.rank, ranks.count))
    if ranks.rank == 0:
        merge(pending, reports)
        manifest = manifests.build(version, pending.descriptors, total, 0)
        sender.transport(handle.kind).seal(pending.handles[0], manifest)
        write(folder, (pending.handles[0], manifest))


def main(root: pathlib.Path, cases: list[list[str]]) -> None:
    dist.init_process_group("gloo")
    ranks = Ranks()
    sender = WeightSender(Endpoint(rank=ranks.rank, world_size=ranks.count))
    for number, (case, model, dtype) in enumerate(cases, start=1):
        changes = {"rollout_dtype": dtype, "update_weight_buffer_size": BUCKET_BYTES}
        config = job_config(pathlib.Path(model), **changes)
        backend = CountingBackend(config, root / "checkpoints", torch.device("cpu"))
        backend.load()
        offer(backend, sender, ranks, number, root / case)
        said = {"peak": backend.peak, "count": backend.count, "largest": backend.largest}
        (root / case / f"rank{ranks.rank}.json").write_text(json.dumps(said))
        backend.close()
    dist.barrier()
    if ranks.rank == 0:
        print("offering", flush=True)
    end = time.monotonic() + WAIT_S
    while not (root / "stop").exists() and time.monotonic() < end:
        time.sleep(0.1)
    sender.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))
