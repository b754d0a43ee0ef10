"""Trainer and engine of a large model in turns on one GPU: what a swap takes, and how much memory each side gives back.

    python -m benchmarks.gpu.colocated
    python -m benchmarks.gpu.colocated --variants fsdp megatron --steps 6 -- --sglang-mem-fraction-static 0.7

A model of 2 B random weights (`benchmarks.gpu.models`) with AdamW: 8 GB of float32 masters, 16 GB of moments, and 8 GB
of gradients in a step. The engine takes so much of the GPU for its cache that both do not fit at once. A swap is one
round: the engine leaves, the trainer comes, the trainer leaves, the engine comes, with new weights. Rewards are
arbitrary, so that gradients are not zero.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
from typing import Any

from benchmarks.gpu.gpu_busy import watching
from benchmarks.gpu.grpo_run import CPU_FLAGS, steps_of, train
from benchmarks.gpu.models import write_checkpoint
from miles.types import Sample

MEGATRON = ("--train-backend", "megatron", "--tensor-model-parallel-size", "1")
VARIANTS: dict[str, tuple[str, ...]] = {
    "fsdp": (),
    "megatron": MEGATRON,
    "fsdp, trainer stays": ("--no-offload-train",),
}
GPU_FLAGS = (
    *("--colocate", "--sglang-attention-backend", "fa3", "--sglang-sampling-backend", "pytorch"),
    *("--sglang-mem-fraction-static", "0.8", "--sglang-cuda-graph-bs-decode", "256"),
    *("--max-running-requests", "256", "--sglang-disable-prefill-cuda-graph"),
    *("--sglang-log-level", "info", "--sglang-sleep-on-idle"),
)
ROWS = {
    "step, s": "perf/step_time",
    "generating, s": "perf/rollout_time",
    "training with the swaps before it, s": "perf/actor_train_time",
    "new weights with the swaps before them, s": "perf/update_weights_time",
    "the engine leaves, s": "perf/offload_rollout_time",
    "and gives back, GB": "perf/offload_rollout_gb",
    "the trainer comes, s": "perf/onload_train_time",
    "the trainer leaves, s": "perf/offload_train_time",
    "and gives back, GB ": "perf/offload_train_gb",
    "train_rollout_logprob_abs_diff": "train/train_rollout_logprob_abs_diff",
}


async def reward(sample: Sample) -> float:
    """An arbitrary number of a response: its characters, mod 7."""
    return sum(sample.response.encode()) % 7 / 7


def run(args: argparse.Namespace, flags: tuple[str, ...], folder: pathlib.Path, model: pathlib.Path) -> dict[str, Any]:
    """One run; medians of its steps, the first two left out: host memory is allocated in the first swap."""
    data = folder / "prompts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"prompt": f"{a} + {b} = ", "label": str(a + b)} for a in range(8) for b in range(8)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = [
        "--hf-checkpoint",
        str(model),
        "--prompt-data",
        str(data),
        "--input-key",
        "prompt",
        "--label-key",
        "label",
    ]
    common += ["--advantage-estimator", "grpo", "--custom-rm-path", "benchmarks.gpu.colocated.reward"]
    common += ["--rollout-batch-size", str(args.prompts), "--n-samples-per-prompt", "8", "--lr", "1e-6"]
    common += ["--rollout-max-response-len", str(args.tokens), "--num-rollout", str(args.steps)]
    common += ["--use-dynamic-batch-size", "--max-tokens-per-gpu", str(args.max_tokens)]
    common += ["--actor-num-gpus-per-node", "1", "--rollout-backend", "sglang", "--device", args.device]
    common += ["--train-backend", "fsdp"]  # unless `flags` name another one
    common += ["--rollout-engine-python", args.python] if args.python else []
    common += [*(GPU_FLAGS if args.device == "cuda" else (*CPU_FLAGS, "--offload-train")), *flags, *args.more]
    with watching(folder / "memory.csv", "memory.used"):
        ended = train(common, folder / "run", args.deadline)
    steps = steps_of(folder / "run")
    result: dict[str, Any] = {"status": ended["status"], "wall_s": ended["wall_s"], "steps": len(steps)}
    if steps and "perf/offload_train_time" in steps[0]:
        result["first"] = {key: steps[0].get(key) for key in ROWS.values()}
    for title, key in ROWS.items():
        values = [line[key] for line in (steps[2:] or steps) if key in line]
        if values:
            result[title.strip()] = statistics.median(values)
    readings = (folder / "memory.csv").read_text().splitlines() if (folder / "memory.csv").exists() else []
    if used := [int(line.partition(",")[2]) * (1 << 20) / 1e9 for line in readings]:
        result["most of the GPU's memory in use, GB"] = max(used)
    return result


def main() -> None:
    """Run every variant; print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="large", help="model, as benchmarks.gpu.models calls it")
    parser.add_argument("--variants", nargs="+", default=["fsdp", "megatron"], choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=32, help="prompts a step, with 8 samples each")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a response at most")
    parser.add_argument("--max-tokens", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--deadline", type=float, default=240.0, help="seconds that each run may take")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--python", default="", help="interpreter that has SGLang, when it is another one")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/colocated"), help="folder for runs")
    parser.add_argument("more", nargs="*", help="more flags of train.py, after --")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model = write_checkpoint((args.runs / "model").absolute(), args.kind, weights=True)
    results = {}
    for name in args.variants:
        folder = (args.runs / name.replace(", ", "-").replace(" ", "-")).absolute()
        results[name] = run(args, VARIANTS[name], folder, model)
        print(name, json.dumps(results[name]), flush=True)
    titles = [title.strip() for title in ROWS] + ["most of the GPU's memory in use, GB"]
    print("\n| | " + " | ".join(results) + " |\n|---|" + "---|" * len(results))
    for title in titles:
        cells = [f"{result[title]:.4g}" if title in result else "" for result in results.values()]
        print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
