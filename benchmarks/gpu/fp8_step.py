"""Training steps in BF16 and in FP8, in turn on one GPU, at sizes where matrix products take most of the time.

    python -m benchmarks.gpu.fp8_step
    python -m benchmarks.gpu.fp8_step --kind wider --variants bf16 fp8 fp8-powers --profile profiles
    python -m benchmarks.gpu.fp8_step --kind tiny-wide --groups 2 --samples 2 --response 64 --steps 1 --backend fsdp

Each variant is a process with a model of its own and takes one step when it is told to, while the others wait: so all
see the same clocks, and the ratio is of neighbouring steps. `wide` has Llama-3-8B's layers, four of them, and `wider`
two of Llama-3-70B's; a step trains on 64 samples of about 1,000 tokens in micro-batches of 8,192; the first few do not
count. The table has medians, the range of seconds, model FLOP/s as 6 × parameters × tokens, and how much faster
than the first variant. One more step of each is recorded with torch.profiler: where the GPU's time went, by kinds of
kernels, and with `--profile DIR` the kernels themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.gpu.megatron_step import PEAK_FLOPS, active_parameters, job_config, rollout
from benchmarks.gpu.models import config_of, write_checkpoint

FP8 = {"fp8_format": "e4m3", "fp8_recipe": "blockwise"}
SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
"""What TransformerEngine takes its kind of scales from, when it is imported; a run sets it by fp8_block_scales."""
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": FP8,
    "fp8-powers": FP8 | {"fp8_block_scales": "power_of_two"},
    "fp8-emulated": FP8 | {"low_precision_impl": "emulated"},
    "int4": {"int4_qat": True, "int4_layers": ["."]},
}
"""Settings of each."""
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
KINDS = {
    "attention": r"flash|fmha|attention|attn|sdpa",
    "quantising": r"quant|(?<!broad)cast|block_scal|blockwise|amax|transpose",
    "matrix products": r"gemm|nvjet|xmma|cutlass|wgmma|cublas|splitK",
    "optimizer": r"adam|multi_tensor|l2norm",
    "head and loss": r"softmax|cross_entropy|logsumexp|nll",
    "norms and activations": r"norm|silu|swiglu|glu|rope|rotary|triton",
    "copies": r"memcpy|memset|copy|catarray|fill",
}
"""Kernels by their names, the first that is found; fused kernels that norm and quantise count as quantising."""
REST = "the rest"
KERNELS_WRITTEN = 60
ENDING_SHARE = 0.85
"""Of the deadline: no step begins later, so that what was measured can be profiled and reported."""


def kind_of(kernel: str) -> str:
    """To what a kernel of this name belongs."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), REST)


def shares_of(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds by kind, of kernels with their seconds."""
    totals = dict.fromkeys([*KINDS, REST], 0.0)
    for name, seconds in kernels:
        totals[kind_of(name)] += seconds
    return totals


class Variant:
    """A process that takes a step when it is told to."""

    def __init__(self, name: str, args: argparse.Namespace, model: pathlib.Path, logs: pathlib.Path) -> None:
        self.name = name
        told = vars(args) | {"flags": [], "settings": VARIANTS[name], "model": str(model), "name": name}
        self._log = (logs / f"{name}.log").open("w")
        environment = {key: value for key, value in os.environ.items() if key != SCALES}
        if "fp8_format" in VARIANTS[name] and VARIANTS[name].get("fp8_block_scales") != "power_of_two":
            environment[SCALES] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.fp8_step", "--worker", json.dumps(told, default=str)],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.seconds: list[float] = []
        self.last: dict[str, Any] = {}

    def ask(self, question: str) -> dict[str, Any]:
        """Its answer. Raises RuntimeError when it has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its log says why
        return self.next()

    def next(self) -> dict[str, Any]:
        """What it says next."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                self.last = json.loads(line[1:])
                return self.last
            self._log.write(line)
            self._log.flush()
        raise RuntimeError(f"{self.name} has ended; see {self._log.name}")

    def stop(self) -> None:
        """End it now."""
        self._process.kill()
        self._process.wait()
        self._log.close()


def work(told: dict[str, Any]) -> None:
    """The process of a variant."""
    import torch

    from miles.services.trainer.ranks.process_group import join
    from miles.services.trainer.ranks.worker import create_backend

    args = argparse.Namespace(**told)
    args.settings = {name: tuple(value) if isinstance(value, list) else value for name, value in args.settings.items()}
    model = pathlib.Path(args.model)
    device, _ = join("cuda" if torch.cuda.is_available() else "cpu", None, 10)
    groups = rollout(args.kind, args.groups, args.samples, args.prompt, args.response, replay=False)
    trainer = create_backend(
        job_config(args, args.backend, model, device, args.settings), model.parent / f"{args.name}-checkpoints", device
    )
    trainer.load()
    numbers = iter(range(10**6))

    def step() -> dict[str, Any]:
        began = time.monotonic()
        metrics = trainer.train(next(numbers), groups, lambda progress: None)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        return {"seconds": seconds, "memory_gb": memory / 1e9, "grad_norm": metrics["train/grad_norm"]}

    say({"ready": True})
    for line in sys.stdin:
        say(step() if line.strip() == "step" else profiled(step, args))
    trainer.close()


def say(message: Mapping[str, Any]) -> None:
    """A line for the process that compares."""
    print("@" + json.dumps(message), flush=True)


def profiled(step: Callable[[], dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """A step under torch.profiler: seconds on the GPU by kind of kernel."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        answer = step()
    events = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
    kernels = sorted(
        ((event.key, event.self_device_time_total / 1e6, event.count) for event in events), key=lambda k: -k[1]
    )
    if args.profile:
        lines = [f"{seconds:9.5f} s {count:6d}  {kind_of(name)}: {name}" for name, seconds, count in kernels]
        folder = pathlib.Path(args.profile)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{args.kind}-{args.name}.txt").write_text("\n".join(lines[:KERNELS_WRITTEN]) + "\n")
    shares = shares_of((name, seconds) for name, seconds, _ in kernels)
    return answer | {"shares": shares, "launches": sum(count for *_, count in kernels)}


COLUMNS = ("", "steps", "median, s", "range, s", "tokens/s", "TFLOP/s", "of BF16's peak", "GB", "speed")


def rows(args: argparse.Namespace, variants: list[Variant], tokens: int) -> str:
    """The table of what was measured; speed is that of the first variant's neighbouring steps over its own."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for variant in variants:
        median = statistics.median(variant.seconds)
        flops = 6 * active_parameters(args.kind) * tokens / median
        cells = [
            variant.name,
            f"{len(variant.seconds)}",
            f"{median:.3f}",
            f"{min(variant.seconds):.3f}–{max(variant.seconds):.3f}",
            f"{tokens / median:,.0f}",
            f"{flops / 1e12:.0f}",
            f"{flops / PEAK_FLOPS:.1%}",
            f"{variant.last['memory_gb']:.1f}",
            f"{statistics.median(a / b for a, b in zip(variants[0].seconds, variant.seconds, strict=False)):.2f} ×",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def breakdown(answers: Mapping[str, Mapping[str, Any]]) -> str:
    """Where the GPU's time of a step went."""
    found: dict[str, list[str]] = {"GPU time of one step, ms": list(answers)}
    for kind in [*KINDS, REST]:
        found[kind] = [f"{answer['shares'][kind] * 1e3:.1f}" for answer in answers.values()]
    found["all kernels"] = [f"{sum(answer['shares'].values()) * 1e3:.1f}" for answer in answers.values()]
    found["the step under the profiler"] = [f"{answer['seconds'] * 1e3:.1f}" for answer in answers.values()]
    found["kernels started"] = [str(answer["launches"]) for answer in answers.values()]
    lines = [f"| {title} | {' | '.join(cells)} |" for title, cells in found.items()]
    return "\n".join([lines[0], f"|{'---|' * (len(answers) + 1)}", *lines[1:]])


def compare(args: argparse.Namespace, model: pathlib.Path, logs: pathlib.Path) -> None:
    """Let the variants take steps in turn, until the deadline; a variant that ends is left out."""
    tokens = sum(
        len(sample.tokens)
        for group in rollout(args.kind, args.groups, args.samples, args.prompt, args.response, replay=False)
        for sample in group.samples
    )
    began = time.monotonic()
    variants = [Variant(name, args, model, logs) for name in args.variants]
    alarm = threading.Timer(args.deadline, lambda: [variant.stop() for variant in variants])
    alarm.daemon = True
    alarm.start()

    def each(question: str | None) -> dict[str, dict[str, Any]]:
        answers = {}
        for variant in list(variants):
            try:
                answers[variant.name] = variant.next() if question is None else variant.ask(question)
            except RuntimeError as error:
                print(error, flush=True)
                variants.remove(variant)
        return answers

    try:
        each(None)
        print(f"loaded after {time.monotonic() - began:.0f} s", flush=True)
        for _ in range(args.warm_up):
            each("step")
        until = began + ENDING_SHARE * args.deadline
        while time.monotonic() < until and variants and len(variants[0].seconds) < args.steps:
            for name, answer in each("step").items():
                next(v for v in variants if v.name == name).seconds.append(answer["seconds"])
        if variants and all(variant.seconds for variant in variants):
            print("\n" + rows(args, variants, tokens) + "\n", flush=True)
            print(breakdown(each("profile")), flush=True)
    finally:
        alarm.cancel()
        for variant in variants:
            variant.stop()


def main() -> None:
    """Measure and print."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kind", default="wide", choices=["wide", "wider", "large", "tiny-wide"])
    add("--variants", nargs="+", default=["bf16", "fp8"], choices=list(VARIANTS))
    add("--backend", default="megatron", choices=["megatron", "fsdp"])
    add("--groups", type=int, default=8)
    add("--samples", type=int, default=8)
    add("--prompt", type=int, default=256)
    add("--response", type=int, default=1024, help="longest response; the shortest has half of it")
    add("--micro-batch", type=int, default=8192, help="tokens per micro-batch")
    add("--warm-up", type=int, default=3, help="steps that do not count")
    add("--steps", type=int, default=7)
    add("--deadline", type=float, default=240.0, help="seconds after which what was measured is reported")
    add("--profile", type=pathlib.Path, metavar="DIR", help="write the kernels of a step there")
    add("--logs", type=pathlib.Path, help="folder for the processes' logs")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args.replay = args.kl = False
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="fp8-step-") as folder:
        model = write_checkpoint(pathlib.Path(folder) / "model", args.kind, weights=True)
        logs = args.logs or pathlib.Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        config = config_of(args.kind)
        print(
            f"{name}, torch {torch.__version__}: {args.kind}, hidden {config.hidden_size}, "
            f"feed-forward {config.intermediate_size}, {config.num_hidden_layers} layers, "
            f"{active_parameters(args.kind) / 1e9:.2f} B parameters in products; {args.groups} × {args.samples} "
            f"samples, micro-batches of {args.micro_batch} tokens, {args.backend}",
            flush=True,
        )
        compare(args, model, logs)


if __name__ == "__main__":
    main()
