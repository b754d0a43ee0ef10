"""GPUs: whether PyTorch can use them, and whether the job fits."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

from miles.config.checks.device import visible_gpus
from miles.doctor.finding import Finding, fail, ok, warn
from miles.doctor.probe import torch_facts
from miles.doctor.subject import Subject
from miles.memory.amount import peak, size
from miles.memory.host import context_part
from miles.memory.report import trainer_parts
from miles.memory.run import Run, run_of


@dataclasses.dataclass(frozen=True, slots=True)
class Gpus:
    """Facts about GPUs."""

    visible: int
    """Device files that this process may use."""
    driver: str | None
    torch: dict[str, Any] | None
    wanted: bool
    """Whether the configuration computes on GPUs."""
    trainer_bytes: int | None = None
    """What the largest of the trainer's ranks needs; None without a model."""
    trainer_formula: str = ""


def look(subject: Subject) -> Gpus:
    """Look for device files and the driver, and ask PyTorch."""
    version = pathlib.Path("/proc/driver/nvidia/version")
    driver = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", version.read_text()) if version.is_file() else None
    wanted = subject.get("device", "auto") == "cuda"
    run = run_of(subject.settings) if wanted else None
    needed, formula = (None, "") if run is None else _largest_rank(run)
    return Gpus(
        visible_gpus(),
        driver[0] if driver else None,
        torch_facts(),
        wanted,
        needed,
        formula,
    )


def _largest_rank(run: Run) -> tuple[int, str]:
    """Return the most that a rank of any pipeline stage needs, and of what that consists."""
    stages = range(run.settings.pipeline_model_parallel_size)
    parts = max(([*trainer_parts(run, stage)[0], context_part()] for stage in stages), key=peak)
    return peak(parts), ", ".join(f"{part.name} {size(part.bytes)}" for part in parts)


def judge(facts: Gpus) -> list[Finding]:
    """Judge driver, build and capability, and whether the trainer's state fits into a GPU's memory."""
    if not facts.visible:
        if facts.wanted:
            return [
                fail("no GPU for this process", "--device cpu, or: unset CUDA_VISIBLE_DEVICES; docker run --gpus all")
            ]
        return [ok("no GPU for this process; runs use the processor")]
    torch = facts.torch
    if torch is None:
        return [ok(f"{facts.visible} GPUs; PyTorch is not installed, as on a machine for the client alone")]
    driver = f"driver {facts.driver or 'unknown'}, PyTorch {torch['version']} for CUDA {torch['cuda_build'] or 'none'}"
    if torch["cuda_build"] is None:
        change = "pip install torch from the index of CUDA builds, or --device cpu"
        return [(fail if facts.wanted else warn)(f"{facts.visible} GPUs, but a CPU build: {driver}", change)]
    if not torch["cuda_works"]:
        change = f"install a driver for CUDA {torch['cuda_build']}, or a PyTorch built for this driver"
        return [(fail if facts.wanted else warn)(f"{facts.visible} GPUs that PyTorch cannot use: {driver}", change)]
    found = [ok(f"{facts.visible} GPUs: {', '.join(sorted({gpu['name'] for gpu in torch['gpus']}))}; {driver}")]
    for number, gpu in enumerate(torch["gpus"]):
        found += _judge_gpu(number, gpu, torch["built_for"], facts)
    return found


def _judge_gpu(number: int, gpu: dict[str, Any], built_for: list[str], facts: Gpus) -> list[Finding]:
    major, minor = gpu["capability"]
    runs = any(re.fullmatch(rf"sm_{major}[0-{minor}][a-z]?", arch) for arch in built_for)
    if built_for and not runs and not any(arch.startswith("compute_") for arch in built_for):
        known = f"GPU {number} ({gpu['name']}) has compute capability {major}.{minor}, PyTorch is built for {built_for}"
        return [fail(known, "install a PyTorch that is built for it, or hide the GPU with CUDA_VISIBLE_DEVICES")]
    found = []
    if (major, minor) < (8, 0):
        slow = f"GPU {number} ({gpu['name']}, {major}.{minor}) has no units for bfloat16"
        found.append(warn(slow, "--train-dtype float16 or float32"))
    if facts.trainer_bytes is not None and facts.trainer_bytes > gpu["bytes"]:
        needed = f"each trainer rank needs about {size(facts.trainer_bytes)} ({facts.trainer_formula})"
        change = "see `miles plan`; raise --actor-num-gpus-per-node, or use --fsdp-cpu-offload or --lora-rank 16"
        found.append(fail(f"{needed} and GPU {number} has {size(gpu['bytes'])}", change))
    return found
