"""Ranks of a trainer that publish versions of a model as changes: started by torchrun.

They take the steps of a plan, a JSON list. A step changes a `share` of every parameter's values, publishes them as
`version` to the service and activates it there. `fails`: the place of a file is taken, so the publication fails.
`base_vanishes`: folders of earlier versions are removed before engines read this one. Rank 0 writes what each step took
to OUT/<number>.json, and the weights as all ranks gather them in full to OUT/<number>.safetensors.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import sys
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from trainer_cases import job_config

from miles.rpc import connect_blocking
from miles.rpc.gen import policy_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.services.trainer.export import export_command, merge, send_share
from miles.services.trainer.ranks.collective_calls import Command, RankFailedError, Ranks
from miles.weights import WeightPublisher
from miles.weights.base import Endpoint
from miles.weights.bucketing import buckets
from miles.weights.publisher import DeltaSettings, PendingVersion, PublishResult, WeightSender

JOB = "job"
DEADLINE_S = 200.0
BUCKET_BYTES = 16384
FULL_EVERY = 4


class Trainer:
    """One rank's part of what the trainer service does to publish."""

    def __init__(self, model: pathlib.Path, address: str, transport: str, flags: dict[str, Any]) -> None:
        self.ranks = Ranks()
        config = job_config(model, **{"update_weight_buffer_size": BUCKET_BYTES, **flags})
        self.backend = FsdpBackend(config, model / "checkpoints", torch.device("cpu"))
        self.backend.load()
        self.address = address
        self.stub: Any = weightsync_pb2_grpc.WeightSyncServiceStub(connect_blocking(address))
        endpoint = Endpoint(address, rank=self.ranks.rank, world_size=self.ranks.count)
        self.publisher = WeightPublisher(
            *(self.stub, JOB, policy_pb2.WEIGHT_STREAM_POLICY),
            *(weightsync_pb2.TransportKind.Value(f"TRANSPORT_KIND_{transport}"), DEADLINE_S),
            endpoint=endpoint,
            delta=DeltaSettings(full_every=FULL_EVERY),
        )
        self.sender = self.publisher.sender if self.ranks.rank == 0 else WeightSender(endpoint)

    def publish(self, version: int, fails: bool) -> PublishResult | None:
        """As `Job.publish`; None on ranks other than 0, and for a version that fails."""
        if self.ranks.rank:
            with contextlib.suppress(*([RankFailedError] if fails else [])):
                self._share(self.ranks.receive())
            return None
        layout = self.backend.export_layout()
        pending = self.publisher.begin(version, version, layout)
        if fails:
            _take_place(pending)
        command = export_command(pending, self.address, BUCKET_BYTES)
        self.ranks.send(command)
        try:
            with self.publisher.discarding_on_failure(pending):
                return self.publisher.finish(pending, merge(pending, self._share(command)))
        except OSError:
            assert fails
            return None

    def _share(self, command: Command) -> list[bytes]:
        try:
            report = send_share(self.backend, self.sender, command, self.ranks.rank, self.ranks.count)
        except OSError as error:
            return self.ranks.agree(error)
        return self.ranks.agree(None, report)

    @torch.no_grad()
    def change(self, share: float, seed: int) -> None:
        """Move this share of the values of this rank's part of every parameter."""
        generator = torch.Generator().manual_seed(seed * self.ranks.count + self.ranks.rank)
        for parameter in self.backend._loaded.policy.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            chosen = torch.rand(local.shape, generator=generator) < share
            local[chosen] = local[chosen] * 1.5 + 1e-3

    def activate(self, version: policy_pb2.WeightVersion, operation: str) -> None:
        request = weightsync_pb2.ActivateRequest(
            version=version, operation_id=operation, deadline_ms=int(DEADLINE_S * 1000), min_engines=1
        )
        assert list(self.stub.Activate(request, timeout=DEADLINE_S + 10))[-1].HasField("done")


def _take_place(pending: PendingVersion) -> None:
    """Of the file in the middle, so that the publication fails when half of it is written."""
    parts = list(buckets(pending.descriptors, BUCKET_BYTES))
    offset = parts[len(parts) // 2][0].offset
    (pathlib.Path(pending.handles[0].disk_delta.partial_path) / f"part-{offset:012d}.safetensors").touch()


def main(
    out: pathlib.Path, model: str, address: str, transport: str, flags: dict[str, Any], steps: list[dict[str, Any]]
) -> None:
    dist.init_process_group("gloo")
    trainer = Trainer(pathlib.Path(model), address, transport, flags)
    changed = trainer.backend._loaded.changed
    for number, step in enumerate(steps):
        trainer.change(step.get("share", 0.0), number)
        full = {name: tensor.detach().clone() for name, tensor in trainer.backend.export()}
        result = trainer.publish(step["version"], step.get("fails", False))
        if trainer.ranks.rank:
            continue
        said: dict[str, Any] = {"gathered": changed.gathered_bytes, "total": sum(t.nbytes for t in full.values())}
        if result is not None:
            said |= {"written": result.written_bytes, "full": not result.handle.disk_delta.base_path}
            if step.get("base_vanishes"):
                path = pathlib.Path(result.handle.disk_delta.path)
                for other in set(path.parent.iterdir()) - {path}:
                    shutil.rmtree(other)
            trainer.activate(result.manifest.version, f"{out.name} {number}")
        save_file({name: tensor.contiguous() for name, tensor in full.items()}, out / f"{number}.safetensors")
        (out / f"{number}.json").write_text(json.dumps(said))
    trainer.publisher.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *sys.argv[2:5], *map(json.loads, sys.argv[5:7]))
