"""Training steps of the megatron backend compared with the fsdp backend, on the same model and rollout.

    python -m benchmarks.gpu.megatron_step --kind dense moe large
    python -m benchmarks.gpu.megatron_step --kind moe --backends megatron --profile profiles
    torchrun --nproc-per-node 2 -m benchmarks.gpu.megatron_step --kind moe --flags expert_model_parallel_size=2

One table: median seconds of a step (the first two left out), the share of log-probabilities before the step, trained
tokens (prompts and responses) per second, model FLOP/s as 6 × active parameters × tokens, that as a share of the peak
of an H100 or H200 in bfloat16 (989 TFLOP/s each, dense), and the largest memory held. A row is printed once it is
measured. `--profile DIR` records one more step with torch.profiler and writes which operations took its time.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.gpu.models import config_of, write_checkpoint

PEAK_FLOPS = 989e12
"""Of an H100 SXM or an H200, bfloat16, without sparsity."""
SKIPPED = 2
PROFILED_ROWS = 40


def active_parameters(kind: str) -> int:
    """Parameters that a token meets: of a layer's experts those it is sent to."""
    config = config_of(kind)
    hidden, heads, dim = config.hidden_size, config.num_attention_heads, config.head_dim
    attention = hidden * dim * (2 * heads + 2 * config.num_key_value_heads)
    if kind.endswith("moe"):
        feed_forward = (
            3 * hidden * config.moe_intermediate_size * config.num_experts_per_tok + hidden * config.num_experts
        )
    else:
        feed_forward = 3 * hidden * config.intermediate_size
    return int(config.num_hidden_layers * (attention + feed_forward) + hidden * config.vocab_size)


def rollout(kind: str, groups: int, samples: int, prompt: int, response: int, replay: bool) -> list[Any]:
    """Random groups; responses have between half and all of `response` tokens."""
    from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan

    config, rng = config_of(kind), np.random.default_rng(0)
    made = []
    for group_id in range(groups):
        prompt_tokens = rng.integers(3, config.vocab_size - 1, prompt).astype(np.int32)
        members = []
        for index in range(samples):
            length = int(rng.integers(response // 2, response + 1))
            tokens = np.concatenate([prompt_tokens, rng.integers(3, config.vocab_size - 1, length).astype(np.int32)])
            routed = None
            if replay:
                shape = (len(tokens) - 1, config.num_hidden_layers, config.num_experts)
                routed = rng.random(shape).argsort(-1)[..., : config.num_experts_per_tok].astype(np.uint8)
            members.append(
                Sample(
                    group_id=group_id,
                    index=index,
                    prompt="p",
                    tokens=tokens,
                    response_length=length,
                    response="r",
                    reward=float(index % 2),
                    status=SampleStatus.COMPLETED,
                    rollout_log_probs=np.full(length, -10.0, np.float32),
                    rollout_routed_experts=routed,
                    weight_versions=(VersionSpan(0, 0, length),),
                )
            )
        made.append(SampleGroup("job", group_id, members))
    return made


def job_config(
    args: argparse.Namespace, backend: str, model: pathlib.Path, device: Any, settings: Mapping[str, Any] | None = None
) -> Any:
    """The job whose steps are measured; `settings` are of any backend, `args.flags` of megatron."""
    import torch.distributed as dist

    from miles.config import JobConfig

    flags = dict(flag.split("=", 1) for flag in args.flags) if backend == "megatron" else {}
    return JobConfig.from_flat(
        {
            "hf_checkpoint": str(model), "prompt_data": "prompts.jsonl", "label_key": "label",
            "rm_type": "exact_match", "num_rollout": 100,
            "rollout_batch_size": args.groups, "n_samples_per_prompt": args.samples,
            "rollout_max_response_len": args.response, "lr": 1e-6, "use_dynamic_batch_size": True,
            "max_tokens_per_gpu": args.micro_batch, "device": device.type, "train_backend": backend,
            "actor_num_gpus_per_node": dist.get_world_size(), "log_samples_per_step": 0, "use_kl_loss": args.kl,
            "share_prompts": False if backend == "fsdp" else None, "run_dir": str(model / "run"),
            "use_rollout_routing_replay": args.replay, "train_dtype": "bfloat16",
            "rollout_dtype": "bfloat16", **{k: _value(v) for k, v in flags.items()}, **(settings or {}),
        }
    ).resolve(device.type)  # fmt: skip


def measure(args: argparse.Namespace, kind: str, backend: str, model: pathlib.Path, device: Any) -> dict[str, float]:
    """Train some steps; medians of what they took."""
    import torch
    import torch.distributed as dist

    from miles.services.trainer.ranks.worker import create_backend

    groups = rollout(kind, args.groups, args.samples, args.prompt, args.response, args.replay)
    tokens = sum(len(sample.tokens) for group in groups for sample in group.samples)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = create_backend(job_config(args, backend, model, device), model / "checkpoints", device)
    times, shares = [], []
    try:
        trainer.load()
        for step in range(args.steps + SKIPPED):
            dist.barrier()
            began = time.monotonic()
            metrics = trainer.train(step, groups, lambda progress: None)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.monotonic() - began)
            shares.append(metrics["perf/log_probs_time"] / times[-1])
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        if args.profile:
            profile_step(trainer, args.steps + SKIPPED, groups, args.profile / f"{kind}-{backend}")
    finally:
        trainer.close()
    seconds = statistics.median(times[SKIPPED:])
    flops = 6 * active_parameters(kind) * tokens / seconds
    return {
        "step_s": seconds,
        "log_probs_share": statistics.median(shares[SKIPPED:]),
        "tokens_per_s": tokens / seconds,
        "tflops": flops / 1e12,
        "mfu": flops / (PEAK_FLOPS * dist.get_world_size()),
        "memory_gb": memory / 1e9,
    }


def profile_step(trainer: Any, step: int, groups: list[Any], file: pathlib.Path) -> None:
    """Train a step under torch.profiler; each rank writes which operations took its time on the GPU and on the CPU."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        began = time.monotonic()
        trainer.train(step, groups, lambda progress: None)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
    events = recorded.key_averages()
    busy = sum(event.self_device_time_total for event in events) / 1e6
    text = f"a step of {seconds:.3f} s under the profiler; operations on the GPU took {busy:.3f} s\n"
    for order in (["self_cuda_time_total"] if on_gpu else []) + ["self_cpu_time_total"]:
        text += f"\nby {order}\n"
        text += events.table(sort_by=order, row_limit=PROFILED_ROWS, max_name_column_width=100) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_name(f"{file.name}-rank{dist.get_rank()}.txt").write_text(text)


def _value(text: str) -> Any:
    return text == "true" if text in ("true", "false") else int(text) if text.isdigit() else text


def main() -> None:
    """Measure and print."""
    import torch
    import torch.distributed as dist

    from miles.services.trainer.ranks.process_group import join

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=("dense", "moe", "large", "tiny", "tiny-moe"), default=["moe"])
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--response", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=32768, help="tokens per micro-batch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--backends", nargs="+", default=["fsdp", "megatron"])
    parser.add_argument("--flags", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the megatron backend")
    parser.add_argument("--replay", action="store_true", help="replay random routing (moe)")
    parser.add_argument("--kl", action="store_true", help="with a reference model")
    parser.add_argument("--profile", type=pathlib.Path, metavar="DIR", help="write a profile of one more step there")
    args = parser.parse_args()
    device, _ = join("cuda" if torch.cuda.is_available() else "cpu", None, 10)
    rank = dist.get_rank()
    if rank == 0:
        name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        print(f"{dist.get_world_size()} × {name}, {args.groups} × {args.samples} samples")
        print("| model | backend | step s | log-probs | tokens/s | TFLOP/s | MFU | GB |\n|" + "---|" * 8, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared, src=0)
        for kind in args.kind:
            model = pathlib.Path(shared[0]) / kind
            if rank == 0:
                write_checkpoint(model, kind, weights=True)
            dist.barrier()
            for backend in args.backends:
                row = f"| {kind} | {backend} | {cells(args, kind, backend, model, device)} |"
                if rank == 0:
                    print(row, flush=True)
        dist.barrier()
    dist.destroy_process_group()


def cells(args: argparse.Namespace, kind: str, backend: str, model: pathlib.Path, device: Any) -> str:
    """What was measured, or why not: one model that does not fit takes no other row with it."""
    import torch.distributed as dist

    try:
        r = measure(args, kind, backend, model, device)
    except Exception as error:
        if dist.get_world_size() > 1:
            raise  # the other ranks wait for this one
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error).splitlines()[0]} | | | | |"
    return (
        f"{r['step_s']:.3f} | {r['log_probs_share']:.0%} | {r['tokens_per_s']:,.0f} | "
        f"{r['tflops']:.1f} | {r['mfu']:.1%} | {r['memory_gb']:.1f}"
    )


if __name__ == "__main__":
    main()
