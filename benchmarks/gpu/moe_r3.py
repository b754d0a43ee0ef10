"""GRPO runs of an upcycled mixture of experts with SGLang on one GPU: with and without routing replay, both backends.

    python -m examples.smollm2_chain_sum.prepare
    python -m examples.smollm2_chain_sum.upcycle --model .cache/smollm2-135m-instruct --out .cache/smollm2-moe
    python -m benchmarks.gpu.moe_r3 --model .cache/smollm2-moe

The task is one-digit sums; engine and trainer share the GPU in turns (`--colocate`). The variant `quick-start` is the
first command of the README with a Qwen3-MoE of random weights (0.4 B parameters), three steps long. Each run has a time
limit of its own; what it wrote stays in the folder `--runs`, and the table is written there after every run.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from typing import Any

from benchmarks.gpu.grpo_run import LAYOUTS, engine_flags, run, train
from benchmarks.gpu.models import write_checkpoint
from benchmarks.gpu.run_table import SHARED_ROWS, table

ONE_RANK = ("--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "1")
MEGATRON = ("--train-backend", "megatron", *ONE_RANK)
VARIANTS: dict[str, tuple[str, ...]] = {
    "megatron-r3": (*MEGATRON, "--use-rollout-routing-replay"),
    "megatron-no-r3": (*MEGATRON, "--observe-rollout-routing"),
    "fsdp-r3": ("--train-backend", "fsdp", "--use-rollout-routing-replay"),
}
QUICK_START = "quick-start"
QUICK_STEPS = 3


def layout(args: argparse.Namespace) -> tuple[str, ...]:
    """SGLang gives memory back on a GPU alone."""
    return LAYOUTS["colocated"] if args.device == "cuda" else ()


def quick_start(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """The README's command with a Qwen3-MoE, on one GPU."""
    kind, prompts, samples, length = ("moe", 32, 8, 64) if args.device == "cuda" else ("tiny-moe", 4, 2, 8)
    model = write_checkpoint(folder / "model", kind, weights=True)
    data = folder / "prompts.jsonl"  # plain text: the model's tokenizer has no chat template
    sums = [{"prompt": f"{a} + {b} = ", "label": str(a + b)} for a in range(8) for b in range(8)]
    data.write_text("".join(json.dumps(line) + "\n" for line in sums))
    flags = ["--advantage-estimator", "grpo", "--hf-checkpoint", str(model), "--prompt-data", str(data)]
    flags += ["--input-key", "prompt", "--label-key", "label", "--rm-type", "math"]
    flags += ["--rollout-batch-size", str(prompts), "--n-samples-per-prompt", str(samples)]
    flags += ["--rollout-max-response-len", str(length)]
    flags += ["--num-rollout", str(QUICK_STEPS), "--actor-num-gpus-per-node", "1", *layout(args), *MEGATRON]
    return train([*flags, *engine_flags(args.device, args.python), *args.more], folder, args.deadline)


def main() -> None:
    """Run what is asked for; print and write the table after each run."""
    names = [*VARIANTS, QUICK_START]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2-moe", help="folder that upcycle.py wrote")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=names)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--deadline", type=float, default=180.0, help="seconds that each run may take")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--python", default="", help="interpreter that has SGLang, when it is another one")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/moe-r3"), help="folder for runs")
    parser.add_argument("more", nargs="*", help="more flags of train.py, after --")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    common = [*layout(args), "--eval-interval", str(args.steps)]
    results: dict[str, dict[str, Any]] = {}
    for name in args.variants:
        folder = (args.runs / name).absolute()
        if name == QUICK_START:
            results[name] = quick_start(args, folder)
        else:
            results[name] = run(args, [*common, *VARIANTS[name]], folder)
        print(name, json.dumps(results[name]), flush=True)
        (args.runs / "table.md").write_text(table(results, SHARED_ROWS, args.device))
    print("\n" + table(results, SHARED_ROWS, args.device))
    if any(result["status"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
