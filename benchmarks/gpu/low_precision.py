"""GRPO runs of an upcycled mixture of experts whose trainer and engine compute in BF16, FP8 and INT4, in one table.

    python -m examples.smollm2_chain_sum.prepare
    python -m examples.smollm2_chain_sum.upcycle --model .cache/smollm2-135m-instruct --out .cache/moe --align 128
    python -m benchmarks.gpu.low_precision --model .cache/moe
    python -m benchmarks.gpu.low_precision --model .cache/moe --gpus 0 1 --deadline 240
    python -m benchmarks.gpu.low_precision --model DIR --device cpu --engine torch --backend fsdp --steps 2 --prompts 8

The task is one-digit sums. Engine and trainer share a GPU in turns (`--colocate`), the loss is corrected by truncated
importance sampling, and routing is replayed (R3), but for the variants that end in `no-r3` it is only observed. With
several `--gpus` so many runs go on at once, each on a GPU and its share of the cores. The table is written into
the folder `--runs` after every run, whose logs stay there.

Difference and KL are between the log-probs that the engine sampled by and the trainer's of the same tokens and weights,
so of both formats and of the arithmetic of both sides. With `--engine torch`, as on a CPU, both compute in emulation.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import os
import pathlib
import queue
import re
import statistics
import sys
import threading
import time
from typing import Any

from benchmarks.gpu.gpu_busy import watching
from benchmarks.gpu.grpo_run import LAYOUTS, run, steps_of
from benchmarks.gpu.run_table import SHARED_ROWS, Rows, table

REPLAYED = ("--use-rollout-routing-replay",)
OBSERVED = ("--observe-rollout-routing",)
FP8 = ("--fp8-format", "e4m3", "--fp8-recipe", "blockwise")
FP8_ROLLOUTS = ("--rollout-weight-format", "fp8_block")
INT4 = ("--int4-qat",)
VARIANTS: dict[str, tuple[str, ...]] = {
    "bf16": REPLAYED,
    "fp8-rollouts": (*FP8_ROLLOUTS, *REPLAYED),
    "fp8": (*FP8, *REPLAYED),
    "int4": (*INT4, *REPLAYED),
    "bf16-no-r3": OBSERVED,
    "fp8-rollouts-no-r3": (*FP8_ROLLOUTS, *OBSERVED),
    "fp8-no-r3": (*FP8, *OBSERVED),
    "int4-no-r3": (*INT4, *OBSERVED),
}
DEFAULT = ("bf16", "fp8-rollouts", "fp8", "int4")
BACKENDS = {
    "megatron": (
        "--train-backend",
        "megatron",
        "--tensor-model-parallel-size",
        "1",
        "--expert-model-parallel-size",
        "1",
    ),
    "fsdp": ("--train-backend", "fsdp"),
}
ROWS: Rows = {
    **SHARED_ROWS,
    "largest difference of log-probs, nats": ("largest_diff", "{:.3f}"),
    "median over steps of the largest, nats": ("usual_largest_diff", "{:.3f}"),
    "tokens whose weight TIS clips": ("tis_clipfrac", "{:.3%}"),
    "reward of the first fifth of the steps": ("first_reward", "{:.3f}"),
    "reward of the last fifth": ("last_reward", "{:.3f}"),
    "a weight update, GB": ("update_gb", "{:.3f}"),
    "weights of the engine on the GPU, GB": ("engine_weights_gb", "{:.2f}"),
    "the engine gives back in a turn, GB": ("engine_gb", "{:.2f}"),
    "the trainer gives back in a turn, GB": ("trainer_gb", "{:.2f}"),
    "most of the GPU's memory in use, GB": ("most_gb", "{:.1f}"),
}
_LOADED = re.compile(r"Load weight end\..*?mem usage=([\d.]+) GB")


def details(folder: pathlib.Path) -> dict[str, Any]:
    """What a run folder says beyond `benchmarks.gpu.grpo_run.measured`: differences, bytes and memory."""
    result: dict[str, Any] = {}
    steps = steps_of(folder)
    for name, key in (
        ("update_gb", "perf/update_weights_gb"),
        ("engine_gb", "perf/offload_rollout_gb"),
        ("trainer_gb", "perf/offload_train_gb"),
        ("usual_largest_diff", "train/train_rollout_logprob_abs_diff_max"),
    ):
        if found := [line[key] for line in (steps[1:] or steps) if key in line]:
            result[name] = statistics.median(found)
    if largest := [line.get("train/train_rollout_logprob_abs_diff_max", 0.0) for line in steps]:
        result["largest_diff"] = max(largest)
        fifth = max(1, len(steps) // 5)
        rewards = [line["rollout/raw_reward"] for line in steps]
        result |= {"first_reward": statistics.mean(rewards[:fifth]), "last_reward": statistics.mean(rewards[-fifth:])}
    logs = folder / "logs"
    for server in sorted(logs.glob("*sglang*.log")):
        if loaded := _LOADED.findall(_text(server)):
            result["engine_weights_gb"] = float(loaded[-1])
    readings = [line.partition(",")[2] for line in _text(folder / "memory.csv").splitlines()]
    if readings:
        result["most_gb"] = max(map(int, readings)) * (1 << 20) / 1e9
    return result


def _text(path: pathlib.Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def measure(args: argparse.Namespace, name: str, gpu: str | None, cores: list[int]) -> dict[str, Any]:
    """One run, on this GPU alone and on these cores, if any are given."""
    folder = (args.runs / name).absolute()
    flags = [*BACKENDS[args.backend], *VARIANTS[name], "--use-tis", "--no-save-optim"]
    flags += ["--train-dtype", args.dtype, "--rollout-dtype", args.dtype, "--eval-interval", str(args.steps)]
    flags += ["--rollout-batch-size", str(args.prompts), "--n-samples-per-prompt", str(args.samples)]
    if args.device == "cuda":
        flags += LAYOUTS["colocated"]
        if args.engine == "sglang":
            requests = args.prompts * args.samples
            flags += ["--sglang-log-level", "info"]  # says how much memory the weights take
            flags += ["--sglang-cuda-graph-bs-decode", *map(str, sorted({requests // 8, requests // 2, requests}))]
            flags += ["--max-running-requests", str(requests)]
    left_s = max(1.0, args.until - time.monotonic())
    limited = argparse.Namespace(**vars(args) | {"deadline": min(args.deadline, left_s)})
    with watching(folder / "memory.csv", "memory.used", gpu):
        result = run(limited, flags, folder, gpu=gpu, cores=cores)
    return result | details(folder)


def measure_all(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every variant, as many at once as there are GPUs; the table is written after each."""
    lanes: queue.Queue[tuple[str | None, list[int]]] = queue.Queue()
    usable = sorted(os.sched_getaffinity(0))
    share = len(usable) // max(1, len(args.gpus))
    for number, gpu in enumerate(args.gpus):
        lanes.put((gpu, usable[number * share : (number + 1) * share] if len(args.gpus) > 1 else []))
    if not args.gpus:
        lanes.put((None, []))
    results: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def one(name: str) -> None:
        gpu, cores = lanes.get()
        try:
            result = measure(args, name, gpu, cores)
        finally:
            lanes.put((gpu, cores))
        with lock:
            results[name] = result
            print(name, json.dumps(result), flush=True)
            ordered = {variant: results[variant] for variant in args.variants if variant in results}
            (args.runs / "table.md").write_text(table(ordered, ROWS, args.device))

    with concurrent.futures.ThreadPoolExecutor(max(1, len(args.gpus))) as pool:
        for future in [pool.submit(one, name) for name in args.variants]:
            future.result()
    return {name: results[name] for name in args.variants}


def main() -> None:
    """Run what is asked for; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/moe", help="folder that upcycle.py wrote with --align 128")
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT), choices=list(VARIANTS))
    parser.add_argument("--backend", default="megatron", choices=list(BACKENDS))
    parser.add_argument("--engine", default="sglang", choices=["sglang", "torch"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a step")
    parser.add_argument("--samples", type=int, default=8, help="responses to each")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of both, beside the formats"
    )
    parser.add_argument("--deadline", type=float, default=180.0, help="seconds that each run may take")
    parser.add_argument("--total", type=float, default=math.inf, help="seconds that all of them may take")
    parser.add_argument("--gpus", nargs="+", default=[], help="numbers of GPUs, each of which takes one run at a time")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--python", default="", help="interpreter that has SGLang, when it is another one")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/low-precision"), help="folder for runs")
    parser.add_argument("more", nargs="*", help="more flags of train.py, after --")
    args = parser.parse_args()
    args.until = time.monotonic() + args.total
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    results = measure_all(args)
    print("\n" + table(results, ROWS, args.device))
    if any(result["status"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
