"""Samples per second of whole GRPO steps, here and in TRL: same model, prompts, group size, lengths and threads.

    pip install 'miles[benchmarks]'
    python -m benchmarks.grpo_step_vs_trl --model DIR --prompts FILE

Both train with 8 prompts x 8 samples of at most 16 new tokens, over float32 weights, and compute in the type that is
fast on the machine: bfloat16, or float32 where the processor lacks bfloat16 instructions. The first step of each is
left out (it warms up); the table shows medians. TRL runs at several settings, of which the best counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

PROMPTS_PER_STEP = 8
GROUP = 8
MAX_NEW_TOKENS = 16
LEARNING_RATE = 2e-5
TRL_MICRO_BATCHES = (64, 32, 16)
"""Sequences per forward; with 64 there is one micro-batch per step."""
REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def measure_ours(
    model: str, prompts: str, template: str, steps: int, threads: int
) -> tuple[list[float], dict[str, float]]:
    """Seconds of each step but the first, and time shares, from the run's own metrics.

    Every service is a process of its own; the run is synchronous.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--hf-checkpoint", model, "--prompt-data", prompts]
        command += ["--input-key", "prompt", "--label-key", "label", "--apply-chat-template"]
        command += ["--chat-template-path", template, "--rm-type", "last_number", "--num-rollout", str(steps + 1)]
        command += ["--rollout-batch-size", str(PROMPTS_PER_STEP), "--n-samples-per-prompt", str(GROUP)]
        command += ["--num-steps-per-rollout", "1", "--rollout-max-response-len", str(MAX_NEW_TOKENS)]
        command += ["--use-dynamic-batch-size", "--max-tokens-per-gpu", "2048"]
        command += ["--lr", str(LEARNING_RATE), "--device", "cpu", "--run-dir", folder, "--name", "benchmark"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()]
        shares = json.loads((pathlib.Path(folder) / "summary.json").read_text())["time_share"]
    return [line["perf/step_time"] for line in lines if "perf/step_time" in line][1:], shares


def measure_trl(
    model: str,
    prompts: str,
    template: str,
    steps: int,
    threads: int,
    micro_batch: int,
    *,
    prompts_per_step: int = PROMPTS_PER_STEP,
    device: str = "cpu",
) -> list[float]:
    """Seconds of each step but the first of TRL's trainer, in this process."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from miles.precision.speed import cpu_slowdown

    torch.set_num_threads(threads)
    rows = [json.loads(line) for line in pathlib.Path(prompts).read_text().splitlines()]
    dataset = Dataset.from_list([{"prompt": row["prompt"], "label": row["label"]} for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = pathlib.Path(template).read_text()

    def last_number(completions: list[Any], label: list[str], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        numbers = [re.findall(r"-?\d+", text) for text in texts]
        return [float(bool(found) and found[-1] == want) for found, want in zip(numbers, label, strict=True)]

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    samples = prompts_per_step * GROUP
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=samples // micro_batch,
            num_generations=GROUP,
            max_completion_length=MAX_NEW_TOKENS,
            max_steps=steps + 1,
            learning_rate=LEARNING_RATE,
            temperature=1.0,
            beta=0.0,
            bf16=device != "cpu" or cpu_slowdown(torch.bfloat16) <= 1,
            use_cpu=device == "cpu",
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
        )
        GRPOTrainer(
            model=model,
            reward_funcs=last_number,
            args=config,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[Clock()],
        ).train()
    return [after - before for before, after in itertools.pairwise(times)]


def measure_trl_apart(arguments: argparse.Namespace, micro_batch: int) -> list[float]:
    """`measure_trl` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.grpo_step_vs_trl", "--trl-micro-batch", str(micro_batch)]
    command += ["--model", arguments.model, "--prompts", arguments.prompts, "--template", arguments.template]
    command += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    times: list[float] = json.loads(output.stdout.strip().splitlines()[-1])
    return times


def main() -> None:
    recipe = REPOSITORY / "examples" / "smollm2_chain_sum"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="HF checkpoint folder")
    parser.add_argument("--prompts", required=True, help="JSONL with prompt (messages) and label")
    parser.add_argument("--template", default=str(recipe / "chat_template.jinja"), help="chat template for both")
    parser.add_argument("--steps", type=int, default=5, help="steps measured")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--trl-micro-batch", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    common = (arguments.model, arguments.prompts, arguments.template, arguments.steps, arguments.threads)
    if arguments.trl_micro_batch:
        print(json.dumps(measure_trl(*common, arguments.trl_micro_batch)))
        return
    samples = PROMPTS_PER_STEP * GROUP
    ours, shares = measure_ours(*common)
    rows = [("miles", statistics.median(ours))]
    for micro_batch in TRL_MICRO_BATCHES:
        rows.append((f"TRL, micro-batch {micro_batch}", statistics.median(measure_trl_apart(arguments, micro_batch))))
    best = min(seconds for _, seconds in rows[1:])
    print(f"{'':24}{'s/step':>10}{'samples/s':>12}{'vs best TRL':>13}")
    for name, seconds in rows:
        print(f"{name:24}{seconds:>10.2f}{samples / seconds:>12.2f}{best / seconds:>12.2f}x")
    print("time of miles: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))


if __name__ == "__main__":
    main()
