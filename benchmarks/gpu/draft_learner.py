"""How fast the draft trainer learns from a recording, and where the time goes; 20 to 40 s on a GPU, without a model.

    python -m benchmarks.gpu.draft_learner
    python -m benchmarks.gpu.draft_learner --device cpu --tiny
    python -m benchmarks.gpu.draft_learner --only "standalone, 135 M" --profile DIR

Draft models of given shapes with random weights learn from recordings of random numbers, which are read from files as
in a run. The table has medians in milliseconds of an optimizer step, each of other samples; what it takes to pack the
samples and copy them to the device, for the pass over them (packing and head included), for the head and the loss of as
many rows by themselves, and for the rest (clipping and AdamW); tokens read per second; model FLOP/s as 6 × matrix
elements × rows that meet them (of unrolled steps too) over the peak of an H100 or H200 in bfloat16 (989 TFLOP/s,
dense); operations started on the device, and for how long it was busy with them (torch.profiler); the largest memory
held; and of a recording and a version once the time to read the files and to write the checkpoint, into `--folder`.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.draft_shapes import CHAIN, SHAPES, Shape, load_model, tiny, write_model, write_recording
from miles.algorithms.any_shape_attention import leave_out_cudnn
from miles.drafts import packed_batch, recordings
from miles.drafts.eagle3_training import computing_on
from miles.drafts.head_pass import head_pass
from miles.drafts.losses import loss_at
from miles.drafts.packed_batch import Targets
from miles.drafts.recording import RecordedSample
from miles.drafts.vocabulary import first_tokens
from miles.services.trainer.drafts import checkpoint
from miles.services.trainer.drafts.host_copy import HostCopy
from miles.services.trainer.drafts.learner import DraftLearner, LearnerOptions, batches
from miles.services.trainer.drafts.packed_tokens import pack_tokens

PEAK_FLOPS = 989e12
COLUMNS = (
    *("", "parameters", "tokens", "step ms", "tokens/s", "of the peak", "pack", "pass", "head and loss", "optimizer"),
    *("operations", "busy ms", "GB", "read ms", "save ms"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Clock:
    """Times work on a device."""

    device: torch.device
    rounds: int

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one call, until the device has done it."""
        began = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def median(self, work: Callable[[], Any]) -> float:
        """Of several calls, after one that warms up."""
        return statistics.median([self.seconds(work) for _ in range(self.rounds + 1)][1:])


def measure(name: str, shape: Shape, clock: Clock, folder: pathlib.Path, out: pathlib.Path | None) -> list[str]:
    """A row of the table."""
    device = clock.device
    write_model(shape, folder / "model")
    write_recording(shape, folder / "recordings", 0)
    model = load_model(shape, folder / "model", device)
    # Whatever samples are drawn are one step: as many as have half of these tokens on average.
    learner = DraftLearner(model, LearnerOptions(1e-4, 2 * shape.batch_tokens, 1, torch.bfloat16))
    read_s = clock.median(lambda: recordings.read(folder / "recordings", 0))
    samples = recordings.read(folder / "recordings", 0)
    batch = next(batches(samples, shape.batch_tokens))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    random_state = random.Random(0)

    def drawn() -> list[RecordedSample]:
        # Other samples each time, since kernels may be prepared for a shape at its first use.
        return random_state.sample(samples, len(batch))

    def step() -> None:
        next(iter(learner.learn(drawn())))

    step_s = clock.median(step)
    pass_s = clock.median(lambda: model.learn_from(drawn()))
    head_s, rows = head_seconds(shape, batch, clock)
    pack_s = clock.median(lambda: pack(shape, batch, device))
    operations, busy_s = profiled(step, clock, None if out is None else out / f"{name.replace(' ', '_')}.txt")
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    host_copy, record = HostCopy(device), checkpoint.DraftRecord(shape.kind, "", 1, 0, 1, 0)
    save_s = clock.median(lambda: checkpoint.save(folder / "saved", record, host_copy.of(learner.state())))
    tokens = sum(len(sample.tokens_T) for sample in batch)
    share = flops(shape, model.module, tokens, rows) / step_s / PEAK_FLOPS
    seconds = (pack_s, pass_s, head_s, max(step_s - pass_s, 0.0))
    parameters = sum(each.numel() for each in model.module.parameters())
    return [
        name, f"{parameters / 1e6:.0f} M", f"{tokens:,}", f"{step_s * 1e3:.1f}", f"{tokens / step_s:,.0f}",
        f"{share:.1%}", *(f"{each * 1e3:.1f}" for each in seconds), f"{operations:,}", f"{busy_s * 1e3:.1f}",
        f"{memory / 1e9:.1f}", f"{read_s * 1e3:.0f}", f"{save_s * 1e3:.0f}",
    ]  # fmt: skip


def pack(shape: Shape, batch: Sequence[RecordedSample], device: torch.device) -> None:
    """Bring samples to the device as a pass does."""
    if shape.kind == "standalone":
        pack_tokens(batch, CHAIN, device)
    else:
        packed_batch.pack(batch, shape.recorded_layers[1:], CHAIN, device)


def head_seconds(shape: Shape, batch: Sequence[RecordedSample], clock: Clock) -> tuple[float, int]:
    """Head and loss with their gradients over as many rows as a pass has, and how many these are."""
    device = clock.device
    targets = Targets(
        torch.cat([sample.top_tokens_RK for sample in batch]).to(device),
        torch.cat([sample.top_log_probs_RK for sample in batch]).to(device),
        torch.cat([sample.tokens_T[sample.prompt_length :] for sample in batch]).to(device),
    )
    count, times = len(targets.sampled_N), 1 if shape.kind == "standalone" else CHAIN
    hidden_ND = torch.randn(count, shape.hidden, device=device)
    head = torch.nn.Linear(shape.hidden, shape.draft_vocabulary, bias=False, device=device)
    vocabulary = first_tokens(shape.vocabulary, shape.draft_vocabulary, ()).to(device)

    def run() -> None:
        with computing_on(device):
            for _ in range(times):
                head_pass(head, hidden_ND, targets, loss_at("kl", 1.0), vocabulary, 1 / count)

    return clock.median(run), count * times


def flops(shape: Shape, module: torch.nn.Module, tokens: int, head_rows: int) -> float:
    """Of products with matrices; attention, which is little at these lengths, is left out."""
    sizes = {name: each.numel() for name, each in module.named_parameters() if each.dim() > 1}
    head = shape.hidden * shape.draft_vocabulary
    fused = sizes.get("fc.weight", 0)
    times = 1 if shape.kind == "standalone" else CHAIN
    return 6 * (tokens * (times * (sum(sizes.values()) - head - fused) + fused) + head_rows * head)


def profiled(work: Callable[[], Any], clock: Clock, file: pathlib.Path | None) -> tuple[int, float]:
    """Operations started on the device, and for how long it was busy; on a CPU all of PyTorch's."""
    on_gpu = clock.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        clock.seconds(work)
    events: Any = recorded.key_averages()
    kinds = torch.autograd.DeviceType
    own = [each for each in events if (each.device_type == kinds.CPU) != on_gpu]
    own = [each for each in own if (each.self_device_time_total if on_gpu else each.self_cpu_time_total) > 0]
    busy_us = sum(each.self_device_time_total if on_gpu else each.self_cpu_time_total for each in own)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        orders = (["self_cuda_time_total"] if on_gpu else []) + ["self_cpu_time_total"]
        tables = (events.table(sort_by=order, row_limit=40, max_name_column_width=90) for order in orders)
        file.write_text("\n".join(tables), encoding="utf-8")
    return sum(each.count for each in own), busy_us / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="shapes with next to no arithmetic")
    parser.add_argument("--only", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where models, recordings and checkpoints are written; else a temporary one")
    parser.add_argument(
        "--cudnn", action="store_true", help="let PyTorch take cuDNN's attention, as it would by itself"
    )
    parser.add_argument(
        "--profile", type=pathlib.Path, metavar="DIR", help="write which operations took the time there"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    if not args.cudnn:
        leave_out_cudnn()
    clock = Clock(torch.device(args.device), args.rounds)
    print(torch.cuda.get_device_name() if args.device == "cuda" else args.device, flush=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for name in args.only:
        shape = tiny(SHAPES[name]) if args.tiny else SHAPES[name]
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            print(f"| {' | '.join(measure(name, shape, clock, pathlib.Path(folder), args.profile))} |", flush=True)


if __name__ == "__main__":
    main()
