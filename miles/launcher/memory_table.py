"""Memory of GPUs as a table: a column for each kind of rank, a row for each part, and the whole model by format."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from miles.launcher.memory_view import Estimate, host_total
from miles.memory.amount import GIB, Part, When, number, peak
from miles.memory.by_format import weights_by_format
from miles.memory.report import GpuLoad, Report, Use
from miles.memory.run import Run
from miles.precision.recipe import Recipe

_TOGETHER, _CAPACITY = "at most at once", "of"


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """Ranks of a trainer, or GPUs of engines, that take the same."""

    process: str
    """trainer or engine."""
    ranks: int
    """How many they are; of a trainer's ranks a pipeline stage is a column."""
    first: Use
    load: GpuLoad | None
    """The GPU of the first, with all that is on it; None on CPUs."""

    @property
    def title(self) -> str:
        """Name it and say how many ranks there are."""
        return f"{self.process} × {self.ranks}"


def columns(report: Report) -> list[Column]:
    """Return kinds of ranks in the order of processes."""
    loads = {(load.node, load.gpu): load for load in report.gpus}
    kinds: dict[tuple[str, tuple[Part, ...]], list[Use]] = {}
    for use in report.uses:
        process = "trainer" if use.process.startswith("trainer") else "engine"
        kinds.setdefault((process, use.device), []).append(use)
    return [
        Column(process, len(uses), uses[0], None if uses[0].gpu is None else loads[uses[0].node, uses[0].gpu])
        for (process, _), uses in kinds.items()
    ]


def as_text(found: Estimate, notes: Sequence[str]) -> list[str]:
    """Return the lines of both tables, formulas and notes."""
    lines = model_lines(found.run)
    kinds = columns(found.report)
    lines += ["", *precision_lines(found.run), "", *_aligned(_rows(kinds))]
    for kind in kinds:
        lines += ["", f"{kind.title}, {kind.first.process} {kind.first.part} and its like:"]
        lines += [f"  {part.name}: {part.formula}{_when(part)}" for part in kind.first.device]
    largest = max(found.report.nodes, key=lambda node: node.peak)
    return [*lines, "", host_total(found, largest), *notes]


def model_lines(run: Run) -> list[str]:
    """Return the whole model's weights by format; GB are 10^9 bytes."""
    shape, parameters = run.policy.shape, run.policy.parameters
    if shape is None:
        return [f"{number(parameters.total)} parameters"]
    experts = f", of which routed experts' {number(parameters.experts)}" if parameters.experts else ""
    rows = [["weights of the whole model", "GB", "GiB", "bits each"]]
    for name, weights in weights_by_format(shape, group_size(run)).items():
        rows.append([name, f"{weights.bytes / 1e9:.1f}", f"{weights.bytes / GIB:.1f}", f"{weights.bits:.2f}"])
    return [f"{number(parameters.total)} parameters{experts}", "", *_aligned(rows)]


def precision_lines(run: Run) -> list[str]:
    """Return what trainer and engines compute in and hold."""
    published = run.published
    types = {2: "16 bits", 4: "float32"}
    return [
        f"trainer: {types[run.train_bytes]}{_with(run.training)}",
        f"engines and versions: {types[run.engine_bytes]}{_with(run.serving)}: {published.formula}",
    ]


def group_size(run: Run) -> int:
    """Return the group size of INT4 that a run has, or would have."""
    recipe = next((each for each in (run.training, run.serving) if each is not None and each.format == "int4"), None)
    return 128 if recipe is None else recipe.group_size


def as_json(found: Estimate, notes: Sequence[str]) -> dict[str, Any]:
    """Return the same as a JSON object; sizes are bytes."""
    run = found.run
    shape = run.policy.shape
    formats = {} if shape is None else weights_by_format(shape, group_size(run))
    return {
        "parameters": dataclasses.asdict(run.policy.parameters) | {"total": run.policy.parameters.total},
        "weights": {name: {"bytes": held.bytes, "bits": held.bits} for name, held in formats.items()},
        "published_bytes": run.published.bytes,
        "precision": precision_lines(run),
        "fits": found.fits,
        "columns": [
            {
                "process": kind.process,
                "ranks": kind.ranks,
                "parts": list(map(dataclasses.asdict, kind.first.device)),
                "peak": peak(kind.first.device),
                "gpu": None if kind.load is None else {"peak": kind.load.peak, "capacity": kind.load.capacity},
            }
            for kind in columns(found.report)
        ],
        "host_bytes": max(node.peak for node in found.report.nodes),
        "notes": list(notes),
    }


def _with(recipe: Recipe | None) -> str:
    if recipe is None:
        return ""
    groups = f" by {recipe.group_size}" if recipe.format == "int4" else ""
    return f" and {recipe.format}{groups}"


def _rows(kinds: Sequence[Column]) -> list[list[str]]:
    """Return a row for each part of any column; of one column's parts with one name, the sum."""
    names = list(dict.fromkeys(part.name + _when(part) for kind in kinds for part in kind.first.device))
    rows = [["GiB of each", *(kind.title for kind in kinds)]]
    for name in names:
        each = [[part for part in kind.first.device if part.name + _when(part) == name] for kind in kinds]
        rows.append([name, *(_gib(sum(part.bytes for part in parts)) if parts else "" for parts in each)])
    rows.append([_TOGETHER, *(_gib(peak(kind.first.device)) for kind in kinds)])
    shared = [kind for kind in kinds if kind.load is not None and len(kind.load.uses) > 1]
    if shared:
        rows.append(["all that is on the GPU", *(_gib(kind.load.peak) if kind.load else "" for kind in kinds)])
    if any(kind.load is not None and kind.load.capacity for kind in kinds):
        rows.append([_CAPACITY, *(_gib(kind.load.capacity or 0) if kind.load else "" for kind in kinds)])
    return rows


def _when(part: Part) -> str:
    return "" if part.when is When.ALWAYS else f", {part.when}"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines: the first column to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, others, strict=True))
        lines.append("  ".join([f"{name:<{first}}", *numbers]).rstrip())
    return lines
