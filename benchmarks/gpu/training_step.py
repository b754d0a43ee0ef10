"""Training steps of the fsdp backend on one GPU, beside a bare loop of transformers and torch on the same rows.

    python -m benchmarks.gpu.training_step
    python -m benchmarks.gpu.training_step --response 480 --micro-batch 16384 --profile profiles
    python -m benchmarks.gpu.training_step --response 22 --flat 12 --steps 12 --only apart ours compiled
    python -m benchmarks.gpu.training_step --device cpu --layers 2 --hidden 64 --vocabulary 1024 --steps 2

The model has SmolLM2-135M's shape and random weights (`--hidden` and the like make another). A step trains on 256
samples, 32 prompts × 8 responses, each time on the next of four rollouts. `ours` is what `TrainerBackend.train` takes,
`compiled` that with `torch_compile`. With `--flat` all rewards of so many groups are equal, as in most runs some are:
their samples are computed with the others, or in `apart` in micro-batches of their own. The slowest step tells whether
something was compiled again. Two experiments have all layers in one graph, whose first step takes longer: `whole`, and
`replayed`, which records a CUDA graph for each of the four sizes (`--steps 24`, so that most steps replay one).
`bare` pads the same samples, sorted by length, to micro-batches of as many tokens, runs the stock model under bfloat16
autocast with scaled_dot_product_attention, takes the log-probabilities of the responses, and steps torch's fused AdamW.
The table has, per variant, the median seconds of a step and those of the slowest (the first two left out), the seconds
of the first one, model FLOP/s as 6 × parameters × tokens of the samples over the peak of an H100 or H200, operations
started on the GPU, and for how long it was busy with them, the last two from torch.profiler. `--profile DIR` also
writes which operations and which Python functions took the time.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import io
import pathlib
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu.models import write_tokenizer

PEAK_FLOPS = 989e12
"""Of an H100 SXM or an H200, bfloat16, without sparsity."""
SKIPPED = 2
GROUPS, SAMPLES = 32, 8
ROLLOUTS = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "apart": {},
    "compiled": {"torch_compile": True},
    "compiled apart": {"torch_compile": True},
    "whole": {},
    "replayed": {},
}
"""Flags of each variant of ours."""
PROFILED_ROWS = 45


@dataclasses.dataclass(frozen=True)
class Measured:
    """One variant."""

    name: str
    step_s: float
    slowest_s: float
    first_s: float
    tokens: int
    launches: int
    busy_s: float
    memory_gb: float
    grad_norm: float | None
    """Of the first step, before clipping; variants of ours must agree within the type's precision."""

    def row(self, parameters: int) -> str:
        """Its row of the table."""
        mfu = 6 * parameters * self.tokens / self.step_s / PEAK_FLOPS
        return (
            f"| {self.name} | {self.tokens:,} | {self.step_s:.4f} | {self.slowest_s:.3f} | {self.first_s:.2f} | "
            f"{mfu:.1%} | {self.launches} | "
            f"{self.busy_s:.4f} | {self.memory_gb:.1f} | {'-' if self.grad_norm is None else f'{self.grad_norm:.5f}'} |"
        )


COLUMNS = (
    "variant",
    "tokens",
    "step s",
    "slowest s",
    "first step s",
    "MFU",
    "launches",
    "GPU busy s",
    "GB",
    "gradient norm",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def write_model(args: argparse.Namespace, folder: pathlib.Path) -> int:
    """A Hugging Face folder of random weights; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = max(1, args.hidden // 64)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=1e5,
        tie_word_embeddings=True,
        eos_token_id=args.vocabulary - 1,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(folder, args.vocabulary)
    return sum(parameter.numel() for parameter in model.parameters())


def rollout(args: argparse.Namespace, seed: int = 0) -> list[Any]:
    """Random groups; responses have between half and all of `--response` tokens."""
    from miles.types import Sample, SampleGroup, SampleStatus, VersionSpan

    rng = np.random.default_rng(seed)
    made = []
    for group_id in range(GROUPS):
        prompt = rng.integers(3, args.vocabulary - 1, args.prompt).astype(np.int32)
        members = []
        for index in range(SAMPLES):
            length = int(rng.integers(args.response // 2, args.response + 1))
            response = rng.integers(3, args.vocabulary - 1, length).astype(np.int32)
            members.append(
                Sample(
                    group_id=group_id,
                    index=index,
                    prompt="p",
                    tokens=np.concatenate([prompt, response]),
                    response_length=length,
                    response="r",
                    reward=float(group_id >= args.flat and index % 2),
                    status=SampleStatus.COMPLETED,
                    rollout_log_probs=np.full(length, -10.0, np.float32),
                    weight_versions=(VersionSpan(0, 0, length),),
                )
            )
        made.append(SampleGroup("job", group_id, members))
    return made


def ours(args: argparse.Namespace, name: str, flags: dict[str, Any], model: pathlib.Path, device: Any) -> Measured:
    """Steps of the backend."""
    from miles.config import JobConfig
    from miles.services.trainer.ranks.worker import create_backend

    config = JobConfig.from_flat(
        {
            "hf_checkpoint": str(model), "prompt_data": "prompts.jsonl", "label_key": "label",
            "rm_type": "exact_match", "num_rollout": 100, "rollout_batch_size": GROUPS, "n_samples_per_prompt": SAMPLES,
            "rollout_max_response_len": args.response, "lr": 1e-6, "use_dynamic_batch_size": True,
            "max_tokens_per_gpu": args.micro_batch, "device": device.type, "train_backend": "fsdp",
            "actor_num_gpus_per_node": 1, "run_dir": str(model / "run"),
            "train_dtype": args.dtype, "rollout_dtype": args.dtype, **flags,
        }
    ).resolve(device.type)  # fmt: skip
    rollouts = [rollout(args, seed) for seed in range(ROLLOUTS)]
    trainer: Any = create_backend(config, model / "checkpoints", device)
    trainer.load()
    if "apart" in name:
        trainer._loaded.trainer.joined_tokens = 0
    if name in ("whole", "replayed"):
        compile_whole(trainer, cuda_graphs=name == "replayed")
    steps = iter(range(1000))

    def step() -> Any:
        number = next(steps)
        return trainer.train(number, rollouts[number % ROLLOUTS], lambda progress: None)

    try:
        tokens = sum(len(sample.tokens) for group in rollouts[0] for sample in group.samples)
        return measure(args, name, tokens, step)
    finally:
        trainer.close()


def compile_whole(trainer: Any, *, cuda_graphs: bool) -> None:
    """Compile everything between token ids and the head as one graph: an experiment, not what the product does."""
    from miles.services.trainer.backends.fsdp.model.compiled_layers import OPTIONS, prepare

    policy = trainer._loaded.roles.policy
    policy._one_graph = True
    prepare(policy.model)
    policy.model.model.compile(dynamic=True, options={**OPTIONS, "triton.cudagraphs": cuda_graphs})


def bare(args: argparse.Namespace, model_dir: pathlib.Path, device: Any) -> Measured:
    """Steps of a loop that knows nothing but padded rows; causal attention needs no mask where padding is last."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    samples = sorted((s for group in rollout(args) for s in group.samples), key=lambda s: len(s.tokens))
    micro_batches: list[list[Any]] = [[]]
    for sample in samples:
        if len(sample.tokens) * (len(micro_batches[-1]) + 1) > args.micro_batch:
            micro_batches.append([])
        micro_batches[-1].append(sample)

    def loss_of(members: list[Any]) -> Any:
        longest = len(members[-1].tokens)
        ids_BT = torch.from_numpy(np.stack([np.pad(s.tokens, (0, longest - len(s.tokens))) for s in members])).long()
        trained_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for row, sample in enumerate(members):
            trained_BT[row, len(sample.tokens) - sample.response_length : len(sample.tokens)] = True
        ids_BT, trained_BT = ids_BT.to(device), trained_BT.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
            logits_RV = model.lm_head(hidden_BTD[:, :-1][trained_BT[:, 1:]])
        targets_R = ids_BT[:, 1:][trained_BT[:, 1:]]
        return torch.nn.functional.cross_entropy(logits_RV.float(), targets_R, reduction="sum") / len(samples)

    def step() -> None:
        for members in micro_batches:
            loss_of(members).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return measure(args, "bare", sum(len(sample.tokens) for sample in samples), step)


def measure(args: argparse.Namespace, name: str, tokens: int, step: Callable[[], Any]) -> Measured:
    """Time steps, then record one with torch.profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()

    norms: list[float] = []

    def timed() -> float:
        began = time.monotonic()
        metrics = step()
        if on_gpu:
            torch.cuda.synchronize()
        if metrics is not None:
            norms.append(metrics["train/grad_norm"])
        return time.monotonic() - began

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = [timed() for _ in range(args.steps + SKIPPED)]
    memory = torch.cuda.max_memory_allocated() if on_gpu else 0
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        profiled_s = timed()
    events = recorded.key_averages()
    on_gpu_itself = (e for e in events if e.device_type != torch.autograd.DeviceType.CPU)
    kernels = [event for event in on_gpu_itself if event.self_device_time_total > 0]
    busy_s = sum(event.self_device_time_total for event in kernels) / 1e6
    launches = sum(event.count for event in kernels)
    if args.profile:
        text = f"{name}: a step of {profiled_s:.4f} s under the profiler; GPU busy for {busy_s:.4f} s\n"
        for order in (["self_cuda_time_total"] if on_gpu else []) + ["self_cpu_time_total"]:
            text += f"\nby {order}\n" + events.table(
                sort_by=order, row_limit=PROFILED_ROWS, max_name_column_width=90, max_src_column_width=10
            )
        args.profile.mkdir(parents=True, exist_ok=True)
        file = args.profile / f"{tokens}-{name.replace(' ', '_').replace(',', '')}"
        file.with_suffix(".txt").write_text(text)
        file.with_suffix(".python.txt").write_text(python_profile(timed))
    median_s, norm = statistics.median(times[SKIPPED:]), norms[0] if norms else None
    return Measured(name, median_s, max(times[SKIPPED:]), times[0], tokens, launches, busy_s, memory / 1e9, norm)


def python_profile(step: Callable[[], Any]) -> str:
    """Which Python functions one more step spends its time in."""
    recorder = cProfile.Profile()
    recorder.runcall(step)
    text = io.StringIO()
    pstats.Stats(recorder, stream=text).sort_stats("cumulative").print_stats(90)
    return text.getvalue()


def main() -> None:
    """Measure and print."""
    import torch
    import torch.distributed as dist

    from miles.services.trainer.ranks.process_group import join

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--prompt", type=int, default=34)
    parser.add_argument("--response", type=int, nargs="+", default=[22, 640], help="longest response")
    parser.add_argument("--micro-batch", type=int, default=16384, help="tokens per micro-batch")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--flat", type=int, default=0, help="groups without advantage")
    parser.add_argument("--only", nargs="+", default=["ours", "compiled", "bare"], choices=[*VARIANTS, "bare"])
    parser.add_argument(
        "--profile", type=pathlib.Path, metavar="DIR", help="write which operations took the time there"
    )
    args = parser.parse_args()
    device, _ = join(args.device, None, 10)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / "model"
        parameters = write_model(args, model)
        print(f"{name}, {parameters / 1e6:.0f} M parameters, {GROUPS} × {SAMPLES} samples\n{HEADER}", flush=True)
        for response in args.response:
            args.response = response
            for variant, flags in VARIANTS.items():
                if variant in args.only:
                    print(ours(args, variant, flags, model, device).row(parameters), flush=True)
            if "bare" in args.only:
                print(bare(args, model, device).row(parameters), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
