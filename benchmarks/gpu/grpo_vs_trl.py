"""Samples per second of whole GRPO steps on one GPU: SGLang rollouts with the fsdp trainer, and TRL's GRPOTrainer.

    pip install 'miles[benchmarks]'
    python -m benchmarks.gpu.grpo_vs_trl --model DIR

Same model (SmolLM2-135M-Instruct), prompts, group size, lengths and learning rate; bfloat16 compute over float32
weights. TRL generates with transformers' `generate`, at several micro-batch sizes, of which the best counts. Medians of
the steps but the first.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

from benchmarks.gpu.grpo_run import REPOSITORY, run
from benchmarks.grpo_step_vs_trl import GROUP, LEARNING_RATE, MAX_NEW_TOKENS, measure_trl

RECIPE = REPOSITORY / "examples" / "smollm2_chain_sum"
TRL_DEADLINE_S = 120.0


def trl_step_s(args: argparse.Namespace, micro_batch: int) -> float:
    """Median step of TRL in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu.grpo_vs_trl", "--model", args.model, "--steps", str(args.steps)]
    command += ["--prompts-per-step", str(args.prompts_per_step), "--trl-micro-batch", str(micro_batch)]
    ran = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True, timeout=TRL_DEADLINE_S)
    times: list[float] = json.loads(ran.stdout.strip().splitlines()[-1])
    return statistics.median(times)


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct as a Hugging Face checkpoint")
    parser.add_argument("--steps", type=int, default=10, help="steps measured")
    parser.add_argument("--prompts-per-step", type=int, default=32)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/gpu-vs-trl"), help="folder of our run")
    parser.add_argument("--trl-micro-batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl_micro_batch:
        prompts, template = str(RECIPE / "data" / "train.jsonl"), str(RECIPE / "chat_template.jinja")
        times = measure_trl(
            args.model,
            prompts,
            template,
            args.steps,
            1,
            args.trl_micro_batch,
            prompts_per_step=args.prompts_per_step,
            device="cuda",
        )
        print(json.dumps(times))
        return
    args.steps += 1
    args.device, args.python = "cuda", ""
    args.more = ["--rollout-batch-size", str(args.prompts_per_step), "--n-samples-per-prompt", str(GROUP)]
    args.more += ["--rollout-max-response-len", str(MAX_NEW_TOKENS), "--lr", str(LEARNING_RATE)]
    args.more += ["--max-tokens-per-gpu", "16384", "--eval-interval", str(10 * args.steps)]
    rows = {"miles": float(run(args, (), (args.runs / "ours").absolute())["step_s"])}
    args.steps -= 1
    for micro_batch in args.micro_batches:
        rows[f"TRL, micro-batch {micro_batch}"] = trl_step_s(args, micro_batch)
    best = min(seconds for name, seconds in rows.items() if name != "miles")
    print(f"{'':24}{'s/step':>10}{'samples/s':>12}{'vs best TRL':>13}")
    for name, seconds in rows.items():
        print(f"{name:24}{seconds:>10.3f}{args.prompts_per_step * GROUP / seconds:>12.1f}{best / seconds:>12.2f}x")


if __name__ == "__main__":
    main()
