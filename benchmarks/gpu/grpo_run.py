"""Whole GRPO runs of SmolLM2-135M on one-digit sums with SGLang rollouts and the fsdp trainer, on one GPU.

    python -m benchmarks.gpu.grpo_run --model DIR
    python -m benchmarks.gpu.grpo_run --model DIR --layouts side-by-side --steps 10

`side-by-side`: engine and trainer hold their memory at once. `colocated`: the engine frees its memory while the trainer
works. The table has the median step (the first left out), where the time went, tokens per second of the whole run, how
far the trainer's log-probabilities are from the engine's (bfloat16), and accuracy before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
RECIPE = "examples/smollm2_chain_sum/config.yaml"
SHARED = ("--colocate", "--no-offload-rollout", "--no-offload-train")
"""Engine and trainer on the same GPUs at once."""
LAYOUTS = {"side-by-side": SHARED, "colocated": ("--colocate", "--offload-rollout", "--offload-train")}
GPU_FLAGS = (
    *("--sglang-attention-backend", "fa3", "--sglang-sampling-backend", "pytorch"),
    *("--sglang-mem-fraction-static", "0.4", "--sglang-max-total-tokens", "200000"),
    *("--sglang-cuda-graph-bs-decode", "1", "16", "64", "128", "256", "384", "512"),
    *("--max-running-requests", "512"),  # more would be decoded without a CUDA graph
    *("--sglang-disable-prefill-cuda-graph", "--sglang-log-level", "warning", "--sglang-sleep-on-idle"),
)
CPU_FLAGS = ("--sglang-attention-backend", "torch_native", "--sglang-mem-fraction-static", "0.3")
RUN_DEADLINE_S = 420.0
STOP_S = 20.0
OPTIONAL = {
    "kl": "train/train_rollout_kl",
    "routed_differently": "train/tokens_routed_differently",
    "routing_difference": "train/routing_difference",
    "tis_clipfrac": "train/tis_clipfrac",
    "reward": "rollout/raw_reward",
}
"""Means over steps, of runs that have them."""


def engine_flags(device: str, python: str, engine: str = "sglang") -> list[str]:
    """Flags of the engine of a run, SGLang or the torch engine."""
    if engine == "torch":
        return ["--device", device, "--rollout-backend", "torch"]
    flags = ["--device", device, "--rollout-backend", "sglang", *(GPU_FLAGS if device == "cuda" else CPU_FLAGS)]
    return [*flags, "--rollout-engine-python", python] if python else flags


def run(
    args: argparse.Namespace,
    flags: Sequence[str],
    folder: pathlib.Path,
    gpu: str | None = None,
    cores: Sequence[int] = (),
) -> dict[str, Any]:
    """One run of the recipe with more flags; what its metrics say. See `train` for `gpu` and `cores`."""
    recipe = ["--config", RECIPE, "--hf-checkpoint", args.model, "--actor-num-gpus-per-node", "1"]
    recipe += ["--train-backend", "fsdp"]  # unless `flags` name another one
    recipe += ["--num-rollout", str(args.steps), "--lr-decay-iters", str(args.steps)]
    deadline_s = getattr(args, "deadline", RUN_DEADLINE_S)
    shared = SHARED if args.device == "cuda" else ()
    engine = engine_flags(args.device, args.python, getattr(args, "engine", "sglang"))
    given = [*recipe, *engine, *shared, *flags, *args.more]
    return train(given, folder, deadline_s, gpu, cores)


def train(
    flags: Sequence[str],
    folder: pathlib.Path,
    deadline_s: float = RUN_DEADLINE_S,
    gpu: str | None = None,
    cores: Sequence[int] = (),
) -> dict[str, Any]:
    """Start train.py, its output in the folder, and stop it at the deadline; what its metrics say.

    It sees the GPU of this number alone and is kept on these cores, if they are given.
    """
    command = [sys.executable, "train.py", *flags, "--run-dir", str(folder), "--no-gateway"]
    if cores:
        command = ["taskset", "--cpu-list", ",".join(map(str, cores)), *command]
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (folder / "output.log").open("w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        try:
            ended = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            ended = _stopped(process)
    return {"status": ended, "wall_s": time.monotonic() - began, **measured(folder)}


def _stopped(process: subprocess.Popen[bytes]) -> int:
    """Have a run stop at once, and its services with it, which hold the GPU; -1."""
    for stop, wait_s in ((signal.SIGINT, 2.0), (signal.SIGINT, STOP_S), (signal.SIGKILL, STOP_S)):
        process.send_signal(stop)
        try:
            process.wait(wait_s)
            break
        except subprocess.TimeoutExpired:
            continue
    return -1


def metrics_of(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; none before its first."""
    metrics = folder / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def steps_of(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics of a run's training steps."""
    return [line for line in metrics_of(folder) if "perf/step_time" in line]


def measured(folder: pathlib.Path) -> dict[str, Any]:
    """What the metrics of a run folder say; nothing before its first step."""
    result: dict[str, Any] = {}
    lines = metrics_of(folder)
    if steps := steps_of(folder):
        later = steps[1:] or steps
        result |= {
            "steps": len(steps),
            "step_s": statistics.median(line["perf/step_time"] for line in later),
            "rollout_s": statistics.median(line["perf/rollout_time"] for line in later),
            "train_s": statistics.median(line["perf/actor_train_time"] for line in later),
            "sync_s": statistics.median(line["perf/update_weights_time"] for line in later),
            "tokens_per_s": sum(line["rollout/response_tokens"] for line in later)
            / sum(line["perf/step_time"] for line in later),
            "abs_diff": statistics.mean(line["train/train_rollout_logprob_abs_diff"] for line in steps),
        }
        for name, key in OPTIONAL.items():
            if all(key in line for line in steps):
                result[name] = statistics.mean(line[key] for line in steps)
    accuracy = [value for line in lines for key, value in line.items() if key in ("eval/chain_sum", "eval/counting")]
    if accuracy:
        result |= {"before": accuracy[0], "after": accuracy[-1]}
    summary = folder / "summary.json"
    if summary.exists():
        result["time_share"] = json.loads(summary.read_text()).get("time_share")
    return result


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct as a Hugging Face checkpoint")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--python", default="", help="interpreter that has SGLang, when it is another one")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/gpu-benchmark"), help="folder for runs")
    parser.add_argument("more", nargs="*", help="more flags of train.py, after --")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    results = {}
    for layout in args.layouts:
        results[layout] = run(args, LAYOUTS[layout], (args.runs / layout).absolute())
        print(layout, json.dumps(results[layout]), flush=True)
    columns = ("steps", "step_s", "rollout_s", "train_s", "sync_s", "tokens_per_s", "abs_diff", "before", "after")
    print("\n" + f"{'layout':<14}{'status':>7}{'wall_s':>8}" + "".join(f"{column:>13}" for column in columns))
    for layout, result in results.items():
        cells = "".join(f"{result[c]:>13.4g}" if c in result else f"{'-':>13}" for c in columns)
        print(f"{layout:<14}{result['status']:>7}{result['wall_s']:>8.0f}{cells}")


if __name__ == "__main__":
    main()
