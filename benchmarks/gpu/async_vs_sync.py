"""The same job synchronous, one step off and fully asynchronous on one GPU, at long-tailed lengths.

    python -m benchmarks.gpu.async_vs_sync --model DIR

SmolLM2-135M-Instruct learns to count from 1 to N (`counting.py`) with GRPO, SGLang rollouts and the fsdp trainer side
by side on the GPU. Every mode has the same seed, number of samples and learning rate. Asynchronous runs preempt what is
unfinished when a batch is complete, resume it with the new weights (`--partial-rollout`), and correct for stale samples
by truncated importance sampling (`--use-tis`); in `in-flight` ones unfinished answers go on through updates instead,
with the keys and values that they have. Speeds are of all steps but the first three, in which pipelines fill;
rewards are means of a tenth of the run, as trained on, so of samples as stale as the mode allows; evaluations are
greedy answers to 64 fixed questions. A run replaces what an earlier one left in its folder; the table shows every mode
that was run there.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import statistics

from benchmarks.gpu import counting
from benchmarks.gpu.gpu_busy import busy_share, watching
from benchmarks.gpu.grpo_run import measured, run, steps_of
from benchmarks.gpu.step_shares import shares_of, shares_text, spans_of_steps

MODES: dict[str, tuple[str, ...]] = {
    "synchronous": ("--max-weight-staleness", "0"),
    "one-step-off": ("--max-weight-staleness", "1"),
    "asynchronous": ("--max-weight-staleness", "3", "--use-tis", "--partial-rollout"),
    "in-flight": ("--max-weight-staleness", "3", "--use-tis", "--pause-generation-mode", "in_place"),
}
WARM_UP = 3
MARKS = (10, 30, 50, 70, 100)
"""Per cent of the run at which rewards are shown."""


def flags_of(args: argparse.Namespace) -> list[str]:
    """What every mode has."""
    data = counting.write(args.runs / "data")
    flags = ["--prompt-data", str(data / "train.jsonl"), "--eval-prompt-data", "counting", str(data / "eval.jsonl")]
    flags += ["--no-rm-type", "--custom-rm-path", "benchmarks.gpu.counting.reward", "--no-save-optim"]
    flags += ["--eval-interval", str(args.steps), "--rollout-batch-size", str(args.prompts_per_step)]
    flags += ["--n-samples-per-prompt", str(args.group), "--rollout-max-response-len", str(args.max_new_tokens)]
    flags += ["--lr", str(args.lr), "--max-tokens-per-gpu", str(args.max_tokens), "--log-probs-chunk-size", "8192"]
    return [*flags, "--seed", str(args.seed), "--rollout-seed", str(args.seed), "--rollout-shuffle"]


def figures(folder: pathlib.Path) -> dict[str, str]:
    """A column of the table, of a run that took a step."""
    result, steps = measured(folder), steps_of(folder)
    later = steps[WARM_UP:] or steps
    seconds = sum(step["perf/step_time"] for step in later)
    ends = [max(1, round(len(steps) * mark / 100)) for mark in MARKS]
    busy = busy_share(folder.with_name(f"{folder.name}.gpu"), spans_of_steps(later))
    tenth = max(1, len(steps) // 10)
    rewards = [statistics.mean(step["rollout/raw_reward"] for step in steps[max(0, end - tenth) : end]) for end in ends]
    return {
        "steps": f"{len(steps)}",
        "samples trained on": f"{sum(step['rollout/samples'] for step in steps):.0f}",
        "samples/s": f"{sum(step['rollout/samples'] for step in later) / seconds:.1f}",
        "response tokens/s": f"{sum(step['rollout/response_tokens'] for step in later) / seconds:,.0f}",
        "median step, s": f"{statistics.median(step['perf/step_time'] for step in later):.3f}",
        "slowest step, s": f"{max(step['perf/step_time'] for step in later):.3f}",
        "tokens a response, mean": f"{statistics.mean(step['rollout/response_len/mean'] for step in later):.0f}",
        "longest": f"{max(step['rollout/response_len/max'] for step in later):.0f}",
        "staleness, mean (largest)": f"{statistics.mean(s['rollout/fully_async/avg_staleness'] for s in later):.2f}"
        f" ({max(step['rollout/fully_async/max_staleness'] for step in later):.0f})",
        "difference of log-probs, nats": f"{result['abs_diff']:.4f}",
        **{f"reward at {mark} %": f"{reward:.3f}" for mark, reward in zip(MARKS, rewards, strict=True)},
        "evaluation before": f"{result['before']:.3f}" if "before" in result else "",
        "after": f"{result['after']:.3f}" if "after" in result else "",
        "GPU busy, by its driver": f"{busy:.0%}" if busy is not None else "",
    }


def table(runs: pathlib.Path) -> str:
    """Markdown: a column for each mode that took a step, of earlier calls too; then how its time was shared out."""
    columns = {mode: figures(runs / mode) for mode in MODES if steps_of(runs / mode)}
    names = next(iter(columns.values()), {})
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |" for name in names]
    shares = {mode: shares_of(runs / mode, skip=WARM_UP) for mode in columns}
    lines += ["", *(f"time, {mode}: {shares_text(share)}" for mode, share in shares.items() if share)]
    return "\n".join(lines)


def main() -> None:
    """Run each mode, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct as a Hugging Face checkpoint")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES), help="none: show the table")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts-per-step", type=int, default=16)
    parser.add_argument("--group", type=int, default=8, help="samples of a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=131_072, help="tokens of a micro-batch of the trainer")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=240.0, help="seconds that a run may take")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--python", default="", help="interpreter that has SGLang, when it is another one")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/gpu-async"), help="folder for runs")
    parser.add_argument("more", nargs="*", help="more flags of train.py, after --")
    args = parser.parse_args()
    args.runs = args.runs.absolute()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    flags = flags_of(args)
    for mode in args.modes:
        folder = args.runs / mode
        shutil.rmtree(folder, ignore_errors=True)
        with watching(folder.with_name(f"{mode}.gpu")):
            result = run(args, [*flags, *MODES[mode]], folder)
        print(f"{mode}: status {result['status']} after {result['wall_s']:.0f} s", flush=True)
    found = table(args.runs)
    (args.runs / "table.md").write_text(found + "\n")
    print(f"\n{found}", flush=True)


if __name__ == "__main__":
    main()
