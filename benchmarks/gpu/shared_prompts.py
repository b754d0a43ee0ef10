"""Prompts held once a group against prompts held once a sample, in the fsdp trainer.

    python -m benchmarks.gpu.shared_prompts --model DIR
    python -m benchmarks.gpu.shared_prompts --model DIR --device cpu --groups 2 --lengths 8

For each way to attend and each response length: seconds of forward and backward passes over all groups (median of
rounds that alternate, in micro-batches of at most `--rows` rows; on a CPU, CPU time), rows and memory; and the
differences of log-probabilities and gradients. "repeat" is what the same computation gives when it is run again: 0
means repeatable. "unlike" is how far the two ways to attend are from one another without sharing, which tells rounding
from error.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from miles.services.trainer.batch.packing import MicroBatch
    from miles.types import Sample

PROMPT = 40
PROFILED_ROWS = 14


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One way over all groups."""

    seconds: float
    rows: int
    log_probs: dict[int, torch.Tensor]
    """By sample."""
    gradient: torch.Tensor
    """Of all weights, one after the other; float32 on the CPU."""
    memory_gb: float


def random_samples(groups: int, size: int, response: int, vocabulary: int) -> list[Sample]:
    """Groups of `size` samples with equal prompts of `PROMPT` tokens, and responses of `response` tokens."""
    from miles.types import Sample

    rng = np.random.default_rng(0)
    samples = []
    for group in range(groups):
        prompt = rng.integers(3, vocabulary, PROMPT).astype(np.int32)
        for index in range(size):
            tokens = np.concatenate([prompt, rng.integers(3, vocabulary, response).astype(np.int32)])
            samples.append(Sample(group_id=group, index=index, prompt="p", tokens=tokens, response_length=response))
    return samples


def micro_batches(samples: list[Sample], rows: int, *, share: bool) -> list[MicroBatch]:
    """All samples in micro-batches of at most so many rows."""
    from miles.services.trainer.batch.balance import MicroBatchLimits, schedule
    from miles.services.trainer.batch.packing import pack

    cut = schedule(samples, range(len(samples)), 1, MicroBatchLimits(1, rows), share_prompts=share)[0]
    return [pack(samples, indices, share_prompts=share) for indices in cut]


def run(model: torch.nn.Module, batches: list[MicroBatch], args: argparse.Namespace, *, varlen: bool) -> Outcome:
    """Forward and backward once over the micro-batches."""
    import torch

    from miles.services.trainer.backends.fsdp.model.forward import ForwardOptions, forward
    from miles.services.trainer.backends.fsdp.model.sharded_model import full_tensor

    device = torch.device(args.device)
    options = ForwardOptions(device, getattr(torch, args.dtype), temperature=1.0, varlen=varlen)
    log_probs: dict[int, torch.Tensor] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model.zero_grad(set_to_none=True)
    began = _now(device)
    for batch in batches:
        log_probs_R = forward(model, batch, options).log_probs_T
        torch.autograd.backward(_loss(log_probs_R, batch))
        for sample, first, end in zip(batch.samples, batch.cu_responses, batch.cu_responses[1:], strict=False):
            log_probs[sample] = log_probs_R.detach()[first:end]
    seconds = _now(device) - began
    gradients = [full_tensor(p.grad).flatten().float().cpu() for p in model.parameters() if p.grad is not None]
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return Outcome(seconds, sum(batch.num_rows for batch in batches), log_probs, torch.cat(gradients), memory)


def _loss(log_probs_R: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Each sample's log-probability with a weight of its own; the same however samples are cut."""
    import torch

    lengths = np.diff(batch.cu_responses)
    weights = np.repeat(np.cos(np.array(batch.samples, np.float64)), lengths) / lengths.mean()
    return (log_probs_R * torch.from_numpy(weights.astype(np.float32)).to(log_probs_R.device)).sum()


def _now(device: torch.device) -> float:
    """Seconds; on a CPU those of this process's threads, which other work on the machine changes little."""
    import torch

    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def difference(left: Outcome, right: Outcome) -> str:
    """Largest and mean difference of log-probabilities; 1 - cosine, and largest difference of the gradients."""
    import torch

    gaps = torch.cat([(left.log_probs[i] - right.log_probs[i]).abs() for i in sorted(left.log_probs)])
    cosine = torch.nn.functional.cosine_similarity(left.gradient.double(), right.gradient.double(), dim=0)
    far = (left.gradient - right.gradient).abs().max()
    return f"log-probs max {gaps.max():.2e} mean {gaps.mean():.2e}, gradient 1 - cosine {1 - cosine:.2e} max {far:.2e}"


def profile(model: torch.nn.Module, batches: list[MicroBatch], args: argparse.Namespace, *, varlen: bool) -> str:
    """Which operations take the time of one round."""
    import torch
    from torch.profiler import ProfilerActivity

    on_gpu = args.device == "cuda"
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as recorded:
        run(model, batches, args, varlen=varlen)
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return str(recorded.key_averages().table(sort_by=order, row_limit=PROFILED_ROWS, max_name_column_width=60))


def measure(model: torch.nn.Module, vocabulary: int, args: argparse.Namespace) -> None:
    """Print the rows of every way to attend and every response length."""
    plain: dict[tuple[bool, int], Outcome] = {}
    for varlen in (True, False) if args.device == "cuda" else (False,):
        for response in args.lengths:
            samples = random_samples(args.groups, args.samples, response, vocabulary)
            name = f"{response} tokens, {'varlen' if varlen else 'sdpa'}"
            shared, separate = (micro_batches(samples, args.rows, share=share) for share in (True, False))
            rounds = [[run(model, cut, args, varlen=varlen) for cut in (shared, separate)] for _ in range(args.rounds)]
            (together, apart), (again, _) = rounds[-2:]
            plain[varlen, response] = apart
            medians = [statistics.median(pair[way].seconds for pair in rounds[1:]) for way in (0, 1)]
            for way, seconds, outcome in zip(("shared", "separate"), medians, rounds[-1], strict=True):
                print(f"{name}, {way}: {seconds:.3f} s, {outcome.rows} rows, {outcome.memory_gb:.1f} GB")
            print(f"{name}: {medians[1] / medians[0]:.2f}x; {difference(together, apart)}")
            print(f"{name}, repeat: {difference(together, again)}", flush=True)
            for way, cut in (("shared", shared), ("separate", separate)) if args.profile else ():
                print(f"{name}, {way}:\n{profile(model, cut, args, varlen=varlen)}", flush=True)
            if not varlen and (True, response) in plain:
                print(f"{response} tokens, unlike: {difference(plain[True, response], apart)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="HF checkpoint folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8, help="samples in a group")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 512], help="response tokens")
    parser.add_argument("--rows", type=int, default=16384, help="rows of a micro-batch")
    parser.add_argument("--rounds", type=int, default=4, help="at least 3; the first warms up")
    parser.add_argument("--profile", action="store_true", help="say which operations take the time")
    args = parser.parse_args()
    args.dtype = "bfloat16" if args.device == "cuda" else "float32"

    import torch
    import torch.distributed as dist

    from miles.services.trainer.backends.fsdp.model.sharded_model import Precision, load_hf_model, place

    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    model = load_hf_model(args.model, torch.float32, gradient_checkpointing=False)
    weights = place(model, Precision(torch.float32, getattr(torch, args.dtype)), device, cpu_offload=False)
    with weights.in_use():
        measure(model, model.config.vocab_size, args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
