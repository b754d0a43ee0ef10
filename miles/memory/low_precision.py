"""What training by a recipe takes besides weights, gradients and optimizer, which stay in 16 and 32 bits.

TransformerEngine quantises a matrix in the first micro-batch of a step and keeps its values and scales by rows and by
columns, for the forward and the backward product, until the next step overwrites them or the trainer is parked.
Emulation rounds to the type of the computation: fsdp on one rank in place, in the working weights; several ranks in
every forward pass, whose backward pass needs the rounded weights; Megatron once for all micro-batches of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from miles.config.rules.precision import why_emulated
from miles.memory.amount import Part, When, number
from miles.memory.held import covered_parameters, held, is_covered
from miles.memory.megatron import layout_of, on_rank, stage_layers
from miles.memory.model import ModelShape
from miles.memory.parameters import Parameters
from miles.memory.run import Run
from miles.memory.tensors import layer_tensors, model_tensors, mtp_tensors
from miles.precision.recipe import Recipe

KERNEL_WEIGHTS = "weights in FP8 by rows and columns"


def by_kernels(run: Run) -> bool:
    """Whether TransformerEngine may compute in the trainer's format; where it cannot, emulation does, with less."""
    s = run.settings
    if run.training is None or run.train_bytes != 2 or s.low_precision_impl == "emulated":
        return False
    return why_emulated(s) is None


def notes(run: Run) -> Iterator[str]:
    """Yield what the estimates of a run in few bits leave out, in words."""
    if run.training is not None and by_kernels(run):
        yield (
            "activations are counted as in 16 bits, an upper bound: TransformerEngine keeps the inputs of matrices for "
            "the backward pass in FP8 alone"
        )
        yield (
            "TransformerEngine is taken to be installed on a GPU that has the kernels; emulation holds rounded weights "
            "in 16 bits instead, which is less"
        )
    if run.serving is not None and run.settings.rollout_backend == "sglang":
        yield "SGLang's copies of weights for its kernels, such as those of latent attention, are not counted"


def low_precision_parts(run: Run, stage: int = 0) -> list[Part]:
    """Return what a rank of a stage takes besides; nothing without a recipe, or for a model of unknown shape."""
    shape, recipe = run.policy.shape, run.training
    if shape is None or recipe is None:
        return []
    if run.settings.train_backend == "megatron":
        return _megatron(run, shape, recipe, stage)
    if run.alone:
        return []  # in the working weights
    each = [_covered(shape, layer, recipe).total for layer in range(shape.layers)]
    if run.settings.gradient_checkpointing:
        return _rounded(run, max(each), "of the layer that is recomputed")
    return _rounded(run, sum(each), "of every layer")


def _megatron(run: Run, shape: ModelShape, recipe: Recipe, stage: int) -> list[Part]:
    layout = layout_of(run)
    layers = [_covered(shape, layer, recipe) for layer in stage_layers(shape, layout, stage)]
    if stage == layout.pipeline - 1:
        numbers = range(run.settings.mtp_num_layers or 0)
        layers += [covered_parameters(mtp_tensors(shape, number), recipe) for number in numbers]
    count = on_rank(sum(layers, Parameters()), shape, layout).total
    if not by_kernels(run):
        return _rounded(run, count, "of this rank, once for all micro-batches")
    each = _bytes_each(shape, recipe)
    formula = f"{number(count)} parameters × 2 × {each:.5g} bytes, kept by TransformerEngine"
    return [Part(KERNEL_WEIGHTS, int(count * 2 * each), formula)]


@functools.lru_cache(maxsize=4096)
def _covered(shape: ModelShape, layer: int, recipe: Recipe) -> Parameters:
    return covered_parameters(layer_tensors(shape, layer), recipe)


@functools.lru_cache(maxsize=64)
def _bytes_each(shape: ModelShape, recipe: Recipe) -> float:
    found = held((tensor for tensor in model_tensors(shape) if is_covered(tensor, recipe)), recipe, 2)
    return found.bytes / max(1, found.parameters)


def _rounded(run: Run, count: int, which: str) -> list[Part]:
    formula = f"{number(count)} parameters {which} × {run.train_bytes} bytes"
    return [Part("rounded weights", count * run.train_bytes, formula, When.TRAINING)] if count else []
