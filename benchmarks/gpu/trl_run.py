"""Steps of TRL's GRPOTrainer in a process of its own, each written to a file as a JSON line when it ends.

    python -m benchmarks.gpu.trl_run --model DIR --task sums --setting static-64 --steps 10 --out steps.jsonl

A setting is how TRL generates (`static`: transformers' `generate` on the whole batch; `continuous`: transformers'
continuous batching) and how many samples a micro-batch has; a third part `bfloat16` holds the weights in bfloat16 too,
where otherwise they are float32 and only computed with in bfloat16. A step is one optimizer step on all its samples;
`generate_s` is up to the rewards, `train_s` the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.tasks import TASKS, Task

MODES = ("static", "continuous")
END_TOKEN = "<|im_end|>"
"""Ends an answer on both sides; the converted tokenizer names another token."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How TRL is run."""

    mode: str
    micro_batch: int
    weights: str = "float32"

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Of MODE-MICRO_BATCH or MODE-MICRO_BATCH-DTYPE."""
        mode, size, *weights = text.split("-")
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"{text}: the way to generate is {mode}, not one of {', '.join(MODES)}")
        return cls(mode, int(size), *weights)

    def __str__(self) -> str:
        more = "" if self.weights == "float32" else f"-{self.weights}"
        return f"{self.mode}-{self.micro_batch}{more}"


class StepWriter:
    """Notes the times and sizes of each step, and writes them when it ends."""

    def __init__(self, out: pathlib.Path, task: Task, synchronize: Callable[[], None]) -> None:
        self._out = out
        self._score = task.score
        self._synchronize = synchronize
        self._began = self._generated = time.perf_counter()
        self._tokens: list[int] = []
        self.rewards: list[float] = []

    def reward(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], label: Sequence[str], **_: Any
    ) -> list[float]:
        """Score the samples of a step, which all come at once."""
        self._generated = time.perf_counter()
        self._tokens = [len(ids) for ids in completion_ids]
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        self.rewards = [self._score(text, want) for text, want in zip(texts, label, strict=True)]
        return self.rewards

    def end_step(self) -> None:
        """Write the step that has just ended; the next one begins."""
        self._synchronize()
        now = time.perf_counter()
        step = {
            "unix_s": time.time(),
            "step_s": now - self._began,
            "generate_s": self._generated - self._began,
            "train_s": now - self._generated,
            "samples": len(self._tokens),
            "response_tokens": sum(self._tokens),
            "longest": max(self._tokens),
            "reward": sum(self.rewards) / len(self.rewards),
        }
        with self._out.open("a") as file:
            file.write(json.dumps(step) + "\n")
        self._began = time.perf_counter()


def run(args: argparse.Namespace) -> None:
    """Train for a step that warms up, and `args.steps` more."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    task, setting, on_gpu = TASKS[args.task], args.setting, args.device == "cuda"
    rows = [json.loads(line) for line in pathlib.Path(args.prompts).read_text().splitlines()]
    dataset = Dataset.from_list([{"prompt": row["prompt"], "label": row["label"]} for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = task.template.read_text()
    tokenizer.eos_token = END_TOKEN
    tokenizer.pad_token = tokenizer.unk_token
    writer = StepWriter(args.out, task, torch.cuda.synchronize if on_gpu else lambda: None)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            writer.end_step()

    samples = args.prompts_per_step * args.group
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=setting.micro_batch,
            gradient_accumulation_steps=samples // setting.micro_batch,
            num_generations=args.group,
            max_completion_length=args.max_new_tokens,
            max_steps=args.steps + 1,
            learning_rate=args.lr,
            temperature=1.0,
            beta=0.0,
            shuffle_dataset=False,
            use_transformers_continuous_batching=setting.mode == "continuous",
            model_init_kwargs={"dtype": setting.weights, "attn_implementation": args.attention},
            bf16=on_gpu,
            use_cpu=not on_gpu,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
        )
        trainer = GRPOTrainer(
            model=args.model,
            reward_funcs=writer.reward,
            args=config,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    if on_gpu:
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", file=sys.stderr)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct as a Hugging Face checkpoint")
    parser.add_argument("--task", default="sums", choices=list(TASKS))
    parser.add_argument("--prompts", required=True, help="JSON lines with prompt and label")
    parser.add_argument("--setting", type=Setting.parse, default=Setting("static", 64))
    parser.add_argument("--steps", type=int, default=10, help="steps measured")
    parser.add_argument("--prompts-per-step", type=int, default=32)
    parser.add_argument("--group", type=int, default=8, help="samples of a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of transformers")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="file for the steps")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
