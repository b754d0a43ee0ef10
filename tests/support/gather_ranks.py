"""Ranks of a trainer, one per GPU, that export a model and compare every byte with its files: started by torchrun."""

from __future__ import annotations

import os
import pathlib
import sys

import torch
import torch.distributed as dist
from trainer_cases import job_config

from miles.services.trainer.backends.fsdp.backend import FsdpBackend


def main(model: pathlib.Path, dtype: str, device_type: str) -> None:
    from transformers import AutoModelForCausalLM

    rank = int(os.environ["RANK"])
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    changes = {"rollout_dtype": dtype, "update_weight_buffer_size": 16384, "device": device_type}
    backend = FsdpBackend(job_config(model, **changes), model / "checkpoints", device)
    backend.load()
    stored = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = dict(stored.named_parameters(remove_duplicate=True))
    seen = []
    for name, tensor in backend.export():
        assert tensor.device.type == device.type
        assert torch.equal(tensor.cpu(), expected[name].detach().to(getattr(torch, dtype))), name
        seen.append(name)
    assert seen == [name for name, _, _ in backend.export_layout()]
    assert set(seen) == set(expected)
    print(f"rank {rank} has every byte", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3])
