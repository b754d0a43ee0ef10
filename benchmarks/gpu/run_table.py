"""Markdown tables of whole runs: what they were on, and a column for each run."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

Rows = Mapping[str, tuple[str, str]]
"""Key of a result and format of its value, by the title of the row."""
PACKAGES = ("torch", "sglang", "transformers", "megatron-core", "megatron-bridge", "transformer-engine", "flash-attn")
SHARED_ROWS: Rows = {
    "exit status": ("status", "{}"),
    "steps": ("steps", "{}"),
    "greedy accuracy before": ("before", "{:.3f}"),
    "greedy accuracy after": ("after", "{:.3f}"),
    "mean reward": ("reward", "{:.3f}"),
    "mean difference of log-probs, trainer − engine, nats": ("abs_diff", "{:.5f}"),
    "mean KL (k3) between engine and trainer": ("kl", "{:.2e}"),
    "tokens routed differently": ("routed_differently", "{:.2%}"),
    "tokens × layers that replay sent elsewhere": ("routing_difference", "{:.2%}"),
    "median step, s": ("step_s", "{:.2f}"),
    "of which generating, s": ("rollout_s", "{:.2f}"),
    "of which training, s": ("train_s", "{:.2f}"),
    "of which new weights, s": ("sync_s", "{:.2f}"),
    "response tokens/s over all steps": ("tokens_per_s", "{:,.0f}"),
    "wall time with start and evaluations, s": ("wall_s", "{:.0f}"),
}
"""Of what `benchmarks.gpu.grpo_run.train` returns."""


def hardware(device: str) -> str:
    """What the runs were on."""
    if device == "cpu":
        return f"{os.cpu_count()} CPU cores"
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    return f"{len(found)} × {found[0].replace(', ', ', driver ')}, {os.cpu_count()} CPU cores"


def versions() -> str:
    """Packages that decide the numbers."""
    found = {name: _version(name) for name in PACKAGES}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(results: Mapping[str, Mapping[str, Any]], rows: Rows, device: str) -> str:
    """Markdown: a column for each run, and the rows that any of them has."""
    module = sys.modules["__main__"].__spec__
    command = f"python -m {module.name if module else '?'} {shlex.join(sys.argv[1:])}"
    lines = [
        f"{hardware(device)}; Python {sys.version.split()[0]}, {versions()}; {datetime.date.today()}:",
        f"`{command}`",
        "",
        "| | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
    ]
    for title, (key, form) in rows.items():
        cells = [form.format(result[key]) if key in result else "" for result in results.values()]
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
