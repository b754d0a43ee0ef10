"""A model as a Hugging Face folder in FP8 or INT4: written from another folder, and compared with one."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping

import torch

from miles.config.checks.json_file import read_json_object
from miles.precision.int4 import SHAPE_SUFFIX
from miles.precision.recipe import Recipe
from miles.precision.tensors import QuantisedTensors
from miles.services.trainer.checkpoint.plain_model import plain_tensors, refuse_missing, start_folder
from miles.services.trainer.checkpoint.quantised_files import QuantisingWriter, refuse_unfit
from miles.weights.hf_folder.plain_tensors import PlainTensors
from miles.weights.naming.model_tensors import ModelTensors, read_model_tensors


def write_quantised_model(source: pathlib.Path, directory: pathlib.Path, recipe: Recipe, dtype: torch.dtype) -> None:
    """Write the model of `source` to a new folder, a tensor at a time: what a trainer with this recipe publishes first.

    Matrices are quantised from `dtype`, which also what is not quantised is in. MTP layers are covered like the layers
    before them; tensors that are neither the model's nor theirs are copied.

    Raises ValueError for a model that transformers does not know, matrices that the format cannot hold, weights that
    are quantised in an unknown way, and missing tensors.
    """
    start_folder(source, directory, dtype)
    model = read_model_tensors(directory)
    expected = model.conversion.checkpoint_shapes(model.module)
    known = {**expected, **model.mtp}
    refuse_unfit(recipe, known)
    writer, written = QuantisingWriter(directory, recipe, known), {}
    for name, tensor in plain_tensors(source, dtype):
        writer.add(name, tensor.to(model.exported_dtype(name, tensor.dtype, dtype)))
        written[name] = tuple(tensor.shape)
    writer.finish()
    refuse_missing(expected, written, model.model_type)


def differences(plain: pathlib.Path, quantised: pathlib.Path) -> Iterator[str]:
    """Yield how a quantised folder differs from what the weights of another one become, a sentence for each tensor.

    Every tensor is compared bit for bit, one at a time. Raises ValueError when `quantised` is not quantised.
    """
    config = read_json_object(quantised / "config.json")
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"))
    stored = PlainTensors(quantised, dtype)
    if stored.recipe is None:
        raise ValueError(f"the weights of {quantised} are not quantised; its config.json has no quantization_config")
    model, quantiser = read_model_tensors(quantised), QuantisedTensors(stored.recipe)
    seen = set()
    for name, tensor in plain_tensors(plain, dtype):
        seen.add(name)
        if name not in stored:
            yield f"{name} is missing"
            continue
        expected = _expected(name, tensor, quantiser, model, dtype)
        if (problem := _difference(expected, stored.parts(name))) is not None:
            yield f"{name} {problem}"
    for name in stored:
        if name not in seen:
            yield f"{name} is not in {plain}"


def _expected(
    name: str, tensor: torch.Tensor, quantiser: QuantisedTensors, model: ModelTensors, dtype: torch.dtype
) -> Mapping[str, torch.Tensor]:
    exported = tensor.to(model.exported_dtype(name, tensor.dtype, dtype))
    return {part.removeprefix(name): made for part, made in quantiser.convert(name, exported)}


def _difference(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str | None:
    if expected.keys() != found.keys():
        return "is not quantised" if "" in found and len(found) == 1 else "is quantised"
    for suffix, tensor in expected.items():
        other = found[suffix]
        if suffix == SHAPE_SUFFIX:
            other = other.to(tensor.dtype)  # written as 32 bits by some, and as 64 by others
        if other.dtype != tensor.dtype or other.shape != tensor.shape:
            return f"has {_layout(other)} in place of {_layout(tensor)} ({suffix or 'values'})"
        if not torch.equal(_bytes(other), _bytes(tensor)):
            return f"has other {suffix or 'values'}"
    return None


def _layout(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
