"""The trainer's side of a swap: what it takes to leave the GPU and to come back, and what it leaves there.

    python -m benchmarks.gpu.swap
    python -m benchmarks.gpu.swap --device cpu --kind tiny

A model of random weights (`benchmarks.gpu.models`) with AdamW trains some short steps; after each, everything goes to
host memory and back. In the first swap host memory is allocated, and pinned.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time

from benchmarks.gpu.megatron_step import job_config, rollout
from benchmarks.gpu.models import write_checkpoint


def main() -> None:
    """Train, swap, and print a line for each step."""
    import torch
    import torch.distributed as dist

    from miles.services.trainer.ranks.worker import create_backend

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="large", help="model, as benchmarks.gpu.models calls it")
    parser.add_argument("--backend", default="fsdp", choices=["fsdp", "megatron"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    workload = argparse.Namespace(groups=4, samples=4, response=16, micro_batch=1024, kl=False, replay=False, flags=[])
    on_gpu = args.device == "cuda"
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups = rollout(args.kind, workload.groups, workload.samples, 16, workload.response, workload.replay)
    with tempfile.TemporaryDirectory(prefix="swap-") as folder:
        model = write_checkpoint(pathlib.Path(folder), args.kind, weights=True)
        trainer = create_backend(job_config(workload, args.backend, model, device), model / "checkpoints", device)
        trainer.load()
        titles = ("leaves, s", "moved, GB", "freed, GB", "left, GB", "comes, s")
        print(f"{'step':>4}{'train, s':>10}" + "".join(f"{title:>11}" for title in titles))
        for step in range(args.steps):
            began = time.monotonic()
            trainer.train(step, groups, lambda progress: None)
            trained_s = time.monotonic() - began
            before = torch.cuda.mem_get_info()[0] if on_gpu else 0
            out = trainer.release_memory()
            freed = torch.cuda.mem_get_info()[0] - before if on_gpu else 0
            left = torch.cuda.memory_allocated() if on_gpu else 0
            back = trainer.restore_memory()
            sizes = "".join(f"{nbytes / 1e9:>11.2f}" for nbytes in (out.nbytes, freed))
            print(f"{step:>4}{trained_s:>10.2f}{out.seconds:>11.3f}{sizes}{left / 1e9:>11.2f}{back.seconds:>11.3f}")
        trainer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
