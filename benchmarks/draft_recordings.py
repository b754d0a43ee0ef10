"""What recording for a draft model adds to training steps of fsdp: steps with and without it in turn, on one device.

    python -m benchmarks.draft_recordings
    python -m benchmarks.draft_recordings --device cuda --dtype bfloat16 --groups 32 --samples 8 --response 640

The model has SmolLM2-135M's shape and random weights (`--hidden` and the like make another). Every round trains on the
same rollout without and with a recording, so that other work on the machine slows both alike. The table has median
seconds of a step, the median of each round's ratio, also of the process's CPU time, what the trainer itself counts
(`draft/record_s`), tokens recorded of those of the rollout, and megabytes written.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu import training_step
from miles.config import JobConfig
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.types import SampleGroup

SKIPPED = 2
"""Rounds that are not counted."""


@dataclasses.dataclass
class Trainer:
    """One of the two."""

    backend: FsdpBackend
    step_s: list[float] = dataclasses.field(default_factory=list)
    cpu_s: list[float] = dataclasses.field(default_factory=list)
    """Of all threads of this process."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    def step(self, number: int, groups: list[SampleGroup]) -> None:
        """Take and time a step."""
        began, cpu_began = time.perf_counter(), time.process_time()
        self.metrics = dict(self.backend.train(number, groups, lambda progress: None))  # they wait for the device
        self.step_s.append(time.perf_counter() - began)
        self.cpu_s.append(time.process_time() - cpu_began)


def load(model: pathlib.Path, args: argparse.Namespace, recordings: pathlib.Path | None) -> Trainer:
    """A backend that records into a folder, or does not."""
    flags: dict[str, Any] = {}
    if recordings is not None:
        flags = {"enable_draft_training": True, "sglang_speculative_algorithm": "EAGLE3", "rollout_backend": "torch"}
        flags |= {"draft_tokens_per_step": args.recorded, "draft_batch_tokens": min(8192, args.recorded)}
    config = JobConfig.from_flat(
        {
            "hf_checkpoint": str(model), "prompt_data": "none.jsonl", "label_key": "label", "rm_type": "exact_match",
            "rollout_batch_size": args.groups, "n_samples_per_prompt": args.samples, "num_rollout": 1000, "lr": 1e-6,
            "rollout_max_response_len": args.response, "use_dynamic_batch_size": True,
            "max_tokens_per_gpu": args.micro_batch, "train_dtype": args.dtype, "rollout_dtype": args.dtype,
            "device": args.device, "log_samples_per_step": 0, "run_dir": str(model.parent / "run"),
            "actor_num_gpus_per_node": 1, **flags,
        }
    )  # fmt: skip
    backend = FsdpBackend(config, model.parent / "checkpoints", torch.device(args.device))
    backend.load()
    return Trainer(backend)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=34)
    parser.add_argument("--response", type=int, default=64, help="longest response; the shortest has half of it")
    parser.add_argument("--micro-batch", type=int, default=16384, help="tokens per micro-batch")
    parser.add_argument("--recorded", type=int, default=32768, help="draft_tokens_per_step")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.flat, training_step.GROUPS, training_step.SAMPLES = 0, args.groups, args.samples
    backend = "gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        model, recordings = pathlib.Path(folder) / "model", pathlib.Path(folder) / "run" / "drafts" / "recordings"
        parameters = training_step.write_model(args, model)
        plain, recorded = load(model, args, None), load(model, args, recordings)
        rollouts = [training_step.rollout(args, seed) for seed in range(training_step.ROLLOUTS)]
        for number in range(args.rounds + SKIPPED):
            for each in (plain, recorded) if number % 2 else (recorded, plain):
                each.step(number, rollouts[number % len(rollouts)])
        newest = max(recordings.glob("step-*"))
        written = sum(path.stat().st_size for path in newest.iterdir())
        print(row(parameters, plain, recorded, sum(len(s.tokens) for g in rollouts[0] for s in g.samples), written))
    dist.destroy_process_group()


def row(parameters: int, plain: Trainer, recorded: Trainer, tokens: int, written: int) -> str:
    """The table."""
    without, with_it = (each.step_s[SKIPPED:] for each in (plain, recorded))
    ratio = statistics.median(b / a for a, b in zip(without, with_it, strict=True))
    cpu = statistics.median(b / a for a, b in zip(plain.cpu_s[SKIPPED:], recorded.cpu_s[SKIPPED:], strict=True))
    return (
        "| parameters | step s without | with | ratio | of CPU time | draft/record_s | recorded tokens | of | MB |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
        f"| {parameters / 1e6:.0f} M | {statistics.median(without):.4f} | {statistics.median(with_it):.4f} | "
        f"{ratio:.3f} | {cpu:.3f} | {recorded.metrics['draft/record_s']:.4f} | "
        f"{recorded.metrics['draft/recorded_tokens']:,.0f} | {tokens:,} | {written / 1e6:.1f} |"
    )


if __name__ == "__main__":
    main()
