"""What rounding a product's numbers to few bits takes, beside the product.

    python -m benchmarks.gpu.rounding
    python -m benchmarks.gpu.rounding --device cpu --rows 512 --outputs 1024 --inputs 1024

One table, medians of interleaved runs in bfloat16: the product of inputs (rows, inputs) with a weight (outputs,
inputs), the weight rounded, the inputs rounded, and both as a share of the product.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format

RECIPES = {
    "fp8_block": Recipe(format="fp8_block"),
    "int4": Recipe(format="int4"),
    "mxfp8": Recipe(format="mxfp8"),
    "nvfp4": Recipe(format="nvfp4"),
}
WARM_UP = 3


def seconds(function: Callable[[], Any], device: str) -> float:
    """Time of one call, until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    weight, rows = (
        torch.randn(size, options.inputs, generator=generator).to(options.device, torch.bfloat16)
        for size in (options.outputs, options.rows)
    )
    calls: dict[tuple[str, str], Callable[[], Any]] = {("product", ""): lambda: rows @ weight.T}
    for name, recipe in RECIPES.items():
        form = weight_format(recipe)
        both: dict[str, Callable[[], Any]] = {"weight": lambda form=form: form.rounded(weight)}
        if recipe.rounds_inputs:
            both["inputs"] = lambda form=form: form.rounded_rows(rows)
        calls |= {(name, what): call for what, call in both.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for repeat in range(WARM_UP + options.repeats):
        for key, call in calls.items():
            spent = seconds(call, options.device)
            if repeat >= WARM_UP:
                times[key].append(spent)
    medians = {key: statistics.median(found) * 1e3 for key, found in times.items()}
    product = medians.pop(("product", ""))
    print(f"product of {tuple(rows.shape)} and {tuple(weight.shape)} transposed: {product:.3f} ms\n")
    print("| format | weight, ms | inputs, ms | both / product |\n|---|---|---|---|")
    for name in dict.fromkeys(name for name, _ in medians):
        of_weight, of_inputs = (medians.get((name, what), 0.0) for what in ("weight", "inputs"))
        print(f"| {name} | {of_weight:.3f} | {of_inputs:.3f} | {(of_weight + of_inputs) / product:.2f} |")


if __name__ == "__main__":
    main()
