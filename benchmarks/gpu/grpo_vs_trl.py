"""Samples per second of whole GRPO steps on one GPU: SGLang rollouts with the fsdp trainer, and TRL's GRPOTrainer.

    pip install 'miles[benchmarks]'
    python -m benchmarks.gpu.grpo_vs_trl --model DIR                     # both cases
    python -m benchmarks.gpu.grpo_vs_trl --model DIR --cases ragged --trl static-64 continuous-64

Ours runs synchronous, like TRL, and `one-step-off`: the next samples are generated while the trainer works, so they are
of the weights before the last, corrected by truncated importance sampling.

Case `short`: one-digit sums, 16 new tokens. Case `ragged`: counting from 1 to N, lengths up to 512 that the model
itself decides; the learning rate is low, so that they stay alike. Both sides have the same model
(SmolLM2-135M-Instruct), prompts in the same order, group size, end token, largest length, rewards and learning rate,
and compute in bfloat16 over float32 weights. TRL runs at several settings (`trl_run.py` says which), of which the best
counts; one that runs out of memory is told and skipped. Medians of the steps but the first, with the range in brackets;
the tokens of a step show that both sides did the same work; `GPU busy` is the driver's word. A run replaces what an
earlier one left in its folder.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.gpu.gpu_busy import busy_share, watching
from benchmarks.gpu.grpo_run import run, steps_of
from benchmarks.gpu.step_shares import shares_of, shares_text
from benchmarks.gpu.tasks import REPOSITORY, TASKS
from benchmarks.gpu.trl_run import Setting

CASES = {"short": "sums", "ragged": "counting"}
TRL_SETTINGS = {
    "short": ("static-256", "static-64", "continuous-256"),
    "ragged": ("continuous-64", "static-64", "static-128", "static-256"),
}
OURS = "miles"
MODES: dict[str, tuple[str, ...]] = {
    "synchronous": ("--max-weight-staleness", "0"),
    "one-step-off": ("--max-weight-staleness", "1", "--use-tis"),
}

Step = dict[str, float]
"""Of one step: step_s, samples, response_tokens, longest, and its parts in seconds."""


def folder_of(mode: str) -> str:
    """Name of the folder of a run of ours."""
    return OURS if mode == "synchronous" else f"{OURS}-{mode}"


def run_ours(args: argparse.Namespace, case: str, mode: str, folder: pathlib.Path) -> str:
    """Run ours into a folder; returns what stopped it, if anything did."""
    task = TASKS[CASES[case]]
    new_tokens = args.max_new_tokens or task.max_new_tokens
    prompts = task.prompts(args.runs / case / "data")
    flags = ["--prompt-data", str(prompts.absolute()), *task.flags, "--no-eval-interval"]
    flags += ["--no-eval-prompt-data", "--no-eval-temperature"]
    flags += ["--rollout-batch-size", str(args.prompts_per_step), "--n-samples-per-prompt", str(args.group)]
    flags += ["--rollout-max-response-len", str(new_tokens), "--lr", str(task.learning_rate)]
    flags += ["--lr-decay-style", "constant", "--max-tokens-per-gpu", str(args.max_tokens or task.max_tokens_per_gpu)]
    flags += ["--log-probs-chunk-size", "8192", "--no-save-optim", *MODES[mode]]
    steps = args.ours_steps[case]
    shutil.rmtree(folder, ignore_errors=True)
    with watching(folder.with_name(f"{folder.name}.gpu")):
        ran = run(argparse.Namespace(**{**vars(args), "steps": steps + 1}), flags, folder)
    return f"ended with status {ran['status']}; {folder / 'output.log'} says why" if ran["status"] else ""


def _our_step(line: dict[str, Any]) -> Step:
    return {
        "unix_s": line["unix_s"],
        "step_s": line["perf/step_time"],
        "generate_s": line["perf/rollout_time"],
        "train_s": line["perf/actor_train_time"],
        "sync_s": line["perf/update_weights_time"],
        "samples": line["rollout/samples"],
        "response_tokens": line["rollout/response_tokens"],
        "longest": line.get("rollout/response_len/max", 0.0),
        "reward": line["rollout/raw_reward"],
    }


def run_trl(args: argparse.Namespace, case: str, setting: Setting, folder: pathlib.Path) -> str:
    """Run TRL into a folder, at most until the deadline; returns what stopped it, unless that was the deadline."""
    task = TASKS[CASES[case]]
    prompts = task.prompts(args.runs / case / "data")
    out, log = folder / "steps.jsonl", folder / "output.log"
    folder.mkdir(parents=True, exist_ok=True)
    out.write_text("")
    command = [sys.executable, "-m", "benchmarks.gpu.trl_run", "--model", args.model, "--task", CASES[case]]
    command += ["--prompts", str(prompts), "--setting", str(setting), "--steps", str(args.trl_steps[case])]
    command += ["--prompts-per-step", str(args.prompts_per_step), "--group", str(args.group), "--device", args.device]
    command += ["--max-new-tokens", str(args.max_new_tokens or task.max_new_tokens), "--lr", str(task.learning_rate)]
    command += ["--attention", args.trl_attention, "--out", str(out.absolute())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output, watching(folder.with_name(f"{folder.name}.gpu")):
        try:
            code = subprocess.run(
                [*command], cwd=REPOSITORY, env=environment, stdout=output, stderr=output, timeout=args.trl_deadline
            ).returncode
        except subprocess.TimeoutExpired:
            code = 0
    if code == 0:
        return ""
    text = log.read_text()
    return "out of memory" if "OutOfMemoryError" in text else f"failed: {text.strip().splitlines()[-1]:.80}"


def measured_steps(folder: pathlib.Path) -> list[Step]:
    """The steps of a run of either side but the first, which warms up."""
    out = folder / "steps.jsonl"
    if out.exists():
        return [json.loads(line) for line in out.read_text().splitlines()][1:]
    return [_our_step(line) for line in steps_of(folder)][1:]


def median(steps: list[Step], name: str) -> float:
    """Median over steps."""
    return statistics.median(step[name] for step in steps)


def row(name: str, steps: list[Step], best_s: float, gpu: pathlib.Path) -> str:
    """A row of the table; `gpu` has what the driver said of the GPU meanwhile."""
    busy = busy_share(gpu, [(step["unix_s"] - step["step_s"], step["unix_s"]) for step in steps])
    seconds = [step["step_s"] for step in steps]
    middle = statistics.median(seconds)
    cells = [
        f"{len(steps)}",
        f"{middle:.3f} ({min(seconds):.3f}–{max(seconds):.3f})",
        f"{median(steps, 'samples'):.0f}",
        f"{statistics.mean(step['samples'] for step in steps) / middle:,.1f}",
        f"{statistics.mean(step['response_tokens'] for step in steps):,.0f}",
        f"{max(step['longest'] for step in steps):.0f}",
        f"{sum(step['response_tokens'] for step in steps) / sum(seconds):,.0f}",
        f"{median(steps, 'generate_s'):.3f}",
        f"{median(steps, 'train_s'):.3f}",
        f"{median(steps, 'sync_s'):.3f}" if "sync_s" in steps[0] else "",
        f"{busy:.0%}" if busy is not None else "",
        f"{statistics.mean(step['reward'] for step in steps):.3f}",
        f"{best_s / middle:.2f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


COLUMNS = (
    *("steps", "s a step", "samples a step", "samples/s", "response tokens a step", "longest", "tokens/s"),
    *("generate, s", "train, s", "new weights, s", "GPU busy", "reward", "× best TRL"),
)


def table(folder: pathlib.Path, stopped: dict[str, str]) -> str:
    """Markdown: a row for each run in the folder of a case, then what stopped some, and the shares of our time."""
    found = {run.name: measured_steps(run) for run in sorted(folder.iterdir()) if (run / "output.log").exists()}
    ours = [folder_of(mode) for mode in MODES]
    found = {name: steps for name in sorted(found, key=lambda name: (name not in ours, name)) if (steps := found[name])}
    peers = [median(steps, "step_s") for name, steps in found.items() if name not in ours]
    best_s = min(peers, default=float("nan"))
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name, steps in found.items():
        shown = name if name in ours else f"TRL {name}"
        lines.append(row(shown, steps, best_s, folder / f"{name}.gpu"))
    none = {name: why or "no step within the deadline" for name, why in stopped.items() if why or name not in found}
    lines += ["", *(f"{name}: {why}" for name, why in none.items())]
    shares = {name: shares_of(folder / name, skip=1) for name in found if name in ours}
    lines += [f"time of {name}: {shares_text(share)}" for name, share in shares.items() if share]
    return "\n".join(lines)


def compare(args: argparse.Namespace, case: str, settings: list[Setting]) -> None:
    """Measure a case, then print and write the table of all that its folder holds, of earlier calls too."""
    folder = args.runs / case
    stopped: dict[str, str] = {}
    for mode in args.modes:
        name = folder_of(mode)
        stopped[name] = run_ours(args, case, mode, folder / name)
        print(f"{case}, {name}: {seconds_of(folder / name)} s a step {stopped[name]}", flush=True)
    for setting in settings:
        name = str(setting)
        stopped[name] = run_trl(args, case, setting, folder / name)
        print(f"{case}, TRL {name}: {seconds_of(folder / name)} s a step {stopped[name]}", flush=True)
    text = table(folder, stopped)
    (args.runs / f"{case}.md").write_text(text + "\n")
    print(f"\n{case}:\n\n{text}\n", flush=True)


def seconds_of(folder: pathlib.Path) -> list[float]:
    """How long each measured step took."""
    return [round(step["step_s"], 3) for step in measured_steps(folder)]


def main() -> None:
    """Measure and print a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct as a Hugging Face checkpoint")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, nargs=2, default=(20, 12), help="of ours, short and ragged")
    parser.add_argument("--trl-steps", type=int, nargs=2, default=(10, 5), help="of each setting of TRL, likewise")
    parser.add_argument("--trl", type=Setting.parse, nargs="*", help="settings of TRL; none measures ours alone")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES), help="of ours; none: TRL alone")
    parser.add_argument("--trl-attention", default="sdpa", help="TRL's attn_implementation")
    parser.add_argument("--trl-deadline", type=float, default=150.0, help="seconds that a setting of TRL may take")
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds that a run of ours may take")
    parser.add_argument("--prompts-per-step", type=int, default=32)
    parser.add_argument("--group", type=int, default=8, help="samples of a prompt")
    parser.add_argument("--max-new-tokens", type=int, help="instead of the case's own")
    parser.add_argument("--max-tokens", type=int, help="tokens of a micro-batch of ours, instead of the case's own")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--python", default="", help="interpreter that has SGLang, when it is another one")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/gpu-vs-trl"), help="folder for runs")
    parser.add_argument("more", nargs="*", help="more flags of train.py, after --")
    args = parser.parse_args()
    args.ours_steps = dict(zip(CASES, args.steps, strict=True))
    args.trl_steps = dict(zip(CASES, args.trl_steps, strict=True))
    args.runs = args.runs.absolute()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for case in args.cases:
        (args.runs / case).mkdir(parents=True, exist_ok=True)
        settings = args.trl if args.trl is not None else [Setting.parse(text) for text in TRL_SETTINGS[case]]
        compare(args, case, settings)


if __name__ == "__main__":
    main()
