"""GRPO of a mixture of experts that drafts with its own MTP layer, trained by Megatron: acceptance by step.

    python -m examples.smollm2_chain_sum.prepare
    python -m examples.smollm2_chain_sum.upcycle --model .cache/smollm2-135m-instruct --mtp-layers 1 --out .cache/mtp
    python -m benchmarks.gpu.mtp_run --model .cache/mtp
    python -m benchmarks.gpu.mtp_run --model .cache/mtp --variants still online frozen

Megatron trains, SGLang (NEXTN) generates, experts are replayed (R3), and every step publishes the MTP layer with the
policy. The task is one-digit sums.

| variant | policy | MTP layer |
|---|---|---|
| still | every answer gets the same reward, so nothing moves it | learns from nothing, at a high learning rate |
| online | learns; begins as `still` began | that of `still`, and goes on learning |
| frozen | the same | that of `still`, as it is |

`online` and `frozen` take their model from the folder that `still` has exported.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import time
from typing import Any

from benchmarks.gpu.grpo_run import LAYOUTS, run, steps_of

MEGATRON = ("--train-backend", "megatron", "--tensor-model-parallel-size", "1", "--use-rollout-routing-replay")
TRAINED = ("--enable-mtp-training", "--mtp-loss-scaling-factor", "1.0")
LIKE_PUBLISHED = ("--lr", "2.5e-5")
VARIANTS: dict[str, tuple[str, ...]] = {
    "still": (
        *TRAINED,
        "--lr",
        "1e-3",
        "--lr-decay-style",
        "constant",
        "--custom-rm-path",
        "benchmarks.gpu.mtp_run.same_reward",
    ),
    "online": (*TRAINED, *LIKE_PUBLISHED),
    "frozen": LIKE_PUBLISHED,
}
COLUMNS = {
    "accept length": "rollout/spec_accept_length",
    "accept rate": "rollout/spec_accept_rate",
    "MTP acceptance": "train/mtp_acceptance",
    "MTP loss": "train/mtp_loss",
    "reward": "rollout/raw_reward",
    "generating, s": "perf/rollout_time",
    "training, s": "perf/actor_train_time",
    "new weights, s": "perf/update_weights_time",
}


def same_reward(sample: Any) -> float:
    """A reward that teaches the policy nothing."""
    return 0.0


def flags_of(args: argparse.Namespace, name: str, folder: pathlib.Path) -> list[str]:
    """Flags of a variant beyond the recipe's."""
    requests = args.prompts * args.samples
    flags = [*MEGATRON, "--mtp-num-layers", "1", *VARIANTS[name], "--weight-decay", "0", "--use-tis"]
    flags += ["--rollout-batch-size", str(args.prompts), "--n-samples-per-prompt", str(args.samples)]
    flags += ["--eval-interval", str(args.steps), "--no-save-optim", "--save-hf", str(folder / "hf")]
    flags += ["--rollout-max-response-len", str(args.response)]
    if args.device == "cuda":
        flags += [*LAYOUTS["side-by-side"], "--train-dtype", "bfloat16", "--rollout-dtype", "bfloat16"]
        flags += ["--sglang-attention-backend", "triton", "--max-running-requests", str(requests)]
        flags += ["--sglang-cuda-graph-bs-decode", *map(str, sorted({requests // 8, requests // 2, requests}))]
    flags += ["--sglang-speculative-algorithm", "NEXTN", "--sglang-speculative-num-steps", str(args.draft)]
    return [
        *flags,
        "--sglang-speculative-eagle-topk",
        "1",
        "--sglang-speculative-num-draft-tokens",
        str(args.draft + 1),
    ]


def table(folder: pathlib.Path) -> str:
    """Markdown: a row for each step of a run."""
    lines = [f"| step | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for number, step in enumerate(steps_of(folder)):
        cells = [f"{step[key]:.3f}" if key in step else "-" for key in COLUMNS.values()]
        lines.append(f"| {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the variants one after the other; print and write a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/mtp", help="folder that upcycle.py wrote with --mtp-layers 1")
    parser.add_argument("--variants", nargs="+", default=["still"], choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a step")
    parser.add_argument("--samples", type=int, default=8, help="responses to each")
    parser.add_argument("--response", type=int, default=32, help="most tokens of a response")
    parser.add_argument("--draft", type=int, default=2, help="tokens drafted before a verification")
    parser.add_argument("--deadline", type=float, default=190.0, help="seconds that each run may take")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--python", default="", help="interpreter that has SGLang, when it is another one")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/mtp"), help="folder for runs")
    parser.add_argument("more", nargs="*", help="more flags of train.py, after --")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    trained = args.runs.absolute() / "still" / "hf"
    for name in args.variants:
        folder = (args.runs / name).absolute()
        shutil.rmtree(folder, ignore_errors=True)
        model = args.model if name == "still" else str(trained)
        began = time.monotonic()
        result = run(argparse.Namespace(**vars(args) | {"model": model}), flags_of(args, name, folder), folder)
        print(name, f"{time.monotonic() - began:.0f} s", json.dumps(result), flush=True)
        made = table(folder)
        (folder / "table.md").write_text(made + "\n")
        print(made, flush=True)


if __name__ == "__main__":
    main()
