"""The tensors of a checkpoint's model as SGLang takes them, to refuse others before a server loads them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import torch

from miles.config.checks.engine_model import misbuilt
from miles.config.checks.json_file import read_json_object
from miles.engine_spec import engine_spec
from miles.precision.recipe import Recipe
from miles.precision.tensors import QuantisedTensors
from miles.weights.naming.contract import WeightContract
from miles.weights.naming.conversion import Shapes
from miles.weights.naming.model_tensors import read_model_tensors
from miles.weights.naming.published import PublishedTensors, misfits, refuse


@dataclasses.dataclass(frozen=True, slots=True)
class PartLayout:
    """Tensors of a version whose matrices are quantised."""

    format: str
    shapes: Shapes
    """Of parts, and of tensors that are not quantised."""
    dtypes: Mapping[str, torch.dtype]
    """Of parts alone."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelLayout:
    """Tensors and sizes of a checkpoint's model."""

    shapes: Shapes
    """Shape of every tensor of a version, by name."""
    vocabulary: int
    max_positions: int
    form: str = "checkpoint"
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further names of tied tensors, each with the one in `shapes`. SGLang ties them only for some model types, and
    otherwise needs the weights under every name."""
    parts: PartLayout | None = None
    """How matrices are quantised; None: not at all."""

    def refuse_misfits(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Raise WeightsRefused unless this is a full set of weights that were made for servers of `dtype`.

        SGLang ignores unknown names and keeps old weights where none are sent: both would go unnoticed.
        """
        parts = {} if self.parts is None else self.parts.dtypes
        faults = misfits(
            self.parts.shapes if self.parts else self.shapes,
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        )
        for name, tensor in tensors.items():
            wanted = parts.get(name, dtype)
            others = (wanted,) if name in parts else (wanted, torch.float32)
            if tensor.dtype not in others and (name in parts or tensor.is_floating_point()):
                faults.append(f"{name} is {tensor.dtype} instead of {wanted}")
        quantised = "" if self.parts is None else f", quantised to {self.parts.format}"
        refuse(faults, "the model", f"; SGLang takes its tensors in the {self.form} form{quantised}")


def parts_of(recipe: Recipe, shapes: Shapes, dtype: torch.dtype) -> PartLayout:
    """What a version consists of whose matrices are quantised from `dtype`."""
    quantised = QuantisedTensors(recipe)
    sizes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, shape in shapes.items():
        layout = quantised.layout(name, dtype, shape)
        sizes |= {part: size for part, _, size in layout}
        if quantised.covers(name, dtype, len(shape)):
            dtypes |= {part: kind for part, kind, _ in layout}
    return PartLayout(recipe.format, sizes, dtypes)


def read_layout(
    hf_checkpoint: str, contract: WeightContract, recipe: Recipe | None = None, dtype: torch.dtype = torch.bfloat16
) -> ModelLayout:
    """Read the layout of a checkpoint's model, but no weights. Matrices are quantised by the recipe from `dtype`.

    Raises OSError or ValueError when transformers has no causal language model of the checkpoint's type, or SGLang
    builds another one.
    """
    problem = misbuilt(engine_spec("sglang"), read_json_object(pathlib.Path(hf_checkpoint) / "config.json"))
    if problem is not None:
        raise ValueError(f"{hf_checkpoint}: {problem}; set rollout_backend to torch")
    model = read_model_tensors(hf_checkpoint)
    config = model.config
    shapes = PublishedTensors(model, contract).shapes
    return ModelLayout(
        shapes,
        int(config.vocab_size),
        int(getattr(config, "max_position_embeddings", 0) or 0),
        contract.form,
        model.aliases,
        None if recipe is None else parts_of(recipe, shapes, dtype),
    )
