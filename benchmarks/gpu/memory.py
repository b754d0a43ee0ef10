"""Memory of trainers and SGLang servers on one GPU, beside what `miles plan memory` estimates of it.

    python -m benchmarks.gpu.memory
    python -m benchmarks.gpu.memory --only "megatron fp8" "fsdp int4" --deadline 100
    python -m benchmarks.gpu.memory --kind tiny --device cpu --only fsdp "fsdp int4"

The model has 2 B random parameters. Trainers, two at a time, take three steps of the same rollout: `between steps` is
what torch has allocated then (the parts that are always there), `step` the most that it had allocated in one. Servers,
one after the other, say themselves what their weights and their KV cache take; their folders in FP8 and INT4 are
written here. Without CUDA nothing is measured but that the script works. A row is printed once it is measured.

It takes about two minutes, longer where SGLang's modules are read from a cold disk, which begins beside the trainers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu.megatron_step import rollout
from benchmarks.gpu.models import config_of, write_checkpoint

_GIB = 1 << 30
_STEPS = 3
_ENVIRONMENT = {**os.environ, "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"}
"""A server compiles DeepGEMM's kernels for every shape at its start otherwise."""
_GROUPS, _SAMPLES, _PROMPT, _RESPONSE = 4, 4, 64, 448
_FSDP = {"train_backend": "fsdp", "share_prompts": False}
_FP8 = {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}
_INT4 = {"int4_qat": True, "int4_layers": (".",), "int4_group_size": 64}
TRAINERS: Mapping[str, Mapping[str, Any]] = {
    "fsdp": _FSDP,
    "megatron": {"train_backend": "megatron"},
    "megatron fp8": {"train_backend": "megatron", **_FP8},
    "fsdp fp8": {**_FSDP, **_FP8},
    "fsdp int4": {**_FSDP, **_INT4},
    "megatron int4": {"train_backend": "megatron", **_INT4},
}
SERVERS = {"sglang bf16": None, "sglang fp8": "fp8_block", "sglang int4": "int4"}
DEFAULT = ("fsdp", "megatron", *SERVERS)


def job_config(args: argparse.Namespace, model: pathlib.Path, **flags: Any) -> Any:
    """The job of a trainer or of a server."""
    from miles.config import JobConfig

    return JobConfig.from_flat(
        {
            "hf_checkpoint": str(model), "prompt_data": "prompts.jsonl", "label_key": "label", "rm_type": "exact_match",
            "num_rollout": 100, "rollout_batch_size": _GROUPS, "n_samples_per_prompt": _SAMPLES,
            "rollout_max_response_len": _RESPONSE, "rollout_max_prompt_len": _PROMPT, "lr": 1e-6,
            "use_dynamic_batch_size": True, "max_tokens_per_gpu": args.micro_batch, "device": args.device,
            "actor_num_gpus_per_node": 1, "log_samples_per_step": 0,
            "run_dir": str(model / "run"), "train_dtype": "bfloat16", "rollout_dtype": "bfloat16", **flags,
        }
    ).resolve(args.device)  # fmt: skip


def train(args: argparse.Namespace, name: str, model: pathlib.Path) -> Iterator[tuple[str, float, float]]:
    """Yield what is estimated and measured of a trainer, in bytes; in a process of its own."""
    import torch

    from miles.launcher.placement import settings_of
    from miles.memory.amount import When, peak
    from miles.memory.report import trainer_parts
    from miles.memory.run import run_of
    from miles.services.trainer.ranks.process_group import join
    from miles.services.trainer.ranks.worker import create_backend

    config = job_config(args, model, **TRAINERS[name])
    device, _ = join(args.device, None, 10)
    trainer = create_backend(config, model / f"checkpoints-{name}".replace(" ", "-"), device)
    trainer.load()
    groups = rollout(args.kind, _GROUPS, _SAMPLES, _PROMPT, _RESPONSE, replay=False)
    for step in range(_STEPS):
        trainer.train(step, groups, lambda progress: None)
    on_gpu = device.type == "cuda"
    held, most = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if on_gpu else (0, 0)
    run = run_of(settings_of(config))
    assert run is not None
    parts = [part for part in trainer_parts(run)[0] if part.name != "buckets of weights"]  # nothing is published
    yield "between steps", sum(part.bytes for part in parts if part.when is When.ALWAYS), held
    yield "step", peak([part for part in parts if part.when in (When.ALWAYS, When.TRAINING)]), most
    trainer.close()


def serve(args: argparse.Namespace, name: str, model: pathlib.Path) -> Iterator[tuple[str, float, float]]:
    """Yield the same of a server."""
    import sglang
    import torch

    from miles.launcher.placement import settings_of
    from miles.memory.engines import engine_parts
    from miles.memory.run import run_of

    folder = quantised(args, model, SERVERS[name])
    memory = torch.cuda.get_device_properties(0).total_memory
    engine = sglang.Engine(model_path=str(folder), disable_cuda_graph=True, log_level="warning")
    said = engine.get_server_info()["internal_states"][0]["memory_usage"]
    run = run_of(settings_of(job_config(args, folder, rollout_backend="sglang")))
    assert run is not None
    parts = {part.name: part.bytes for part in engine_parts(run, memory)}
    yield "weights", parts["engine weights"], said["weight"] * _GIB
    yield "KV cache", parts["KV cache"], said["kvcache"] * _GIB
    engine.shutdown()


def quantised(args: argparse.Namespace, model: pathlib.Path, chosen: Any) -> pathlib.Path:
    """A folder with the model's matrices in a format; the model's own for None."""
    import torch
    from safetensors.torch import load_file, save_file

    from miles.precision.quantization_config import quantization_config
    from miles.precision.recipe import Recipe
    from miles.precision.tensors import QuantisedTensors

    if chosen is None:
        return model
    folder, export = model.with_name(f"{model.name}-{chosen}"), QuantisedTensors(Recipe(format=chosen))
    write_checkpoint(folder, args.kind, weights=False)
    tensors, kept = {}, []
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(file, device=args.device).items():
            if tensor.dim() > 1 and not export.covers(name, tensor.dtype, tensor.dim()):
                kept.append(name.removesuffix(".weight"))
            tensors |= {part: value.cpu() for part, value in export.convert(name, tensor)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = quantization_config(export.recipe, {*kept, "lm_head"})
    (folder / "config.json").write_text(json.dumps(described))
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return folder


@dataclasses.dataclass(frozen=True, slots=True)
class Child:
    """A process that measures one row or two."""

    name: str
    process: subprocess.Popen[str]
    began: float

    @classmethod
    def start(cls, args: argparse.Namespace, name: str, model: pathlib.Path) -> Child:
        """Start it."""
        words = ["--kind", args.kind, "--device", args.device, "--micro-batch", str(args.micro_batch)]
        command = [sys.executable, "-m", "benchmarks.gpu.memory", *words, "--child", name, "--model", str(model)]
        log = (model / f"{name}.log".replace(" ", "-")).open("w")
        return cls(
            name,
            subprocess.Popen(command, env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, text=True),
            time.monotonic(),
        )

    def report(self, model: pathlib.Path, seconds: float) -> None:
        """Print its rows, or why there are none."""
        try:
            said, _ = self.process.communicate(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            said, _ = self.process.communicate()
        rows = [json.loads(line[1:]) for line in said.splitlines() if line.startswith("@")]
        for what, estimated, measured in rows:
            share = f"{estimated / measured - 1:+.1%}" if measured else "-"
            print(f"| {self.name} | {what} | {estimated / _GIB:.2f} | {measured / _GIB:.2f} | {share} |", flush=True)
        if not rows:
            log = (model / f"{self.name}.log".replace(" ", "-")).read_text().strip().splitlines()
            print(f"| {self.name} | failed: {log[-1] if log else 'nothing was said'} | | | |", flush=True)
        print(f"<!-- {self.name}: {time.monotonic() - self.began:.0f} s -->", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="large", choices=("dense", "moe", "large", "tiny", "tiny-moe"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", default=list(DEFAULT), choices=[*TRAINERS, *SERVERS])
    parser.add_argument("--micro-batch", type=int, default=4096, help="tokens")
    parser.add_argument("--deadline", type=float, default=240.0, help="seconds after which nothing is waited for")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        work = train if args.child in TRAINERS else serve
        for row in work(args, args.child, args.model):
            print("@" + json.dumps(row), flush=True)
        return
    until = time.monotonic() + args.deadline
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        model = write_checkpoint(pathlib.Path(folder) / args.kind, args.kind, weights=True)
        print(f"{args.kind}, {config_of(args.kind).num_hidden_layers} layers; micro-batches of {args.micro_batch}")
        print("| process | what | estimated GiB | measured GiB | difference |\n|" + "---|" * 5, flush=True)
        trainers = [name for name in args.only if name in TRAINERS]
        waves = [trainers[at : at + 2] for at in range(0, len(trainers), 2)]
        servers = [name for name in args.only if name in SERVERS]
        waves += [[name] for name in servers]
        if servers:
            subprocess.Popen([sys.executable, "-c", "import sglang.srt.managers.scheduler"], stderr=subprocess.DEVNULL)
        for wave in waves:
            for child in [Child.start(args, name, model) for name in wave]:
                child.report(model, until - time.monotonic())


if __name__ == "__main__":
    main()
